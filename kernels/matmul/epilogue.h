// What a linear layer does after A B: activations and their derivatives on vectors, and the pass over a finished tile.
#pragma once

#include "matmul.h"

#include "csrc/simd/gelu_table.h"
#include "csrc/simd/simd.h"
#include "csrc/simd/transpose.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Hendrycks and Gimpel 2016, arXiv:1606.08415: gelu and its tanh form; silu there too. The derivatives follow by the product rule.
template <Activation A> FASTLM_INLINE vf activated(vf x) {
    if constexpr (A == Activation::gelu) return gelu_table(x);
    if constexpr (A == Activation::gelu_tanh) return gelu_tanh_table(x);
    if constexpr (A == Activation::silu) return x * sigmoid(x);
    if constexpr (A == Activation::relu) return max(zero(), x);
    return x;
}

template <Activation A> FASTLM_INLINE vf derivative(vf x) {
    if constexpr (A == Activation::gelu) return gelu_slope(x);
    if constexpr (A == Activation::gelu_tanh) return gelu_tanh_slope(x);
    if constexpr (A == Activation::silu) {
        const vf s = sigmoid(x);
        return s * fma(x, set(1.0f) - s, set(1.0f));
    }
    if constexpr (A == Activation::relu) return select(lt(zero(), x), set(1.0f), select(is_nan(x), x, zero()));
    return set(1.0f);
}

// y = act(z) + residual over a tile that the multiplication has just left in L1. y and z may be the same.
template <Activation A>
void finish_tile(float* y, const float* z, const float* residual, int64_t ld, int64_t z_ld, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
        float* yi = y + i * ld;
        const float* zi = z + i * z_ld;
        const float* ri = residual ? residual + i * ld : nullptr;
        int64_t n = 0;
        for (; n + W <= columns; n += W) {
            const vf v = activated<A>(load(zi + n));
            store(yi + n, ri ? v + load(ri + n) : v);
        }
        if (n < columns) {
            const int64_t left = columns - n;
            const vf v = activated<A>(load_n(zi + n, left));
            store_n(yi + n, ri ? v + load_n(ri + n, left) : v, left);
        }
    }
}

using FinishTile = void (*)(float*, const float*, const float*, int64_t, int64_t, int64_t, int64_t);
const FinishTile finish_tiles[] = {finish_tile<Activation::none>, finish_tile<Activation::gelu>, finish_tile<Activation::gelu_tanh>,
                                   finish_tile<Activation::silu>, finish_tile<Activation::relu>};

// A tile whose rows are columns of C: its first, how many, and C's rows from `row` on.
struct Turned {
    int64_t column, columns, row, rows;
    bool over;  // whether what lies right of the tile may be written to, as it will be written again
};

// Where the tiles of a product go: the sums, and after the last k what becomes of them.
struct Target {
    float* sum;  // (M, N): z where it is kept, else c
    float* y;
    const float *bias, *residual;
    int64_t N;
    Activation activation;
    bool pass;            // whether a pass over the finished tile is needed
    bool turned = false;  // the product is C's transpose

    // What finish() will read besides, touched before the product.
    FASTLM_MEMBER void fetch(int64_t row, int64_t column, int64_t rows, int64_t columns) const {
        if (!residual) return;
        const float* r = residual + row * N + column;
        for (int64_t i = 0; i < rows; ++i, r += N)
            for (int64_t n = 0; n < columns; n += 16) __builtin_prefetch(r + n, 0, 3);
    }

    FASTLM_MEMBER void fetch_turned(const Turned& t) const {
        for (int64_t i = 0; i < t.rows; ++i) {
            const int64_t at = (t.row + i) * N + t.column;
            __builtin_prefetch(y + at, 1, 2);
            __builtin_prefetch(y + at + t.columns - 1, 1, 2);
            if (!residual) continue;
            __builtin_prefetch(residual + at, 0, 2);
            __builtin_prefetch(residual + at + t.columns - 1, 0, 2);
        }
    }

    FASTLM_MEMBER void finish(int64_t row, int64_t column, int64_t rows, int64_t columns) const {
        if (pass) finish(sum + row * N + column, N, row, column, rows, columns);
    }
    // Of sums that lie elsewhere, `ld` from row to row.
    FASTLM_MEMBER void finish(const float* tile, int64_t ld, int64_t row, int64_t column, int64_t rows, int64_t columns) const {
        const int64_t at = row * N + column;
        finish_tiles[int(activation)](y + at, tile, residual ? residual + at : nullptr, N, ld, rows, columns);
    }
};

FASTLM_INLINE Target make_target(float* c, float* z, const float* bias, const float* residual, int64_t N, Activation activation) {
    return {z ? z : c, c, bias, residual, N, activation, z || residual || activation != Activation::none};
}

// C's rows from a tile of sums that lies as C's transpose, `ld` from row to row, of which whole groups of W are there to be read:
// with bias, activation and residual.
template <Activation A> void finish_turned(const Target& to, const Turned& t, const float* tile, int64_t ld) {
    for (int64_t c = 0; c < t.columns; c += W) {
        const int64_t left = t.columns - c, at = t.column + c;
        const bool whole = left >= W || (t.over && at + W <= to.N);
        const vf bias = to.bias ? load_n(to.bias + at, left) : zero();
        for (int64_t v = 0; v < t.rows; v += W) {
            vf r[W];
            load_transposed(r, [&](int i) FASTLM_LAMBDA { return tile + (c + i) * ld + v; });
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) {
                if (v + i >= t.rows) break;
                const int64_t place = (t.row + v + i) * to.N + at;
                const vf z = r[i] + bias;
                vf y = z;
                if (to.pass) {
                    y = activated<A>(z);
                    if (to.residual) y = y + (whole ? load(to.residual + place) : load_n(to.residual + place, left));
                }
                if (whole) {
                    if (to.sum != to.y) store(to.sum + place, z);
                    store(to.y + place, y);
                } else {
                    if (to.sum != to.y) store_n(to.sum + place, z, left);
                    store_n(to.y + place, y, left);
                }
            }
        }
    }
}

using FinishTurned = void (*)(const Target&, const Turned&, const float*, int64_t);
const FinishTurned finish_turns[] = {finish_turned<Activation::none>, finish_turned<Activation::gelu>,
                                     finish_turned<Activation::gelu_tanh>, finish_turned<Activation::silu>,
                                     finish_turned<Activation::relu>};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
