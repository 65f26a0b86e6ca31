// C = A B with float32 accumulation, and what a linear layer adds to it: bias, activation, residual.
//
// Every element of C is one chain of fused multiply-adds over k = 0 .. K-1 that starts from zero (from C where `accumulate` is
// set), at any blocking, thread count and batch. Bias, activation and residual come after, in this order.
#pragma once

#include <cstdint>

#include "csrc/simd/activation_kind.h"

namespace fastlm {

enum class Storage : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct Matmul {
    float* c;               // (batch, M, N)
    float* z;               // (batch, M, N) or null: keeps A B + bias, what the activation's derivative needs
    float* workspace;       // MatmulKernels::workspace bytes, 64-byte aligned
    const float* a;         // (M, K), where a_transposed (K, M)
    const void* b;          // (K, N), where b_transposed (N, K)
    const float* bias;      // (N,) or null
    const float* residual;  // (batch, M, N) or null
    int64_t batch, M, N, K;
    int64_t a_step, b_step;  // elements from one matrix of the batch to the next; 0 where it is shared
    bool a_transposed, b_transposed;
    Storage b_type;
    bool accumulate;  // C += A B, the chain going on from C; without bias, activation, residual
    Activation activation;
    int64_t a_row = 0;  // from one row of A to the next where A is some columns of a wider matrix (not transposed, batch 1); else 0
    const void* b_next = nullptr;  // or the B of a product like this one that follows it on this thread: fetched ahead
};

// Products of one A (M, K) with several weights (N_i, K) of one storage, each with a bias or none: for a few rows in one go, since
// what each alone would cost is waking the threads and their waiting for each other at its end. Each has the bits of `matmul`.
constexpr int kTogether = 4;
struct Matmuls {
    Matmul each[kTogether];  // batch 1, b_transposed; no z, residual, activation, accumulate
    int64_t count;
    float* workspace;  // that of any of them
};

// Through bias and activation: dz = dy * act'(z), dbias = its column sums.
struct LinearBackward {
    float* dz;        // (M, N) or null where there is no activation  =
    float* dbias;     // (N,)  += or null
    float* partial;   // (ceil(M / kLinearRows), N) workspace, where dbias is asked for
    const float* dy;  // (M, N)
    const float* z;   // (M, N) or null where there is no activation
    int64_t M, N;
    Activation activation;
};

struct Activate {
    float* y;        // (n,) = act(z), with the bits of `matmul`
    const float* z;  // (n,)
    int64_t n;
    Activation activation;
};

// A weight's transpose, columns of a wider matrix.
struct Turn {
    float* y;        // (K, stride), its first N columns
    const float* w;  // (N, K)
    int64_t N, K, stride;
};

constexpr int64_t kLinearRows = 32;  // rows that one piece sums into one partial

struct MatmulKernels {
    int64_t (*workspace)(const Matmul&);
    void (*matmul)(const Matmul&);
    void (*matmuls)(const Matmuls&);
    void (*linear_backward)(const LinearBackward&);
    void (*activate)(const Activate&);
    void (*turn)(const Turn&);
};

}  // namespace fastlm
