#include "rel_shift.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kRows = 8;  // query rows, or rows of dr, that share what is loaded

// The rows [t, t + n) of one sequence and head, and the rows of r that any of them meets.
struct Block {
    int64_t b, h, t, n, low, high;
    const int32_t* starts;
};

template <class P> Block block_at(const P& p, int64_t index) {
    const int64_t blocks = (p.T + kRows - 1) / kRows;
    Block k;
    k.b = index / (p.H * blocks);
    k.h = index / blocks % p.H;
    k.t = index % blocks * kRows;
    k.n = p.T - k.t < kRows ? p.T - k.t : kRows;
    k.starts = p.starts + k.b * p.T + k.t;
    k.low = k.high = k.starts[0];
    for (int64_t i = 1; i < k.n; ++i) {
        if (k.starts[i] < k.low) k.low = k.starts[i];
        if (k.starts[i] > k.high) k.high = k.starts[i];
    }
    k.high += p.S;
    return k;
}

void finish_row(const RelShiftForward& p, const Block& k, int64_t i, float* out) {
    const int64_t t = k.b * p.T + k.t + i;
    const float* mask = p.mask ? p.mask + t * p.S : nullptr;
    const vf scale = set(p.scale);
    if (!p.segment) {
        each_vector(p.S, [&](int64_t s, auto v) FASTLM_LAMBDA {
            const vf x = v.load(out + s) * scale;
            v.store(out + s, mask ? x + v.load(mask + s) : x);
        });
        return;
    }
    const float* term = p.segment + ((k.b * p.H + k.h) * p.T + k.t + i) * 2;
    const vf same = set(term[0]), other = set(term[1]), own = set(p.query_segments[t]);
    const float* segments = p.key_segments + k.b * p.S;
    each_vector(p.S, [&](int64_t s, auto v) FASTLM_LAMBDA {
        const vf x = fma(v.load(out + s), scale, select(eq(v.load(segments + s), own), same, other));
        v.store(out + s, mask ? x + v.load(mask + s) : x);
    });
}

void forward_block(const RelShiftForward& p, const Block& k) {
    float* q = static_cast<float*>(scratch(size_t(kRows * p.D) * sizeof(float)));
    std::memset(q, 0, size_t(kRows * p.D) * sizeof(float));
    for (int64_t i = 0; i < k.n; ++i) {
        const float *from = p.q + ((k.b * p.T + k.t + i) * p.H + k.h) * p.D, *u = p.u + k.h * p.D;
        for (int64_t d = 0; d < p.D; ++d) q[i * p.D + d] = from[d] + u[d];
    }
    const float* rt = p.rt + k.h * p.D * p.stride + k.low;
    float* out = p.out + ((k.b * p.H + k.h) * p.T + k.t) * p.S;
    each_vector(k.high - k.low, [&](int64_t c, auto v) FASTLM_LAMBDA {
        vf sums[kRows];
        for (int64_t i = 0; i < kRows; ++i) sums[i] = zero();
        for (int64_t d = 0; d < p.D; ++d) {
            const vf r = v.load(rt + d * p.stride + c);
            for (int64_t i = 0; i < kRows; ++i) sums[i] = fma(set(q[i * p.D + d]), r, sums[i]);
        }
        const int64_t lanes = k.high - k.low - c < W ? k.high - k.low - c : W;
        for (int64_t i = 0; i < k.n; ++i) {
            const int64_t s = k.low + c - k.starts[i];  // where the first lane belongs
            if (s >= 0 && s + lanes <= p.S) {
                v.store(out + i * p.S + s, sums[i]);
            } else if (s + lanes > 0 && s < p.S) {
                float part[W];
                store(part, sums[i]);
                for (int64_t j = 0; j < lanes; ++j)
                    if (s + j >= 0 && s + j < p.S) out[i * p.S + s + j] = part[j];
            }
        }
    });
    for (int64_t i = 0; i < k.n; ++i) finish_row(p, k, i, out + i * p.S);
}

void forward(const RelShiftForward& p) {
    if (p.S == 0) return;
    parallel_for(p.B * p.H * ((p.T + kRows - 1) / kRows), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) forward_block(p, block_at(p, i));
    });
}

void segment_row(const RelShiftBackward& p, const Block& k, int64_t i, const float* dout) {
    const vf own = set(p.query_segments[k.b * p.T + k.t + i]);
    const float* segments = p.key_segments + k.b * p.S;
    vf same[4] = {zero(), zero(), zero(), zero()}, other[4] = {zero(), zero(), zero(), zero()};
    each_vector_of_4(p.S, [&](int64_t s, int u, auto v) FASTLM_LAMBDA {
        const vf d = v.load(dout + s);
        const vm mine = eq(v.load(segments + s), own);
        same[u] = same[u] + select(mine, d, zero());
        other[u] = other[u] + select(mine, zero(), d);
    });
    float* to = p.dsegment + ((k.b * p.H + k.h) * p.T + k.t + i) * 2;
    to[0] = reduce_add_4(same);
    to[1] = reduce_add_4(other);
}

// dq[t] = scale * sum over s of dout[t, s] r[start + s]. The rows of dout are first laid at their places beside r.
void backward_queries(const RelShiftBackward& p, const Block& k) {
    const int64_t span = k.high - k.low;
    float* d = static_cast<float*>(scratch(size_t(kRows * span) * sizeof(float)));
    std::memset(d, 0, size_t(kRows * span) * sizeof(float));
    const float* dout = p.dout + ((k.b * p.H + k.h) * p.T + k.t) * p.S;
    for (int64_t i = 0; i < k.n; ++i) {
        std::memcpy(d + i * span + k.starts[i] - k.low, dout + i * p.S, size_t(p.S) * sizeof(float));
        if (p.dsegment) segment_row(p, k, i, dout + i * p.S);
    }
    const float* r = p.r + (k.low * p.H + k.h) * p.D;
    each_vector(p.D, [&](int64_t c, auto v) FASTLM_LAMBDA {
        vf sums[kRows];
        for (int64_t i = 0; i < kRows; ++i) sums[i] = zero();
        for (int64_t s = 0; s < span; ++s) {
            const vf x = v.load(r + s * p.H * p.D + c);
            for (int64_t i = 0; i < kRows; ++i) sums[i] = fma(set(d[i * span + s]), x, sums[i]);
        }
        for (int64_t i = 0; i < k.n; ++i) v.store(p.dq + ((k.b * p.T + k.t + i) * p.H + k.h) * p.D + c, sums[i] * set(p.scale));
    });
}

// dr[j] = scale * sum over b and t, in this order, of dout[b, t, j - start] (q[b, t] + u), for kRows rows j from `first` on.
void backward_positions(const RelShiftBackward& p, int64_t h, int64_t first) {
    const int64_t n = p.P - first < kRows ? p.P - first : kRows;
    each_vector(p.D, [&](int64_t c, auto v) FASTLM_LAMBDA {
        vf sums[kRows];
        for (int64_t i = 0; i < kRows; ++i) sums[i] = zero();
        const vf u = v.load(p.u + h * p.D + c);
        for (int64_t b = 0; b < p.B; ++b)
            for (int64_t t = 0; t < p.T; ++t) {
                const int64_t s = first - p.starts[b * p.T + t];
                if (s >= p.S || s + n <= 0) continue;
                const float* dout = p.dout + ((b * p.H + h) * p.T + t) * p.S;
                const vf q = v.load(p.q + ((b * p.T + t) * p.H + h) * p.D + c) + u;
                if (n == kRows && s >= 0 && s + kRows <= p.S)
                    for (int64_t i = 0; i < kRows; ++i) sums[i] = fma(set(dout[s + i]), q, sums[i]);
                else
                    for (int64_t i = 0; i < kRows; ++i)
                        if (i < n && s + i >= 0 && s + i < p.S) sums[i] = fma(set(dout[s + i]), q, sums[i]);
            }
        for (int64_t i = 0; i < n; ++i) v.store(p.dr + ((first + i) * p.H + h) * p.D + c, sums[i] * set(p.scale));
    });
}

void backward(const RelShiftBackward& p) {
    parallel_for(p.B * p.H * ((p.T + kRows - 1) / kRows), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) backward_queries(p, block_at(p, i));
    });
    if (!p.dr) return;
    const int64_t blocks = (p.P + kRows - 1) / kRows;
    parallel_for(p.H * blocks, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) backward_positions(p, i / blocks, i % blocks * kRows);
    });
}

}  // namespace

extern const RelShiftKernels rel_shift_kernels = {forward, backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
