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
constexpr int64_t kGroup = 16;               // of K that lie together
constexpr int64_t kWords = kGroup / 4;       // four of K each
constexpr int64_t kWord = 4 * kSide;         // bytes of a word of all lanes
constexpr int64_t kRowsBlock = 384 << 10;    // bytes of rounded A that stay in L2 while columns of W go by
constexpr int64_t kRowsOwn = 144 << 10;      // of those that one thread rounds before it multiplies them
constexpr int64_t kRowsBeside = 36 << 10;    // of those that it rounds beside a product
constexpr int64_t kHead = 2 * kWord;         // of a panel: the scales of its rows, and where their sums start
constexpr int64_t kAloneRows = 1 << 19;      // multiplications below which waking a thread costs more than it gives
constexpr int64_t kAloneRounding = 1 << 15;  // numbers
constexpr uint32_t kLanes = (1u << W) - 1;
constexpr int64_t kRowsAhead = 2048;  // bytes from what is read to what is fetched

// Few rows are bound by memory: they take one panel of W at a time, which is then read from its first byte to its last, faster than
// any number of streams that are fetched ahead. So few are never a panel beside others, whose columns it must share.
constexpr int kUnfetchedRows = (kTall - 1) / 2;
constexpr int rows_vectors(int rows) { return rows <= kUnfetchedRows && kWide == 2 ? int(kSide / W) : kWide; }

FASTLM_INLINE int64_t groups_of(int64_t K) { return ceil_div(K, kGroup); }
FASTLM_INLINE int64_t panel_bytes(int64_t K) { return kHead + groups_of(K) * kWords * kWord; }
// A row of A: its codes, group by group among the rows of its panel; then, row by row, its ends.
struct Ends {
    float scale;
    float exact[kInt8Exact];    // what is not rounded
    int32_t place[kInt8Exact];  // of its column in a panel of W
};
FASTLM_INLINE int64_t rounded_bytes(int64_t K) { return groups_of(K) * kGroup + int64_t(sizeof(Ends)); }

// The three largest magnitudes of each lane, the largest first; compared as integers, which order not-a-number above infinity. And
// how many vectors ago the first two were seen. Additions, shifts and the like alone: beside a product, which has the multipliers,
// they cost nothing, where a comparison that gives a mask would take a product's turn.
struct Largest {
    vi first = seti(0), second = seti(0), third = seti(0), first_age = seti(0), second_age = seti(0);
    FASTLM_MEMBER void see(vf v) {
        const vi size = as_int(abs(v)), below = mini(first, size), last = mini(second, below);
        const vi over = sra<31>(subi(first, size)), between = sra<31>(subi(second, size));  // all ones where size is larger
        const vi older = addi(first_age, seti(1));
        second_age = ori(andi(over, older), andi(xori(over, seti(-1)), andi(xori(between, seti(-1)), addi(second_age, seti(1)))));
        first_age = andi(xori(over, seti(-1)), older);
        first = maxi(first, size), second = maxi(second, below), third = maxi(third, last);
    }
    // Without ages, where nothing stands beside.
    FASTLM_MEMBER void see_size(vf v) {
        const vi size = as_int(abs(v)), below = mini(first, size), last = mini(second, below);
        first = maxi(first, size), second = maxi(second, below), third = maxi(third, last);
    }
    FASTLM_MEMBER bool finite() const { return bits(lt(as_float(first), set(__builtin_inff()))) == kLanes; }
    // The largest of all, taken out, and its place, the lowest where equal; of `vectors` seen. Zero: no place.
    FASTLM_MEMBER float take(int64_t vectors, int64_t& k) {
        const float most = reduce_max(as_float(first));
        int32_t ages[W];
        store(reinterpret_cast<float*>(ages), as_float(first_age));
        k = -1;
        int lane = 0;
        for (uint32_t here = bits(eq(as_float(first), set(most))) & kLanes; here != 0 && most != 0.0f; here &= here - 1) {
            const int l = __builtin_ctz(here);
            const int64_t at = (vectors - 1 - ages[l]) * W + l;
            if (k < 0 || at < k) k = at, lane = l;
        }
        const vm one = eq(to_float(iota()), set(float(lane)));
        first = as_int(select(one, as_float(second), as_float(first)));
        first_age = as_int(select(one, as_float(second_age), as_float(first_age)));
        second = as_int(select(one, as_float(third), as_float(second)));
        return most;
    }
};

// Row i of a panel of R rows, in two passes over a by groups of K: the largest magnitudes; the codes, raised by 128, and where lies
// what is exact. A pass may be taken group by group beside a product, whose multiplications leave room for what it does.
struct RoundRow {
    const float *a, *columns;
    int64_t K, R;
    uint8_t *to, *last;  // the first group's codes; the ends
    Largest largest;
    Ends ends;
    float inverse;
    int64_t taken[kInt8Exact];
    bool live;  // between the passes: whether there are codes

    FASTLM_MEMBER void open(const float* row, const float* g, int64_t depth, uint8_t* out, int64_t rows, int64_t i) {
        a = row, columns = g, K = depth, R = rows;
        to = out + i * kGroup, last = out + R * groups_of(K) * kGroup + i * int64_t(sizeof(Ends));
        largest = Largest(), ends = {}, live = false;
    }
    FASTLM_MEMBER vf at(int64_t k) const {
        if (k + W <= K) return columns ? load(a + k) * load(columns + k) : load(a + k);
        return columns ? load_n(a + k, K - k) * load_n(columns + k, K - k) : load_n(a + k, K - k);
    }
    FASTLM_MEMBER uint8_t* place(int64_t k) const { return to + k / kGroup * kGroup * R + k % kGroup; }

    // After the first pass.
    void between(bool aged) {
        if (K == 0 || !largest.finite()) {
            ends.scale = K == 0 ? 0.0f : __builtin_nanf("");
            for (int32_t& e : ends.place) e = int32_t(kWord + 3);  // any four bytes of the panel
            for (int64_t g = 0; g < groups_of(K); ++g) std::memset(to + g * kGroup * R, 128, kGroup);
            std::memcpy(last, &ends, sizeof(Ends));
            return;
        }
        float exact[kInt8Exact];
        for (int e = 0; e < kInt8Exact; ++e) exact[e] = largest.take(ceil_div(K, W), taken[e]);
        if (!aged) find(exact);
        for (int e = 0; e < kInt8Exact; ++e) {
            if (taken[e] < 0) taken[e] = e ? taken[0] : 0;  // zero, wherever it is
            else if (exact[e] != 0.0f) ends.exact[e] = columns ? a[taken[e]] * columns[taken[e]] : a[taken[e]];
            ends.place[e] = int32_t(kHead + taken[e] / 4 * kWord + taken[e] % 4);
        }
        const float most = reduce_max(as_float(largest.first));
        inverse = 0.0f, live = true;
        if (most >= 0x1p-100f) ends.scale = most * (1.0f / 127.0f), inverse = 127.0f / most;
    }
    // Where these lie, the lowest k where equal.
    void find(const float (&exact)[kInt8Exact]) {
        int left = 0;
        for (int e = 0; e < kInt8Exact; ++e) taken[e] = -1, left += exact[e] != 0.0f;
        const vf least_exact = set(exact[left ? left - 1 : 0]);
        for (int64_t k = 0; left > 0; k += W) {
            const vf v = at(k);
            for (uint32_t here = bits(le(least_exact, abs(v))) & kLanes; here != 0; here &= here - 1) {
                float lanes[W];
                store(lanes, abs(v));
                const int lane = __builtin_ctz(here);
                for (int e = 0; e < kInt8Exact; ++e) {
                    if (taken[e] >= 0 || lanes[lane] != exact[e]) continue;
                    taken[e] = k + lane, --left;
                    break;
                }
            }
        }
    }
    FASTLM_MEMBER void code(int64_t k) {
        // After this addition a lane's low byte is the code, rounded to even.
        store_i8(place(k), as_int(at(k) * set(inverse) + set(0x1.8p23f + 128.0f)));
    }
    void close() {
        int64_t k = (K + W - 1) / W * W;
        for (; k < groups_of(K) * kGroup; k += W) store_i8(place(k), seti(128));
        for (const int64_t t : taken) *place(t) = 128;
        std::memcpy(last, &ends, sizeof(Ends));
    }
    void all() {
        Largest found;
        for (int64_t k = 0; k < K; k += W) found.see_size(at(k));
        largest = found;
        between(false);
        if (!live) return;
        for (int64_t k = 0; k < K; k += W) code(k);
        close();
    }
};

void round_row(const float* a, const float* columns, int64_t K, uint8_t* out, int64_t R, int64_t i) {
    RoundRow row;
    row.open(a, columns, K, out, R, i);
    row.all();
}

FASTLM_INLINE vi load_bytes(const uint8_t* p) { return as_int(load(reinterpret_cast<const float*>(p))); }

// What a block fetches for each word of W: `at` and the line after it, then `step` bytes on; null: each of its vectors kRowsAhead
// on.
struct RowsFetch {
    const uint8_t* at = nullptr;
    int64_t step = 0;
};

enum class Beside { nothing, largest, codes };  // the pass of a row that goes beside a product

// sum (M, columns) = A panel times S vectors of rows of the weight. Beside it a pass of `row`, a group for each group of K.
// residual: what will be added to the tile, to be fetched, or null.
template <int M, int S, Beside B> void rows_block(const uint8_t* packed, int64_t K, int64_t column, int64_t columns,
                                                  const uint8_t* a, float* sum, int64_t ld, const float* bias,
                                                  const float* residual, RowsFetch fetch, RoundRow* row) {
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
    // What comes after the products is fetched by their last words: at the first, W would have driven it out of L1 again.
    const int64_t near = kWords * groups - M;
    const float* added = residual ? residual : sum;
    Largest largest;
    const float inverse = B == Beside::codes ? row->inverse : 0.0f;
    uint8_t* codes_at = B == Beside::codes ? row->to : nullptr;
    for (int64_t t = 0; t < kWords * groups; ++t) {  // a word at a time: two would not fit the registers
        if (B != Beside::nothing && t % kWords == 0) {
            const int64_t k = t * 4;
#pragma GCC unroll 4
            for (int64_t l = 0; l < kGroup; l += W) {
                if (B == Beside::largest) largest.see(load(row->a + k + l) * load(row->columns + k + l));
                if (B == Beside::codes)
                    store_i8(codes_at + t / kWords * kGroup * row->R + l,
                             as_int(load(row->a + k + l) * load(row->columns + k + l) * set(inverse) + set(0x1.8p23f + 128.0f)));
            }
        }
        if (M > kUnfetchedRows) {
            const int64_t i = greatest(t - near, 0) * ld;
            __builtin_prefetch(added + i, 0, 3);
            __builtin_prefetch(added + i + 16, 0, 3);
            __builtin_prefetch(sum + i, 1, 3);
            __builtin_prefetch(sum + i + 16, 1, 3);
        }
        const uint8_t* from = a + t / kWords * M * kGroup + t % kWords * 4;
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
    if (B == Beside::largest) row->largest = largest;
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

using RowsBlock = void (*)(const uint8_t*, int64_t, int64_t, int64_t, const uint8_t*, float*, int64_t, const float*, const float*,
                           RowsFetch, RoundRow*);
struct RowsChoice {
    RowsBlock block[3];  // by what goes beside
    int64_t columns;
};
template <int M = kTall> RowsChoice rows_choice(int64_t rows) {
    if constexpr (M > 1)
        if (rows < M) return rows_choice<M - 1>(rows);
    constexpr int S = rows_vectors(M);
    if constexpr (M > kTall / 2)
        return {{rows_block<M, S, Beside::nothing>, rows_block<M, S, Beside::largest>, rows_block<M, S, Beside::codes>}, S * W};
    else return {{rows_block<M, S, Beside::nothing>, nullptr, nullptr}, S * W};
}

// The product, its rows cut into panels as equal as they can be.
struct RowsProduct {
    const Int8Rows& p;
    const Target target;
    const int64_t count, size, longer, row_bytes = rounded_bytes(p.K), panel = panel_bytes(p.K), words = kWords * groups_of(p.K);
    const RowsChoice choice = rows_choice(size + (longer ? 1 : 0)), shorter = rows_choice(size);
    const int64_t step = choice.columns, steps = ceil_div(p.N, step), step_bytes = ceil_div(step, kSide) * panel;

    explicit RowsProduct(const Int8Rows& p)
        : p(p),
          target(make_target(p.c, p.z, p.bias, p.residual, p.N, p.activation)),
          count(ceil_div(p.M, kTall)),
          size(p.M / count),
          longer(p.M % count) {}

    FASTLM_MEMBER int64_t row_of(int64_t i) const { return i * size + least(i, longer); }

    // Panels of A to `out`, which begins with the first of them.
    FASTLM_MEMBER void round(int64_t begin, int64_t end, uint8_t* out) const {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = row_of(i), rows = row_of(i + 1) - first;
            for (int64_t r = 0; r < rows; ++r) round_row(p.a + (first + r) * p.K, p.columns, p.K, out, rows, r);
            out += rows * row_bytes;
        }
    }

    // Panels that are rounded row by row beside the product of others.
    struct Rounding {
        const RowsProduct& of;
        int64_t panel, end, r;  // the next row; r is that within the panel
        uint8_t* out;           // where the panel goes
        bool opened = false;    // the next row has had its first pass
        RoundRow row;

        Rounding(const RowsProduct& of, int64_t begin, int64_t end, uint8_t* out)
            : of(of), panel(begin), end(end), r(0), out(out) {}
        FASTLM_MEMBER Beside open() {
            if (panel == end) return Beside::nothing;
            if (opened) return Beside::codes;
            const int64_t first = of.row_of(panel), rows = of.row_of(panel + 1) - first;
            row.open(of.p.a + (first + r) * of.p.K, of.p.columns, of.p.K, out, rows, r);
            return Beside::largest;
        }
        FASTLM_MEMBER void close(Beside pass) {
            if (pass == Beside::nothing) return;
            if (pass == Beside::largest) {
                row.between(true);
                opened = row.live;
                if (opened) return;
            } else {
                row.close();
            }
            next();
        }
        FASTLM_MEMBER void next() {
            opened = false;
            if (++r < of.row_of(panel + 1) - of.row_of(panel)) return;
            out += r * of.row_bytes;
            ++panel, r = 0;
        }
        // What is left when there is no product any more.
        void finish() {
            while (panel < end) {
                if (opened) {
                    for (int64_t k = 0; k < of.p.K; k += W) row.code(k);
                    row.close();
                } else {
                    open();
                    row.all();
                }
                next();
            }
        }
    };

    // A tile of a panel and up to `step` columns from n on, and the next pass of `rounding`, if not null.
    FASTLM_MEMBER void multiply(int64_t i, const uint8_t* codes, int64_t n, int64_t columns, RowsFetch fetch,
                                Rounding* rounding = nullptr) const {
        const int64_t row = row_of(i), rows = row_of(i + 1) - row;
        float* sum = target.sum + row * p.N + n;
        target.fetch(row, n, rows, columns);
        fetch_tile(sum, p.N, rows);
        const Beside beside = rounding ? rounding->open() : Beside::nothing;
        (rows > size ? choice : shorter)
            .block[int(beside)](p.packed, p.K, n, columns, codes, sum, p.N, p.bias ? p.bias + n : nullptr,
                                p.residual ? p.residual + row * p.N + n : nullptr, fetch, rounding ? &rounding->row : nullptr);
        if (rounding) rounding->close(beside);
        target.finish(row, n, rows, columns);
    }

    // The panels [first, last), whose codes are there, times the columns of a step; the next ones are fetched meanwhile, and rows
    // rounded.
    FASTLM_MEMBER void block(int64_t first, int64_t last, const uint8_t* codes, int64_t n, Rounding* rounding = nullptr) const {
        RowsFetch fetch = {p.packed + (n + step) / kSide * panel, ceil_div(step_bytes, (last - first) * words)};
        for (int64_t i = first; i < last; ++i, fetch.at += words * fetch.step)
            multiply(i, codes + (row_of(i) - row_of(first)) * row_bytes, n, least(step, p.N - n), fetch, rounding);
    }
};

void int8_rows(const Int8Rows& p) {
    if (p.M == 0 || p.N == 0) return;
    const RowsProduct product(p);
    const int64_t count = product.count, step = product.step, steps = product.steps;
    const bool threads = num_threads() > 1, parallel = threads && p.M * p.N * p.K >= kAloneRows;
    // Blocks of panels that a thread multiplies with all columns, while it rounds the next one beside.
    const int64_t threads_used = parallel ? num_threads() : 1;
    // Two passes a row: with fewer columns than that takes, some rows of a block are left to be rounded before it.
    const bool beside = p.columns && p.K % kGroup == 0 && product.size > kTall / 2 && steps >= kTall;
    int64_t blocks = least(count, ceil_div(p.M * p.K, beside ? kRowsBeside : kRowsOwn));
    if (parallel) blocks = ceil_div(blocks, num_threads()) * num_threads();
    if (count > 1 && blocks <= count && (!parallel || blocks >= 4 * num_threads())) {
        const int64_t most_panels = ceil_div(count, blocks), room = ceil_div(most_panels * kTall * product.row_bytes, 64) * 64;
        // Whose codes of a block lie where: a thread knows its own by their place, what another has begun it does again.
        auto** rounded = reinterpret_cast<uint8_t**>(p.workspace);
        std::memset(p.workspace, 0, size_t(blocks) * sizeof *rounded);
        for_pieces(parallel, blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                const int64_t first = block * count / blocks, last = (block + 1) * count / blocks,
                              next = least((block + 2) * count / blocks, count);
                auto* memory = static_cast<uint8_t*>(scratch(size_t(2 * room)));
                uint8_t *codes = memory + block % 2 * room, *other = memory + (block + 1) % 2 * room;
                if (__atomic_load_n(&rounded[block], __ATOMIC_RELAXED) != codes) product.round(first, last, codes);
                const bool goes_on = block + 1 < blocks && (block + 1) * threads_used / blocks == block * threads_used / blocks;
                RowsProduct::Rounding rounding(product, last, beside && goes_on ? next : last, other);
                for (int64_t n = 0; n < p.N; n += step) product.block(first, last, codes, n, &rounding);
                if (!(beside && goes_on)) continue;
                rounding.finish();
                __atomic_store_n(&rounded[block + 1], other, __ATOMIC_RELAXED);
            }
        });
        return;
    }
    // Fewer rows: all of them first, then the columns are dealt.
    for_pieces(
        threads && p.M * p.K >= kAloneRounding, count, ceil_div(1 << 13, (product.size + 1) * (p.K + 1)),
        [&](int64_t begin, int64_t end) { product.round(begin, end, p.workspace + product.row_of(begin) * product.row_bytes); });
    if (count == 1) {
        for_pieces(parallel, p.N, ceil_div(8 * W, step) * step, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; n += step) product.multiply(0, p.workspace, n, least(step, end - n), {});
        });
        return;
    }
    blocks = ceil_div(p.M * p.K, kRowsBlock);
    if (steps * blocks < 6 * num_threads()) blocks = ceil_div(6 * num_threads(), steps);
    if (blocks > 1) blocks = ceil_div(blocks, num_threads()) * num_threads();
    blocks = least(blocks, count);
    parallel_for(blocks * steps, 1, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t block = piece / steps, first = block * count / blocks, last = (block + 1) * count / blocks;
            product.block(first, last, p.workspace + product.row_of(first) * product.row_bytes, piece % steps * step);
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
