#include "quantize.h"

#include <cmath>
#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kBlock = 32;

// Nearest, ties to even. False where it overflows.
bool put_half(uint8_t* p, float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    const uint32_t sign = u >> 16 & 0x8000u;
    u &= 0x7FFFFFFFu;
    uint32_t h;
    if (u >= 0x38800000u) {  // a normal half
        h = (u - 0x38000000u + 0xFFFu + (u >> 13 & 1u)) >> 13;
        if (h > 0x7BFFu) return false;
    } else {  // the addition rounds a multiple of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &u, 4);
        magnitude += 0.5f;
        std::memcpy(&h, &magnitude, 4);
        h -= 0x3F000000u;
    }
    h |= sign;
    p[0] = uint8_t(h), p[1] = uint8_t(h >> 8);
    return true;
}

float inverse(float d) {
    const float i = 1.0f / d;  // of a scale so small that this overflows, float16 keeps zero
    return d == 0.0f || std::isinf(i) ? 0.0f : i;
}

void put_codes(uint8_t* p, const uint8_t (&q)[kBlock], bool five) {
    if (five) {
        uint32_t high = 0;
        for (int i = 0; i < kBlock; ++i) high |= uint32_t(q[i] >> 4) << i;
        std::memcpy(p, &high, 4);
        p += 4;
    }
    for (int i = 0; i < kBlock / 2; ++i) p[i] = uint8_t((q[i] & 15) | q[i + kBlock / 2] << 4);
}

// One block; how many bytes it has, 0 where it cannot be written.
template <Quant Q> int64_t put_block(uint8_t* p, const float* x) {
    for (int i = 0; i < kBlock; ++i)
        if (!std::isfinite(x[i])) return 0;
    if constexpr (Q == Quant::Q8_0) {
        float most = 0.0f;
        for (int i = 0; i < kBlock; ++i) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
        const float d = most / 127.0f, id = inverse(d);
        for (int i = 0; i < kBlock; ++i) {  // ties away from zero
            const float n = x[i] * id, a = std::fabs(n), whole = std::floor(a), b = whole + std::floor(2.0f * (a - whole));
            p[2 + i] = uint8_t(int8_t(n < 0.0f ? -b : b));
        }
        return put_half(p, d) ? 34 : 0;
    } else {
        constexpr bool kFive = Q == Quant::Q5_0 || Q == Quant::Q5_1, kMinimum = Q == Quant::Q4_1 || Q == Quant::Q5_1;
        constexpr int kMost = kFive ? 31 : 15;
        uint8_t q[kBlock];
        float d, from, half;
        bool fits;
        if constexpr (kMinimum) {
            float low = x[0], high = x[0];
            for (int i = 1; i < kBlock; ++i) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
            d = (high - low) / float(kMost), from = low, half = 0.5f;
            fits = put_half(p, d) && put_half(p + 2, low);
        } else {
            float most = x[0];  // the first of the largest magnitude, with its sign
            for (int i = 1; i < kBlock; ++i) most = std::fabs(x[i]) > std::fabs(most) ? x[i] : most;
            d = most / -float((kMost + 1) / 2), from = 0.0f, half = float((kMost + 1) / 2) + 0.5f;
            fits = put_half(p, d);
        }
        const float id = inverse(d);
        for (int i = 0; i < kBlock; ++i) {
            const int n = int((x[i] - from) * id + half);
            q[i] = uint8_t(n < kMost ? n : kMost);
        }
        constexpr int kHead = kMinimum ? 4 : 2;
        put_codes(p + kHead, q, kFive);
        return fits ? kHead + (kFive ? 4 : 0) + kBlock / 2 : 0;
    }
}

template <Quant Q> int64_t quantize_rows(const Quantize& p, int64_t row_bytes) {
    const int64_t piece = 16;
    int64_t bad = -1;
    parallel_for(p.rows, piece, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            uint8_t* to = p.blocks + r * row_bytes;
            for (int64_t k = 0; k < p.K; k += kBlock) {
                const int64_t bytes = put_block<Q>(to, p.x + r * p.K + k);
                if (bytes == 0) {
                    int64_t seen = __atomic_load_n(&bad, __ATOMIC_RELAXED);
                    while ((seen < 0 || r < seen) &&
                           !__atomic_compare_exchange_n(&bad, &seen, r, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
                    break;
                }
                to += bytes;
            }
        }
    });
    return bad;
}

int64_t quantize(const Quantize& p) {
    const int64_t blocks = p.K / kBlock;
    switch (p.kind) {
        case Quant::Q4_0: return quantize_rows<Quant::Q4_0>(p, blocks * 18);
        case Quant::Q4_1: return quantize_rows<Quant::Q4_1>(p, blocks * 20);
        case Quant::Q5_0: return quantize_rows<Quant::Q5_0>(p, blocks * 22);
        case Quant::Q5_1: return quantize_rows<Quant::Q5_1>(p, blocks * 24);
        case Quant::Q8_0: return quantize_rows<Quant::Q8_0>(p, blocks * 34);
        default: return 0;
    }
}

}  // namespace

extern const QuantizeKernels quantize_kernels = {quantize};

}  // namespace FASTLM_ISA
}  // namespace fastlm
