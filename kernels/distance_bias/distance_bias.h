// A learned number for each head and distance between query and key, by buckets of distances: what is added to attention's scores.
//
// Positions are read from memory: a recorded step of decoding has them there alone. They may be any numbers.
#pragma once

#include <cstdint>

namespace fastlm {

// y[b, h, t, s] = weight[buckets[center + s - positions[b, t]], h]; what lies beyond an end of `buckets` counts as that end.
struct DistanceBiasForward {
    float* y;                     // (B, H, T, S)
    const int32_t* buckets;       // (P,), each within [0, N)
    const float* weight;          // (N, H), or null
    const uint16_t* weight_bf16;  // (N, H) bfloat16, or null
    const int32_t* positions;     // (B, T)
    int64_t B, H, T, S, P, N, center;
};

struct DistanceBiasBackward {
    float* dweight;   // (N, H)  +=
    const float* dy;  // (B, H, T, S)
    const int32_t* buckets;
    const int32_t* positions;
    int64_t B, H, T, S, P, N, center;
};

struct DistanceBiasKernels {
    void (*forward)(const DistanceBiasForward&);
    void (*backward)(const DistanceBiasBackward&);
};

}  // namespace fastlm
