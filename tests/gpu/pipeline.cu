// A product by cp.async, ldmatrix and mma, for the test of their models; PLANT leaves out what each schedule must find missing.
#include "csrc/cuda/ptx.h"

constexpr int TILE = 64, DEPTH = 32, STAGES = 2, A_ROW = DEPTH + 8, B_ROW = TILE + 8;  // the eight keep rows apart in the banks

// c (M, N) = a (M, K) b (K, N); K and N are multiples of 8, M and N of 64.
FASTLM_GLOBAL void __launch_bounds__(128) pipeline(float* c, const bfloat16* a, const bfloat16* b, int M, int N, int K) {
    FASTLM_SHARED(bfloat16, as, STAGES * TILE * A_ROW);
    FASTLM_SHARED(bfloat16, bs, STAGES * DEPTH * B_ROW);
    const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, m0 = int(blockIdx.y) * TILE,
              n0 = int(blockIdx.x) * TILE;
    const auto fetch = [&](int step) {
        const int stage = step % STAGES, k0 = step * DEPTH;
        if (k0 < K) {
            for (int i = thread; i < TILE * DEPTH / 8; i += 128) {
                const int r = i / (DEPTH / 8), k = i % (DEPTH / 8) * 8;
                const bool there = k0 + k < K;
                ptx::cp_async_16(as + (stage * TILE + r) * A_ROW + k, there ? a + int64_t(m0 + r) * K + k0 + k : a, there ? 16 : 0);
            }
            for (int i = thread; i < TILE * DEPTH / 8; i += 128) {
                const int k = i / (TILE / 8), n = i % (TILE / 8) * 8;
                const bool there = k0 + k < K;
                ptx::cp_async_16(bs + (stage * DEPTH + k) * B_ROW + n, there ? b + int64_t(k0 + k) * N + n0 + n : b,
                                 there ? 16 : 0);
            }
        }
        ptx::cp_async_commit();
    };
    float sums[TILE / 8][4] = {};
    fetch(0);
    for (int step = 0; step * DEPTH < K; ++step) {
        fetch(step + 1);
#ifdef PLANT_NO_WAIT
        ptx::cp_async_wait<2>();
#else
        ptx::cp_async_wait<1>();
#endif
#ifndef PLANT_NO_FIRST_BARRIER
        __syncthreads();
#endif
        const bfloat16 *at = as + step % STAGES * TILE * A_ROW, *bt = bs + step % STAGES * DEPTH * B_ROW;
        for (int k = 0; k < DEPTH; k += 16) {
            uint32_t x[4], y[4];
            ptx::ldmatrix_x4(x, at + (warp * 16 + lane % 16) * A_ROW + k + lane / 16 * 8);
            for (int n = 0; n < TILE / 8; n += 2) {
                ptx::ldmatrix_x4_trans(y, bt + (k + lane % 16) * B_ROW + n * 8 + lane / 16 * 8);
                ptx::mma_16816(sums[n], x, y);
                ptx::mma_16816(sums[n + 1], x, y + 2);
            }
        }
#ifndef PLANT_NO_LAST_BARRIER
        __syncthreads();
#endif
    }
    for (int n = 0; n < TILE / 8; ++n)
        for (int i = 0; i < 4; ++i)
            c[int64_t(m0 + warp * 16 + lane / 4 + 8 * (i / 2)) * N + n0 + n * 8 + lane % 4 * 2 + i % 2] = sums[n][i];
}
FASTLM_KERNEL(pipeline)
