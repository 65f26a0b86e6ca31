/* A stand-in for libcuda.so.1: device memory is host memory, kernels are not run but written down.
 * STANDIN_LOG: the file for launches. STANDIN_VERSION: the driver's CUDA version. STANDIN_DEVICES: how many devices. STANDIN_MAJOR: their
 * compute capability. It checks what the real driver documents that it checks. */
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int setting(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}
static FILE* log_file(void) {
    static FILE* file;
    if (!file) {
        const char* path = getenv("STANDIN_LOG");
        file = path ? fopen(path, "a") : stderr;
        setvbuf(file, 0, _IOLBF, 0);
    }
    return file;
}
#define API(name) CUresult CUDAAPI name
static int context;
static CUcontext current;
static uint64_t used;
struct kernel {
    char name[128];
    int shared;
};

API(cuInit)(unsigned flags) { return flags || setting("STANDIN_DEVICES", 1) == 0 ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS; }
API(cuDriverGetVersion)(int* v) { return *v = setting("STANDIN_VERSION", 13000), CUDA_SUCCESS; }
API(cuDeviceGetCount)(int* n) { return *n = setting("STANDIN_DEVICES", 1), CUDA_SUCCESS; }
API(cuDeviceGet)(CUdevice* d, int i) { return *d = i, CUDA_SUCCESS; }
API(cuDeviceGetName)(char* s, int n, CUdevice d) { return (void)d, snprintf(s, (size_t)n, "stand-in"), CUDA_SUCCESS; }
API(cuDeviceGetAttribute)(int* v, CUdevice_attribute a, CUdevice d) {
    (void)d;
    switch (a) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *v = setting("STANDIN_MAJOR", 9); break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *v = 0; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = 132; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *v = 232448; break;
        default: *v = 1;
    }
    return CUDA_SUCCESS;
}
API(cuDeviceTotalMem)(size_t* bytes, CUdevice d) { return (void)d, *bytes = (size_t)80 << 30, CUDA_SUCCESS; }
API(cuDevicePrimaryCtxRetain)(CUcontext* c, CUdevice d) { return (void)d, *c = (CUcontext)&context, CUDA_SUCCESS; }
API(cuCtxSetCurrent)(CUcontext c) { return current = c, CUDA_SUCCESS; }
API(cuGetErrorName)(CUresult code, const char** s) {
    *s = code == CUDA_ERROR_NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : code == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_INVALID_VALUE";
    return CUDA_SUCCESS;
}
API(cuGetErrorString)(CUresult code, const char** s) { return (void)code, *s = "stand-in", CUDA_SUCCESS; }
API(cuMemPoolCreate)(CUmemoryPool* p, const CUmemPoolProps* props) { return (void)props, *p = (CUmemoryPool)&used, CUDA_SUCCESS; }
API(cuMemPoolSetAttribute)(CUmemoryPool p, CUmemPool_attribute a, void* v) { return (void)p, (void)a, (void)v, CUDA_SUCCESS; }
API(cuMemPoolGetAttribute)(CUmemoryPool p, CUmemPool_attribute a, void* v) { return (void)p, (void)a, *(cuuint64_t*)v = used, CUDA_SUCCESS; }
API(cuMemAllocFromPoolAsync)(CUdeviceptr* p, size_t bytes, CUmemoryPool pool, CUstream s) {
    (void)pool, (void)s;
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    if (bytes > (size_t)80 << 30) return CUDA_ERROR_OUT_OF_MEMORY;
    size_t* block = aligned_alloc(256, (bytes + 511) / 256 * 256);
    block[0] = bytes, used += bytes;
    *p = (CUdeviceptr)(uintptr_t)((char*)block + 256);
    return CUDA_SUCCESS;
}
API(cuMemFreeAsync)(CUdeviceptr p, CUstream s) {
    (void)s;
    size_t* block = (size_t*)((char*)(uintptr_t)p - 256);
    used -= block[0];
    free(block);
    return CUDA_SUCCESS;
}
API(cuMemcpyHtoDAsync)(CUdeviceptr to, const void* from, size_t n, CUstream s) { return (void)s, memcpy((void*)(uintptr_t)to, from, n), CUDA_SUCCESS; }
API(cuMemcpyDtoHAsync)(void* to, CUdeviceptr from, size_t n, CUstream s) { return (void)s, memcpy(to, (void*)(uintptr_t)from, n), CUDA_SUCCESS; }
API(cuMemcpyDtoDAsync)(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
    return (void)s, memcpy((void*)(uintptr_t)to, (void*)(uintptr_t)from, n), CUDA_SUCCESS;
}
API(cuMemcpy2DAsync)(const CUDA_MEMCPY2D* c, CUstream s) {
    (void)s;
    if (c->WidthInBytes > c->srcPitch || c->WidthInBytes > c->dstPitch) return CUDA_ERROR_INVALID_VALUE;
    for (size_t r = 0; r < c->Height; ++r)
        memcpy((char*)(uintptr_t)c->dstDevice + r * c->dstPitch, (char*)(uintptr_t)c->srcDevice + r * c->srcPitch, c->WidthInBytes);
    return CUDA_SUCCESS;
}
API(cuMemsetD8Async)(CUdeviceptr p, unsigned char v, size_t n, CUstream s) { return (void)s, memset((void*)(uintptr_t)p, v, n), CUDA_SUCCESS; }
API(cuStreamCreate)(CUstream* s, unsigned flags) { return (void)flags, *s = (CUstream)malloc(1), CUDA_SUCCESS; }
API(cuStreamDestroy)(CUstream s) { return free(s), CUDA_SUCCESS; }
API(cuStreamSynchronize)(CUstream s) { return (void)s, CUDA_SUCCESS; }
API(cuStreamWaitEvent)(CUstream s, CUevent e, unsigned f) { return (void)s, (void)e, (void)f, CUDA_SUCCESS; }
API(cuEventCreate)(CUevent* e, unsigned f) { return (void)f, *e = (CUevent)malloc(1), CUDA_SUCCESS; }
API(cuEventDestroy)(CUevent e) { return free(e), CUDA_SUCCESS; }
API(cuEventRecord)(CUevent e, CUstream s) { return (void)e, (void)s, CUDA_SUCCESS; }
API(cuEventSynchronize)(CUevent e) { return (void)e, CUDA_SUCCESS; }
API(cuEventElapsedTime)(float* ms, CUevent a, CUevent b) { return (void)a, (void)b, *ms = 0.0f, CUDA_SUCCESS; }
API(cuStreamBeginCapture)(CUstream s, CUstreamCaptureMode m) { return (void)s, (void)m, fprintf(log_file(), "begin capture\n"), CUDA_SUCCESS; }
API(cuStreamEndCapture)(CUstream s, CUgraph* g) { return (void)s, fprintf(log_file(), "end capture\n"), *g = (CUgraph)malloc(1), CUDA_SUCCESS; }
API(cuGraphInstantiateWithFlags)(CUgraphExec* e, CUgraph g, unsigned long long f) { return (void)g, (void)f, *e = (CUgraphExec)malloc(1), CUDA_SUCCESS; }
API(cuGraphDestroy)(CUgraph g) { return free(g), CUDA_SUCCESS; }
API(cuGraphLaunch)(CUgraphExec e, CUstream s) { return (void)e, (void)s, fprintf(log_file(), "launch graph\n"), CUDA_SUCCESS; }
API(cuGraphExecDestroy)(CUgraphExec e) { return free(e), CUDA_SUCCESS; }
API(cuModuleLoadData)(CUmodule* m, const void* image) {
    const char* bytes = image;
    if (memcmp(bytes, "\177ELF", 4) && !strstr(bytes, ".version")) return CUDA_ERROR_INVALID_IMAGE;
    return *m = (CUmodule)malloc(1), CUDA_SUCCESS;
}
API(cuModuleUnload)(CUmodule m) { return free(m), CUDA_SUCCESS; }
API(cuModuleGetFunction)(CUfunction* f, CUmodule m, const char* name) {
    (void)m;
    struct kernel* k = calloc(1, sizeof *k);
    snprintf(k->name, sizeof k->name, "%s", name);
    return *f = (CUfunction)k, CUDA_SUCCESS;
}
API(cuFuncSetAttribute)(CUfunction f, CUfunction_attribute a, int v) {
    if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) ((struct kernel*)f)->shared = v;
    return v > 232448 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
API(cuLaunchKernelEx)(const CUlaunchConfig* c, CUfunction f, void** p, void** extra) {
    struct kernel* k = (struct kernel*)f;
    if (!c->gridDimX || !c->gridDimY || !c->gridDimZ || extra || c->blockDimX > 1024) return CUDA_ERROR_INVALID_VALUE;
    if (c->sharedMemBytes > 48 * 1024 && (int)c->sharedMemBytes > k->shared) return CUDA_ERROR_INVALID_VALUE;
    fprintf(log_file(), "launch %s grid %u,%u,%u block %u shared %u:", k->name, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->sharedMemBytes);
    const char* sizes = getenv("STANDIN_SIZES"); /* of the arguments, one digit each, to write them down */
    for (int i = 0; sizes && sizes[i]; ++i) {
        uint64_t v = 0;
        memcpy(&v, p[i], (size_t)(sizes[i] - '0'));
        fprintf(log_file(), " %llx", (unsigned long long)v);
    }
    fprintf(log_file(), "\n");
    return CUDA_SUCCESS;
}
API(cuTensorMapEncodeTiled)(CUtensorMap* m, CUtensorMapDataType t, cuuint32_t rank, void* p, const cuuint64_t* sizes, const cuuint64_t* strides,
                            const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave i, CUtensorMapSwizzle s,
                            CUtensorMapL2promotion l, CUtensorMapFloatOOBfill o) {
    (void)t, (void)sizes, (void)steps, (void)i, (void)l, (void)o;
    if ((uintptr_t)p % 16 || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t k = 0; k + 1 < rank; ++k)
        if (strides[k] % 16) return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t k = 0; k < rank; ++k)
        if (box[k] < 1 || box[k] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (s == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 > 128) return CUDA_ERROR_INVALID_VALUE;
    memset(m, 0, sizeof *m);
    return CUDA_SUCCESS;
}
