#include "rms_norm.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// As in layer_norm_cpu.cpp: from this size on memory is fetched ahead, dx goes past the caches, its rows are taken two at a time.
constexpr int64_t kPast = 4 << 20;   // numbers
constexpr int64_t kAhead = 1 << 12;  // the same, but never less than the rows that are at work
constexpr int64_t kWide = 1 << 11;   // from this width on a row's y is fetched as well

template <bool Far> void forward_row(const RmsNormForward& p, int64_t r) {
    const float *x = p.x + r * p.C, *next = x + p.C;
    float* y = p.y + r * p.C;
    vf squares[4] = {zero(), zero(), zero(), zero()};
    if (p.residual) {
        const float* residual = p.residual + r * p.C;
        float* total = p.total + r * p.C;
        each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
            const vf a = v.load(x + c) + v.load(residual + c);
            v.store(total + c, a);
            squares[u] = fma(a, a, squares[u]);
        });
        x = total;
    } else {
        each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
            if (Far && p.C >= kWide) __builtin_prefetch(y + c, 1);
            const vf a = v.load(x + c);
            squares[u] = fma(a, a, squares[u]);
        });
    }
    const float rstd = 1.0f / std::sqrt(reduce_add_4(squares) / float(p.C) + p.eps);
    if (p.rstd) p.rstd[r] = rstd;
    const vf scale = set(rstd);
    each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA {
        if (Far) __builtin_prefetch(next + c, 0, 2);
        v.store(y + c, v.load(x + c) * scale * v.load(p.weight + c));
    });
}

void forward(const RmsNormForward& p) {
    const auto row = p.R * p.C >= kPast ? forward_row<true> : forward_row<false>;
    parallel_for(p.R, kRmsNormRows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) row(p, r);
    });
}

// N rows at once, so that the sums over rows are loaded and stored once for all.
template <int N, bool Far> void backward_rows(const RmsNormBackward& p, int64_t first, float* dweight, bool past) {
    const float *dy = p.dy + first * p.C, *x = p.x + first * p.C;
    const int64_t ahead = N * p.C > kAhead ? N * p.C : kAhead;
    vf scale[N], sum[N][4];
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
        scale[i] = set(p.rstd[first + i]);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) sum[i][u] = zero();
    }
    each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
        const vf weight = v.load(p.weight + c);
        vf dn[N];
#pragma GCC unroll 2
        for (int i = 0; i < N; ++i) {
            const int64_t at = i * p.C + c;
            if (Far) __builtin_prefetch(dy + at + ahead, 0, 2);
            dn[i] = v.load(dy + at) * (v.load(x + at) * scale[i]);
            sum[i][u] = fma(dn[i], weight, sum[i][u]);
        }
        if (!dweight) return;
        vf dw = v.load(dweight + c);
#pragma GCC unroll 2
        for (int i = 0; i < N; ++i) dw = dw + dn[i];
        v.store(dweight + c, dw);
    });
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
        const vf mean = set(reduce_add_4(sum[i]) / float(p.C));
        const float* dtotal = p.dtotal ? p.dtotal + (first + i) * p.C : nullptr;
        float* dx = p.dx + (first + i) * p.C;
        const auto gradient = [&](int64_t c, auto v) FASTLM_LAMBDA {
            const int64_t at = i * p.C + c;
            if (Far) __builtin_prefetch(x + at + ahead, 0, 2);
            const vf g = v.load(dy + at) * v.load(p.weight + c), normal = v.load(x + at) * scale[i];
            const vf d = scale[i] * fnma(normal, mean, g);
            return dtotal ? d + v.load(dtotal + c) : d;
        };
        if (past) each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA { stream(dx + c, gradient(c, v)); });
        else each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(dx + c, gradient(c, v)); });
    }
}

void backward(const RmsNormBackward& p) {
    const bool apart = p.dx != p.dy && p.dx != p.dtotal;  // what is read has its lines already
    const bool aligned = p.C % W == 0 && reinterpret_cast<uintptr_t>(p.dx) % (W * sizeof(float)) == 0;
    const bool large = p.R * p.C >= kPast, past = large && aligned && apart;
    parallel_for(p.R, kRmsNormRows, [&](int64_t begin, int64_t end) {
        float* dweight = p.dweight ? p.partial + begin / kRmsNormRows * p.C : nullptr;
        if (dweight) std::memset(dweight, 0, size_t(p.C) * sizeof(float));
        int64_t r = begin;
        for (; large && r + 2 <= end; r += 2) backward_rows<2, true>(p, r, dweight, past);
        for (; r < end; ++r) backward_rows<1, false>(p, r, dweight, past);
        if (past) fence();
    });
    if (!p.dweight) return;
    const int64_t pieces = (p.R + kRmsNormRows - 1) / kRmsNormRows;
    parallel_for(p.C, 128, [&](int64_t begin, int64_t end) {
        each_vector(end - begin, [&](int64_t offset, auto v) FASTLM_LAMBDA {
            const int64_t c = begin + offset;
            vf sum = zero();
            for (int64_t i = 0; i < pieces; ++i) sum = sum + v.load(p.partial + i * p.C + c);
            v.store(p.dweight + c, v.load(p.dweight + c) + sum);
        });
    });
}

}  // namespace

extern const RmsNormKernels rms_norm_kernels = {forward, backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
