// C = A W^T with W quantised, and what a linear layer adds: every bit as if W had been dequantised to float32 and multiplied by
// matmul.
//
// The weight is repacked once, at load: sixteen rows side by side, so that one load brings the same k of sixteen rows and nothing
// is transposed when it runs. The layout is in blocks.h; it is the same on every instruction set.
#pragma once

#include <cstdint>

#include "kernels/dequantize/dequantize.h"
#include "kernels/matmul/matmul.h"

namespace fastlm {

struct QuantizedMatmul {
    float* c;               // (M, N)
    float* z;               // (M, N) or null: keeps A W^T + bias
    float* workspace;       // QuantizedMatmulKernels::workspace bytes, 64-byte aligned
    const float* a;         // (M, K)
    const uint8_t* packed;  // of QuantizedPack, 64-byte aligned
    const float* bias;      // (N,) or null
    const float* residual;  // (M, N) or null
    int64_t M, N, K;
    Quant kind;
    Activation activation;
};

// Products of one A with several weights of one kind: see Matmuls.
struct QuantizedMatmuls {
    QuantizedMatmul each[kTogether];  // no z, residual, activation
    int64_t count;
    float* workspace;  // that of any of them
    bool gated;        // int8_matmul alone: of two, each[1].c = gate(A W0^T + bias) * (A W1^T + bias); each[0].c is not used
    Activation gate;
};

struct QuantizedPack {
    uint8_t* packed;        // QuantizedMatmulKernels::packed_bytes
    const uint8_t* blocks;  // (N, bytes of a row), as a GGUF file stores them, any alignment
    int64_t N, K;           // K is a multiple of the format's values
    Quant kind;
};

struct QuantizedMatmulKernels {
    int64_t (*packed_bytes)(int64_t N, int64_t K, Quant kind);
    void (*pack)(const QuantizedPack&);
    int64_t (*workspace)(const QuantizedMatmul&);
    void (*matmul)(const QuantizedMatmul&);
    void (*matmuls)(const QuantizedMatmuls&);
};

}  // namespace fastlm
