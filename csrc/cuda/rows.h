// What kernels over rows share: packs of elements that are loaded at once, sums over a warp or a block, sums of pieces.
#pragma once

#include "csrc/cuda/device.h"

// V elements, at a multiple of their size: one load, one store.
template <class T, int V> struct alignas(sizeof(T) * V) Pack {
    T v[V];
};
template <int V, class T> __device__ __forceinline__ Pack<T, V> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T> __device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& a) {
    *reinterpret_cast<Pack<T, V>*>(p) = a;
}
template <class T> constexpr int kPack = int(16 / sizeof(T));

// The sum over the G threads of a row, the same in all of them: a warp, which meets no barrier, or the whole block.
template <int G> __device__ __forceinline__ float group_sum(float v, float* room) {
    if constexpr (G == 32) return warp_sum(v);
    else return block_sum<G>(v, room);
}

// A thread's own sums over rows in shared memory, for the V columns from c on of C. They lie in planes of 4 of them, so that the
// lanes of a warp touch neighbouring packs.
template <int V> constexpr int kPlane = V < 4 ? V : 4;
template <int V> __device__ __forceinline__ float* own_sums(float* sums, int c, int C, int plane) {
    return sums + plane * (C / (V / kPlane<V>)) + c / V * kPlane<V>;
}
template <int V> __device__ __forceinline__ void clear_own(float* sums, int c, int C) {
#pragma unroll
    for (int q = 0; q < V / kPlane<V>; ++q) store_pack(own_sums<V>(sums, c, C, q), Pack<float, kPlane<V>>{});
}
template <int V> __device__ __forceinline__ void add_own(float* sums, int c, int C, const float (&more)[V]) {
#pragma unroll
    for (int q = 0; q < V / kPlane<V>; ++q) {
        auto p = load_pack<kPlane<V>>(own_sums<V>(sums, c, C, q));
#pragma unroll
        for (int j = 0; j < kPlane<V>; ++j) p.v[j] += more[q * kPlane<V> + j];
        store_pack(own_sums<V>(sums, c, C, q), p);
    }
}
template <int V> __device__ __forceinline__ void write_own(float* to, float* sums, int c, int C) {
#pragma unroll
    for (int q = 0; q < V / kPlane<V>; ++q) store_pack(to + c + q * kPlane<V>, load_pack<kPlane<V>>(own_sums<V>(sums, c, C, q)));
}

// sums (C,) += partial (pieces, C), whose rows lie `stride` apart, in a fixed order: a block of 512 threads takes 32 columns, each
// of its warps every 16th piece.
__device__ __forceinline__ void sum_pieces(float* sums, const float* partial, int pieces, int64_t stride, int C) {
    FASTLM_SHARED(float, room, 512);
    const int lane = int(threadIdx.x) % 32, group = int(threadIdx.x) / 32, c = int(blockIdx.x) * 32 + lane;
    float sum = 0.0f;
    if (c < C)
        for (int64_t i = group; i < pieces; i += 16) sum += partial[i * stride + c];
    room[threadIdx.x] = sum;
    __syncthreads();
    if (group > 0 || c >= C) return;
    float total = 0.0f;
    for (int g = 0; g < 16; ++g) total += room[g * 32 + lane];
    sums[c] += total;
}
