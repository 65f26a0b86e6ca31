// quantized_matmul with 8-bit activations: integer dot products, one float32 multiply-add pair for each 32 of k.
//
// A row of A is cut into groups of 32, each with a scale s = max |a| / 127 and codes round(a * (127 / max |a|)), ties to even. With
// weights d q + m, q counted from their offset, group after group in the order of k and without fused multiply-adds
//
//     c += float(sum of q * code) * (d * s);      c += m * (s * sum of codes)      the latter where the format has minima
//
// The inner sums are integers and exact (Q6_K, which has a scale for 16 of k: two such steps a group). So every row has one result,
// at any number of rows and threads, on every instruction set. Groups whose largest magnitude is below 2^-100 count as zeros; one
// that holds an infinity or not-a-number makes its whole row not-a-number.
//
// The wide form is for heads, whose error counts most: its codes have 16 bits, 256 * round(t) + r with t = a * (127 / max |a|) and
// r = round((t - round(t)) * 256) held to +-127, and its scales are s / 256. All else is the same; the integer sums still fit.
#pragma once

#include "kernels/quantized_matmul/quantized_matmul.h"

namespace fastlm {

// Peak: dot products from registers, as `rounds` groups of 32 for a register block; scaled: with the float32 part of each group.
struct Int8Peak {
    float* y;  // (pieces,)
    int64_t pieces, rounds;
    bool scaled;
};

struct Int8MatmulKernels {
    int64_t operations;                            // of one round
    int64_t (*workspace)(const QuantizedMatmul&);  // bytes; QuantizedMatmul as for float32 activations
    int64_t (*wide_workspace)(const QuantizedMatmul&);
    void (*matmul)(const QuantizedMatmul&);
    void (*wide)(const QuantizedMatmul&);
    void (*matmuls)(const QuantizedMatmuls&);
    void (*peak)(const Int8Peak&);
};

}  // namespace fastlm
