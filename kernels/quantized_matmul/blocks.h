// The packed layout of quantised weights, and the way back to float32.
//
// A group is sixteen rows. Along k a group is a sequence of units of 32, for the K formats in sets of eight with a common head:
//
//     head    d (and dmin): float16 x 16 each                                              K formats only, before each 8 units
//     unit    scales: d (and m): float16 x 16 each; K formats: 6-bit scale (and minimum): a byte x 16 each; Q6_K: a byte x 16 per
//     16 k
//             codes:  4 words x 16 rows; word t holds the low four bits of k = 8 t .. 8 t + 7. Q8_0: 8 words, word t holds the
//                     bytes of k = 4 t .. 4 t + 3, 128 added
//             high:   5 bits: a word x 16 rows; 6 bits: two. Byte b of it holds what is above the low four bits of k = 8 t + 2 b
//             and
//                     8 t + 2 b + 1, for all four t (6 bits: for t = 0, 1 and 2, 3) from the lowest bit up
//
// So the low, and the high, halves of the bytes of a word are four values of k of each row: what a dot product of bytes takes.
//
// Every format is w = d * q + m with q >= 0: Q4_0 has m = -8 d. d * q has at most 24 bits in all of them, so the
// fused multiply-add rounds once, where ggml's d * (q - 8) or d * q + m rounds once too: the weights have its bits.
#pragma once

#include <cstring>

#include "csrc/simd/simd.h"
#include "kernels/dequantize/dequantize.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kGroup = 16;        // rows side by side
constexpr int64_t kUnit = 32;         // values of k in a unit
constexpr int64_t kAhead = 2048;      // bytes of a group that are fetched into L2 before they are needed
constexpr int64_t kRowMultiple = 64;  // rows are padded with zeros to a multiple of this: any register block may run over the end

template <Quant Q> struct Layout {
    static constexpr bool kK = Q == Quant::Q4_K || Q == Quant::Q5_K || Q == Quant::Q6_K;
    static constexpr bool kMinimum = Q == Quant::Q4_1 || Q == Quant::Q5_1 || Q == Quant::Q4_K || Q == Quant::Q5_K;
    static constexpr int kBits = Q == Quant::Q8_0                                           ? 8
                                 : Q == Quant::Q6_K                                         ? 6
                                 : Q == Quant::Q5_0 || Q == Quant::Q5_1 || Q == Quant::Q5_K ? 5
                                                                                            : 4;
    static constexpr int64_t kUnits = kK ? 8 : 1;  // with a common head
    static constexpr int64_t kHead = kK ? (kMinimum ? 64 : 32) : 0;
    static constexpr int64_t kScales = kK || !kMinimum ? 32 : 64;
    static constexpr int64_t kCodes = kBits == 8 ? 512 : 256;
    static constexpr int64_t kHigh = kBits == 5 ? 64 : kBits == 6 ? 128 : 0;
    static constexpr int64_t kUnitBytes = kScales + kCodes + kHigh;
    static constexpr int64_t kSetBytes = kHead + kUnits * kUnitBytes;
    static constexpr int kMore = kBits - 4;  // bits above the low four
    static constexpr int kOffset = Q == Quant::Q4_0   ? -8
                                   : Q == Quant::Q5_0 ? -16
                                   : Q == Quant::Q6_K ? -32
                                   : Q == Quant::Q8_0 ? -128
                                                      : 0;

    static constexpr int64_t group_bytes(int64_t K) { return K / (kUnits * kUnit) * kSetBytes; }
    static FASTLM_MEMBER const uint8_t* head(const uint8_t* group, int64_t u) { return group + u / kUnits * kSetBytes; }
    static FASTLM_MEMBER int64_t unit(int64_t u) { return u / kUnits * kSetBytes + kHead + u % kUnits * kUnitBytes; }
};

// 16 * (the low B bits of each lane), as a number.
template <int B> FASTLM_INLINE vf high_part(vi a) {
#if defined(FASTLM_ISA_AVX512)
    // The permutation reads four bits: a table of period 2 or 4 needs no mask.
    const vf table = B == 1 ? _mm512_setr_ps(0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16)
                            : _mm512_setr_ps(0, 16, 32, 48, 0, 16, 32, 48, 0, 16, 32, 48, 0, 16, 32, 48);
    return _mm512_permutexvar_ps(a, table);
#else
    return to_float(shl<4>(andi(a, seti((1 << B) - 1))));
#endif
}

FASTLM_INLINE vi load_words(const uint8_t* p) { return as_int(load(reinterpret_cast<const float*>(p))); }
FASTLM_INLINE vf load_half(const uint8_t* p) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }

// S vectors of rows walk along k together; vector s holds rows row + s W ...
template <Quant Q, int S> struct Decoder {
    using L = Layout<Q>;
    const uint8_t* group[S];  // where the rows of vector s begin, its lane offset within the group apart
    int64_t lane[S];
    const uint8_t* at[S];  // this unit
    vf d[S], m[S];
    vi code[S], high[S], more[S];

    FASTLM_MEMBER Decoder(const uint8_t* packed, int64_t K, int64_t row) {
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
            group[s] = packed + (row + s * W) / kGroup * L::group_bytes(K);
            lane[s] = (row + s * W) % kGroup;
        }
    }

    // The scales of unit u (of its second half, for Q6_K).
    FASTLM_MEMBER void scales(int64_t u, int half = 0) {
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
            const uint8_t *h = L::head(group[s], u), *p = group[s] + L::unit(u);
            at[s] = p + L::kScales;
            if constexpr (Q == Quant::Q6_K) {
                d[s] = load_half(h + 2 * lane[s]) * load_i8(reinterpret_cast<const int8_t*>(p + 16 * half + lane[s]));
            } else if constexpr (L::kK) {
                d[s] = load_half(h + 2 * lane[s]) * load_u8(p + lane[s]);
                m[s] = zero() - load_half(h + 32 + 2 * lane[s]) * load_u8(p + 16 + lane[s]);
            } else {
                d[s] = load_half(p + 2 * lane[s]);
                if constexpr (L::kMinimum) m[s] = load_half(p + 32 + 2 * lane[s]);
            }
            if constexpr (L::kOffset != 0) m[s] = d[s] * set(float(L::kOffset));
        }
    }

    // The codes of k = 8 t .. 8 t + 7.
    FASTLM_MEMBER void word(int t) {
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
            if constexpr (L::kBits < 8) code[s] = load_words(at[s] + 64 * t + 4 * lane[s]);
            if constexpr (L::kBits == 5)
                if (t == 0) high[s] = load_words(at[s] + 256 + 4 * lane[s]);
            if constexpr (L::kBits == 6)
                if (t % 2 == 0) high[s] = load_words(at[s] + 256 + 32 * t + 4 * lane[s]);
            if constexpr (L::kHigh != 0) {
                more[s] = high[s];
                high[s] = shr<2 * L::kMore>(high[s]);
            }
        }
    }

    // The codes of word t as bytes: q[s][0] those of k = 8 t, + 2, + 4, + 6 (Q8_0: + 1, + 2, + 3), q[s][1] the others.
    FASTLM_MEMBER void bytes(int t, vi (&q)[S][2]) {
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
            if constexpr (L::kBits == 8) {
                q[s][0] = load_words(at[s] + 128 * t + 4 * lane[s]);
                q[s][1] = load_words(at[s] + 128 * t + 64 + 4 * lane[s]);
            } else {
                const vi low = seti(0x0F0F0F0F), c = load_words(at[s] + 64 * t + 4 * lane[s]);
                q[s][0] = andi(c, low);
                q[s][1] = andi(shr<4>(c), low);
                if constexpr (L::kHigh != 0) {
                    const vi mask = seti(L::kMore == 1 ? 0x10101010 : 0x30303030);
                    if (t % (L::kMore == 1 ? 4 : 2) == 0)
                        high[s] = load_words(at[s] + 256 + (L::kMore == 1 ? 0 : 32 * t) + 4 * lane[s]);
                    q[s][0] = ori(q[s][0], andi(shl<4>(high[s]), mask));
                    q[s][1] = ori(q[s][1], andi(shl<4 - L::kMore>(high[s]), mask));
                    high[s] = shr<2 * L::kMore>(high[s]);
                }
            }
        }
    }

    // The weights at k of vector s; k goes through 0 .. 31 of the unit in order.
    FASTLM_MEMBER vf next(int k, int s) {
        vf q;
        if constexpr (L::kBits == 8) {
            if (k % 4 == 0) code[s] = load_words(at[s] + 16 * k + 4 * lane[s]);
            q = to_float(andi(code[s], seti(255)));
            code[s] = shr<8>(code[s]);
        } else {
            q = low_nibble(code[s]);
            if constexpr (L::kHigh != 0) {
                q = q + high_part<L::kMore>(more[s]);
                more[s] = k % 2 ? shr<8 - L::kMore>(more[s]) : shr<L::kMore>(more[s]);
            }
            code[s] = shr<4>(code[s]);
        }
        return fma(d[s], q, m[s]);
    }

    // f(k of the unit, vector, weights) for all 32 k in order.
    template <class F> FASTLM_MEMBER void unit(int64_t u, const F& f) {
        scales(u);
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s)
            if (lane[s] == 0)
#pragma GCC unroll 16
                for (int64_t line = 0; line < L::kUnitBytes; line += 64) __builtin_prefetch(at[s] + kAhead + line, 0, 2);
        for (int t = 0; t < 4; ++t) {
            if (Q == Quant::Q6_K && t == 2) scales(u, 1);
            word(t);
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j)
#pragma GCC unroll 8
                for (int s = 0; s < S; ++s) f(8 * t + j, s, next(8 * t + j, s));
        }
    }
};

// f.template run<Q>() for the kind.
template <class F> void dispatch(Quant kind, const F& f) {
    switch (kind) {
        case Quant::Q4_0: return f.template run<Quant::Q4_0>();
        case Quant::Q4_1: return f.template run<Quant::Q4_1>();
        case Quant::Q5_0: return f.template run<Quant::Q5_0>();
        case Quant::Q5_1: return f.template run<Quant::Q5_1>();
        case Quant::Q8_0: return f.template run<Quant::Q8_0>();
        case Quant::Q4_K: return f.template run<Quant::Q4_K>();
        case Quant::Q5_K: return f.template run<Quant::Q5_K>();
        case Quant::Q6_K: return f.template run<Quant::Q6_K>();
    }
}

// What one row has in one unit, before packing: codes q >= 0 (Q8_0: signed) and scales as they are stored.
struct Unpacked {
    uint8_t q[kUnit];
    uint16_t d, m;     // float16; of the head in the K formats
    uint8_t scale[2];  // K formats: scale and minimum; Q6_K: the scales of both halves
};

FASTLM_INLINE uint16_t word16(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }

template <Quant Q> void unpack(const uint8_t* row, int64_t u, Unpacked& out) {
    if constexpr (Q == Quant::Q8_0) {
        const uint8_t* b = row + u * 34;
        out.d = word16(b);
        std::memcpy(out.q, b + 2, kUnit);
    } else if constexpr (!Layout<Q>::kK) {
        constexpr int kScale = Layout<Q>::kMinimum ? 4 : 2, kHigh = Layout<Q>::kBits == 5 ? 4 : 0;
        const uint8_t *b = row + u * (kScale + kHigh + 16), *q = b + kScale + kHigh;
        out.d = word16(b);
        if (kScale == 4) out.m = word16(b + 2);
        for (int i = 0; i < 16; ++i) {
            out.q[i] = q[i] & 15;
            out.q[i + 16] = q[i] >> 4;
        }
        if (kHigh)
            for (int i = 0; i < 32; ++i) out.q[i] = uint8_t(out.q[i] | (b[kScale + i / 8] >> i % 8 & 1) << 4);
    } else if constexpr (Q == Quant::Q6_K) {
        const uint8_t* b = row + u / 8 * 210;
        const int64_t j = u % 8, half = j / 4, part = j % 4;
        const uint8_t *low = b + 64 * half + 32 * (part & 1), *high = b + 128 + 32 * half;
        for (int i = 0; i < 32; ++i) out.q[i] = uint8_t((low[i] >> 4 * (part >> 1) & 15) | (high[i] >> 2 * part & 3) << 4);
        out.d = word16(b + 208);
        out.scale[0] = b[192 + 2 * j];
        out.scale[1] = b[192 + 2 * j + 1];
    } else {
        constexpr bool kFive = Q == Quant::Q5_K;
        const uint8_t *b = row + u / 8 * (kFive ? 176 : 144), *s = b + 4;
        const int64_t j = u % 8;
        const uint8_t* q = b + (kFive ? 48 : 16) + j / 2 * 32;
        for (int i = 0; i < 32; ++i) {
            out.q[i] = q[i] >> 4 * (j & 1) & 15;
            if (kFive) out.q[i] = uint8_t(out.q[i] | (b[16 + i] >> j & 1) << 4);
        }
        out.d = word16(b);
        out.m = word16(b + 2);
        out.scale[0] = uint8_t(j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        out.scale[1] = uint8_t(j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | (s[j] >> 6) << 4);
    }
}

// Puts row r of a group into place.
template <Quant Q> void pack_row(uint8_t* group, int64_t r, const uint8_t* row, int64_t K) {
    using L = Layout<Q>;
    auto put = [](uint8_t* p, auto x) { std::memcpy(p, &x, sizeof x); };
    Unpacked x;
    for (int64_t u = 0; u < K / kUnit; ++u) {
        unpack<Q>(row, u, x);
        uint8_t *head = group + u / L::kUnits * L::kSetBytes, *p = group + L::unit(u), *codes = p + L::kScales;
        uint8_t* halves = L::kK ? head : p;
        put(halves + 2 * r, x.d);
        if (L::kMinimum) put(halves + 32 + 2 * r, x.m);
        if (L::kK) p[r] = x.scale[0], p[16 + r] = x.scale[1];
        if (L::kBits == 8) {
            for (int k = 0; k < kUnit; ++k) codes[64 * (k / 4) + 4 * r + k % 4] = x.q[k] ^ 0x80;
            continue;
        }
        for (int t = 0; t < 4; ++t) {
            uint32_t low = 0;
            for (int j = 0; j < 8; ++j) low |= uint32_t(x.q[8 * t + j] & 15) << 4 * j;
            put(codes + 64 * t + 4 * r, low);
        }
        constexpr int kWords = L::kHigh / 64, kEach = kWords ? 32 / kWords : 0;
        for (int w = 0; w < kWords; ++w) {
            uint32_t high = 0;
            for (int j = 0; j < kEach; ++j)
                high |= uint32_t(x.q[kEach * w + j] >> 4) << (8 * (j % 8 / 2) + L::kMore * (2 * (j / 8) + j % 2));
            put(codes + 256 + 64 * w + 4 * r, high);
        }
    }
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
