// y = act(x), elementwise: gelu (Hendrycks & Gimpel 2016, arXiv:1606.08415, by erf or its tanh form), silu (section 2 there), relu.
#pragma once

#include <cstdint>

#include "csrc/simd/activation_kind.h"

namespace fastlm {

struct ActivationForward {
    float* y;        // (n,)
    const float* x;  // (n,)
    int64_t n;
    Activation kind;
};

struct ActivationBackward {
    float* dx;        // (n,)  =
    const float* dy;  // (n,)
    const float* x;   // (n,)
    int64_t n;
    Activation kind;
};

struct ActivationKernels {
    void (*forward)(const ActivationForward&);
    void (*backward)(const ActivationBackward&);
    // For tests/runtime: y[i] = name(x[i]) for the elementary functions of csrc/simd/math.h, and the like. False: unknown name.
    bool (*probe)(const char* name, float* y, const float* x, int64_t n);
};

}  // namespace fastlm
