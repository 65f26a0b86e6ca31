#include "layer_norm.h"

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

void forward_row(const LayerNormForward& p, int64_t r) {
    const float* x = p.x + r * p.C;
    float* y = p.y + r * p.C;
    // Two passes: the row is in cache, and sum(x^2) - mean^2 would cancel.
    vf sum = zero();
    for (int64_t c = 0; c < p.C; c += W) sum = sum + load_n(x + c, p.C - c);
    const float mean = reduce_add(sum) / float(p.C);
    const vf m = set(mean);
    vf squares = zero();
    int64_t c = 0;
    for (; c + W <= p.C; c += W) {
        const vf d = load(x + c) - m;
        squares = fma(d, d, squares);
    }
    if (c < p.C) {
        float tail[W] = {};
        store(tail, load_n(x + c, p.C - c) - m);
        const vf d = load_n(tail, p.C - c);  // the lanes past the end hold -mean: drop them
        squares = fma(d, d, squares);
    }
    const float rstd = 1.0f / std::sqrt(reduce_add(squares) / float(p.C) + p.eps);
    p.mean[r] = mean;
    p.rstd[r] = rstd;
    const vf scale = set(rstd);
    for (c = 0; c < p.C; c += W) {
        const int64_t n = p.C - c;
        const vf normal = (load_n(x + c, n) - m) * scale;
        const vf shift = p.bias ? load_n(p.bias + c, n) : zero();
        store_n(y + c, fma(normal, load_n(p.weight + c, n), shift), n);
    }
}

void forward(const LayerNormForward& p) {
    parallel_for(p.R, kLayerNormRows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) forward_row(p, r);
    });
}

void backward_row(const LayerNormBackward& p, int64_t r, float* dweight, float* dbias) {
    const float *dy = p.dy + r * p.C, *x = p.x + r * p.C;
    const vf m = set(p.mean[r]), scale = set(p.rstd[r]);
    vf sum_g = zero(), sum_gn = zero();
    for (int64_t c = 0; c < p.C; c += W) {
        const int64_t n = p.C - c;
        const vf d = load_n(dy + c, n), normal = (load_n(x + c, n) - m) * scale, g = d * load_n(p.weight + c, n);
        sum_g = sum_g + g;
        sum_gn = fma(g, normal, sum_gn);
        if (dweight) {
            store_n(dweight + c, fma(d, normal, load_n(dweight + c, n)), n);
            store_n(dbias + c, d + load_n(dbias + c, n), n);
        }
    }
    const vf mean_g = set(reduce_add(sum_g) / float(p.C)), mean_gn = set(reduce_add(sum_gn) / float(p.C));
    float* dx = p.dx + r * p.C;
    for (int64_t c = 0; c < p.C; c += W) {
        const int64_t n = p.C - c;
        const vf g = load_n(dy + c, n) * load_n(p.weight + c, n), normal = (load_n(x + c, n) - m) * scale;
        store_n(dx + c, scale * (g - fma(normal, mean_gn, mean_g)), n);
    }
}

void backward(const LayerNormBackward& p) {
    const bool parameters = p.dweight || p.dbias;
    parallel_for(p.R, kLayerNormRows, [&](int64_t begin, int64_t end) {
        float* dweight = parameters ? p.partial + begin / kLayerNormRows * 2 * p.C : nullptr;
        float* dbias = parameters ? dweight + p.C : nullptr;
        if (parameters)
            for (int64_t c = 0; c < 2 * p.C; ++c) dweight[c] = 0.0f;
        for (int64_t r = begin; r < end; ++r) backward_row(p, r, dweight, dbias);
    });
    if (!parameters) return;
    const int64_t pieces = (p.R + kLayerNormRows - 1) / kLayerNormRows;
    parallel_for(p.C, 256, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; c += W) {
            const int64_t n = end - c;
            vf sum_w = zero(), sum_b = zero();
            for (int64_t i = 0; i < pieces; ++i) {
                sum_w = sum_w + load_n(p.partial + 2 * i * p.C + c, n);
                sum_b = sum_b + load_n(p.partial + (2 * i + 1) * p.C + c, n);
            }
            if (p.dweight) store_n(p.dweight + c, load_n(p.dweight + c, n) + sum_w, n);
            if (p.dbias) store_n(p.dbias + c, load_n(p.dbias + c, n) + sum_b, n);
        }
    });
}

}  // namespace

extern const LayerNormKernels layer_norm_kernels = {forward, backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
