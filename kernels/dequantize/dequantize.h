// Quantised rows to float32: w = d * q + m with d, q, m unpacked from blocks. Formats: ggml, ggml-quants.c (MIT).
#pragma once

#include <cstdint>

namespace fastlm {

// The numbers are ggml's type ids, as GGUF files store them.
enum class Quant : int32_t { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

struct QuantFormat {
    Quant kind;
    const char* name;
    int64_t values;  // weights in a block
    int64_t bytes;   // bytes of a block
};

constexpr QuantFormat kQuantFormats[] = {
    {Quant::Q4_0, "Q4_0", 32, 18},   {Quant::Q4_1, "Q4_1", 32, 20},   {Quant::Q5_0, "Q5_0", 32, 22},
    {Quant::Q5_1, "Q5_1", 32, 24},   {Quant::Q8_0, "Q8_0", 32, 34},   {Quant::Q4_K, "Q4_K", 256, 144},
    {Quant::Q5_K, "Q5_K", 256, 176}, {Quant::Q6_K, "Q6_K", 256, 210},
};

struct DequantizeForward {
    float* w;               // (R, C)
    const uint8_t* blocks;  // (rows, bytes of a row), any alignment
    const int64_t* ids;     // (R,) rows of `blocks`, or null: row r is row r. In range; the caller checked.
    const int32_t* ids32;   // (R,) the same as int32, where `ids` is null; or null
    int64_t R, C;           // C is a multiple of the format's values
    Quant kind;
};

struct DequantizeKernels {
    void (*forward)(const DequantizeForward&);
};

}  // namespace fastlm
