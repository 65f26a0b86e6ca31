// What the forward and the backward pass share: a tile of query rows, which keys its rows see, and one matrix product.
//
// The query heads of a group read the same keys, so the rows of a tile are (t, head of the group) pairs in order of t. Rows lie in
// the lanes of vectors: scores are kept transposed, (keys, rows), which makes the softmax and its statistics vertical, lets K and V
// be read element by element where they lie (a broadcast costs no more than a load), and gives every row its own chain of
// operations, whatever stands beside it.
#pragma once

#include <cstring>

#include "attention.h"
#include "csrc/runtime/parallel.h"
#include "csrc/simd/l1.h"
#include "csrc/simd/simd.h"
#include "csrc/simd/transpose.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kRows = 64;  // row stride of every transposed tile
constexpr int64_t kKeys = kAttentionKeys;
constexpr int64_t kChunk = kAttentionChunk;

// softmax(scale dot + bias) as weights 2^((score - largest) unit). Without a bias a score is the bare dot product, so that scaling
// costs one rounding of a difference that is small where it matters; with one it is the scaled dot product plus the bias.
struct Units {
    float sign;   // goes into q, exactly
    float scale;  // > 0: what multiplies a dot product where there is a bias
    float unit;   // > 0
    float low;    // -127 / unit: weights of lower scores are zero
};

FASTLM_INLINE Units units(const AttentionInputs& p) {
    constexpr double kLog2E = 1.4426950408889634;
    const double size = p.scale == 0 ? 1 : std::abs(p.scale) < 1e-30 ? 1e-30 : std::abs(p.scale);
    const double unit = p.bias ? kLog2E : size * kLog2E;
    return {p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f, float(size), float(unit), float(-127.0 / unit)};
}

// Vectors of columns in a block of a sum over keys or rows, which has 4 rows at most: its chains stay in registers.
#if defined(FASTLM_ISA_AVX512) || defined(FASTLM_ISA_NEON)
constexpr int kBlockVectors = 4;  // 32 registers: 4 x 4 chains
#else
constexpr int kBlockVectors = 2;  // 16 registers: 4 x 2
#endif

FASTLM_INLINE int64_t round_up(int64_t n) { return (n + W - 1) / W * W; }
FASTLM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
// Sequence b: its queries, its keys, and where they lie.
FASTLM_INLINE int64_t queries(const AttentionInputs& p, int64_t b) { return p.offsets ? p.offsets[b + 1] - p.offsets[b] : p.T; }
FASTLM_INLINE int64_t length(const AttentionInputs& p, int64_t b) {
    return p.offsets ? p.offsets[b + 1] - p.offsets[b] : p.lengths ? most(0, least(p.lengths[b], p.S)) : p.S;
}
FASTLM_INLINE const float* query(const AttentionInputs& p, int64_t b, int64_t t, int64_t h) {
    return p.q + b * p.q_batch + ((p.offsets ? p.offsets[b] : 0) + t) * p.q_time + h * p.D;
}
// Where key j of sequence b lies in k or v. The keys of a tile follow each other: a page holds whole tiles.
FASTLM_INLINE int64_t place(const AttentionInputs& p, int64_t b, int64_t j, int64_t batch, int64_t time) {
    if (!p.table) return b * batch + ((p.offsets ? p.offsets[b] : 0) + j) * time;
    const int64_t page = most(0, least(p.pages - 1, p.table[b * p.table_row + j / p.page]));
    return page * batch + j % p.page * time;
}
template <class S> FASTLM_INLINE const typename S::T* key(const AttentionInputs& p, int64_t b, int64_t j, int64_t g) {
    return static_cast<const typename S::T*>(p.k) + place(p, b, j, p.k_batch, p.k_time) + g * (p.D + S::kExtra);
}
template <class S> FASTLM_INLINE const typename S::T* value(const AttentionInputs& p, int64_t b, int64_t j, int64_t g) {
    return static_cast<const typename S::T*>(p.v) + place(p, b, j, p.v_batch, p.v_time) + g * (p.E + S::kExtra);
}
// The token of query t in an output (B, T, H, .), or packed (R, H, .), and its row.
FASTLM_INLINE int64_t query_token(const AttentionInputs& p, int64_t b, int64_t t) {
    return (p.offsets ? p.offsets[b] : b * p.T) + t;
}
FASTLM_INLINE int64_t output(const AttentionInputs& p, int64_t b, int64_t t, int64_t h) { return query_token(p, b, t) * p.H + h; }

// How keys and values are stored (kernels/cache_append), and one head's vector of D numbers. What is read is the number that the
// storage stands for, whichever it is: the bits are those of a float32 cache that holds these numbers.
struct Float32 {
    using T = float;
    static constexpr bool kFloat = true;
    static constexpr int64_t kExtra = 0;
};
struct BFloat16 {
    using T = uint16_t;
    static constexpr bool kFloat = false;
    static constexpr int64_t kExtra = 0;
};
struct Int8 {
    using T = int8_t;
    static constexpr bool kFloat = false;
    static constexpr int64_t kExtra = 4;  // the scale, a float32 behind the numbers
};

template <class S> struct Row;
template <> struct Row<Float32> {
    const float* x;
    Row() = default;
    FASTLM_MEMBER Row(const float* at, int64_t) : x(at) {}
    FASTLM_MEMBER vf whole(int64_t c) const { return load(x + c); }
    FASTLM_MEMBER vf part(int64_t c, int64_t n) const { return load_n(x + c, n); }
};
template <> struct Row<BFloat16> {
    const uint16_t* x;
    Row() = default;
    FASTLM_MEMBER Row(const uint16_t* at, int64_t) : x(at) {}
    FASTLM_MEMBER vf whole(int64_t c) const { return load_bf16(x + c); }
    FASTLM_MEMBER vf part(int64_t c, int64_t n) const {
        uint16_t rest[W] = {};
        std::memcpy(rest, x + c, size_t(n) * sizeof(uint16_t));
        return load_bf16(rest);
    }
};
template <> struct Row<Int8> {
    const int8_t* x;
    float scale;
    Row() = default;
    FASTLM_MEMBER Row(const int8_t* at, int64_t D) : x(at) { std::memcpy(&scale, at + D, sizeof scale); }
    FASTLM_MEMBER vf whole(int64_t c) const { return load_i8(x + c) * set(scale); }
    FASTLM_MEMBER vf part(int64_t c, int64_t n) const {
        int8_t rest[W] = {};
        std::memcpy(rest, x + c, size_t(n));
        return load_i8(rest) * set(scale);
    }
};

// f(storage) for what the call's keys and values are stored as.
template <class F> FASTLM_INLINE void each_store(const AttentionInputs& p, const F& f) {
    if (p.kind == CacheKind::float32) f(Float32{});
    else if (p.kind == CacheKind::bfloat16) f(BFloat16{});
    else f(Int8{});
}

// The keys that query t of sequence b sees.
FASTLM_INLINE void visible(const AttentionInputs& p, int64_t b, int64_t t, int64_t& low, int64_t& high) {
    const int64_t n = length(p, b);
    high = p.causal ? most(0, n - queries(p, b) + t + 1) : n;
    low = p.window ? most(0, high - p.window) : 0;
}

// Dot products are summed in chains of fma added in order, for every kDotBlock of their elements the kQuad chains of every
// kQuad-th element: long chains would round worse than NumPy's sum over lanes, and in the rows path a group of four lanes holds the
// four chains of a key.
constexpr int64_t kQuad = 4;
constexpr int64_t kDotBlock = 64;

// Fetches memory ahead of its use into the second-level cache, in the order in which it lies: `step` as much as is being used up.
// A head's vectors are too far apart for the hardware to guess, and memory gives more where neighbours are read together. Many
// steps of a few lines: what comes as a burst is in the way of the loads.
struct Ahead {
    struct Run {  // in bytes
        const char* at;
        int64_t rows, width, stride;
    };
    static constexpr int64_t kMost = 4, kBetween = 768;  // runs; bytes between two blocks of a product
    Run runs[kMost];
    int64_t count = 0, run = 0, row = 0, column = 0;

    void add(Run r) {
        if (r.stride == r.width) r.width *= r.rows, r.rows = 1;
        if (r.rows > 0 && r.width > 0 && count < kMost) runs[count++] = r;
    }
    void step(int64_t bytes) {
        if (run == count) return;
        Run r = runs[run];
        int64_t y = row, x = column;
        for (;;) {
            const char* at = r.at + y * r.stride + x;
            const int64_t n = least(bytes, r.width - x);
            for (int64_t c = 0; c < n; c += 64) __builtin_prefetch(at + c, 0, 2);
            bytes -= n, x += n;
            if (x == r.width) {
                x = 0;
                if (++y == r.rows) {
                    y = 0;
                    if (++run == count) return;
                    r = runs[run];
                }
            }
            if (bytes <= 0) break;
        }
        row = y, column = x;
    }
};

// acc += a's column k times b's row k. Transposed: a[k][i].
template <int NI, int NV, bool Transposed>
FASTLM_INLINE void add_outer(vf (&acc)[NI][NV], const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k) {
    vf x[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) x[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 6
    for (int i = 0; i < NI; ++i) {
        const vf y = set(Transposed ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = fma(y, x[v], acc[i][v]);
    }
}

// f(acc[i][v], i, v) for all of them.
template <int NI, int NV, class F> FASTLM_INLINE void each_sum(vf (&acc)[NI][NV], const F& f) {
#pragma GCC unroll 6
    for (int i = 0; i < NI; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) f(acc[i][v], i, v);
}

// c[i][x] = the dot product of a[i] with b[.][x], NI rows by NV vectors. The sums of the chains stay in registers beside the chain
// that runs: through memory a sixth of the time was theirs.
template <int NI, int NV> static __attribute__((noinline)) void dot_block(float* c, int64_t ldc, const float* a, int64_t lda,
                                                                          const float* b, int64_t ldb, int64_t K) {
    vf total[NI][NV];
    each_sum(total, [](vf& x, int, int) FASTLM_LAMBDA { x = zero(); });
    for (int64_t k = 0; k < least(K, kDotBlock); k += kQuad) add_outer<NI, NV, false>(total, a, lda, b, ldb, k);
    for (int64_t chain = 1;; ++chain) {
        const int64_t block = chain / kQuad * kDotBlock, begin = block + chain % kQuad, end = least(K, block + kDotBlock);
        if (begin >= K) break;
        vf acc[NI][NV];
        each_sum(acc, [](vf& x, int, int) FASTLM_LAMBDA { x = zero(); });
        for (int64_t k = begin; k < end; k += kQuad) add_outer<NI, NV, false>(acc, a, lda, b, ldb, k);
        each_sum(acc, [&](vf& x, int i, int v) FASTLM_LAMBDA { total[i][v] = total[i][v] + x; });
    }
    each_sum(total, [&](vf& x, int i, int v) FASTLM_LAMBDA { store(c + i * ldc + v * W, x); });
}

template <int NV> static void dot_columns(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb,
                                          int64_t M, int64_t K, Ahead* ahead) {
    constexpr int NI = 6;
    int64_t i = 0;
    for (; i + NI <= M; i += NI) {
        if (ahead) ahead->step(Ahead::kBetween);
        dot_block<NI, NV>(c + i * ldc, ldc, a + i * lda, lda, b, ldb, K);
    }
    c += i * ldc, a += i * lda;
    switch (M - i) {
        case 5: return dot_block<5, NV>(c, ldc, a, lda, b, ldb, K);
        case 4: return dot_block<4, NV>(c, ldc, a, lda, b, ldb, K);
        case 3: return dot_block<3, NV>(c, ldc, a, lda, b, ldb, K);
        case 2: return dot_block<2, NV>(c, ldc, a, lda, b, ldb, K);
        case 1: return dot_block<1, NV>(c, ldc, a, lda, b, ldb, K);
        default: return;
    }
}

// Dot products of the M rows of a with `vectors` vectors of columns of b.
static void dot(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t M, int64_t vectors,
                int64_t K, Ahead* ahead = nullptr) {
    for (; vectors > 1; vectors -= 2, c += 2 * W, b += 2 * W) dot_columns<2>(c, ldc, a, lda, b, ldb, M, K, ahead);
    if (vectors) dot_columns<1>(c, ldc, a, lda, b, ldb, M, K, ahead);
}

// What a block of rows of a product sums over.
struct Range {
    int64_t begin, end;
};
// Rows of a block of a product's result, keys or rows of a tile; a mask's edge leaves out what none of them needs. It divides
// kChain.
constexpr int64_t kMixRows = 4;

// c (NI, NV vectors) += the sum over k of `range` of a[i][k] b[k][.], in chains of Step fma that begin at multiples of it, added in
// order. opens: =. keep: c's rows are multiplied with keep[i] before. Transposed: a[k][i].
template <int NI, int NV, bool Transposed, int Step>
static __attribute__((noinline)) void mix_block(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb,
                                                Range range, bool opens, const float* keep) {
    if constexpr (2 * NV <= kBlockVectors) {  // room for sums and chain in registers
        vf sum[NI][NV];
        each_sum(sum, [&](vf& x, int i, int v) FASTLM_LAMBDA {
            x = opens ? zero() : load(c + i * ldc + v * W);
            if (keep && !opens) x = x * set(keep[i]);
        });
        for (int64_t k = range.begin; k < range.end;) {
            const int64_t end = least(range.end, k / Step * Step + Step);
            vf acc[NI][NV];
            each_sum(acc, [](vf& x, int, int) FASTLM_LAMBDA { x = zero(); });
            for (; k < end; ++k) add_outer<NI, NV, Transposed>(acc, a, lda, b, ldb, k);
            each_sum(acc, [&](vf& x, int i, int v) FASTLM_LAMBDA { sum[i][v] = sum[i][v] + x; });
        }
        each_sum(sum, [&](vf& x, int i, int v) FASTLM_LAMBDA { store(c + i * ldc + v * W, x); });
        return;
    }
    for (int64_t k = range.begin; k < range.end; opens = false, keep = nullptr) {
        const int64_t end = least(range.end, k / Step * Step + Step);
        vf acc[NI][NV];
        each_sum(acc, [](vf& x, int, int) FASTLM_LAMBDA { x = zero(); });
        for (; k < end; ++k) add_outer<NI, NV, Transposed>(acc, a, lda, b, ldb, k);
        if (opens) each_sum(acc, [](vf& x, int, int) FASTLM_LAMBDA { x = zero() + x; });
        else if (keep) each_sum(acc, [&](vf& x, int i, int v) FASTLM_LAMBDA { x = load(c + i * ldc + v * W) * set(keep[i]) + x; });
        else each_sum(acc, [&](vf& x, int i, int v) FASTLM_LAMBDA { x = load(c + i * ldc + v * W) + x; });
        each_sum(acc, [&](vf& x, int i, int v) FASTLM_LAMBDA { store(c + i * ldc + v * W, x); });
        asm volatile("" ::: "memory");  // else the compiler keeps c's values on the stack as well, and stores everything twice
    }
}

template <int NV, bool Transposed, int Step> static void mix_columns(float* c, int64_t ldc, const float* a, int64_t lda,
                                                                     const float* b, int64_t ldb, int64_t M, const Range* ranges,
                                                                     bool opens, const float* keep, Ahead* ahead) {
    for (int64_t i = 0; i < M; i += kMixRows, a += kMixRows * (Transposed ? 1 : lda), c += kMixRows * ldc) {
        const Range r = ranges[i / kMixRows];
        const float* k = keep ? keep + i : nullptr;
        const int64_t rows = least(kMixRows, M - i);
        if (r.begin >= r.end) {
            for (int64_t n = 0; opens && n < rows * NV; ++n) store(c + n / NV * ldc + n % NV * W, zero());
            continue;
        }
        if (ahead) ahead->step(Ahead::kBetween);
        if (rows == 4) mix_block<4, NV, Transposed, Step>(c, ldc, a, lda, b, ldb, r, opens, k);
        if constexpr (!Transposed) {  // there rows are whole vectors
            if (rows == 3) mix_block<3, NV, false, Step>(c, ldc, a, lda, b, ldb, r, opens, k);
            if (rows == 2) mix_block<2, NV, false, Step>(c, ldc, a, lda, b, ldb, r, opens, k);
            if (rows == 1) mix_block<1, NV, false, Step>(c, ldc, a, lda, b, ldb, r, opens, k);
        }
    }
}

// mix_block over M rows, `vectors` vectors of columns; ranges: of each kMixRows rows.
template <bool Transposed, int Step> static void mix(float* c, int64_t ldc, const float* a, int64_t lda, const float* b,
                                                     int64_t ldb, int64_t M, int64_t vectors, const Range* ranges, bool opens,
                                                     const float* keep, Ahead* ahead = nullptr) {
    while (vectors > 0) {
        const int64_t n = least(vectors, kBlockVectors);
        if (n == 1) mix_columns<1, Transposed, Step>(c, ldc, a, lda, b, ldb, M, ranges, opens, keep, ahead);
        if (n == 2) mix_columns<2, Transposed, Step>(c, ldc, a, lda, b, ldb, M, ranges, opens, keep, ahead);
        if constexpr (kBlockVectors > 2) {
            if (n == 3) mix_columns<3, Transposed, Step>(c, ldc, a, lda, b, ldb, M, ranges, opens, keep, ahead);
            if (n == 4) mix_columns<4, Transposed, Step>(c, ldc, a, lda, b, ldb, M, ranges, opens, keep, ahead);
        }
        c += n * W, b += n * W, vectors -= n;
    }
}

// The chains over keys in the forward pass: the spans at a mask's edge are as long, so that a row's bits do not depend on where the
// edge lies. Every path through the forward pass keeps to them.
constexpr int64_t kChain = kKeys / 4;

// Rows [first, first + rows) of group g of sequence b; row r is query t = r / (H / G), head g H / G + r % (H / G).
struct Tile {
    int64_t b, g, rows, vectors;
    int64_t time[kRows], head[kRows];
    int64_t low_min, low_max, high_min, high_max;
    alignas(64) float low[kRows], high[kRows];  // visible keys as floats, exact below 2^24; rows beyond the last repeat it
};

static void open_tile(Tile& t, const AttentionInputs& p, int64_t b, int64_t g, int64_t first, int64_t rows) {
    const int64_t share = p.H / p.G, n = length(p, b), past = n - queries(p, b);
    t.b = b, t.g = g, t.rows = rows, t.vectors = (rows + W - 1) / W;
    int64_t time = first / share, head = first % share;
    for (int64_t i = 0; i < t.vectors * W; ++i) {
        const int64_t high = p.causal ? most(0, past + time + 1) : n, low = p.window ? most(0, high - p.window) : 0;
        t.time[i] = time, t.head[i] = g * share + head;
        t.low[i] = float(low), t.high[i] = float(high);
        if (i == 0) t.low_min = low, t.high_min = high;
        t.low_max = low, t.high_max = high;  // both grow with the time
        if (i + 1 < rows && ++head == share) head = 0, ++time;
    }
}

// For every kMixRows rows of a tile, those of the keys [j0, j0 + n) that any of them sees.
static void seen_keys(const Tile& t, int64_t j0, int64_t n, Range* out) {
    for (int64_t i = 0; i < t.vectors * W; i += kMixRows)
        out[i / kMixRows] = {most(0, int64_t(t.low[i]) - j0), least(n, int64_t(t.high[i + kMixRows - 1]) - j0)};
}

// For every kMixRows of the keys [j0, j0 + n), those rows of a tile that see any of them.
static void seeing_rows(const Tile& t, int64_t j0, int64_t n, Range* out) {
    int64_t begin = 0, end = 0;
    for (int64_t j = 0; j < n; j += kMixRows) {
        while (begin < t.rows && t.high[begin] <= float(j0 + j)) ++begin;
        while (end < t.rows && t.low[end] < float(j0 + least(n, j + kMixRows))) ++end;
        out[j / kMixRows] = {begin, end};
    }
}

// Keys [j, j + n) of a tile that vectors [v0, v1) may see; `masked` where not all of these rows see all of these keys.
struct Span {
    int64_t j, n, v0, v1;
    bool masked;
};

// Cuts keys [j0, j0 + n) into spans, leaving out what no row sees: four at most.
static int64_t spans(const Tile& t, int64_t j0, int64_t n, Span (&out)[4]) {
    if (t.low_max <= j0 && t.high_min >= j0 + n) {
        out[0] = {j0, n, 0, t.vectors, false};
        return 1;
    }
    int64_t count = 0;
    for (int64_t j = j0; j < j0 + n; j += kChain) {
        Span s{j, least(kChain, j0 + n - j), 0, t.vectors, false};
        while (s.v0 < s.v1 && t.high[s.v0 * W + W - 1] <= float(j)) ++s.v0;
        while (s.v0 < s.v1 && t.low[(s.v1 - 1) * W] >= float(j + s.n)) --s.v1;
        if (s.v0 == s.v1) continue;
        s.masked = t.high[s.v0 * W] < float(j + s.n) || t.low[s.v1 * W - 1] > float(j);
        out[count++] = s;
    }
    return count;
}

// scores[j - j0][row] = scale scores + bias.
static void add_bias(float* scores, const Tile& t, const AttentionInputs& p, const Span& s, int64_t j0) {
    const float* bias = p.bias + t.b * p.bias_batch;
    const vf scale = set(units(p).scale);
    for (int64_t v = s.v0; v < s.v1; ++v)
        for (int64_t j = s.j; j < s.j + s.n; j += W) {
            vf a[W];
            const int64_t n = least(W, s.j + s.n - j);
            for (int64_t i = 0; i < W; ++i) {
                const int64_t r = v * W + i;
                a[i] = load_n(bias + t.head[r] * p.bias_head + t.time[r] * p.bias_time + j, n);
            }
            transpose(a);
            for (int64_t i = 0; i < n; ++i) {
                float* at = scores + (j + i - j0) * kRows + v * W;
                store(at, fma(load(at), scale, a[i]));
            }
        }
}

// Scores, -inf where a row does not see a key. qt: (D, kRows), with its sign; k: rows of keys from j0 on.
static void score(float* scores, const Tile& t, const AttentionInputs& p, const Span& s, int64_t j0, const float* qt,
                  const float* k, int64_t k_time, Ahead* ahead = nullptr) {
    float* out = scores + (s.j - j0) * kRows;
    dot(out + s.v0 * W, kRows, k + (s.j - j0) * k_time, k_time, qt + s.v0 * W, kRows, s.n, s.v1 - s.v0, p.D, ahead);
    if (p.bias) add_bias(scores, t, p, s, j0);
    if (!s.masked) return;
    for (int64_t v = s.v0; v < s.v1; ++v) {
        if (t.high[v * W] >= float(s.j + s.n) && t.low[v * W + W - 1] <= float(s.j)) continue;
        const vf low = load(t.low + v * W), high = load(t.high + v * W);
        for (int64_t i = 0; i < s.n; ++i) {
            const vf j = set(float(s.j + i));
            float* at = out + i * kRows + v * W;
            const vf x = select(lt(j, high), load(at), set(-INFINITY));
            store(at, select(le(low, j), x, set(-INFINITY)));
        }
    }
}

FASTLM_INLINE int64_t count(Whole) { return W; }
FASTLM_INLINE int64_t count(Part p) { return p.n; }

// f(c, columns, lanes) for every W columns of W rows, from column c on; columns[i]: column c + i, rows in lanes.
template <class F> FASTLM_INLINE void each_columns(const float* const (&rows)[W], int64_t n, const F& f) {
    each_vector(n, [&](int64_t c, auto lanes) FASTLM_LAMBDA {
        vf a[W];
        if (count(lanes) == W) {
            load_transposed(a, [&](int i) FASTLM_LAMBDA { return rows[i] + c; });
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) a[i] = lanes.load(rows[i] + c);
            transpose(a);
        }
        f(c, a, lanes);
    });
}

// out[c][row] = scale * x[row][c]: rows of `n` floats, each at its own place; beyond the tile's last row that one again. out: (n,
// kRows). kCopy: to copy as well, as they are, (kRows, n rounded up to vectors).
template <bool kCopy, class RowAt>
static void pack_transposed(float* out, const Tile& t, int64_t n, float scale, float* copy, const RowAt& row_at) {
    const vf factor = set(scale);
    const int64_t width = round_up(n);
    for (int64_t v = 0; v < t.vectors; ++v) {
        const float* rows[W];
        for (int64_t i = 0; i < W; ++i) rows[i] = row_at(least(v * W + i, t.rows - 1));
        for (int64_t i = 0; i < (kCopy ? W : 0); ++i)
            each_vector(
                n, [&](int64_t c, auto lanes) FASTLM_LAMBDA { store(copy + (v * W + i) * width + c, lanes.load(rows[i] + c)); });
        each_columns(rows, n, [&](int64_t c, vf(&a)[W], auto lanes) FASTLM_LAMBDA {
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
                if (i < count(lanes)) store(out + (c + i) * kRows + v * W, a[i] * factor);
        });
    }
}

// Copies `n` rows of `width` numbers as floats so that they follow each other (rows a large power of two apart would share cache
// sets), `padded` floats each: width, or that rounded up to vectors, with zeros.
template <class S>
static const float* pack_rows(float* out, const typename S::T* x, int64_t stride, int64_t n, int64_t width, int64_t padded) {
    if constexpr (S::kFloat)
        if (stride == padded && width == padded) return x;
    for (int64_t i = 0; i < n; ++i) {
        const Row<S> row(x + i * stride, width);
        int64_t c = 0;
        for (; c + W <= width; c += W) store(out + i * padded + c, row.whole(c));
        if (c < width) store_n(out + i * padded + c, row.part(c, width - c), padded - c);
    }
    return out;
}

// `n` rows of `width` floats that a product reads number by number: where they lie, or copied, `stride` from one to the next then.
template <class S>
static const float* broadcast_rows(float* out, const typename S::T* x, int64_t& stride, int64_t n, int64_t width) {
    if constexpr (S::kFloat)
        if (!share_l1(stride * int64_t(sizeof(float)))) return x;
    const float* rows = pack_rows<S>(out, x, stride, n, width, width);
    stride = width;
    return rows;
}

// How many tiles of rows one piece takes through the keys together: K and V come from memory once for all of them.
constexpr int64_t kTogether = 4;

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
