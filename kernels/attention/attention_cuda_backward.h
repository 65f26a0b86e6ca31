// Attention's backward pass. Three kernels that compute the weights p again from the two numbers a row of the forward pass: one
// owns queries (dq), one keys (dk, dv), one a tile of the bias. Nobody shares a sum: no atomics, the same bits every run.
#pragma once

#include "kernels/attention/attention_cuda_tile.h"

namespace attention {

// Of 16 rows from `row` on: top, inverse, delta, for each lane's two rows; zeros beyond `count`.
struct Kept {
    float top[2], inverse[2], delta[2];

    __device__ Kept(const float* stats, const float* sums, int64_t row, int H, int h, int count) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int t = lane_of() / 4 + 8 * r;
            const int64_t at = (row + t) * H + h;
            const bool there = t < count;
            top[r] = there ? stats[2 * at] : 0.0f, inverse[r] = there ? stats[2 * at + 1] : 0.0f;
            delta[r] = there && sums ? sums[at] : 0.0f;
        }
    }
};

template <class T, int HEAD, int WARPS, int N> __device__ void backward_q(T* dq, int dq_batch, int dq_time, float* delta,
                                                                          const T* dy, const T* y, const float* stats, Rows<T> q,
                                                                          Rows<T> k, Rows<T> v, Bias bias, Given g, int tiles) {
    constexpr int STRIDE = kStride<T, HEAD>, THREADS = 32 * WARPS, ROWS = 16 * WARPS, STAGE = 2 * N * STRIDE;
    constexpr bool FINE = sizeof(T) == 4;
    FASTLM_DYNAMIC_SHARED(room);
    T *const qs = reinterpret_cast<T*>(room), *const dys = qs + ROWS * STRIDE, *const stages = dys + ROWS * STRIDE;
    float* const weights = reinterpret_cast<float*>(stages + 2 * STAGE);
    const int tile = tiles - 1 - int(blockIdx.x) % tiles, b = int(blockIdx.x) / tiles / g.H, h = int(blockIdx.x) / tiles % g.H;
    const Sequence seq(g, b);
    const int begin = tile * ROWS, warp = warp_of();
    if (begin >= seq.queries) return;
    const T* const k0 = k.p + int64_t(b) * k.batch + int64_t(seq.first) * k.time + h / g.share * g.D;
    const T* const v0 = v.p + int64_t(b) * v.batch + int64_t(seq.first) * v.time + h / g.share * g.E;
    const float steep = bias.steep(g);
    const int last = smaller(begin + ROWS, seq.queries) - 1;
    const int from = seq.low(begin) / N * N, to = seq.high(last), all_from = seq.low(last), all_to = seq.high(begin);
    const int t0 = begin + warp * 16, count = seq.queries - t0;
    const int64_t row = seq.row(g, b), wide = int64_t(g.H) * g.E;
    // In float32 delta is the sum of p (dy v^T) in a first round over the keys, since y's rounding would be the largest error.
    const int tiles_of_keys = to > from ? (to - from + N - 1) / N : 0, rounds = FINE ? 2 * tiles_of_keys : tiles_of_keys;
    const auto fetch_tile = [&](int i) {
        T* const at = stages + i % 2 * STAGE;
        if (i < rounds) {
            const int start = from + i % tiles_of_keys * N;
            fetch<T, HEAD, N, THREADS>(at, k0 + int64_t(start) * k.time, k.time, seq.keys - start, g.D);
            fetch<T, HEAD, N, THREADS>(at + N * STRIDE, v0 + int64_t(start) * v.time, v.time, seq.keys - start, g.E);
        }
        ptx::cp_async_commit();
    };
    fetch<T, HEAD, ROWS, THREADS>(qs, q.p + int64_t(b) * q.batch + int64_t(seq.first + begin) * q.time + h * g.D, q.time,
                                  seq.queries - begin, g.D);
    fetch<T, HEAD, ROWS, THREADS>(dys, dy + ((row + begin) * g.H + h) * g.E, wide, seq.queries - begin, g.E);
    fetch_tile(0);
    Kept kept(stats, nullptr, row + t0, g.H, h, count);
    if constexpr (!FINE) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int t = lane_of() / 4 + 8 * r;
            const int64_t at = ((row + t0 + t) * g.H + h) * g.E;
            float sum = 0.0f;
            if (t < count)
                for (int e = 2 * (lane_of() % 4); e < g.E; e += 8)
                    for (int j = 0; j < 2; ++j) sum = fmaf(to_float(dy[at + e + j]), to_float(y[at + e + j]), sum);
            kept.delta[r] = quad_sum(sum);
        }
    }
    float sums[HEAD / 8][4] = {};
    for (int i = 0; i < rounds; ++i) {
        fetch_tile(i + 1);
        ptx::cp_async_wait<1>();
        __syncthreads();
        const int start = from + i % tiles_of_keys * N;
        const T* const ks = stages + i % 2 * STAGE;
        float p[N / 8][4], dp[N / 8][4];
        products<HEAD, N>(p, qs + warp * 16 * STRIDE, ks);
        finish<false, N>(p, g, seq, bias, b, h, t0, start, start < all_from || start + N > all_to);
        products<HEAD, N>(dp, dys + warp * 16 * STRIDE, ks + N * STRIDE);
        const bool first = FINE && i < tiles_of_keys;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                p[n][j] = weight<T>(p[n][j], kept.top[j / 2], steep) * kept.inverse[j / 2];
                if (first) kept.delta[j / 2] = fmaf(p[n][j], dp[n][j], kept.delta[j / 2]);
                else p[n][j] *= dp[n][j] - kept.delta[j / 2];
            }
        if (!first) accumulate<HEAD, N, HEAD>(sums, p, ks, weights + warp * kWeights<T, N>);
        else if (i == tiles_of_keys - 1)
            for (int r = 0; r < 2; ++r) kept.delta[r] = quad_sum(kept.delta[r]);
        __syncthreads();
    }
    ptx::cp_async_wait<0>();
    for (int r = 0; r < 2; ++r) {
        const int t = lane_of() / 4 + 8 * r;
        if (lane_of() % 4 == 0 && t < count) delta[(row + t0 + t) * g.H + h] = kept.delta[r];
    }
    T* const out = dq + int64_t(b) * dq_batch + int64_t(seq.first + t0) * dq_time + h * g.D;
    store<T, HEAD>(out, dq_time, count, g.D, sums, g.scale, g.scale);
}

// A block owns 16 WARPS keys of one group, and goes through its heads in order, through each one's queries in order. Scores are
// (keys, queries). Columns of dk and dv beyond 128 are another block's.
template <class T, int HEAD, int WARPS, int N>
__device__ void backward_kv(T* dk, int dk_batch, int dk_time, T* dv, int dv_batch, int dv_time, const float* delta, const T* dy,
                            const float* stats, Rows<T> q, Rows<T> k, Rows<T> v, Bias bias, Given g, int tiles) {
    constexpr int STRIDE = kStride<T, HEAD>, THREADS = 32 * WARPS, KEYS = 16 * WARPS, STAGE = 2 * N * STRIDE;
    constexpr int OUT = HEAD < 128 ? HEAD : HEAD == 128 && sizeof(T) == 2 ? 128 : 64;
    FASTLM_DYNAMIC_SHARED(room);
    FASTLM_SHARED(float, numbers, 2 * 3 * N);  // of a stage's queries: top, inverse, delta
    T *const ks = reinterpret_cast<T*>(room), *const vs = ks + KEYS * STRIDE, *const stages = vs + KEYS * STRIDE;
    float* const weights = reinterpret_cast<float*>(stages + 2 * STAGE);
    const int G = g.H / g.share, b = int(blockIdx.x) / tiles / G, group = int(blockIdx.x) / tiles % G, part = int(blockIdx.y) * OUT;
    const Sequence seq(g, b);
    const int begin = int(blockIdx.x) % tiles * KEYS, warp = warp_of();
    const int held = g.form == 2 ? seq.keys : g.S;  // keys whose gradients there are
    if (begin >= held) return;
    const float steep = bias.steep(g);
    // The queries that see any of these keys, in whole tiles.
    const int early = g.causal ? larger(begin - seq.keys + seq.queries, 0) / N * N : 0;
    const int reach = begin + KEYS + g.window - 1 - seq.keys + seq.queries;
    const int late = begin >= seq.keys ? 0 : g.causal && g.window > 0 ? smaller(seq.queries, reach) : seq.queries;
    const int tiles_of_rows = late > early ? (late - early + N - 1) / N : 0, rounds = g.share * tiles_of_rows;
    const int64_t row = seq.row(g, b), wide = int64_t(g.H) * g.E;
    const auto fetch_tile = [&](int i) {
        if (i < rounds) {
            T* const at = stages + i % 2 * STAGE;
            const int h = group * g.share + i / tiles_of_rows, t0 = early + i % tiles_of_rows * N, count = seq.queries - t0;
            const T* const q0 = q.p + int64_t(b) * q.batch + int64_t(seq.first + t0) * q.time + h * g.D;
            fetch<T, HEAD, N, THREADS>(at, q0, q.time, count, g.D);
            fetch<T, HEAD, N, THREADS>(at + N * STRIDE, dy + ((row + t0) * g.H + h) * g.E, wide, count, g.E);
            for (int r = int(threadIdx.x); r < N; r += THREADS) {
                const int64_t number = (row + t0 + r) * g.H + h;
                float* const to = numbers + i % 2 * 3 * N + r;
                to[0] = r < count ? stats[2 * number] : 0.0f, to[N] = r < count ? stats[2 * number + 1] : 0.0f;
                to[2 * N] = r < count ? delta[number] : 0.0f;
            }
        }
        ptx::cp_async_commit();
    };
    const int64_t place = int64_t(seq.first) + begin;
    fetch<T, HEAD, KEYS, THREADS>(ks, k.p + int64_t(b) * k.batch + place * k.time + group * g.D, k.time, seq.keys - begin, g.D);
    fetch<T, HEAD, KEYS, THREADS>(vs, v.p + int64_t(b) * v.batch + place * v.time + group * g.E, v.time, seq.keys - begin, g.E);
    fetch_tile(0);
    float dk_sums[OUT / 8][4] = {}, dv_sums[OUT / 8][4] = {};
    const int c0 = begin + warp * 16, column = 2 * (lane_of() % 4);
    for (int i = 0; i < rounds; ++i) {
        fetch_tile(i + 1);
        ptx::cp_async_wait<1>();
        __syncthreads();
        const T *const qs = stages + i % 2 * STAGE, *const dys = qs + N * STRIDE;
        const float* const number = numbers + i % 2 * 3 * N;
        const int h = group * g.share + i / tiles_of_rows, t0 = early + i % tiles_of_rows * N;
        float p[N / 8][4], ds[N / 8][4];
        products<HEAD, N>(p, ks + warp * 16 * STRIDE, qs);
        finish<true, N>(p, g, seq, bias, b, h, t0, c0, seq.low(t0 + N - 1) > begin || seq.high(t0) < begin + KEYS);
        products<HEAD, N>(ds, vs + warp * 16 * STRIDE, dys);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int r = n * 8 + column + j % 2;
                p[n][j] = weight<T>(p[n][j], number[r], steep) * number[N + r];
                ds[n][j] = p[n][j] * (ds[n][j] - number[2 * N + r]);
            }
        accumulate<HEAD, N, OUT>(dv_sums, p, dys + part, weights + warp * kWeights<T, N>);
        accumulate<HEAD, N, OUT>(dk_sums, ds, qs + part, weights + warp * kWeights<T, N>);
        __syncthreads();
    }
    ptx::cp_async_wait<0>();
    const int64_t key = int64_t(seq.first) + c0;
    store<T, OUT>(dk + int64_t(b) * dk_batch + key * dk_time + group * g.D + part, dk_time, held - c0, g.D - part, dk_sums, g.scale,
                  g.scale);
    store<T, OUT>(dv + int64_t(b) * dv_batch + key * dv_time + group * g.E + part, dv_time, held - c0, g.E - part, dv_sums, 1.0f,
                  1.0f);
}

// dbias (batches, heads, T, S) +=: a block owns 16 WARPS queries by N keys, and goes over the sequences and heads that share it.
// Of a longer head dimension it multiplies PART elements after PART.
template <class T, int PART, int WARPS, int N>
__device__ void backward_bias(float* dbias, const float* delta, const T* dy, const float* stats, Rows<T> q, Rows<T> k, Rows<T> v,
                              Bias bias, Given g, int B, int batches, int heads, int row_tiles, int key_tiles) {
    constexpr int STRIDE = kStride<T, PART>, THREADS = 32 * WARPS, ROWS = 16 * WARPS;
    FASTLM_DYNAMIC_SHARED(room);
    T *const qs = reinterpret_cast<T*>(room), *const dys = qs + ROWS * STRIDE;
    T *const ks = dys + ROWS * STRIDE, *const vs = ks + N * STRIDE;
    const int at = int(blockIdx.x) / (row_tiles * key_tiles), tile = int(blockIdx.x) % (row_tiles * key_tiles);
    const int begin = tile / key_tiles * ROWS, start = tile % key_tiles * N, each = g.H / heads, warp = warp_of();
    const int64_t wide = int64_t(g.H) * g.E;
    float sums[N / 8][4] = {};
    for (int i = 0; i < B / batches * each; ++i) {
        const int b = at / heads + i / each, h = at % heads + i % each, t0 = begin + warp * 16;
        const Sequence seq(g, b);
        const int64_t row = seq.row(g, b);
        const T* const q0 = q.p + int64_t(b) * q.batch + int64_t(begin) * q.time + h * g.D;
        const T* const dy0 = dy + ((row + begin) * g.H + h) * g.E;
        const T* const k0 = k.p + int64_t(b) * k.batch + int64_t(start) * k.time + h / g.share * g.D;
        const T* const v0 = v.p + int64_t(b) * v.batch + int64_t(start) * v.time + h / g.share * g.E;
        float p[N / 8][4] = {}, dp[N / 8][4] = {};
        for (int d = 0; d < larger(g.D, g.E); d += PART) {
            fetch<T, PART, ROWS, THREADS>(qs, q0 + d, q.time, g.T - begin, g.D - d);
            fetch<T, PART, ROWS, THREADS>(dys, dy0 + d, wide, g.T - begin, g.E - d);
            fetch<T, PART, N, THREADS>(ks, k0 + d, k.time, seq.keys - start, g.D - d);
            fetch<T, PART, N, THREADS>(vs, v0 + d, v.time, seq.keys - start, g.E - d);
            ptx::cp_async_commit();
            ptx::cp_async_wait<0>();
            __syncthreads();
            products<PART, N, true>(p, qs + warp * 16 * STRIDE, ks);
            products<PART, N, true>(dp, dys + warp * 16 * STRIDE, vs);
            __syncthreads();
        }
        const Kept kept(stats, delta, row + t0, g.H, h, g.T - t0);
        finish<false, N>(p, g, seq, bias, b, h, t0, start, true);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                sums[n][j] = fmaf(weight<T>(p[n][j], kept.top[j / 2], LOG2E) * kept.inverse[j / 2], dp[n][j] - kept.delta[j / 2],
                                  sums[n][j]);
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int t = begin + warp * 16 + lane_of() / 4 + 8 * (j / 2), c = start + n * 8 + 2 * (lane_of() % 4) + j % 2;
            if (t < g.T && c < g.S) dbias[(int64_t(at) * g.T + t) * g.S + c] += sums[n][j];
        }
}

}  // namespace attention
