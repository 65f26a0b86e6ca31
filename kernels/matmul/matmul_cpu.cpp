#include "matmul.h"

#include <cstring>
#include <type_traits>

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

template <class T> constexpr bool kIsBfloat16 = false;
template <> constexpr bool kIsBfloat16<Bfloat16> = true;
template <class T> constexpr bool kIsFloat16 = false;
template <> constexpr bool kIsFloat16<Float16> = true;

FASTLM_INLINE vf load_as_float(const float* p) { return load(p); }
FASTLM_INLINE vf load_as_float(const Bfloat16* p) { return load_bf16(&p->bits); }
FASTLM_INLINE vf load_as_float(const Float16* p) { return load_f16(&p->bits); }
FASTLM_INLINE vf load_as_float_n(const float* p, int64_t n) { return load_n(p, n); }
template <class T> FASTLM_INLINE vf load_as_float_n(const T* p, int64_t n) {
    T t[W] = {};
    for (int64_t i = 0; i < (n < W ? n : W); ++i) t[i] = p[i];
    return load_as_float(t);
}

// sum (M, columns) = acc + bias. Stores under a mask are slow on some processors: only where they are needed.
template <int M, int S>
FASTLM_INLINE void finish_sums(vf (&acc)[M][S], float* sum, int64_t ld, const float* bias, int64_t columns) {
    if (bias)
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) {
            const vf v = load_n(bias + s * W, columns - s * W);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) acc[i][s] = acc[i][s] + v;
        }
    if (columns >= S * W) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) store(sum + i * ld + s * W, acc[i][s]);
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) store_n(sum + i * ld + s * W, acc[i][s], columns - s * W);
    }
}

// B as it lies, (K, N).
template <class T> struct Rows {
    static constexpr int kFusedRows = kRegisters == 16 ? 3 : kFused;
    // Vectors of columns for a few rows: as many as there are registers for, so that memory is read in long runs of whole lines.
    static constexpr int vectors(int rows) {
        if (kRegisters == 16) return rows == 1 ? 8 : rows <= 3 ? 4 : 2;
        return rows <= 3 ? 8 : 24 / rows;
    }
    template <int M> static constexpr int64_t kColumns = vectors(M) * W;
    const T* b;
    int64_t N, K;

    void pack(float* out, int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        for (int64_t k = 0; k < kc; ++k) {
            const T* from = b + (k0 + k) * N + column;
            __builtin_prefetch(from + 4 * N, 0, 2);
            float* to = out + k * NR;
            int64_t n = 0;
            for (; n + NR <= columns; n += NR, to += kc * NR)
#pragma GCC unroll 4
                for (int j = 0; j < NV; ++j) store(to + j * W, load_as_float(from + n + j * W));
            for (int j = 0; n + j * W < columns; ++j) store(to + j * W, load_as_float_n(from + n + j * W, columns - n - j * W));
        }
    }
    Ahead ahead(int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        return ahead_of(b + k0 * N + column, columns, N, kc);
    }

    // kPacked: a is (K, M); else it lies as it came, (M, K). It is read up to kFusedRows or kTinyRows rows at once.
    template <int M, int S = vectors(M), bool kPacked = true>
    void fused(const float* a, int64_t depth, int64_t column, int64_t columns, float* sum, int64_t ld, const float* bias) const {
        if constexpr (S > 1) {
            constexpr int64_t half = S / 2 * W;
            if (columns < S * W) {
                for (int64_t n = 0; n < columns; n += half)
                    fused<M, S / 2, kPacked>(a, depth, column + n, least(half, columns - n), sum + n, ld,
                                             bias ? bias + n : nullptr);
                return;
            }
        }
        walk<M, S, kPacked>(a, column, columns, sum, ld, bias);
    }

    template <int M, int S, bool kPacked>
    void walk(const float* a, int64_t column, int64_t columns, float* sum, int64_t ld, const float* bias) const {
        constexpr int64_t kLines = S * W * int64_t(sizeof(T)) / 64, kAhead = kLines ? 128 / kLines : 128;  // 8 KB, in rows of B
        vf acc[M][S];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) acc[i][s] = zero();
        const auto chain = [&](const auto& vector) FASTLM_LAMBDA {
            const T* from = b + column;
            for (int64_t k = 0; k < K; ++k, from += N) {
                if constexpr (kPacked) {  // at the end of these columns, the next ones
                    const T* ahead = k + kAhead < K ? from + kAhead * N : from + (kAhead - K) * N + S * W;
#pragma GCC unroll 8
                    for (int64_t line = 0; line < kLines; ++line)
                        __builtin_prefetch(reinterpret_cast<const char*>(ahead) + line * 64, 0, 2);
                }
                vf v[S];
#pragma GCC unroll 8
                for (int s = 0; s < S; ++s) v[s] = vector(from, s);
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i) {
                    const vf x = set(kPacked ? a[k * M + i] : a[i * K + k]);
#pragma GCC unroll 8
                    for (int s = 0; s < S; ++s) acc[i][s] = fma(x, v[s], acc[i][s]);
                }
            }
        };
        if (columns >= S * W) chain([](const T* from, int s) FASTLM_LAMBDA { return load_as_float(from + s * W); });
        else chain([&](const T* from, int s) FASTLM_LAMBDA { return load_as_float_n(from + s * W, columns - s * W); });
        finish_sums(acc, sum, ld, bias, columns);
    }
};

// A weight (N, K): transposed in registers on the way.
template <class T> struct Columns {
    static constexpr int kFusedRows = kFused;
    // Vectors of columns that walk together: a few rows alone are too few chains of multiply-adds to hide their latency.
    static constexpr int vectors(int rows) {
        if (kRegisters == 16) return rows <= 2 ? 2 : 1;
        return rows == 1 && kPairs ? 2 : 1;
    }
    template <int M> static constexpr int64_t kColumns = vectors(M) * W;
    static constexpr bool kPairs = kIsBfloat16<T>;        // two values move through the shuffles as one float
    static constexpr int64_t kTile = kPairs ? 2 * W : W;  // values of k
    static constexpr int64_t kBytes = int64_t(sizeof(T));
    // Into L2: asked for in L1, the lines of so many rows wait for the few fill buffers that it has (23 GB/s became 15).
    static constexpr int64_t kAhead = 1024 / kBytes;
    const T* b;
    int64_t N, K;

    // f(t, v) with v over W columns, for t = 0 .. kTile - 1. `next`: columns from here to those that follow at the end of the row.
    // kWhole loads whole rows of the tile: more shuffles, but rows that share a place in L1 are touched once.
    template <bool kWhole, class F> FASTLM_MEMBER void tile(int64_t k, int64_t column, int64_t next, const F& f) const {
        const T* from = b + column * K + k;
        if (kTile * kBytes % 64 == 0 || k * kBytes % 64 == 0) {
            const T* ahead = from + (k + kAhead < K ? kAhead : kAhead + (next - 1) * K);
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) __builtin_prefetch(ahead + j * K, 0, 2);
        }
        vf r[W];
        if constexpr (kWhole || kIsFloat16<T>) {
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j) r[j] = load_as_float(from + j * K);
            transpose(r);
        } else {
            load_transposed(r, [&](int j) FASTLM_LAMBDA { return from + j * K; });
        }
#pragma GCC unroll 16
        for (int t = 0; t < W; ++t) {
            if constexpr (kPairs) {
                f(2 * t, as_float(shl<16>(as_int(r[t]))));
                f(2 * t + 1, as_float(andi(as_int(r[t]), seti(int32_t(0xFFFF0000)))));
            } else {
                f(t, r[t]);
            }
        }
#if defined(FASTLM_ISA_AVX512)
        asm volatile("" ::: "memory");  // tiles that gcc interleaves do not fit the registers
#endif
    }
    // The same at the edges: n <= W values of k, W columns or fewer.
    template <class F> void edge(int64_t k, int64_t n, int64_t column, int64_t columns, const F& f) const {
        vf r[W];
        for (int j = 0; j < W; ++j) r[j] = j < columns ? load_as_float_n(b + (column + j) * K + k, n) : zero();
        transpose(r);
        for (int t = 0; t < n; ++t) f(t, r[t]);
    }

    void pack(float* out, int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        for (int64_t n = 0; n < columns; n += NR, out += kc * NR)
            for (int j = 0; j < NV; ++j) {
                const int64_t left = columns - n - j * W, at = column + n + j * W;
                if (left <= 0) break;  // the product does not read it
                float* to = out + j * W;
                int64_t k = 0;
                if (left >= W)
                    for (; k + kTile <= kc; k += kTile, to += kTile * NR)
                        tile<false>(k0 + k, at, W, [&](int t, vf v) FASTLM_LAMBDA { store(to + t * NR, v); });
                for (; k < kc; k += W, to += W * NR)
                    edge(k0 + k, least(W, kc - k), at, left, [&](int t, vf v) FASTLM_LAMBDA { store(to + t * NR, v); });
            }
    }

    Ahead ahead(int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        return ahead_of(b + column * K + k0, kc, K, columns);
    }

    template <int M>
    void fused(const float* a, int64_t depth, int64_t column, int64_t columns, float* sum, int64_t ld, const float* bias) const {
        constexpr int S = vectors(M);
        if (columns >= S * W) return walk<M, S>(a, depth, column, S * W, sum, ld, bias);
        for (int64_t n = 0; n < columns; n += W)
            walk<M, 1>(a, depth, column + n, columns - n, sum + n, ld, bias ? bias + n : nullptr);
    }

    template <int M, int S>
    void walk(const float* a, int64_t depth, int64_t column, int64_t columns, float* sum, int64_t ld, const float* bias) const {
        constexpr bool kWhole = !kPairs && kRegisters == 32 && M <= 2;  // where the chains take as long as the shuffles
        vf acc[M][S];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s) acc[i][s] = zero();
        // A whole line of each row before the next rows; two values in one float are fast enough without.
        constexpr int64_t step = !kPairs && kTile * kBytes < 64 ? 64 / kBytes : kTile;
        const float* x = a;
        int64_t k = 0;
        if (columns >= S * W)
            for (; k + step <= depth; k += step, x += step * M)
#pragma GCC unroll 4
                for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
                    for (int64_t u = 0; u < step; u += kTile)
                        tile<kWhole>(k + u, column + s * W, S * W, [&](int t, vf w) FASTLM_LAMBDA {
#pragma GCC unroll 16
                            for (int i = 0; i < M; ++i) acc[i][s] = fma(set(x[(u + t) * M + i]), w, acc[i][s]);
                        });
        for (; k < depth; k += W, x += W * M)
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s)
                edge(k, least(W, depth - k), column + s * W, columns - s * W, [&](int t, vf w) FASTLM_LAMBDA {
#pragma GCC unroll 16
                    for (int i = 0; i < M; ++i) acc[i][s] = fma(set(x[t * M + i]), w, acc[i][s]);
                });
        finish_sums(acc, sum, ld, bias, columns);
    }
};

// A B, or where that is less work its transpose.
template <class B> void multiply(const Product& p, const B& b, float* packed_a, float* packed_b, bool parallel) {
    constexpr bool kColumns = std::is_same_v<B, Columns<float>>;
    if constexpr (kColumns || std::is_same_v<B, Rows<float>>)
        if (turns(p, kColumns)) {
            Product turned{b.b, p.N, p.M, p.K, !kColumns, false, p.target};
            turned.target.turned = true, turned.next = p.next;
            return gemm(turned, Columns<float>{p.a, p.M, p.K}, packed_a, packed_b, parallel);
        }
    gemm(p, b, packed_a, packed_b, parallel);
}

int64_t floats_each(const Matmul& p) { return (packed_a_size(p.M, p.K, p.a_transposed, p.a_row) + 15) / 16 * 16; }
// Whole products are dealt to the threads where there are enough of them; each then packs into its thread's scratch.
bool by_batch(const Matmul& p) { return p.batch >= 2 && (p.batch >= 2 * num_threads() || p.M * p.N * p.K < kAlone); }
int64_t workspace(const Matmul& p) { return by_batch(p) ? 0 : floats_each(p) * int64_t(sizeof(float)); }

// A product whose matrices stay in L1 is made from them as they lie: packing would cost more than the multiplications.
constexpr int kTinyRows = kRegisters == 16 ? 6 : 8;
constexpr int64_t kTiny = 4096;  // floats of a matrix
template <class T, int M = 1> void tiny_rows(const Product& p, const Rows<T>& b, int64_t row, int64_t rows) {
    if constexpr (M < kTinyRows)
        if (rows > M) return tiny_rows<T, M + 1>(p, b, row, rows);
    constexpr int S = Rows<T>::vectors(M);
    for (int64_t n = 0; n < p.N; n += S * W) {
        const int64_t columns = least(S * W, p.N - n);
        b.template fused<M, S, false>(p.a + row * p.K, p.K, n, columns, p.target.sum + row * p.N + n, p.N,
                                      p.target.bias ? p.target.bias + n : nullptr);
        p.target.finish(row, n, M, columns);
    }
}
template <class T> void tiny(const Product& p, const Rows<T>& b) {
    const RowPanels panels(p.M, kTinyRows);
    for (int64_t i = 0; i < panels.count; ++i) tiny_rows(p, b, panels.begin(i), panels.rows(i));
}

template <class T> void of_type(const Matmul& p, int64_t i, Product product, float* packed_a, float* packed_b, bool parallel) {
    const T* b = static_cast<const T*>(p.b) + i * p.b_step;
    const auto go = [&](auto all, auto next) {
        if (next.b) product.next = next.ahead(0, least(p.K, kDepth), 0, least(p.N, kPanels * NR));
        multiply(product, all, packed_a, packed_b, parallel);
    };
    const bool small = !p.a_transposed && !p.accumulate && !p.a_row && p.M * p.K <= kTiny && p.K * p.N <= kTiny;
    const T* next = static_cast<const T*>(p.b_next);
    if (!p.b_transposed && small) tiny(product, Rows<T>{b, p.N, p.K});
    else if (p.b_transposed) go(Columns<T>{b, p.N, p.K}, Columns<T>{next, p.N, p.K});
    else go(Rows<T>{b, p.N, p.K}, Rows<T>{next, p.N, p.K});
}

void one(const Matmul& p, int64_t i, float* packed_a, float* packed_b, bool parallel) {
    const int64_t at = i * p.M * p.N;
    const Target target =
        make_target(p.c + at, p.z ? p.z + at : nullptr, p.bias, p.residual ? p.residual + at : nullptr, p.N, p.activation);
    const Product product{p.a + i * p.a_step, p.M, p.N, p.K, p.a_transposed, p.accumulate, target, p.a_row};
    if (p.b_type == Storage::float32) of_type<float>(p, i, product, packed_a, packed_b, parallel);
    else if (p.b_type == Storage::bfloat16) of_type<Bfloat16>(p, i, product, packed_a, packed_b, parallel);
    else of_type<Float16>(p, i, product, packed_a, packed_b, parallel);
}

void matmul(const Matmul& p) {
    if (!by_batch(p)) {
        for (int64_t i = 0; i < p.batch; ++i) one(p, i, p.workspace, nullptr, true);
        return;
    }
    const int64_t each = p.M * p.N * p.K, grain = each >= kAloneBatch ? 1 : kAloneBatch / (each + 1) + 1;
    parallel_for(p.batch, grain, [&](int64_t begin, int64_t end) {
        float* packed_b = static_cast<float*>(scratch(size_t(kPackedB + floats_each(p)) * sizeof(float)));
        for (int64_t i = begin; i < end; ++i) one(p, i, packed_b + kPackedB, packed_b, false);
    });
}

template <class T> void together_of(const Matmuls& p) {
    Product products[kTogether];
    Columns<T> weights[kTogether];
    for (int64_t i = 0; i < p.count; ++i) {
        const Matmul& m = p.each[i];
        products[i] = {m.a, m.M, m.N, m.K, false, false, make_target(m.c, nullptr, m.bias, nullptr, m.N, Activation::none)};
        weights[i] = {static_cast<const T*>(m.b), m.N, m.K};
    }
    if constexpr (std::is_same_v<T, float>)
        if (turns(*products, true)) {
            for (int64_t i = 0; i < p.count; ++i) multiply(products[i], weights[i], p.workspace, nullptr, true);
            return;
        }
    gemm_together(products, weights, p.count, p.workspace);
}

void matmuls(const Matmuls& p) {
    if (p.each[0].b_type == Storage::float32) together_of<float>(p);
    else if (p.each[0].b_type == Storage::bfloat16) together_of<Bfloat16>(p);
    else together_of<Float16>(p);
}

template <Activation A> void backward_rows(const LinearBackward& p, int64_t begin, int64_t end, float* partial) {
    for (int64_t r = begin; r < end; ++r)
        each_vector(p.N, [&](int64_t c, auto v) FASTLM_LAMBDA {
            const int64_t at = r * p.N + c;
            vf d = v.load(p.dy + at);
            if constexpr (A != Activation::none) {
                d = d * derivative<A>(v.load(p.z + at));
                v.store(p.dz + at, d);
            }
            if (partial) v.store(partial + c, d + v.load(partial + c));
        });
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
        each_vector(end - begin, [&](int64_t c, auto v) FASTLM_LAMBDA {
            vf sum = zero();
            for (int64_t i = 0; i < pieces; ++i) sum = sum + v.load(p.partial + i * p.N + begin + c);
            v.store(p.dbias + begin + c, v.load(p.dbias + begin + c) + sum);
        });
    });
}

void activate_all(const Activate& p) {
    parallel_for(p.n, 8192, [&](int64_t begin, int64_t end) {
        finish_tiles[int(p.activation)](p.y + begin, p.z + begin, nullptr, 0, 1, end - begin);
    });
}

void turn(const Turn& p) {
    for (int64_t n = 0; n < p.N; n += W)
        for (int64_t k = 0; k < p.K; k += W) {
            const int64_t rows = least(W, p.N - n), columns = least(W, p.K - k);
            const float* from = p.w + n * p.K + k;
            float* to = p.y + k * p.stride + n;
            vf r[W];
            if (rows == W && columns == W) {
                load_transposed(r, [&](int j) FASTLM_LAMBDA { return from + j * p.K; });
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j) store(to + j * p.stride, r[j]);
                continue;
            }
            for (int j = 0; j < W; ++j) r[j] = j < rows ? load_n(from + j * p.K, columns) : zero();
            transpose(r);
            for (int j = 0; j < columns; ++j) store_n(to + j * p.stride, r[j], rows);
        }
}

}  // namespace

extern const MatmulKernels matmul_kernels = {workspace, matmul, matmuls, linear_backward, activate_all, turn};

}  // namespace FASTLM_ISA
}  // namespace fastlm
