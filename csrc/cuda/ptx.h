// Every instruction that C++ has no word for, under one name each: inline PTX on the device, a model on the host (ptx_model.h).
// Kernels contain no assembly. Fragments of the warp's matrices are laid out as in the PTX ISA, 9.7.14 "Matrix
// multiply-accumulate".
#pragma once

#include "csrc/cuda/device.h"

// Where the instructions of sm_90a are to be had.
#if defined(FASTLM_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTLM_HOPPER
#endif

#ifdef FASTLM_EMULATE
#include "csrc/cuda/ptx_model.h"
#else

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// --- asynchronous copies from global to shared memory (sm_80) ---

// 16 bytes, both addresses multiples of 16; of which `bytes` are read and the rest is zero. Nothing is read where bytes is 0.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes));
}
// 4 bytes, or zero.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int bytes = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes));
}
// This thread's copies since the last commit become a group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
// Until at most the N newest groups of this thread are under way. Other threads see the rest after a barrier.
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// --- tensor cores of a warp (sm_80) ---

// Four (two) 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes each, and gets of
// matrix i in r[i] elements (l / 4, 2 (l % 4)) and the next of the row; transposed: of the column.
__device__ __forceinline__ void ldmatrix_x4(uint32_t* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// d (16 x 8 float32) += a (16 x 16 bfloat16) b (16 x 8 bfloat16). Lane l, with g = l / 4 and t = l % 4, holds of d rows g and g + 8
// at columns 2 t, 2 t + 1; of a[0..3] rows g, g + 8, g, g + 8 at k = 2 t (+ 8 in a[2], a[3]); of b[0..1] column g at k = 2 t (+ 8).
__device__ __forceinline__ void mma_16816(float* d, const uint32_t* a, const uint32_t* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- barriers of a part of the block ---

// Waits for `threads` threads, whole warps, that come to barrier `id` (1 to 15; 0 is __syncthreads).
__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- numbers ---

// Two bfloat16 in a word, to nearest even, the first in the low half.
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// The float of these bits.
__device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
// 2^x, to two units in the last place; 2^-inf is 0.
__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace ptx

#include "csrc/cuda/ptx_hopper.h"
#endif
