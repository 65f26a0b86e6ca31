// Few query rows against a chunk of keys, with the bits that the tiles give: lanes run along the keys (scores) and along E
// (values), K and V are read once for all rows, where they lie.
#pragma once

#include "attention_tile.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kMaxRows = 16;
constexpr int64_t kFew = 4;  // rows up to which keys and values go through registers alone

// Rows [first, first + n) of group g of sequence b, packed once. Row i is query time[i], head head[i].
struct Rows {
    int64_t b, g, n, width;  // width: D rounded up to vectors
    int64_t low_min, high_max;
    int64_t time[kMaxRows], head[kMaxRows], low[kMaxRows], high[kMaxRows];
    float shrink[kMaxRows][kChunk / kKeys];
    float* q;       // (n, width), zero beyond D
    float* scores;  // (n, kChunk), key j at j % kChunk
};

FASTLM_INLINE int64_t rows_floats(const AttentionInputs& p, int64_t n) { return n * (round_up(p.D) + kChunk); }
// What several Rows share where n > kFew: keys transposed, (D, kBlockVectors W), or a chain of values, (kChain, E in vectors).
FASTLM_INLINE int64_t packed_floats(const AttentionInputs& p, int64_t n) {
    return n > kFew ? most(p.D * kBlockVectors * W, kChain * round_up(p.E)) : 0;
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
    rows.low_min = rows.low[0], rows.high_max = rows.high[n - 1];  // both grow with the time
}

// A row of what a chunk gives, or several chunks together: E sums of weights times values in whole vectors, then, at row_end, the
// largest score and the sum of weights against it.
FASTLM_INLINE int64_t row_end(const AttentionInputs& p) { return round_up(p.E); }
FASTLM_INLINE int64_t row_width(const AttentionInputs& p) { return row_end(p) + W; }

// part[r][i] += elements [c, c + W) of the products of row r with the W / 4 keys at[i], four chains each.
template <class S, int NR, bool Whole>
FASTLM_INLINE void dot_step(vf (&part)[NR][2], const Row<S> (&at)[2][W / 4], const float* q, int64_t width, int64_t c, int64_t D) {
    vf x[2][W / 4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < W / 4; ++j) x[i][j] = Whole ? at[i][j].whole(c) : at[i][j].part(c, D - c);
        transpose_quads(x[i]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < W / 4; ++j)
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r) {
            const vf y = load_quad(q + r * width + c + 4 * j);
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) part[r][i] = fma(y, x[i][j], part[r][i]);
        }
}

// NR x W scores: the dot products of NR rows with the keys k + i stride, i < n; a key too many reads the last one again. A vector
// holds four elements of each of W / 4 keys: keys are transposed by fours of their elements, not by the element. Two vectors of
// keys at once use what is loaded of q twice; not more, since keys may lie a large power of two apart, in the same sets of the
// first cache.
template <class S, int NR> static void dots(float* out, const float* q, int64_t width, const typename S::T* k, int64_t stride,
                                            int64_t D, int64_t n, Ahead& ahead) {
    constexpr int64_t size = sizeof(typename S::T);
    for (int64_t begin = 0; begin < D; begin += kDotBlock) {
        const int64_t end = least(D, begin + kDotBlock);
        vf parts[NR][4];
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {  // keys i, i + 4, ... and i + 1, i + 5, ...
            Row<S> at[2][W / 4];
#pragma GCC unroll 8
            for (int j = 0; j < W / 2; ++j) at[j % 2][j / 2] = Row<S>(k + least(4 * (j / 2) + i + j % 2, n - 1) * stride, D);
            vf part[NR][2];
            each_sum(part, [](vf& x, int, int) FASTLM_LAMBDA { x = zero(); });
            int64_t c = begin;
            for (; c + W <= end; c += W) {
                ahead.step(n * (W / 2) * size);
                dot_step<S, NR, true>(part, at, q, width, c, D);
            }
            if (c < end) {
                ahead.step(n * (end - c) / 2 * size);
                dot_step<S, NR, false>(part, at, q, width, c, D);
            }
            each_sum(part, [&](vf& x, int r, int v) FASTLM_LAMBDA { parts[r][i + v] = x; });
        }
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r) {
            transpose_in_quads(parts[r]);
            vf total = begin == 0 ? parts[r][0] : load(out + r * kChunk) + parts[r][0];
#pragma GCC unroll 4
            for (int i = 1; i < 4; ++i) total = total + parts[r][i];
            store(out + r * kChunk, total);
        }
    }
}

// kt[d][i] = key i's element d for `vectors` vectors of keys, n of them there. kt: (D, kBlockVectors W).
template <class S> static void pack_keys(float* kt, const typename S::T* k, int64_t stride, int64_t D, int64_t n, int64_t vectors) {
    for (int64_t v = 0; v < vectors; ++v)
        for (int64_t c = 0; c < D; c += W) {
            vf a[W];
            for (int64_t i = 0; i < W; ++i) {
                const Row<S> row(k + least(v * W + i, n - 1) * stride, D);
                a[i] = c + W <= D ? row.whole(c) : row.part(c, D - c);
            }
            transpose(a);
            for (int64_t d = 0; d < least(W, D - c); ++d) store(kt + (c + d) * kBlockVectors * W + v * W, a[d]);
        }
}

// The scores of the keys [j, end): W of them at most, for more than kFew rows kBlockVectors W; j a multiple of W. packed:
// packed_floats.
template <class S>
static void rows_scores(const Rows& rows, const AttentionInputs& p, int64_t j, int64_t end, float* packed, Ahead& ahead) {
    const int64_t n = rows.n, w = rows.width, m = end - j, vectors = (m + W - 1) / W;
    const typename S::T* k = key<S>(p, rows.b, j, rows.g);
    float* out = rows.scores + j % kChunk;
    ahead.step(m * ((n <= kFew ? 0 : p.D) + S::kExtra) * int64_t(sizeof(typename S::T)));
    switch (n) {
        case 1: return dots<S, 1>(out, rows.q, w, k, p.k_time, p.D, m, ahead);
        case 2: return dots<S, 2>(out, rows.q, w, k, p.k_time, p.D, m, ahead);
        case 3: return dots<S, 3>(out, rows.q, w, k, p.k_time, p.D, m, ahead);
        case 4: return dots<S, 4>(out, rows.q, w, k, p.k_time, p.D, m, ahead);
        default:
            pack_keys<S>(packed, k, p.k_time, p.D, m, vectors);
            dot(out, kChunk, rows.q, w, packed, kBlockVectors * W, n, vectors, p.D);
    }
}

// Scores of keys [begin, end) become weights, by tiles of kKeys; maximum and sum of weights go to out[0], out[1].
static void rows_softmax(float* out, Rows& rows, const AttentionInputs& p, int64_t begin, int64_t end, int64_t r) {
    const Units u = units(p);
    float* s = rows.scores + r * kChunk - begin / kChunk * kChunk;  // by the key's number
    const int64_t low = least(end, most(begin, rows.low[r])), high = most(low, least(end, rows.high[r]));
    for (int64_t j = begin; j < low; ++j) s[j] = -INFINITY;
    for (int64_t j = high; j < begin + round_up(end - begin); ++j) s[j] = -INFINITY;
    if (p.bias) {
        const float* bias = p.bias + rows.b * p.bias_batch + rows.head[r] * p.bias_head + rows.time[r] * p.bias_time;
        for (int64_t j = low; j < high; j += W)
            store_n(s + j, fma(load_n(s + j, high - j), set(u.scale), load_n(bias + j, high - j)), high - j);
    }
    float maximum = -INFINITY, sum = 0.0f;
    for (int64_t tile = begin / kKeys * kKeys, i = tile % kChunk / kKeys; tile < end; tile += kKeys, ++i) {
        const int64_t from = most(begin, tile), to = least(end, tile + kKeys);
        vf top = set(maximum);
        for (int64_t j = from; j < to; j += W) top = max(top, load(s + j));
        const float largest = reduce_max(top), base = largest == -INFINITY ? 0.0f : largest;
        float shrink = 1.0f;
        if (!(largest == maximum)) {
            float all[W];
            store(all, exp2_negative(set(maximum - base), set(u.unit), set(u.low)));
            shrink = all[0];
        }
        vf part = zero();
        for (int64_t j = from; j < to; j += W) {
            const vf e = exp2_negative(load(s + j) - set(base), set(u.unit), set(u.low));
            store(s + j, e);
            part = part + e;
        }
        sum = sum * shrink + reduce_add(part);
        rows.shrink[r][i] = shrink;
        maximum = largest;
    }
    out[0] = maximum, out[1] = sum;
}

// o[r][e] += the sum over a chain of n keys of p[r][j] v[j][e] for NR rows and NV vectors.
template <class S, int NR, int NV, bool Whole> FASTLM_INLINE void mix_block(float* o, int64_t ldo, const float* p,
                                                                            const typename S::T* v, int64_t stride, int64_t n,
                                                                            int64_t E, int64_t e, Ahead& ahead) {
    vf acc[NR][NV];
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) acc[r][i] = zero();
    for (int64_t j = 0; j < n; ++j) {
        const Row<S> row(v + j * stride, E);
        if (j % 4 == 0) ahead.step(least(4, n - j) * (Whole ? NV * W : E - e) * int64_t(sizeof(typename S::T)));
        vf x[NV];
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) x[i] = Whole ? row.whole(e + i * W) : row.part(e + i * W, E - e - i * W);
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r) {
            const vf y = set(p[r * kChunk + j]);
#pragma GCC unroll 4
            for (int i = 0; i < NV; ++i) acc[r][i] = fma(y, x[i], acc[r][i]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) {
            float* at = o + r * ldo + e + i * W;
            store(at, load(at) + acc[r][i]);
        }
}

template <class S, int NR>
static void mix(float* o, int64_t ldo, const float* p, const typename S::T* v, int64_t stride, int64_t n, int64_t E, Ahead& ahead) {
    constexpr int NV = kBlockVectors;
    int64_t e = 0;
    for (; e + NV * W <= E; e += NV * W) mix_block<S, NR, NV, true>(o, ldo, p, v, stride, n, E, e, ahead);
    for (; e + W <= E; e += W) mix_block<S, NR, 1, true>(o, ldo, p, v, stride, n, E, e, ahead);
    if (e < E) mix_block<S, NR, 1, false>(o, ldo, p, v, stride, n, E, e, ahead);
}

// out's rows += the sum of weights times values over one chain, the keys [j, end). opens: the first ones.
template <class S> static void rows_values(float* out, int64_t ldo, const Rows& rows, const AttentionInputs& p, int64_t j,
                                           int64_t end, bool opens, float* packed, Ahead& ahead) {
    const int64_t n = rows.n, E = p.E, width = round_up(E), keys = end - j;
    for (int64_t r = 0; r < n && (opens || j % kKeys == 0); ++r) {
        const float shrink = opens ? 0.0f : rows.shrink[r][j % kChunk / kKeys];
        if (shrink == 1.0f) continue;
        for (int64_t e = 0; e < E; e += W) {
            float* at = out + r * ldo + e;
            store(at, opens ? zero() : load(at) * set(shrink));
        }
    }
    const float* weights = rows.scores + j % kChunk;
    const typename S::T* v = value<S>(p, rows.b, j, rows.g);
    ahead.step(keys * ((n <= kFew ? 0 : E) + S::kExtra) * int64_t(sizeof(typename S::T)));
    switch (n) {
        case 1: return mix<S, 1>(out, ldo, weights, v, p.v_time, keys, E, ahead);
        case 2: return mix<S, 2>(out, ldo, weights, v, p.v_time, keys, E, ahead);
        case 3: return mix<S, 3>(out, ldo, weights, v, p.v_time, keys, E, ahead);
        case 4: return mix<S, 4>(out, ldo, weights, v, p.v_time, keys, E, ahead);
        default: {
            const Range all[] = {{0, keys}, {0, keys}, {0, keys}, {0, keys}};
            mix<false, kChain>(out, ldo, weights, kChunk, pack_rows<S>(packed, v, p.v_time, keys, E, width), width, n, width / W,
                               all, false, nullptr);
        }
    }
}

// f(from, to) for the pieces of [first, end) that begin at multiples of `size`.
template <class F> FASTLM_INLINE void each_piece(int64_t first, int64_t end, int64_t size, const F& f) {
    for (int64_t at = first / size * size; at < end; at += size) f(most(first, at), least(end, at + size));
}

// Keys [first, end) of one chunk for several groups' rows, which take turns: in memory a key's groups are neighbours. out: (groups,
// n, row_width); further groups `step` on.
static void rows_chunk(float* out, int64_t step, Rows* rows, int64_t groups, const AttentionInputs& p, int64_t first, int64_t end,
                       float* packed, Ahead& ahead) {
    // Whole vectors from the chunk's beginning, so that a key's lane, and with it the bits, do not depend on the other rows.
    const int64_t begin = first / W * W, ldo = row_width(p);
    each_store(p, [&](auto kind) {
        using S = decltype(kind);
        each_piece(begin, end, rows->n <= kFew ? W : kBlockVectors * W, [&](int64_t from, int64_t to) {
            for (int64_t i = 0; i < groups; ++i) rows_scores<S>(rows[i], p, from, to, packed, ahead);
        });
        for (int64_t i = 0; i < groups; ++i)
            for (int64_t r = 0; r < rows[i].n; ++r) rows_softmax(out + i * step + r * ldo + row_end(p), rows[i], p, begin, end, r);
        each_piece(first, end, kChain, [&](int64_t from, int64_t to) {
            for (int64_t i = 0; i < groups; ++i)
                rows_values<S>(out + i * step, ldo, rows[i], p, from, to, from == first, packed, ahead);
        });
    });
}

// total = what it holds, and what another chunk gives.
static void merge_row(float* total, const float* part, const AttentionInputs& p) {
    const Units u = units(p);
    const int64_t at = row_end(p);
    const float m = part[at], s = part[at + 1];
    if (m == -INFINITY && s == 0.0f) return;  // sees nothing of it
    const float largest = total[at] > m ? total[at] : m, base = largest == -INFINITY ? 0.0f : largest;
    float a[W], b[W];
    const vf keep = exp2_negative(set(total[at] - base), set(u.unit), set(u.low));
    const vf take = exp2_negative(set(m - base), set(u.unit), set(u.low));
    store(a, keep), store(b, take);
    const float sum = total[at + 1] * a[0] + s * b[0];
    for (int64_t e = 0; e < p.E; e += W) store(total + e, fma(load(part + e), take, load(total + e) * keep));
    total[at] = largest, total[at + 1] = sum;
}

// Nothing seen yet.
static void open_total(float* total, const AttentionInputs& p) {
    for (int64_t e = 0; e < row_width(p); e += W) store(total + e, zero());
    total[row_end(p)] = -INFINITY;
}

// The finished row. Returns whether all of it is finite.
static bool close_row(const AttentionForward& p, int64_t b, int64_t t, int64_t h, const float* total) {
    const AttentionInputs& in = p.in;
    const float sum = total[row_end(in) + 1], inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    float* y = p.y + output(in, b, t, h) * in.E;
    vf check = zero();
    for (int64_t e = 0; e < in.E; e += W) {
        const vf x = load(total + e) * set(inverse);
        store_n(y + e, x, in.E - e);
        check = fma(x, zero(), check);  // beyond E there are zeros
    }
    if (p.stats) {
        float* stats = p.stats + 2 * output(in, b, t, h);
        stats[0] = total[row_end(in)], stats[1] = inverse;
    }
    return !any(is_nan(check));
}

// One row alone, reading only the keys that it sees.
static void one_row(const AttentionForward& p, int64_t b, int64_t g, int64_t row) {
    const AttentionInputs& in = p.in;
    const int64_t width = row_width(in);
    float* memory = static_cast<float*>(scratch(size_t(rows_floats(in, 1) + 2 * width) * sizeof(float)));
    Rows rows;
    Ahead none;
    open_rows(rows, in, b, g, row, 1, memory + 2 * width);
    float *total = memory, *part = memory + width;
    open_total(total, in);
    for (int64_t c = rows.low[0] / kChunk; c * kChunk < rows.high[0]; ++c) {
        const int64_t first = most(c * kChunk, rows.low[0]), end = least(rows.high[0], (c + 1) * kChunk);
        rows_chunk(part, 0, &rows, 1, in, first, end, nullptr, none);
        merge_row(total, part, in);
    }
    close_row(p, b, rows.time[0], rows.head[0], total);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
