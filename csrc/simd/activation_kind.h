// The activation functions by number, for contracts and bindings; csrc/simd/activation.h computes them.
#pragma once

namespace fastlm {

enum class Activation : int { none, gelu, gelu_tanh, silu, relu };

}  // namespace fastlm
