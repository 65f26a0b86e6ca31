#include "attention_tile.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The state of one tile of rows.
struct State {
    Tile t;
    float *qt, *dyt;     // (D, kRows) with its sign, (E, kRows)
    float *q, *dy, *dq;  // (kRows, D), (kRows, E), (kRows, D), widths rounded up to vectors
    bool opened;         // dq holds something
    alignas(64) float delta[kRows], maximum[kRows], inverse[kRows];
};

// What the tiles of a piece share, for one tile of keys.
struct Workspace {
    float *weights, *dscores;  // (kKeys, kRows)
    float *k, *v, *dk, *dv;    // (kKeys, D), (kKeys, E), widths rounded up to vectors
    State* states;
};

// Lays everything out from `memory` on, and returns how many floats it takes (null: only that).
int64_t workspace(Workspace& w, int64_t tiles, const AttentionInputs& p, float* memory) {
    int64_t used = 0;
    auto take = [&](int64_t n) {
        float* mine = memory ? memory + used : nullptr;
        used += (n + 15) / 16 * 16;
        return mine;
    };
    const int64_t D = round_up(p.D), E = round_up(p.E);
    w.weights = take(kKeys * kRows), w.dscores = take(kKeys * kRows);
    w.k = take(kKeys * D), w.v = take(kKeys * E);
    w.dk = take(kKeys * D), w.dv = take(kKeys * E);
    for (int64_t i = 0; i < tiles; ++i) {
        State& s = w.states[i];
        s.qt = take(p.D * kRows), s.dyt = take(p.E * kRows);
        s.q = take(kRows * D), s.dy = take(kRows * E), s.dq = take(kRows * D);
    }
    return used;
}

// dbias[row's head][row's time][j] += dscores, rows in order.
void add_dbias(const AttentionBackward& p, const Tile& t, const Span& s, const float* dscores) {
    float* dbias = p.dbias + t.b * p.dbias_batch;
    for (int64_t v = s.v0; v < s.v1; ++v)
        for (int64_t j = 0; j < s.n; j += W) {
            vf a[W];
            const int64_t n = least(W, s.n - j);
            for (int64_t i = 0; i < W; ++i) a[i] = i < n ? load(dscores + (j + i) * kRows + v * W) : zero();
            transpose(a);
            for (int64_t i = 0; i < least(W, t.rows - v * W); ++i) {
                float* at = dbias + t.head[v * W + i] * p.dbias_head + t.time[v * W + i] * p.in.S + s.j + j;
                store_n(at, load_n(at, n) + a[i], n);
            }
        }
}

// Weights and dscores of a span of keys, in place of scores and dy v^T: (keys, kRows).
void weigh(float* weights, float* dscores, const State& state, const Span& s, vf unit, vf lowest) {
    for (int64_t v = s.v0; v < s.v1; ++v) {
        const vf maximum = load(state.maximum + v * W), inverse = load(state.inverse + v * W), delta = load(state.delta + v * W);
        for (int64_t u = 0; u < s.n; ++u) {
            float *weight = weights + u * kRows + v * W, *dscore = dscores + u * kRows + v * W;
            const vf e = exp2_negative(load(weight) - maximum, unit, lowest) * inverse;
            vf d = e * (load(dscore) - delta);
            if (s.masked) d = select(eq(e, zero()), zero(), d);  // what is hidden may hold inf or nan
            store(weight, e);
            store(dscore, d);
        }
    }
}

// One tile of keys from j0 on, n of which the rows of a tile may see. k: (n, D), its width rounded up to vectors, values: n rows
// of E, v_time from one to the next.
// opens: dk and dv hold nothing yet.
void add_tile(const Workspace& w, State& state, const AttentionBackward& p, const float* k, const float* values, int64_t v_time,
              int64_t j0, int64_t n, bool opens) {
    const AttentionInputs& in = p.in;
    const Tile& t = state.t;
    const vf unit = set(units(in).unit), lowest = set(units(in).low);
    const int64_t D = round_up(in.D), E = round_up(in.E);
    Span list[4];
    const int64_t count = spans(t, j0, n, list);
    for (int64_t i = 0; i < count; ++i) {
        const Span& s = list[i];
        const int64_t j = s.j - j0, lane = s.v0 * W;
        float *weights = w.weights + j * kRows, *dscores = w.dscores + j * kRows;
        score(w.weights, t, in, s, j0, state.qt, k, D);
        dot(dscores + lane, kRows, values + j * v_time, v_time, state.dyt + lane, kRows, s.n, s.v1 - s.v0, in.E);
        weigh(weights, dscores, state, s, unit, lowest);
        if (p.dbias) add_dbias(p, t, s, dscores);
    }
    Range keys[kRows / kMixRows], rows[kKeys / kMixRows];
    seen_keys(t, j0, n, keys);
    seeing_rows(t, j0, n, rows);
    mix<false, kRows>(w.dv, E, w.weights, kRows, state.dy, E, n, E / W, rows, opens, nullptr);
    mix<false, kRows>(w.dk, D, w.dscores, kRows, state.q, D, n, D / W, rows, opens, nullptr);
    mix<true, kKeys>(state.dq, D, w.dscores, kRows, k, D, t.vectors * W, D / W, keys, !state.opened, nullptr);
    state.opened = true;
}

// out's rows = or, where it adds, += factor times x's, `width` floats each, those of x rounded up to vectors.
template <bool Adds> void put_rows(float* out, int64_t stride, const float* x, int64_t n, int64_t width, float factor) {
    for (int64_t i = 0; i < n; ++i, out += stride, x += round_up(width))
        each_vector(width, [&](int64_t c, auto lanes) FASTLM_LAMBDA {
            lanes.store(out + c, fma(load(x + c), set(factor), Adds ? lanes.load(out + c) : zero()));
        });
}

void zero_rows(float* out, int64_t stride, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; ++i) std::memset(out + i * stride, 0, size_t(width) * sizeof(float));
}

// The token of key j, in (B, S) or packed (R,).
FASTLM_INLINE int64_t key_token(const AttentionInputs& p, int64_t b, int64_t j) { return (p.offsets ? p.offsets[b] : b * p.S) + j; }

FASTLM_INLINE int64_t row_at(const AttentionInputs& p, const Tile& t, int64_t r) { return output(p, t.b, t.time[r], t.head[r]); }

void open_state(State& s, const AttentionBackward& p) {
    const AttentionInputs& in = p.in;
    const Tile& t = s.t;
    pack_transposed<true>(s.qt, t, in.D, units(in).sign, s.q,
                          [&](int64_t r) FASTLM_LAMBDA { return query(in, t.b, t.time[r], t.head[r]); });
    pack_transposed<true>(s.dyt, t, in.E, 1.0f, s.dy, [&](int64_t r) FASTLM_LAMBDA { return p.dy + row_at(in, t, r) * in.E; });
    for (int64_t r = 0; r < t.vectors * W; ++r) {
        const float* stats = p.stats + 2 * row_at(in, t, least(r, t.rows - 1));
        s.inverse[r] = stats[1];
        s.maximum[r] = stats[1] == 0.0f ? 0.0f : stats[0];
        if (r >= t.rows) s.maximum[r] = INFINITY, s.inverse[r] = 0.0f;  // it reads some bias: exp(88.5 - 0) would be inf
    }
    for (int64_t v = 0; v < t.vectors; ++v) {
        // dy . y by the same chains over e as dy . v: a row that sees one key has y = v, and a gradient of exactly zero.
        const float* rows[W];
        for (int64_t i = 0; i < W; ++i) rows[i] = p.y + row_at(in, t, least(v * W + i, t.rows - 1)) * in.E;
        vf sum = zero(), part[kQuad] = {};
        each_columns(rows, in.E, [&](int64_t e, vf(&a)[W], auto lanes) FASTLM_LAMBDA {
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
                if (i < count(lanes)) part[i % kQuad] = fma(a[i], load(s.dyt + (e + i) * kRows + v * W), part[i % kQuad]);
            if ((e + W) % kDotBlock != 0 && e + W < in.E) return;
#pragma GCC unroll 4
            for (vf& x : part) sum = sum + x, x = zero();
        });
        store(s.delta + v * W, sum);
    }
}

void close_state(const State& s, const AttentionInputs& p, float* dq, int64_t dq_row) {
    const Tile& t = s.t;
    for (int64_t r = 0; r < t.rows; ++r) {
        float* out = dq + query_token(p, t.b, t.time[r]) * dq_row + t.head[r] * p.D;
        if (s.opened) put_rows<false>(out, 0, s.dq + r * round_up(p.D), 1, p.D, float(p.scale));
        else zero_rows(out, 0, 1, p.D);
    }
}

// All that `tiles` tiles of rows from `first` on give to the keys [begin, end) of (b, g), and these to them. The first tiles write
// dk and dv, the others add to them.
void backward_rows(const AttentionBackward& p, const Workspace& w, float* dq, int64_t dq_row, int64_t b, int64_t g, int64_t first,
                   int64_t tiles, int64_t begin, int64_t end) {
    const AttentionInputs& in = p.in;
    const int64_t R = queries(in, b) * (in.H / in.G), D = round_up(in.D), E = round_up(in.E);
    int64_t low = end, high = begin;
    for (int64_t i = 0; i < tiles; ++i) {
        State& s = w.states[i];
        open_tile(s.t, in, b, g, first + i * kRows, least(kRows, R - first - i * kRows));
        s.opened = false;
        if (most(begin, s.t.low_min) < least(end, s.t.high_max)) open_state(s, p);
        low = least(low, s.t.low_min), high = most(high, s.t.high_max);
    }
    low = most(begin, low / kKeys * kKeys), high = least(end, high);
    for (int64_t j = first == 0 ? begin : low; j < (first == 0 ? end : high); j += kKeys) {
        const int64_t n = least(kKeys, end - j), token = key_token(in, b, j);
        float *dk = p.dk + token * p.dk_row + g * in.D, *dv = p.dv + token * p.dv_row + g * in.E;
        int64_t seen = 0;  // keys of this tile that dk and dv hold
        if (low <= j && j < high) {
            const int64_t m = least(n, high - j);
            const float* k = pack_rows<Float32>(w.k, key<Float32>(in, b, j, g), in.k_time, m, in.D, D);
            int64_t v_time = in.v_time;
            const float* v = broadcast_rows<Float32>(w.v, value<Float32>(in, b, j, g), v_time, m, in.E);
            for (int64_t i = 0; i < tiles; ++i) {
                const Tile& t = w.states[i].t;
                if (j >= t.high_max || j + m <= t.low_min) continue;
                const int64_t own = least(m, t.high_max - j);
                if (seen > 0 && own > seen) {
                    zero_rows(w.dk + seen * D, D, own - seen, D);
                    zero_rows(w.dv + seen * E, E, own - seen, E);
                }
                add_tile(w, w.states[i], p, k, v, v_time, j, own, seen == 0);
                seen = most(seen, own);
            }
        }
        if (first > 0) {
            put_rows<true>(dk, p.dk_row, w.dk, seen, in.D, float(in.scale));
            put_rows<true>(dv, p.dv_row, w.dv, seen, in.E, 1.0f);
            continue;
        }
        put_rows<false>(dk, p.dk_row, w.dk, seen, in.D, float(in.scale));
        put_rows<false>(dv, p.dv_row, w.dv, seen, in.E, 1.0f);
        zero_rows(dk + seen * p.dk_row, p.dk_row, n - seen, in.D);
        zero_rows(dv + seen * p.dv_row, p.dv_row, n - seen, in.E);
    }
    for (int64_t i = 0; i < tiles; ++i) close_state(w.states[i], in, dq, dq_row);
}

// A piece owns (b, g) and a range of keys: it alone writes their dk, dv, and its own share of dq, so nothing is computed twice and
// nothing is added by two threads. Where dbias is summed over sequences or heads, a piece runs through these in order.
void backward(const AttentionBackward& p) {
    const AttentionInputs& in = p.in;
    const int64_t share = in.H / in.G, R = in.T * share, dq_size = in.rows * in.H * in.D;
    const bool over_b = p.dbias && p.dbias_batch == 0, over_g = p.dbias && p.dbias_head == 0;
    const int64_t nb = over_b ? 1 : in.B, ng = over_g ? 1 : in.G;
    const int64_t width =
        in.D + in.E;  // the tiles of a piece should stay in the second-level cache: 1280 bytes a unit of width each
    const int64_t tiles = least((R + kRows - 1) / kRows, width <= 128 ? kTogether : width <= 256 ? 2 : 1);
    const int64_t cost = most(1, R * least(p.chunk, in.S) * (in.D + in.E));
    parallel_for(nb * ng * p.chunks, most(1, 200000 / cost), [&](int64_t from, int64_t to) {
        State states[kTogether];
        Workspace w;
        w.states = states;
        workspace(w, tiles, in, static_cast<float*>(scratch(size_t(workspace(w, tiles, in, nullptr)) * sizeof(float))));
        for (int64_t piece = from; piece < to; ++piece) {
            const int64_t c = piece % p.chunks, g0 = piece / p.chunks % ng, b0 = piece / p.chunks / ng;
            const int64_t begin = c * p.chunk;
            float* dq = p.chunks > 1 ? p.partial + c * dq_size : p.dq;
            const int64_t dq_row = p.chunks > 1 ? in.H * in.D : p.dq_row;
            for (int64_t b = b0; b < (over_b ? in.B : b0 + 1); ++b)
                for (int64_t g = g0; g < (over_g ? in.G : g0 + 1); ++g) {
                    const int64_t end = least(in.offsets ? length(in, b) : in.S, begin + p.chunk);
                    const int64_t rows = queries(in, b) * share, own = least(tiles, (rows + kRows - 1) / kRows);
                    if (rows == 0 && begin < end) {
                        const int64_t token = key_token(in, b, begin);
                        zero_rows(p.dk + token * p.dk_row + g * in.D, p.dk_row, end - begin, in.D);
                        zero_rows(p.dv + token * p.dv_row + g * in.E, p.dv_row, end - begin, in.E);
                    }
                    for (int64_t r = 0; r < rows; r += own * kRows)
                        backward_rows(p, w, dq, dq_row, b, g, r, least(own, (rows - r + kRows - 1) / kRows), begin, end);
                }
        }
    });
    if (p.chunks == 1) return;
    const int64_t width_q = in.H * in.D;
    parallel_for(in.rows, most(1, (1 << 15) / most(1, width_q)), [&](int64_t from, int64_t to) {
        for (int64_t row = from; row < to; ++row)
            for (int64_t i = 0; i < width_q; i += W) {
                const float* at = p.partial + row * width_q + i;
                vf sum = load_n(at, width_q - i);
                for (int64_t c = 1; c < p.chunks; ++c) sum = sum + load_n(at + c * dq_size, width_q - i);
                store_n(p.dq + row * p.dq_row + i, sum, width_q - i);
            }
    });
}

}  // namespace

extern const AttentionBackwardKernels attention_backward_kernels = {backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
