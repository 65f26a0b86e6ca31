#include "fast_inner_product.h"

#include <cmath>
#include <cstring>

#include "kernels/matmul/columns.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

#if defined(FASTLM_ISA_AVX512)

// A tile: kTall rows by NV vectors of sums, four vectors of B for a pair, two for the k beside it, and two sums of a row's number
// and a column's. All 32 registers: what a row brings is read by the additions themselves.
constexpr int kTall = 12;
constexpr int kSteps = 5;            // of three k in a period, which ends with one more
constexpr int64_t kSampled = 64;     // rows of W that tell how large its numbers are, a line of each
constexpr int64_t kFewRows = 8;      // numbers of K for a row up to which W is read where it lies
constexpr int64_t kGrain = 1 << 18;  // numbers of W in a piece of it at most
constexpr int kMostScale = 126;      // of which the inverse is a normal number

// The loop's instructions. volatile: in this order, which fits the registers and lets additions run beside multiply-adds. A number
// of A is x[kK] of one of three rows, `step` bytes apart: the instruction that uses it finds it, no other and no register. kHalf:
// of 8 columns.
#define FASTLM_NUMBER(op, result, v_, to, out_)                                                                                   \
    if (row == 0)                                                                                                                 \
        asm volatile(op " %c4(%2)%{1to" to "%}, %" v_ "1, %" out_ "0" : result(out) : "v"(v), "r"(x), "r"(step), "i"(4 * kK));    \
    else if (row == 1)                                                                                                            \
        asm volatile(op " %c4(%2,%3)%{1to" to "%}, %" v_ "1, %" out_ "0" : result(out) : "v"(v), "r"(x), "r"(step), "i"(4 * kK)); \
    else asm volatile(op " %c4(%2,%3,2)%{1to" to "%}, %" v_ "1, %" out_ "0" : result(out) : "v"(v), "r"(x), "r"(step), "i"(4 * kK))
template <bool kHalf, int kK> FASTLM_INLINE vf add_number(const float* x, int64_t step, int row, vf v) {
    vf out;
    if constexpr (kHalf) {
        FASTLM_NUMBER("vaddps", "=v", "t", "8", "t");
    } else {
        FASTLM_NUMBER("vaddps", "=v", "g", "16", "g");
    }
    return out;
}
template <bool kHalf, int kK> FASTLM_INLINE vf fma_number(const float* x, int64_t step, int row, vf v, vf out) {
    if constexpr (kHalf) {
        FASTLM_NUMBER("vfmadd231ps", "+v", "t", "8", "t");
    } else {
        FASTLM_NUMBER("vfmadd231ps", "+v", "g", "16", "g");
    }
    return out;
}
#undef FASTLM_NUMBER
template <bool kHalf> FASTLM_INLINE vf fma_here(vf a, vf b, vf sum) {
    if constexpr (kHalf) asm volatile("vfmadd231ps %t1, %t2, %t0" : "+v"(sum) : "v"(a), "v"(b));
    else asm volatile("vfmadd231ps %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
template <bool kHalf> FASTLM_INLINE vf load_here(const float* p) {
    vf out;
    if constexpr (kHalf) asm volatile("vmovups %1, %t0" : "=v"(out) : "m"(*reinterpret_cast<const float (*)[W / 2]>(p)));
    else asm volatile("vmovups %1, %0" : "=v"(out) : "m"(*reinterpret_cast<const float (*)[W]>(p)));
    return out;
}

// What surrounds the chain of a tile.
struct Ends {
    const float *rows, *columns;            // what is taken away at its beginning: the sum of these
    const float *row_scale, *column_scale;  // at the last end: one of these, the other null; both null before
    const float* bias;                      // of columns, at the last end, or null
};

// sum (M, columns) = or += A B of kc k. A: M rows, `lda` from one to the next. B: a panel (kc, NR), of which V vectors are there.
template <int M, int V, bool kHalf> void pairs(const float* a, int64_t lda, const float* b, int64_t kc, float* sum, int64_t ld,
                                               int64_t columns, bool from_zero, const Ends& ends, Fetch& fetch) {
    vf acc[M][V];
    const bool whole = columns >= V * W;
    const auto at = [&](const float* p, int j)
                        FASTLM_LAMBDA { return whole ? load(p + j * W) : load_n(p + j * W, columns - j * W); };
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
        const vf own = load(ends.columns + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const vf both = own + set(ends.rows[i]);
            acc[i][j] = from_zero ? zero() - both : at(sum + i * ld, j) - both;
        }
    }
    constexpr int kPointers = (M + 2) / 3;
    const int64_t step = lda * int64_t(sizeof(float));
    const float* from[kPointers];
#pragma GCC unroll 8
    for (int i = 0; i < kPointers; ++i) from[i] = a + 3 * i * lda;
    const auto one = [&]() FASTLM_LAMBDA {
        vf v[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) v[j] = load_here<kHalf>(b + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) acc[i][j] = fma_number<kHalf, 0>(from[i / 3], step, i % 3, v[j], acc[i][j]);
#pragma GCC unroll 8
        for (int i = 0; i < kPointers; ++i) from[i] += 1;
        b += NR;
    };
    const auto three = [&]() FASTLM_LAMBDA {
        vf v[V], w[V], u[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j)
            v[j] = load_here<kHalf>(b + j * W), w[j] = load_here<kHalf>(b + NR + j * W),
            u[j] = load_here<kHalf>(b + 2 * NR + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) {
                const float* x = from[i / 3];
                const vf s = add_number<kHalf, 0>(x, step, i % 3, w[j]), t = add_number<kHalf, 1>(x, step, i % 3, v[j]);
                acc[i][j] = fma_here<kHalf>(s, t, fma_number<kHalf, 2>(x, step, i % 3, u[j], acc[i][j]));
            }
#pragma GCC unroll 8
        for (int i = 0; i < kPointers; ++i) from[i] += 3;
        b += 3 * NR;
    };
    const auto period = [&]() FASTLM_LAMBDA {
#pragma GCC unroll 1
        for (int s = 0; s < kSteps; ++s) three();
        one();
    };
    const int64_t periods = kc / kFipPeriod, last = periods > 4 ? periods - 4 : 0;
    int64_t done = 0;
    for (Ahead& waiting : fetch.queue) {
        Ahead ahead = waiting;
        for (; done < last && ahead.at; ++done) {
#pragma GCC unroll 1
            for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 4
                for (int l = 0; l < 3; ++l)
                    if (ahead.at) ahead.next();
                three();
            }
            one();
        }
        waiting = ahead;
    }
    for (; done < last; ++done) period();
    const float* c = fetch.c;
    for (int row = 0; done < periods; ++done) {
        for (const int end = least(row + 4, M); row < end; ++row, c += ld)
#pragma GCC unroll 4
            for (int j = 0; j < V * W; j += 16) __builtin_prefetch(c + j, 1, 3);
        period();
    }
    for (int64_t k = periods * kFipPeriod; k < kc; ++k) one();
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
        const vf scale = ends.column_scale ? load(ends.column_scale + j * W) : zero();
        const vf bias = ends.bias ? at(ends.bias, j) : zero();
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            if (ends.row_scale) acc[i][j] = acc[i][j] * set(ends.row_scale[i]);
            if (ends.column_scale) acc[i][j] = acc[i][j] * scale;
            if (ends.bias) acc[i][j] = acc[i][j] + bias;
            if (whole) store(sum + i * ld + j * W, acc[i][j]);
            else store_n(sum + i * ld + j * W, acc[i][j], columns - j * W);
        }
    }
}

using PairMicro = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t, bool, const Ends&, Fetch&);
template <int V, bool kHalf> const PairMicro pair_micros[kTall + 1] = {nullptr,
                                                                       pairs<1, V, kHalf>,
                                                                       pairs<2, V, kHalf>,
                                                                       pairs<3, V, kHalf>,
                                                                       pairs<4, V, kHalf>,
                                                                       pairs<5, V, kHalf>,
                                                                       pairs<6, V, kHalf>,
                                                                       pairs<7, V, kHalf>,
                                                                       pairs<8, V, kHalf>,
                                                                       pairs<9, V, kHalf>,
                                                                       pairs<10, V, kHalf>,
                                                                       pairs<11, V, kHalf>,
                                                                       pairs<12, V, kHalf>};
FASTLM_INLINE PairMicro pairs_of(int64_t rows, int64_t columns) {
    return columns > W ? pair_micros<NV, false>[rows] : columns > W / 2 ? pair_micros<1, false>[rows] : pair_micros<1, true>[rows];
}

// The sum of x1 x2 over the pairs of numbers, a period after the other.
struct Own {
    vf sums[4] = {zero(), zero(), zero(), zero()};
    FASTLM_MEMBER void add(vf v) {
        constexpr __mmask16 kFirst = 1 << 0 | 1 << 3 | 1 << 6 | 1 << 9 | 1 << 12;
        const vf sum = _mm512_mask3_fmadd_ps(v, as_float(_mm512_alignr_epi32(as_int(v), as_int(v), 1)), sums[0], kFirst);
        sums[0] = sums[1], sums[1] = sums[2], sums[2] = sums[3], sums[3] = sum;
    }
    FASTLM_MEMBER float sum() const { return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])); }
};
FASTLM_INLINE float own_pairs(const float* x, int64_t n) {
    Own own;
    int64_t k = 0;
    for (; k + 4 * kFipPeriod <= n; k += 4 * kFipPeriod)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) own.add(load(x + k + i * kFipPeriod));
    for (; k + kFipPeriod <= n; k += kFipPeriod) own.add(load(x + k));
    return own.sum();
}

// Blocks of k, the same for every product of this K.
struct Blocks {
    int64_t K, count, depth;
    explicit Blocks(int64_t K)
        : K(K), count(greatest(1, ceil_div(K, kFipDepth))), depth(ceil_div(ceil_div(K, count), kFipPeriod) * kFipPeriod) {}
    int64_t size(int64_t k) const { return least(depth, K - k); }
};

// The power of two that is nearest to a mean by its exponent; 0 where there is none.
int exponent_of(float mean) {
    if (!(mean > 0.0f) || !std::isfinite(mean)) return 0;
    uint32_t bits;
    const float up = mean * 1.41421356f;
    std::memcpy(&bits, &up, sizeof bits);
    return int(bits >> 23) - 127;
}

// The mean magnitude of W's numbers, from some, as a power of two.
int magnitude(const float* w, int64_t N, int64_t K) {
    const int64_t rows = least(N, kSampled), columns = least(K, W), places = K - columns + 1;
    float sum = 0.0f;
    for (int64_t i = 0; i < rows; ++i) {
        const float* from = w + i * N / rows * K + i * 37 % places;
        sum += reduce_add(abs(load_n(from, columns)));
    }
    return exponent_of(sum / float(rows * columns));
}

// The power of two that makes a row as large as W, for what is lost grows with their difference; 0 for a row of zeros, whose
// outputs then are.
float scale_of(const float* x, int64_t K, int like) {
    vf sum[2] = {zero(), zero()};
    int64_t k = 0;
    for (; k + 2 * W <= K; k += 2 * W) {
        sum[0] = sum[0] + abs(load(x + k));
        sum[1] = sum[1] + abs(load(x + k + W));
    }
    for (; k < K; k += W) sum[0] = sum[0] + abs(load_n(x + k, K - k));
    const float mean = reduce_add(sum[0] + sum[1]) / float(K);
    if (mean == 0.0f) return 0.0f;
    const int scale = like - exponent_of(mean);
    const uint32_t bits = uint32_t(127 + (scale < -kMostScale ? -kMostScale : scale > kMostScale ? kMostScale : scale)) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

int64_t step_of(int64_t K) {
    const int64_t step = ceil_div(K, W) * W + kPad;
    return share_l1(step * int64_t(sizeof(float))) ? step + kPad : step;
}

// Rows of x as large as W, (M, step); their own sums, (blocks, M); and what their outputs are multiplied with, (M,). Whole vectors
// of both are read.
struct Ready {
    int64_t M, K, step;
    float *rows, *sums, *back;
    Blocks blocks;
    int64_t each() const { return ceil_div(M, NR) * NR; }
    Ready(float* at, int64_t M, int64_t K) : M(M), K(K), step(step_of(K)), blocks(K) {
        rows = at;
        sums = rows + each() * step;
        back = sums + blocks.count * each();
    }
    static int64_t floats(int64_t M, int64_t K) {
        const int64_t each = ceil_div(M, NR) * NR;
        return each * (step_of(K) + Blocks(K).count + 1);
    }
    FASTLM_MEMBER void make(const float* x, int64_t i, int like) const {
        const float s = scale_of(x + i * K, K, like);
        float* out = rows + i * step;
        back[i] = s > 0.0f ? 1.0f / s : 0.0f;
        for (int64_t b = 0; b < blocks.count; ++b) {
            const int64_t first = b * blocks.depth, kc = blocks.size(first);
            Own own;
            int64_t k = first;
            for (; k + W <= first + kc; k += W) {
                const vf v = load(x + i * K + k) * set(s);
                store(out + k, v);
                own.add(v);
            }
            if (k < first + kc) store(out + k, load_n(x + i * K + k, first + kc - k) * set(s));
            sums[b * each() + i] = own.sum();
        }
    }
};

float* room(int64_t floats) { return static_cast<float*>(scratch(size_t(floats) * sizeof(float))); }

struct Work {
    const FastInnerProduct& p;
    Target target;
    const Ready& x;
    int64_t row0, m;

    // Columns n0 .. n1, panels first .. last of rows: W's panels are packed, and stay in L2 for all rows. `raw`: these rows of x,
    // to be made ready on the way, each panel just before it is used; or null.
    void piece(int64_t n0, int64_t n1, const RowPanels& panels, int64_t first, int64_t last, const float* raw, int like) const {
        const Columns<float> w{p.w, p.N, p.K};
        float* packed = room(kPackedB + kPanels * NR);
        float* own = packed + kPackedB;
        for (int64_t b = 0; b < x.blocks.count; ++b) {
            const int64_t k = b * x.blocks.depth, kc = x.blocks.size(k);
            const bool end = k + kc == p.K;
            const int64_t then = end ? n1 : n0, k_then = end ? 0 : k + kc;  // the columns and the k after these
            for (int64_t n = n0; n < n1; ++n) own[n - n0] = own_pairs(p.w + n * p.K + k, kc);
            w.pack(packed, k, kc, n0, n1 - n0);
            Fetch fetch;
            if (then < p.N) fetch.queue[2] = w.ahead(k_then, x.blocks.size(k_then), then, least(n1 - n0, p.N - then));
            for (int64_t i = first; i < last; ++i) {
                const int64_t row = panels.begin(i), rows = panels.rows(i);
                if (raw && b == 0) {
                    for (int64_t r = row; r < row + rows; ++r) x.make(raw, r, like);
                    if (i + 1 < last)
                        fetch.queue[0] = ahead_of(x.rows + (row + rows) * x.step, panels.rows(i + 1) * x.step, 0, 1),
                        fetch.queue[1] = ahead_of(raw + (row + rows) * p.K, panels.rows(i + 1) * p.K, 0, 1);
                } else if (i + 1 < last)
                    fetch.queue[0] = ahead_of(x.rows + panels.begin(i + 1) * x.step + k, kc, x.step, panels.rows(i + 1));
                else if (then < p.N)
                    fetch.queue[0] =
                        ahead_of(x.rows + panels.begin(first) * x.step + k_then, x.blocks.size(k_then), x.step, panels.rows(first));
                for (int64_t n = n0; n < n1; n += NR) {
                    const int64_t c = least(NR, n1 - n);
                    if (end) target.fetch(row0 + row, n, rows, c);
                    float* sum = target.sum + (row0 + row) * p.N + n;
                    fetch.c = b == 0 ? sum : n + NR < n1 ? sum + NR : sum + rows * p.N - (n - n0);
                    const Ends ends{x.sums + b * x.each() + row, own + (n - n0), end ? x.back + row : nullptr, nullptr,
                                    end && p.bias ? p.bias + n : nullptr};
                    pairs_of(rows, c)(x.rows + row * x.step + k, x.step, packed + (n - n0) * kc, kc, sum, p.N, c, b == 0, ends,
                                      fetch);
                    if (end) target.finish(row0 + row, n, rows, c);
                }
            }
        }
    }

    // The transpose, for few rows: W's rows first .. last are read where they lie, `packed` has panels of NR rows of x, (K, NR)
    // each.
    void turned(const float* packed, int64_t first, int64_t last, float* beside) const {
        alignas(64) float tile[W * NR] = {};
        const bool lies = !share_l1(p.K * int64_t(sizeof(float)));
        const int64_t step = lies ? p.K : x.step;
        const RowPanels panels(last - first, kTall);
        for (int64_t i = 0; i < panels.count; ++i) {
            const int64_t n = first + panels.begin(i), rows = panels.rows(i);
            const float* w = p.w + n * p.K;
            if (!lies) copy_rows(beside, step, w, p.K, rows, p.K);
            float* own = beside + kTall * x.step;
            for (int64_t b = 0; b < x.blocks.count; ++b)
                for (int64_t j = 0; j < rows; ++j)
                    own[b * kTall + j] = own_pairs(w + j * p.K + b * x.blocks.depth, x.blocks.size(b * x.blocks.depth));
            Fetch fetch;
            fetch.c = tile;
            if (i + 1 < panels.count) fetch.queue[0] = ahead_of(w + rows * p.K, p.K, p.K, panels.rows(i + 1));
            for (int64_t r = 0; r < m; r += NR) {
                const int64_t c = least(NR, m - r);
                const Turned to{n, rows, row0 + r, c, i + 1 < panels.count && target.residual != target.y};
                target.fetch_turned(to);
                for (int64_t b = 0; b < x.blocks.count; ++b) {
                    const int64_t k = b * x.blocks.depth, kc = x.blocks.size(k);
                    const Ends ends{own + b * kTall, x.sums + b * x.each() + r, nullptr, k + kc == p.K ? x.back + r : nullptr,
                                    nullptr};
                    pairs_of(rows, c)((lies ? w : beside) + k, step, packed + r * p.K + k * NR, kc, tile, NR, NR, b == 0, ends,
                                      fetch);
                }
                finish_turns[int(p.activation)](target, to, tile, NR);
            }
        }
    }
};

bool few(int64_t m, int64_t K) { return kFewRows * m <= K || m <= kTall; }

// W from where it lies, dealt by its rows.
void few_rows(const Work& work, const float* from, int like, bool made, bool parallel) {
    const Ready& x = work.x;
    const int64_t m = work.m, K = x.K, N = work.p.N;
    float* packed = x.back + x.each();
    if (!made)
        for_pieces(parallel && m > NR, ceil_div(m, NR), 1, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin * NR; r < least(m, end * NR); ++r) x.make(from, r, like);
            const Columns<float> rows{x.rows, m, x.step};
            for (int64_t r = begin; r < end; ++r) rows.pack(packed + r * NR * K, 0, K, r * NR, least(NR, m - r * NR));
        });
    // Whole tiles to a piece: what a turned tile writes beyond its columns is the next one's of the same piece.
    const int64_t grain = kTall * greatest(1, least(ceil_div(N, 4 * kTall * num_threads()), kGrain / (K * kTall)));
    for_pieces(parallel, N, grain,
               [&](int64_t begin, int64_t end) { work.turned(packed, begin, end, room(kTall * (x.step + x.blocks.count))); });
}

// W in packed panels, dealt by rows of x where these are many, else by columns. Dealt by rows, each thread makes its own ready.
void many_rows(const Work& work, const float* from, int like, bool made, bool parallel) {
    const int64_t m = work.m, N = work.p.N, threads = num_threads();
    const int64_t dealt_to = rows_dealt_to(m, N, parallel);
    const RowPanels panels(m, kTall, dealt_to);
    if (dealt_to > 1 || !parallel) {
        for_pieces(parallel, dealt_to, 1, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * panels.count / dealt_to, last = end * panels.count / dealt_to;
            for (int64_t n = 0; n < N; n += kPanels * NR)
                work.piece(n, least(N, n + kPanels * NR), panels, first, last, made || n > 0 ? nullptr : from, like);
        });
        return;
    }
    if (!made)
        for_pieces(true, m, 16, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) work.x.make(from, r, like);
        });
    const int64_t wide = ceil_div(N, NR), group = group_size(wide, true), groups = ceil_div(wide, group);
    const int64_t cuts = groups < 3 * threads ? least(panels.count, ceil_div(4 * threads, groups)) : 1;
    for_pieces(true, groups * cuts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t g = piece % groups, cut = piece / groups;
            work.piece(g * wide / groups * NR, least(N, (g + 1) * wide / groups * NR), panels, cut * panels.count / cuts,
                       (cut + 1) * panels.count / cuts, nullptr, like);
        }
    });
}

int64_t workspace(const FastInnerProduct& p) {
    const int64_t m = rows_at_once(p.M);
    return (Ready::floats(m, p.K) + (few(m, p.K) ? ceil_div(m, NR) * NR * p.K : 0)) * int64_t(sizeof(float));
}

void rows_of(const FastInnerProduct* p, int64_t count, float* workspace) {
    const int64_t K = p->K, most = rows_at_once(p->M);
    const auto product = few(most, K) ? few_rows : many_rows;
    int like[kTogether];
    int64_t columns = 0;
    for (int64_t i = 0; i < count; ++i) like[i] = magnitude(p[i].w, p[i].N, K), columns += p[i].N;
    for (int64_t row = 0; row < p->M; row += most) {
        const int64_t m = least(most, p->M - row);
        const bool parallel = num_threads() > 1 && greatest(m, W) * columns * K >= kAlone;
        const Ready x(workspace, m, K);
        for (int64_t i = 0; i < count; ++i) {
            const Target target = make_target(p[i].y, p[i].z, p[i].bias, p[i].residual, p[i].N, p[i].activation);
            product({p[i], target, x, row, m}, p->x + row * K, like[i], i > 0 && like[i] == like[i - 1], parallel);
        }
    }
}
void linear(const FastInnerProduct& p) { rows_of(&p, 1, p.workspace); }
void linears(const FastInnerProducts& p) { rows_of(p.each, p.count, p.workspace); }

#endif

}  // namespace

#if defined(FASTLM_ISA_AVX512)
extern const FastInnerProductKernels fast_inner_product_kernels = {workspace, linear, linears};
#else
extern const FastInnerProductKernels fast_inner_product_kernels = {nullptr, nullptr, nullptr};
#endif

}  // namespace FASTLM_ISA
}  // namespace fastlm
