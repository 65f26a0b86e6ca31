// Dot products of bytes: four products to a 32-bit lane, all sums exact.
#pragma once

#include "simd.h"

#include <cstring>

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The four bytes at p in every lane.
FASTLM_INLINE vi set_bytes(const uint8_t* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return seti(x);
}

// acc + the dot products of the lanes' bytes, u0 with s0 and u1 with s1. u is unsigned and below 2^Bits, s signed and above -128.
// dot8: of one pair, u of all 8 bits. dot16: of the two signed 16-bit numbers of each lane.
#if defined(FASTLM_VNNI) && defined(FASTLM_ISA_AVX512)
FASTLM_INLINE vi dot8(vi acc, vi u, vi s) { return _mm512_dpbusd_epi32(acc, u, s); }
FASTLM_INLINE vi dot16(vi acc, vi a, vi b) { return _mm512_dpwssd_epi32(acc, a, b); }
template <int Bits> FASTLM_INLINE vi dot(vi acc, vi u0, vi s0, vi u1, vi s1) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc, u0, s0), u1, s1);
}
#elif defined(FASTLM_VNNI)
FASTLM_INLINE vi dot8(vi acc, vi u, vi s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }
FASTLM_INLINE vi dot16(vi acc, vi a, vi b) { return _mm256_dpwssd_avx_epi32(acc, a, b); }
template <int Bits> FASTLM_INLINE vi dot(vi acc, vi u0, vi s0, vi u1, vi s1) {
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(acc, u0, s0), u1, s1);
}
#elif defined(FASTLM_ISA_AVX512) || defined(FASTLM_ISA_AVX2)
#if defined(FASTLM_ISA_AVX512)
#define FASTLM_I(name) _mm512_##name
#else
#define FASTLM_I(name) _mm256_##name
#endif
// Even and odd bytes as 16 bits each.
FASTLM_INLINE vi dot8(vi acc, vi u, vi s) {
    const vi even = FASTLM_I(madd_epi16)(andi(u, FASTLM_I(set1_epi16)(255)), FASTLM_I(srai_epi16)(FASTLM_I(slli_epi16)(s, 8), 8));
    const vi odd = FASTLM_I(madd_epi16)(FASTLM_I(srli_epi16)(u, 8), FASTLM_I(srai_epi16)(s, 8));
    return addi(acc, addi(even, odd));
}
FASTLM_INLINE vi dot16(vi acc, vi a, vi b) { return addi(acc, FASTLM_I(madd_epi16)(a, b)); }
template <int Bits> FASTLM_INLINE vi dot(vi acc, vi u0, vi s0, vi u1, vi s1) {
    if constexpr (Bits <= 6) {  // pairs in 16 bits do not saturate: 4 * 63 * 127 < 2^15
        const vi pairs = FASTLM_I(add_epi16)(FASTLM_I(maddubs_epi16)(u0, s0), FASTLM_I(maddubs_epi16)(u1, s1));
        return addi(acc, FASTLM_I(madd_epi16)(pairs, FASTLM_I(set1_epi16)(1)));
    } else {
        return dot8(dot8(acc, u0, s0), u1, s1);
    }
}
#undef FASTLM_I
#else
FASTLM_INLINE vi dot8(vi acc, vi u, vi s) {
    const vi low = seti(255);
    acc = acc + (u & low) * ((s << 24) >> 24);
    acc = acc + ((u >> 8) & low) * ((s << 16) >> 24);
    acc = acc + ((u >> 16) & low) * ((s << 8) >> 24);
    return acc + ((u >> 24) & low) * (s >> 24);
}
FASTLM_INLINE vi dot16(vi acc, vi a, vi b) { return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16); }
template <int Bits> FASTLM_INLINE vi dot(vi acc, vi u0, vi s0, vi u1, vi s1) { return dot8(dot8(acc, u0, s0), u1, s1); }
#endif

// In each lane 256 times the first bytes of the lanes at `high` and at `low`, as two numbers of 16 bits. Up to three bytes
// before each are read too.
FASTLM_INLINE vi two_bytes(const uint8_t* high, const uint8_t* low) {
#if defined(FASTLM_ISA_AVX512)
    const __m512i first = _mm512_maskz_loadu_epi8(0x8888888888888888, high - 3);
    return _mm512_mask_loadu_epi8(first, 0x2222222222222222, low - 1);
#else
    const vi a = as_int(load(reinterpret_cast<const float*>(high - 3))), b = as_int(load(reinterpret_cast<const float*>(low - 3)));
    return ori(andi(a, seti(int32_t(0xFF000000))), shr<16>(andi(b, seti(int32_t(0xFF000000)))));
#endif
}

// Holds a value in a register from here on: an array of sums that a loop adds to is else kept on the stack as well.
FASTLM_INLINE vi in_register(vi x) {
#if defined(FASTLM_ISA_AVX512)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

// The low byte of each lane, W values.
FASTLM_INLINE void store_i8(uint8_t* p, vi v) {
#if defined(FASTLM_ISA_AVX512)
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v));
#elif defined(FASTLM_ISA_AVX2)
    const vi low = _mm256_shuffle_epi8(v, _mm256_set1_epi32(0x0C080400));
    _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#else
    for (int i = 0; i < W; ++i) p[i] = uint8_t(v[i]);
#endif
}

// In each eight of 32 bytes, those at even places come first.
FASTLM_INLINE void even_first(uint8_t* p) {
#if defined(FASTLM_ISA_AVX512) || defined(FASTLM_ISA_AVX2)
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,  //
                                           0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    _mm256_storeu_si256((__m256i*)p, _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)p), order));
#else
    for (int i = 0; i < 32; i += 8) {
        const uint8_t a = p[i + 1], b = p[i + 3], c = p[i + 5];
        p[i + 1] = p[i + 2], p[i + 2] = p[i + 4], p[i + 3] = p[i + 6];
        p[i + 4] = a, p[i + 5] = b, p[i + 6] = c;
    }
#endif
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
