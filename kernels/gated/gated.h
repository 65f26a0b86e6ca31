// y = act(gate) * up. Gated linear units, Shazeer 2020, arXiv:2002.05202, without the matrices. gate and up may be the two halves
// of one array: their rows lie gate_stride and up_stride elements apart.
#pragma once

#include <cstdint>

#include "csrc/simd/activation_kind.h"

namespace fastlm {

struct GatedForward {
    float* y;           // (R, F)
    const float* gate;  // (R, F), rows gate_stride apart
    const float* up;    // (R, F), rows up_stride apart
    int64_t R, F, gate_stride, up_stride;
    Activation kind;
};

struct GatedBackward {
    float* dgate;       // (R, F)  =, rows dgate_stride apart
    float* dup;         // (R, F)  =, rows dup_stride apart
    const float* dy;    // (R, F)
    const float* gate;  // (R, F), rows gate_stride apart
    const float* up;    // (R, F), rows up_stride apart
    int64_t R, F, dgate_stride, dup_stride, gate_stride, up_stride;
    Activation kind;
};

struct GatedKernels {
    void (*forward)(const GatedForward&);
    void (*backward)(const GatedBackward&);
};

}  // namespace fastlm
