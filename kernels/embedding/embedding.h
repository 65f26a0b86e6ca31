// y[i] = weight[ids[i]], rows of a table; backward adds dy[i] to row ids[i] of the table's gradient.
#pragma once

#include <cstdint>

namespace fastlm {

// ids lie in one of two arrays, the other is null.
struct EmbeddingIds {
    const int32_t* ids32;  // (N,)
    const int64_t* ids64;  // (N,)
    int64_t N;
};

struct EmbeddingForward {
    float* y;                     // (N, C)
    EmbeddingIds ids;             // each within [0, V)
    const float* weight;          // (V, C), or null
    const uint16_t* weight_bf16;  // (V, C) bfloat16, or null
    int64_t C;
};

struct EmbeddingBackward {
    float* dweight;  // (V, C)  +=
    EmbeddingIds ids;
    const float* dy;  // (N, C)
    int64_t C;
};

struct EmbeddingKernels {
    int64_t (*first_outside)(const EmbeddingIds&, int64_t V);  // position of the first id outside [0, V), -1 where there is none
    void (*forward)(const EmbeddingForward&);
    void (*backward)(const EmbeddingBackward&);
};

}  // namespace fastlm
