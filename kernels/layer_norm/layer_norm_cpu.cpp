#include "layer_norm.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// From this size on nothing is still in a cache, and memory is fetched ahead. dx goes past the caches, since a store that misses
// reads first; its rows are taken two at a time: without being fetched, streams that short are slower than one row's.
constexpr int64_t kPast = 4 << 20;   // numbers
constexpr int64_t kAhead = 1 << 12;  // the same, but never less than the rows that are at work
constexpr int64_t kWide = 1 << 11;   // from this width on a row's y is fetched as well: less of it waits in the core's store queue

template <bool Far> void forward_row(const LayerNormForward& p, int64_t r) {
    const float *x = p.x + r * p.C, *next = x + p.C;
    float* y = p.y + r * p.C;
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
        each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
            if (Far && p.C >= kWide) __builtin_prefetch(y + c, 1);
            sums[u] = sums[u] + v.load(x + c);
        });
    }
    const float mean = reduce_add_4(sums) / float(p.C);
    // The row is in cache now, and sum(x^2) - mean^2 would cancel. `mean` is rounded, by half an ulp or more: `rest` is what it
    // lacks.
    const vf m = set(mean);
    vf rests[4] = {zero(), zero(), zero(), zero()}, squares[4] = {zero(), zero(), zero(), zero()};
    each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
        if (Far) __builtin_prefetch(next + c, 0, 2);
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
    if (p.bias)
        each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA {
            v.store(y + c, fma(fma(v.load(x + c) - m, scale, s), v.load(p.weight + c), v.load(p.bias + c)));
        });
    else
        each_vector(
            p.C, [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(y + c, fma(v.load(x + c) - m, scale, s) * v.load(p.weight + c)); });
}

void forward(const LayerNormForward& p) {
    const auto row = p.R * p.C >= kPast ? forward_row<true> : forward_row<false>;
    parallel_for(p.R, kLayerNormRows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) row(p, r);
    });
}

// N rows at once, so that the sums over rows are loaded and stored once for all.
template <int N, bool Far> void backward_rows(const LayerNormBackward& p, int64_t first, float* dweight, float* dbias, bool past) {
    const float *dy = p.dy + first * p.C, *x = p.x + first * p.C, *stats = p.stats + 3 * first;
    const int64_t ahead = N * p.C > kAhead ? N * p.C : kAhead;
    vf mean[N], shift[N], scale[N], sum_g[N][4], sum_gn[N][4];
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
        mean[i] = set(stats[3 * i]), shift[i] = set(stats[3 * i + 1]), scale[i] = set(stats[3 * i + 2]);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) sum_g[i][u] = sum_gn[i][u] = zero();
    }
    each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
        const vf weight = v.load(p.weight + c);
        vf d[N], normal[N];
#pragma GCC unroll 2
        for (int i = 0; i < N; ++i) {
            const int64_t at = i * p.C + c;
            if (Far) __builtin_prefetch(dy + at + ahead, 0, 2);
            d[i] = v.load(dy + at), normal[i] = fma(v.load(x + at) - mean[i], scale[i], shift[i]);
            const vf g = d[i] * weight;
            sum_g[i][u] = sum_g[i][u] + g;
            sum_gn[i][u] = fma(g, normal[i], sum_gn[i][u]);
        }
        if (dweight) {
            vf dw = v.load(dweight + c);
#pragma GCC unroll 2
            for (int i = 0; i < N; ++i) dw = fma(d[i], normal[i], dw);
            v.store(dweight + c, dw);
            vf db = v.load(dbias + c);
#pragma GCC unroll 2
            for (int i = 0; i < N; ++i) db = db + d[i];
            v.store(dbias + c, db);
        }
    });
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
        const vf mean_g = set(reduce_add_4(sum_g[i]) / float(p.C)), mean_gn = set(reduce_add_4(sum_gn[i]) / float(p.C));
        const float* dtotal = p.dtotal ? p.dtotal + (first + i) * p.C : nullptr;
        float* dx = p.dx + (first + i) * p.C;
        const auto gradient = [&](int64_t c, auto v) FASTLM_LAMBDA {
            const int64_t at = i * p.C + c;
            if (Far) __builtin_prefetch(x + at + ahead, 0, 2);
            const vf g = v.load(dy + at) * v.load(p.weight + c), normal = fma(v.load(x + at) - mean[i], scale[i], shift[i]);
            const vf d = scale[i] * (g - fma(normal, mean_gn, mean_g));
            return dtotal ? d + v.load(dtotal + c) : d;
        };
        if (past) each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA { stream(dx + c, gradient(c, v)); });
        else each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(dx + c, gradient(c, v)); });
    }
}

void backward(const LayerNormBackward& p) {
    const bool parameters = p.dweight || p.dbias;
    const bool apart = p.dx != p.dy && p.dx != p.dtotal;  // what is read has its lines already
    const bool aligned = p.C % W == 0 && reinterpret_cast<uintptr_t>(p.dx) % (W * sizeof(float)) == 0;
    const bool large = p.R * p.C >= kPast, past = large && aligned && apart;
    parallel_for(p.R, kLayerNormRows, [&](int64_t begin, int64_t end) {
        float* dweight = parameters ? p.partial + begin / kLayerNormRows * 2 * p.C : nullptr;
        float* dbias = parameters ? dweight + p.C : nullptr;
        if (parameters) std::memset(dweight, 0, size_t(2 * p.C) * sizeof(float));
        int64_t r = begin;
        for (; large && r + 2 <= end; r += 2) backward_rows<2, true>(p, r, dweight, dbias, past);
        for (; r < end; ++r) backward_rows<1, false>(p, r, dweight, dbias, past);
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
