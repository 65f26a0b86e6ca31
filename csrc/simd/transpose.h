// transpose: W x W in registers, lane i of r[j] becomes lane j of r[i].
// transpose_quads: the same for the W / 4 groups of four lanes of W / 4 vectors.
// transpose_in_quads: 4 x 4 within every group of four lanes.
// load_transposed: W rows in memory, row(i) is where each begins. Halves of rows are put together as they are loaded, which takes a
// stage of shuffles less than `transpose`: the shuffles are what bounds it.
#pragma once

#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

#if defined(FASTLM_ISA_AVX512)

FASTLM_INLINE void transpose(vf (&r)[W]) {
    vf t[16];
    // 4 x 4 blocks inside the 128-bit lanes: t[4 g + c] holds column c + 4 lane of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
    for (int g = 0; g < 16; g += 4) {
        const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[g], r[g + 1])),
                      b = _mm512_castps_pd(_mm512_unpackhi_ps(r[g], r[g + 1]));
        const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[g + 2], r[g + 3])),
                      d = _mm512_castps_pd(_mm512_unpackhi_ps(r[g + 2], r[g + 3]));
        t[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        t[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        t[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        t[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    // A 4 x 4 transpose of the lanes themselves.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const vf a = _mm512_shuffle_f32x4(t[c], t[4 + c], 0x88), b = _mm512_shuffle_f32x4(t[c], t[4 + c], 0xDD);
        const vf d = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0x88), e = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0xDD);
        r[c] = _mm512_shuffle_f32x4(a, d, 0x88);
        r[8 + c] = _mm512_shuffle_f32x4(a, d, 0xDD);
        r[4 + c] = _mm512_shuffle_f32x4(b, e, 0x88);
        r[12 + c] = _mm512_shuffle_f32x4(b, e, 0xDD);
    }
}

FASTLM_INLINE void transpose_quads(vf (&r)[4]) {
    const vf a = _mm512_shuffle_f32x4(r[0], r[1], 0x44), b = _mm512_shuffle_f32x4(r[2], r[3], 0x44);
    const vf c = _mm512_shuffle_f32x4(r[0], r[1], 0xEE), d = _mm512_shuffle_f32x4(r[2], r[3], 0xEE);
    r[0] = _mm512_shuffle_f32x4(a, b, 0x88);
    r[1] = _mm512_shuffle_f32x4(a, b, 0xDD);
    r[2] = _mm512_shuffle_f32x4(c, d, 0x88);
    r[3] = _mm512_shuffle_f32x4(c, d, 0xDD);
}

FASTLM_INLINE void transpose_in_quads(vf (&r)[4]) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    r[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

// The four numbers at p in every group of four lanes.
FASTLM_INLINE vf load_quad(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }

template <class Row> FASTLM_INLINE void load_transposed(vf (&r)[W], const Row& row) {
    const auto at = [&](int i) FASTLM_LAMBDA { return static_cast<const float*>(static_cast<const void*>(row(i))); };
    const auto two = [&](int low, int high, int half) FASTLM_LAMBDA {
        const __m256 a = _mm256_loadu_ps(at(low) + 8 * half);
        return _mm512_insertf32x8(_mm512_castps256_ps512(a), _mm256_loadu_ps(at(high) + 8 * half), 1);
    };
    vf t[2][2][4];
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g)  // rows 8 g .. 8 g + 3 in the lower half, the next four in the upper
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {  // inside, so that a line is done with before rows that share its place in L1 come
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) t[half][g][j] = two(8 * g + j, 8 * g + 4 + j, half);
            transpose_in_quads(t[half][g]);
        }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            r[8 * half + c] = _mm512_shuffle_f32x4(t[half][0][c], t[half][1][c], 0x88);
            r[8 * half + 4 + c] = _mm512_shuffle_f32x4(t[half][0][c], t[half][1][c], 0xDD);
        }
}

#elif defined(FASTLM_ISA_AVX2)

FASTLM_INLINE void transpose_quads(vf (&r)[2]) {
    const vf a = r[0];
    r[0] = _mm256_permute2f128_ps(a, r[1], 0x20);
    r[1] = _mm256_permute2f128_ps(a, r[1], 0x31);
}

FASTLM_INLINE void transpose_in_quads(vf (&r)[4]) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r[0], r[1])), b = _mm256_castps_pd(_mm256_unpackhi_ps(r[0], r[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r[2], r[3])), d = _mm256_castps_pd(_mm256_unpackhi_ps(r[2], r[3]));
    r[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    r[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    r[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    r[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
}

FASTLM_INLINE vf load_quad(const float* p) { return _mm256_broadcast_ps((const __m128*)p); }

template <class Row> FASTLM_INLINE void load_transposed(vf (&r)[W], const Row& row) {
    const auto at = [&](int i) FASTLM_LAMBDA { return static_cast<const float*>(static_cast<const void*>(row(i))); };
    const auto two = [&](int i, int half) FASTLM_LAMBDA {
        const __m128 a = _mm_loadu_ps(at(i) + 4 * half);
        return _mm256_insertf128_ps(_mm256_castps128_ps256(a), _mm_loadu_ps(at(i + 4) + 4 * half), 1);
    };
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        vf t[4] = {two(0, half), two(1, half), two(2, half), two(3, half)};
        transpose_in_quads(t);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) r[4 * half + c] = t[c];
    }
}

FASTLM_INLINE void transpose(vf (&r)[W]) {
    vf t[8];
#pragma GCC unroll 2
    for (int g = 0; g < 8; g += 4) {
        const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r[g], r[g + 1])),
                      b = _mm256_castps_pd(_mm256_unpackhi_ps(r[g], r[g + 1]));
        const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r[g + 2], r[g + 3])),
                      d = _mm256_castps_pd(_mm256_unpackhi_ps(r[g + 2], r[g + 3]));
        t[g] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
        t[g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
        t[g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
        t[g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        r[c] = _mm256_permute2f128_ps(t[c], t[4 + c], 0x20);
        r[4 + c] = _mm256_permute2f128_ps(t[c], t[4 + c], 0x31);
    }
}

#elif defined(FASTLM_ISA_NEON)

FASTLM_INLINE void transpose(vf (&r)[W]) {
    const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
    r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

#else

FASTLM_INLINE void transpose(vf (&r)[W]) {
    vf t[W];
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < W; ++j) t[i][j] = r[j][i];
    for (int i = 0; i < W; ++i) r[i] = t[i];
}

#endif

#if !defined(FASTLM_ISA_AVX512) && !defined(FASTLM_ISA_AVX2)
FASTLM_INLINE void transpose_quads(vf (&)[1]) {}
FASTLM_INLINE void transpose_in_quads(vf (&r)[4]) { transpose(r); }
FASTLM_INLINE vf load_quad(const float* p) { return load(p); }
template <class Row> FASTLM_INLINE void load_transposed(vf (&r)[W], const Row& row) {
    for (int i = 0; i < W; ++i) {
        float t[W];
        __builtin_memcpy(t, row(i), sizeof t);
        r[i] = load(t);
    }
    transpose(r);
}
#endif

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
