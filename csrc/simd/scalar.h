// Portable rung: GCC vector extensions, four floats, no instruction beyond the platform's baseline.
#pragma once

#include <cstring>

namespace fastlm {
namespace FASTLM_ISA {
namespace {

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef vi vm;
constexpr int64_t W = 4;

FASTLM_INLINE vf set(float x) { return vf{x, x, x, x}; }
FASTLM_INLINE vf zero() { return vf{0, 0, 0, 0}; }
FASTLM_INLINE vi seti(int32_t x) { return vi{x, x, x, x}; }
FASTLM_INLINE vi iota() { return vi{0, 1, 2, 3}; }

FASTLM_INLINE vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
FASTLM_INLINE vf load_halves(const float* p) { return load(p); }
FASTLM_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
FASTLM_INLINE vf load_n(const float* p, int64_t n) {
    vf v = zero();
    for (int64_t i = 0; i < (n < W ? n : W); ++i) v[i] = p[i];
    return v;
}
FASTLM_INLINE void store_n(float* p, vf v, int64_t n) {
    for (int64_t i = 0; i < (n < W ? n : W); ++i) p[i] = v[i];
}

FASTLM_INLINE void stream(float* p, vf v) { store(p, v); }
FASTLM_INLINE void fence() {}

// Not fused: a software fmaf would cost a hundred times more than it corrects.
FASTLM_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
FASTLM_INLINE vf fnma(vf a, vf b, vf c) { return c - a * b; }
FASTLM_INLINE vm lt(vf a, vf b) { return a < b; }
FASTLM_INLINE vm le(vf a, vf b) { return a <= b; }
FASTLM_INLINE vm eq(vf a, vf b) { return a == b; }
FASTLM_INLINE vm is_nan(vf a) { return a != a; }
FASTLM_INLINE uint32_t bits(vm m) { return uint32_t(m[0] & 1) | uint32_t(m[1] & 2) | uint32_t(m[2] & 4) | uint32_t(m[3] & 8); }
FASTLM_INLINE bool any(vm m) { return bits(m) != 0; }
FASTLM_INLINE vf select(vm m, vf a, vf b) { return m ? a : b; }
FASTLM_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
FASTLM_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
FASTLM_INLINE vf sqrt(vf a) { return vf{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])}; }

FASTLM_INLINE vi as_int(vf a) {
    vi v;
    std::memcpy(&v, &a, sizeof v);
    return v;
}
FASTLM_INLINE vf as_float(vi a) {
    vf v;
    std::memcpy(&v, &a, sizeof v);
    return v;
}
FASTLM_INLINE vf abs(vf a) { return as_float(as_int(a) & 0x7FFFFFFF); }
FASTLM_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }
// Nearest, ties to even, by the 1.5 * 2^23 trick; |a| < 2^22.
FASTLM_INLINE vf round(vf a) {
    const vf magic = set(12582912.0f);
    return select(lt(abs(a), set(4194304.0f)), (a + magic) - magic, a);
}
FASTLM_INLINE vi to_int(vf a) { return __builtin_convertvector(round(a), vi); }
FASTLM_INLINE vi addi(vi a, vi b) { return a + b; }
FASTLM_INLINE vi subi(vi a, vi b) { return a - b; }
FASTLM_INLINE vi maxi(vi a, vi b) { return a > b ? a : b; }
FASTLM_INLINE vi mini(vi a, vi b) { return a < b ? a : b; }
FASTLM_INLINE vi andi(vi a, vi b) { return a & b; }
FASTLM_INLINE vi ori(vi a, vi b) { return a | b; }
FASTLM_INLINE vi xori(vi a, vi b) { return a ^ b; }
template <int N> FASTLM_INLINE vi shl(vi a) { return a << N; }
template <int N> FASTLM_INLINE vi shr(vi a) {
    typedef uint32_t vu __attribute__((vector_size(16)));
    return vi(vu(a) >> N);
}
template <int N> FASTLM_INLINE vi sra(vi a) { return a >> N; }

FASTLM_INLINE float reduce_add(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
FASTLM_INLINE float reduce_max(vf a) {
    const float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
    return x > y ? x : y;
}

FASTLM_INLINE vf load_bf16(const uint16_t* p) {
    return as_float(vi{int32_t(uint32_t(p[0]) << 16), int32_t(uint32_t(p[1]) << 16), int32_t(uint32_t(p[2]) << 16),
                       int32_t(uint32_t(p[3]) << 16)});
}
FASTLM_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t u;
    float f;
    if (exponent == 31) {
        u = sign | 0x7F800000u | (mantissa << 13);
    } else if (exponent != 0) {
        u = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else {
        f = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -f : f;
    }
    std::memcpy(&f, &u, sizeof f);
    return f;
}
FASTLM_INLINE vf load_f16(const uint16_t* p) {
    return vf{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
FASTLM_INLINE vf load_u8(const uint8_t* p) { return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
FASTLM_INLINE vf load_i8(const int8_t* p) { return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
typedef uint8_t vu8 __attribute__((vector_size(16)));
typedef uint16_t vu16 __attribute__((vector_size(16)));
FASTLM_INLINE vi repeat16(const uint8_t* p) {
    vi v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
FASTLM_INLINE vi lookup_u8(vi table, vi index) {
    const vu8 t = vu8(table), at = vu8(index);
    vu8 v;
    for (int i = 0; i < 16; ++i) v[i] = t[at[i]];
    return vi(v);
}
FASTLM_INLINE vi zip_low_u8(vi a, vi b) {
    return vi(__builtin_shuffle(vu8(a), vu8(b), vu8{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}));
}
FASTLM_INLINE vi zip_high_u8(vi a, vi b) {
    return vi(__builtin_shuffle(vu8(a), vu8(b), vu8{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}));
}
FASTLM_INLINE vi zip_low_u16(vi a, vi b) { return vi(__builtin_shuffle(vu16(a), vu16(b), vu16{0, 8, 1, 9, 2, 10, 3, 11})); }
FASTLM_INLINE vi zip_high_u16(vi a, vi b) { return vi(__builtin_shuffle(vu16(a), vu16(b), vu16{4, 12, 5, 13, 6, 14, 7, 15})); }
FASTLM_INLINE void store_u16(uint16_t* p, vi v) {
    for (int i = 0; i < W; ++i) p[i] = uint16_t(v[i]);
}

FASTLM_INLINE vf swap_pairs(vf a) { return vf{a[1], a[0], a[3], a[2]}; }
FASTLM_INLINE vf low_nibble(vi a) { return to_float(andi(a, seti(15))); }

// Lane i: table[index[i] % 16].
FASTLM_INLINE vf lookup16(const float* table, vi index) {
    return vf{table[index[0] & 15], table[index[1] & 15], table[index[2] & 15], table[index[3] & 15]};
}

// Lane i: the sum of a[i]'s lanes.
FASTLM_INLINE vf reduce_add_each(const vf (&a)[W]) {
    return vf{reduce_add(a[0]), reduce_add(a[1]), reduce_add(a[2]), reduce_add(a[3])};
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
