// What every .cu file includes: types, shared memory, reductions. On the host (FASTLM_EMULATE) the same names are models.
#pragma once

#include <cstdint>

#ifdef FASTLM_EMULATE
#include "csrc/cuda/emulator.h"

// An array in shared memory, poisoned before each block runs.
#define FASTLM_SHARED(Type, name, count)                                             \
    static const size_t name##_at = emulator::reserve(sizeof(Type) * size_t(count)); \
    Type* const name = reinterpret_cast<Type*>(emulator::static_shared() + name##_at)
// The dynamic shared memory of the launch, aligned to 1024 bytes.
#define FASTLM_DYNAMIC_SHARED(name) char* const name = emulator::dynamic_shared()
// Makes a kernel known by its name. On the device the name is the entry point.
#define FASTLM_KERNEL(name) static const int name##_entered = emulator::enter(#name, name);
#define FASTLM_GLOBAL static

struct bfloat16 {
    uint16_t bits;
};
inline float to_float(bfloat16 x) {
    const uint32_t v = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &v, 4);
    return f;
}
inline bfloat16 to_bfloat16(float f) {
    if (f != f) return {0x7fc0};
    uint32_t v;
    std::memcpy(&v, &f, 4);
    return {uint16_t((v + 0x7fff + ((v >> 16) & 1)) >> 16)};
}
inline float rsqrt_exact(float x) { return 1.0f / std::sqrt(x); }
#else
#include <cuda_bf16.h>

extern __shared__ __align__(1024) char fastlm_dynamic_shared[];
#define FASTLM_SHARED(Type, name, count) __shared__ Type name[count]
#define FASTLM_DYNAMIC_SHARED(name) char* const name = fastlm_dynamic_shared
#define FASTLM_KERNEL(name)
#define FASTLM_GLOBAL extern "C" __global__

using bfloat16 = __nv_bfloat16;
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ bfloat16 to_bfloat16(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ float rsqrt_exact(float x) { return __frcp_rn(__fsqrt_rn(x)); }
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) { return to_bfloat16(x); }

// The sum over the 32 lanes, the same in all of them.
__device__ __forceinline__ float warp_sum(float v) {
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    for (int d = 16; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
    return v;
}

// The sum over a block of THREADS, the same in all of them, in a fixed order. `room` is shared memory for THREADS / 32 floats and
// may be used again after the next barrier.
template <int THREADS> __device__ __forceinline__ float block_sum(float v, float* room) {
    v = warp_sum(v);
    __syncthreads();  // the room may still be read by the sum before
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
#ifndef FASTLM_PLANT_NO_BARRIER  // a test of the emulator leaves it out
    __syncthreads();
#endif
    float total = 0.0f;
    for (int i = 0; i < THREADS / 32; ++i) total += room[i];
    return total;
}
