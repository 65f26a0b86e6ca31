// y = softmax(scale q k^T + bias, visible keys only) v for grouped heads.
// FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithms 1 and 2; grouped heads, Ainslie et al. 2023, arXiv:2305.13245.
#pragma once

#include <cstdint>

#include "kernels/cache_append/cache_append.h"

namespace fastlm {

// What the passes share. Strides count elements (int8: bytes); a head's stride is its width, the last axis is contiguous.
// Query t of sequence b stands at lengths[b] - T + t. It sees the keys [low, high): high is its position + 1 where causal, else
// lengths[b], and low is high - window, both cut to [0, lengths[b]]. Keys at lengths[b] and beyond are never read.
struct AttentionInputs {
    const float* q;          // (B, T, H, D)
    const void* k;           // (B, S, G, D) as `kind` says; what is read are the numbers that it stands for
    const void* v;           // (B, S, G, E)
    const float* bias;       // (1 or B, 1 or H, T, S) or null
    const int32_t* lengths;  // (B,) or null: S
    const int32_t* offsets;  // (B + 1,) or null. Packed: sequence b has the rows offsets[b] .. offsets[b + 1] of q (R, H, D), of
                             // k, v (R, G, .) and of every output; T = S = the longest, no lengths, no bias, batch strides 0
    const int32_t*
        table;     // (B, blocks) or null. Pages: k and v are (pages, page, G, .), and key j of sequence b is number j % page
                   // of page table[b][j / page], read as 0 or the last page where it is none; S = blocks page. Forward only
    int64_t rows;  // R; B T where not packed
    int64_t q_batch, q_time, k_batch, k_time, v_batch, v_time;
    int64_t bias_batch, bias_head, bias_time;  // 0 where the axis is broadcast
    int64_t B, T, S, H, G, D, E;
    int64_t table_row, page,
        pages;       // from row to row of the table; a page's keys, a multiple of kAttentionKeys; how many there are
    int64_t window;  // 0: none
    double scale;
    bool causal;
    CacheKind kind;  // float32 in the backward pass
};

struct AttentionForward {
    float* y;        // (B, T, H, E)
    float* stats;    // (B, T, H, 2) or null: the largest score and 1 / the sum of weights against it (0: the query sees nothing).
                     // The log-sum-exp in two parts: as one number its rounding would be the largest error of the backward pass.
    float* partial;  // (attention_decode.workspace,) for decode.forward; else null
    AttentionInputs in;
};

struct AttentionBackward {
    float* dq;                        // (B, T, H, D)  =
    float* dk;                        // (B, S, G, D)  =
    float* dv;                        // (B, S, G, E)  =
    float* dbias;                     // as bias, contiguous  +=, or null
    float* partial;                   // (chunks, rows, H, D) workspace where chunks > 1
    const float* dy;                  // (B, T, H, E)
    const float* y;                   // (B, T, H, E)
    const float* stats;               // (B, T, H, 2), from the forward pass
    int64_t dq_row, dk_row, dv_row;   // strides from token to token, in floats: H D, G D, G E, or that of an array that holds all
    int64_t dbias_batch, dbias_head;  // 0 where the axis is broadcast
    int64_t chunks, chunk;            // pieces of the keys, and keys in each: a multiple of kAttentionKeys
    AttentionInputs in;
};

constexpr int64_t kAttentionKeys = 64;    // keys in a tile; tiles start at key 0, so that a row's bits depend on nothing else
constexpr int64_t kAttentionChunk = 256;  // keys of which the weights are summed together, before these sums are merged in order

struct AttentionKernels {
    void (*forward)(const AttentionForward&);
};

// The same function, bit for bit, for few queries: each group's keys and values are read once, straight from the cache. Its cost
// depends on the lengths, not on S.
struct AttentionDecodeKernels {
    int64_t (*workspace)(const AttentionForward&);  // floats
    void (*forward)(const AttentionForward&);
    int64_t max_rows;  // T H / G up to which it is the faster one
};

struct AttentionBackwardKernels {
    void (*backward)(const AttentionBackward&);
};

}  // namespace fastlm
