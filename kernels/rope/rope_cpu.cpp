#include "rope.h"

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The halves lie apart: two loads, two stores, no shuffle.
void turn_halves(float* y, const float* x, const float* c, const float* s, int64_t half, float sign) {
    const vf flip = set(sign);
    for (int64_t i = 0; i < half; i += W) {
        const int64_t n = half - i;
        const vf a = load_n(x + i, n), b = load_n(x + half + i, n), cosine = load_n(c + i, n), sine = load_n(s + i, n) * flip;
        store_n(y + i, fnma(b, sine, a * cosine), n);
        store_n(y + half + i, fma(a, sine, b * cosine), n);
    }
}

// c: (R,) every cosine twice; s: (R,) every sine twice, the first of each pair negative.
void turn_pairs(float* y, const float* x, const float* c, const float* s, int64_t R) {
    for (int64_t i = 0; i < R; i += W) {
        const int64_t n = R - i;
        const vf a = load_n(x + i, n);
        store_n(y + i, fma(swap_pairs(a), load_n(s + i, n), a * load_n(c + i, n)), n);
    }
}

void forward(const RopeForward& p) {
    const int64_t half = p.R / 2, row = p.H * p.D;
    const float sign = p.inverse ? -1.0f : 1.0f;
    parallel_for(p.B * p.T, row > 0 ? 16384 / row + 1 : 1, [&](int64_t begin, int64_t end) {
        float* pairs = p.interleaved ? static_cast<float*>(scratch(size_t(2 * p.R + 1) * sizeof(float))) : nullptr;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / p.T, t = i % p.T;
            const int64_t at = p.positions ? p.positions[b * p.positions_batch + t] : t;
            const float *c = p.cos + at * half, *s = p.sin + at * half, *x = p.x + b * p.x_batch + t * p.x_time;
            float* y = p.y + i * row;
            if (p.interleaved)
                for (int64_t j = 0; j < half; ++j) {
                    pairs[2 * j] = pairs[2 * j + 1] = c[j];
                    pairs[p.R + 2 * j] = -sign * s[j], pairs[p.R + 2 * j + 1] = sign * s[j];
                }
            for (int64_t h = 0; h < p.H; ++h, x += p.D, y += p.D) {
                if (p.interleaved) turn_pairs(y, x, pairs, pairs + p.R, p.R);
                else turn_halves(y, x, c, s, half, sign);
                for (int64_t d = p.R; d < p.D; d += W) store_n(y + d, load_n(x + d, p.D - d), p.D - d);
            }
        }
    });
}

}  // namespace

extern const RopeKernels rope_kernels = {forward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
