// y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps) over the last axis. Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
#pragma once

#include <cstdint>

namespace fastlm {

// With `residual`, x + residual takes the place of x and is written to `total`.
struct RmsNormForward {
    float* y;               // (R, C)
    float* total;           // (R, C), or null without residual
    float* rstd;            // (R,), or null where no gradient will be asked for
    const float* x;         // (R, C)
    const float* residual;  // (R, C), or null
    const float* weight;    // (C,)
    int64_t R, C;
    float eps;
};

struct RmsNormBackward {
    float* dx;            // (R, C)  =, for x and for residual
    float* dweight;       // (C,)    += or null
    float* partial;       // (ceil(R / kRmsNormRows), C) workspace, where dweight is asked for
    const float* dy;      // (R, C)
    const float* dtotal;  // (R, C), or null
    const float* x;       // (R, C), or total
    const float* weight;  // (C,)
    const float* rstd;    // (R,)
    int64_t R, C;
};

constexpr int64_t kRmsNormRows = 32;  // rows that one piece sums into one partial

struct RmsNormKernels {
    void (*forward)(const RmsNormForward&);
    void (*backward)(const RmsNormBackward&);
};

}  // namespace fastlm
