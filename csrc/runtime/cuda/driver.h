// The CUDA driver, opened at run time: nothing here links to libcuda, so a build runs on machines that have none.
//
// One device, its primary context (shared with other libraries of the process), memory from a pool of our own.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastlm::cuda {

// What the driver refused, with its name and what was being done.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Status {
    bool usable = false;
    std::string why;         // where it is not: what is missing and what to do
    int driver_version = 0;  // 12080 is CUDA 12.8; 0 without a driver
};

// Opens the driver and makes the context of device FASTLM_CUDA_DEVICE (default 0), once; later calls return the first answer.
const Status& status();

struct Properties {
    std::string name;
    int major, minor, multiprocessors, shared_memory;  // shared_memory: bytes of one block, opted in
    size_t memory;
};
Properties properties();

using Pointer = CUdeviceptr;
using Stream = CUstream;

// Stream-ordered memory. Allocations are aligned to 256 bytes. free may be called while kernels that use the memory are queued on
// the same stream.
Pointer allocate(size_t bytes, Stream);
void free(Pointer, Stream) noexcept;
struct Memory {
    size_t used, reserved;
};
Memory memory();  // of the pool

void copy_in(Pointer to, const void* from, size_t bytes, Stream);  // returns when `from` may be changed
void copy_out(void* to, Pointer from, size_t bytes, Stream);       // returns when it is there
void copy(Pointer to, Pointer from, size_t bytes, Stream);
// rows of `width` bytes, with pitches
void copy_2d(Pointer to, size_t to_pitch, Pointer from, size_t from_pitch, size_t width, size_t rows, Stream);
void fill(Pointer, uint8_t byte, size_t bytes, Stream);

Stream create_stream();
void destroy_stream(Stream) noexcept;
void synchronize(Stream);

CUevent create_event();
void destroy_event(CUevent) noexcept;
void record(CUevent, Stream);
void wait(Stream, CUevent);
float milliseconds(CUevent from, CUevent to);

// Everything launched on the stream between begin and end becomes one graph; memory allocated in between belongs to it.
void begin_capture(Stream);
CUgraphExec end_capture(Stream);
void launch_graph(CUgraphExec, Stream);
void destroy_graph(CUgraphExec) noexcept;

CUmodule load_module(const void* image);
void unload_module(CUmodule) noexcept;
// shared: dynamic shared memory in bytes that launches will ask for; above 48 KB it is opted into here.
CUfunction function(CUmodule, const char* name, int shared);

struct Launch {
    CUfunction function;
    uint32_t grid[3], block, shared;
    uint32_t cluster = 1;
    bool overlap = false;  // programmatic dependent launch: may begin while the kernel before it ends
};
void launch(const Launch&, Stream, void** arguments);

// A tile of a row-major matrix (rows, columns) of bfloat16 for TMA, swizzled by 128 bytes.
CUtensorMap tensor_map(Pointer, uint64_t rows, uint64_t columns, uint64_t row_bytes, uint32_t box_rows, uint32_t box_columns);

}  // namespace fastlm::cuda
