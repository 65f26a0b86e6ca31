// y = (x - mean) * rstd * weight + bias over the last axis. Layer normalization, Ba et al. 2016, arXiv:1607.06450, eq. 4.
#pragma once

#include <cstdint>

namespace fastlm {

struct LayerNormForward {
    float* y;             // (R, C)
    float* mean;          // (R,)
    float* rstd;          // (R,)  1 / sqrt(variance + eps)
    const float* x;       // (R, C)
    const float* weight;  // (C,)
    const float* bias;    // (C,) or null
    int64_t R, C;
    float eps;
};

struct LayerNormBackward {
    float* dx;            // (R, C)  =
    float* dweight;       // (C,)    += or null
    float* dbias;         // (C,)    += or null
    float* partial;       // (ceil(R / kLayerNormRows), 2, C) workspace, where dweight or dbias is asked for
    const float* dy;      // (R, C)
    const float* x;       // (R, C)
    const float* weight;  // (C,)
    const float* mean;    // (R,)
    const float* rstd;    // (R,)
    int64_t R, C;
};

constexpr int64_t kLayerNormRows = 32;  // rows that one piece sums into one partial

struct LayerNormKernels {
    void (*forward)(const LayerNormForward&);
    void (*backward)(const LayerNormBackward&);
};

}  // namespace fastlm
