// AVX2 with FMA and F16C: 8 floats.
#pragma once

#include <immintrin.h>

namespace fastlm {
namespace FASTLM_ISA {
namespace {

using vf = __m256;
using vi = __m256i;
using vm = __m256;  // all bits of a lane set or clear
constexpr int64_t W = 8;

FASTLM_INLINE vi iota() { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }
FASTLM_INLINE vi seti(int32_t x) { return _mm256_set1_epi32(x); }
FASTLM_INLINE vi tail_mask(int64_t n) { return _mm256_cmpgt_epi32(seti(n >= W ? int32_t(W) : int32_t(n)), iota()); }

FASTLM_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
FASTLM_INLINE vf load_halves(const float* p) { return load(p); }
FASTLM_INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
FASTLM_INLINE vf load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, tail_mask(n)); }
FASTLM_INLINE void store_n(float* p, vf v, int64_t n) { _mm256_maskstore_ps(p, tail_mask(n), v); }
// Past the caches; p is 64-byte aligned. fence() before another thread reads.
FASTLM_INLINE void stream(float* p, vf v) { _mm256_stream_ps(p, v); }
FASTLM_INLINE void fence() { _mm_sfence(); }
FASTLM_INLINE vf set(float x) { return _mm256_set1_ps(x); }
FASTLM_INLINE vf zero() { return _mm256_setzero_ps(); }

FASTLM_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
FASTLM_INLINE vf fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
FASTLM_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
FASTLM_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
FASTLM_INLINE vf sqrt(vf a) { return _mm256_sqrt_ps(a); }
FASTLM_INLINE vf abs(vf a) { return _mm256_andnot_ps(set(-0.0f), a); }
FASTLM_INLINE vf round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FASTLM_INLINE vm lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
FASTLM_INLINE vm le(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
FASTLM_INLINE vm eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
FASTLM_INLINE vm is_nan(vf a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
FASTLM_INLINE bool any(vm m) { return _mm256_movemask_ps(m) != 0; }
FASTLM_INLINE uint32_t bits(vm m) { return uint32_t(_mm256_movemask_ps(m)); }
FASTLM_INLINE vf select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }

FASTLM_INLINE vi to_int(vf a) { return _mm256_cvtps_epi32(a); }
FASTLM_INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
FASTLM_INLINE vi as_int(vf a) { return _mm256_castps_si256(a); }
FASTLM_INLINE vf as_float(vi a) { return _mm256_castsi256_ps(a); }
FASTLM_INLINE vi addi(vi a, vi b) { return _mm256_add_epi32(a, b); }
FASTLM_INLINE vi subi(vi a, vi b) { return _mm256_sub_epi32(a, b); }
FASTLM_INLINE vi maxi(vi a, vi b) { return _mm256_max_epi32(a, b); }
FASTLM_INLINE vi mini(vi a, vi b) { return _mm256_min_epi32(a, b); }
FASTLM_INLINE vi andi(vi a, vi b) { return _mm256_and_si256(a, b); }
FASTLM_INLINE vi ori(vi a, vi b) { return _mm256_or_si256(a, b); }
FASTLM_INLINE vi xori(vi a, vi b) { return _mm256_xor_si256(a, b); }
template <int N> FASTLM_INLINE vi shl(vi a) { return _mm256_slli_epi32(a, N); }
template <int N> FASTLM_INLINE vi shr(vi a) { return _mm256_srli_epi32(a, N); }
template <int N> FASTLM_INLINE vi sra(vi a) { return _mm256_srai_epi32(a, N); }

FASTLM_INLINE float reduce_add(vf a) {
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
FASTLM_INLINE float reduce_max(vf a) {
    const __m128 q = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

FASTLM_INLINE vf load_bf16(const uint16_t* p) {
    return as_float(shl<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p))));
}
FASTLM_INLINE vf load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FASTLM_INLINE vf load_u8(const uint8_t* p) { return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
FASTLM_INLINE vf load_i8(const int8_t* p) { return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
FASTLM_INLINE vi repeat16(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
FASTLM_INLINE vi lookup_u8(vi table, vi index) { return _mm256_shuffle_epi8(table, index); }
FASTLM_INLINE vi zip_low_u8(vi a, vi b) { return _mm256_unpacklo_epi8(a, b); }
FASTLM_INLINE vi zip_high_u8(vi a, vi b) { return _mm256_unpackhi_epi8(a, b); }
FASTLM_INLINE vi zip_low_u16(vi a, vi b) { return _mm256_unpacklo_epi16(a, b); }
FASTLM_INLINE vi zip_high_u16(vi a, vi b) { return _mm256_unpackhi_epi16(a, b); }
FASTLM_INLINE void store_u16(uint16_t* p, vi v) {
    const vi low = _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                                           0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(low, 0x08)));
}

FASTLM_INLINE vf swap_pairs(vf a) { return _mm256_permute_ps(a, 0xB1); }
FASTLM_INLINE vf low_nibble(vi a) { return to_float(andi(a, seti(15))); }

// Lane i: table[index[i] % 16].
FASTLM_INLINE vf lookup16(const float* table, vi index) {
    const vf low = _mm256_permutevar8x32_ps(load(table), index), high = _mm256_permutevar8x32_ps(load(table + 8), index);
    return _mm256_blendv_ps(low, high, as_float(shl<28>(index)));  // by the sign: bit 3 of the index
}

// Lane i: the sum of a[i]'s lanes.
FASTLM_INLINE vf reduce_add_each(const vf (&a)[W]) {
    const vf x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    const vf y = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return _mm256_permute2f128_ps(x, y, 0x20) + _mm256_permute2f128_ps(x, y, 0x31);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
