// AArch64 NEON: 4 floats.
#pragma once

#include <arm_neon.h>

namespace fastlm {
namespace FASTLM_ISA {
namespace {

using vf = float32x4_t;
using vi = int32x4_t;
using vm = uint32x4_t;
constexpr int64_t W = 4;

FASTLM_INLINE vf set(float x) { return vdupq_n_f32(x); }
FASTLM_INLINE vf zero() { return vdupq_n_f32(0.0f); }
FASTLM_INLINE vi seti(int32_t x) { return vdupq_n_s32(x); }
FASTLM_INLINE vi iota() { return vi{0, 1, 2, 3}; }

FASTLM_INLINE vf load(const float* p) { return vld1q_f32(p); }
FASTLM_INLINE vf load_halves(const float* p) { return load(p); }
FASTLM_INLINE void store(float* p, vf v) { vst1q_f32(p, v); }
FASTLM_INLINE vf load_n(const float* p, int64_t n) {
    if (n >= W) return load(p);
    float t[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
}
FASTLM_INLINE void store_n(float* p, vf v, int64_t n) {
    if (n >= W) return store(p, v);
    float t[4];
    store(t, v);
    for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}

FASTLM_INLINE void stream(float* p, vf v) { store(p, v); }
FASTLM_INLINE void fence() {}

FASTLM_INLINE vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
FASTLM_INLINE vf fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
FASTLM_INLINE vm lt(vf a, vf b) { return vcltq_f32(a, b); }
FASTLM_INLINE vm le(vf a, vf b) { return vcleq_f32(a, b); }
FASTLM_INLINE vm eq(vf a, vf b) { return vceqq_f32(a, b); }
FASTLM_INLINE vm is_nan(vf a) { return vmvnq_u32(vceqq_f32(a, a)); }
FASTLM_INLINE bool any(vm m) { return vmaxvq_u32(m) != 0; }
FASTLM_INLINE uint32_t bits(vm m) {
    const uint32x4_t weight = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m, weight));
}
FASTLM_INLINE vf select(vm m, vf a, vf b) { return vbslq_f32(m, a, b); }
// As on x86: the second operand where either is not a number.
FASTLM_INLINE vf max(vf a, vf b) { return select(vcgtq_f32(a, b), a, b); }
FASTLM_INLINE vf min(vf a, vf b) { return select(vcltq_f32(a, b), a, b); }
FASTLM_INLINE vf sqrt(vf a) { return vsqrtq_f32(a); }
FASTLM_INLINE vf abs(vf a) { return vabsq_f32(a); }
FASTLM_INLINE vf round(vf a) { return vrndnq_f32(a); }

FASTLM_INLINE vi to_int(vf a) { return vcvtnq_s32_f32(a); }
FASTLM_INLINE vf to_float(vi a) { return vcvtq_f32_s32(a); }
FASTLM_INLINE vi as_int(vf a) { return vreinterpretq_s32_f32(a); }
FASTLM_INLINE vf as_float(vi a) { return vreinterpretq_f32_s32(a); }
FASTLM_INLINE vi addi(vi a, vi b) { return vaddq_s32(a, b); }
FASTLM_INLINE vi subi(vi a, vi b) { return vsubq_s32(a, b); }
FASTLM_INLINE vi maxi(vi a, vi b) { return vmaxq_s32(a, b); }
FASTLM_INLINE vi mini(vi a, vi b) { return vminq_s32(a, b); }
FASTLM_INLINE vi andi(vi a, vi b) { return vandq_s32(a, b); }
FASTLM_INLINE vi ori(vi a, vi b) { return vorrq_s32(a, b); }
FASTLM_INLINE vi xori(vi a, vi b) { return veorq_s32(a, b); }
template <int N> FASTLM_INLINE vi shl(vi a) { return vshlq_n_s32(a, N); }
template <int N> FASTLM_INLINE vi shr(vi a) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), N)); }
template <int N> FASTLM_INLINE vi sra(vi a) { return vshrq_n_s32(a, N); }

// The halves first, as everywhere else; vaddvq would add neighbours first.
FASTLM_INLINE float reduce_add(vf a) {
    const float32x2_t d = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
FASTLM_INLINE float reduce_max(vf a) { return vmaxvq_f32(a); }

FASTLM_INLINE vf load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
FASTLM_INLINE vf load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
FASTLM_INLINE vf load_u8(const uint8_t* p) { return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
FASTLM_INLINE vf load_i8(const int8_t* p) { return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
FASTLM_INLINE vi of_u8(uint8x16_t a) { return vreinterpretq_s32_u8(a); }
FASTLM_INLINE vi of_u16(uint16x8_t a) { return vreinterpretq_s32_u16(a); }
FASTLM_INLINE uint8x16_t to_u8(vi a) { return vreinterpretq_u8_s32(a); }
FASTLM_INLINE uint16x8_t to_u16(vi a) { return vreinterpretq_u16_s32(a); }
FASTLM_INLINE vi repeat16(const uint8_t* p) { return of_u8(vld1q_u8(p)); }
FASTLM_INLINE vi lookup_u8(vi table, vi index) { return of_u8(vqtbl1q_u8(to_u8(table), to_u8(index))); }
FASTLM_INLINE vi zip_low_u8(vi a, vi b) { return of_u8(vzip1q_u8(to_u8(a), to_u8(b))); }
FASTLM_INLINE vi zip_high_u8(vi a, vi b) { return of_u8(vzip2q_u8(to_u8(a), to_u8(b))); }
FASTLM_INLINE vi zip_low_u16(vi a, vi b) { return of_u16(vzip1q_u16(to_u16(a), to_u16(b))); }
FASTLM_INLINE vi zip_high_u16(vi a, vi b) { return of_u16(vzip2q_u16(to_u16(a), to_u16(b))); }
FASTLM_INLINE void store_u16(uint16_t* p, vi v) { vst1_u16(p, vmovn_u32(vreinterpretq_u32_s32(v))); }

FASTLM_INLINE vf swap_pairs(vf a) { return vrev64q_f32(a); }
FASTLM_INLINE vf low_nibble(vi a) { return to_float(andi(a, seti(15))); }

// Lane i: table[index[i] % 16].
FASTLM_INLINE vf lookup16(const float* table, vi index) {
    // The bytes 4 i .. 4 i + 3 of 64.
    const uint8_t* p = reinterpret_cast<const uint8_t*>(table);
    const uint8x16x4_t bytes = {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
    const vi at = vmlaq_s32(seti(0x03020100), andi(index, seti(15)), seti(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_s32(at)));
}

// Lane i: the sum of a[i]'s lanes.
FASTLM_INLINE vf reduce_add_each(const vf (&a)[W]) { return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])); }

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
