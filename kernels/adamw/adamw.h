// One step of Adam with decoupled weight decay, Loshchilov and Hutter 2019, arXiv:1711.05101, over many tensors; and the global
// norm.
#pragma once

#include <cstdint>

namespace fastlm {

struct AdamWTensor {
    float* parameter;       // (n,)  in place
    float* m;               // (n,)  in place: running mean of the gradient
    float* v;               // (n,)  in place: running mean of its square
    const float* gradient;  // (n,)
    int64_t n;
    float keep;  // 1 - lr weight_decay
};

// A piece of one tensor: elements begin .. end - 1.
struct TensorPiece {
    int64_t tensor, begin, end;
};
constexpr int64_t kAdamWPiece = 32768;

struct AdamWStep {
    const AdamWTensor* tensors;
    const TensorPiece* pieces;
    int64_t piece_count;
    float beta1, beta2;
    float beta1_rest, beta2_rest;  // 1 - beta, rounded once from float64
    float step_size;               // lr / (1 - beta1^step)
    float bias2;                   // sqrt(1 - beta2^step)
    float eps, scale;              // scale multiplies the gradient
};

struct SquareSum {
    double* partial;             // (piece_count,)
    const float* const* arrays;  // one pointer a tensor
    const TensorPiece* pieces;
    int64_t piece_count;
};

struct AdamWKernels {
    void (*step)(const AdamWStep&);
    void (*square_sum)(const SquareSum&);
};

}  // namespace fastlm
