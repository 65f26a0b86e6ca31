#include "moe.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kGrain = 16;  // rows of a piece

void route_row(const MoeRoute& p, int64_t r) {
    const float* x = p.logits + r * p.E;
    float* y = p.probabilities + r * p.E;
    int32_t* experts = p.experts + r * p.k;
    float top = x[0];
    for (int64_t e = 1; e < p.E; ++e) top = x[e] > top ? x[e] : top;
    vf sum = zero();
    each_vector(p.E, [&](int64_t e, auto v) FASTLM_LAMBDA {
        const vf z = v.keep(exp(v.load(x + e) - set(top)));
        sum = sum + z;
        v.store(y + e, z);
    });
    const vf total = set(reduce_add(sum));
    each_vector(p.E, [&](int64_t e, auto v) FASTLM_LAMBDA { v.store(y + e, v.load(y + e) / total); });
    for (int64_t j = 0; j < p.k; ++j) {
        int64_t best = -1;
        for (int64_t e = 0; e < p.E; ++e) {
            bool taken = false;
            for (int64_t i = 0; i < j; ++i) taken |= experts[i] == e;
            if (!taken && (best < 0 || y[e] > y[best])) best = e;
        }
        experts[j] = int32_t(best);
    }
    float* weights = p.weights + r * p.k;
    for (int64_t j = 0; j < p.k; ++j) weights[j] = y[experts[j]];
    if (!p.renormalise) return;
    float chosen = weights[0];
    for (int64_t j = 1; j < p.k; ++j) chosen += weights[j];
    for (int64_t j = 0; j < p.k; ++j) weights[j] /= chosen;
}

void route(const MoeRoute& p) {
    parallel_for(p.R, 64, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) route_row(p, r);
    });
}

// A counting sort, on one thread: a few additions a choice, beside a product of C F multiplications.
void places(const MoePlaces& p) {
    const int64_t choices = p.R * p.k, rows = p.groups > 0 ? p.R / p.groups : 0;
    auto* next = static_cast<int64_t*>(scratch(size_t(p.E) * sizeof(int64_t)));
    std::memset(p.counts, 0, size_t(p.E) * sizeof(int64_t));
    for (int64_t g = 0; g < p.groups; ++g) {
        std::memset(next, 0, size_t(p.E) * sizeof(int64_t));
        for (int64_t j = 0; j < p.k; ++j)
            for (int64_t i = g * rows * p.k + j; i < (g + 1) * rows * p.k; i += p.k) {
                const int64_t e = p.experts[i];
                const bool kept = e >= 0 && e < p.E && (p.capacity == 0 || next[e] < p.capacity);
                p.slots[i] = kept ? 0 : -1;
                if (kept) ++next[e], ++p.counts[e];
            }
    }
    int64_t total = 0;
    for (int64_t e = 0; e < p.E; ++e) next[e] = total, total += p.counts[e];
    for (int64_t i = 0; i < choices; ++i)
        if (p.slots[i] == 0) {
            const int64_t place = next[p.experts[i]]++;
            p.slots[i] = int32_t(place);
            p.rows[place] = int32_t(i / p.k);
        }
    for (int64_t i = total; i < choices; ++i) p.rows[i] = 0;
}

void gather(const MoeGather& p) {
    const size_t bytes = size_t(p.C) * sizeof(float);
    parallel_for(p.P, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = p.rows[i];
            if (row >= 0 && row < p.R) std::memcpy(p.y + i * p.C, p.x + row * p.C, bytes);
            else std::memset(p.y + i * p.C, 0, bytes);
        }
    });
}

void combine(const MoeCombine& p) {
    parallel_for(p.R, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            float* out = p.out + r * p.C;
            const float* residual = p.residual ? p.residual + r * p.C : nullptr;
            each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA {
                vf sum = zero();
                for (int64_t j = 0; j < p.k; ++j) {
                    const int64_t slot = p.slots[r * p.k + j];
                    if (slot < 0 || slot >= p.P) continue;
                    const vf y = v.load(p.y + slot * p.C + c);
                    sum = p.weights ? fma(set(p.weights[r * p.k + j]), y, sum) : sum + y;
                }
                v.store(out + c, residual ? sum + v.load(residual + c) : sum);
            });
        }
    });
}

void combine_backward(const MoeCombineBackward& p) {
    parallel_for(p.R, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * p.k; i < end * p.k; ++i) {
            const int64_t slot = p.slots[i];
            p.dweights[i] = 0.0f;
            if (slot < 0) continue;
            const float *dout = p.dout + i / p.k * p.C, *y = p.y + slot * p.C;
            float* dy = p.dy + slot * p.C;
            const vf weight = set(p.weights[i]);
            vf sums[4] = {zero(), zero(), zero(), zero()};
            each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
                const vf d = v.load(dout + c);
                sums[u] = fma(d, v.load(y + c), sums[u]);
                v.store(dy + c, weight * d);
            });
            p.dweights[i] = reduce_add_4(sums);
        }
    });
}

}  // namespace

extern const MoeKernels moe_kernels = {route, places, gather, combine, combine_backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
