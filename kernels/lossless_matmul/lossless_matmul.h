// C = A W^T with W in float32 or bfloat16 of which the first byte, the sign and seven bits of the exponent, takes 4 bits, and what
// a linear layer adds: every bit as if W lay there as it was and were multiplied by matmul.
//
// Packed: a header, panels, the exceptions.
//
//     header      int64: bytes of a value (4 or 2), N, K, entries; from byte 64 on the table of 16 first bytes
//     panel       32 rows, two groups of 16: for each unit of 8 k a line of 64 bytes of codes of each group, four bits each, the
//                 lower those of the first four k; then for the first four k and for the last four, for each group a line of
//                 second bytes, and of float32 two lines of their low halves. Four rows have 16 bytes of each line; how they lie
//                 in them is what interleaving puts in order. All is read from the first byte to the last.
//     exceptions  int32 for each group of 16 rows: where its entries begin, and one more; then the entries, in the order of k: the
//                 weights whose first byte is not in the table. The last of each group has k = kLosslessEnd.
#pragma once

#include <cstdint>

#include "kernels/matmul/matmul.h"

namespace fastlm {

constexpr int64_t kLosslessPanel = 32, kLosslessGroup = 16, kLosslessUnit = 8;
constexpr int64_t kLosslessHeader = 128, kLosslessTable = 64;
constexpr int32_t kLosslessEnd = INT32_MAX;

struct LosslessEntry {
    int32_t k, row;  // row: within the group
    uint32_t value;  // the float32's bits
};

// Where the parts lie, from the beginning, and all bytes.
struct LosslessLayout {
    int64_t group, first, entries, bytes;
    LosslessLayout(int64_t size, int64_t N, int64_t K, int64_t count) {
        const auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
        group = kLosslessGroup * (kLosslessUnit * (size - 1) + 4);
        const int64_t groups = up(N, kLosslessPanel) / kLosslessGroup;
        first = kLosslessHeader + groups * (up(K, kLosslessUnit) / kLosslessUnit) * group;
        entries = first + up((groups + 1) * 4, 64);
        bytes = entries + up(count * int64_t(sizeof(LosslessEntry)), 64);
    }
};

struct LosslessMatmul {
    float* c;               // (M, N)
    float* z;               // (M, N) or null: keeps A W^T + bias
    float* workspace;       // LosslessMatmulKernels::workspace bytes, 64-byte aligned
    const float* a;         // (M, K)
    const uint8_t* packed;  // of LosslessPack
    const float* bias;      // (N,) or null
    const float* residual;  // (M, N) or null
    int64_t M, N, K, size;  // size: 4 or 2 bytes
    Activation activation;
};

// Products of one A with several weights of one size: see Matmuls.
struct LosslessMatmuls {
    LosslessMatmul each[kTogether];  // no z, residual, activation
    int64_t count;
    float* workspace;  // that of any of them
};

// How often each first byte occurs in each group of rows.
struct LosslessSurvey {
    int32_t* counts;  // (groups, 256)
    const void* w;    // (N, K) float32 or bfloat16
    int64_t N, K, size;
};

struct LosslessPack {
    uint8_t* packed;  // the header and the beginnings of the entries are there
    const void* w;    // (N, K) float32 or bfloat16
    int64_t N, K, size;
};

struct LosslessUnpack {
    void* w;  // (rows, K) float32 or bfloat16
    const uint8_t* packed;
    const int64_t* ids;    // (rows,) which rows, each within [0, N); or null
    const int32_t* ids32;  // the same; all rows where both are null
    int64_t rows, K, size;
    bool widen;  // bfloat16 to float32
};

struct LosslessMatmulKernels {
    int64_t (*workspace)(const LosslessMatmul&);
    void (*matmul)(const LosslessMatmul&);
    void (*matmuls)(const LosslessMatmuls&);
    void (*survey)(const LosslessSurvey&);
    void (*pack)(const LosslessPack&);
    void (*unpack)(const LosslessUnpack&);
};

}  // namespace fastlm
