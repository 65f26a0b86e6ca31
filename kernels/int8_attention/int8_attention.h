// y = softmax(scale q k^T) v over all keys of a sequence, with q, k, v and the weights in 8 bits. With one scale for each head's
// vector of q, k and v, s = max |x| / 127 and codes round(x * (127 / max |x|)), ties to even:
//
//     t[i, j] = (float(sum of q_i k_j) * s_k[j]) * (s_q[i] * scale log2 e) + log2 s_v[j]        in that order, nothing fused
//     e[i, j] = 255 * 2^(t[i, j] - the largest of i),   c[i, j] = round(e[i, j])
//     y[i]    = float(sum over j of c[i, j] v_j) * (1 / sum over j of e[i, j] / s_v[j])
//
// The scale of a value is part of its weight before that is rounded, so one code serves both, and the largest product of both is
// 255. Sums of codes are integers and exact; that of the e, in sixteen lanes by j % 16, is not of the codes. s_v is at least 2^-24
// of the largest of the head and 2^-100. So a sequence has one result, in any batch, on any number of threads and every instruction
// set. A query that is not finite gives not-a-number, a key or value that is not gives it to all queries of its sequence and head.
#pragma once

#include <cstdint>

namespace fastlm {

constexpr int64_t kInt8AttentionKeys = 65536;   // 255 * 127 * S < 2^31
constexpr int64_t kInt8AttentionDepth = 65536;  // 255 * 127 * D < 2^31

struct Int8Attention {
    float* y;                // (B, T, H, E), or packed (R, H, E)
    const float* q;          // (B, T, H, D): strides count elements, a head's is D, the last axis is contiguous
    const float* k;          // (B, S, G, D)
    const float* v;          // (B, S, G, E)
    const int32_t* lengths;  // (B,) or null: S. Keys from there on are never read
    const int32_t* offsets;  // (B + 1,) or null. Packed: sequence b has the rows offsets[b] .. offsets[b + 1] of q, k, v and y;
                             // T = S = the longest, no lengths, batch strides 0
    int64_t q_batch, q_time, k_batch, k_time, v_batch, v_time;
    int64_t B, T, S, H, G, D, E;
    double scale;
};

struct Int8AttentionKernels {
    void (*forward)(const Int8Attention&);
};

}  // namespace fastlm
