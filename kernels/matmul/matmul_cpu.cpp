#include "matmul.h"

#include <cstring>

#include "gemm.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

FASTLM_INLINE vf load_as_float(const float* p) { return load(p); }
FASTLM_INLINE vf load_as_float(const Bfloat16* p) { return load_bf16(&p->bits); }
FASTLM_INLINE vf load_as_float(const Float16* p) { return load_f16(&p->bits); }
FASTLM_INLINE vf load_as_float_n(const float* p, int64_t n) { return load_n(p, n); }
template <class T> FASTLM_INLINE vf load_as_float_n(const T* p, int64_t n) {
    T t[W] = {};
    for (int64_t i = 0; i < (n < W ? n : W); ++i) t[i] = p[i];
    return load_as_float(t);
}

// `runs` runs of n elements, `stride` elements from one to the next.
template <class T> FASTLM_INLINE Ahead ahead_of(const T* from, int64_t n, int64_t stride, int64_t runs) {
    const int64_t lines = ceil_div(n * int64_t(sizeof(T)), 64);
    return {reinterpret_cast<const char*>(from), lines, stride * int64_t(sizeof(T)) - lines * 64, runs, lines};
}

// B as it lies, (K, N).
template <class T> struct Rows {
    static constexpr bool kFuses = false;
    template <int M> static constexpr int64_t kColumns = NR;
    const T* b;
    int64_t N;

    void pack(float* out, int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        for (int64_t k = 0; k < kc; ++k) {
            const T* from = b + (k0 + k) * N + column;
            __builtin_prefetch(from + 4 * N, 0, 2);
            float* to = out + k * NR;
            int64_t n = 0;
            for (; n + NR <= columns; n += NR, to += kc * NR)
#pragma GCC unroll 4
                for (int j = 0; j < NV; ++j) store(to + j * W, load_as_float(from + n + j * W));
            if (n < columns)
                for (int j = 0; j < NV; ++j) {
                    const int64_t left = columns - n - j * W;
                    store(to + j * W, left > 0 ? load_as_float_n(from + n + j * W, left) : zero());
                }
        }
    }
    Ahead ahead(int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        return ahead_of(b + k0 * N + column, columns, N, kc);
    }
    template <int M> void fused(const float*, int64_t, int64_t, int64_t, float*, int64_t, const float*) const {}
};

// A weight (N, K), float32 or bfloat16: transposed in registers on the way.
template <class T> struct Columns {
    static constexpr bool kFuses = true;
    template <int M> static constexpr int64_t kColumns = W;
    const T* b;
    int64_t N, K;

    // W values of k, from k on, of W columns, as vectors over the columns.
    FASTLM_MEMBER void tile(vf (&r)[W], int64_t k, int64_t n, int64_t column, int64_t columns) const {
        const T* from = b + column * K + k;
        // The next lines of these rows; at their end, the beginning of the next W rows.
        const int64_t ahead = k + kAhead < K ? kAhead : kAhead + (W - 1) * K;
        if (columns >= W && n >= W) {
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) {
                __builtin_prefetch(from + j * K + ahead, 0, 2);
                r[j] = load_as_float(from + j * K);
            }
        } else {
            for (int j = 0; j < W; ++j) r[j] = j < columns ? load_as_float_n(from + j * K, n) : zero();
        }
        transpose(r);
    }
    // Into L2: asked for in L1, the lines of so many rows wait for the few fill buffers that it has (23 GB/s became 15).
    static constexpr int64_t kAhead = 1024 / int64_t(sizeof(T));

    void pack(float* out, int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        for (int64_t n = 0; n < columns; n += NR, out += kc * NR)
            for (int j = 0; j < NV; ++j)
                for (int64_t k = 0; k < kc; k += W) {
                    vf r[W];
                    const int64_t left = least(W, kc - k);
                    tile(r, k0 + k, left, column + n + j * W, columns - n - j * W);
                    float* to = out + k * NR + j * W;
                    if (left == W) {
#pragma GCC unroll 16
                        for (int t = 0; t < W; ++t) store(to + t * NR, r[t]);
                    } else {
                        for (int t = 0; t < left; ++t) store(to + t * NR, r[t]);
                    }
                }
    }

    Ahead ahead(int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        return ahead_of(b + column * K + k0, kc, K, columns);
    }

    template <int M>
    void fused(const float* a, int64_t depth, int64_t column, int64_t columns, float* sum, int64_t ld, const float* bias) const {
        for (int64_t n = 0; n < columns; n += W) {
            vf acc[M];
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) acc[i] = zero();
            const float* x = a;
            int64_t k = 0;
            for (; k + W <= depth; k += W, x += W * M) {
                vf r[W];
                tile(r, k, W, column + n, columns - n);
#pragma GCC unroll 16
                for (int t = 0; t < W; ++t)
#pragma GCC unroll 16
                    for (int i = 0; i < M; ++i) acc[i] = fma(set(x[t * M + i]), r[t], acc[i]);
            }
            if (k < depth) {
                vf r[W];
                tile(r, k, depth - k, column + n, columns - n);
                for (int t = 0; t < depth - k; ++t)
                    for (int i = 0; i < M; ++i) acc[i] = fma(set(x[t * M + i]), r[t], acc[i]);
            }
            const int64_t left = columns - n;
            for (int i = 0; i < M; ++i) {
                const vf v = bias ? acc[i] + load_n(bias + n, left) : acc[i];
                store_n(sum + i * ld + n, v, left);
            }
        }
    }
};

int64_t floats_each(const Matmul& p) { return (packed_a_size(p.M, p.K) + 15) / 16 * 16; }
// Whole products are dealt to the threads where there are enough of them; each then packs into its thread's scratch.
bool by_batch(const Matmul& p) { return p.batch >= 2 && (p.batch >= 2 * num_threads() || p.M * p.N * p.K < kAlone); }
int64_t workspace(const Matmul& p) { return by_batch(p) ? 0 : floats_each(p) * int64_t(sizeof(float)); }

template <class T>
void of_type(const Matmul& p, int64_t i, const Product& product, float* packed_a, float* packed_b, bool parallel) {
    const T* b = static_cast<const T*>(p.b) + i * p.b_step;
    if (p.b_transposed) gemm(product, Columns<T>{b, p.N, p.K}, packed_a, packed_b, parallel);
    else gemm(product, Rows<T>{b, p.N}, packed_a, packed_b, parallel);
}

void one(const Matmul& p, int64_t i, float* packed_a, float* packed_b, bool parallel) {
    const int64_t at = i * p.M * p.N;
    const Target target =
        make_target(p.c + at, p.z ? p.z + at : nullptr, p.bias, p.residual ? p.residual + at : nullptr, p.N, p.activation);
    const Product product{p.a + i * p.a_step, p.M, p.N, p.K, p.a_transposed, p.accumulate, target};
    if (p.b_type == Storage::float32) of_type<float>(p, i, product, packed_a, packed_b, parallel);
    else if (p.b_type == Storage::bfloat16) of_type<Bfloat16>(p, i, product, packed_a, packed_b, parallel);
    else of_type<Float16>(p, i, product, packed_a, packed_b, parallel);
}

void matmul(const Matmul& p) {
    if (!by_batch(p)) {
        for (int64_t i = 0; i < p.batch; ++i) one(p, i, p.workspace, nullptr, true);
        return;
    }
    const int64_t each = p.M * p.N * p.K, grain = each >= kAlone ? 1 : kAlone / (each + 1) + 1;
    parallel_for(p.batch, grain, [&](int64_t begin, int64_t end) {
        float* packed_b = static_cast<float*>(scratch(size_t(kPackedB + floats_each(p)) * sizeof(float)));
        for (int64_t i = begin; i < end; ++i) one(p, i, packed_b + kPackedB, packed_b, false);
    });
}

template <Activation A> void backward_rows(const LinearBackward& p, int64_t begin, int64_t end, float* partial) {
    for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < p.N; c += W) {
            const int64_t n = p.N - c, at = r * p.N + c;
            vf d = load_n(p.dy + at, n);
            if constexpr (A != Activation::none) {
                d = d * derivative<A>(load_n(p.z + at, n));
                store_n(p.dz + at, d, n);
            }
            if (partial) store_n(partial + c, d + load_n(partial + c, n), n);
        }
}

void linear_backward(const LinearBackward& p) {
    using Pass = void (*)(const LinearBackward&, int64_t, int64_t, float*);
    static const Pass passes[] = {backward_rows<Activation::none>, backward_rows<Activation::gelu>,
                                  backward_rows<Activation::gelu_tanh>, backward_rows<Activation::silu>,
                                  backward_rows<Activation::relu>};
    parallel_for(p.M, kLinearRows, [&](int64_t begin, int64_t end) {
        float* partial = p.dbias ? p.partial + begin / kLinearRows * p.N : nullptr;
        if (partial) std::memset(partial, 0, size_t(p.N) * sizeof(float));
        passes[int(p.activation)](p, begin, end, partial);
    });
    if (!p.dbias) return;
    const int64_t pieces = ceil_div(p.M, kLinearRows);
    parallel_for(p.N, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; c += W) {
            vf sum = zero();
            for (int64_t i = 0; i < pieces; ++i) sum = sum + load_n(p.partial + i * p.N + c, end - c);
            store_n(p.dbias + c, load_n(p.dbias + c, end - c) + sum, end - c);
        }
    });
}

}  // namespace

extern const MatmulKernels matmul_kernels = {workspace, matmul, linear_backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
