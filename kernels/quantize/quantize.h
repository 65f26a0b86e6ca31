// float32 to ggml's quantised blocks: the bytes of ggml's reference quantisers (ggml-quants.c, quantize_row_*_ref).
#pragma once

#include <cstdint>

#include "kernels/dequantize/dequantize.h"

namespace fastlm {

struct Quantize {
    uint8_t* blocks;  // (rows, bytes of a row)
    const float* x;   // (rows, K)
    int64_t rows, K;  // K is a multiple of 32
    Quant kind;       // Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0
};

struct QuantizeKernels {
    // The first row that has an infinity, not-a-number, or a block whose scale or minimum float16 cannot hold; -1 where there is
    // none.
    int64_t (*quantize)(const Quantize&);
};

}  // namespace fastlm
