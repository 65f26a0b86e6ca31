#include "adamw.h"

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

void step(const AdamWStep& p) {
    const vf beta2 = set(p.beta2), rest1 = set(p.beta1_rest), rest2 = set(p.beta2_rest);
    const vf step_size = set(p.step_size), bias2 = set(p.bias2), eps = set(p.eps), scale = set(p.scale);
    parallel_for(p.piece_count, 1, [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k) {
            const TensorPiece& piece = p.pieces[k];
            const AdamWTensor& t = p.tensors[piece.tensor];
            const vf keep = set(t.keep);
            auto update = [&](int64_t i, auto get, auto put) {
                const vf g = get(t.gradient + i) * scale;
                const vf m0 = get(t.m + i);
                const vf m = fma(rest1, g - m0, m0);
                const vf v = fma(rest2 * g, g, beta2 * get(t.v + i));
                put(t.m + i, m);
                put(t.v + i, v);
                put(t.parameter + i, fnma(step_size, m / (sqrt(v) / bias2 + eps), get(t.parameter + i) * keep));
            };
            int64_t i = piece.begin;
            for (; i + W <= piece.end; i += W)
                update(i, [](const float* x) { return load(x); }, [](float* x, vf y) { store(x, y); });
            const int64_t n = piece.end - i;
            if (n > 0) update(i, [n](const float* x) { return load_n(x, n); }, [n](float* x, vf y) { store_n(x, y, n); });
        }
    });
}

// Eight float64 lanes on every instruction set: the same order of summation, hence the same bits.
typedef double Lanes __attribute__((vector_size(64)));
typedef float Narrow __attribute__((vector_size(32)));

void square_sum(const SquareSum& p) {
    parallel_for(p.piece_count, 1, [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k) {
            const TensorPiece& piece = p.pieces[k];
            const float* x = p.arrays[piece.tensor] + piece.begin;
            const int64_t n = piece.end - piece.begin;
            Lanes a = {}, b = {};
            int64_t i = 0;
            for (; i + 16 <= n; i += 16) {
                Narrow u, w;
                __builtin_memcpy(&u, x + i, sizeof u);
                __builtin_memcpy(&w, x + i + 8, sizeof w);
                const Lanes s = __builtin_convertvector(u, Lanes), t = __builtin_convertvector(w, Lanes);
                a += s * s;
                b += t * t;
            }
            a += b;
            double sum = 0;
            for (int j = 0; j < 8; ++j) sum += a[j];
            for (; i < n; ++i) sum += double(x[i]) * double(x[i]);
            p.partial[k] = sum;
        }
    });
}

}  // namespace

extern const AdamWKernels adamw_kernels = {step, square_sum};

}  // namespace FASTLM_ISA
}  // namespace fastlm
