#include "attention_rows.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

struct Workspace {
    float *qt, *ot, *scores, *k, *v;
};

// One key tile: the online softmax of FlashAttention, rows in lanes.
void add_tile(const Workspace& w, const Tile& t, const AttentionInputs& p, float* maximum, float* sum, int64_t j0, int64_t n) {
    const float* k = pack_rows(w.k, p.k + t.b * p.k_batch + j0 * p.k_time + t.g * p.D, p.k_time, n, p.D);
    const vf unit = set(units(p).unit);
    Span list[4];
    const int64_t count = spans(t, j0, n, list);
    for (int64_t i = 0; i < count; ++i) score(w.scores, t, p, list[i], j0, w.qt, k, p.D);
    for (int64_t v = 0; v < t.vectors; ++v) {
        vf m[4] = {load(maximum + v * W), set(-INFINITY), set(-INFINITY), set(-INFINITY)};
        const vf before = m[0];
        for (int64_t i = 0; i < count; ++i) {
            const Span& s = list[i];
            if (v < s.v0 || v >= s.v1) continue;
            const float* x = w.scores + (s.j - j0) * kRows + v * W;
            int64_t j = 0;
            for (; j + 4 <= s.n; j += 4)
                for (int64_t u = 0; u < 4; ++u) m[u] = max(m[u], load(x + (j + u) * kRows));
            for (; j < s.n; ++j) m[0] = max(m[0], load(x + j * kRows));
        }
        const vf after = max(max(m[0], m[1]), max(m[2], m[3]));
        const vf base = select(eq(after, set(-INFINITY)), zero(), after);  // nothing seen yet: 2^(-inf - 0) = 0, not nan
        const vf shrink = exp2_negative((before - base) * unit);
        vf total = load(sum + v * W) * shrink;
        for (int64_t i = 0; i < count; ++i) {
            const Span& s = list[i];
            if (v < s.v0 || v >= s.v1) continue;
            float* x = w.scores + (s.j - j0) * kRows + v * W;
            for (int64_t j = 0; j < s.n; ++j) {
                const vf e = exp2_negative((load(x + j * kRows) - base) * unit);
                store(x + j * kRows, e);
                total = total + e;
            }
        }
        store(maximum + v * W, after);
        store(sum + v * W, total);
        if (any(lt(shrink, set(1.0f))) || any(is_nan(shrink)))
            for (int64_t e = 0; e < p.E; ++e) store(w.ot + e * kRows + v * W, load(w.ot + e * kRows + v * W) * shrink);
    }
    const float* values = pack_rows(w.v, p.v + t.b * p.v_batch + j0 * p.v_time + t.g * p.E, p.v_time, n, p.E);
    for (int64_t i = 0; i < count; ++i) {
        const Span& s = list[i];
        product<true, To::Chain>(w.ot + s.v0 * W, kRows, values + (s.j - j0) * p.E, p.E, w.scores + (s.j - j0) * kRows + s.v0 * W,
                                 kRows, p.E, s.v1 - s.v0, s.n);
    }
}

// y of each row, and whether any element of it is not finite.
bool close_tile(const Workspace& w, const Tile& t, const AttentionForward& p, const float* maximum, const float* sum) {
    const AttentionInputs& in = p.in;
    bool bad = false;
    for (int64_t v = 0; v < t.vectors; ++v) {
        const vf total = load(sum + v * W);
        const vf inverse = select(eq(total, zero()), zero(), set(1.0f) / total);
        float part[W];
        store(part, inverse);
        for (int64_t i = 0; p.stats && i < least(W, t.rows - v * W); ++i) {
            float* stats = p.stats + 2 * ((t.b * in.H + t.head[v * W + i]) * in.T + t.time[v * W + i]);
            stats[0] = maximum[v * W + i], stats[1] = part[i];
        }
        vf check = zero();
        for (int64_t e = 0; e < in.E; e += W) {
            vf a[W];
            for (int64_t i = 0; i < W; ++i) a[i] = e + i < in.E ? load(w.ot + (e + i) * kRows + v * W) * inverse : zero();
            for (int64_t i = 0; i < W; ++i) check = fma(a[i], zero(), check);
            transpose(a);
            for (int64_t i = 0; i < least(W, t.rows - v * W); ++i)
                store_n(p.y + ((t.b * in.T + t.time[v * W + i]) * in.H + t.head[v * W + i]) * in.E + e, a[i], in.E - e);
        }
        bad = bad || any(is_nan(check));
    }
    return bad;
}

void forward_tile(const AttentionForward& p, int64_t b, int64_t g, int64_t first, int64_t rows) {
    const AttentionInputs& in = p.in;
    Tile t;
    open_tile(t, in, b, g, first, rows);
    alignas(64) float maximum[kRows], sum[kRows];
    float* memory = static_cast<float*>(scratch(size_t((in.D + in.E) * (kRows + kKeys) + kRows * kKeys) * sizeof(float)));
    Workspace w;
    w.qt = memory;
    w.ot = w.qt + in.D * kRows;
    w.scores = w.ot + in.E * kRows;
    w.k = w.scores + kKeys * kRows;
    w.v = w.k + kKeys * in.D;
    const float* q = in.q + b * in.q_batch;
    pack_transposed(w.qt, t, in.D, units(in).sign, [&](int64_t r) { return q + t.time[r] * in.q_time + t.head[r] * in.D; });
    for (int64_t i = 0; i < t.vectors * W; ++i) maximum[i] = -INFINITY, sum[i] = 0.0f;
    for (int64_t i = 0; i < in.E * kRows; ++i) w.ot[i] = 0.0f;
    for (int64_t j = t.low_min / kKeys * kKeys; j < t.high_max; j += kKeys)
        add_tile(w, t, in, maximum, sum, j, least(kKeys, t.high_max - j));
    if (!close_tile(w, t, p, maximum, sum)) return;
    // inf or nan came in. A masked key's value times its weight 0 may have made nan of a row that does not see it: redo the rows
    // one by one, reading only what they see.
    for (int64_t r = 0; r < rows; ++r) {
        bool finite = true;
        const float* y = p.y + ((b * in.T + t.time[r]) * in.H + t.head[r]) * in.E;
        for (int64_t e = 0; e < in.E; ++e) finite = finite && std::isfinite(y[e]);
        if (!finite) one_row(p, b, g, first + r);
    }
}

void forward(const AttentionForward& p) {
    const AttentionInputs& in = p.in;
    const int64_t R = in.T * (in.H / in.G);
    if (in.B * in.G * R == 0) return;
    // Fewer rows to a tile where there would be few tiles: lanes are independent, so this changes no bits.
    int64_t rows = kRows;
    while (rows > W && in.B * in.G * ((R + rows - 1) / rows) < 8) rows /= 2;
    const int64_t tiles = (R + rows - 1) / rows;
    const int64_t cost = most(1, least(rows, R) * in.S * (in.D + in.E));
    parallel_for(in.B * in.G * tiles, most(1, 400000 / cost), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = (tiles - 1 - i % tiles) * rows;  // under a causal mask the last rows cost most: they go first
            forward_tile(p, i / tiles / in.G, i / tiles % in.G, first, least(rows, R - first));
        }
    });
}

}  // namespace

extern const AttentionKernels attention_kernels = {forward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
