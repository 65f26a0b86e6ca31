// The kernel behind int8_matmul.h, compiled for every instruction set and, where a CPU has it, with VNNI.
#pragma once

#include "int8_matmul.h"

#include "csrc/runtime/parallel.h"
#include "csrc/simd/activation.h"
#include "csrc/simd/dot.h"
#include "kernels/matmul/gemm.h"
#include "kernels/quantized_matmul/blocks.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Rows of A that go through the weights together: up to kFew in one pass, more in panels of kPanel. P: the planes of their codes.
#if defined(FASTLM_ISA_AVX512)
template <int P> constexpr int kFew = P == 1 ? 12 : 8;
template <int P> constexpr int kPanel = P == 1 ? 6 : 8;
#else
template <int P> constexpr int kFew = 4;
template <int P> constexpr int kPanel = 3;
#endif
constexpr int64_t kBlock = 384 << 10;        // bytes of quantised A that stay in L2 while the columns of a piece go by
constexpr int64_t kAloneInt8 = 1 << 19;      // multiplications below which waking a thread costs more than it gives
constexpr int64_t kAloneQuantise = 1 << 15;  // numbers

// Vectors of rows of the weight that walk together, as many for every number of rows that panels beside each other may have. One or
// two rows of A take one group of the weight at a time, so that it is read from its first byte to its last, faster than by any
// number of streams that are fetched ahead.
constexpr int kUnfetched = 2;
constexpr int int8_vectors(int rows, int planes) {
#if defined(FASTLM_ISA_AVX512)
    return planes == 1 ? (rows >= 4 && rows <= 6 ? 2 : 1) : rows == 3 ? 2 : 1;
#else
    return planes == 1 ? (rows <= 3 ? 2 : 1) : rows <= 1 ? 2 : 1;
#endif
}

// A panel of R quantised rows, for each group of 32: P planes of codes R x 32, scales R, and what each row adds to the integer sums
// or, where the weights have minima, the float that multiplies them (Q6_K: for both halves). Two planes: 256 times the first and
// the second are the code.
template <Quant Q, int P> struct Rows8 {
    using L = Layout<Q>;
    static constexpr int kHalves = Q == Quant::Q6_K ? 2 : 1;
    static constexpr int64_t kBytes = P * kUnit + 4 + 4 * kHalves;  // of one row in one group

    // Row i of a panel of R.
    static void quantise(const float* x, int64_t K, uint8_t* out, int64_t R, int64_t i) {
        constexpr int V = int(kUnit / W);
        for (int64_t u = 0; u < K / kUnit; ++u, x += kUnit, out += R * kBytes) {
            vf v[V];
            vf most = zero();
            uint32_t finite = ~0u;
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) {
                v[j] = load(x + j * W);
                const vf a = abs(v[j]);
                most = max(most, a);
                finite &= bits(le(a, set(3.4028234e38f)));
            }
            const bool sane = (finite & ((1u << W) - 1)) == (1u << W) - 1;
            const float largest = reduce_max(most);
            float scale = 0.0f, inverse = 0.0f;
            if (sane && largest >= 0x1p-100f) scale = largest * (1.0f / 127.0f), inverse = 127.0f / largest;
            uint8_t *codes = out + i * kUnit, *below = out + (R + i) * kUnit;
            vf sum[kHalves];
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) {
                const vf scaled = v[j] * set(inverse);
                vf r = sane ? round(scaled) : zero();
                store_i8(codes + j * W, to_int(r));
                if constexpr (P == 2) {
                    const vf rest = sane ? max(min(round((scaled - r) * set(256.0f)), set(127.0f)), set(-127.0f)) : zero();
                    store_i8(below + j * W, to_int(rest));
                    r = r * set(256.0f) + rest;
                }
                vf& s = sum[j * kHalves / V];
                s = j % (V / kHalves) ? s + r : r;
            }
            if (L::kBits < 8) {
                even_first(codes);
                if (P == 2) even_first(below);
            }
            if (P == 2) scale = scale * 0x1p-8f;
            if (!sane) scale = __builtin_nanf("");
            uint8_t* to = out + P * R * kUnit + 4 * i;
            std::memcpy(to, &scale, 4);
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; ++h) {
                const float total = reduce_add(sum[h]);
                if constexpr (L::kMinimum) {
                    const float s = scale * total;
                    std::memcpy(to + 4 * R * (1 + h), &s, 4);
                } else {
                    const int32_t offset = L::kOffset * int32_t(total);
                    std::memcpy(to + 4 * R * (1 + h), &offset, 4);
                }
            }
        }
    }
};

FASTLM_INLINE vf set_float(const uint8_t* p) { return as_float(set_bytes(p)); }

// sum (M, columns) = A panel times S vectors of rows of the weight.
template <Quant Q, int M, int S, int P> void int8_block(const uint8_t* packed, int64_t K, int64_t column, int64_t columns,
                                                        const uint8_t* a, float* sum, int64_t ld, const float* bias, bool ahead) {
    using L = Layout<Q>;
    using A = Rows8<Q, P>;
    constexpr int kWords = 4 / A::kHalves;    // of the codes under one scale
    constexpr int64_t kFar = 4 * kAhead / S;  // a few streams cover what memory takes to answer, one must reach further
    Decoder<Q, S> decoder(packed, K, column);
    vf acc[M][S];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) acc[i][s] = zero();
    // At the end of these rows, the ones that are likely to come next: behind a group lies its neighbour, which is at work already.
    const int64_t last = (L::group_bytes(K) - kFar) / L::kUnitBytes, next = (S * W / kGroup - 1) * L::group_bytes(K);
    for (int64_t u = 0; u < K / kUnit; ++u, a += M * A::kBytes) {
        const uint8_t* scales = a + P * M * kUnit;
        const int64_t reach = kFar + (u > last && S * W > kGroup ? next : 0);
#pragma GCC unroll 2
        for (int half = 0; half < A::kHalves; ++half) {
            decoder.scales(u, half);
            if (M > kUnfetched && ahead && half == 0)
#pragma GCC unroll 4
                for (int s = 0; s < S; ++s)
                    if (decoder.lane[s] == 0)
#pragma GCC unroll 16
                        for (int64_t line = 0; line < L::kUnitBytes; line += 64)
                            __builtin_prefetch(decoder.at[s] + reach + line, 0, 2);
            vi dots[M][S], high[P == 2 ? M : 1][S];
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                const vi from = L::kMinimum ? seti(0) : set_bytes(scales + 4 * M * (1 + half) + 4 * i);
#pragma GCC unroll 4
                for (int s = 0; s < S; ++s) {
                    dots[i][s] = from;
                    if (P == 2) high[i][s] = seti(0);
                }
            }
#pragma GCC unroll 4
            for (int t = half * kWords; t < (half + 1) * kWords; ++t) {
                vi q[S][2];
                decoder.bytes(t, q);
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i) {
                    const uint8_t* at = a + i * kUnit + 8 * t;
                    if constexpr (P == 2) {
                        const vi first = set_bytes(at), second = set_bytes(at + 4);
#pragma GCC unroll 4
                        for (int s = 0; s < S; ++s) high[i][s] = dot<L::kBits>(high[i][s], q[s][0], first, q[s][1], second);
                        at += M * kUnit;
                    }
                    const vi first = set_bytes(at), second = set_bytes(at + 4);
#pragma GCC unroll 4
                    for (int s = 0; s < S; ++s) dots[i][s] = dot<L::kBits>(dots[i][s], q[s][0], first, q[s][1], second);
                }
            }
            if constexpr (P == 2)
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                    for (int s = 0; s < S; ++s) dots[i][s] = addi(shl<8>(high[i][s]), dots[i][s]);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                const vf scale = set_float(scales + 4 * i);
#pragma GCC unroll 4
                for (int s = 0; s < S; ++s) acc[i][s] = acc[i][s] + to_float(dots[i][s]) * (decoder.d[s] * scale);
                if constexpr (L::kMinimum) {
                    const vf total = set_float(scales + 4 * M + 4 * i);
#pragma GCC unroll 4
                    for (int s = 0; s < S; ++s) acc[i][s] = acc[i][s] + decoder.m[s] * total;
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        const int64_t left = columns - s * W;
        if (left <= 0) return;
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) store_n(sum + i * ld + s * W, bias ? acc[i][s] + load_n(bias + s * W, left) : acc[i][s], left);
    }
}

using Int8Block = void (*)(const uint8_t*, int64_t, int64_t, int64_t, const uint8_t*, float*, int64_t, const float*, bool);
struct Int8Choice {
    Int8Block block;
    int64_t columns;
};
template <Quant Q, int P, int M = kFew<P>> Int8Choice int8_choice(int64_t rows) {
    if constexpr (M > 1)
        if (rows < M) return int8_choice<Q, P, M - 1>(rows);
    constexpr int S = int8_vectors(M, P);
    return {int8_block<Q, M, S, P>, S * W};
}

// up (rows, columns) = act(gate) up, as `gated` does it.
template <Activation kind>
void gate_tile(float* up, int64_t ld, const float* gate, int64_t gate_ld, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r, up += ld, gate += gate_ld)
        each_vector(columns,
                    [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(up + c, activate<kind>(v.load(gate + c)) * v.load(up + c)); });
}
constexpr void (*gate_tiles[])(float*, int64_t, const float*, int64_t, int64_t, int64_t) = {
    gate_tile<Activation::none>, gate_tile<Activation::gelu>, gate_tile<Activation::gelu_tanh>, gate_tile<Activation::silu>,
    gate_tile<Activation::relu>};

// `number` products of one A. Where they are a gate and what it multiplies, the gate's tile never leaves the first cache.
template <int P> struct Int8Product {
    const QuantizedMatmul* each;
    int64_t number;
    float* workspace;
    bool gated = false;
    Activation gate = Activation::none;

    template <Quant Q> void run() const {
        using A = Rows8<Q, P>;
        const int64_t M = each->M, K = each->K;
        int64_t N = 0;
        for (int64_t i = 0; i < number; ++i) N += each[i].N;
        if (M == 0 || N == 0) return;
        const bool threads = num_threads() > 1, parallel = threads && M * N * K >= kAloneInt8;
        // All rows in one panel, or panels as equal as they can be.
        const int64_t count = M <= kFew<P> ? 1 : ceil_div(M, kPanel<P>), size = M / count, longer = M % count;
        auto begin_of = [&](int64_t i) { return i * size + least(i, longer); };
        const int64_t groups = K / kUnit, row_bytes = groups * A::kBytes;
        uint8_t* quantised = reinterpret_cast<uint8_t*>(workspace);
        for_pieces(threads && M * K >= kAloneQuantise, count, ceil_div(1 << 13, (size + 1) * (K + 1)),
                   [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i) {
                           const int64_t first = begin_of(i), rows = begin_of(i + 1) - first;
                           for (int64_t r = 0; r < rows; ++r)
                               A::quantise(each->a + (first + r) * K, K, quantised + first * row_bytes, rows, r);
                       }
                   });
        constexpr int64_t kTile = 12 * 4 * W;  // no choice has more rows times columns
        auto multiply = [&](const QuantizedMatmul& p, const Int8Choice& choice, int64_t row, int64_t rows, int64_t n,
                            int64_t columns, bool ahead) {
            const uint8_t* a = quantised + row * row_bytes;
            if (gated) {
                alignas(64) float tile[kTile];
                float* c = p.c + row * p.N + n;
                choice.block(each->packed, K, n, columns, a, tile, choice.columns, each->bias ? each->bias + n : nullptr, ahead);
                choice.block(p.packed, K, n, columns, a, c, p.N, p.bias ? p.bias + n : nullptr, ahead);
                gate_tiles[int(gate)](c, p.N, tile, choice.columns, rows, columns);
                return;
            }
            const Target target = make_target(p.c, p.z, p.bias, p.residual, p.N, p.activation);
            choice.block(p.packed, K, n, columns, a, target.sum + row * p.N + n, p.N, p.bias ? p.bias + n : nullptr, ahead);
            target.finish(row, n, rows, columns);
        };
        const Int8Choice choice = int8_choice<Q, P>(size + (longer ? 1 : 0)), shorter = int8_choice<Q, P>(size);  // of one width
        const int64_t step = choice.columns, first = gated ? 1 : 0;
        if (count == 1) {
            // Six pieces a thread, so that none waits long for another; columns are read in long runs where there are enough.
            const int64_t most = ceil_div(8 * W, step), grain = step * greatest(1, least(most, N / (6 * num_threads()) / step));
            const Pieces pieces(each + first, number - first, grain);
            for_pieces(parallel, pieces.count(), 1, [&](int64_t begin, int64_t end) {
                for (int64_t piece = begin; piece < end; ++piece) {
                    const int64_t i = pieces.product(piece), from = (piece - pieces.first[i]) * grain;
                    const QuantizedMatmul& p = each[first + i];
                    const int64_t to = least(p.N, from + grain);
                    for (int64_t n = from; n < to; n += step) multiply(p, choice, 0, M, n, least(step, to - n), true);
                }
            });
            return;
        }
        // A piece is one step of columns for a block of panels.
        for (int64_t product = first; product < number; ++product) {
            const QuantizedMatmul& p = each[product];
            const int64_t steps = ceil_div(p.N, step);
            int64_t blocks = ceil_div(M * row_bytes, kBlock);
            if (parallel && steps * blocks < 6 * num_threads()) blocks = ceil_div(6 * num_threads(), steps < 1 ? 1 : steps);
            blocks = least(blocks < 1 ? 1 : blocks, count);
            for_pieces(parallel, blocks * steps, 1, [&](int64_t begin, int64_t end) {
                for (int64_t piece = begin; piece < end; ++piece) {
                    const int64_t block = piece / steps, n = piece % steps * step;
                    const int64_t first_panel = block * count / blocks;
                    for (int64_t i = first_panel; i < (block + 1) * count / blocks; ++i) {
                        const int64_t row = begin_of(i), rows = begin_of(i + 1) - row;
                        multiply(p, rows > size ? choice : shorter, row, rows, n, least(step, p.N - n), i == first_panel);
                    }
                }
            });
        }
    }
};
void int8_matmul(const QuantizedMatmul& p) { dispatch(p.kind, Int8Product<1>{&p, 1, p.workspace}); }
void int16_matmul(const QuantizedMatmul& p) { dispatch(p.kind, Int8Product<2>{&p, 1, p.workspace}); }
void int8_matmuls(const QuantizedMatmuls& p) {
    dispatch(p.each->kind, Int8Product<1>{p.each, p.count, p.workspace, p.gated, p.gate});
}

template <int P> struct Int8Workspace {
    const QuantizedMatmul& p;
    int64_t* bytes;
    template <Quant Q> void run() const { *bytes = p.M * (p.K / kUnit) * Rows8<Q, P>::kBytes; }
};
template <int P> int64_t int8_workspace(const QuantizedMatmul& p) {
    int64_t bytes = 0;
    dispatch(p.kind, Int8Workspace<P>{p, &bytes});
    return bytes;
}

constexpr int kPeakChains = 12;
void int8_peak(const Int8Peak& p) {
    parallel_for(p.pieces, 1, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            vf acc[kPeakChains];
            vi dots[kPeakChains];
            for (int c = 0; c < kPeakChains; ++c) acc[c] = zero(), dots[c] = seti(c);
            vi u = seti(0x01010101 * int32_t(piece % 3));
            const vi s = seti(0x01FF01FF);
            const vf d = set(0.999f), scale = set(0.5f + float(piece));
            for (int64_t r = 0; r < p.rounds; ++r) {
                for (int t = 0; t < 4; ++t)
#pragma GCC unroll 16
                    for (int c = 0; c < kPeakChains; ++c) {
                        u = in_register(u);  // else products of constant bytes leave the loop
                        dots[c] = dot<4>(dots[c], u, s, u, s);
                    }
                if (p.scaled)
#pragma GCC unroll 16
                    for (int c = 0; c < kPeakChains; ++c) {
                        acc[c] = acc[c] + to_float(dots[c]) * (acc[(c + 1) % kPeakChains] * scale);
                        dots[c] = seti(c);
                    }
            }
            vf sum = zero();
            for (int c = 0; c < kPeakChains; ++c) sum = sum + acc[c] * d + to_float(dots[c]);
            p.y[piece] = reduce_add(sum);
        }
    });
}

}  // namespace

extern const Int8MatmulKernels int8_matmul_kernels = {
    kPeakChains * W * kUnit * 2, int8_workspace<1>, int8_workspace<2>, int8_matmul, int16_matmul, int8_matmuls, int8_peak};

}  // namespace FASTLM_ISA
}  // namespace fastlm
