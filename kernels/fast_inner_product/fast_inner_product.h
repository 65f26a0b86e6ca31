// y = act(x W^T + bias) + residual in float32 by Winograd's inner product: of three products of numbers two become one.
//
//     x1 w1 + x2 w2 = (x1 + w2) (x2 + w1) - x1 x2 - w1 w2
//
// The products of a row's own numbers and of a column's own are summed once each. A multiply-add and two additions take the place
// of two multiply-adds: a gain where a core adds beside them. Of each 16 k the pairs are (0, 1), (3, 4), (6, 7), (9, 10), (12, 13);
// the others, and what is left of K beyond whole 16s, are multiplied as they are.
//
// Every element is one chain: for each block of k (kFipDepth, as equal as they can be), minus both sums, then the products in
// order, k + 2 before the pair k, k + 1. At any blocking, thread count and batch.
#pragma once

#include <cstdint>

#include "kernels/matmul/matmul.h"

namespace fastlm {

constexpr int64_t kFipPeriod = 16, kFipProducts = 11, kFipDepth = 1024;

struct FastInnerProduct {
    float* y;               // (M, N)
    float* z;               // (M, N) or null: keeps x W^T + bias
    float* workspace;       // FastInnerProductKernels::workspace bytes, 64-byte aligned
    const float* x;         // (M, K)
    const float* w;         // (N, K)
    const float* bias;      // (N,) or null
    const float* residual;  // (M, N) or null
    int64_t M, N, K;
    Activation activation;
};

// Products of one x with several weights: x is made ready once. No z, residual, activation.
struct FastInnerProducts {
    FastInnerProduct each[kTogether];
    int64_t count;
    float* workspace;  // that of any of them
};

// What the instruction set has no kernel for is null.
struct FastInnerProductKernels {
    int64_t (*workspace)(const FastInnerProduct&);
    void (*linear)(const FastInnerProduct&);
    void (*linears)(const FastInnerProducts&);
};

}  // namespace fastlm
