// What the CUDA C++ products share: where a tile lies, and what becomes of its sums.
#pragma once

#include "csrc/cuda/activation.h"
#include "csrc/cuda/ptx.h"

namespace {

// c (M, N), and z, bias, residual or null, as in matmul.h; P is the type of the rows, C that of what is written.
template <class C, class P> struct Output {
    C *c, *z;
    const P* bias;
    const C* residual;
    int M, N, activation;
    bool accumulate;

    // Columns n and n + 1 of a row, as far as they are there: what the chain starts from, and what becomes of its sums.
    __device__ __forceinline__ void start(int row, int n, float& v0, float& v1) const {
        if (row >= M || n >= N) return;
        const int64_t at = int64_t(row) * N + n;
        v0 = to_float(c[at]);
        if (n + 1 < N) v1 = to_float(c[at + 1]);
    }
    __device__ __forceinline__ void finish(int row, int n, float v0, float v1) const {
        if (row >= M || n >= N) return;
        const int64_t at = int64_t(row) * N + n;
        const bool second = n + 1 < N;
        if (bias) v0 += to_float(bias[n]), v1 += second ? to_float(bias[n + 1]) : 0.0f;
        if (z) write(z, at, v0, v1, second);
        v0 = activate(v0, activation), v1 = activate(v1, activation);
        if (residual) v0 += to_float(residual[at]), v1 += second ? to_float(residual[at + 1]) : 0.0f;
        write(c, at, v0, v1, second);
    }
    // A pair in one store where rows have an even length.
    __device__ __forceinline__ void write(C* to, int64_t at, float v0, float v1, bool second) const {
        if (N % 2 == 0) {
            if constexpr (sizeof(C) == 2) *reinterpret_cast<uint32_t*>(to + at) = ptx::pack(v0, v1);
            else to[at] = v0, to[at + 1] = v1;
        } else {
            to[at] = from_float<C>(v0);
            if (second) to[at + 1] = from_float<C>(v1);
        }
    }
};

// f(i, part i) for the parts of what lies in registers. The loop is not unrolled, or the code of an epilogue would be there for
// every element: a part moves to the front, and back to the end.
template <int PARTS, class Part, class F> __device__ __forceinline__ void each_part(Part (&parts)[PARTS], const F& f) {
    constexpr int SIZE = int(sizeof(Part) / sizeof(float));
#pragma unroll 1
    for (int i = 0; i < PARTS; ++i) {
        f(i, parts[0]);
        float* v = reinterpret_cast<float*>(parts);
        float first[SIZE];
#pragma unroll
        for (int k = 0; k < SIZE; ++k) first[k] = v[k];
#pragma unroll
        for (int k = 0; k < SIZE * (PARTS - 1); ++k) v[k] = v[k + SIZE];
#pragma unroll
        for (int k = 0; k < SIZE; ++k) v[SIZE * (PARTS - 1) + k] = first[k];
    }
}

// Tiles in groups of eight rows of tiles, so that those which run together share what they read in the L2 cache.
struct Place {
    int m, n;
};
__device__ __forceinline__ Place place(int tile, int tiles_m, int tiles_n) {
    const int group = tile / (8 * tiles_n), within = tile % (8 * tiles_n), left = tiles_m - 8 * group, height = left < 8 ? left : 8;
    return {8 * group + within % height, within / height};
}

}  // namespace
