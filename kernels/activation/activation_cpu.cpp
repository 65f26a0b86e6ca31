#include "activation.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/activation.h"
#include "csrc/simd/gelu_table.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements: 32 KB in and out, small against a core's L2

template <Activation kind> void forward_as(const ActivationForward& p) {
    parallel_for(p.n, kGrain, [&](int64_t begin, int64_t end) {
        each_vector(end - begin,
                    [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(p.y + begin + c, activate<kind>(v.load(p.x + begin + c))); });
    });
}

template <Activation kind> void backward_as(const ActivationBackward& p) {
    parallel_for(p.n, kGrain, [&](int64_t begin, int64_t end) {
        each_vector(end - begin, [&](int64_t c, auto v) FASTLM_LAMBDA {
            vf derivative;
            activate<kind>(v.load(p.x + begin + c), &derivative);
            v.store(p.dx + begin + c, v.load(p.dy + begin + c) * derivative);
        });
    });
}

void forward(const ActivationForward& p) {
    switch (p.kind) {
        case Activation::none: return forward_as<Activation::none>(p);
        case Activation::gelu: return forward_as<Activation::gelu>(p);
        case Activation::gelu_tanh: return forward_as<Activation::gelu_tanh>(p);
        case Activation::silu: return forward_as<Activation::silu>(p);
        case Activation::relu: return forward_as<Activation::relu>(p);
    }
}

void backward(const ActivationBackward& p) {
    switch (p.kind) {
        case Activation::none: return backward_as<Activation::none>(p);
        case Activation::gelu: return backward_as<Activation::gelu>(p);
        case Activation::gelu_tanh: return backward_as<Activation::gelu_tanh>(p);
        case Activation::silu: return backward_as<Activation::silu>(p);
        case Activation::relu: return backward_as<Activation::relu>(p);
    }
}

template <class F> void map(float* y, const float* x, int64_t n, const F& f) {
    each_vector(n, [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(y + c, f(v.load(x + c))); });
}

bool probe(const char* name, float* y, const float* x, int64_t n) {
    const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
    if (is("exp")) return map(y, x, n, [](vf v) { return exp(v); }), true;
    if (is("log")) return map(y, x, n, [](vf v) { return log(v); }), true;
    if (is("tanh")) return map(y, x, n, [](vf v) { return tanh(v); }), true;
    if (is("erf")) return map(y, x, n, [](vf v) { return erf(v); }), true;
    if (is("gelu_table")) return map(y, x, n, [](vf v) { return gelu_table(v); }), true;
    if (is("gelu_tanh_table")) return map(y, x, n, [](vf v) { return gelu_tanh_table(v); }), true;
    if (is("gelu_slope")) return map(y, x, n, [](vf v) { return gelu_slope(v); }), true;
    if (is("gelu_tanh_slope")) return map(y, x, n, [](vf v) { return gelu_tanh_slope(v); }), true;
    if (is("sigmoid")) return map(y, x, n, [](vf v) { return sigmoid(v); }), true;
    if (is("round")) return map(y, x, n, [](vf v) { return round(v); }), true;
    if (is("bfloat16")) {  // rounds to bfloat16 and back
        for (int64_t c = 0; c < n; c += W) {
            uint16_t u[W];
            store_bf16(u, load_n(x + c, n - c));
            store_n(y + c, load_bf16(u), n - c);
        }
        return true;
    }
    if (is("width")) return map(y, x, n, [](vf) { return set(float(W)); }), true;
    if (is("nested")) {  // a parallel region inside the pieces of another
        parallel_for(n, 64, [&](int64_t begin, int64_t end) {
            parallel_for(end - begin, 8, [&](int64_t first, int64_t last) {
                for (int64_t i = begin + first; i < begin + last; ++i) y[i] = x[i] + 1.0f;
            });
        });
        return true;
    }
    // Reductions: y[i] for every prefix, up to lane i, of the vector that holds x[i].
    const bool add = is("reduce_add");
    if (!add && !is("reduce_max")) return false;
    for (int64_t i = 0; i < n; ++i) {
        const vf v = load_n(x + i / W * W, i % W + 1);
        y[i] = add ? reduce_add(v) : reduce_max(v);
    }
    return true;
}

}  // namespace

extern const ActivationKernels activation_kernels = {forward, backward, probe};

}  // namespace FASTLM_ISA
}  // namespace fastlm
