#include "distance_bias.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

FASTLM_INLINE int64_t within(int64_t x, int64_t high) { return x < 0 ? 0 : x > high ? high : x; }

// The keys of a query: [0, first) lie before the table, those from `end` on behind it; key s of those between is at from + s.
struct Keys {
    int64_t first, end, from;
    template <class Pass> Keys(const Pass& p, int64_t query) : from(p.center - p.positions[query]) {
        first = within(-from, p.S);
        end = within(p.P - from, p.S);
    }
};

FASTLM_INLINE void fill(float* y, int64_t n, float value) {
    each_vector(n, [&](int64_t i, auto v) FASTLM_LAMBDA { v.store(y + i, set(value)); });
}

float widened(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// A head's numbers by distance are laid out once; every row of scores is then a piece of them.
void forward(const DistanceBiasForward& p) {
    const int64_t each = p.T * p.S + p.P, grain = (1 << 14) / (each + 1) + 1;
    parallel_for(p.B * p.H, grain, [&](int64_t begin, int64_t end) {
        auto* line = static_cast<float*>(scratch(size_t(p.P) * sizeof(float)));
        for (int64_t bh = begin; bh < end; ++bh) {
            const int64_t b = bh / p.H, h = bh % p.H;
            for (int64_t i = 0; i < p.P; ++i) {
                const int64_t at = p.buckets[i] * p.H + h;
                line[i] = p.weight ? p.weight[at] : widened(p.weight_bf16[at]);
            }
            float* y = p.y + bh * p.T * p.S;
            for (int64_t t = 0; t < p.T; ++t, y += p.S) {
                const Keys keys(p, b * p.T + t);
                fill(y, keys.first, line[0]);
                if (keys.end > keys.first)
                    std::memcpy(y + keys.first, line + keys.from + keys.first, size_t(keys.end - keys.first) * sizeof(float));
                fill(y + keys.end, p.S - keys.end, line[p.P - 1]);
            }
        }
    });
}

// One thread a head: sums by distance in float64, then by bucket.
void backward(const DistanceBiasBackward& p) {
    parallel_for(p.H, 1, [&](int64_t begin, int64_t end) {
        auto* sums = static_cast<double*>(scratch(size_t(p.P + p.N) * sizeof(double)));
        double* total = sums + p.P;
        for (int64_t h = begin; h < end; ++h) {
            for (int64_t i = 0; i < p.P + p.N; ++i) sums[i] = 0.0;
            for (int64_t b = 0; b < p.B; ++b) {
                const float* dy = p.dy + (b * p.H + h) * p.T * p.S;
                for (int64_t t = 0; t < p.T; ++t, dy += p.S) {
                    const Keys keys(p, b * p.T + t);
                    for (int64_t s = 0; s < keys.first; ++s) sums[0] += double(dy[s]);
                    for (int64_t s = keys.first; s < keys.end; ++s) sums[keys.from + s] += double(dy[s]);
                    for (int64_t s = keys.end; s < p.S; ++s) sums[p.P - 1] += double(dy[s]);
                }
            }
            for (int64_t i = 0; i < p.P; ++i) total[p.buckets[i]] += sums[i];
            for (int64_t n = 0; n < p.N; ++n) p.dweight[n * p.H + h] += float(total[n]);
        }
    });
}

}  // namespace

extern const DistanceBiasKernels distance_bias_kernels = {forward, backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
