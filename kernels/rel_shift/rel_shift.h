// out[b, h, t, s] = scale * (q[b, t, h] + u[h]) . r[starts[b, t] + s, h] + segment term + mask: the position scores of
// Transformer-XL, computed where the relative shift would put them. Dai et al. 2019, arXiv:1901.02860, appendix B.
#pragma once

#include <cstdint>

namespace fastlm {

struct RelShiftForward {
    float* out;                   // (B, H, T, S)
    const float* q;               // (B, T, H, D)
    const float* u;               // (H, D)
    const float* rt;              // (H, D, stride), of which P columns are r's rows
    const int32_t* starts;        // (B, T), from 0 to P - S
    const float* segment;         // (B, H, T, 2) or null: added where the segments are equal [0] and where they differ [1]
    const float* query_segments;  // (B, T), with segment
    const float* key_segments;    // (B, S), with segment
    const float* mask;            // (B, T, S) or null
    int64_t B, T, H, D, S, P, stride;
    float scale;
};

struct RelShiftBackward {
    float* dq;                    // (B, T, H, D)  =, of the position scores alone
    float* dr;                    // (P, H, D)  = or null
    float* dsegment;              // (B, H, T, 2)  = or null
    const float* dout;            // (B, H, T, S)
    const float* q;               // (B, T, H, D)
    const float* u;               // (H, D)
    const float* r;               // (P, H, D)
    const int32_t* starts;        // (B, T)
    const float* query_segments;  // (B, T), with dsegment
    const float* key_segments;    // (B, S), with dsegment
    int64_t B, T, H, D, S, P;
    float scale;
};

struct RelShiftKernels {
    void (*forward)(const RelShiftForward&);
    void (*backward)(const RelShiftBackward&);
};

}  // namespace fastlm
