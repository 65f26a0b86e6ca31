// The kernel behind int8_rows.h, compiled for every instruction set and, where a CPU has it, with VNNI.
#pragma once

#include "int8_rows.h"

#include "csrc/runtime/parallel.h"
#include "csrc/simd/dot.h"
#include "kernels/matmul/gemm.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The register block: up to kTall rows of A times kWide vectors of rows of W. Without VNNI a vector of bytes is spread over two.
#if defined(FASTLM_ISA_AVX512) && defined(FASTLM_VNNI)
constexpr int kTall = 12, kWide = 2;
#elif defined(FASTLM_ISA_AVX512)
constexpr int kTall = 6, kWide = 2;
#elif defined(FASTLM_ISA_AVX2) && defined(FASTLM_VNNI)
constexpr int kTall = 4, kWide = 2;
#else
constexpr int kTall = 4, kWide = 1;
#endif
constexpr int64_t kSide = 16;                // rows of W side by side
constexpr int64_t kGroup = 8;                // of K that lie together: two words
constexpr int64_t kWord = 4 * kSide;         // bytes of a word of all lanes
constexpr int64_t kRowsBlock = 384 << 10;    // bytes of quantised A that stay in L2 while the columns of a piece go by
constexpr int64_t kHead = 2 * kWord;         // of a panel: the scales of its rows, and where their sums start
constexpr int64_t kSpan = 8;                 // vectors of x whose largest magnitudes are kept together
constexpr int64_t kAloneRows = 1 << 19;      // multiplications below which waking a thread costs more than it gives
constexpr int64_t kAloneRounding = 1 << 15;  // numbers
constexpr uint32_t kLanes = (1u << W) - 1;
constexpr int64_t kRowsAhead = 2048;  // bytes from what is read to what is fetched

// Few rows are bound by memory: they take one panel of W at a time, which is then read from its first byte to its last, faster than
// any number of streams that are fetched ahead. So few are never a panel beside others, whose columns it must share.
constexpr int kUnfetchedRows = (kTall - 1) / 2;
constexpr int rows_vectors(int rows) { return rows <= kUnfetchedRows && kWide == 2 ? int(kSide / W) : kWide; }

FASTLM_INLINE int64_t groups_of(int64_t K) { return ceil_div(K, kGroup); }
FASTLM_INLINE int64_t panel_bytes(int64_t K) { return kHead + groups_of(K) * 2 * kWord; }
// A row of A: its codes, group by group among the rows of its panel; then, row by row, its ends.
struct Ends {
    float scale;
    float exact[kInt8Exact];    // what is not rounded
    int32_t place[kInt8Exact];  // of its column in a panel of W
};
FASTLM_INLINE int64_t rounded_bytes(int64_t K) { return groups_of(K) * kGroup + int64_t(sizeof(Ends)); }

// Row i of a panel of R rows. largest: room for a vector of floats for every kSpan vectors of a. Codes are raised by 128.
//
// Passes over a, which stays in L1: the largest magnitudes of each span and lane; those of the row, one after the other, each
// found in its span; the codes.
void round_row(const float* a, const float* columns, int64_t K, float* largest, uint8_t* out, int64_t R, int64_t i) {
    Ends ends = {};
    const int64_t whole = K / W * W, spans = ceil_div(K, kSpan * W);
    const auto at = [&](int64_t k) FASTLM_LAMBDA {
        if (k < whole) return columns ? load(a + k) * load(columns + k) : load(a + k);
        return columns ? load_n(a + k, K - k) * load_n(columns + k, K - k) : load_n(a + k, K - k);
    };
    int64_t taken[kInt8Exact];
    int count = 0;
    // The span's largest magnitudes, but for what was taken.
    const auto seen = [&](int64_t span) FASTLM_LAMBDA {
        vf most = zero();
        for (int64_t k = span * kSpan * W; k < least(K, (span + 1) * kSpan * W); k += W) {
            vf size = abs(at(k));
            for (int e = 0; e < count; ++e) size = select(eq(to_float(iota()), set(float(taken[e] - k))), zero(), size);
            most = max(most, size);
        }
        return most;
    };
    vf all = zero(), poison = zero();
    for (int64_t span = 0, k = 0; span < spans; ++span) {
        vf most = zero();
        if (k + kSpan * W <= whole) {
#pragma GCC unroll 8
            for (int j = 0; j < kSpan; ++j, k += W) {
                const vf v = columns ? load(a + k) * load(columns + k) : load(a + k);
                poison = fma(v, zero(), poison);
                most = max(most, abs(v));
            }
        } else {
            for (; k < K; k += W) poison = fma(at(k), zero(), poison), most = max(most, abs(at(k)));
        }
        store(largest + span * W, most);
        all = max(all, most);
    }
    uint8_t* to = out + i * kGroup;
    if (K == 0 || any(is_nan(poison))) {
        ends.scale = K == 0 ? 0.0f : __builtin_nanf("");
        for (int32_t& place : ends.place) place = int32_t(kWord + 3);  // any four bytes of the panel
        for (int64_t g = 0; g < groups_of(K); ++g) std::memset(to + g * kGroup * R, 128, kGroup);
        std::memcpy(out + R * groups_of(K) * kGroup + i * int64_t(sizeof(Ends)), &ends, sizeof(Ends));
        return;
    }
    for (; count < kInt8Exact;) {
        const vf found = set(reduce_max(all));
        int64_t span = 0;
        while (!(bits(eq(load(largest + span * W), found)) & kLanes)) ++span;
        for (int64_t k = span * kSpan * W;; k += W) {
            uint32_t here = bits(eq(abs(at(k)), found)) & kLanes;
            for (int e = 0; e < count; ++e)
                if (taken[e] >= k && taken[e] < k + W) here &= ~(1u << (taken[e] - k));
            if (!here) continue;
            const int64_t place = k + __builtin_ctz(here);
            taken[count] = place;
            ends.exact[count] = place < K ? (columns ? a[place] * columns[place] : a[place]) : 0.0f;
            ends.place[count++] = int32_t(kHead + place / 4 * kWord + place % 4);
            break;
        }
        store(largest + span * W, seen(span));
        all = zero();
        for (int64_t s = 0; s < spans; ++s) all = max(all, load(largest + s * W));
    }
    const float most = reduce_max(all);
    float inverse = 0.0f;
    if (most >= 0x1p-100f) ends.scale = most * (1.0f / 127.0f), inverse = 127.0f / most;
    const vi raised = seti(128);
    int64_t k = 0;
    const auto code = [&](vf v) FASTLM_LAMBDA { return addi(to_int(v * set(inverse)), raised); };  // to even
    if constexpr (W < kGroup) {
        for (; k < K; k += W) store_i8(to + k / kGroup * kGroup * R + k % kGroup, code(at(k)));
        if (k < groups_of(K) * kGroup) store_i8(to + k / kGroup * kGroup * R + k % kGroup, raised);
    } else {
        for (; k < whole; k += W) store_i8(to + k * R, to + (k + kGroup < K ? k + kGroup : k) * R, code(at(k)));
        if (k < K) store_i8(to + k * R, to + (k + kGroup < K ? k + kGroup : k) * R, code(at(k)));
    }
    for (int64_t place : taken) to[place / kGroup * kGroup * R + place % kGroup] = 128;
    std::memcpy(out + R * groups_of(K) * kGroup + i * int64_t(sizeof(Ends)), &ends, sizeof(Ends));
}

FASTLM_INLINE vi load_bytes(const uint8_t* p) { return as_int(load(reinterpret_cast<const float*>(p))); }

// What a block fetches for each word of W: `at` and the line after it, then `step` bytes on; null: each of its vectors kRowsAhead
// on.
struct RowsFetch {
    const uint8_t* at = nullptr;
    int64_t step = 0;
};

// sum (M, columns) = A panel times S vectors of rows of the weight.
template <int M, int S> void rows_block(const uint8_t* packed, int64_t K, int64_t column, int64_t columns, const uint8_t* a,
                                        float* sum, int64_t ld, const float* bias, RowsFetch fetch) {
    const int64_t groups = groups_of(K), size = panel_bytes(K), last = (column + columns - 1) / kSide;
    const uint8_t *at[S], *panels[S], *ahead[S];
    vf d[S];
    vi start[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {  // what is beyond the last panel repeats it
        const int64_t n = column + s * W, panel = least(n / kSide, last);
        panels[s] = packed + panel * size + n % kSide * 4;
        d[s] = load(reinterpret_cast<const float*>(panels[s]));
        start[s] = load_bytes(panels[s] + kWord);
        at[s] = panels[s] + kHead;
        ahead[s] = fetch.at ? fetch.at + s * 64 : at[s] + kRowsAhead;
    }
    const int64_t step = fetch.at ? fetch.step : kWord;
    const Ends* ends = reinterpret_cast<const Ends*>(a + M * groups * kGroup);
    vi dots[M][S];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) dots[i][s] = start[s];
    for (int64_t t = 0; t < 2 * groups; ++t) {  // a word at a time: two would not fit the registers
        const uint8_t* from = a + t / 2 * M * kGroup + t % 2 * (kGroup / 2);
        vi q[S];
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            q[s] = load_bytes(at[s] + t * kWord);
            if (M > kUnfetchedRows) __builtin_prefetch(ahead[s] + t * step, 0, 2);
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const vi codes = set_bytes(from + i * kGroup);
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s) dots[i][s] = in_register(dot8(dots[i][s], codes, q[s]));
        }
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {  // without a way out of the loop: gcc would keep the sums on the stack
        const int64_t left = columns - s * W;
        const vf extra = bias && left > 0 ? load_n(bias + s * W, left) : zero();
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            vf y = to_float(dots[i][s]) * (d[s] * set(ends[i].scale));
            vf exact = zero();
#pragma GCC unroll 4
            for (int e = 0; e < kInt8Exact; ++e) {  // three bytes before, so that the code is the highest byte of its lane
                const vi code = sra<24>(load_bytes(panels[s] + ends[i].place[e] - 3));
                exact = e ? exact + set(ends[i].exact[e]) * to_float(code) : set(ends[i].exact[e]) * to_float(code);
            }
            y = y + d[s] * exact;
            if (bias) y = y + extra;
            if (left > 0) store_n(sum + i * ld + s * W, y, left);
        }
    }
}

using RowsBlock = void (*)(const uint8_t*, int64_t, int64_t, int64_t, const uint8_t*, float*, int64_t, const float*, RowsFetch);
struct RowsChoice {
    RowsBlock block;
    int64_t columns;
};
template <int M = kTall> RowsChoice rows_choice(int64_t rows) {
    if constexpr (M > 1)
        if (rows < M) return rows_choice<M - 1>(rows);
    constexpr int S = rows_vectors(M);
    return {rows_block<M, S>, S * W};
}

void int8_rows(const Int8Rows& p) {
    if (p.M == 0 || p.N == 0) return;
    const bool threads = num_threads() > 1;
    const Target target = make_target(p.c, p.z, p.bias, p.residual, p.N, p.activation);
    // Panels as equal as they can be.
    const int64_t count = ceil_div(p.M, kTall), size = p.M / count, longer = p.M % count, row_bytes = rounded_bytes(p.K);
    auto begin_of = [&](int64_t i) { return i * size + least(i, longer); };
    for_pieces(threads && p.M * p.K >= kAloneRounding, count, ceil_div(1 << 13, (size + 1) * (p.K + 1)),
               [&](int64_t begin, int64_t end) {
                   float* largest = static_cast<float*>(scratch(size_t(ceil_div(p.K, kSpan * W) + 1) * W * sizeof(float)));
                   for (int64_t i = begin; i < end; ++i) {
                       const int64_t first = begin_of(i), rows = begin_of(i + 1) - first;
                       for (int64_t r = 0; r < rows; ++r)
                           round_row(p.a + (first + r) * p.K, p.columns, p.K, largest, p.workspace + first * row_bytes, rows, r);
                   }
               });
    auto multiply = [&](const RowsChoice& choice, int64_t row, int64_t rows, int64_t n, int64_t columns, RowsFetch fetch) {
        target.fetch(row, n, rows, columns);
        fetch_tile(target.sum + row * p.N + n, p.N, rows);
        choice.block(p.packed, p.K, n, columns, p.workspace + row * row_bytes, target.sum + row * p.N + n, p.N,
                     p.bias ? p.bias + n : nullptr, fetch);
        target.finish(row, n, rows, columns);
    };
    const RowsChoice choice = rows_choice(size + (longer ? 1 : 0)), shorter = rows_choice(size);
    const int64_t step = choice.columns;
    const bool parallel = threads && p.M * p.N * p.K >= kAloneRows;
    if (count == 1) {
        for_pieces(parallel, p.N, ceil_div(8 * W, step) * step, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; n += step) multiply(choice, 0, p.M, n, least(step, end - n), {});
        });
        return;
    }
    // A piece is one step of columns for a block of panels.
    const int64_t steps = ceil_div(p.N, step);
    int64_t blocks = ceil_div(p.M * row_bytes, kRowsBlock);
    if (parallel && steps * blocks < 6 * num_threads()) blocks = ceil_div(6 * num_threads(), steps);
    if (parallel && blocks > 1) blocks = ceil_div(blocks, num_threads()) * num_threads();
    blocks = least(blocks < 1 ? 1 : blocks, count);
    const int64_t panel = panel_bytes(p.K), step_bytes = ceil_div(step, kSide) * panel, words = 2 * groups_of(p.K);
    for_pieces(parallel, blocks * steps, 1, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t block = piece / steps, n = piece % steps * step;
            const int64_t first = block * count / blocks, last = (block + 1) * count / blocks;
            // The columns that come next, over all rows of the block.
            RowsFetch fetch = {p.packed + (n + step) / kSide * panel, ceil_div(step_bytes, (last - first) * words)};
            for (int64_t i = first; i < last; ++i, fetch.at += words * fetch.step) {
                const int64_t row = begin_of(i), rows = begin_of(i + 1) - row;
                multiply(rows > size ? choice : shorter, row, rows, n, least(step, p.N - n), fetch);
            }
        }
    });
}

int64_t rows_packed_bytes(int64_t N, int64_t K) { return ceil_div(N, kSide) * panel_bytes(K); }

void rows_pack(const Int8RowsPack& p) {
    const int64_t size = panel_bytes(p.K);
    parallel_for(ceil_div(p.N, kSide), 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
            uint8_t* to = p.packed + panel * size;
            std::memset(to, 0, size_t(size));
            for (int64_t n = 0; n < least(kSide, p.N - panel * kSide); ++n) {
                const uint8_t* from = p.blocks + (panel * kSide + n) * (p.K + 4);
                std::memcpy(to + 4 * n, from, 4);
                int32_t sum = 0;
                for (int64_t k = 0; k < p.K; ++k) {
                    to[kHead + k / 4 * kWord + 4 * n + k % 4] = from[4 + k];
                    sum += int8_t(from[4 + k]);
                }
                sum = int32_t(-128u * uint32_t(sum));  // the codes of x are raised by 128
                std::memcpy(to + kWord + 4 * n, &sum, 4);
            }
        }
    });
}

int64_t rows_workspace(int64_t M, int64_t K) { return M * rounded_bytes(K); }

}  // namespace

extern const Int8RowsKernels int8_rows_kernels = {rows_packed_bytes, rows_pack, rows_workspace, int8_rows};

}  // namespace FASTLM_ISA
}  // namespace fastlm
