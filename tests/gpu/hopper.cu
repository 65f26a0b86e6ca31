// A product by TMA, barriers in shared memory and wgmma, for the test of their models; PLANT leaves out what must be found missing.
#include "csrc/cuda/ptx.h"

constexpr int STAGES = 2, BYTES = 64 * 128;

// c (M, N) = a b by tiles of 64 x 64: a warpgroup multiplies, a warp fetches. The maps' boxes are 64 x 64; A_MN: a is stored (K,
// M); B_MN: b is stored (K, N), else (N, K).
template <bool A_MN, bool B_MN>
__device__ __forceinline__ void product(float* c, const ptx::TensorMap* a, const ptx::TensorMap* b, int M, int N, int K) {
#ifdef FASTLM_HOPPER
    FASTLM_DYNAMIC_SHARED(memory);
    char *as = memory, *bs = memory + STAGES * BYTES;
    ptx::Mbarrier *full = reinterpret_cast<ptx::Mbarrier*>(memory + 2 * STAGES * BYTES), *empty = full + STAGES;
    const int thread = int(threadIdx.x), m0 = int(blockIdx.y) * 64, n0 = int(blockIdx.x) * 64, steps = (K + 63) / 64;
    if (thread == 0) {
        for (int s = 0; s < STAGES; ++s) ptx::mbarrier_init(full + s, 1), ptx::mbarrier_init(empty + s, 4);
        ptx::mbarrier_init_done();
    }
    __syncthreads();
    if (thread >= 128) {
        if (thread != 128) return;
        for (int i = 0; i < steps; ++i) {
            const int s = i % STAGES;
#ifndef PLANT_NO_EMPTY_WAIT
            ptx::mbarrier_wait(empty + s, (i / STAGES & 1) ^ 1);
#endif
            ptx::mbarrier_expect(full + s, 2 * BYTES);
            ptx::tma_load(as + s * BYTES, a, A_MN ? m0 : i * 64, A_MN ? i * 64 : m0, full + s);
            ptx::tma_load(bs + s * BYTES, b, B_MN ? n0 : i * 64, B_MN ? i * 64 : n0, full + s);
        }
        return;
    }
    float sums[32] = {};
    for (int i = 0; i < steps; ++i) {
        const int s = i % STAGES;
#ifndef PLANT_NO_FULL_WAIT
        ptx::mbarrier_wait(full + s, i / STAGES & 1);
#endif
        ptx::wgmma_fence();
        for (int k = 0; k < 4; ++k)
            ptx::wgmma<64, A_MN, B_MN>(sums, ptx::descriptor(as + s * BYTES + k * (A_MN ? 2048 : 32)),
                                       ptx::descriptor(bs + s * BYTES + k * (B_MN ? 2048 : 32)));
        ptx::wgmma_commit();
#ifndef PLANT_NO_PRODUCT_WAIT
        ptx::wgmma_wait<0>();
#endif
        __syncwarp();
        if (thread % 32 == 0) ptx::mbarrier_arrive(empty + s);
    }
    ptx::wgmma_wait<0>();
    for (int i = 0; i < 32; ++i) {
        const int m = m0 + thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2), n = n0 + i / 4 * 8 + thread % 4 * 2 + i % 2;
        if (m < M && n < N) c[int64_t(m) * N + n] = sums[i];
    }
#endif
}

#define FASTLM_FORM(name, A_MN, B_MN)                                                                                             \
    FASTLM_GLOBAL void __launch_bounds__(160)                                                                                     \
        name(float* c, const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b, int M, int N, int K) { \
        product<A_MN, B_MN>(c, &a, &b, M, N, K);                                                                                  \
    }                                                                                                                             \
    FASTLM_KERNEL(name)
FASTLM_FORM(hopper_nt, false, false)
FASTLM_FORM(hopper_nn, false, true)
FASTLM_FORM(hopper_tn, true, true)

// y (64, 64) = x x by wgmma from registers, stored by TMA.
FASTLM_GLOBAL void __launch_bounds__(128)
    hopper_store(const __grid_constant__ ptx::TensorMap y, const __grid_constant__ ptx::TensorMap x, const bfloat16* xs) {
#ifdef FASTLM_HOPPER
    FASTLM_DYNAMIC_SHARED(memory);
    ptx::Mbarrier* full = reinterpret_cast<ptx::Mbarrier*>(memory + 2 * BYTES);
    const int thread = int(threadIdx.x), lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    if (thread == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::mbarrier_init_done();
        ptx::mbarrier_expect(full, BYTES);
        ptx::tma_load(memory, &x, 0, 0, full);
    }
    __syncthreads();
    ptx::mbarrier_wait(full, 0);
    float sums[32] = {};
    uint32_t held[4][4];
    for (int k = 0; k < 4; ++k)
        for (int i = 0; i < 4; ++i) {
            const bfloat16* at = xs + (row + 8 * (i % 2)) * 64 + k * 16 + lane % 4 * 2 + 8 * (i / 2);
            held[k][i] = ptx::pack(to_float(at[0]), to_float(at[1]));
        }
    ptx::wgmma_fence();
    for (int k = 0; k < 4; ++k) ptx::wgmma<64, true>(sums, held[k], ptx::descriptor(memory + k * 2048));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (int i = 0; i < 32; i += 2) {
        const int r = row + 8 * (i / 2 % 2), c = i / 4 * 8 + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(memory + BYTES + r * 128 + ((c / 8 ^ r % 8) * 16) + c % 8 * 2) =
            ptx::pack(sums[i], sums[i + 1]);
    }
    ptx::async_fence();
    __syncthreads();
    if (thread == 0) {
        ptx::tma_store(&y, 0, 0, memory + BYTES);
        ptx::tma_store_commit();
        ptx::tma_store_wait<0>();
    }
#endif
}
FASTLM_KERNEL(hopper_store)
