// Activation functions and their derivatives on vf. `activate<kind>(x)`, and `activate<kind>(x, &derivative)` for both at once.
//
// Each is written so that nothing cancels where the function is small: gelu(x) for x far below zero is x * erfc(-x / sqrt 2) / 2,
// not x * (1 + erf(x / sqrt 2)) / 2, and 1 - sigmoid(x) is e^-x * sigmoid(x).
#pragma once

#include "activation_kind.h"
#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// sigmoid(x) and 1 - sigmoid(x). min returns its second operand where that is nan.
FASTLM_INLINE vf sigmoid_pair(vf x, vf* rest) {
    const vf e = exp(zero() - x);
    const vf s = set(1.0f) / (set(1.0f) + e);
    *rest = min(set(3.4028235e38f), e) * s;  // inf * 0 for x far below zero would be nan; there any number will do, s being 0
    return s;
}

// The normal distribution function and density at x: Phi(x) and e^(-x^2 / 2) / sqrt(2 pi).
FASTLM_INLINE vf normal_cdf(vf x, vf* density) {
    const vf a = abs(x) * set(0.70710678f), z = set(0.5f) * x * x;
    const vf e = exp(zero() - z);
    const vf tail = set(0.5f) * erfc_scaled(a) * e;
    const vf middle = fma(set(0.5f) * set(0.70710678f) * erf_quotient(z), x, set(0.5f));
    *density = e * set(0.39894228f);
    return select(lt(a, set(1.0f)), middle, select(lt(x, zero()), tail, set(1.0f) - tail));
}

template <Activation kind> FASTLM_INLINE vf activate(vf x, vf* derivative) {
    if constexpr (kind == Activation::none) {
        *derivative = set(1.0f);
        return x;
    } else if constexpr (kind == Activation::relu) {
        *derivative = select(le(x, zero()), zero(), set(1.0f));
        return max(zero(), x);
    } else if constexpr (kind == Activation::silu) {
        vf rest;
        const vf s = sigmoid_pair(x, &rest);
        *derivative = fma(x * s, rest, s);
        return x * s;
    } else if constexpr (kind == Activation::gelu_tanh) {
        // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        const vf xx = min(set(1e4f), x * x);  // far out u only has to be large, and 0 * inf must not occur
        vf rest;
        const vf s = sigmoid_pair(x * fma(xx, set(0.071354813f), set(1.5957691f)), &rest);
        *derivative = fma(x * s, rest * fma(xx, set(0.21406444f), set(1.5957691f)), s);
        return x * s;
    } else {
        vf density;
        const vf phi = normal_cdf(x, &density);
        *derivative = fma(x, density, phi);
        return x * phi;
    }
}

template <Activation kind> FASTLM_INLINE vf activate(vf x) {
    vf unused;
    return activate<kind>(x, &unused);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
