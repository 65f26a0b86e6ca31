// Activation functions of the CUDA C++ kernels, by the number of `Activation` in csrc/simd/activation_kind.h. Nothing cancels where
// a function is small: the formulas and polynomials are those of csrc/simd/activation.h and of activation_triton.py.
#pragma once

#include "csrc/cuda/device.h"

// 1 / (1 + e^-x), by exp of what is not positive.
__device__ __forceinline__ float sigmoid(float x) {
    const float e = expf(-fabsf(x)), s = 1.0f / (1.0f + e);
    return x < 0.0f ? e * s : s;
}

// The normal distribution function.
__device__ __forceinline__ float normal_cdf(float x) {
    const float a = fabsf(x) * 0.70710678f, z = 0.5f * x * x;
    if (a < 1.0f) {
        float p = 7.853859671e-5f;
        p = fmaf(p, z, -8.010193116e-4f);
        p = fmaf(p, z, 5.188327628e-3f);
        p = fmaf(p, z, -2.685381190e-2f);
        p = fmaf(p, z, 1.128358515e-1f);
        p = fmaf(p, z, -3.761262582e-1f);
        p = fmaf(p, z, 1.128379166f);
        return fmaf(0.35355339f * p, x, 0.5f);
    }
    const float t = 1.0f / fmaf(0.4f, a, 1.0f);
    float q = -0.117370754f;
    q = fmaf(q, t, 0.246633753f);
    q = fmaf(q, t, 0.0049162521f);
    q = fmaf(q, t, 0.214964151f);
    q = fmaf(q, t, 0.19818607f);
    q = fmaf(q, t, 0.226788446f);
    q = fmaf(q, t, 0.225620806f);
    const float tail = 0.5f * q * t * expf(-z);  // of -|x|
    return x < 0.0f ? tail : 1.0f - tail;
}

__device__ __forceinline__ float activate(float x, int activation) {
    if (activation == 1) return x * normal_cdf(x);
    if (activation == 2)
        return x * sigmoid(x * fmaf(0.071354813f, fminf(x * x, 1e4f), 1.5957691f));  // far out u only has to be large
    if (activation == 3) return x * sigmoid(x);
    if (activation == 4) return x <= 0.0f ? 0.0f : x;
    return x;
}
