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

// Fetches memory ahead of its use into the second-level cache, in the order in which it lies: `step` as much as is being used up.
// A head's vectors are too far apart for the hardware to guess, and memory gives more where neighbours are read together.
struct Ahead {
    const char* at = nullptr;
    int64_t rows = 0, width = 0, stride = 0, column = 0;  // in bytes
    const char* next_at = nullptr;
    int64_t next_rows = 0, next_width = 0, next_stride = 0;

    void step(int64_t bytes) {
        for (; rows > 0 && bytes > 0; bytes -= 64) {
            __builtin_prefetch(at + column, 0, 2);
            column += 64;
            if (column < width) continue;
            column = 0, at += stride;
            if (--rows > 0) continue;
            at = next_at, rows = next_rows, width = next_width, stride = next_stride, next_rows = 0;
        }
    }
};

// A row of what a chunk gives, or several chunks together: E sums of weights times values in whole vectors, then, at row_end, the
// largest score and the sum of weights against it.
FASTLM_INLINE int64_t row_end(const AttentionInputs& p) { return round_up(p.E); }
FASTLM_INLINE int64_t row_width(const AttentionInputs& p) { return row_end(p) + W; }

// part[r] += elements [c, c + W) of the products of row r with the W / 4 keys `at`, four chains each.
template <class S, int NR, bool Whole>
FASTLM_INLINE void dot_step(vf (&part)[NR], const Row<S> (&at)[W / 4], const float* q, int64_t width, int64_t c, int64_t D) {
    vf x[W / 4];
#pragma GCC unroll 4
    for (int j = 0; j < W / 4; ++j) x[j] = Whole ? at[j].whole(c) : at[j].part(c, D - c);
    transpose_quads(x);
#pragma GCC unroll 4
    for (int j = 0; j < W / 4; ++j)
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r) part[r] = fma(load_quad(q + r * width + c + 4 * j), x[j], part[r]);
}

// NR x W scores: the dot products of NR rows with the keys k + i stride, i < n; a key too many reads the last one again. A vector
// holds four elements of each of W / 4 keys: keys are transposed by fours of their elements, not by the element. Not more than W /
// 4 keys at once: they may lie a large power of two apart, in the same sets of the first cache.
template <class S, int NR>
static void dots(float* out, const float* q, int64_t width, const typename S::T* k, int64_t stride, int64_t D, int64_t n) {
    for (int64_t begin = 0; begin < D; begin += kDotBlock) {
        const int64_t end = least(D, begin + kDotBlock);
        vf parts[NR][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {  // keys i, i + 4, ...
            Row<S> at[W / 4];
#pragma GCC unroll 4
            for (int j = 0; j < W / 4; ++j) at[j] = Row<S>(k + least(4 * j + i, n - 1) * stride, D);
            vf part[NR];
#pragma GCC unroll 4
            for (int r = 0; r < NR; ++r) part[r] = zero();
            int64_t c = begin;
            for (; c + W <= end; c += W) dot_step<S, NR, true>(part, at, q, width, c, D);
            if (c < end) dot_step<S, NR, false>(part, at, q, width, c, D);
#pragma GCC unroll 4
            for (int r = 0; r < NR; ++r) parts[r][i] = part[r];
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

// The scores of keys [begin, end), begin a multiple of W. packed: packed_floats.
template <class S>
static void rows_scores(const Rows& rows, const AttentionInputs& p, int64_t begin, int64_t end, float* packed, Ahead& ahead) {
    const int64_t n = rows.n, w = rows.width, block = n <= kFew ? W : kBlockVectors * W;
    for (int64_t j = begin; j < end; j += block) {
        const typename S::T* k = key<S>(p, rows.b, j, rows.g);
        const int64_t m = least(block, end - j), vectors = (m + W - 1) / W;
        float* out = rows.scores + j % kChunk;
        ahead.step(m * (p.D + S::kExtra) * int64_t(sizeof(typename S::T)));
        switch (n) {
            case 1: dots<S, 1>(out, rows.q, w, k, p.k_time, p.D, m); break;
            case 2: dots<S, 2>(out, rows.q, w, k, p.k_time, p.D, m); break;
            case 3: dots<S, 3>(out, rows.q, w, k, p.k_time, p.D, m); break;
            case 4: dots<S, 4>(out, rows.q, w, k, p.k_time, p.D, m); break;
            default:
                pack_keys<S>(packed, k, p.k_time, p.D, m, vectors);
                dot(out, kChunk, rows.q, w, packed, block, n, vectors, p.D);
        }
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
                                                                            int64_t E, int64_t e) {
    vf acc[NR][NV];
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) acc[r][i] = zero();
    for (int64_t j = 0; j < n; ++j) {
        const Row<S> row(v + j * stride, E);
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
static void mix(float* o, int64_t ldo, const float* p, const typename S::T* v, int64_t stride, int64_t n, int64_t E) {
    constexpr int NV = kBlockVectors;
    int64_t e = 0;
    for (; e + NV * W <= E; e += NV * W) mix_block<S, NR, NV, true>(o, ldo, p, v, stride, n, E, e);
    for (; e + W <= E; e += W) mix_block<S, NR, 1, true>(o, ldo, p, v, stride, n, E, e);
    if (e < E) mix_block<S, NR, 1, false>(o, ldo, p, v, stride, n, E, e);
}

// out's rows += the sum of weights times values over the keys [first, end) of one tile, chain by chain; `opens`: the first ones.
template <class S> static void rows_values(float* out, int64_t ldo, const Rows& rows, const AttentionInputs& p, int64_t first,
                                           int64_t end, bool opens, float* packed, Ahead& ahead) {
    const int64_t n = rows.n, E = p.E, width = round_up(E), tile = first % kChunk / kKeys;
    for (int64_t r = 0; r < n; ++r) {
        const float shrink = opens ? 0.0f : rows.shrink[r][tile];
        if (shrink == 1.0f) continue;
        for (int64_t e = 0; e < E; e += W) {
            float* at = out + r * ldo + e;
            store(at, opens ? zero() : load(at) * set(shrink));
        }
    }
    for (int64_t j = first; j < end;) {
        const int64_t keys = least(end, j / kChain * kChain + kChain) - j;
        const float* weights = rows.scores + j % kChunk;
        const typename S::T* v = value<S>(p, rows.b, j, rows.g);
        ahead.step(keys * (E + S::kExtra) * int64_t(sizeof(typename S::T)));
        switch (n) {
            case 1: mix<S, 1>(out, ldo, weights, v, p.v_time, keys, E); break;
            case 2: mix<S, 2>(out, ldo, weights, v, p.v_time, keys, E); break;
            case 3: mix<S, 3>(out, ldo, weights, v, p.v_time, keys, E); break;
            case 4: mix<S, 4>(out, ldo, weights, v, p.v_time, keys, E); break;
            default: {
                const Range all[] = {{0, keys}, {0, keys}, {0, keys}, {0, keys}};
                mix<false, kChain>(out, ldo, weights, kChunk, pack_rows<S>(packed, v, p.v_time, keys, E, width), width, n,
                                   width / W, all, false, nullptr);
            }
        }
        j += keys;
    }
}

// f(from, to) for the pieces of [first, end), at most a chunk, that lie in one tile each.
template <class F> FASTLM_INLINE void each_tile(int64_t first, int64_t end, const F& f) {
    for (int64_t tile = first / kKeys * kKeys; tile < end; tile += kKeys) f(most(first, tile), least(end, tile + kKeys));
}

// Keys [first, end) of one chunk for several groups' rows, tile by tile. out: (groups, n, row_width); further groups `step` on.
static void rows_chunk(float* out, int64_t step, Rows* rows, int64_t groups, const AttentionInputs& p, int64_t first, int64_t end,
                       float* packed, Ahead& ahead) {
    // Whole vectors from the chunk's beginning, so that a key's lane, and with it the bits, do not depend on the other rows.
    const int64_t begin = first / W * W, ldo = row_width(p);
    each_store(p, [&](auto kind) {
        using S = decltype(kind);
        each_tile(begin, end, [&](int64_t from, int64_t to) {
            for (int64_t i = 0; i < groups; ++i) rows_scores<S>(rows[i], p, from, to, packed, ahead);
        });
        for (int64_t i = 0; i < groups; ++i)
            for (int64_t r = 0; r < rows[i].n; ++r) rows_softmax(out + i * step + r * ldo + row_end(p), rows[i], p, begin, end, r);
        each_tile(first, end, [&](int64_t from, int64_t to) {
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
