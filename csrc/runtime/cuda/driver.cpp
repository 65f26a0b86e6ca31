#include "csrc/runtime/cuda/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

// Every function of the driver that is used; the names resolve to the versioned symbols that cuda.h maps them to.
#define FASTLM_DRIVER(F)           \
    F(cuInit)                      \
    F(cuDriverGetVersion)          \
    F(cuDeviceGetCount)            \
    F(cuDeviceGet)                 \
    F(cuDeviceGetName)             \
    F(cuDeviceGetAttribute)        \
    F(cuDeviceTotalMem)            \
    F(cuDevicePrimaryCtxRetain)    \
    F(cuCtxSetCurrent)             \
    F(cuGetErrorName)              \
    F(cuGetErrorString)            \
    F(cuMemPoolCreate)             \
    F(cuMemPoolSetAttribute)       \
    F(cuMemPoolGetAttribute)       \
    F(cuMemAllocFromPoolAsync)     \
    F(cuMemFreeAsync)              \
    F(cuMemcpyHtoDAsync)           \
    F(cuMemcpyDtoHAsync)           \
    F(cuMemcpyDtoDAsync)           \
    F(cuMemcpy2DAsync)             \
    F(cuMemsetD8Async)             \
    F(cuStreamCreate)              \
    F(cuStreamDestroy)             \
    F(cuStreamSynchronize)         \
    F(cuStreamWaitEvent)           \
    F(cuEventCreate)               \
    F(cuEventDestroy)              \
    F(cuEventRecord)               \
    F(cuEventSynchronize)          \
    F(cuEventElapsedTime)          \
    F(cuStreamBeginCapture)        \
    F(cuStreamEndCapture)          \
    F(cuGraphInstantiateWithFlags) \
    F(cuGraphDestroy)              \
    F(cuGraphLaunch)               \
    F(cuGraphExecDestroy)          \
    F(cuModuleLoadData)            \
    F(cuModuleUnload)              \
    F(cuModuleGetFunction)         \
    F(cuFuncSetAttribute)          \
    F(cuLaunchKernelEx)            \
    F(cuTensorMapEncodeTiled)

#define FASTLM_STRING(x) #x
#define FASTLM_SYMBOL(x) FASTLM_STRING(x)  // expands cuda.h's macros first: cuMemAlloc is cuMemAlloc_v2 there

namespace fastlm::cuda {
namespace {

constexpr int kOldest = 12000;

struct Driver {
#define FASTLM_POINTER(name) decltype(&::name) name = nullptr;
    FASTLM_DRIVER(FASTLM_POINTER)
#undef FASTLM_POINTER
    CUdevice device = 0;
    CUcontext context = nullptr;
    CUmemoryPool pool = nullptr;
    Status status;
};
Driver d;

std::string describe(CUresult code) {
    const char *name = nullptr, *text = nullptr;
    d.cuGetErrorName(code, &name);
    d.cuGetErrorString(code, &text);
    return std::string(name ? name : "unknown error") + (text ? std::string(" (") + text + ")" : "");
}

void check(CUresult code, const char* doing) {
    if (code != CUDA_SUCCESS) throw Error(std::string("[cuda] ") + doing + " failed: " + describe(code) + ".");
}

// The context belongs to a thread: every entry makes ours current, which costs some ten nanoseconds where it is already.
void enter() {
    if (!status().usable) throw Error("[cuda] no usable device: " + status().why);
    check(d.cuCtxSetCurrent(d.context), "making the context current");
}

std::string version_text(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

std::string open() {
    const char* path = std::getenv("FASTLM_LIBCUDA");  // another libcuda, for tests
    void* library = dlopen(path ? path : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return "no NVIDIA driver is installed (libcuda.so.1 was not found).";
    d.cuDriverGetVersion = reinterpret_cast<decltype(&::cuDriverGetVersion)>(dlsym(library, "cuDriverGetVersion"));
    if (d.cuDriverGetVersion) d.cuDriverGetVersion(&d.status.driver_version);
    const std::string have = "the driver supports CUDA " + version_text(d.status.driver_version);
    const std::string update = "; CUDA " + version_text(kOldest) + " or newer is needed: update the driver.";
    if (d.status.driver_version < kOldest) return have + update;
#define FASTLM_LOAD(name)                                                              \
    d.name = reinterpret_cast<decltype(&::name)>(dlsym(library, FASTLM_SYMBOL(name))); \
    if (!d.name) return have + " but lacks " FASTLM_SYMBOL(name) + update;
    FASTLM_DRIVER(FASTLM_LOAD)
#undef FASTLM_LOAD
    if (const CUresult code = d.cuInit(0)) return "the driver is there, but no device is usable: " + describe(code) + ".";
    int count = 0, wanted = 0;
    d.cuDeviceGetCount(&count);
    if (count == 0) return "the driver is there, but it sees no device (CUDA_VISIBLE_DEVICES may hide it).";
    if (const char* text = std::getenv("FASTLM_CUDA_DEVICE")) wanted = std::atoi(text);
    if (wanted < 0 || wanted >= count)
        return "FASTLM_CUDA_DEVICE must be from 0 to " + std::to_string(count - 1) + ", got " + std::to_string(wanted) + ".";
    check(d.cuDeviceGet(&d.device, wanted), "choosing the device");
    int major = 0;
    check(d.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, d.device), "asking the device");
    if (major < 8) return "the device has compute capability " + std::to_string(major) + ".x; 8.0 (Ampere) or newer is needed.";
    if (const CUresult code = d.cuDevicePrimaryCtxRetain(&d.context, d.device)) return "no context: " + describe(code) + ".";
    check(d.cuCtxSetCurrent(d.context), "making the context current");
    CUmemPoolProps props{};
    props.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    props.location = {CU_MEM_LOCATION_TYPE_DEVICE, d.device};
    check(d.cuMemPoolCreate(&d.pool, &props), "making the memory pool");
    cuuint64_t keep = UINT64_MAX;  // what was freed stays for the next allocation
    check(d.cuMemPoolSetAttribute(d.pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &keep), "setting up the memory pool");
    return "";
}

}  // namespace

const Status& status() {
    static std::once_flag once;
    std::call_once(once, [] {
        try {
            d.status.why = open();
        } catch (const Error& error) { d.status.why = error.what(); }
        d.status.usable = d.status.why.empty();
    });
    return d.status;
}

Properties properties() {
    enter();
    const auto ask = [](CUdevice_attribute attribute) {
        int value = 0;
        check(d.cuDeviceGetAttribute(&value, attribute, d.device), "asking the device");
        return value;
    };
    char name[256] = "";
    check(d.cuDeviceGetName(name, sizeof name, d.device), "asking the device");
    size_t bytes = 0;
    check(d.cuDeviceTotalMem(&bytes, d.device), "asking the device");
    return {name,
            ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
            ask(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            ask(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
            bytes};
}

Pointer allocate(size_t bytes, Stream stream) {
    enter();
    Pointer p = 0;
    const CUresult code = d.cuMemAllocFromPoolAsync(&p, bytes ? bytes : 1, d.pool, stream);
    if (code == CUDA_ERROR_OUT_OF_MEMORY) {
        size_t total = 0;
        d.cuDeviceTotalMem(&total, d.device);
        throw Error("[cuda] out of memory: " + std::to_string(bytes) + " bytes asked for, " + std::to_string(memory().used) +
                    " in use here, the device has " + std::to_string(total) + ". Use a smaller batch, context or model.");
    }
    check(code, "allocating");
    return p;
}

void free(Pointer p, Stream stream) noexcept {
    if (p && d.status.usable && d.cuCtxSetCurrent(d.context) == CUDA_SUCCESS) d.cuMemFreeAsync(p, stream);
}

Memory memory() {
    enter();
    cuuint64_t used = 0, reserved = 0;
    check(d.cuMemPoolGetAttribute(d.pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, &used), "asking the memory pool");
    check(d.cuMemPoolGetAttribute(d.pool, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, &reserved), "asking the memory pool");
    return {size_t(used), size_t(reserved)};
}

void copy_in(Pointer to, const void* from, size_t bytes, Stream stream) {
    if (!bytes) return;
    enter();
    check(d.cuMemcpyHtoDAsync(to, from, bytes, stream), "copying to the device");
    check(d.cuStreamSynchronize(stream), "copying to the device");
}

void copy_out(void* to, Pointer from, size_t bytes, Stream stream) {
    if (!bytes) return;
    enter();
    check(d.cuMemcpyDtoHAsync(to, from, bytes, stream), "copying from the device");
    check(d.cuStreamSynchronize(stream), "copying from the device");
}

void copy(Pointer to, Pointer from, size_t bytes, Stream stream) {
    if (!bytes) return;
    enter();
    check(d.cuMemcpyDtoDAsync(to, from, bytes, stream), "copying on the device");
}

void copy_2d(Pointer to, size_t to_pitch, Pointer from, size_t from_pitch, size_t width, size_t rows, Stream stream) {
    if (!width || !rows) return;
    enter();
    CUDA_MEMCPY2D c{};
    c.srcMemoryType = c.dstMemoryType = CU_MEMORYTYPE_DEVICE;
    c.srcDevice = from, c.srcPitch = from_pitch;
    c.dstDevice = to, c.dstPitch = to_pitch;
    c.WidthInBytes = width, c.Height = rows;
    check(d.cuMemcpy2DAsync(&c, stream), "copying on the device");
}

void fill(Pointer p, uint8_t byte, size_t bytes, Stream stream) {
    if (!bytes) return;
    enter();
    check(d.cuMemsetD8Async(p, byte, bytes, stream), "filling memory");
}

Stream create_stream() {
    enter();
    Stream stream = nullptr;
    check(d.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "making a stream");
    return stream;
}
void destroy_stream(Stream stream) noexcept { d.cuStreamDestroy(stream); }
void synchronize(Stream stream) {
    enter();
    check(d.cuStreamSynchronize(stream), "waiting for the device");
}

CUevent create_event() {
    enter();
    CUevent event = nullptr;
    check(d.cuEventCreate(&event, CU_EVENT_DEFAULT), "making an event");
    return event;
}
void destroy_event(CUevent event) noexcept { d.cuEventDestroy(event); }
void record(CUevent event, Stream stream) {
    enter();
    check(d.cuEventRecord(event, stream), "recording an event");
}
void wait(Stream stream, CUevent event) {
    enter();
    check(d.cuStreamWaitEvent(stream, event, 0), "waiting for an event");
}
float milliseconds(CUevent from, CUevent to) {
    enter();
    float ms = 0;
    check(d.cuEventSynchronize(to), "waiting for an event");
    check(d.cuEventElapsedTime(&ms, from, to), "reading the time");
    return ms;
}

void begin_capture(Stream stream) {
    enter();
    check(d.cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "beginning to capture");
}
CUgraphExec end_capture(Stream stream) {
    enter();
    CUgraph graph = nullptr;
    check(d.cuStreamEndCapture(stream, &graph), "ending the capture");
    CUgraphExec ready = nullptr;
    const CUresult code = d.cuGraphInstantiateWithFlags(&ready, graph, 0);
    d.cuGraphDestroy(graph);
    check(code, "making a graph ready");
    return ready;
}
void launch_graph(CUgraphExec graph, Stream stream) {
    enter();
    check(d.cuGraphLaunch(graph, stream), "launching a graph");
}
void destroy_graph(CUgraphExec graph) noexcept { d.cuGraphExecDestroy(graph); }

CUmodule load_module(const void* image) {
    enter();
    CUmodule module = nullptr;
    check(d.cuModuleLoadData(&module, image), "loading a kernel");
    return module;
}
void unload_module(CUmodule module) noexcept { d.cuModuleUnload(module); }
CUfunction function(CUmodule module, const char* name, int shared) {
    enter();
    CUfunction f = nullptr;
    check(d.cuModuleGetFunction(&f, module, name), name);
    // The limit belongs to the function, which launches of other sizes have too: it only grows.
    static std::mutex guard;
    static std::map<CUfunction, int> limits;
    const std::lock_guard<std::mutex> hold(guard);
    int& limit = limits.try_emplace(f, 48 * 1024).first->second;
    if (shared > limit) {
        check(d.cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared), "opting into shared memory");
        limit = shared;
    }
    return f;
}

void launch(const Launch& l, Stream stream, void** arguments) {
    enter();
    CUlaunchAttribute attributes[2];
    unsigned n = 0;
    if (l.cluster > 1) {
        attributes[n].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attributes[n++].value.clusterDim = {l.cluster, 1, 1};
    }
    if (l.overlap) {
        attributes[n].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes[n++].value.programmaticStreamSerializationAllowed = 1;
    }
    const CUlaunchConfig config{l.grid[0], l.grid[1], l.grid[2], l.block, 1, 1, l.shared, stream, attributes, n};
    check(d.cuLaunchKernelEx(&config, l.function, arguments, nullptr), "launching a kernel");
}

CUtensorMap tensor_map(Pointer p, uint64_t rows, uint64_t columns, uint64_t row_bytes, uint32_t box_rows, uint32_t box_columns) {
    enter();
    CUtensorMap map;
    const cuuint64_t sizes[2] = {columns, rows}, strides[1] = {row_bytes};
    const cuuint32_t box[2] = {box_columns, box_rows}, steps[2] = {1, 1};
    check(d.cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, reinterpret_cast<void*>(p), sizes, strides, box,
                                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
          "describing a matrix for TMA");
    return map;
}

}  // namespace fastlm::cuda
