// A weight (N, K) as the B of a product, in any storage: packed into panels, or multiplied as it comes from memory.
#pragma once

#include "gemm.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class T> constexpr bool kIsBfloat16 = false;
template <> constexpr bool kIsBfloat16<Bfloat16> = true;
template <class T> constexpr bool kIsFloat16 = false;
template <> constexpr bool kIsFloat16<Float16> = true;

FASTLM_INLINE vf load_as_float(const float* p) { return load(p); }
FASTLM_INLINE vf load_as_float(const Bfloat16* p) { return load_bf16(&p->bits); }
FASTLM_INLINE vf load_as_float(const Float16* p) { return load_f16(&p->bits); }
FASTLM_INLINE vf load_as_float_n(const float* p, int64_t n) { return load_n(p, n); }
template <class T> FASTLM_INLINE vf load_as_float_n(const T* p, int64_t n) {
    T t[W] = {};
    for (int64_t i = 0; i < (n < W ? n : W); ++i) t[i] = p[i];
    return load_as_float(t);
}

// sum (M, columns) = acc + bias. Stores under a mask are slow on some processors: only where they are needed.
template <int M, int S>
FASTLM_INLINE void finish_sums(vf (&acc)[M][S], float* sum, int64_t ld, const float* bias, int64_t columns) {
    if (bias)
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
            const vf v = load_n(bias + s * W, columns - s * W);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) acc[i][s] = acc[i][s] + v;
        }
    if (columns >= S * W) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) store(sum + i * ld + s * W, acc[i][s]);
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) store_n(sum + i * ld + s * W, acc[i][s], columns - s * W);
    }
}

// A weight (N, K): transposed in registers on the way.
template <class T> struct Columns {
    static constexpr int kFusedRows = kFused;
    // Vectors of columns that walk together: a few rows alone are too few chains of multiply-adds to hide their latency.
    static constexpr int vectors(int rows) {
        if (kRegisters == 16) return rows <= 2 ? 2 : 1;
        return rows == 1 && kPairs ? 2 : 1;
    }
    template <int M> static constexpr int64_t kColumns = vectors(M) * W;
    static constexpr bool kPairs = kIsBfloat16<T>;        // two values move through the shuffles as one float
    static constexpr int64_t kTile = kPairs ? 2 * W : W;  // values of k
    static constexpr int64_t kBytes = int64_t(sizeof(T));
    // Into L2: asked for in L1, the lines of so many rows wait for the few fill buffers that it has (23 GB/s became 15).
    static constexpr int64_t kAhead = 1024 / kBytes;
    const T* b;
    int64_t N, K;

    // f(t, v) with v over W columns, for t = 0 .. kTile - 1. `next`: columns from here to those that follow at the end of the row.
    // kWhole loads whole rows of the tile: more shuffles, but rows that share a place in L1 are touched once.
    template <bool kWhole, class F> FASTLM_MEMBER void tile(int64_t k, int64_t column, int64_t next, const F& f) const {
        const T* from = b + column * K + k;
        if (kTile * kBytes % 64 == 0 || k * kBytes % 64 == 0) {
            const T* ahead = from + (k + kAhead < K ? kAhead : kAhead + (next - 1) * K);
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) __builtin_prefetch(ahead + j * K, 0, 2);
        }
        vf r[W];
        if constexpr (kWhole || kIsFloat16<T>) {
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) r[j] = load_as_float(from + j * K);
            transpose(r);
        } else {
            load_transposed(r, [&](int j) FASTLM_LAMBDA { return from + j * K; });
        }
#pragma GCC unroll 16
        for (int t = 0; t < W; ++t) {
            if constexpr (kPairs) {
                f(2 * t, as_float(shl<16>(as_int(r[t]))));
                f(2 * t + 1, as_float(andi(as_int(r[t]), seti(int32_t(0xFFFF0000)))));
            } else {
                f(t, r[t]);
            }
        }
#if defined(FASTLM_ISA_AVX512)
        asm volatile("" ::: "memory");  // tiles that gcc interleaves do not fit the registers
#endif
    }
    // The same at the edges: n <= W values of k, W columns or fewer.
    template <class F> void edge(int64_t k, int64_t n, int64_t column, int64_t columns, const F& f) const {
        vf r[W];
        for (int j = 0; j < W; ++j) r[j] = j < columns ? load_as_float_n(b + (column + j) * K + k, n) : zero();
        transpose(r);
        for (int t = 0; t < n; ++t) f(t, r[t]);
    }

    void pack(float* out, int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        for (int64_t n = 0; n < columns; n += NR, out += kc * NR)
            for (int j = 0; j < NV; ++j) {
                const int64_t left = columns - n - j * W, at = column + n + j * W;
                if (left <= 0) break;  // the product does not read it
                float* to = out + j * W;
                int64_t k = 0;
                if (left >= W)
                    for (; k + kTile <= kc; k += kTile, to += kTile * NR)
                        tile<false>(k0 + k, at, W, [&](int t, vf v) FASTLM_LAMBDA { store(to + t * NR, v); });
                for (; k < kc; k += W, to += W * NR)
                    edge(k0 + k, least(W, kc - k), at, left, [&](int t, vf v) FASTLM_LAMBDA { store(to + t * NR, v); });
            }
    }

    Ahead ahead(int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        return ahead_of(b + column * K + k0, kc, K, columns);
    }

    template <int M>
    void fused(const float* a, int64_t depth, int64_t column, int64_t columns, float* sum, int64_t ld, const float* bias) const {
        constexpr int S = vectors(M);
        if (columns >= S * W) return walk<M, S>(a, depth, column, S * W, sum, ld, bias);
        for (int64_t n = 0; n < columns; n += W)
            walk<M, 1>(a, depth, column + n, columns - n, sum + n, ld, bias ? bias + n : nullptr);
    }

    template <int M, int S>
    void walk(const float* a, int64_t depth, int64_t column, int64_t columns, float* sum, int64_t ld, const float* bias) const {
        constexpr bool kWhole = !kPairs && kRegisters == 32 && M <= 2;  // where the chains take as long as the shuffles
        vf acc[M][S];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s) acc[i][s] = zero();
        // A whole line of each row before the next rows; two values in one float are fast enough without.
        constexpr int64_t step = !kPairs && kTile * kBytes < 64 ? 64 / kBytes : kTile;
        const float* x = a;
        int64_t k = 0;
        if (columns >= S * W)
            for (; k + step <= depth; k += step, x += step * M)
#pragma GCC unroll 4
                for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
                    for (int64_t u = 0; u < step; u += kTile)
                        tile<kWhole>(k + u, column + s * W, S * W, [&](int t, vf w) FASTLM_LAMBDA {
#pragma GCC unroll 16
                            for (int i = 0; i < M; ++i) acc[i][s] = fma(set(x[(u + t) * M + i]), w, acc[i][s]);
                        });
        for (; k < depth; k += W, x += W * M)
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s)
                edge(k, least(W, depth - k), column + s * W, columns - s * W, [&](int t, vf w) FASTLM_LAMBDA {
#pragma GCC unroll 16
                    for (int i = 0; i < M; ++i) acc[i][s] = fma(set(x[t * M + i]), w, acc[i][s]);
                });
        finish_sums(acc, sum, ld, bias, columns);
    }
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
