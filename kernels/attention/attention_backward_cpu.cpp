#include <cstring>

#include "attention_tile.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

struct Workspace {
    float *qt, *dyt, *dqt;     // (D, kRows) with its sign, (E, kRows), (D, kRows)
    float *q, *dy;             // (kRows, D) times scale and (kRows, E), widths rounded up to vectors
    float *weights, *dscores;  // (kKeys, kRows)
    float *k, *v;              // (kKeys, D), (kKeys, E)
    float* sum;                // (kKeys, max of the rounded widths)
    alignas(64) float delta[kRows], maximum[kRows], inverse[kRows];
};

// Lays the workspace out from `memory` on, and returns how many floats it takes (null: only that).
int64_t workspace(Workspace& w, const AttentionInputs& p, float* memory) {
    int64_t used = 0;
    auto take = [&](int64_t n) {
        float* mine = memory ? memory + used : nullptr;
        used += (n + 15) / 16 * 16;
        return mine;
    };
    w.qt = take(p.D * kRows), w.dyt = take(p.E * kRows), w.dqt = take(p.D * kRows);
    w.q = take(kRows * round_up(p.D)), w.dy = take(kRows * round_up(p.E));
    w.weights = take(kKeys * kRows), w.dscores = take(kKeys * kRows);
    w.k = take(kKeys * p.D), w.v = take(kKeys * p.E);
    w.sum = take(kKeys * round_up(most(p.D, p.E)));
    return used;
}

// out[j] += sum over the span's rows of a[j][row] x[row]: `width` floats a row, `stride` apart.
void add_product(float* out, int64_t stride, const float* a, const float* x, const Span& s, int64_t width, float* buffer) {
    const int64_t vectors = (width + W - 1) / W, rows = (s.v1 - s.v0) * W;
    const float* from = x + s.v0 * W * vectors * W;
    if (width % W == 0) return product<false, To::Add>(out, stride, a + s.v0 * W, kRows, from, width, s.n, vectors, rows);
    product<false, To::Set>(buffer, vectors * W, a + s.v0 * W, kRows, from, vectors * W, s.n, vectors, rows);
    for (int64_t j = 0; j < s.n; ++j)
        for (int64_t c = 0; c < width; c += W)
            store_n(out + j * stride + c, load_n(out + j * stride + c, width - c) + load(buffer + j * vectors * W + c), width - c);
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

void add_tile(Workspace& w, const Tile& t, const AttentionBackward& p, int64_t j0, int64_t n) {
    const AttentionInputs& in = p.in;
    const float* k = pack_rows(w.k, in.k + t.b * in.k_batch + j0 * in.k_time + t.g * in.D, in.k_time, n, in.D);
    const float* values = pack_rows(w.v, in.v + t.b * in.v_batch + j0 * in.v_time + t.g * in.E, in.v_time, n, in.E);
    const vf unit = set(units(in).unit);
    Span list[4];
    const int64_t count = spans(t, j0, n, list);
    for (int64_t i = 0; i < count; ++i) {
        const Span& s = list[i];
        const int64_t at = (s.j - j0) * kRows;
        score(w.weights, t, in, s, j0, w.qt, k, in.D);
        dot(w.dscores + at + s.v0 * W, values + (s.j - j0) * in.E, in.E, w.dyt + s.v0 * W, s.n, s.v1 - s.v0, in.E);
        for (int64_t v = s.v0; v < s.v1; ++v) {
            const vf maximum = load(w.maximum + v * W), inverse = load(w.inverse + v * W), delta = load(w.delta + v * W);
            for (int64_t j = 0; j < s.n; ++j) {
                float *weight = w.weights + at + j * kRows + v * W, *dscore = w.dscores + at + j * kRows + v * W;
                const vf e = exp2_negative((load(weight) - maximum) * unit) * inverse;
                vf d = e * (load(dscore) - delta);
                if (s.masked) d = select(eq(e, zero()), zero(), d);  // what is hidden may hold inf or nan
                store(weight, e);
                store(dscore, d);
            }
        }
        const int64_t token = (t.b * in.S + s.j) * in.G + t.g;
        add_product(p.dv + token * in.E, in.G * in.E, w.weights + at, w.dy, s, in.E, w.sum);
        add_product(p.dk + token * in.D, in.G * in.D, w.dscores + at, w.q, s, in.D, w.sum);
        product<true, To::Add>(w.dqt + s.v0 * W, kRows, k + (s.j - j0) * in.D, in.D, w.dscores + at + s.v0 * W, kRows, in.D,
                               s.v1 - s.v0, s.n);
        if (p.dbias) add_dbias(p, t, s, w.dscores + at);
    }
}

void copy_row(float* out, const float* x, int64_t n, float factor) {
    for (int64_t c = 0; c < n; c += W) store(out + c, load_n(x + c, n - c) * set(factor));
}

// All that rows [first, first + rows) of (b, g) give to the keys [begin, end), and these to them.
void backward_tile(const AttentionBackward& p, Workspace& w, float* dq, int64_t b, int64_t g, int64_t first, int64_t rows,
                   int64_t begin, int64_t end) {
    const AttentionInputs& in = p.in;
    Tile t;
    open_tile(t, in, b, g, first, rows);
    const float* q = in.q + b * in.q_batch;
    auto row = [&](int64_t r, int64_t width) { return ((b * in.T + t.time[r]) * in.H + t.head[r]) * width; };
    const int64_t low = most(begin, t.low_min / kKeys * kKeys), high = least(end, t.high_max);
    for (int64_t i = 0; i < in.D * kRows; ++i) w.dqt[i] = 0.0f;
    if (low < high) {
        pack_transposed(w.qt, t, in.D, units(in).sign, [&](int64_t r) { return q + t.time[r] * in.q_time + t.head[r] * in.D; });
        pack_transposed(w.dyt, t, in.E, 1.0f, [&](int64_t r) { return p.dy + row(r, in.E); });
        const int64_t D = round_up(in.D), E = round_up(in.E);
        for (int64_t r = 0; r < t.vectors * W; ++r) {
            if (r >= rows) {  // a weight of zero, and a row of zeros: adds nothing
                for (int64_t c = 0; c < D; ++c) w.q[r * D + c] = 0.0f;
                for (int64_t c = 0; c < E; ++c) w.dy[r * E + c] = 0.0f;
                w.maximum[r] = 0.0f, w.inverse[r] = 0.0f;
                continue;
            }
            copy_row(w.q + r * D, q + t.time[r] * in.q_time + t.head[r] * in.D, in.D, float(in.scale));
            copy_row(w.dy + r * E, p.dy + row(r, in.E), in.E, 1.0f);
            const float* stats = p.stats + 2 * ((b * in.H + t.head[r]) * in.T + t.time[r]);
            w.inverse[r] = stats[1];
            w.maximum[r] = stats[1] == 0.0f ? 0.0f : stats[0];
        }
        for (int64_t v = 0; v < t.vectors; ++v) {
            // dy . y by the same chains over e as dy . v: a row that sees one key has y = v, and a gradient of exactly zero.
            vf sum = zero(), part = zero();
            for (int64_t e = 0; e < in.E; e += W) {
                vf a[W];
                for (int64_t i = 0; i < W; ++i) a[i] = v * W + i < rows ? load_n(p.y + row(v * W + i, in.E) + e, in.E - e) : zero();
                transpose(a);
                for (int64_t i = 0; i < least(W, in.E - e); ++i) part = fma(a[i], load(w.dyt + (e + i) * kRows + v * W), part);
                if ((e + W) % chain(in.E) != 0 && e + W < in.E) continue;
                sum = sum + part;
                part = zero();
            }
            store(w.delta + v * W, sum);
        }
        for (int64_t j = low; j < high; j += kKeys) add_tile(w, t, p, j, least(kKeys, high - j));
    }
    const vf factor = set(float(in.scale));
    for (int64_t v = 0; v < t.vectors; ++v)
        for (int64_t c = 0; c < in.D; c += W) {
            vf a[W];
            for (int64_t i = 0; i < W; ++i) a[i] = c + i < in.D ? load(w.dqt + (c + i) * kRows + v * W) * factor : zero();
            transpose(a);
            for (int64_t i = 0; i < least(W, rows - v * W); ++i) store_n(dq + row(v * W + i, in.D) + c, a[i], in.D - c);
        }
}

// A piece owns (b, g) and a range of keys: it alone writes their dk, dv, and its own share of dq, so nothing is computed twice and
// nothing is added by two threads. Where dbias is summed over sequences or heads, a piece runs through these in order.
void backward(const AttentionBackward& p) {
    const AttentionInputs& in = p.in;
    const int64_t R = in.T * (in.H / in.G), dq_size = in.B * in.T * in.H * in.D;
    const bool over_b = p.dbias && p.dbias_batch == 0, over_g = p.dbias && p.dbias_head == 0;
    const int64_t nb = over_b ? 1 : in.B, ng = over_g ? 1 : in.G;
    const int64_t cost = most(1, R * least(p.chunk, in.S) * (in.D + in.E));
    parallel_for(nb * ng * p.chunks, most(1, 200000 / cost), [&](int64_t from, int64_t to) {
        Workspace w;
        workspace(w, in, static_cast<float*>(scratch(size_t(workspace(w, in, nullptr)) * sizeof(float))));
        for (int64_t piece = from; piece < to; ++piece) {
            const int64_t c = piece % p.chunks, g0 = piece / p.chunks % ng, b0 = piece / p.chunks / ng;
            const int64_t begin = c * p.chunk, end = least(in.S, begin + p.chunk);
            float* dq = p.chunks > 1 ? p.partial + c * dq_size : p.dq;
            for (int64_t b = b0; b < (over_b ? in.B : b0 + 1); ++b)
                for (int64_t g = g0; g < (over_g ? in.G : g0 + 1); ++g) {
                    for (int64_t j = begin; j < end; ++j) {
                        const int64_t token = (b * in.S + j) * in.G + g;
                        std::memset(p.dk + token * in.D, 0, size_t(in.D) * sizeof(float));
                        std::memset(p.dv + token * in.E, 0, size_t(in.E) * sizeof(float));
                    }
                    for (int64_t r = 0; r < R; r += kRows) backward_tile(p, w, dq, b, g, r, least(kRows, R - r), begin, end);
                }
        }
    });
    if (p.chunks == 1) return;
    parallel_for(dq_size, 1 << 15, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i += W) {
            vf sum = load_n(p.partial + i, to - i);
            for (int64_t c = 1; c < p.chunks; ++c) sum = sum + load_n(p.partial + c * dq_size + i, to - i);
            store_n(p.dq + i, sum, to - i);
        }
    });
}

}  // namespace

extern const AttentionBackwardKernels attention_backward_kernels = {backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
