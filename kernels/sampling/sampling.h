// Drawing a token from logits after the usual filters, and the largest k values, without sorting the vocabulary.
#pragma once

#include <cstdint>

namespace fastlm {

// What a row gives instead of a token.
constexpr int32_t kSampleNan = -1;          // a logit is nan
constexpr int32_t kSampleNothing = -2;      // every logit is -inf
constexpr int32_t kSampleInfinite = -3;     // at a temperature above 0: a logit is +inf, or becomes so when divided by it
constexpr int32_t kSampleBadPrevious = -4;  // an id in `previous` is not in the vocabulary
constexpr int32_t kSampleBadUniform = -5;   // its uniform number is not in [0, 1)

struct Sample {
    int32_t* token;                 // (B,)
    const float* logits;            // (B, V)
    const double* uniform;          // (B,) in [0, 1), where temperature is 0 as well
    const int32_t* previous;        // ids whose logits the penalty changes, -1: none; null without a penalty
    const int64_t* previous_begin;  // (B + 1,) where each row's ids begin in `previous`
    int64_t B, V;
    int64_t top_k;  // 0: off
    double top_p;   // 1: off
    float temperature, min_p, penalty;
};

struct TopK {
    float* values;     // (R, k) descending
    int32_t* indices;  // (R, k) ties: lowest index first; the first is kSampleNan where the row has a nan
    const float* x;    // (R, N)
    int64_t R, N, k;   // 1 <= k <= N
};

struct Argmax {
    int32_t* index;  // (R,) lowest index of the greatest value, or kSampleNan
    const float* x;  // (R, N)
    int64_t R, N;    // N >= 1
    bool token;      // kSampleNothing where every value is -inf, as in Sample
};

struct SamplingKernels {
    void (*sample)(const Sample&);
    void (*top_k)(const TopK&);
    void (*argmax)(const Argmax&);
};

}  // namespace fastlm
