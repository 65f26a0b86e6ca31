// The kernel behind int8_attention.h, compiled for every instruction set and, where a CPU has it, with VNNI.
#pragma once

#include "int8_attention.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/dot.h"
#include "csrc/simd/simd.h"
#include "csrc/simd/transpose.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// A tile: kTall rows of queries times kWide vectors, of keys or of a value's elements; rows are taken by kBlock.
#if defined(FASTLM_ISA_AVX512)
constexpr int kTall = 4;
#else
constexpr int kTall = 2;
#endif
constexpr int kWide = 4, kBlock = 4;
constexpr int64_t kGroup = 4 * W;    // keys whose weights share words of four: W words, of the keys l, W + l, 2 W + l, 3 W + l
constexpr int64_t kSumLanes = 16;    // of the sum of weights, on every instruction set
constexpr int64_t kPieceRows = 256;  // of queries that a piece has at most, which rounds its keys and values itself
constexpr int64_t kAlone = 1 << 17;  // multiplications below which waking a thread costs more than it gives

FASTLM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTLM_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
FASTLM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

FASTLM_INLINE vi load_bytes(const uint8_t* p) { return as_int(load(reinterpret_cast<const float*>(p))); }
FASTLM_INLINE void store_bytes(uint8_t* p, vi x) { store(reinterpret_cast<float*>(p), as_float(x)); }

// The largest magnitude of a row of n; not-a-number where one is not finite. As integers, which order not-a-number above infinity.
FASTLM_INLINE float largest_of(const float* x, int64_t n) {
    vi most = seti(0);
    each_vector(n, [&](int64_t c, auto lanes) FASTLM_LAMBDA { most = maxi(most, as_int(abs(lanes.load(x + c)))); });
    constexpr uint32_t kLanes = (1u << W) - 1;
    if ((bits(lt(as_float(most), set(__builtin_inff()))) & kLanes) != kLanes) return __builtin_nanf("");
    return reduce_max(as_float(most));
}

constexpr float kLeast = 0x1p-100f;  // codes of smaller rows are zeros
// What a row is multiplied with to give codes, and what these are multiplied with to give it again.
struct Scale {
    float inverse = 0.0f, scale = 0.0f;
    FASTLM_MEMBER explicit Scale(float largest) {
        if (!(largest < __builtin_inff())) scale = __builtin_nanf("");
        else if (largest >= kLeast) inverse = 127.0f / largest, scale = largest * (1.0f / 127.0f);
    }
};
constexpr float kRaise = 0x1.8p23f;  // after which a lane's low byte is the code, rounded to even

// Codes of a row of n, plus `raise`; up to `width` bytes those of zeros.
FASTLM_INLINE void round_row(uint8_t* out, const float* x, int64_t n, int64_t width, float inverse, float raise) {
    int64_t c = 0;
    for (; c + W <= n; c += W) store_i8(out + c, as_int(load(x + c) * set(inverse) + set(kRaise + raise)));
    if (c < n) store_i8(out + c, as_int(load_n(x + c, n - c) * set(inverse) + set(kRaise + raise))), c += W;
    if (c < width) std::memset(out + c, int(raise), size_t(width - c));
}

// log2 x of a normal number, half an ulp of its whole part off; nan stays. Nothing is fused, unlike in `log`.
FASTLM_INLINE vf log2_of(vf x) {
    const vi ix = subi(as_int(x), seti(0x3F3504F3));  // so that m lies in [sqrt(1/2), sqrt(2))
    const vi e = subi(shr<23>(addi(ix, seti(0x40000000))), seti(128));
    const vf f = as_float(subi(as_int(x), shl<23>(e))) - set(1.0f);
    const vf s = f / (f + set(2.0f)), z = s * s;  // 2 / ln 2 (s + s^3 / 3 + ..)
    vf p = set(0.32059889f);
    p = p * z + set(0.41219858f);
    p = p * z + set(0.57707802f);
    p = p * z + set(0.96179669f);
    p = p * z + set(2.8853901f);
    return select(is_nan(x), x, p * s + to_float(e));
}

// 255 * 2^x for x <= 0; nan stays. Nothing is fused. 2^r on [-1/2, 1/2] to 3e-6.
FASTLM_INLINE vf weight_of(vf x) {
    const vf clamped = max(set(-127.0f), x);  // this order of operands keeps nan
    const vf magic = set(12583039.0f);        // 1.5 * 2^23 + 127: the low bits then hold round(x) + 127
    const vf shifted = clamped + magic;
    const vf r = clamped - (shifted - magic);
    vf p = set(255 * 9.58285e-3f);
    p = p * r + set(255 * 5.590643e-2f);
    p = p * r + set(255 * 2.4024099e-1f);
    p = p * r + set(255 * 6.9312419e-1f);
    p = p * r + set(255.0f);
    return p * as_float(shl<23>(as_int(shifted)));
}

// Keys and values of one head of one sequence in codes, and what belongs to a key.
struct Head {
    int64_t n, padded, words, width;  // keys, these in whole groups; words of four of D; W-vectors of E
    float *key_scale, *log_value, *inverse_value;
    int32_t* start;    // -128 times the sum of a key's codes: those of queries are raised by 128
    uint8_t *k, *v;    // k: for each W keys its words. v: for each kWide vectors of E a word of each four keys
    float* scores;     // (kBlock, padded)
    uint8_t* weights;  // the same, bytes
    uint8_t* q;        // (kBlock, a word's bytes times words, in vectors)
};

FASTLM_INLINE int64_t query_bytes(int64_t D) { return round_up(D, 4 * W) + W; }

size_t head_bytes(int64_t n, int64_t D, int64_t E) {
    const int64_t padded = round_up(n, kGroup), words = ceil_div(D, 4);
    return size_t(padded * (4 * 4 + words * 4 + round_up(E, W) + kBlock * 5) + (kBlock + W) * query_bytes(D) + 16 * 64);
}

void carve(Head& h, uint8_t* memory, int64_t n, int64_t D, int64_t E) {
    h.n = n, h.padded = round_up(n, kGroup), h.words = ceil_div(D, 4), h.width = ceil_div(E, W);
    const auto take = [&](int64_t bytes) FASTLM_LAMBDA {
        uint8_t* at = memory;
        memory += round_up(bytes, 64);
        return at;
    };
    h.key_scale = reinterpret_cast<float*>(take(h.padded * 4));
    h.log_value = reinterpret_cast<float*>(take(h.padded * 4));
    h.inverse_value = reinterpret_cast<float*>(take(h.padded * 4));
    h.start = reinterpret_cast<int32_t*>(take(h.padded * 4));
    h.k = take(h.padded * h.words * 4), h.v = take(h.padded * h.width * W);
    h.scores = reinterpret_cast<float*>(take(kBlock * h.padded * 4)), h.weights = take(kBlock * h.padded);
    h.q = take((kBlock + W) * query_bytes(D));
}

// Keys: W rows in codes, then transposed by words of four.
void round_keys(const Head& h, const float* k, int64_t stride, int64_t D) {
    const int64_t bytes = query_bytes(D);
    uint8_t* rows = h.q;  // not yet in use
    for (int64_t j = 0; j < h.padded; j += W) {
        for (int64_t i = 0; i < W; ++i) {
            if (j + i >= h.n) {
                h.key_scale[j + i] = 0.0f;
                std::memset(rows + i * bytes, 0, size_t(bytes));
                continue;
            }
            const float* x = k + (j + i) * stride;
            const Scale s(largest_of(x, D));
            h.key_scale[j + i] = s.scale;
            round_row(rows + i * bytes, x, D, round_up(D, 4 * W), s.inverse, 0.0f);
        }
        uint8_t* out = h.k + j * h.words * 4;
        vi sum = seti(0);
        for (int64_t w = 0; w < h.words; w += W) {
            vf a[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) a[i] = load(reinterpret_cast<const float*>(rows + i * bytes + w * 4));
            transpose(a);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) {
                if (w + i >= h.words) break;
                store_bytes(out + (w + i) * 4 * W, as_int(a[i]));
                sum = dot8(sum, seti(0x01010101), as_int(a[i]));
            }
        }
        store_bytes(reinterpret_cast<uint8_t*>(h.start + j), shl<7>(subi(seti(0), sum)));
    }
}

// Values: four rows to a word.
void round_values(const Head& h, const float* v, int64_t stride, int64_t E) {
    float all = 0.0f;
    for (int64_t j = 0; j < h.n; ++j) {
        const float largest = largest_of(v + j * stride, E);
        h.inverse_value[j] = largest;
        all = all < largest ? largest : all;  // one that is no number is not of it
    }
    const float floor = all * 0x1p-24f < kLeast ? kLeast : all * 0x1p-24f;
    for (int64_t j = 0; j < h.n; ++j) {
        const float largest = h.inverse_value[j];
        h.inverse_value[j] = largest < floor ? floor : largest;
    }
    for (int64_t j = h.n; j < h.padded; ++j) h.inverse_value[j] = 1.0f;
    for (int64_t j = 0; j < h.padded; j += W) {
        const vf largest = load(h.inverse_value + j), scale = largest * set(1.0f / 127.0f);
        store(h.log_value + j, log2_of(scale));
        store(h.scores + j, set(127.0f) / largest);
        store(h.inverse_value + j, set(1.0f) / scale);
    }
    for (int64_t j = h.n; j < h.padded; ++j) h.log_value[j] = -__builtin_inff(), h.inverse_value[j] = 0.0f;
    for (int64_t g = 0; g < h.padded; g += kGroup)
        for (int64_t l = 0; l < W; ++l) {
            const float* rows[4];
            vf inverse[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const int64_t j = g + i * W + l;
                const bool there = j < h.n && h.scores[j] > 0.0f;
                rows[i] = v + (there ? j : 0) * stride;
                inverse[i] = set(there ? h.scores[j] : 0.0f);
            }
            for (int64_t e = 0; e < h.width; ++e) {
                vi word = seti(0);
                const int64_t left = E - e * W;
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const vf x = left >= W ? load(rows[i] + e * W) : load_n(rows[i] + e * W, left);
                    const vi code = andi(as_int(x * inverse[i] + set(kRaise)), seti(255));
                    word = i == 0   ? code
                           : i == 1 ? ori(word, shl<8>(code))
                           : i == 2 ? ori(word, shl<16>(code))
                                    : ori(word, shl<24>(code));
                }
                const int64_t tile = e / kWide, vectors = least(kWide, h.width - tile * kWide);
                store_bytes(h.v + (tile * kWide * h.padded + (g / 4 + l) * 4 * vectors) * W + e % kWide * 4 * W, word);
            }
        }
}

// What is wanted next, touched line by line while this head is multiplied: its rows lie a token apart, which no hardware guesses.
struct Next {
    const float *q = nullptr, *k = nullptr, *v = nullptr;  // null: nothing
    int64_t q_time, k_time, v_time, rows, keys, D, E;

    static FASTLM_MEMBER void lines(const float* x, int64_t n) {
        for (int64_t c = 0; c < n; c += 16) __builtin_prefetch(x + c, 0, 2);
    }
    // The part `i` of `n`.
    FASTLM_MEMBER void fetch(int64_t i, int64_t n) const {
        if (!k) return;
        for (int64_t j = i * keys / n; j < (i + 1) * keys / n; ++j) lines(k + j * k_time, D), lines(v + j * v_time, E);
        for (int64_t t = i * rows / n; t < (i + 1) * rows / n; ++t) lines(q + t * q_time, D);
    }
};

// Scores of R rows with the keys of N vectors from vector j on, in powers of two; the largest of each lane.
template <int R, int N>
FASTLM_INLINE void score(const Head& h, const uint8_t* q, int64_t bytes, int64_t j, const float* unit, float* scores, vf* largest) {
    vi dots[R][N];
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) {
        const vi start = load_bytes(reinterpret_cast<const uint8_t*>(h.start + (j + s) * W));
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) dots[i][s] = start;
    }
    const uint8_t* keys[N];
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) keys[s] = h.k + (j + s) * W * h.words * 4;
    for (int64_t w = 0; w < h.words; ++w) {
        vi k[N];
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) k[s] = load_bytes(keys[s] + w * 4 * W);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
            const vi codes = set_bytes(q + i * bytes + w * 4);
#pragma GCC unroll 4
            for (int s = 0; s < N; ++s) dots[i][s] = in_register(dot8(dots[i][s], codes, k[s]));
        }
    }
#pragma GCC unroll 4
    for (int s = 0; s < N; ++s) {
        const vf scale = load(h.key_scale + (j + s) * W), value = load(h.log_value + (j + s) * W);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
            const vf t = (to_float(dots[i][s]) * scale) * set(unit[i]) + value;
            store(scores + i * h.padded + (j + s) * W, t);
            largest[i] = max(largest[i], t);
        }
    }
}

template <int R>
FASTLM_INLINE void scores_of(const Head& h, const uint8_t* q, int64_t bytes, const float* unit, float* scores, vf* largest) {
    const int64_t vectors = ceil_div(h.n, W);
    int64_t j = 0;
    for (; j + kWide <= vectors; j += kWide) score<R, kWide>(h, q, bytes, j, unit, scores, largest);
    for (; j < vectors; ++j) score<R, 1>(h, q, bytes, j, unit, scores, largest);
}

// Weights in bytes from a row's scores, and 1 / their sum.
FASTLM_INLINE float weigh(const Head& h, float* scores, uint8_t* weights, vf largest) {
    constexpr int kParts = kSumLanes / W;
    const vf base = set(reduce_max(largest));
    vf part[kParts];
#pragma GCC unroll 4
    for (int l = 0; l < kParts; ++l) part[l] = zero();
    for (int64_t g = 0; g < h.padded; g += kGroup) {
        vi word = seti(0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const int64_t j = g + i * W;
            if (j >= h.n) break;
            const vf e = weight_of(load(scores + j) - base);
            part[i % kParts] = part[i % kParts] + e * load(h.inverse_value + j);
            const vi code = andi(as_int(e + set(0x1p23f)), seti(255));
            word = i == 0 ? code : i == 1 ? ori(word, shl<8>(code)) : i == 2 ? ori(word, shl<16>(code)) : ori(word, shl<24>(code));
        }
        store_bytes(weights + g, word);
    }
#pragma GCC unroll 4
    for (int half = kParts / 2; half > 0; half /= 2)
#pragma GCC unroll 4
        for (int l = 0; l < half; ++l) part[l] = part[l] + part[l + half];
    return 1.0f / reduce_add(part[0]);
}

// y of R rows: N vectors of values from `tile` on.
template <int R, int N> FASTLM_INLINE void mix(const Head& h, const uint8_t* tile, const uint8_t* weights, const float* inverse,
                                               float* const* y, int64_t left) {
    vi sums[R][N];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) sums[i][s] = seti(0);
    const int64_t words = h.padded / 4;
    for (int64_t w = 0; w < words; ++w) {
        vi v[N];
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) v[s] = load_bytes(tile + (w * N + s) * 4 * W);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
            const vi codes = set_bytes(weights + i * h.padded + w * 4);
#pragma GCC unroll 4
            for (int s = 0; s < N; ++s) sums[i][s] = in_register(dot8(sums[i][s], codes, v[s]));
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int s = 0; s < N; ++s) {
            const vf x = to_float(sums[i][s]) * set(inverse[i]);
            if (left >= (s + 1) * W) store(y[i] + s * W, x);
            else if (left > s * W) store_n(y[i] + s * W, x, left - s * W);
        }
}

template <int R> FASTLM_INLINE void mixed(const Head& h, const uint8_t* weights, const float* inverse, float* const* y, int64_t E) {
    for (int64_t e = 0; e < h.width; e += kWide) {
        const uint8_t* tile = h.v + e * h.padded * W;
        float* to[R];
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) to[i] = y[i] + e * W;
        const int64_t left = E - e * W;
        switch (least(kWide, h.width - e)) {
            case 1: mix<R, 1>(h, tile, weights, inverse, to, left); break;
            case 2: mix<R, 2>(h, tile, weights, inverse, to, left); break;
            case 3: mix<R, 3>(h, tile, weights, inverse, to, left); break;
            default: mix<R, 4>(h, tile, weights, inverse, to, left); break;
        }
    }
}

struct Sequence {
    int64_t first_query, first_key, queries, keys;
};
Sequence sequence(const Int8Attention& p, int64_t b) {
    if (p.offsets) {
        const int64_t first = p.offsets[b], n = p.offsets[b + 1] - first;
        return {first, first, n, n};
    }
    return {0, 0, p.T, p.lengths ? most(0, least(p.lengths[b], p.S)) : p.S};
}

// Rows [first, first + rows) of group g of sequence b; row r is query r / share, head r % share of the group.
void piece(const Int8Attention& p, int64_t b, int64_t g, int64_t first, int64_t rows, const Next& next) {
    const int64_t share = p.H / p.G;
    const Sequence s = sequence(p, b);
    const auto y_of = [&](int64_t r) FASTLM_LAMBDA {
        const int64_t token = (p.offsets ? s.first_query : b * p.T) + r / share;
        return p.y + (token * p.H + g * share + r % share) * p.E;
    };
    const auto q_of = [&](int64_t r) FASTLM_LAMBDA {
        return p.q + b * p.q_batch + (s.first_query + r / share) * p.q_time + (g * share + r % share) * p.D;
    };
    if (s.keys == 0) {
        for (int64_t r = first; r < first + rows; ++r) std::memset(y_of(r), 0, size_t(p.E) * sizeof(float));
        return;
    }
    Head h;
    carve(h, static_cast<uint8_t*>(scratch(head_bytes(s.keys, p.D, p.E))), s.keys, p.D, p.E);
    round_keys(h, p.k + b * p.k_batch + s.first_key * p.k_time + g * p.D, p.k_time, p.D);
    round_values(h, p.v + b * p.v_batch + s.first_key * p.v_time + g * p.E, p.v_time, p.E);
    const double scale = p.scale * 1.4426950408889634;
    const float unit_scale = float(scale < 0 ? -scale : scale);
    const int64_t bytes = query_bytes(p.D);
    for (int64_t r = first; r < first + rows; r += kBlock) {
        // What is wanted next is fetched between the steps, a part at a time: more at once would hold up the loads.
        const int64_t parts = 3 * ceil_div(rows, kBlock), part = 3 * ((r - first) / kBlock);
        float unit[kBlock], inverse[kBlock];
        float* y[kBlock];
        vf largest[kBlock];
        const int64_t last = first + rows - 1;
        for (int64_t i = 0; i < kBlock; ++i) {  // what is beyond the last row repeats it
            const int64_t row = least(r + i, last);
            const float* x = q_of(row);
            const Scale q(largest_of(x, p.D));
            unit[i] = q.scale * unit_scale;
            round_row(h.q + i * bytes, x, p.D, round_up(p.D, 4 * W), scale < 0 ? -q.inverse : q.inverse, 128.0f);
            y[i] = y_of(row);
            for (int64_t e = 0; e < p.E; e += 16) __builtin_prefetch(y[i] + e, 1, 3);
            largest[i] = set(-__builtin_inff());
        }
        next.fetch(part, parts);
        for (int64_t i = 0; i < kBlock; i += kTall)
            scores_of<kTall>(h, h.q + i * bytes, bytes, unit + i, h.scores + i * h.padded, largest + i);
        next.fetch(part + 1, parts);
        for (int64_t i = 0; i < kBlock; ++i) inverse[i] = weigh(h, h.scores + i * h.padded, h.weights + i * h.padded, largest[i]);
        next.fetch(part + 2, parts);
        for (int64_t i = 0; i < kBlock; i += kTall) mixed<kTall>(h, h.weights + i * h.padded, inverse + i, y + i, p.E);
    }
}

void forward(const Int8Attention& p) {
    const int64_t share = p.H / p.G, chunks = ceil_div(p.T * share, kPieceRows), pieces = p.B * p.G * chunks;
    if (p.T == 0 || pieces == 0) return;
    const int64_t work = p.B * p.H * p.T * p.S * (p.D + p.E), few = most(1, kAlone / most(1, work / pieces));
    parallel_for(pieces, few, [&](int64_t begin, int64_t end) {
        const auto range = [&](int64_t i, int64_t& b, int64_t& g, int64_t& first) FASTLM_LAMBDA {
            b = i / (p.G * chunks), g = i / chunks % p.G, first = i % chunks * kPieceRows;
            return most(0, least(kPieceRows, sequence(p, b).queries * share - first));
        };
        for (int64_t i = begin; i < end; ++i) {
            int64_t b, g, first, b2, g2, first2;
            const int64_t rows = range(i, b, g, first);
            if (rows == 0) continue;
            Next next;
            if (i + 1 < pieces) {  // most likely this thread's
                const int64_t n = range(i + 1, b2, g2, first2);
                const Sequence s = sequence(p, b2);
                next = {p.q + b2 * p.q_batch + (s.first_query + first2 / share) * p.q_time + g2 * share * p.D,
                        p.k + b2 * p.k_batch + s.first_key * p.k_time + g2 * p.D,
                        p.v + b2 * p.v_batch + s.first_key * p.v_time + g2 * p.E,
                        p.q_time,
                        p.k_time,
                        p.v_time,
                        n / share,
                        s.keys,
                        share * p.D,
                        p.E};
            }
            piece(p, b, g, first, rows, next);
        }
    });
}

}  // namespace

extern const Int8AttentionKernels int8_attention_kernels = {forward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
