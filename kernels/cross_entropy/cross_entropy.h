// loss = logsumexp(logits) - logits[target] per row, its gradient, and log softmax.
#pragma once

#include <cstdint>

namespace fastlm {

struct CrossEntropyForward {
    float* loss;             // (R,)   0 where ignored
    float* stats;            // (R, 2) greatest logit m, 1 / sum(exp(logits - m))
    float* dlogits;          // (R, V) = (softmax - onehot) * scale, or null; may be `logits` itself
    const float* logits;     // (R, V)
    const int64_t* targets;  // (R,)   0 .. V - 1, or ignore_index
    int64_t R, V, ignore_index;
    float scale;
};

struct CrossEntropyBackward {
    float* dlogits;          // (R, V) = (softmax - onehot) * dy
    const float* dy;         // (R,)
    const float* logits;     // (R, V)
    const float* stats;      // (R, 2)
    const int64_t* targets;  // (R,)
    int64_t R, V, ignore_index;
};

struct LogSoftmax {
    float* y;             // (R, V)
    const float* logits;  // (R, V)
    int64_t R, V;
};

struct ScaleAdd {
    float* y;        // (n,) = z + a x; y may be x or z
    const float* x;  // (n,)
    const float* z;  // (n,) or null: zeros
    int64_t n;
    float a;
};

struct CrossEntropyKernels {
    void (*forward)(const CrossEntropyForward&);
    void (*backward)(const CrossEntropyBackward&);
    void (*log_softmax)(const LogSoftmax&);
    void (*scale_add)(const ScaleAdd&);
};

}  // namespace fastlm
