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

#if defined(FASTLM_ISA_AVX512) || defined(FASTLM_ISA_NEON)
constexpr int kBlockVectors = 4;  // 32 registers: 6 x 4 chains
#else
constexpr int kBlockVectors = 2;  // 16 registers: 6 x 2
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
// The row of an output (B, T, H, .), or packed (R, H, .).
FASTLM_INLINE int64_t output(const AttentionInputs& p, int64_t b, int64_t t, int64_t h) {
    return ((p.offsets ? p.offsets[b] : b * p.T) + t) * p.H + h;
}

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

// c = or += the sum over k of a[i][k] b[k][x], NI rows by NV vectors. Where it is added: chains of `step` fma each, added in order;
// else: a dot product's chains. Transposed: a[k][i].
template <int NI, int NV, bool Transposed, bool Add>
static __attribute__((noinline)) void product_block(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb,
                                                    int64_t K, int64_t step) {
    constexpr int64_t kNext = Add ? 1 : kQuad;
    for (int64_t chain = 0, begin = 0; begin < K; ++chain) {
        const int64_t end = least(K, Add ? begin + step : chain / kQuad * kDotBlock + kDotBlock);
        vf acc[NI][NV];
#pragma GCC unroll 8
        for (int i = 0; i < NI; ++i)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) acc[i][v] = zero();
        for (int64_t k = begin; k < end; k += kNext) {
            vf x[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) x[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 8
            for (int i = 0; i < NI; ++i) {
                const vf y = set(Transposed ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) acc[i][v] = fma(y, x[v], acc[i][v]);
            }
        }
        if (Add || begin > 0) {
#pragma GCC unroll 8
            for (int i = 0; i < NI; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) acc[i][v] = load(c + i * ldc + v * W) + acc[i][v];
        }
#pragma GCC unroll 8
        for (int i = 0; i < NI; ++i)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) store(c + i * ldc + v * W, acc[i][v]);
        begin = Add ? end : (chain + 1) / kQuad * kDotBlock + (chain + 1) % kQuad;
        asm volatile("" ::: "memory");  // else the compiler keeps c's values on the stack as well, and stores everything twice
    }
}

template <int NV, bool Transposed, bool Add> static void product_columns(float* c, int64_t ldc, const float* a, int64_t lda,
                                                                         const float* b, int64_t ldb, int64_t M, int64_t K,
                                                                         int64_t step) {
    constexpr int NI = 6;
    const int64_t next = Transposed ? 1 : lda;
    int64_t i = 0;
    for (; i + NI <= M; i += NI) product_block<NI, NV, Transposed, Add>(c + i * ldc, ldc, a + i * next, lda, b, ldb, K, step);
    c += i * ldc;
    a += i * next;
    switch (M - i) {
        case 5: return product_block<5, NV, Transposed, Add>(c, ldc, a, lda, b, ldb, K, step);
        case 4: return product_block<4, NV, Transposed, Add>(c, ldc, a, lda, b, ldb, K, step);
        case 3: return product_block<3, NV, Transposed, Add>(c, ldc, a, lda, b, ldb, K, step);
        case 2: return product_block<2, NV, Transposed, Add>(c, ldc, a, lda, b, ldb, K, step);
        case 1: return product_block<1, NV, Transposed, Add>(c, ldc, a, lda, b, ldb, K, step);
        default: return;
    }
}

// The product over M rows, `vectors` vectors of columns.
template <bool Transposed, bool Add> static void product(float* c, int64_t ldc, const float* a, int64_t lda, const float* b,
                                                         int64_t ldb, int64_t M, int64_t vectors, int64_t K, int64_t step) {
    while (vectors > 0) {
        const int64_t n = least(vectors, kBlockVectors);
        if (n == 1) product_columns<1, Transposed, Add>(c, ldc, a, lda, b, ldb, M, K, step);
        if (n == 2) product_columns<2, Transposed, Add>(c, ldc, a, lda, b, ldb, M, K, step);
        if constexpr (kBlockVectors > 2) {
            if (n == 3) product_columns<3, Transposed, Add>(c, ldc, a, lda, b, ldb, M, K, step);
            if (n == 4) product_columns<4, Transposed, Add>(c, ldc, a, lda, b, ldb, M, K, step);
        }
        c += n * W, b += n * W, vectors -= n;
    }
}

// The chains over keys in the forward pass: the spans at a mask's edge are as long, so that a row's bits do not depend on where the
// edge lies. Every path through the forward pass keeps to them.
constexpr int64_t kChain = kKeys / 4;

static void dot(float* c, const float* a, int64_t lda, const float* b, int64_t M, int64_t vectors, int64_t K) {
    product<false, false>(c, kRows, a, lda, b, kRows, M, vectors, K, 0);
}

// Rows [first, first + rows) of group g of sequence b; row r is query t = r / (H / G), head g H / G + r % (H / G).
struct Tile {
    int64_t b, g, rows, vectors;
    int64_t time[kRows], head[kRows];
    int64_t low_min, low_max, high_min, high_max;
    alignas(64) float low[kRows], high[kRows];  // visible keys as floats, exact below 2^24; rows beyond the last repeat it
};

static void open_tile(Tile& t, const AttentionInputs& p, int64_t b, int64_t g, int64_t first, int64_t rows) {
    const int64_t share = p.H / p.G;
    t.b = b, t.g = g, t.rows = rows, t.vectors = (rows + W - 1) / W;
    for (int64_t i = 0; i < t.vectors * W; ++i) {
        const int64_t r = first + least(i, rows - 1);
        int64_t low, high;
        t.time[i] = r / share;
        t.head[i] = g * share + r % share;
        visible(p, b, t.time[i], low, high);
        t.low[i] = float(low), t.high[i] = float(high);
        if (i == 0) t.low_min = low, t.high_min = high;
        t.low_max = low, t.high_max = high;  // both grow with t
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
                  const float* k, int64_t k_time) {
    float* out = scores + (s.j - j0) * kRows;
    dot(out + s.v0 * W, k + (s.j - j0) * k_time, k_time, qt + s.v0 * W, s.n, s.v1 - s.v0, p.D);
    if (p.bias) add_bias(scores, t, p, s, j0);
    if (!s.masked) return;
    for (int64_t i = 0; i < s.n; ++i) {
        const vf j = set(float(s.j + i));
        for (int64_t v = s.v0; v < s.v1; ++v) {
            float* at = out + i * kRows + v * W;
            const vf x = select(lt(j, load(t.high + v * W)), load(at), set(-INFINITY));
            store(at, select(le(load(t.low + v * W), j), x, set(-INFINITY)));
        }
    }
}

// out[c][row] = scale * x[row][c]: rows of `n` floats, each at its own place, beyond the tile's last row zero. out: (n, kRows).
template <class RowAt> static void pack_transposed(float* out, const Tile& t, int64_t n, float scale, const RowAt& row_at) {
    const vf factor = set(scale);
    for (int64_t v = 0; v < t.vectors; ++v)
        for (int64_t c = 0; c < n; c += W) {
            vf a[W];
            for (int64_t i = 0; i < W; ++i) a[i] = v * W + i < t.rows ? load_n(row_at(v * W + i) + c, n - c) * factor : zero();
            transpose(a);
            for (int64_t i = 0; i < least(W, n - c); ++i) store(out + (c + i) * kRows + v * W, a[i]);
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

// Fetches rows that pack_rows will copy, into the second-level cache: they are too far apart for the hardware to guess.
static void fetch_rows(const void* x, int64_t stride, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < width; c += 64) __builtin_prefetch(static_cast<const char*>(x) + i * stride + c, 0, 2);
}

// How many tiles of rows one piece takes through the keys together: K and V come from memory once for all of them.
constexpr int64_t kTogether = 4;

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
