// bfloat16 products on sm_90a: a warp fetches tiles by TMA, two warpgroups multiply, blocks go on from tile to tile.
#pragma once

#include "kernels/matmul/epilogue_cuda.h"

namespace {

// A tile is 128 x BN, each consumer has 64 rows of it. A stage is 64 deep.
template <int BN> struct Hopper {
    static constexpr int kTile = 128, kDepth = 64, kThreads = 384, kBlock = 64 * 128;  // bytes of 64 rows of 64
    static constexpr int kA = 2 * kBlock, kB = BN / 64 * kBlock, kStage = kA + kB, kStages = BN == 256 ? 4 : 6;
    static constexpr int kShared = kStages * kStage + 2 * kStages * 8;
};

// The place in the ring of stages, and the parity of its turn.
template <int STAGES> struct Turn {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// a and b as in matmul.h, their maps with boxes of 64 columns: a 128 rows, where transposed 64; b BN rows where transposed,
// else 64.
template <class C, bool A_T, bool B_T, int BN>
__device__ __forceinline__ void multiply_by_warpgroups(const ptx::TensorMap* a, const ptx::TensorMap* b,
                                                       const Output<C, bfloat16>& out, int K) {
#ifdef FASTLM_HOPPER
    using H = Hopper<BN>;
    FASTLM_DYNAMIC_SHARED(memory);
    ptx::Mbarrier *full = reinterpret_cast<ptx::Mbarrier*>(memory + H::kStages * H::kStage), *empty = full + H::kStages;
    const int thread = int(threadIdx.x), group = thread / 128, lane = thread % 32;
    const int tiles_m = (out.M + H::kTile - 1) / H::kTile, tiles_n = (out.N + BN - 1) / BN, steps = (K + H::kDepth - 1) / H::kDepth;
    if (thread == 0) {
        for (int s = 0; s < H::kStages; ++s) ptx::mbarrier_init(full + s, 1), ptx::mbarrier_init(empty + s, 8);
        ptx::mbarrier_init_done();
    }
    __syncthreads();
    Turn<H::kStages> turn;
    if (group == 2) {
        ptx::fewer_registers<40>();
        if (thread != 256) return;
        ptx::tma_prefetch(a), ptx::tma_prefetch(b);
        for (int tile = int(blockIdx.x); tile < tiles_m * tiles_n; tile += int(gridDim.x)) {
            const Place at = place(tile, tiles_m, tiles_n);
            for (int k = 0; k < steps * H::kDepth; k += H::kDepth, turn.next()) {
                ptx::Mbarrier* there = full + turn.stage;
                char *as = memory + turn.stage * H::kStage, *bs = as + H::kA;
                ptx::mbarrier_wait(empty + turn.stage, turn.parity ^ 1);
                ptx::mbarrier_expect(there, H::kStage);
                if (A_T)
                    for (int i = 0; i < 2; ++i) ptx::tma_load(as + i * H::kBlock, a, at.m * H::kTile + i * 64, k, there);
                else ptx::tma_load(as, a, k, at.m * H::kTile, there);
                if (B_T) ptx::tma_load(bs, b, k, at.n * BN, there);
                else
                    for (int i = 0; i < BN / 64; ++i) ptx::tma_load(bs + i * H::kBlock, b, at.n * BN + i * 64, k, there);
            }
        }
        return;
    }
    ptx::more_registers<232>();
    for (int tile = int(blockIdx.x); tile < tiles_m * tiles_n; tile += int(gridDim.x)) {
        const Place at = place(tile, tiles_m, tiles_n);
        const int row = at.m * H::kTile + group * 64 + thread % 128 / 32 * 16 + lane / 4, column = at.n * BN + lane % 4 * 2;
        float sums[BN / 32][16];  // sums[i] is of 32 columns
#pragma unroll
        for (int i = 0; i < BN / 2; ++i) sums[i / 16][i % 16] = 0.0f;
        if (out.accumulate)
            each_part(sums, [&](int i, float (&own)[16]) {
#pragma unroll
                for (int j = 0; j < 16; j += 2) out.start(row + 8 * (j / 2 % 2), column + 32 * i + j / 4 * 8, own[j], own[j + 1]);
            });
        for (int step = 0; step < steps; ++step, turn.next()) {
            const char *as = memory + turn.stage * H::kStage + group * H::kBlock, *bs = memory + turn.stage * H::kStage + H::kA;
            ptx::mbarrier_wait(full + turn.stage, turn.parity);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k)
                ptx::wgmma<BN, A_T, !B_T>(&sums[0][0], ptx::descriptor(as + k * (A_T ? 2048 : 32)),
                                          ptx::descriptor(bs + k * (B_T ? 32 : 2048), B_T ? 16 : H::kBlock));
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>();  // meanwhile the other warpgroup's products keep the tensor cores busy
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(empty + turn.stage);  // of eight: this warp has read the stage
        }
        each_part(sums, [&](int i, float (&own)[16]) {
#pragma unroll
            for (int j = 0; j < 16; j += 2) out.finish(row + 8 * (j / 2 % 2), column + 32 * i + j / 4 * 8, own[j], own[j + 1]);
        });
    }
#endif
}

}  // namespace

#define FASTLM_HOPPER_FORM(name, C, A_T, B_T, BN)                                                                                  \
    FASTLM_GLOBAL void __launch_bounds__(384, 1)                                                                                   \
        name(C* c, C* z, const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b, const bfloat16* bias, \
             const C* residual, int M, int N, int K, int flags, int activation) {                                                  \
        const Output<C, bfloat16> out = {c, z, bias, residual, M, N, activation, (flags & 8) != 0};                                \
        multiply_by_warpgroups<C, A_T, B_T, BN>(&a, &b, out, K);                                                                   \
    }                                                                                                                              \
    FASTLM_KERNEL(name)
FASTLM_HOPPER_FORM(hopper_bf16_nn_128, bfloat16, false, false, 128)
FASTLM_HOPPER_FORM(hopper_bf16_nn_256, bfloat16, false, false, 256)
FASTLM_HOPPER_FORM(hopper_bf16_nt_128, bfloat16, false, true, 128)
FASTLM_HOPPER_FORM(hopper_bf16_nt_256, bfloat16, false, true, 256)
FASTLM_HOPPER_FORM(hopper_fp32_nt_256, float, false, true, 256)
FASTLM_HOPPER_FORM(hopper_fp32_tn_128, float, true, false, 128)
FASTLM_HOPPER_FORM(hopper_fp32_tn_256, float, true, false, 256)
