#include "gated.h"

#include "csrc/runtime/parallel.h"
#include "csrc/simd/activation.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kGrain = 8192;  // elements of a piece

// f(r, c, n): n <= kGrain elements of row r from column c. Pieces are whole rows where rows are short, else parts of one row, so
// that a single long row is shared between threads as well.
template <class F> void each_span(int64_t R, int64_t F_, const F& f) {
    if (F_ <= 0) return;
    if (F_ <= kGrain / 2) {
        parallel_for(R, kGrain / F_, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) f(r, 0, F_);
        });
        return;
    }
    const int64_t per_row = (F_ + kGrain - 1) / kGrain;
    parallel_for(R * per_row, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t c = i % per_row * kGrain;
            f(i / per_row, c, F_ - c < kGrain ? F_ - c : kGrain);
        }
    });
}

template <Activation kind> void forward_as(const GatedForward& p) {
    each_span(p.R, p.F, [&](int64_t r, int64_t first, int64_t n) {
        const float *gate = p.gate + r * p.gate_stride + first, *up = p.up + r * p.up_stride + first;
        float* y = p.y + r * p.F + first;
        each_vector(n, [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(y + c, activate<kind>(v.load(gate + c)) * v.load(up + c)); });
    });
}

template <Activation kind> void backward_as(const GatedBackward& p) {
    each_span(p.R, p.F, [&](int64_t r, int64_t first, int64_t n) {
        const float *gate = p.gate + r * p.gate_stride + first, *up = p.up + r * p.up_stride + first;
        const float* dy = p.dy + r * p.F + first;
        float *dgate = p.dgate + r * p.dgate_stride + first, *dup = p.dup + r * p.dup_stride + first;
        each_vector(n, [&](int64_t c, auto v) FASTLM_LAMBDA {
            vf derivative;
            const vf d = v.load(dy + c), a = activate<kind>(v.load(gate + c), &derivative);
            v.store(dgate + c, d * v.load(up + c) * derivative);
            v.store(dup + c, d * a);
        });
    });
}

void forward(const GatedForward& p) {
    switch (p.kind) {
        case Activation::none: return forward_as<Activation::none>(p);
        case Activation::gelu: return forward_as<Activation::gelu>(p);
        case Activation::gelu_tanh: return forward_as<Activation::gelu_tanh>(p);
        case Activation::silu: return forward_as<Activation::silu>(p);
        case Activation::relu: return forward_as<Activation::relu>(p);
    }
}

void backward(const GatedBackward& p) {
    switch (p.kind) {
        case Activation::none: return backward_as<Activation::none>(p);
        case Activation::gelu: return backward_as<Activation::gelu>(p);
        case Activation::gelu_tanh: return backward_as<Activation::gelu_tanh>(p);
        case Activation::silu: return backward_as<Activation::silu>(p);
        case Activation::relu: return backward_as<Activation::relu>(p);
    }
}

}  // namespace

extern const GatedKernels gated_kernels = {forward, backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
