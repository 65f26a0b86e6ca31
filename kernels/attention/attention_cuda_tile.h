// What attention's CUDA C++ kernels share: who sees what, tiles in shared memory, products of tiles by warps.
//
// A warp owns 16 rows of a product and holds its elements as mma does: with g = lane / 4 and t = lane % 4, element [n][j] of
// s[N / 8][4] is row g + 8 (j / 2), column 8 n + 2 t + j % 2. bfloat16 is multiplied by mma; float32 by multiply-adds in four
// chains for a score, of the elements d, d + 4, ..., with the same owners.
#pragma once

#include "csrc/cuda/ptx.h"

namespace attention {

constexpr float LOG2E = 1.4426950408889634f, NONE = -INFINITY;

__device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__device__ inline int larger(int a, int b) { return a < b ? b : a; }

template <class T> struct Rows {
    const T* p;
    int batch, time;
};

// What all kernels are told. form: what `lengths` is, 0: nothing, 1: lengths (B,), 2: offsets (B + 1,) of packed sequences, whose
// batch strides are 0.
struct Given {
    const int* lengths;
    int form, T, S, H, share, D, E, causal, window;
    float scale, unit;  // unit: |scale| log2(e)
};

struct Bias {
    const float* p;  // or null
    int batch, head, time;

    __device__ float steep(const Given& g) const { return p ? LOG2E : g.unit; }  // of weights
};

// One sequence.
struct Sequence {
    int queries, keys, first;  // first: the row where it begins among packed ones
    int causal, window;

    __device__ Sequence(const Given& g, int b) : causal(g.causal), window(g.window) {
        first = g.form == 2 ? g.lengths[b] : 0;
        keys = g.form == 0 ? g.S : g.form == 1 ? larger(0, smaller(g.lengths[b], g.S)) : g.lengths[b + 1] - first;
        queries = g.form == 2 ? keys : g.T;
    }
    // Query t sees the keys [low, high).
    __device__ int high(int t) const { return causal ? larger(0, smaller(keys - queries + t + 1, keys)) : keys; }
    __device__ int low(int t) const { return window > 0 ? larger(0, high(t) - window) : 0; }
    // The row of query 0 in arrays (B, T, ...).
    __device__ int64_t row(const Given& g, int b) const { return g.form == 2 ? first : int64_t(b) * g.T; }
};

// Rows in shared memory are 16 bytes longer than they need be: so they are apart in the banks.
template <class T, int HEAD> constexpr int kStride = HEAD + int(16 / sizeof(T));

// COUNT rows of HEAD elements, zeros beyond `count` rows and `width` columns.
template <class T, int HEAD, int COUNT, int THREADS>
__device__ inline void fetch(T* to, const T* from, int64_t stride, int count, int width) {
    constexpr int EACH = 16 / sizeof(T), CHUNKS = HEAD / EACH;
    for (int i = int(threadIdx.x); i < COUNT * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, c = i % CHUNKS * EACH;
        const bool there = r < count && c < width;
        ptx::cp_async_16(to + r * kStride<T, HEAD> + c, there ? from + r * stride + c : from, there ? 16 : 0);
    }
}

struct alignas(16) Four {
    float x, y, z, w;
};
struct alignas(8) Two {
    float x, y;
};

__device__ inline int lane_of() { return int(threadIdx.x) % 32; }
__device__ inline int warp_of() { return int(threadIdx.x) / 32; }

// s (16, N) = a (16, HEAD) b (N, HEAD)^T, both rows in shared memory; MORE: +=.
template <int HEAD, int N, bool MORE = false>
__device__ inline void products(float (&s)[N / 8][4], const bfloat16* a, const bfloat16* b) {
    constexpr int STRIDE = kStride<bfloat16, HEAD>;
    const int lane = lane_of();
    if constexpr (!MORE) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < HEAD; d += 16) {
        uint32_t x[4];
        ptx::ldmatrix_x4(x, a + lane % 16 * STRIDE + d + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            uint32_t z[4];
            ptx::ldmatrix_x4(z, b + (n * 8 + lane / 16 * 8 + lane % 8) * STRIDE + d + lane / 8 % 2 * 8);
            ptx::mma_16816(s[n], x, z);
            ptx::mma_16816(s[n + 1], x, z + 2);
        }
    }
}
template <int HEAD, int N, bool MORE = false>
__device__ inline void products(float (&s)[N / 8][4], const float* a, const float* b) {
    constexpr int STRIDE = kStride<float, HEAD>;
    const int g = lane_of() / 4, t = lane_of() % 4;
    Four chains[N / 8][4] = {};
#pragma unroll 2
    for (int d = 0; d < HEAD; d += 4) {
        Four x[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) x[r] = *reinterpret_cast<const Four*>(a + (g + 8 * r) * STRIDE + d);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const Four z = *reinterpret_cast<const Four*>(b + (n * 8 + 2 * t + j) * STRIDE + d);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    Four& c = chains[n][2 * r + j];
                    c.x = fmaf(x[r].x, z.x, c.x), c.y = fmaf(x[r].y, z.y, c.y);
                    c.z = fmaf(x[r].z, z.z, c.z), c.w = fmaf(x[r].w, z.w, c.w);
                }
            }
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float sum = (chains[n][j].x + chains[n][j].z) + (chains[n][j].y + chains[n][j].w);
            s[n][j] = MORE ? s[n][j] + sum : sum;
        }
}

// Room for a warp's weights (16, N) where they must be read by other lanes: float32 only.
template <class T, int N> constexpr int kWeights = sizeof(T) == 4 ? 16 * (N + 1) : 0;

// sums (16, OUT) += p (16, N) b (N, OUT), rows of HEAD columns in shared memory, from a column that b points to.
template <int HEAD, int N, int OUT>
__device__ inline void accumulate(float (&sums)[OUT / 8][4], const float (&p)[N / 8][4], const bfloat16* b, float*) {
    constexpr int STRIDE = kStride<bfloat16, HEAD>;
    const int lane = lane_of();
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
        const uint32_t a[4] = {ptx::pack(p[2 * i][0], p[2 * i][1]), ptx::pack(p[2 * i][2], p[2 * i][3]),
                               ptx::pack(p[2 * i + 1][0], p[2 * i + 1][1]), ptx::pack(p[2 * i + 1][2], p[2 * i + 1][3])};
#pragma unroll
        for (int n = 0; n < OUT / 8; n += 2) {
            uint32_t z[4];
            ptx::ldmatrix_x4_trans(z, b + (16 * i + lane % 16) * STRIDE + n * 8 + lane / 16 * 8);
            ptx::mma_16816(sums[n], a, z);
            ptx::mma_16816(sums[n + 1], a, z + 2);
        }
    }
}
template <int HEAD, int N, int OUT>
__device__ inline void accumulate(float (&sums)[OUT / 8][4], const float (&p)[N / 8][4], const float* b, float* weights) {
    constexpr int STRIDE = kStride<float, HEAD>;
    const int g = lane_of() / 4, t = lane_of() % 4;
    __syncwarp();  // the weights before may still be read
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) weights[(g + 8 * (j / 2)) * (N + 1) + n * 8 + 2 * t + j % 2] = p[n][j];
    __syncwarp();
    // A chain for these N, which is then added: one over all keys would round worse than NumPy's sum.
#pragma unroll
    for (int from = 0; from < OUT / 8; from += 4) {
        float part[4][4] = {};
#pragma unroll 4
        for (int c = 0; c < N; ++c) {
            const float x[2] = {weights[g * (N + 1) + c], weights[(g + 8) * (N + 1) + c]};
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const Two z = *reinterpret_cast<const Two*>(b + c * STRIDE + (from + n) * 8 + 2 * t);
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    part[n][2 * r] = fmaf(x[r], z.x, part[n][2 * r]), part[n][2 * r + 1] = fmaf(x[r], z.y, part[n][2 * r + 1]);
            }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[from + n][j] += part[n][j];
    }
}

// 2^((score - largest) steep): in float32 the difference is taken first, so that large weights are exact; else it is one fma.
template <class T> __device__ inline float weight(float score, float largest, float steep) {
    if constexpr (sizeof(T) == 4) return exp2f((score - largest) * steep);
    else return ptx::exp2(fmaf(score, steep, -largest * steep));
}

// The products become scores: the sign of the scale, the bias of sequence b and head h (scaled then), and -inf where hidden. Rows
// are queries from t0 on and columns keys from c0 on; TURNED: the other way round.
template <bool TURNED, int N> __device__ inline void finish(float (&s)[N / 8][4], const Given& g, const Sequence& q,
                                                            const Bias& bias, int b, int h, int t0, int c0, bool hides) {
    const int row = lane_of() / 4, column = 2 * (lane_of() % 4);
    if (g.scale <= 0.0f) {
        const float sign = g.scale < 0.0f ? -1.0f : 0.0f;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) s[n][j] *= sign;
    }
    if (bias.p) {
        const float* const from = bias.p + int64_t(b) * bias.batch + int64_t(h) * bias.head;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int x = row + 8 * (j / 2), y = n * 8 + column + j % 2, t = t0 + (TURNED ? y : x), c = c0 + (TURNED ? x : y);
                s[n][j] = fmaf(s[n][j], fabsf(g.scale), t < q.queries && c < q.keys ? from[int64_t(t) * bias.time + c] : 0.0f);
            }
    }
    if (!hides) return;
    if constexpr (TURNED) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int t = t0 + n * 8 + column + j % 2, c = c0 + row + 8 * (j / 2);
                if (c < q.low(t) || c >= q.high(t)) s[n][j] = NONE;
            }
    } else {
        const int low[2] = {q.low(t0 + row), q.low(t0 + row + 8)}, high[2] = {q.high(t0 + row), q.high(t0 + row + 8)};
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int c = c0 + n * 8 + column + j % 2;
                if (c < low[j / 2] || c >= high[j / 2]) s[n][j] = NONE;
            }
    }
}

// Over the four lanes that share a row.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ inline void store_two(bfloat16* p, float a, float b) { *reinterpret_cast<uint32_t*>(p) = ptx::pack(a, b); }
__device__ inline void store_two(float* p, float a, float b) { *reinterpret_cast<Two*>(p) = {a, b}; }

// `count` rows of 16 from `to` on, the columns below `width`, times a factor of each of a lane's two rows.
template <class T, int OUT> __device__ inline void store(T* to, int64_t stride, int count, int width,
                                                         const float (&sums)[OUT / 8][4], float first, float second) {
    const int row = lane_of() / 4, column = 2 * (lane_of() % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= count) continue;
        const float factor = r ? second : first;
#pragma unroll
        for (int n = 0; n < OUT / 8; ++n) {
            const int e = n * 8 + column;
            if (e < width) store_two(to + (row + 8 * r) * stride + e, sums[n][2 * r] * factor, sums[n][2 * r + 1] * factor);
        }
    }
}

}  // namespace attention
