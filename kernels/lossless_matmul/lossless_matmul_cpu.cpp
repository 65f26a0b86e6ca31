#include "lossless_matmul.h"

#include <cstring>

#include "kernels/matmul/gemm.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kGroup = kLosslessGroup, kUnit = kLosslessUnit, kPanelGroups = kLosslessPanel / kGroup;

// A panel's unit of weights of kSize bytes: lines of codes, then for each half of its k and each group the lines of the
// values.
template <int kSize> struct Layout {
    static constexpr int64_t kLines = kSize == 4 ? 3 : 1, kCodes = kPanelGroups * 64;
    static constexpr int64_t kBytes = kCodes + 2 * kPanelGroups * kLines * 64;
    static constexpr int64_t values(int64_t half, int64_t group) { return kCodes + (half * kPanelGroups + group) * kLines * 64; }
    // Unit 0 of the panel of a row.
    static FASTLM_MEMBER const uint8_t* panel(const uint8_t* packed, int64_t row, int64_t K) {
        return packed + kLosslessHeader + row / kLosslessPanel * ceil_div(K, kUnit) * kBytes;
    }
};

// Where in a line of 64 bytes the one of 16 rows and four k lies, as the decoder's interleaving wants it.
template <int kSize> FASTLM_INLINE int64_t place(int64_t k, int64_t row) {
    return row / 4 * 16 + (kSize == 4 ? k % 4 * 4 + row % 4 : k / 2 % 2 * 8 + row % 4 * 2 + k % 2);
}
// And the float32's low half, in bytes from the end of that line.
FASTLM_INLINE int64_t place_low(int64_t k, int64_t row) { return k / 2 % 2 * 64 + row / 4 * 16 + k % 2 * 8 + row % 4 * 2; }
FASTLM_INLINE LosslessLayout layout(const uint8_t* packed) {
    int64_t h[4];
    std::memcpy(h, packed, sizeof h);
    return {h[0], h[1], h[2], h[3]};
}
FASTLM_INLINE const LosslessEntry* entries_of(const uint8_t* packed, const LosslessLayout& at, int64_t g) {
    return reinterpret_cast<const LosslessEntry*>(packed + at.entries) + reinterpret_cast<const int32_t*>(packed + at.first)[g];
}

// The table of first bytes, for 64 look-ups at once.
FASTLM_INLINE vi table_of(const uint8_t* packed) { return repeat16(packed + kLosslessTable); }

// A unit of S vectors of rows, which lie in one panel, so that all distances are constants. A first byte, looked up, and a second
// one become a bfloat16; what is interleaved with what puts the values in order.
// kHalves: lines are read by halves, which one stream of float32 from memory likes better, and the caches do not.
template <int kSize, int S, bool kHalves = false> struct Unit {
    using L = Layout<kSize>;
    const uint8_t *codes, *values;

    // Of the panel of `row`, its unit at `panel`.
    FASTLM_MEMBER Unit(const uint8_t* panel, int64_t row)
        : codes(panel + row % kLosslessPanel / kGroup * 64 + 4 * (row % kGroup)),
          values(panel + L::values(0, row % kLosslessPanel / kGroup) + 4 * (row % kGroup)) {}
    FASTLM_MEMBER void advance() { codes += L::kBytes, values += L::kBytes; }

    static FASTLM_MEMBER vi words(const uint8_t* p) {
        const auto* at = reinterpret_cast<const float*>(p);
        return as_int(kHalves ? load_halves(at) : load(at));
    }

    // f(k, s, v) for 8 values of k, exceptions apart.
    template <class F> FASTLM_MEMBER void decode(vi table, const F& f) const {
        const vi nibbles = seti(0x0F0F0F0F);
        vi code[S];
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) code[s] = words(codes + s * W / kGroup * 64 + s * W % kGroup * 4);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) {
                const uint8_t* at = values + L::values(h, s * W / kGroup) - L::kCodes + s * W % kGroup * 4;
                const vi high = lookup_u8(table, andi(h ? shr<4>(code[s]) : code[s], nibbles)), low = words(at);
                const vi first = zip_low_u8(low, high), second = zip_high_u8(low, high);
                if constexpr (kSize == 4) {
                    const vi a = words(at + 64), b = words(at + 128);
                    f(4 * h, s, as_float(zip_low_u16(a, first)));
                    f(4 * h + 1, s, as_float(zip_high_u16(a, first)));
                    f(4 * h + 2, s, as_float(zip_low_u16(b, second)));
                    f(4 * h + 3, s, as_float(zip_high_u16(b, second)));
                } else {
                    const vi upper = seti(int32_t(0xFFFF0000));
                    f(4 * h, s, as_float(shl<16>(first)));
                    f(4 * h + 1, s, as_float(andi(first, upper)));
                    f(4 * h + 2, s, as_float(shl<16>(second)));
                    f(4 * h + 3, s, as_float(andi(second, upper)));
                }
            }
    }
};

// w (8, S, W) = a unit with its exceptions, whose entries come next; returns k of the exception after them. Not inlined: rare.
template <int kSize, int S, bool kHalves> __attribute__((noinline)) int64_t patched(float* w, Unit<kSize, S, kHalves> unit,
                                                                                    const uint8_t* packed, int64_t lane,
                                                                                    int64_t begin, const LosslessEntry** next) {
    unit.decode(table_of(packed), [&](int k, int s, vf v) FASTLM_LAMBDA { store(w + (k * S + s) * W, v); });
    int64_t soonest = kLosslessEnd;
    for (int s = 0; s < S; ++s) {
        for (; next[s]->k < begin + kUnit; ++next[s]) {
            const int64_t i = next[s]->row - lane - s * W % kGroup;
            if (i >= 0 && i < W) std::memcpy(w + ((next[s]->k - begin) * S + s) * W + i, &next[s]->value, sizeof(float));
        }
        soonest = least(soonest, next[s]->k);
    }
    return soonest;
}

// S vectors of rows, from `row` on, a multiple of S W, walk along k together.
template <int kSize, int S, bool kHalves = false> struct Decoder {
    static_assert(kLosslessPanel % (S * W) == 0, "vectors that walk together lie in one panel");
    const uint8_t* packed;
    vi table;
    Unit<kSize, S, kHalves> unit;
    int64_t lane, soonest = kLosslessEnd;  // soonest: k of the first exception of all
    const LosslessEntry* next[S];

    Decoder(const uint8_t* packed, const LosslessLayout& where, int64_t K, int64_t row, int64_t k0 = 0)
        : packed(packed),
          table(table_of(packed)),
          unit(Layout<kSize>::panel(packed, row, K) + k0 / kUnit * Layout<kSize>::kBytes, row),
          lane(row % kGroup) {
        for (int s = 0; s < S; ++s) {
            next[s] = entries_of(packed, where, (row + s * W) / kGroup);
            while (next[s]->k < k0) ++next[s];
            soonest = least(soonest, next[s]->k);
        }
    }

    // f(k, s, v) for every k from `begin` on, a multiple of 8 where the walk is, up to `end`.
    template <class F> FASTLM_MEMBER void walk(int64_t begin, int64_t end, const F& f) {
        for (int64_t k = begin; k < end; k += kUnit, unit.advance()) {
            // Without a call in it, so that sums stay in registers.
            for (const int64_t plain = least(soonest, end) - kUnit; k <= plain; k += kUnit, unit.advance())
                unit.decode(table, [&](int u, int s, vf v) FASTLM_LAMBDA { f(k + u, s, v); });
            if (k >= end) return;
            float w[kUnit * S * W];
            soonest = patched(w, unit, packed, lane, k, next);
            for (int u = 0; u < int(kUnit) && k + u < end; ++u)
#pragma GCC unroll 8
                for (int s = 0; s < S; ++s) f(k + u, s, load(w + (u * S + s) * W));
        }
    }
};

// The source of B for the product: columns of B are rows of the weight.
template <int kSize> struct Lossless {
    static constexpr int kFusedRows = kRegisters == 16 ? 4 : 8;  // decoding needs eleven registers beside the sums
    static constexpr int vectors(int rows) {
        if (kRegisters == 16) return rows == 1 ? 4 : rows == 2 ? 2 : 1;
        return kLosslessPanel / W < 4 ? 2 : rows <= 4 ? 4 : 2;
    }
    template <int M> static constexpr int64_t kColumns = vectors(M) * W;
    const uint8_t* packed;
    LosslessLayout where;
    int64_t K;

    Lossless() : where(4, 0, 0, 0) {}
    Lossless(const uint8_t* packed, int64_t K) : packed(packed), where(layout(packed)), K(K) {}

    void pack(float* out, int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        for (int64_t n = 0; n < columns; n += NR, out += kc * NR) {
            Decoder<kSize, NV> decoder(packed, where, K, column + n, k0);
            decoder.walk(k0, k0 + kc, [&](int64_t k, int s, vf w) FASTLM_LAMBDA { store(out + (k - k0) * NR + s * W, w); });
        }
    }

    Ahead ahead(int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        using L = Layout<kSize>;
        const uint8_t* from = L::panel(packed, column, K) + k0 / kUnit * L::kBytes;
        return ahead_of(from, ceil_div(kc, kUnit) * L::kBytes, ceil_div(K, kUnit) * L::kBytes, ceil_div(columns, kLosslessPanel));
    }

    template <int M>
    void fused(const float* a, int64_t depth, int64_t column, int64_t columns, float* sum, int64_t ld, const float* bias) const {
        constexpr int S = vectors(M);
        Decoder<kSize, S, kSize == 4 && M == 1> decoder(packed, where, K, column);
        vf acc[M][S];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s) acc[i][s] = zero();
        decoder.walk(0, depth, [&](int64_t k, int s, vf w) FASTLM_LAMBDA {
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) acc[i][s] = fma(set(a[k * M + i]), w, acc[i][s]);
        });
        for (int s = 0; s < S; ++s) {
            const int64_t left = columns - s * W;
            if (left <= 0) return;
            for (int i = 0; i < M; ++i)
                store_n(sum + i * ld + s * W, bias ? acc[i][s] + load_n(bias + s * W, left) : acc[i][s], left);
        }
    }
};

int64_t workspace(const LosslessMatmul& p) { return packed_a_size(p.M, p.K) * int64_t(sizeof(float)); }

template <int kSize> void matmul_of(const LosslessMatmul& p) {
    const Product product{p.a, p.M, p.N, p.K, false, false, make_target(p.c, p.z, p.bias, p.residual, p.N, p.activation)};
    gemm(product, Lossless<kSize>(p.packed, p.K), p.workspace, nullptr, true);
}
void matmul(const LosslessMatmul& p) { p.size == 4 ? matmul_of<4>(p) : matmul_of<2>(p); }

template <int kSize> void matmuls_of(const LosslessMatmuls& p) {
    Product products[kTogether];
    Lossless<kSize> weights[kTogether];
    for (int64_t i = 0; i < p.count; ++i) {
        const LosslessMatmul& m = p.each[i];
        products[i] = {m.a, m.M, m.N, m.K, false, false, make_target(m.c, nullptr, m.bias, nullptr, m.N, Activation::none)};
        weights[i] = {m.packed, m.K};
    }
    gemm_together(products, weights, p.count, p.workspace);
}
void matmuls(const LosslessMatmuls& p) { p.each[0].size == 4 ? matmuls_of<4>(p) : matmuls_of<2>(p); }

// A weight's bits as those of a float32.
FASTLM_INLINE uint32_t bits_at(const void* w, int64_t i, int64_t size) {
    return size == 4 ? static_cast<const uint32_t*>(w)[i] : uint32_t(static_cast<const uint16_t*>(w)[i]) << 16;
}

void survey(const LosslessSurvey& p) {
    parallel_for(ceil_div(p.N, kGroup), 4, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
            int32_t* counts = p.counts + g * 256;
            int32_t other[3][256] = {};  // so that equal bytes, one after the other, do not wait for their sum
            std::memset(counts, 0, 256 * sizeof(int32_t));
            int32_t* const sums[4] = {counts, other[0], other[1], other[2]};
            const int64_t last = least(p.N, (g + 1) * kGroup) * p.K;
            for (int64_t i = g * kGroup * p.K; i < last; ++i) ++sums[i & 3][bits_at(p.w, i, p.size) >> 24];
            for (int e = 0; e < 256; ++e) counts[e] += other[0][e] + other[1][e] + other[2][e];
        }
    });
}

template <int kSize> void pack_of(const LosslessPack& p) {
    using L = Layout<kSize>;
    const LosslessLayout where = layout(p.packed);
    uint8_t code[256];
    std::memset(code, 255, sizeof code);
    for (int i = 15; i >= 0; --i) code[p.packed[kLosslessTable + i]] = uint8_t(i);
    parallel_for(ceil_div(p.N, kLosslessPanel) * kPanelGroups, 4, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
            auto* unit = const_cast<uint8_t*>(L::panel(p.packed, g * kGroup, p.K));
            auto* entry = const_cast<LosslessEntry*>(entries_of(p.packed, where, g));
            for (int64_t k0 = 0; k0 < p.K; k0 += kUnit, unit += L::kBytes) {
                uint8_t *codes = unit + g % kPanelGroups * 64, *values = unit + L::values(0, g % kPanelGroups);
                constexpr int64_t half = L::values(1, 0) - L::values(0, 0);
                std::memset(codes, 0, 64);
                for (int h = 0; h < 2; ++h) std::memset(values + h * half, 0, size_t(L::kLines * 64));
                for (int64_t k = 0; k < least(kUnit, p.K - k0); ++k)
                    for (int64_t r = 0; r < least(kGroup, p.N - g * kGroup); ++r) {
                        const uint32_t w = bits_at(p.w, (g * kGroup + r) * p.K + k0 + k, kSize), c = code[w >> 24];
                        const int64_t at = place<kSize>(k, r);
                        if (c == 255) *entry++ = {int32_t(k0 + k), int32_t(r), w};
                        else codes[at] |= uint8_t(c << k / 4 * 4);
                        values[k / 4 * half + at] = uint8_t(w >> 16);
                        if (kSize == 4) {
                            const auto low = uint16_t(w);
                            std::memcpy(values + k / 4 * half + 64 + place_low(k, r), &low, sizeof low);
                        }
                    }
            }
            *entry = {kLosslessEnd, 0, 0};
        }
    });
}
void pack(const LosslessPack& p) { p.size == 4 ? pack_of<4>(p) : pack_of<2>(p); }

template <int kSize> void unpack_of(const LosslessUnpack& p) {
    using L = Layout<kSize>;
    const LosslessLayout where = layout(p.packed);
    const auto put = [&](int64_t i, uint32_t w) FASTLM_LAMBDA {
        if (kSize == 4 || p.widen) static_cast<uint32_t*>(p.w)[i] = w;
        else static_cast<uint16_t*>(p.w)[i] = uint16_t(w >> 16);
    };
    parallel_for(p.rows, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = p.ids ? p.ids[i] : p.ids32 ? p.ids32[i] : i, r = row % kGroup;
            const uint8_t* unit = L::panel(p.packed, row, p.K);
            for (int64_t k0 = 0; k0 < p.K; k0 += kUnit, unit += L::kBytes)
                for (int64_t k = 0; k < least(kUnit, p.K - k0); ++k) {
                    const int64_t at = place<kSize>(k, r);
                    const int64_t g = row % kLosslessPanel / kGroup;
                    const uint8_t* values = unit + L::values(k / 4, g);
                    const uint32_t code = unit[g * 64 + at] >> k / 4 * 4 & 15, first = p.packed[kLosslessTable + code];
                    uint16_t low = 0;
                    if (kSize == 4) std::memcpy(&low, values + 64 + place_low(k, r), sizeof low);
                    put(i * p.K + k0 + k, first << 24 | uint32_t(values[at]) << 16 | low);
                }
            for (const LosslessEntry* e = entries_of(p.packed, where, row / kGroup); e->k != kLosslessEnd; ++e)
                if (e->row == r) put(i * p.K + e->k, e->value);
        }
    });
}
void unpack(const LosslessUnpack& p) { p.size == 4 ? unpack_of<4>(p) : unpack_of<2>(p); }

}  // namespace

extern const LosslessMatmulKernels lossless_matmul_kernels = {workspace, matmul, matmuls, survey, pack, unpack};

}  // namespace FASTLM_ISA
}  // namespace fastlm
