#include "quantized_matmul.h"

#include "blocks.h"
#include "kernels/matmul/gemm.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The source of B for the product: columns of B are rows of the weight.
template <Quant Q> struct Packed {
    static constexpr int kFusedRows = kRegisters == 16 ? 4 : kFused;
    // Vectors of rows that walk together: enough chains of multiply-adds to hide their latency, few enough to stay in registers.
    static constexpr int vectors(int rows) {
        if (kRegisters == 16) return rows > 2 && (Layout<Q>::kBits == 5 || Layout<Q>::kBits == 6) ? 1 : 2;
        return rows <= 2 ? 4 : 1;
    }
    template <int M> static constexpr int64_t kColumns = vectors(M) * W;
    const uint8_t* packed;
    int64_t K;

    void pack(float* out, int64_t k0, int64_t kc, int64_t column, int64_t columns) const {
        for (int64_t n = 0; n < columns; n += NR, out += kc * NR) {
            Decoder<Q, NV> decoder(packed, K, column + n);
            for (int64_t u = 0; u < kc / kUnit; ++u) {
                float* to = out + u * kUnit * NR;
                decoder.unit(k0 / kUnit + u, [&](int k, int s, vf w) { store(to + k * NR + s * W, w); });
            }
        }
    }

    Ahead ahead(int64_t, int64_t, int64_t, int64_t) const { return {}; }  // a few sequential streams: the hardware sees them

    template <int M>
    void fused(const float* a, int64_t depth, int64_t column, int64_t columns, float* sum, int64_t ld, const float* bias) const {
        constexpr int S = vectors(M);
        Decoder<Q, S> decoder(packed, K, column);
        vf acc[M][S];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s) acc[i][s] = zero();
        for (int64_t u = 0; u < depth / kUnit; ++u) {
            const float* x = a + u * kUnit * M;
            decoder.unit(u, [&](int k, int s, vf w) __attribute__((always_inline)) {
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i) acc[i][s] = fma(set(x[k * M + i]), w, acc[i][s]);
            });
        }
        for (int s = 0; s < S; ++s) {
            const int64_t left = columns - s * W;
            if (left <= 0) return;
            for (int i = 0; i < M; ++i)
                store_n(sum + i * ld + s * W, bias ? acc[i][s] + load_n(bias + s * W, left) : acc[i][s], left);
        }
    }
};

int64_t padded_rows(int64_t N) { return ceil_div(N, kRowMultiple) * kRowMultiple; }

struct Bytes {
    int64_t N, K;
    int64_t* bytes;
    template <Quant Q> void run() const { *bytes = padded_rows(N) / kGroup * Layout<Q>::group_bytes(K); }
};
int64_t packed_bytes(int64_t N, int64_t K, Quant kind) {
    int64_t bytes = 0;
    dispatch(kind, Bytes{N, K, &bytes});
    return bytes;
}

struct Pack {
    const QuantizedPack& p;
    template <Quant Q> void run() const {
        const int64_t bytes = Layout<Q>::group_bytes(p.K);
        int64_t values = 32, block = 0;
        for (const QuantFormat& f : kQuantFormats)
            if (f.kind == Q) values = f.values, block = f.bytes;
        const int64_t row_bytes = p.K / values * block;
        parallel_for(padded_rows(p.N) / kGroup, 4, [&](int64_t begin, int64_t end) {
            for (int64_t g = begin; g < end; ++g) {
                uint8_t* group = p.packed + g * bytes;
                const int64_t rows = least(kGroup, p.N - g * kGroup);
                if (rows < kGroup) std::memset(group, 0, size_t(bytes));
                for (int64_t r = 0; r < rows; ++r) pack_row<Q>(group, r, p.blocks + (g * kGroup + r) * row_bytes, p.K);
            }
        });
    }
};
void pack(const QuantizedPack& p) { dispatch(p.kind, Pack{p}); }

int64_t workspace(const QuantizedMatmul& p) { return packed_a_size(p.M, p.K) * int64_t(sizeof(float)); }

struct Multiply {
    const QuantizedMatmul& p;
    template <Quant Q> void run() const {
        const Product product{p.a, p.M, p.N, p.K, false, false, make_target(p.c, p.z, p.bias, p.residual, p.N, p.activation)};
        gemm(product, Packed<Q>{p.packed, p.K}, p.workspace, nullptr, true);
    }
};
void matmul(const QuantizedMatmul& p) { dispatch(p.kind, Multiply{p}); }

struct Together {
    const QuantizedMatmuls& p;
    template <Quant Q> void run() const {
        Product products[kTogether];
        Packed<Q> weights[kTogether];
        for (int64_t i = 0; i < p.count; ++i) {
            const QuantizedMatmul& m = p.each[i];
            products[i] = {m.a, m.M, m.N, m.K, false, false, make_target(m.c, nullptr, m.bias, nullptr, m.N, Activation::none)};
            weights[i] = {m.packed, m.K};
        }
        gemm_together(products, weights, p.count, p.workspace);
    }
};
void matmuls(const QuantizedMatmuls& p) { dispatch(p.each[0].kind, Together{p}); }

}  // namespace

extern const QuantizedMatmulKernels quantized_matmul_kernels = {packed_bytes, pack, workspace, matmul, matmuls};

}  // namespace FASTLM_ISA
}  // namespace fastlm
