// Mixture of experts around its matrix products: the router's softmax and top-k, rows gathered by expert, and their weighted sum.
#pragma once

#include <cstdint>

namespace fastlm {

// probabilities = softmax(logits); experts: the k largest of each row, largest first, equal ones by the lower index.
struct MoeRoute {
    float* probabilities;  // (R, E)
    int32_t* experts;      // (R, k)
    const float* logits;   // (R, E)
    int64_t R, E, k;
};

struct MoeGather {
    float* y;             // (P, C): y[p] = x[rows[p]]
    const float* x;       // (R, C)
    const int32_t* rows;  // (P,)
    int64_t P, C;
};

// out[r] = residual[r] + sum over j of weights[r, j] * y[slots[r, j]], in the order of j.
struct MoeCombine {
    float* out;             // (R, C)
    const float* y;         // (P, C)
    const int32_t* slots;   // (R, k): rows of y; -1 where there is none
    const float* weights;   // (R, k), or null: ones
    const float* residual;  // (R, C), or null
    int64_t R, C, k;
};

struct MoeCombineBackward {
    float* dy;             // (P, C)  =
    float* dweights;       // (R, k)  =, zero where there is no slot
    const float* dout;     // (R, C)
    const float* y;        // (P, C)
    const int32_t* slots;  // (R, k)
    const float* weights;  // (R, k)
    int64_t R, C, k;
};

struct MoeKernels {
    void (*route)(const MoeRoute&);
    void (*gather)(const MoeGather&);
    void (*combine)(const MoeCombine&);
    void (*combine_backward)(const MoeCombineBackward&);
};

}  // namespace fastlm
