// Few query rows against a range of keys: lanes run along D (scores) and E (values), K and V are read once, where they lie.
#pragma once

#include "attention_tile.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kChunk = kAttentionChunk;
constexpr int64_t kMaxRows = 16;

// Up to kMaxRows rows of group g of sequence b, packed once. Row i is query time[i], head head[i].
struct Rows {
    int64_t b, g, n, width;  // width: D rounded up to vectors
    int64_t time[kMaxRows], head[kMaxRows], low[kMaxRows], high[kMaxRows];
    float* q;       // (n, width), zero beyond D
    float* scores;  // (n, kChunk)
};

FASTLM_INLINE size_t rows_bytes(const AttentionInputs& p, int64_t n) {
    return size_t(n * (round_up(p.D) + kChunk)) * sizeof(float);
}

static void open_rows(Rows& rows, const AttentionInputs& p, int64_t b, int64_t g, int64_t first, int64_t n, float* memory) {
    const int64_t share = p.H / p.G;
    rows.b = b, rows.g = g, rows.n = n, rows.width = round_up(p.D);
    rows.q = memory;
    rows.scores = memory + n * rows.width;
    const vf sign = set(units(p).sign);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t r = first + i;
        rows.time[i] = r / share;
        rows.head[i] = g * share + r % share;
        visible(p, b, rows.time[i], rows.low[i], rows.high[i]);
        const float* q = query(p, b, rows.time[i], rows.head[i]);
        for (int64_t c = 0; c < rows.width; c += W) store(rows.q + i * rows.width + c, load_n(q + c, p.D - c) * sign);
    }
}

// NR x W / NR dot products: rows from q on, keys k + at[i]. out[r][i].
template <int NR>
FASTLM_INLINE void dot_block(float* out, const float* q, int64_t width, const float* k, int64_t stride, int64_t D, int64_t n) {
    constexpr int NK = W / NR;
    const float* at[NK];
    for (int i = 0; i < NK; ++i) at[i] = k + (i < n ? i : n - 1) * stride;  // a key too many reads the last one again
    vf acc[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) acc[i] = zero();
    int64_t c = 0;
    for (; c + W <= D; c += W) {
        vf x[NR];
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r) x[r] = load(q + r * width + c);
#pragma GCC unroll 16
        for (int i = 0; i < NK; ++i) {
            const vf y = load(at[i] + c);
#pragma GCC unroll 4
            for (int r = 0; r < NR; ++r) acc[r * NK + i] = fma(x[r], y, acc[r * NK + i]);
        }
    }
    if (c < D) {
        vf x[NR];
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r) x[r] = load(q + r * width + c);
#pragma GCC unroll 16
        for (int i = 0; i < NK; ++i) {
            const vf y = load_n(at[i] + c, D - c);
#pragma GCC unroll 4
            for (int r = 0; r < NR; ++r) acc[r * NK + i] = fma(x[r], y, acc[r * NK + i]);
        }
    }
    if (NR == 1) return store_n(out, reduce_add_each(acc), n);
    float sums[W];
    store(sums, reduce_add_each(acc));
    for (int r = 0; r < NR; ++r)
        for (int64_t i = 0; i < NK; ++i)
            if (i < n) out[r * kChunk + i] = sums[r * NK + i];
}

template <int NR>
static void dots(float* out, const float* q, int64_t width, const float* k, int64_t stride, int64_t D, int64_t n) {
    constexpr int64_t NK = W / NR;
    for (int64_t j = 0; j < n; j += NK) dot_block<NR>(out + j, q, width, k + j * stride, stride, D, n - j);
}

// o[r][e] = sum over keys of p[r][j] v[j][e] for NR rows and NV vectors.
template <int NR, int NV>
static void mix_block(float* o, int64_t ldo, const float* p, const float* v, int64_t stride, int64_t n, int64_t width) {
    vf acc[NR][NV];
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) acc[r][i] = zero();
    if (width >= NV * W) {
        for (int64_t j = 0; j < n; ++j) {
            vf x[NV];
#pragma GCC unroll 4
            for (int i = 0; i < NV; ++i) x[i] = load(v + j * stride + i * W);
#pragma GCC unroll 4
            for (int r = 0; r < NR; ++r) {
                const vf y = set(p[r * kChunk + j]);
#pragma GCC unroll 4
                for (int i = 0; i < NV; ++i) acc[r][i] = fma(y, x[i], acc[r][i]);
            }
        }
    } else {
        for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < NV; ++i) {
                const vf x = load_n(v + j * stride + i * W, most(0, width - i * W));
#pragma GCC unroll 4
                for (int r = 0; r < NR; ++r) acc[r][i] = fma(set(p[r * kChunk + j]), x, acc[r][i]);
            }
    }
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i)
            if (i * W < width) store_n(o + r * ldo + i * W, acc[r][i], width - i * W);
}

template <int NR> static void mix(float* o, int64_t ldo, const float* p, const float* v, int64_t stride, int64_t n, int64_t E) {
    constexpr int NV = kBlockVectors;
    int64_t e = 0;
    for (; e + NV * W <= E; e += NV * W) mix_block<NR, NV>(o + e, ldo, p, v + e, stride, n, NV * W);
    for (; e < E; e += W) mix_block<NR, 1>(o + e, ldo, p, v + e, stride, n, E - e);
}

// The same for one row and one vector of at most `width` elements, in four chains: one would wait for itself at every key.
// phase: of the first key, so that a key's chain does not depend on where the range begins.
static void mix_narrow(float* o, const float* p, const float* v, int64_t stride, int64_t n, int64_t width, int64_t phase) {
    vf acc[4] = {zero(), zero(), zero(), zero()};
    int64_t j = 0;
    for (; j < n && (j + phase) % 4 != 0; ++j) {
        vf& to = acc[(j + phase) % 4];
        to = fma(set(p[j]), load_n(v + j * stride, width), to);
    }
    for (; j + 4 <= n; j += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[i] = fma(set(p[j + i]), load_n(v + (j + i) * stride, width), acc[i]);
    for (int i = 0; j < n; ++i, ++j) acc[i] = fma(set(p[j]), load_n(v + j * stride, width), acc[i]);
    store_n(o, (acc[0] + acc[1]) + (acc[2] + acc[3]), width);
}

// Keys [first, end) of one chunk. out: (n, E + 2): for each row the sum of 2^((score - maximum) unit) v, then maximum and sum of
// weights.
static void rows_chunk(float* out, const Rows& rows, const AttentionInputs& p, int64_t first, int64_t end) {
    // Whole vectors from the chunk's beginning, so that a key's lane, and with it the bits, do not depend on the other rows.
    const int64_t begin = first / W * W;
    const int64_t n = rows.n, keys = end - begin, ldo = p.E + 2;
    const Units u = units(p);
    const float* k = key(p, rows.b, begin, rows.g);
    for (int64_t j = 0; j < keys; j += W) {  // W keys at a time, so that further rows find them in cache
        const int64_t m = least(W, keys - j);
        for (int64_t i = j + 2 * W; i < least(keys, j + 3 * W); ++i)
            for (int64_t c = 0; c < p.D; c += 16) __builtin_prefetch(k + i * p.k_time + c);
        int64_t r = 0;
        for (; r + 4 <= n; r += 4)
            dots<4>(rows.scores + r * kChunk + j, rows.q + r * rows.width, rows.width, k + j * p.k_time, p.k_time, p.D, m);
        for (; r + 2 <= n; r += 2)
            dots<2>(rows.scores + r * kChunk + j, rows.q + r * rows.width, rows.width, k + j * p.k_time, p.k_time, p.D, m);
        for (; r < n; ++r)
            dots<1>(rows.scores + r * kChunk + j, rows.q + r * rows.width, rows.width, k + j * p.k_time, p.k_time, p.D, m);
    }
    for (int64_t r = 0; r < n; ++r) {
        float* s = rows.scores + r * kChunk;
        const int64_t low = least(keys, most(0, rows.low[r] - begin)), high = most(low, least(keys, rows.high[r] - begin));
        for (int64_t j = 0; j < low; ++j) s[j] = -INFINITY;
        for (int64_t j = high; j < round_up(keys); ++j) s[j] = -INFINITY;
        if (p.bias) {
            const float* bias = p.bias + rows.b * p.bias_batch + rows.head[r] * p.bias_head + rows.time[r] * p.bias_time + begin;
            for (int64_t j = low; j < high; j += W)
                store_n(s + j, fma(load_n(s + j, high - j), set(u.scale), load_n(bias + j, high - j)), high - j);
        }
        vf top = set(-INFINITY);
        for (int64_t j = 0; j < keys; j += W) top = max(top, load(s + j));
        const float maximum = reduce_max(top), base = maximum == -INFINITY ? 0.0f : maximum;
        vf sum = zero();
        for (int64_t j = 0; j < keys; j += W) {
            const vf e = exp2_negative(load(s + j) - set(base), set(u.unit), set(u.low));
            store(s + j, e);
            sum = sum + e;
        }
        out[r * ldo + p.E] = maximum;
        out[r * ldo + p.E + 1] = reduce_add(sum);
    }
    const float* v = value(p, rows.b, first, rows.g);
    const float* weights = rows.scores + (first - begin);
    int64_t r = 0;
    for (; r + 4 <= n; r += 4) mix<4>(out + r * ldo, ldo, weights + r * kChunk, v, p.v_time, end - first, p.E);
    for (; r + 2 <= n; r += 2) mix<2>(out + r * ldo, ldo, weights + r * kChunk, v, p.v_time, end - first, p.E);
    if (p.E <= W)
        for (; r < n; ++r) mix_narrow(out + r * ldo, weights + r * kChunk, v, p.v_time, end - first, p.E, first);
    for (; r < n; ++r) mix<1>(out + r * ldo, ldo, weights + r * kChunk, v, p.v_time, end - first, p.E);
}

// What the chunks of one row give, added in order. part: the row in the first chunk's output; the next chunk's lies `step` on.
static void merge_row(const AttentionForward& p, int64_t b, int64_t t, int64_t h, const float* part, int64_t step, int64_t chunks) {
    const AttentionInputs& in = p.in;
    float* y = p.y + output(in, b, t, h) * in.E;
    const Units u = units(in);
    float maximum = -INFINITY, sum = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) {
        const float m = part[c * step + in.E];
        maximum = m > maximum || m != m ? m : maximum;
    }
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    for (int64_t e = 0; e < in.E; ++e) y[e] = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) {
        const float* x = part + c * step;
        if (x[in.E] == -INFINITY && x[in.E + 1] == 0.0f) continue;  // nothing seen: the values may never have been written
        const vf weight = exp2_negative(set(x[in.E] - base), set(u.unit), set(u.low));
        float w[W];
        store(w, weight);
        sum = sum + x[in.E + 1] * w[0];
        for (int64_t e = 0; e < in.E; e += W)
            store_n(y + e, fma(load_n(x + e, in.E - e), weight, load_n(y + e, in.E - e)), in.E - e);
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t e = 0; e < in.E; e += W) store_n(y + e, load_n(y + e, in.E - e) * set(inverse), in.E - e);
    if (p.stats) {
        float* stats = p.stats + 2 * output(in, b, t, h);
        stats[0] = maximum, stats[1] = inverse;
    }
}

// One row alone, reading only the keys that it sees.
static void one_row(const AttentionForward& p, int64_t b, int64_t g, int64_t row) {
    const AttentionInputs& in = p.in;
    const int64_t chunks = (in.S + kChunk - 1) / kChunk, step = in.E + 2;
    float* memory = static_cast<float*>(scratch(rows_bytes(in, 1) + size_t(chunks * step) * sizeof(float)));
    Rows rows;
    open_rows(rows, in, b, g, row, 1, memory);
    float* part = rows.scores + kChunk;
    int64_t used = 0;
    for (int64_t c = rows.low[0] / kChunk; c * kChunk < rows.high[0]; ++c, ++used)
        rows_chunk(part + used * step, rows, in, most(c * kChunk, rows.low[0]), least(rows.high[0], (c + 1) * kChunk));
    merge_row(p, b, rows.time[0], rows.head[0], part, step, used);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
