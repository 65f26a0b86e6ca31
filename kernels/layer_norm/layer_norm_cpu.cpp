#include "layer_norm.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

void forward_row(const LayerNormForward& p, int64_t r) {
    const float* x = p.x + r * p.C;
    vf sums[4] = {zero(), zero(), zero(), zero()};
    if (p.residual) {
        const float* residual = p.residual + r * p.C;
        float* total = p.total + r * p.C;
        each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
            const vf a = v.load(x + c) + v.load(residual + c);
            v.store(total + c, a);
            sums[u] = sums[u] + a;
        });
        x = total;
    } else {
        each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA { sums[u] = sums[u] + v.load(x + c); });
    }
    const float mean = reduce_add_4(sums) / float(p.C);
    // The row is in cache now, and sum(x^2) - mean^2 would cancel. `mean` is rounded, by half an ulp or more: `rest` is what it
    // lacks.
    const vf m = set(mean);
    vf rests[4] = {zero(), zero(), zero(), zero()}, squares[4] = {zero(), zero(), zero(), zero()};
    each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
        const vf d = v.keep(v.load(x + c) - m);
        rests[u] = rests[u] + d;
        squares[u] = fma(d, d, squares[u]);
    });
    const float rest = reduce_add_4(rests) / float(p.C);
    const float variance = reduce_add_4(squares) / float(p.C) - rest * rest;
    const float rstd = 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + p.eps), shift = -rest * rstd;
    if (p.stats) {
        p.stats[3 * r] = mean;
        p.stats[3 * r + 1] = shift;
        p.stats[3 * r + 2] = rstd;
    }
    const vf scale = set(rstd), s = set(shift);
    float* y = p.y + r * p.C;
    if (p.bias)
        each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA {
            v.store(y + c, fma(fma(v.load(x + c) - m, scale, s), v.load(p.weight + c), v.load(p.bias + c)));
        });
    else
        each_vector(
            p.C, [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(y + c, fma(v.load(x + c) - m, scale, s) * v.load(p.weight + c)); });
}

void forward(const LayerNormForward& p) {
    parallel_for(p.R, kLayerNormRows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) forward_row(p, r);
    });
}

// From this size on dx goes past the caches, where x and dy of the next rows are wanted: a store that misses reads first.
constexpr int64_t kPast = 4 << 20;  // numbers

void backward_row(const LayerNormBackward& p, int64_t r, float* dweight, float* dbias, bool past) {
    const float *dy = p.dy + r * p.C, *x = p.x + r * p.C, *stats = p.stats + 3 * r;
    const vf mean = set(stats[0]), shift = set(stats[1]), scale = set(stats[2]);
    vf sum_g[4] = {zero(), zero(), zero(), zero()}, sum_gn[4] = {zero(), zero(), zero(), zero()};
    each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
        const vf d = v.load(dy + c), normal = fma(v.load(x + c) - mean, scale, shift), g = d * v.load(p.weight + c);
        sum_g[u] = sum_g[u] + g;
        sum_gn[u] = fma(g, normal, sum_gn[u]);
        if (dweight) {
            v.store(dweight + c, fma(d, normal, v.load(dweight + c)));
            v.store(dbias + c, v.load(dbias + c) + d);
        }
    });
    const vf mean_g = set(reduce_add_4(sum_g) / float(p.C)), mean_gn = set(reduce_add_4(sum_gn) / float(p.C));
    const float* dtotal = p.dtotal ? p.dtotal + r * p.C : nullptr;
    float* dx = p.dx + r * p.C;
    const auto gradient = [&](int64_t c, auto v) FASTLM_LAMBDA {
        const vf g = v.load(dy + c) * v.load(p.weight + c), normal = fma(v.load(x + c) - mean, scale, shift);
        const vf d = scale * (g - fma(normal, mean_gn, mean_g));
        return dtotal ? d + v.load(dtotal + c) : d;
    };
    if (past) each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA { stream(dx + c, gradient(c, v)); });
    else each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(dx + c, gradient(c, v)); });
}

void backward(const LayerNormBackward& p) {
    const bool parameters = p.dweight || p.dbias;
    const bool apart = p.dx != p.dy && p.dx != p.dtotal;  // what is read has its lines already
    const bool aligned = p.C % W == 0 && reinterpret_cast<uintptr_t>(p.dx) % (W * sizeof(float)) == 0;
    const bool past = p.R * p.C >= kPast && aligned && apart;
    parallel_for(p.R, kLayerNormRows, [&](int64_t begin, int64_t end) {
        float* dweight = parameters ? p.partial + begin / kLayerNormRows * 2 * p.C : nullptr;
        float* dbias = parameters ? dweight + p.C : nullptr;
        if (parameters) std::memset(dweight, 0, size_t(2 * p.C) * sizeof(float));
        for (int64_t r = begin; r < end; ++r) backward_row(p, r, dweight, dbias, past);
        if (past) fence();
    });
    if (!parameters) return;
    const int64_t pieces = (p.R + kLayerNormRows - 1) / kLayerNormRows;
    parallel_for(p.C, 128, [&](int64_t begin, int64_t end) {
        each_vector(end - begin, [&](int64_t offset, auto v) FASTLM_LAMBDA {
            const int64_t c = begin + offset;
            vf sum_w = zero(), sum_b = zero();
            for (int64_t i = 0; i < pieces; ++i) {
                sum_w = sum_w + v.load(p.partial + 2 * i * p.C + c);
                sum_b = sum_b + v.load(p.partial + (2 * i + 1) * p.C + c);
            }
            if (p.dweight) v.store(p.dweight + c, v.load(p.dweight + c) + sum_w);
            if (p.dbias) v.store(p.dbias + c, v.load(p.dbias + c) + sum_b);
        });
    });
}

}  // namespace

extern const LayerNormKernels layer_norm_kernels = {forward, backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
