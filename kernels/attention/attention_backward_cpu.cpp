#include "attention_tile.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The state of one tile of rows.
struct State {
    Tile t;
    float *qt, *dyt, *dqt;  // (D, kRows) with its sign, (E, kRows), (D, kRows)
    float *q, *dy;          // (kRows, D), (kRows, E), widths rounded up to vectors
    alignas(64) float delta[kRows], maximum[kRows], inverse[kRows];
};

// What the tiles of a piece share, for one tile of keys.
struct Workspace {
    float *weights, *dscores;  // (kKeys, kRows)
    float *k, *v;              // (kKeys, D), (kKeys, E)
    float *dk, *dv;            // the same, widths rounded up to vectors
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
    w.k = take(kKeys * p.D), w.v = take(kKeys * p.E);
    w.dk = take(kKeys * D), w.dv = take(kKeys * E);
    for (int64_t i = 0; i < tiles; ++i) {
        State& s = w.states[i];
        s.qt = take(p.D * kRows), s.dyt = take(p.E * kRows), s.dqt = take(p.D * kRows);
        s.q = take(kRows * D), s.dy = take(kRows * E);
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

// One tile of keys from j0 on and one of rows. k: (n, D), values: (n, E).
void add_tile(const Workspace& w, const State& state, const AttentionBackward& p, const float* k, const float* values, int64_t j0,
              int64_t n) {
    const AttentionInputs& in = p.in;
    const Tile& t = state.t;
    const vf unit = set(units(in).unit), lowest = set(units(in).low);
    const int64_t D = round_up(in.D), E = round_up(in.E);
    Span list[4];
    const int64_t count = spans(t, j0, n, list);
    for (int64_t i = 0; i < count; ++i) {
        const Span& s = list[i];
        const int64_t j = s.j - j0, lane = s.v0 * W, vectors = s.v1 - s.v0, rows = vectors * W;
        float *weights = w.weights + j * kRows, *dscores = w.dscores + j * kRows;
        score(w.weights, t, in, s, j0, state.qt, k, in.D);
        dot(dscores + lane, values + j * in.E, in.E, state.dyt + lane, s.n, vectors, in.E);
        for (int64_t v = s.v0; v < s.v1; ++v) {
            const vf maximum = load(state.maximum + v * W), inverse = load(state.inverse + v * W),
                     delta = load(state.delta + v * W);
            for (int64_t u = 0; u < s.n; ++u) {
                float *weight = weights + u * kRows + v * W, *dscore = dscores + u * kRows + v * W;
                const vf e = exp2_negative(load(weight) - maximum, unit, lowest) * inverse;
                vf d = e * (load(dscore) - delta);
                if (s.masked) d = select(eq(e, zero()), zero(), d);  // what is hidden may hold inf or nan
                store(weight, e);
                store(dscore, d);
            }
        }
        product<false, true>(w.dv + j * E, E, weights + lane, kRows, state.dy + lane * E, E, s.n, E / W, rows, kRows);
        product<false, true>(w.dk + j * D, D, dscores + lane, kRows, state.q + lane * D, D, s.n, D / W, rows, kRows);
        product<true, true>(state.dqt + lane, kRows, k + j * in.D, in.D, dscores + lane, kRows, in.D, vectors, s.n, kKeys);
        if (p.dbias) add_dbias(p, t, s, dscores);
    }
}

void copy_row(float* out, const float* x, int64_t n) {
    for (int64_t c = 0; c < n; c += W) store(out + c, load_n(x + c, n - c));
}

// out's rows += factor times x's, `width` floats each.
void add_rows(float* out, int64_t stride, const float* x, int64_t n, int64_t width, float factor) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < width; c += W) {
            float* at = out + i * stride + c;
            store_n(at, fma(load(x + i * round_up(width) + c), set(factor), load_n(at, width - c)), width - c);
        }
}

// The token of key j, in (B, S) or packed (R,).
FASTLM_INLINE int64_t key_token(const AttentionInputs& p, int64_t b, int64_t j) { return (p.offsets ? p.offsets[b] : b * p.S) + j; }

FASTLM_INLINE int64_t row_at(const AttentionInputs& p, const Tile& t, int64_t r) { return output(p, t.b, t.time[r], t.head[r]); }

void open_state(State& s, const AttentionBackward& p) {
    const AttentionInputs& in = p.in;
    const Tile& t = s.t;
    auto q = [&](int64_t r) { return query(in, t.b, t.time[r], t.head[r]); };
    auto dy = [&](int64_t r) { return p.dy + row_at(in, t, r) * in.E; };
    pack_transposed(s.qt, t, in.D, units(in).sign, q);
    pack_transposed(s.dyt, t, in.E, 1.0f, dy);
    const int64_t D = round_up(in.D), E = round_up(in.E);
    for (int64_t r = 0; r < t.vectors * W; ++r) {
        if (r >= t.rows) {  // a weight of zero, and a row of zeros: adds nothing
            for (int64_t c = 0; c < D; ++c) s.q[r * D + c] = 0.0f;
            for (int64_t c = 0; c < E; ++c) s.dy[r * E + c] = 0.0f;
            s.maximum[r] = INFINITY, s.inverse[r] = 0.0f;  // it reads some bias: exp(88.5 - 0) would be inf, and that times 0 nan
            continue;
        }
        copy_row(s.q + r * D, q(r), in.D);
        copy_row(s.dy + r * E, dy(r), in.E);
        const float* stats = p.stats + 2 * row_at(in, t, r);
        s.inverse[r] = stats[1];
        s.maximum[r] = stats[1] == 0.0f ? 0.0f : stats[0];
    }
    for (int64_t v = 0; v < t.vectors; ++v) {
        // dy . y by the same chains over e as dy . v: a row that sees one key has y = v, and a gradient of exactly zero.
        vf sum = zero(), part[kQuad] = {};
        for (int64_t e = 0; e < in.E; e += W) {
            vf a[W];
            for (int64_t i = 0; i < W; ++i) {
                const int64_t r = v * W + i;
                a[i] = r < t.rows ? load_n(p.y + row_at(in, t, r) * in.E + e, in.E - e) : zero();
            }
            transpose(a);
            for (int64_t i = 0; i < least(W, in.E - e); ++i) {
                vf& to = part[(e + i) % kQuad];
                to = fma(a[i], load(s.dyt + (e + i) * kRows + v * W), to);
                if ((e + i + 1) % kDotBlock != 0 && e + i + 1 < in.E) continue;
                for (vf& x : part) sum = sum + x, x = zero();
            }
        }
        store(s.delta + v * W, sum);
    }
}

void close_state(const State& s, const AttentionInputs& p, float* dq, int64_t dq_row) {
    const vf factor = set(float(p.scale));
    for (int64_t v = 0; v < s.t.vectors; ++v)
        for (int64_t c = 0; c < p.D; c += W) {
            vf a[W];
            for (int64_t i = 0; i < W; ++i) a[i] = c + i < p.D ? load(s.dqt + (c + i) * kRows + v * W) * factor : zero();
            transpose(a);
            for (int64_t i = 0; i < least(W, s.t.rows - v * W); ++i) {
                const int64_t row = row_at(p, s.t, v * W + i);
                store_n(dq + row / p.H * dq_row + row % p.H * p.D + c, a[i], p.D - c);
            }
        }
}

// All that `tiles` tiles of rows from `first` on give to the keys [begin, end) of (b, g), and these to them.
void backward_rows(const AttentionBackward& p, const Workspace& w, float* dq, int64_t dq_row, int64_t b, int64_t g, int64_t first,
                   int64_t tiles, int64_t begin, int64_t end) {
    const AttentionInputs& in = p.in;
    const int64_t R = queries(in, b) * (in.H / in.G), D = round_up(in.D), E = round_up(in.E);
    int64_t low = end, high = begin;
    for (int64_t i = 0; i < tiles; ++i) {
        State& s = w.states[i];
        open_tile(s.t, in, b, g, first + i * kRows, least(kRows, R - first - i * kRows));
        for (int64_t c = 0; c < in.D; ++c)
            for (int64_t v = 0; v < s.t.vectors; ++v) store(s.dqt + c * kRows + v * W, zero());
        if (most(begin, s.t.low_min) < least(end, s.t.high_max)) open_state(s, p);
        low = least(low, s.t.low_min), high = most(high, s.t.high_max);
    }
    high = least(end, high);
    for (int64_t j = most(begin, low / kKeys * kKeys); j < high; j += kKeys) {
        const int64_t n = least(kKeys, high - j), token = key_token(in, b, j);
        const float* k = pack_rows<Float32>(w.k, key<Float32>(in, b, j, g), in.k_time, n, in.D, in.D);
        const float* v = pack_rows<Float32>(w.v, value<Float32>(in, b, j, g), in.v_time, n, in.E, in.E);
        std::memset(w.dk, 0, size_t(n * D) * sizeof(float));
        std::memset(w.dv, 0, size_t(n * E) * sizeof(float));
        for (int64_t i = 0; i < tiles; ++i) {
            const Tile& t = w.states[i].t;
            if (j < t.high_max && j + n > t.low_min) add_tile(w, w.states[i], p, k, v, j, least(n, t.high_max - j));
        }
        add_rows(p.dk + token * p.dk_row + g * in.D, p.dk_row, w.dk, n, in.D, float(in.scale));
        add_rows(p.dv + token * p.dv_row + g * in.E, p.dv_row, w.dv, n, in.E, 1.0f);
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
                    for (int64_t j = begin; j < end; ++j) {
                        const int64_t token = key_token(in, b, j);
                        std::memset(p.dk + token * p.dk_row + g * in.D, 0, size_t(in.D) * sizeof(float));
                        std::memset(p.dv + token * p.dv_row + g * in.E, 0, size_t(in.E) * sizeof(float));
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
