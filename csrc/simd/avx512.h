// AVX-512 (F, BW, DQ, VL): 16 floats.
#pragma once

#include <immintrin.h>

namespace fastlm {
namespace FASTLM_ISA {
namespace {

using vf = __m512;
using vi = __m512i;
using vm = __mmask16;
constexpr int64_t W = 16;

FASTLM_INLINE vm tail_mask(int64_t n) { return n >= W ? vm(0xFFFF) : vm((1u << n) - 1u); }

FASTLM_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
// By two loads of half a line: one stream from memory comes faster so, one from the caches slower.
FASTLM_INLINE vf load_halves(const float* p) {
    const __m512d low = _mm512_castps_pd(_mm512_castps256_ps512(_mm256_loadu_ps(p)));
    return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(_mm256_loadu_ps(p + 8)), 1));
}
FASTLM_INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
FASTLM_INLINE vf load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(tail_mask(n), p); }
FASTLM_INLINE void store_n(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, tail_mask(n), v); }
// Past the caches; p is 64-byte aligned. fence() before another thread reads.
FASTLM_INLINE void stream(float* p, vf v) { _mm512_stream_ps(p, v); }
FASTLM_INLINE void fence() { _mm_sfence(); }
FASTLM_INLINE vf set(float x) { return _mm512_set1_ps(x); }
FASTLM_INLINE vf zero() { return _mm512_setzero_ps(); }
FASTLM_INLINE vi seti(int32_t x) { return _mm512_set1_epi32(x); }
FASTLM_INLINE vi iota() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

FASTLM_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
FASTLM_INLINE vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
FASTLM_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
FASTLM_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
FASTLM_INLINE vf sqrt(vf a) { return _mm512_sqrt_ps(a); }
FASTLM_INLINE vf abs(vf a) { return _mm512_abs_ps(a); }
FASTLM_INLINE vf round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FASTLM_INLINE vm lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
FASTLM_INLINE vm le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
FASTLM_INLINE vm eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
FASTLM_INLINE vm is_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
FASTLM_INLINE bool any(vm m) { return m != 0; }
// The bit i is set where lane i is.
FASTLM_INLINE uint32_t bits(vm m) { return m; }
FASTLM_INLINE vf select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }

FASTLM_INLINE vi to_int(vf a) { return _mm512_cvtps_epi32(a); }
FASTLM_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
FASTLM_INLINE vi as_int(vf a) { return _mm512_castps_si512(a); }
FASTLM_INLINE vf as_float(vi a) { return _mm512_castsi512_ps(a); }
FASTLM_INLINE vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
FASTLM_INLINE vi subi(vi a, vi b) { return _mm512_sub_epi32(a, b); }
FASTLM_INLINE vi maxi(vi a, vi b) { return _mm512_max_epi32(a, b); }
FASTLM_INLINE vi mini(vi a, vi b) { return _mm512_min_epi32(a, b); }
FASTLM_INLINE vi andi(vi a, vi b) { return _mm512_and_si512(a, b); }
FASTLM_INLINE vi ori(vi a, vi b) { return _mm512_or_si512(a, b); }
FASTLM_INLINE vi xori(vi a, vi b) { return _mm512_xor_si512(a, b); }
template <int N> FASTLM_INLINE vi shl(vi a) { return _mm512_slli_epi32(a, N); }
template <int N> FASTLM_INLINE vi shr(vi a) { return _mm512_srli_epi32(a, N); }
template <int N> FASTLM_INLINE vi sra(vi a) { return _mm512_srai_epi32(a, N); }

FASTLM_INLINE float reduce_add(vf a) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
FASTLM_INLINE float reduce_max(vf a) { return _mm512_reduce_max_ps(a); }

FASTLM_INLINE vf load_bf16(const uint16_t* p) {
    return as_float(shl<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))));
}
FASTLM_INLINE vf load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FASTLM_INLINE vf load_u8(const uint8_t* p) { return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
FASTLM_INLINE vf load_i8(const int8_t* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
// Bytes, in 128 bits each for themselves. lookup_u8: byte i of table[index[i]], index < 16; zip: a0 b0 a1 b1 .. of the lower, upper
// halves, in bytes or in 16 bits.
FASTLM_INLINE vi repeat16(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
FASTLM_INLINE vi lookup_u8(vi table, vi index) { return _mm512_shuffle_epi8(table, index); }
FASTLM_INLINE vi zip_low_u8(vi a, vi b) { return _mm512_unpacklo_epi8(a, b); }
FASTLM_INLINE vi zip_high_u8(vi a, vi b) { return _mm512_unpackhi_epi8(a, b); }
FASTLM_INLINE vi zip_low_u16(vi a, vi b) { return _mm512_unpacklo_epi16(a, b); }
FASTLM_INLINE vi zip_high_u16(vi a, vi b) { return _mm512_unpackhi_epi16(a, b); }
// Low half of each lane, W values.
FASTLM_INLINE void store_u16(uint16_t* p, vi v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(v)); }

// (1 0 3 2 ...): the two floats of each pair change places.
FASTLM_INLINE vf swap_pairs(vf a) { return _mm512_permute_ps(a, 0xB1); }
// The low four bits of each lane, as a number: the permutation reads no more of its index.
FASTLM_INLINE vf low_nibble(vi a) {
    return _mm512_permutexvar_ps(a, _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
}

// Lane i: table[index[i] % 16].
FASTLM_INLINE vf lookup16(const float* table, vi index) { return _mm512_permutexvar_ps(index, load(table)); }

// Lane i: the sum of a[i]'s lanes.
FASTLM_INLINE vf reduce_add_each(const vf (&a)[W]) {
    vf s[8], t[4], u[2];
    for (int i = 0; i < 8; ++i) s[i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]) + _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 4; ++i) {
        const __m512d x = _mm512_castps_pd(s[2 * i]), y = _mm512_castps_pd(s[2 * i + 1]);
        t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)) + _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
    for (int i = 0; i < 2; ++i)
        u[i] = _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x44) + _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xEE);
    return _mm512_shuffle_f32x4(u[0], u[1], 0x88) + _mm512_shuffle_f32x4(u[0], u[1], 0xDD);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
