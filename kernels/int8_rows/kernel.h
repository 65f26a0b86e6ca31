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
// A row of A: the low bytes of its codes, group by group among the rows of its panel; then, row by row, its ends.
struct Ends {
    float scale;
    int16_t high[kInt8Beyond];   // what the low bytes leave of two codes, over 256
    int32_t place[kInt8Beyond];  // of their columns in a panel of W
};
FASTLM_INLINE int64_t rounded_bytes(int64_t K) { return groups_of(K) * kGroup + int64_t(sizeof(Ends)); }

// The three largest magnitudes of each lane, the largest first; compared as integers, which order not-a-number above infinity.
struct Largest {
    vi first = seti(0), second = seti(0), third = seti(0);
    FASTLM_MEMBER void see(vf v) {
        const vi size = as_int(abs(v)), below = mini(first, size), last = mini(second, below);
        first = maxi(first, size), second = maxi(second, below), third = maxi(third, last);
    }
    FASTLM_MEMBER bool finite() const { return bits(lt(as_float(first), set(__builtin_inff()))) == kLanes; }
    // The largest of all, taken out.
    FASTLM_MEMBER float take() {
        const float most = reduce_max(as_float(first));
        const uint32_t here = bits(eq(as_float(first), set(most))) & kLanes;
        const vm one = eq(to_float(iota()), set(float(__builtin_ctz(here))));
        first = as_int(select(one, as_float(second), as_float(first)));
        second = as_int(select(one, as_float(third), as_float(second)));
        return most;
    }
};

// Codes in the making, raised by 128. Their low bytes are stored; of what these leave, over 256, each lane keeps the sum and the
// sum over all vectors of the sum until then, by which the place of a single one is found. Additions and shifts alone: beside a
// product, which has the multipliers, they cost next to nothing, where a comparison that gives a mask would take a product's turn.
constexpr float kRaise = 0x1.8p23f + 128.0f;  // after this addition the low bits are the code, rounded to even
struct Codes {
    vi high = seti(0), since = seti(0);
    FASTLM_MEMBER void store(uint8_t* to, vf v, vf inverse) {
        const vi code = as_int(v * inverse + set(kRaise));
        store_i8(to, code);
        high = addi(high, subi(sra<8>(code), seti(0x4B4000)));
        since = addi(since, high);
    }
};

// Row i of a panel of R rows, in two passes over a by groups of K: the largest magnitudes; the codes. A pass may be taken group by
// group beside a product, whose multiplications leave room for what it does.
struct RoundRow {
    const float *a, *columns;
    int64_t K, R;
    uint8_t *to, *last;  // the first group's codes; the ends
    Largest largest;
    Codes codes;
    float inverse, scale;
    bool live;  // between the passes: whether there are codes

    FASTLM_MEMBER void open(const float* row, const float* g, int64_t depth, uint8_t* out, int64_t rows, int64_t i) {
        a = row, columns = g, K = depth, R = rows;
        to = out + i * kGroup, last = out + R * groups_of(K) * kGroup + i * int64_t(sizeof(Ends));
    }
    FASTLM_MEMBER vf at(int64_t k) const {
        if (k + W <= K) return columns ? load(a + k) * load(columns + k) : load(a + k);
        return columns ? load_n(a + k, K - k) * load_n(columns + k, K - k) : load_n(a + k, K - k);
    }
    FASTLM_MEMBER uint8_t* place(int64_t k) const { return to + k / kGroup * kGroup * R + k % kGroup; }

    // After the first pass.
    FASTLM_MEMBER void between() {
        live = K > 0 && largest.finite();
        if (!live) {
            Ends ends = {K == 0 ? 0.0f : __builtin_nanf(""), {}, {kHead, kHead}};
            for (int64_t g = 0; g < groups_of(K); ++g) std::memset(to + g * kGroup * R, 128, kGroup);
            std::memcpy(last, &ends, sizeof(Ends));
            return;
        }
        const float first = largest.take();
        for (int e = 1; e < kInt8Beyond; ++e) largest.take();
        const float rest = reduce_max(as_float(largest.first)), least = first * (1.0f / 256), most = rest < least ? least : rest;
        inverse = scale = 0.0f, codes = Codes();
        if (most >= 0x1p-100f) scale = most * (1.0f / 127.0f), inverse = 127.0f / most;
    }
    // After the second.
    FASTLM_MEMBER void close() {
        for (int64_t k = (K + W - 1) / W * W; k < groups_of(K) * kGroup; k += W) store_i8(place(k), seti(128));
        Ends ends = {scale, {}, {kHead, kHead}};
        const uint32_t here = ~bits(eq(to_float(ori(codes.high, codes.since)), zero())) & kLanes;
        if (__builtin_popcount(here) == kInt8Beyond) {  // each lane has one: the sums of sums say how many vectors ago
            int32_t high[W], ago[W];
            store(reinterpret_cast<float*>(high), as_float(codes.high));
            store(reinterpret_cast<float*>(ago), as_float(to_int(to_float(codes.since) / to_float(codes.high))));
            const int lanes[kInt8Beyond] = {__builtin_ctz(here), 31 - __builtin_clz(here)};
            for (int e = 0; e < kInt8Beyond; ++e) {
                const int64_t k = (ceil_div(K, W) - ago[lanes[e]]) * W + lanes[e];
                keep(ends, e, greatest(least(k, K - 1), 0), high[lanes[e]]);  // within W also where x changes meanwhile
            }
        } else if (here != 0) {
            find(ends, __builtin_ctz(here));
        }
        std::memcpy(last, &ends, sizeof(Ends));
    }
    static FASTLM_MEMBER void keep(Ends& ends, int e, int64_t k, int32_t high) {
        ends.high[e] = int16_t(high), ends.place[e] = int32_t(kHead + k / 4 * kWord + k % 4);
    }
    // In lane l, which alone has any, be it one or two.
    void find(Ends& ends, int l) const {
        int e = 0;
        for (int64_t k = l; k < K && e < kInt8Beyond; k += W) {
            const float v = (columns ? a[k] * columns[k] : a[k]) * inverse + kRaise;
            int32_t code;
            std::memcpy(&code, &v, sizeof code);
            if (const int32_t high = (code >> 8) - 0x4B4000) keep(ends, e++, k, high);
        }
    }
    FASTLM_MEMBER void code(int64_t k) { codes.store(place(k), at(k), set(inverse)); }
    void all() {
        Largest found;
        for (int64_t k = 0; k < K; k += W) found.see(at(k));
        largest = found;
        between();
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

// sum (M, S W) = A panel times S vectors of rows of the weight, of which `columns` are wanted, plus bias. Beside it a pass of
// `row`, a group for each group of K. to, residual: where the tile will lie and what will be added to it, N from row to row;
// fetched. residual may be null.
template <int M, int S, Beside B> void rows_block(const uint8_t* packed, int64_t K, int64_t column, int64_t columns,
                                                  const uint8_t* a, float* sum, int64_t ld, const float* bias, const float* to,
                                                  const float* residual, int64_t N, RowsFetch fetch, RoundRow* row) {
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
    Largest largest;
    Codes made;
    const vf inverse = set(B == Beside::codes ? row->inverse : 0.0f);
    uint8_t* codes_at = B == Beside::codes ? row->to : nullptr;
    const auto word = [&](int64_t t) FASTLM_LAMBDA {  // a word at a time: two would not fit the registers
        if (B != Beside::nothing && t % kWords == 0) {
            const int64_t k = t * 4;
#pragma GCC unroll 4
            for (int64_t l = 0; l < kGroup; l += W) {
                if (B == Beside::largest) largest.see(load(row->a + k + l) * load(row->columns + k + l));
                if (B == Beside::codes)
                    made.store(codes_at + t / kWords * kGroup * row->R + l, load(row->a + k + l) * load(row->columns + k + l),
                               inverse);
            }
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
    };
    // What comes after the products is fetched into L2 by their first words, row by row, since more at once than there are buffers
    // for misses would hold up the products; into L1 by their last: at the first, W would have driven it out of L1 again.
    const int64_t words = kWords * groups, near = M > kUnfetchedRows ? greatest(words - M, 0) : words;
    const float* added = residual ? residual : to;
    int64_t t = 0;
    if (M > kUnfetchedRows) {
        for (; t < least(M, near); ++t) {
            __builtin_prefetch(to + t * N, 1, 2);
            __builtin_prefetch(to + t * N + 16, 1, 2);
            __builtin_prefetch(added + t * N, 0, 2);
            __builtin_prefetch(added + t * N + 16, 0, 2);
            word(t);
        }
    }
    for (; t < near; ++t) word(t);
    for (; t < words; ++t) {
        const int64_t i = t - near;
        __builtin_prefetch(added + i * N, 0, 3);
        __builtin_prefetch(added + i * N + 16, 0, 3);
        __builtin_prefetch(to + i * N, 1, 3);
        __builtin_prefetch(to + i * N + 16, 1, 3);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s)
            for (const int32_t place : ends[i].place) {
                __builtin_prefetch(panels[s] + place, 0, 3);
                __builtin_prefetch(panels[s] + place - 3, 0, 3);
            }
        word(t);
    }
    if (B == Beside::largest) row->largest = largest;
    if (B == Beside::codes) row->codes = made;
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        const int64_t left = columns - s * W;
        const vf extra = bias && left > 0 ? load_n(bias + s * W, left) : zero();
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const vi q = two_bytes(panels[s] + ends[i].place[1], panels[s] + ends[i].place[0]);
            const vi code = set_bytes(reinterpret_cast<const uint8_t*>(ends[i].high));
            store(sum + i * ld + s * W, to_float(dot16(dots[i][s], q, code)) * (d[s] * set(ends[i].scale)) + extra);
        }
    }
}

using RowsBlock = void (*)(const uint8_t*, int64_t, int64_t, int64_t, const uint8_t*, float*, int64_t, const float*, const float*,
                           const float*, int64_t, RowsFetch, RoundRow*);
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

// The products, whose rows are cut into panels as equal as they can be and whose columns, one product's after the other's, into
// steps.
struct RowsProduct {
    struct Part {
        const Int8Rows* p;
        Target target;
        int64_t steps;
    };
    struct Step {
        const Part& part;
        int64_t n;  // its first column
    };
    const Int8Rows& p;  // A, which is the same for all
    const int64_t count, size, longer, extra, row_bytes = rounded_bytes(p.K), panel = panel_bytes(p.K),
                                              words = kWords * groups_of(p.K);
    const RowsChoice choice = rows_choice(size + (longer ? 1 : 0)), shorter = rows_choice(size);
    const int64_t step = choice.columns, step_bytes = ceil_div(step, kSide) * panel;
    int64_t steps = 0, N = 0;
    Part parts[kTogether];

    explicit RowsProduct(const Int8RowsTogether& all)
        : p(all.each[0]),
          count(ceil_div(p.M, kTall)),
          size(p.M / count),
          longer(p.M % count),
          extra(ceil_div(longer << 32, count)) {
        for (int64_t i = 0; i < all.count; ++i) {
            const Int8Rows& e = all.each[i];
            parts[i] = {&e, make_target(e.c, e.z, e.bias, e.residual, e.N, e.activation), ceil_div(e.N, step)};
            steps += parts[i].steps, N += e.N;
        }
    }

    // Panels with a row more are spread evenly, so that threads have as many rows each: extra is longer / count, in 32 bits.
    FASTLM_MEMBER int64_t row_of(int64_t i) const { return i * size + ((i * extra) >> 32); }

    FASTLM_MEMBER Step step_of(int64_t s) const {
        const Part* part = parts;
        for (; s >= part->steps; ++part) s -= part->steps;
        return {*part, s * step};
    }

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
                row.between();
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

    // A tile of a panel and the columns of a step, and the next pass of `rounding`, if not null.
    FASTLM_MEMBER void multiply(int64_t i, const uint8_t* codes, Step at, RowsFetch fetch, Rounding* rounding = nullptr) const {
        const Int8Rows& e = *at.part.p;
        const Target& target = at.part.target;
        const int64_t row = row_of(i), rows = row_of(i + 1) - row, columns = least(step, e.N - at.n);
        float* to = target.sum + row * e.N + at.n;
        // What goes through a pass lies close together until then: rows of C can be so far apart that L1 has no room for them.
        alignas(64) float tile[kTall * kSide * 2];
        const bool part = columns < step, close = part || (target.pass && !e.z);
        float* sum = close ? tile : to;
        const int64_t ld = close ? step : e.N;
        const Beside beside = rounding ? rounding->open() : Beside::nothing;
        (rows > size ? choice : shorter)
            .block[int(beside)](e.packed, e.K, at.n, columns, codes, sum, ld, e.bias ? e.bias + at.n : nullptr, to,
                                e.residual ? e.residual + row * e.N + at.n : nullptr, e.N, fetch,
                                rounding ? &rounding->row : nullptr);
        if (rounding) rounding->close(beside);
        if (part)
            for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * e.N, tile + r * step, size_t(columns) * sizeof(float));
        if (target.pass) target.finish(part ? to : sum, part ? e.N : ld, row, at.n, rows, columns);
    }

    // The panels [first, last), whose codes are there, times the columns of step s; the next ones are fetched meanwhile, and rows
    // rounded.
    FASTLM_MEMBER void block(int64_t first, int64_t last, const uint8_t* codes, int64_t s, Rounding* rounding = nullptr) const {
        const Step at = step_of(s), next = step_of(s + 1 < steps ? s + 1 : 0);
        RowsFetch fetch = {next.part.p->packed + next.n / kSide * panel, ceil_div(step_bytes, (last - first) * words)};
        for (int64_t i = first; i < last; ++i, fetch.at += words * fetch.step)
            multiply(i, codes + (row_of(i) - row_of(first)) * row_bytes, at, fetch, rounding);
    }
};

void int8_rows(const Int8RowsTogether& all) {
    const Int8Rows& p = all.each[0];
    if (p.M == 0) return;
    const RowsProduct product(all);
    if (product.N == 0) return;
    const int64_t count = product.count, steps = product.steps;
    const bool threads = num_threads() > 1, parallel = threads && p.M * product.N * p.K >= kAloneRows;
    // Blocks of panels that a thread multiplies with all columns, while it rounds the next one beside.
    const int64_t threads_used = parallel ? num_threads() : 1;
    // Two passes a row: with fewer columns than that takes, some rows of a block are left to be rounded before it.
    const bool beside = p.columns && p.K % kGroup == 0 && product.size > kTall / 2 && steps >= kTall;
    int64_t blocks = least(count, ceil_div(p.M * p.K, beside ? kRowsBeside : kRowsOwn));
    if (parallel) blocks = ceil_div(blocks, num_threads()) * num_threads();
    if (count > 1 && blocks <= count && (!parallel || blocks >= 4 * num_threads())) {
        const int64_t most_panels = ceil_div(count, blocks), room = ceil_div(most_panels * kTall * product.row_bytes, 64) * 64;
        // Whose codes of a block lie where: a thread knows its own by their place, what another has begun it does again.
        auto** rounded = reinterpret_cast<uint8_t**>(all.workspace);
        std::memset(all.workspace, 0, size_t(blocks) * sizeof *rounded);
        for_pieces(parallel, blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                const int64_t first = block * count / blocks, last = (block + 1) * count / blocks,
                              next = least((block + 2) * count / blocks, count);
                auto* memory = static_cast<uint8_t*>(scratch(size_t(2 * room)));
                uint8_t *codes = memory + block % 2 * room, *other = memory + (block + 1) % 2 * room;
                if (__atomic_load_n(&rounded[block], __ATOMIC_RELAXED) != codes) product.round(first, last, codes);
                const bool goes_on = block + 1 < blocks && (block + 1) * threads_used / blocks == block * threads_used / blocks;
                RowsProduct::Rounding rounding(product, last, beside && goes_on ? next : last, other);
                for (int64_t s = 0; s < steps; ++s) product.block(first, last, codes, s, &rounding);
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
        [&](int64_t begin, int64_t end) { product.round(begin, end, all.workspace + product.row_of(begin) * product.row_bytes); });
    if (count == 1) {
        for_pieces(parallel, steps, ceil_div(8 * W, product.step), [&](int64_t begin, int64_t end) {
            for (int64_t s = begin; s < end; ++s) product.multiply(0, all.workspace, product.step_of(s), {});
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
            product.block(first, last, all.workspace + product.row_of(first) * product.row_bytes, piece % steps);
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
