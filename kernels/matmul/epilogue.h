// What a linear layer does after A B: activations and their derivatives on vectors, and the pass over a finished tile.
#pragma once

#include "matmul.h"

#include "csrc/simd/gelu_table.h"
#include "csrc/simd/simd.h"

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
void finish_tile(float* y, const float* z, const float* residual, int64_t ld, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
        float* yi = y + i * ld;
        const float* zi = z + i * ld;
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

using FinishTile = void (*)(float*, const float*, const float*, int64_t, int64_t, int64_t);
const FinishTile finish_tiles[] = {finish_tile<Activation::none>, finish_tile<Activation::gelu>, finish_tile<Activation::gelu_tanh>,
                                   finish_tile<Activation::silu>, finish_tile<Activation::relu>};

// Where the tiles of a product go: the sums, and after the last k what becomes of them.
struct Target {
    float* sum;  // (M, N): z where it is kept, else c
    float* y;
    const float *bias, *residual;
    int64_t N;
    Activation activation;
    bool pass;  // whether a pass over the finished tile is needed

    // What finish() will read besides, touched before the product.
    FASTLM_MEMBER void fetch(int64_t row, int64_t column, int64_t rows, int64_t columns) const {
        if (!residual) return;
        const float* r = residual + row * N + column;
        for (int64_t i = 0; i < rows; ++i, r += N)
            for (int64_t n = 0; n < columns; n += 16) __builtin_prefetch(r + n, 0, 3);
    }

    FASTLM_MEMBER void finish(int64_t row, int64_t column, int64_t rows, int64_t columns) const {
        if (!pass) return;
        const int64_t at = row * N + column;
        finish_tiles[int(activation)](y + at, sum + at, residual ? residual + at : nullptr, N, rows, columns);
    }
};

FASTLM_INLINE Target make_target(float* c, float* z, const float* bias, const float* residual, int64_t N, Activation activation) {
    return {z ? z : c, c, bias, residual, N, activation, z || residual || activation != Activation::none};
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
