// One block of each format to float32, written as ggml defines it. Product and sum are rounded separately (no fma), so every
// instruction set gives the bits of ggml's reference and of the gguf package. Plain loops: the compiler vectorises them.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// IEEE half at any address, exact.
FASTLM_INLINE float half_at(const uint8_t* p) {
    const uint32_t h = uint32_t(p[0]) | uint32_t(p[1]) << 8, sign = (h & 0x8000u) << 16, rest = h & 0x7FFFu;
    if (rest < 0x0400u) {  // zero, subnormal: mantissa * 2^-24
        const float f = float(rest) * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    const uint32_t u = sign | (rest >= 0x7C00u ? 0x7F800000u | (rest & 0x3FFu) << 13 : (rest << 13) + (112u << 23));
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}

// d, 16 bytes: value i is the low half of byte i, value i + 16 the high half.
struct BlockQ4_0 {
    static constexpr int64_t kValues = 32, kBytes = 18;
    static void decode(const uint8_t* b, float* w) {
        const float d = half_at(b);
        for (int i = 0; i < 16; ++i) {
            const int q = b[2 + i];
            w[i] = d * float((q & 15) - 8);
            w[i + 16] = d * float((q >> 4) - 8);
        }
    }
};

// d, m, 16 bytes.
struct BlockQ4_1 {
    static constexpr int64_t kValues = 32, kBytes = 20;
    static void decode(const uint8_t* b, float* w) {
        const float d = half_at(b), m = half_at(b + 2);
        for (int i = 0; i < 16; ++i) {
            const int q = b[4 + i];
            w[i] = d * float(q & 15) + m;
            w[i + 16] = d * float(q >> 4) + m;
        }
    }
};

// d, 32 fifth bits (little-endian), 16 bytes.
struct BlockQ5_0 {
    static constexpr int64_t kValues = 32, kBytes = 22;
    static void decode(const uint8_t* b, float* w) {
        const float d = half_at(b);
        uint32_t high;
        std::memcpy(&high, b + 2, 4);
        for (int i = 0; i < 16; ++i) {
            const uint32_t q = b[6 + i];
            w[i] = d * float(int32_t((q & 15) | (high >> i & 1) << 4) - 16);
            w[i + 16] = d * float(int32_t((q >> 4) | (high >> (i + 16) & 1) << 4) - 16);
        }
    }
};

// d, m, 32 fifth bits, 16 bytes.
struct BlockQ5_1 {
    static constexpr int64_t kValues = 32, kBytes = 24;
    static void decode(const uint8_t* b, float* w) {
        const float d = half_at(b), m = half_at(b + 2);
        uint32_t high;
        std::memcpy(&high, b + 4, 4);
        for (int i = 0; i < 16; ++i) {
            const uint32_t q = b[8 + i];
            w[i] = d * float(int32_t((q & 15) | (high >> i & 1) << 4)) + m;
            w[i + 16] = d * float(int32_t((q >> 4) | (high >> (i + 16) & 1) << 4)) + m;
        }
    }
};

// d, 32 signed bytes.
struct BlockQ8_0 {
    static constexpr int64_t kValues = 32, kBytes = 34;
    static void decode(const uint8_t* b, float* w) {
        const float d = half_at(b);
        for (int i = 0; i < 32; ++i) w[i] = d * float(int8_t(b[2 + i]));
    }
};

// The 6-bit scale and minimum of sub-block j (0 to 7) from the 12 packed bytes of Q4_K and Q5_K.
FASTLM_INLINE void scale_min(const uint8_t* s, int j, float* scale, float* minimum) {
    if (j < 4) {
        *scale = float(s[j] & 63);
        *minimum = float(s[j + 4] & 63);
    } else {
        *scale = float((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        *minimum = float((s[j + 4] >> 4) | (s[j] >> 6) << 4);
    }
}

// d, dmin, 12 bytes of scales, 128 bytes: 32 bytes hold sub-block 2j in their low halves and 2j + 1 in their high ones.
struct BlockQ4_K {
    static constexpr int64_t kValues = 256, kBytes = 144;
    static void decode(const uint8_t* b, float* w) {
        const float d = half_at(b), dmin = half_at(b + 2);
        for (int j = 0; j < 8; j += 2) {
            const uint8_t* q = b + 16 + 16 * j;
            float s0, m0, s1, m1;
            scale_min(b + 4, j, &s0, &m0);
            scale_min(b + 4, j + 1, &s1, &m1);
            const float d0 = d * s0, n0 = dmin * m0, d1 = d * s1, n1 = dmin * m1;
            for (int i = 0; i < 32; ++i) {
                w[32 * j + i] = d0 * float(q[i] & 15) - n0;
                w[32 * j + 32 + i] = d1 * float(q[i] >> 4) - n1;
            }
        }
    }
};

// As Q4_K with 32 bytes of fifth bits after the scales: bit j of byte i belongs to value i of sub-block j.
struct BlockQ5_K {
    static constexpr int64_t kValues = 256, kBytes = 176;
    static void decode(const uint8_t* b, float* w) {
        const float d = half_at(b), dmin = half_at(b + 2);
        const uint8_t* high = b + 16;
        for (int j = 0; j < 8; j += 2) {
            const uint8_t* q = b + 48 + 16 * j;
            float s0, m0, s1, m1;
            scale_min(b + 4, j, &s0, &m0);
            scale_min(b + 4, j + 1, &s1, &m1);
            const float d0 = d * s0, n0 = dmin * m0, d1 = d * s1, n1 = dmin * m1;
            for (int i = 0; i < 32; ++i) {
                w[32 * j + i] = d0 * float((q[i] & 15) | (high[i] >> j & 1) << 4) - n0;
                w[32 * j + 32 + i] = d1 * float((q[i] >> 4) | (high[i] >> (j + 1) & 1) << 4) - n1;
            }
        }
    }
};

// 128 bytes of low halves, 64 bytes of high pairs, 16 signed scales, d. Each half of 128 values is laid out alike.
struct BlockQ6_K {
    static constexpr int64_t kValues = 256, kBytes = 210;
    static void decode(const uint8_t* b, float* w) {
        const float d = half_at(b + 208);
        for (int half = 0; half < 2; ++half) {
            const uint8_t *low = b + 64 * half, *high = b + 128 + 32 * half;
            float scale[8];
            for (int j = 0; j < 8; ++j) scale[j] = d * float(int8_t(b[192 + 8 * half + j]));
            float* out = w + 128 * half;
            for (int part = 0; part < 2; ++part) {
                const int end = 16 * part + 16;
                for (int i = 16 * part; i < end; ++i) {
                    const int h = high[i];
                    out[i] = scale[part] * float(((low[i] & 15) | (h & 3) << 4) - 32);
                    out[i + 32] = scale[part + 2] * float(((low[i + 32] & 15) | (h >> 2 & 3) << 4) - 32);
                    out[i + 64] = scale[part + 4] * float(((low[i] >> 4) | (h >> 4 & 3) << 4) - 32);
                    out[i + 96] = scale[part + 6] * float(((low[i + 32] >> 4) | (h >> 6) << 4) - 32);
                }
            }
        }
    }
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
