#include "matmul.h"

#include <cstring>
#include <type_traits>

#include "columns.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

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
        finish_tiles[int(p.activation)](p.y + begin, p.z + begin, nullptr, 0, 0, 1, end - begin);
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
