#include "attention_rows.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The state of one tile of rows.
struct State {
    Tile t;
    float* qt;                                     // (D, kRows)
    float* o;                                      // (kRows, E in vectors): of the chunk of keys so far
    alignas(64) float maximum[kRows], sum[kRows];  // of its scores; of its weights against that
    float* total;                                  // as o: of the chunks before; null where there is one chunk
    alignas(64) float total_maximum[kRows], total_sum[kRows];
    bool opened;  // o holds something
    bool merged;  // the total does
};

void open_chunk(State& s) {
    for (int64_t r = 0; r < s.t.vectors * W; ++r) s.maximum[r] = -INFINITY, s.sum[r] = 0.0f;
    s.opened = false;
}

// total = what it holds, and the chunk: merge_row of attention_rows.h, rows in lanes.
void close_chunk(State& s, const AttentionInputs& p) {
    if (!s.total) return;
    const vf unit = set(units(p).unit), lowest = set(units(p).low);
    const int64_t E = round_up(p.E);
    float keep[kRows], take[kRows];
    for (int64_t v = 0; v < s.t.vectors && s.merged; ++v) {
        const vf before = load(s.total_maximum + v * W), m = load(s.maximum + v * W), largest = max(before, m);
        const vf base = select(eq(largest, set(-INFINITY)), zero(), largest);
        const vf k = exp2_negative(before - base, unit, lowest), t = exp2_negative(m - base, unit, lowest);
        store(keep + v * W, k), store(take + v * W, t);
        store(s.total_maximum + v * W, largest);
        store(s.total_sum + v * W, load(s.total_sum + v * W) * k + load(s.sum + v * W) * t);
    }
    for (int64_t r = 0; r < s.t.rows && s.merged; ++r) {
        const vf k = set(keep[r]), t = set(take[r]);
        for (float *at = s.total + r * E, *o = s.o + r * E, *end = o + E; o < end; at += W, o += W)
            store(at, fma(load(o), t, load(at) * k));
    }
    if (!s.merged) {
        float* other = s.total;
        s.total = s.o, s.o = other, s.merged = true;
        std::memcpy(s.total_maximum, s.maximum, sizeof s.maximum);
        std::memcpy(s.total_sum, s.sum, sizeof s.sum);
    }
    open_chunk(s);
}

// Weights from the scores of one tile of keys, for W rows; their sum and the new maximum go to the state, what shrinks the sums so
// far to `shrink`.
void weigh(State& state, float* scores, const Span* list, int64_t count, int64_t j0, int64_t v, vf unit, vf lowest, float* shrink) {
    vf m[4] = {load(state.maximum + v * W), set(-INFINITY), set(-INFINITY), set(-INFINITY)};
    const vf before = m[0];
    for (int64_t i = 0; i < count; ++i) {
        const Span& s = list[i];
        if (v < s.v0 || v >= s.v1) continue;
        const float* x = scores + (s.j - j0) * kRows + v * W;
        int64_t j = 0;
        for (; j + 4 <= s.n; j += 4)
#pragma GCC unroll 4
            for (int64_t u = 0; u < 4; ++u) m[u] = max(m[u], load(x + (j + u) * kRows));
        for (; j < s.n; ++j) m[0] = max(m[0], load(x + j * kRows));
    }
    const vf largest = max(max(m[0], m[1]), max(m[2], m[3]));
    const vf base = select(eq(largest, set(-INFINITY)), zero(), largest);  // nothing seen yet: 2^(-inf - 0) = 0, not nan
    vf part[W];  // by the key's lane in the rows path, added up as reduce_add does
#pragma GCC unroll 16
    for (int64_t l = 0; l < W; ++l) part[l] = zero();
    for (int64_t i = 0; i < count; ++i) {
        const Span& s = list[i];
        if (v < s.v0 || v >= s.v1) continue;
        for (int64_t j = 0; j < s.n; j += W) {
            float* x = scores + (s.j - j0 + j) * kRows + v * W;
            const int64_t n = s.n - j;
#pragma GCC unroll 16
            for (int64_t l = 0; l < W; ++l) {
                if (l >= n) break;
                const vf e = exp2_negative(load(x + l * kRows) - base, unit, lowest);
                store(x + l * kRows, e);
                part[l] = part[l] + e;
            }
        }
    }
#pragma GCC unroll 4
    for (int64_t half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int64_t l = 0; l < half; ++l) part[l] = part[l] + part[l + half];
    const vf factor = exp2_negative(before - base, unit, lowest);
    store(shrink + v * W, factor);
    store(state.maximum + v * W, largest);
    store(state.sum + v * W, load(state.sum + v * W) * factor + part[0]);
}

// One key tile, k: n rows of D, k_time from one to the next, values: (n, E in vectors): the online softmax of FlashAttention.
// scores: (kKeys, kRows).
void add_tile(State& state, const AttentionInputs& p, float* scores, const float* k, int64_t k_time, const float* values,
              int64_t j0, int64_t n, Ahead& ahead) {
    const Tile& t = state.t;
    const vf unit = set(units(p).unit), lowest = set(units(p).low);
    const int64_t E = round_up(p.E);
    Span list[4];
    Range seen[kRows / kMixRows];
    alignas(64) float shrink[kRows];
    const int64_t count = spans(t, j0, n, list);
    for (int64_t i = 0; i < count; ++i) score(scores, t, p, list[i], j0, state.qt, k, k_time, &ahead);
    for (int64_t v = 0; v < t.vectors; ++v) weigh(state, scores, list, count, j0, v, unit, lowest, shrink);
    seen_keys(t, j0, n, seen);
    mix<true, kChain>(state.o, E, scores, kRows, values, E, t.vectors * W, E / W, seen, !state.opened, shrink, &ahead);
    state.opened = true;
}

// y of each row, and whether any element of it is not finite.
bool close_tile(const State& state, const AttentionForward& p) {
    const AttentionInputs& in = p.in;
    const Tile& t = state.t;
    const int64_t E = round_up(in.E);
    const bool some = state.total ? state.merged : state.opened;
    const float *o = state.total ? state.total : state.o, *maximum = state.total ? state.total_maximum : state.maximum,
                *sum = state.total ? state.total_sum : state.sum;
    alignas(64) float inverse[kRows];
    for (int64_t v = 0; v < t.vectors; ++v) {
        const vf total = load(sum + v * W);
        store(inverse + v * W, select(eq(total, zero()), zero(), set(1.0f) / total));
    }
    vf check = zero();
    for (int64_t r = 0; r < t.rows; ++r) {
        const int64_t row = output(in, t.b, t.time[r], t.head[r]);
        if (p.stats) p.stats[2 * row] = maximum[r], p.stats[2 * row + 1] = inverse[r];
        const vf factor = set(inverse[r]);
        each_vector(in.E, [&](int64_t e, auto lanes) FASTLM_LAMBDA {
            const vf y = some ? load(o + r * E + e) * factor : zero();
            check = fma(y, zero(), check);
            lanes.store(p.y + row * in.E + e, y);
        });
    }
    return any(is_nan(check));
}

constexpr int64_t kFetched = 1 << 19;  // numbers in q, k and v from which they are not in the second-level cache anyway

// Rows [first, first + rows) of (b, g).
struct Piece {
    int64_t b, g, first, rows;
};

// n keys and values from key j on.
void fetch_keys(Ahead& ahead, const AttentionInputs& p, int64_t b, int64_t g, int64_t j, int64_t n) {
    if (n <= 0) return;
    each_store(p, [&](auto kind) {
        using S = decltype(kind);
        constexpr int64_t size = sizeof(typename S::T);
        const auto add = [&](const void* at, int64_t width, int64_t stride) {
            ahead.add({static_cast<const char*>(at), n, (width + S::kExtra) * size, stride * size});
        };
        add(key<S>(p, b, j, g), p.D, p.k_time), add(value<S>(p, b, j, g), p.E, p.v_time);
    });
}

// Where y of a piece goes, or its queries: the rows of the group's heads.
void fetch_heads(Ahead& ahead, const AttentionInputs& p, const Piece& piece, const float* at, int64_t width, int64_t stride) {
    const int64_t share = p.H / p.G, size = sizeof(float);
    ahead.add({reinterpret_cast<const char*>(at), piece.rows / share, share * width * size, stride * size});
}

// A piece, in tiles of kRows. then: what this thread is likely to take next, to be fetched; no rows: nothing.
void forward_piece(const AttentionForward& p, const Piece& piece, const Piece& then) {
    const int64_t b = piece.b, g = piece.g, first = piece.first, rows = piece.rows;
    const AttentionInputs& in = p.in;
    State states[kTogether];
    const int64_t tiles = (rows + kRows - 1) / kRows;
    const int64_t E = round_up(in.E);
    float* memory =
        static_cast<float*>(scratch(size_t((in.D + 2 * E) * tiles * kRows + (in.D + E + kRows) * kKeys) * sizeof(float)));
    float* scores = memory;
    float* k_copy = scores + kKeys * kRows;
    float* v_copy = k_copy + kKeys * in.D;
    float* at = v_copy + kKeys * E;
    int64_t low = in.S, high = 0;
    for (int64_t i = 0; i < tiles; ++i, at += (in.D + 2 * E) * kRows) {
        State& s = states[i];
        open_tile(s.t, in, b, g, first + i * kRows, least(kRows, rows - i * kRows));
        s.qt = at, s.o = at + in.D * kRows;
        pack_transposed<false>(s.qt, s.t, in.D, units(in).sign, nullptr,
                               [&](int64_t r) FASTLM_LAMBDA { return query(in, b, s.t.time[r], s.t.head[r]); });
        s.total = s.t.low_min / kChunk < (s.t.high_max - 1) / kChunk ? s.o + E * kRows : nullptr;
        s.merged = false;
        open_chunk(s);
        low = least(low, s.t.low_min), high = most(high, s.t.high_max);
    }
    for (int64_t j = low / kKeys * kKeys; j < high; j += kKeys) {
        const int64_t n = least(kKeys, high - j);
        const float *k = nullptr, *v = nullptr;
        int64_t k_time = in.k_time;
        each_store(in, [&](auto kind) {
            using S = decltype(kind);
            k = broadcast_rows<S>(k_copy, key<S>(in, b, j, g), k_time, n, in.D);
            v = pack_rows<S>(v_copy, value<S>(in, b, j, g), in.v_time, n, in.E, E);
        });
        // During the products the next keys and values, at last where y goes and what the next piece begins with.
        const int64_t share = in.H / in.G;
        Ahead ahead;
        fetch_keys(ahead, in, b, g, j + kKeys, least(kKeys, high - j - kKeys));
        if (j + kKeys >= high && then.rows > 0) {
            fetch_heads(ahead, in, piece, p.y + output(in, b, first / share, g * share) * in.E, in.E, in.H * in.E);
            fetch_heads(ahead, in, then, query(in, then.b, then.first / share, then.g * share), in.D, in.q_time);
            fetch_keys(ahead, in, then.b, then.g, 0, least(kKeys, length(in, then.b)));
        }
        for (int64_t i = 0; i < tiles; ++i) {
            State& s = states[i];
            if (j >= s.t.high_max || j + n <= s.t.low_min) continue;
            add_tile(s, in, scores, k, k_time, v, j, least(n, s.t.high_max - j), ahead);
            if ((j + kKeys) % kChunk == 0 || j + kKeys >= s.t.high_max) close_chunk(s, in);
        }
    }
    bool bad[kTogether];
    for (int64_t i = 0; i < tiles; ++i) bad[i] = close_tile(states[i], p);
    for (int64_t i = 0; i < tiles; ++i) {
        if (!bad[i]) continue;
        const Tile& t = states[i].t;
        // inf or nan came in. A hidden key's value times its weight 0 may have made nan of a row that does not see it: redo such
        // rows one by one, reading only what they see.
        for (int64_t r = 0; r < t.rows; ++r) {
            bool finite = true;
            const float* y = p.y + output(in, b, t.time[r], t.head[r]) * in.E;
            for (int64_t e = 0; e < in.E; ++e) finite = finite && std::isfinite(y[e]);
            if (!finite) one_row(p, b, g, first + i * kRows + r);
        }
    }
}

void forward(const AttentionForward& p) {
    const AttentionInputs& in = p.in;
    const int64_t R = in.T * (in.H / in.G);
    if (in.B * in.G * R == 0) return;
    // Few pieces: fewer rows in each, but where heads are one piece each and go evenly into the threads. This changes no bits.
    int64_t rows = kTogether * kRows;
    const bool even = R <= rows && in.B * in.G % num_threads() == 0;
    while (!even && rows > kRows && in.B * in.G * ((R + rows - 1) / rows) < 8 * num_threads()) rows /= 2;
    while (!even && rows > W && in.B * in.G * ((R + rows - 1) / rows) < 4 * num_threads()) rows /= 2;
    const int64_t pieces = (R + rows - 1) / rows;
    const int64_t cost = most(1, least(rows, R) * in.S * (in.D + in.E));
    const auto piece_at = [&](int64_t i) {
        const int64_t first = (pieces - 1 - i % pieces) * rows;  // under a causal mask the last rows cost most: they go first
        const int64_t b = i / pieces / in.G, n = least(rows, queries(in, b) * (in.H / in.G) - first);
        return Piece{b, i / pieces % in.G, first, n};
    };
    const bool fetches = in.rows * (in.H * in.D + in.G * (in.D + in.E)) >= kFetched;
    parallel_for(in.B * in.G * pieces, most(1, 400000 / cost), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Piece piece = piece_at(i);
            if (piece.rows > 0) forward_piece(p, piece, fetches && i + 1 < in.B * in.G * pieces ? piece_at(i + 1) : Piece{});
        }
    });
}

}  // namespace

extern const AttentionKernels attention_kernels = {forward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
