#include "roof.h"

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

void fma_peak(const RoofFma& p) {
    parallel_for(p.pieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            // y <- y * a + b stays near 1: a denormal or an overflow would slow some cores.
            vf acc[kRoofChains];
            for (int64_t c = 0; c < kRoofChains; ++c) acc[c] = set(1.0f + float(c + i) * 1e-3f);
            const vf a = set(0.999f), b = set(0.001f);
            for (int64_t r = 0; r < p.rounds; ++r)
                for (int64_t c = 0; c < kRoofChains; ++c) acc[c] = fma(acc[c], a, b);
            vf sum = zero();
            for (int64_t c = 0; c < kRoofChains; ++c) sum = sum + acc[c];
            p.y[i] = reduce_add(sum);
        }
    });
}

void read(const RoofRead& p) {
    parallel_for(p.n, kRoofPiece, [&](int64_t begin, int64_t end) {
        vf acc[8];
        for (auto& a : acc) a = zero();
        int64_t i = begin;
        for (; i + 8 * W <= end; i += 8 * W)
            for (int64_t c = 0; c < 8; ++c) acc[c] = acc[c] + load(p.x + i + c * W);
        for (; i < end; i += W) acc[0] = acc[0] + load_n(p.x + i, end - i);
        vf sum = zero();
        for (auto& a : acc) sum = sum + a;
        p.y[begin / kRoofPiece] = reduce_add(sum);
    });
}

void copy(const RoofCopy& p) {
    parallel_for(p.n, kRoofPiece, [&](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + 4 * W <= end; i += 4 * W)
            for (int64_t c = 0; c < 4; ++c) store(p.y + i + c * W, load(p.x + i + c * W));
        for (; i < end; i += W) store_n(p.y + i, load_n(p.x + i, end - i), end - i);
    });
}

}  // namespace

extern const RoofKernels roof_kernels = {2 * W * kRoofChains, fma_peak, read, copy};

}  // namespace FASTLM_ISA
}  // namespace fastlm
