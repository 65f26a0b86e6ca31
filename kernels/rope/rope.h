// Rotary position embedding, Su et al. 2021, arXiv:2104.09864, eq. 34: (a, b) -> (a cos - b sin, b cos + a sin).
#pragma once

#include <cstdint>

namespace fastlm {

struct RopeForward {
    float* y;                  // (B, T, H, D)
    const float* x;            // (B, T, H, D), strides in floats; a head's is D
    const float* cos;          // (P, R / 2)
    const float* sin;          // (P, R / 2)
    const int32_t* positions;  // (B, T), (T,) or null: t
    int64_t x_batch, x_time, positions_batch;
    int64_t B, T, H, D, R;
    bool interleaved;  // pairs (2 i, 2 i + 1), else (i, i + R / 2)
    bool inverse;      // by the negative angle: the backward pass
};

struct RopeKernels {
    void (*forward)(const RopeForward&);
};

}  // namespace fastlm
