// y = (x - mean) * rstd * weight + bias over the last axis. Layer normalization, Ba et al. 2016, arXiv:1607.06450, eq. 4.
#pragma once

#include <cstdint>

namespace fastlm {

// With `residual`, x + residual takes the place of x and is written to `total`.
struct LayerNormForward {
    float* y;        // (R, C)
    float* total;    // (R, C), or null without residual
    float* stats;    // (R, 3), or null where no gradient will be asked for: mean, shift, rstd with n = (x - mean) * rstd + shift
    const float* x;  // (R, C)
    const float* residual;  // (R, C), or null
    const float* weight;    // (C,)
    const float* bias;      // (C,) or null
    int64_t R, C;
    float eps;
};

struct LayerNormBackward {
    float* dx;            // (R, C)  =, for x and for residual
    float* dweight;       // (C,)    += or null
    float* dbias;         // (C,)    += or null
    float* partial;       // (ceil(R / kLayerNormRows), 2, C) workspace, where dweight or dbias is asked for
    const float* dy;      // (R, C)
    const float* dtotal;  // (R, C), or null
    const float* x;       // (R, C), or total
    const float* weight;  // (C,)
    const float* stats;   // (R, 3)
    int64_t R, C;
};

constexpr int64_t kLayerNormRows = 32;  // rows that one piece sums into one partial

struct LayerNormKernels {
    void (*forward)(const LayerNormForward&);
    void (*backward)(const LayerNormBackward&);
};

}  // namespace fastlm
