#include "cross_entropy.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kBlock = 1024;               // floats that one step of the online pass takes: they stay in L1
constexpr int64_t kStream = int64_t(4) << 20;  // floats from which a gradient is not read back from cache

// Rows of a piece: few enough that threads finish together, but not worth waking one for a small call.
int64_t grain(int64_t R, int64_t V) {
    const int64_t size = V > 0 ? V : 1, alone = 16384 / size, rows = R <= alone ? alone : 4096 / size;
    return rows > 0 ? rows : 1;
}

// Maximum of n floats. A nan may be lost here; the sum of exponentials keeps it.
float block_max(const float* x, int64_t n) {
    vf a = set(-INFINITY), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        a = max(a, load(x + i));
        b = max(b, load(x + i + W));
        c = max(c, load(x + i + 2 * W));
        d = max(d, load(x + i + 3 * W));
    }
    for (; i + W <= n; i += W) a = max(a, load(x + i));
    float most = reduce_max(max(max(a, b), max(c, d)));
    for (; i < n; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// Sum of exp(x - m) over n floats; e, which may be x, keeps the terms unless it is null.
template <bool kKeep> float block_sum(float* e, const float* x, int64_t n, float m) {
    const vf shift = set(m);
    vf sum[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const vf term = exp(load(x + i + j * W) - shift);
            if (kKeep) store(e + i + j * W, term);
            sum[j] = sum[j] + term;
        }
    for (; i < n; i += W) {
        float tail[W];
        store(tail, set(-INFINITY));
        for (int64_t j = i; j < n && j < i + W; ++j) tail[j - i] = x[j];
        const vf term = exp(load(tail) - shift);
        if (kKeep) store_n(e + i, term, n - i);
        sum[1] = sum[1] + term;
    }
    return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

struct Normaliser {
    float most;
    double sum;  // of exp(x - most)
};

// Online softmax normaliser, Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3, a block at a time. Where e is given, block
// b of it keeps exp(x - reference[b]), the reference being the maximum so far.
template <bool kKeep> Normaliser normaliser(const float* x, int64_t V, float* e = nullptr, float* reference = nullptr) {
    float most = -INFINITY;
    double sum = 0;
    for (int64_t i = 0; i < V; i += kBlock) {
        const int64_t n = V - i < kBlock ? V - i : kBlock;
        const float m = block_max(x + i, n);
        if (!(m <= most)) {
            if (sum != 0) sum *= std::exp(double(most) - double(m));
            most = m;
        }
        sum += block_sum<kKeep>(e + i, x + i, n, most == -INFINITY ? 0.0f : most);  // -inf - -inf would be nan
        if (kKeep) reference[i / kBlock] = most;
    }
    return {most, sum};
}

// y[i] = f(i) a vector at a time, and at the ends g(i, n) for n elements. A streamed store bypasses the caches: no line is read in
// order to be overwritten.
template <class F, class G> FASTLM_INLINE void put(float* y, int64_t begin, int64_t end, bool streamed, const F& f, const G& g) {
    int64_t i = begin;
    if (streamed) {
        const int64_t ahead = int64_t((64 - (reinterpret_cast<uintptr_t>(y + begin) & 63)) / 4 % 16);
        const int64_t stop = begin + ahead < end ? begin + ahead : end;
        for (; i < stop; i += W) store_n(y + i, g(i, stop - i), stop - i);
        for (i = stop; i + W <= end; i += W) stream(y + i, f(i));
    } else {
        for (; i + W <= end; i += W) store(y + i, f(i));
    }
    if (i < end) store_n(y + i, g(i, end - i), end - i);
}

// (softmax(x)[target] - 1) * scale, where x is what the target's logit was.
float at_target(float x, float m, float inverse, float scale) {
    float p[W];
    store(p, exp(set(x) - set(m)) * set(inverse));
    return (p[0] - 1.0f) * scale;
}

// The gradient from the terms that `normaliser` kept.
void gradient_from_terms(float* y, const float* e, const float* reference, int64_t V, const Normaliser& n, float scale,
                         bool streamed) {
    const float inverse = float(1 / n.sum);
    for (int64_t i = 0; i < V; i += kBlock) {
        const float m = reference[i / kBlock];
        // Before the first number the terms are 0 and their reference means nothing; nan times 0 stays nan.
        const vf factor = set((m == -INFINITY ? 0.0f : m == n.most ? 1.0f : std::exp(m - n.most)) * inverse * scale);
        put(
            y, i, V - i < kBlock ? V : i + kBlock, streamed, [&](int64_t j) { return load(e + j) * factor; },
            [&](int64_t j, int64_t k) { return load_n(e + j, k) * factor; });
    }
}

void zero_row(float* y, int64_t V) { std::memset(y, 0, size_t(V) * sizeof(float)); }

void forward(const CrossEntropyForward& p) {
    const bool streamed = p.R * p.V >= kStream && p.dlogits != p.logits;
    const int64_t blocks = (p.V + kBlock - 1) / kBlock;
    parallel_for(p.R, grain(p.R, p.V), [&](int64_t begin, int64_t end) {
        float* terms = static_cast<float*>(scratch(size_t(blocks * kBlock + blocks) * sizeof(float)));
        float* reference = terms + blocks * kBlock;
        for (int64_t r = begin; r < end; ++r) {
            const float* x = p.logits + r * p.V;
            const int64_t target = p.targets[r];
            if (target == p.ignore_index) {
                p.loss[r] = 0.0f;
                p.stats[2 * r] = 0.0f;
                p.stats[2 * r + 1] = 0.0f;
                if (p.dlogits) zero_row(p.dlogits + r * p.V, p.V);
                continue;
            }
            const float x_target = x[target];  // dlogits may be logits
            float* y = p.dlogits ? p.dlogits + r * p.V : nullptr;
            float* e = streamed && y ? terms : y;
            const Normaliser n = y ? normaliser<true>(x, p.V, e, reference) : normaliser<false>(x, p.V);
            p.loss[r] = float(std::log(n.sum) - (double(x_target) - double(n.most)));
            p.stats[2 * r] = n.most;
            p.stats[2 * r + 1] = float(1 / n.sum);
            if (!y) continue;
            gradient_from_terms(y, e, reference, p.V, n, p.scale, streamed);
            y[target] = at_target(x_target, n.most, float(1 / n.sum), p.scale);
        }
        if (streamed) fence();
    });
}

void backward(const CrossEntropyBackward& p) {
    const bool streamed = p.R * p.V >= kStream;
    parallel_for(p.R, grain(p.R, p.V), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            float* y = p.dlogits + r * p.V;
            if (p.targets[r] == p.ignore_index) {
                zero_row(y, p.V);
                continue;
            }
            const float* x = p.logits + r * p.V;
            const float m = p.stats[2 * r], inverse = p.stats[2 * r + 1];
            const vf shift = set(m), scale = set(inverse * p.dy[r]);
            put(
                y, 0, p.V, streamed, [&](int64_t j) { return exp(load(x + j) - shift) * scale; },
                [&](int64_t j, int64_t n) { return exp(load_n(x + j, n) - shift) * scale; });
            y[p.targets[r]] = at_target(x[p.targets[r]], m, inverse, p.dy[r]);
        }
        if (streamed) fence();
    });
}

void log_softmax(const LogSoftmax& p) {
    parallel_for(p.R, grain(p.R, p.V), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const float* x = p.logits + r * p.V;
            float* y = p.y + r * p.V;
            const Normaliser n = normaliser<false>(x, p.V);
            const vf most = set(n.most), logsum = set(float(std::log(n.sum)));
            int64_t i = 0;
            for (; i + W <= p.V; i += W) store(y + i, (load(x + i) - most) - logsum);
            if (i < p.V) store_n(y + i, (load_n(x + i, p.V - i) - most) - logsum, p.V - i);
        }
    });
}

void scale_add(const ScaleAdd& p) {
    const vf a = set(p.a);
    parallel_for(p.n, 65536, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += W) {
            const int64_t n = end - i;
            const vf x = load_n(p.x + i, n) * a;
            store_n(p.y + i, p.z ? load_n(p.z + i, n) + x : x, n);
        }
    });
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels = {forward, backward, log_softmax, scale_add};

}  // namespace FASTLM_ISA
}  // namespace fastlm
