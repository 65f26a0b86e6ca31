// The float32 product behind matmul and quantized_matmul: microkernel, where A is read from, and the split into pieces.
//
// After Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication", with two differences: a piece of work owns
// a group of columns for all rows, so that a panel of B is packed once, by the thread that uses it, into its own cache; and rows of
// A are read where they lie.
#pragma once

#include "csrc/runtime/parallel.h"
#include "csrc/simd/l1.h"
#include "csrc/simd/simd.h"
#include "csrc/simd/transpose.h"

#include "epilogue.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The register block: MR rows by NV vectors of accumulators, with NV vectors of B and one broadcast beside them. kFused: rows up to
// which B may go from memory to the registers and into the product without being stored.
#if defined(FASTLM_ISA_AVX512)
constexpr int MR = 14, NV = 2, kFused = 12, kRegisters = 32;
#elif defined(FASTLM_ISA_AVX2)
constexpr int MR = 6, NV = 2, kFused = 8, kRegisters = 16;
#elif defined(FASTLM_ISA_NEON)
constexpr int MR = 8, NV = 2, kFused = 8, kRegisters = 32;
#else
constexpr int MR = 4, NV = 2, kFused = 4, kRegisters = 16;
#endif
constexpr int64_t NR = NV * W;
constexpr int64_t kDepth = 1024;       // of a packed panel of B
constexpr int64_t kPanels = 3;         // panels of B that a piece packs at once: 384 KB in L2 at most
constexpr int64_t kRows = 2048;        // of A packed at once
constexpr int64_t kPackedA = 2 << 20;  // floats of A packed at once: its place is L3, beside what else is there
constexpr int64_t kRowsEach = 384;     // rows a thread from which they are cut: a panel of B is packed by each
constexpr int64_t kWideness = 4;       // columns a row beyond which they are not: C is then the larger part
constexpr int64_t kStepsAhead = 24;    // from what is multiplied to what is fetched of a panel of A that lies as columns
constexpr int64_t kTileSteps = 48;     // before the end of a chain, where its tile is fetched
constexpr int64_t kAloneFused = 1 << 18;
constexpr int64_t kAlone = 1 << 20;  // multiplications below which waking a thread costs more than it gives
constexpr int64_t kAloneBatch = 1 << 18;

FASTLM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTLM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLM_INLINE int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory that is needed soon, touched line by line while something else is multiplied: without it, memory would stand still during
// the product and the product during the packing, which for few rows take the same time.
struct Ahead {
    const char* at = nullptr;  // null: nothing to fetch
    int64_t lines = 0;         // of a run
    int64_t skip = 0;          // bytes from the end of a run to the next
    int64_t runs = 0;          // that are left, this one included
    int64_t left = 0;          // lines left in this run

    FASTLM_MEMBER void next() {
        __builtin_prefetch(at, 0, 2);
        at += 64;
        if (--left > 0) return;
        left = lines;
        at = --runs > 0 ? at + skip : nullptr;
    }
};

// `runs` runs of n elements, `stride` elements from one to the next.
template <class T> FASTLM_INLINE Ahead ahead_of(const T* from, int64_t n, int64_t stride, int64_t runs) {
    const int64_t lines = ceil_div(n * int64_t(sizeof(T)), 64);
    return {reinterpret_cast<const char*>(from), lines, stride * int64_t(sizeof(T)) - lines * 64, runs, lines};
}

// What products of two panels fetch, one after the other, and during the last steps the tile of C at `c`, row by row.
struct Fetch {
    Ahead queue[3];
    const float* c = nullptr;
};

// sum (M, columns) = or += A panel times the first V vectors of B panel (kc, NR). The panel of A is (kc, M), `lda` from one k to
// the next, or where kByRow is set M rows, `lda` from one to the next. The loop over k is the chain: nothing may reorder it.
template <int M, int V, bool kByRow> void micro(const float* a, int64_t lda, const float* b, int64_t kc, float* sum, int64_t ld,
                                                int64_t columns, bool from_zero, const float* bias, Fetch& fetch) {
    vf acc[M][V];
    const bool whole = columns >= V * W;
    if (from_zero) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) acc[i][j] = zero();
    } else if (whole) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) acc[i][j] = load(sum + i * ld + j * W);
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) acc[i][j] = j * W < columns ? load_n(sum + i * ld + j * W, columns - j * W) : zero();
    }
    constexpr int kPointers = kByRow ? (M + 2) / 3 : 1;  // of which each reaches three rows: as many as x86 addresses
    const float* from[kPointers];
#pragma GCC unroll 8
    for (int i = 0; i < kPointers; ++i) from[i] = a + 3 * i * lda;
    const auto step = [&]() FASTLM_LAMBDA {
        vf v[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) v[j] = load(b + j * W);
        if constexpr (!kByRow) {  // where k are far apart, the hardware does not guess
            __builtin_prefetch(from[0] + kStepsAhead * lda, 0, 3);
            __builtin_prefetch(from[0] + kStepsAhead * lda + M - 1, 0, 3);
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const vf x = set(kByRow ? from[i / 3][i % 3 * lda] : from[0][i]);
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) acc[i][j] = fma(x, v[j], acc[i][j]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kPointers; ++i) from[i] += kByRow ? 1 : lda;
        b += NR;
    };
    const int64_t last = kc > kTileSteps ? kc - kTileSteps : 0;
    int64_t begin = 0;
    for (Ahead& waiting : fetch.queue) {
        Ahead ahead = waiting;
        for (; begin < last && ahead.at; ++begin) {
            ahead.next();
            step();
        }
        waiting = ahead;
    }
    for (; begin < last; ++begin) step();
    const float* c = fetch.c;
    for (int64_t k = last, row = 0; k < kc; ++k, ++row) {
        if (row < M) {
#pragma GCC unroll 4
            for (int j = 0; j < V * W; j += 16) __builtin_prefetch(c + j, 1, 3);
            c += ld;
        }
        step();
    }
    if (bias) {
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
            const vf v = whole ? load(bias + j * W) : j * W < columns ? load_n(bias + j * W, columns - j * W) : zero();
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) acc[i][j] = acc[i][j] + v;
        }
    }
    if (whole) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) store(sum + i * ld + j * W, acc[i][j]);
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j)
                if (j * W < columns) store_n(sum + i * ld + j * W, acc[i][j], columns - j * W);
    }
}

using Micro = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t, bool, const float*, Fetch&);
template <int V, bool kByRow> const Micro micros[MR + 1] = {
    nullptr,
    micro<1, V, kByRow>,
    micro<2, V, kByRow>,
    micro<3, V, kByRow>,
    micro<4, V, kByRow>,
#if defined(FASTLM_ISA_AVX512) || defined(FASTLM_ISA_AVX2) || defined(FASTLM_ISA_NEON)
    micro<5, V, kByRow>,
    micro<6, V, kByRow>,
#endif
#if defined(FASTLM_ISA_AVX512) || defined(FASTLM_ISA_NEON)
    micro<7, V, kByRow>,
    micro<8, V, kByRow>,
#endif
#if defined(FASTLM_ISA_AVX512)
    micro<9, V, kByRow>,
    micro<10, V, kByRow>,
    micro<11, V, kByRow>,
    micro<12, V, kByRow>,
    micro<13, V, kByRow>,
    micro<14, V, kByRow>,
#endif
};

// M rows in panels of at most `most` rows, as equal as they can be: 16 rows are 8 + 8, not 14 + 2. `of` threads have as many each.
struct RowPanels {
    int64_t M, count;
    RowPanels(int64_t M, int64_t most, int64_t of = 1) : M(M), count(ceil_div(ceil_div(M, most), of) * of) {}
    int64_t begin(int64_t i) const { return i * M / count; }
    int64_t rows(int64_t i) const { return begin(i + 1) - begin(i); }
};

struct Product {
    const float* a;
    int64_t M, N, K;
    bool a_transposed, accumulate;
    Target target;
    int64_t a_row = 0;  // from one row of A to the next where that is more than K
    Ahead next = {};    // what the thread that ends this product reads after it
    int64_t row_step() const { return a_row ? a_row : K; }
};

// Whether a panel of A can be read row by row where it lies. Rows that share one place in L1 are copied, kPad further apart. A
// transposed A is packed.
constexpr int64_t kPad = 16;  // floats, a line
FASTLM_INLINE bool reads_rows(bool a_transposed, int64_t step) { return !a_transposed && !share_l1(step * int64_t(sizeof(float))); }

FASTLM_INLINE void copy_rows(float* out, int64_t to, const float* a, int64_t from, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < columns; k += W) {
            const float* x = a + i * from + k;
            if (columns - k >= W) store(out + i * to + k, load(x));
            else store_n(out + i * to + k, load_n(x, columns - k), columns - k);
        }
}

// One panel of A as (kc, rows). `out` ends where the next panel begins, which another thread may be writing.
inline void pack_a_panel(float* out, const Product& p, int64_t row, int64_t rows, int64_t k0, int64_t kc) {
    if (p.a_transposed) {
        const float* a = p.a + k0 * p.M + row;
        for (int64_t k = 0; k < kc; ++k, a += p.M, out += rows)
            for (int64_t i = 0; i < rows; i += W) {
                const vf v = load_n(a + i, rows - i);
                if (rows <= W && k + W < kc) store(out, v);  // what runs over is overwritten by the next k
                else store_n(out + i, v, rows - i);
            }
        return;
    }
    const int64_t ld = p.row_step();
    const float* a = p.a + row * ld + k0;
    for (int64_t k = 0; k < kc; k += W) {
        const int64_t n = least(W, kc - k);
        for (int64_t i = 0; i < rows; i += W) {
            const int64_t m = least(W, rows - i);
            vf r[W];
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j)
                r[j] = j < m ? (n == W ? load(a + (i + j) * ld + k) : load_n(a + (i + j) * ld + k, n)) : zero();
            transpose(r);
            float* to = out + k * rows + i;
            if (m == W || (rows <= W && k + 2 * W <= kc)) {
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j)
                    if (j < n) store(to + j * rows, r[j]);
            } else {
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j)
                    if (j < n) store_n(to + j * rows, r[j], m);
            }
        }
    }
}

template <class F> FASTLM_INLINE void for_pieces(bool parallel, int64_t n, int64_t grain, const F& f) {
    if (parallel) parallel_for(n, grain, f);
    else if (n > 0) f(0, n);
}

// Floats of workspace for A (M, K); up to kFused rows are packed as (K, M).
FASTLM_INLINE int64_t rows_at_once(int64_t M) { return M <= kRows ? M : ceil_div(M, ceil_div(M, kRows)); }
FASTLM_INLINE int64_t depth_at_once(int64_t m, int64_t K) {
    const int64_t most = kPackedA / (m < 1 ? 1 : m) / kDepth * kDepth;
    return K <= most || most < kDepth ? K : most;
}
FASTLM_INLINE int64_t packed_a_size(int64_t M, int64_t K, bool a_transposed = false, int64_t a_row = 0) {
    const int64_t m = rows_at_once(M);
    if (m == 1 || (m > kFused && reads_rows(a_transposed, a_row ? a_row : K))) return 0;
    return m * (depth_at_once(m, K) + kPad) + W;
}
constexpr int64_t kPackedB = kPanels * NR * kDepth;

// The widest group of B panels that still makes six pieces a thread.
FASTLM_INLINE int64_t group_size(int64_t panels, bool parallel) {
    if (!parallel) return kPanels;
    const int64_t size = panels / (6 * num_threads());
    return size < 1 ? 1 : least(size, kPanels);
}

// Pieces of columns of several products, one after the other.
struct Pieces {
    int64_t first[kTogether + 1] = {};
    template <class P> Pieces(const P* p, int64_t count, int64_t grain) {
        for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + ceil_div(p[i].N, grain);
        for (int64_t i = count; i < kTogether; ++i) first[i + 1] = first[i];
    }
    int64_t count() const { return first[kTogether]; }
    int64_t product(int64_t piece) const {
        int64_t i = 0;
        while (piece >= first[i + 1]) ++i;
        return i;
    }
};

// `B` knows how to pack its panels, pack(out, k0, kc, column, columns), and to multiply up to kFusedRows rows without storing them,
// fused<M>(a, K, column, columns, sum, ld, bias) with a as (K, M). `count` products of one A.
template <class B, int M> void gemm_fused(const Product* products, const B* b, int64_t count, const float* a, bool parallel) {
    constexpr int64_t step = B::template kColumns<M>, grain = (8 * W + step - 1) / step * step;
    int64_t columns = 0;
    for (int64_t i = 0; i < count; ++i) columns += products[i].N;
    const Pieces pieces(products, count, grain);
    for_pieces(parallel && columns * products->K >= kAloneFused, pieces.count(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t i = pieces.product(piece), from = (piece - pieces.first[i]) * grain;
            const Product& p = products[i];
            const int64_t to = least(p.N, from + grain);
            for (int64_t n = from; n < to; n += step) {
                const int64_t part = least(step, to - n);
                b[i].template fused<M>(a, p.K, n, part, p.target.sum + n, p.N, p.target.bias ? p.target.bias + n : nullptr);
                p.target.finish(0, n, M, part);
            }
        }
    });
}

// The number of rows as a constant.
template <class B, int M> void gemm_few(const Product* p, const B* b, int64_t count, const float* a, bool parallel) {
    if constexpr (M < B::kFusedRows)
        if (p->M > M) return gemm_few<B, M + 1>(p, b, count, a, parallel);
    gemm_fused<B, M>(p, b, count, a, parallel);
}

// The product of m rows from row0 on, and of kb of their k from k0 on.
template <class B> struct Block {
    const Product& p;
    const B& b;
    // A as rows, `step` from one to the next; where that is 0 as columns, `k_step` from k to k; where both are, as packed panels,
    // (kb, rows) each.
    const float* a;
    int64_t step, k_step;
    float* packed_a;  // what is copied or packed for the above
    int64_t row0, k0, kb, depth;
    RowPanels panels;

    FASTLM_MEMBER int64_t place(int64_t panel, int64_t k) const {
        const int64_t begin = panels.begin(panel);
        return step ? begin * step + k : k_step ? begin + k * k_step : begin * kb + k * panels.rows(panel);
    }
    FASTLM_MEMBER Ahead ahead(int64_t panel, int64_t k, int64_t kc) const {
        const int64_t rows = panels.rows(panel);
        if (k_step) return {};
        return step ? ahead_of(a + place(panel, k), kc, step, rows) : ahead_of(a + place(panel, k), rows * kc, 0, 1);
    }
    // What a panel of A is made from. Of a transposed A the line of each k where the panel ends: panels share the others.
    FASTLM_MEMBER Ahead raw(int64_t panel, int64_t k, int64_t kc) const {
        const int64_t row = row0 + panels.begin(panel), rows = panels.rows(panel);
        if (p.a_transposed) return ahead_of(p.a + (k0 + k) * p.M + row + rows - 1, 1, p.M, kc);
        return ahead_of(p.a + row * p.row_step() + k0 + k, kc, p.row_step(), rows);
    }
    FASTLM_MEMBER void make(int64_t panel, int64_t k, int64_t kc) const {
        const int64_t row = row0 + panels.begin(panel), rows = panels.rows(panel);
        float* out = packed_a + place(panel, k);
        if (step) copy_rows(out, step, p.a + row * p.row_step() + k0 + k, p.row_step(), rows, kc);
        else pack_a_panel(out, p, row, rows, k0 + k, kc);
    }

    // Columns n0 .. n1 of the panels first .. last. kMakeA: makes each panel just before it is used.
    template <bool kMakeA> void piece(float* packed, int64_t n0, int64_t n1, int64_t first, int64_t last) const {
        const int64_t width = n1 - n0;
        alignas(64) float tile[(MR + W - 1) / W * W * NR] = {};
        int64_t k = 0;
        do {
            const int64_t kc = least(depth, kb - k), end = k + kc;
            const bool from_zero = k0 + k == 0 && !p.accumulate, end_of_chain = k0 + end == p.K;
            b.pack(packed, k0 + k, kc, n0, width);
            // For B the next block of k, or what this thread is likely to take next.
            const int64_t then = end < kb ? n0 : n1, k_then = end < kb ? end : 0, kc_then = least(depth, kb - k_then);
            Fetch fetch;
            Ahead &panel = fetch.queue[0], &source = fetch.queue[1], &columns = fetch.queue[2];
            columns = then < p.N ? b.ahead(k0 + k_then, kc_then, then, least(width, p.N - then)) : p.next;
            for (int64_t i = first; i < last; ++i) {
                const int64_t row = panels.begin(i), rows = panels.rows(i);
                const int64_t lda = step ? step : k_step ? k_step : rows;
                const bool more = i + 1 < last;
                if (kMakeA) {
                    make(i, k, kc);
                    if (more) source = raw(i + 1, k, kc);
                }
                // Where A is made here, the memory that it is written to; for a single tile that and the source would be too much.
                if (last - first > 1 && !(kMakeA && width <= NR))
                    panel = more ? ahead(i + 1, k, kc) : then < p.N ? ahead(first, k_then, kc_then) : Ahead{};
                for (int64_t n = n0; n < n1; n += NR) {
                    const int64_t c = least(NR, n1 - n);
                    const bool wide = c > W;
                    const Micro multiply = step ? (wide ? micros<NV, true> : micros<1, true>)[rows]
                                                : (wide ? micros<NV, false> : micros<1, false>)[rows];
                    if (p.target.turned) {  // all of the chain at once, by gemm_block
                        const Turned turned{row0 + row, rows, n, c, more && p.target.residual != p.target.y};
                        p.target.fetch_turned(turned);
                        fetch.c = tile;
                        multiply(a + place(i, k), lda, packed + (n - n0) * kc, kc, tile, NR, NR, true, nullptr, fetch);
                        finish_turns[int(p.target.activation)](p.target, turned, tile, NR);
                        continue;
                    }
                    if (end_of_chain) p.target.fetch(row0 + row, n, rows, c);
                    float* sum = p.target.sum + (row0 + row) * p.N + n;
                    // What is only written is needed at the end, what is added to at once: then the tile after this one.
                    fetch.c = from_zero ? sum : n + NR < n1 ? sum + NR : sum + rows * p.N - (n - n0);
                    multiply(a + place(i, k), lda, packed + (n - n0) * kc, kc, sum, p.N, c, from_zero,
                             end_of_chain && p.target.bias ? p.target.bias + n : nullptr, fetch);
                    if (end_of_chain) p.target.finish(row0 + row, n, rows, c);
                }
            }
            k = end;
        } while (k < kb);
    }
};

// The transpose of C = A B is B^T A^T, where B is read where it lies: then it is A that is packed, and no weight, which for rows so
// few takes a part of the time. Turning the tiles costs more than that where rows are many. A B (K, N) is read MR numbers of a row
// at a time: where these are most of a line, and all of B is near. The sums of a tile are whole chains.
constexpr int64_t kTurns = 8;                                 // numbers of K for a row
constexpr int64_t kTurnedFloats = 1 << 19, kTurnedRows = 32;  // of such a B at most, of A at least
FASTLM_INLINE int64_t turned_panels(int64_t K) { return kPackedB / NR / greatest(1, K); }
FASTLM_INLINE bool turns(const Product& p, bool b_transposed) {
    if (p.M <= kFused || p.N <= kFused || kTurns * p.M > p.K || turned_panels(p.K) == 0) return false;
    if (p.a_transposed || p.accumulate || p.a_row) return false;
    return b_transposed ? reads_rows(false, p.K) : MR >= 12 && p.M >= kTurnedRows && p.K * p.N <= kTurnedFloats;
}

// Threads that rows are dealt to. Many rows are cut, one part a thread, so that A and C stay in the caches of the thread that has
// these rows in the operations before and after.
FASTLM_INLINE int64_t rows_dealt_to(int64_t m, int64_t N, bool parallel) {
    const int64_t threads = parallel ? num_threads() : 1;
    return m >= kRowsEach * threads && N <= kWideness * m ? threads : 1;
}

// make_a: A's panels are not in packed_a yet, and not read where they lie.
template <class B> void gemm_block(const Product& p, const B& b, const float* a, int64_t step, int64_t k_step, float* packed_a,
                                   float* packed_b, int64_t row0, int64_t m, int64_t k0, int64_t kb, bool make_a, bool parallel) {
    const bool turned = p.target.turned;
    const int64_t blocks = kb && !turned ? ceil_div(kb, kDepth) : 1, depth = ceil_div(ceil_div(kb, blocks), 32) * 32;
    const int64_t dealt_to = turned ? 1 : rows_dealt_to(m, p.N, parallel);
    const Block<B> block{p, b, a, step, k_step, packed_a, row0, k0, kb, depth, RowPanels(m, MR, dealt_to)};
    const int64_t panels = block.panels.count, threads = num_threads();
    const int64_t columns = ceil_div(p.N, NR);
    const int64_t group = turned ? least(columns, turned_panels(kb)) : group_size(columns, parallel),
                  groups = ceil_div(columns, group);
    // Few columns: the rows are cut until there are enough pieces. A panel of B is packed once for each cut.
    const int64_t cuts = !parallel              ? 1
                         : turned               ? greatest(1, least(panels / 8, ceil_div(2 * threads, groups)))
                         : dealt_to > 1         ? dealt_to
                         : groups < 3 * threads ? least(panels, ceil_div(4 * threads, groups))
                                                : 1;
    const auto pack_room = [&]() FASTLM_LAMBDA {
        return packed_b ? packed_b : static_cast<float*>(scratch(size_t(kPackedB) * sizeof(float)));
    };
    // Where panels of B are dealt one by one, the first group is so wide that each thread has as many of the others.
    const int64_t odd = group == 1 && cuts == 1 && parallel ? least(kPanels - 1, (columns - 1) % threads) : 0;
    const int64_t done = make_a ? least(columns, group + odd) : 0, left = columns - done;
    const int64_t dealt = cuts == 1 && parallel ? threads : 1, rest = least(left, ceil_div(ceil_div(left, group), dealt) * dealt);
    if (make_a) {
        const int64_t parts = parallel ? least(panels, 2 * threads) : 1;
        for_pieces(parallel, parts, 1, [&](int64_t begin, int64_t end) {
            for (int64_t part = begin; part < end; ++part)
                block.template piece<true>(pack_room(), 0, least(p.N, done * NR), part * panels / parts,
                                           (part + 1) * panels / parts);
        });
    }
    for_pieces(parallel, rest * cuts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t i = piece % rest, cut = piece / rest;
            const int64_t n0 = (done + i * left / rest) * NR, n1 = least(p.N, (done + (i + 1) * left / rest) * NR);
            block.template piece<false>(pack_room(), n0, n1, cut * panels / cuts, (cut + 1) * panels / cuts);
        }
    });
}

FASTLM_INLINE bool enough(const Product& p) { return num_threads() > 1 && p.M * p.N * p.K >= kAlone; }

// packed_a: packed_a_size(M, K, ..) floats. packed_b: kPackedB floats, or null for the scratch of each thread. is_made: packed_a
// holds A's panels already.
template <class B> void gemm(const Product& p, const B& b, float* packed_a, float* packed_b, bool parallel, bool is_made = false) {
    if (p.M == 0 || p.N == 0) return;
    const bool threads = parallel && num_threads() > 1;
    parallel = parallel && enough(p);
    const int64_t most = rows_at_once(p.M);
    const bool lies = most == 1 || p.target.turned || reads_rows(p.a_transposed, p.row_step());
    for (int64_t row = 0; row < p.M; row += most) {
        const int64_t m = least(most, p.M - row), at_once = p.target.turned ? p.K : depth_at_once(most, p.K);
        int64_t k0 = 0;
        do {
            const int64_t kb = least(at_once, p.K - k0);
            const bool few = p.M <= B::kFusedRows && !p.accumulate && kb == p.K && !p.target.turned;
            if constexpr (B::kFusedRows > 0)
                if (few) {
                    if (most > 1 && !is_made)
                        for (int64_t k = 0; k < kb; k += 128) pack_a_panel(packed_a + k * m, p, 0, m, k, least(128, kb - k));
                    return gemm_few<B, 1>(&p, &b, 1, most > 1 ? packed_a : p.a, threads);
                }
            const bool columns = p.a_transposed && most > 1;
            const int64_t step = columns ? 0 : lies ? p.row_step() : kb + kPad, k_step = columns && lies ? p.M : 0;
            const float* a = !lies ? packed_a : columns ? p.a + row : p.a + row * p.row_step() + k0;
            // Many panels of A are each made just before their first use, by the thread that uses them.
            const bool late = !lies && !is_made && m >= 4 * MR * (parallel ? num_threads() : 1);
            if (!lies && !is_made && !late) {
                const Block<B> block{
                    p, b, a, step, k_step, packed_a, row, k0, kb, kb, RowPanels(m, MR, rows_dealt_to(m, p.N, parallel))};
                const int64_t grain = ceil_div(1 << 16, MR * (kb ? kb : 1));
                for_pieces(parallel, block.panels.count, grain, [&](int64_t begin, int64_t end) {
                    for (int64_t k = 0; k < kb; k += 128)  // so that a transposed A is read in lines that stay in L1
                        for (int64_t i = begin; i < end; ++i) block.make(i, k, least(128, kb - k));
                });
            }
            gemm_block(p, b, a, step, k_step, packed_a, packed_b, row, m, k0, kb, late, parallel);
            k0 += kb;
        } while (k0 < p.K);
    }
}

// Several products of one A, (M, K): in one go where the rows are few, else one after the other, of panels that the first has
// packed.
template <class B> void gemm_together(const Product* p, const B* b, int64_t count, float* packed_a) {
    const int64_t M = p->M, K = p->K;
    bool together = M > 0 && M <= B::kFusedRows && depth_at_once(M, K) == K;
    for (int64_t i = 0; i < count; ++i) together = together && p[i].N > 0;
    if (!together) {
        const bool whole = M > B::kFusedRows && rows_at_once(M) == M && depth_at_once(M, K) == K;
        const auto dealt_to = [&](int64_t i) { return rows_dealt_to(M, p[i].N, enough(p[i])); };
        for (int64_t i = 0; i < count; ++i) {
            const bool is_made = i > 0 && whole && p[i - 1].N > 0 && dealt_to(i) == dealt_to(i - 1);
            gemm(p[i], b[i], packed_a, nullptr, true, is_made);
        }
        return;
    }
    const float* a = p->a;
    if (M > 1) {
        for (int64_t k = 0; k < K; k += 128) pack_a_panel(packed_a + k * M, *p, 0, M, k, least(128, K - k));
        a = packed_a;
    }
    gemm_few<B, 1>(p, b, count, a, num_threads() > 1);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
