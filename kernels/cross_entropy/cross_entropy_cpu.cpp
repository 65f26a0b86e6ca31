#include "cross_entropy.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kBlock = 1024;               // floats that one step of the online pass takes: they stay in L1
constexpr int64_t kStream = int64_t(4) << 20;  // floats from which a gradient is not read back from cache

int64_t grain(int64_t V) { return V >= 16384 ? 1 : 16384 / (V > 0 ? V : 1); }

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

// Sum of exp(x - m) over n floats.
float block_sum(const float* x, int64_t n, float m) {
    const vf shift = set(m);
    vf a = zero(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        a = a + exp(load(x + i) - shift);
        b = b + exp(load(x + i + W) - shift);
        c = c + exp(load(x + i + 2 * W) - shift);
        d = d + exp(load(x + i + 3 * W) - shift);
    }
    for (; i + W <= n; i += W) a = a + exp(load(x + i) - shift);
    if (i < n) {
        float tail[W];
        store(tail, set(-INFINITY));
        for (int64_t j = i; j < n; ++j) tail[j - i] = x[j];
        b = b + exp(load(tail) - shift);
    }
    return reduce_add((a + b) + (c + d));
}

struct Normaliser {
    float most;
    double sum;  // of exp(x - most)
};

// Online softmax normaliser, Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3, a block at a time.
Normaliser normaliser(const float* x, int64_t V) {
    float most = -INFINITY;
    double sum = 0;
    for (int64_t i = 0; i < V; i += kBlock) {
        const int64_t n = V - i < kBlock ? V - i : kBlock;
        const float m = block_max(x + i, n);
        if (!(m <= most)) {
            if (sum != 0) sum *= std::exp(double(most) - double(m));
            most = m;
        }
        sum += block_sum(x + i, n, most == -INFINITY ? 0.0f : most);  // -inf - -inf would be nan
    }
    return {most, sum};
}

// y = exp(x - m) * scale. A streamed store bypasses the caches: no line is read in order to be overwritten.
void softmax_row(float* y, const float* x, int64_t V, float m, float scale, bool streamed) {
    const vf shift = set(m), s = set(scale);
    int64_t i = 0;
    if (streamed) {
        const int64_t ahead = (64 - int64_t(reinterpret_cast<uintptr_t>(y) & 63)) / 4 % 16;
        for (; i < ahead && i < V; i += W)
            store_n(y + i, exp(load_n(x + i, ahead - i) - shift) * s, ahead - i < V - i ? ahead - i : V - i);
        i = ahead < V ? ahead : V;
        for (; i + W <= V; i += W) stream(y + i, exp(load(x + i) - shift) * s);
    } else {
        for (; i + W <= V; i += W) store(y + i, exp(load(x + i) - shift) * s);
    }
    if (i < V) store_n(y + i, exp(load_n(x + i, V - i) - shift) * s, V - i);
}

void gradient_row(float* y, const float* x, int64_t V, int64_t target, float m, float inverse, float scale, bool streamed) {
    const float x_target = x[target];  // y may be x
    softmax_row(y, x, V, m, inverse * scale, streamed);
    float p[W];
    store(p, exp(set(x_target) - set(m)) * set(inverse));
    y[target] = (p[0] - 1.0f) * scale;
}

void zero_row(float* y, int64_t V) { std::memset(y, 0, size_t(V) * sizeof(float)); }

void forward(const CrossEntropyForward& p) {
    const bool streamed = p.R * p.V >= kStream && p.dlogits != p.logits;
    parallel_for(p.R, grain(p.V), [&](int64_t begin, int64_t end) {
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
            const Normaliser n = normaliser(x, p.V);
            p.loss[r] = float(std::log(n.sum) - (double(x[target]) - double(n.most)));
            p.stats[2 * r] = n.most;
            p.stats[2 * r + 1] = float(1 / n.sum);
            if (p.dlogits) gradient_row(p.dlogits + r * p.V, x, p.V, target, n.most, float(1 / n.sum), p.scale, streamed);
        }
        if (streamed) fence();
    });
}

void backward(const CrossEntropyBackward& p) {
    const bool streamed = p.R * p.V >= kStream;
    parallel_for(p.R, grain(p.V), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            float* y = p.dlogits + r * p.V;
            if (p.targets[r] == p.ignore_index) {
                zero_row(y, p.V);
                continue;
            }
            gradient_row(y, p.logits + r * p.V, p.V, p.targets[r], p.stats[2 * r], p.stats[2 * r + 1], p.dy[r], streamed);
        }
        if (streamed) fence();
    });
}

void log_softmax(const LogSoftmax& p) {
    parallel_for(p.R, grain(p.V), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const float* x = p.logits + r * p.V;
            float* y = p.y + r * p.V;
            const Normaliser n = normaliser(x, p.V);
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
            store_n(p.y + i, p.add ? load_n(p.y + i, n) + x : x, n);
        }
    });
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels = {forward, backward, log_softmax, scale_add};

}  // namespace FASTLM_ISA
}  // namespace fastlm
