// C = A W^T with W in 8 bits and one scale for each of its rows, A rounded with one scale for each of its rows; and what a linear
// layer adds. Of a row of A the kInt8Beyond largest magnitudes may have codes of more than 8 bits. With w[n, k] = d[n] q[n, k]
// columns[k]
//
//     x = a * columns;   m = the largest of |x| but for kInt8Beyond, and at least max |x| / 256
//     s = m / 127, codes round(x * (127 / m)), ties to even: at most 32512 in magnitude, at most kInt8Beyond of them beyond 127
//     c = float(sum of q * code) * (d * s)
//
// The sum is an integer and exact for K up to kInt8RowsDepth, and nothing is fused, so every row has one result, at any number of
// rows and threads and on every instruction set. Where m is below 2^-100 the codes are zeros; a row with a product that is not
// finite gives not-a-number.
#pragma once

#include <cstdint>

#include "kernels/matmul/matmul.h"

namespace fastlm {

constexpr int64_t kInt8RowsDepth = 131072;  // 127 * 127 * K + 2 * 127 * 32512 < 2^31
constexpr int kInt8Beyond = 2;

struct Int8Rows {
    float* c;               // (M, N)
    float* z;               // (M, N) or null: keeps A W^T + bias
    const float* a;         // (M, K)
    const uint8_t* packed;  // of Int8RowsPack, 64-byte aligned
    const float* columns;   // (K,) or null: ones
    const float* bias;      // (N,) or null
    const float* residual;  // (M, N) or null
    int64_t M, N, K;
    Activation activation;
};

// Products of one a, and columns, with several weights: it is rounded once.
struct Int8RowsTogether {
    Int8Rows each[kTogether];  // M, K, a and columns the same; no z, residual, activation where there are several
    int64_t count;
    uint8_t* workspace;  // that of any of them
};

// Packed: for each 16 rows their scales, -128 times the sums of their codes, then for each 16 of K four words of 16 lanes: byte b
// of lane n is q of row n, k = 4 word + b.
struct Int8RowsPack {
    uint8_t* packed;        // Int8RowsKernels::packed_bytes
    const uint8_t* blocks;  // (N, 4 + K): of each row the float32 scale and the codes, any alignment
    int64_t N, K;
};

struct Int8RowsKernels {
    int64_t (*packed_bytes)(int64_t N, int64_t K);
    void (*pack)(const Int8RowsPack&);
    int64_t (*workspace)(int64_t M, int64_t K);  // bytes, 64-byte aligned
    void (*matmul)(const Int8RowsTogether&);
};

}  // namespace fastlm
