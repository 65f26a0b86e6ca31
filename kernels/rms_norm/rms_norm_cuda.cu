// RMS normalization in CUDA C++; the contract is rms_norm.h, with T float or bfloat16 for activations and the weight.
//
// A row is taken by G threads, a warp or a block of 256, V elements at once. A thread keeps 32 elements in registers, so that a row
// of up to 32 G is read once; longer rows are read again, from L2.
#include "csrc/cuda/rows.h"

namespace {

constexpr int THREADS = 256;

template <class T, int G, int V>
__device__ void forward(T* y, T* total, float* rstd, const T* x, const T* residual, const T* weight, int R, int C, float eps) {
    FASTLM_SHARED(float, room, THREADS / 32);
    constexpr int KEPT = 32 / V;
    const int lane = int(threadIdx.x) % G;
    const int64_t row = int64_t(blockIdx.x) * (THREADS / G) + threadIdx.x / G, first = row * C;
    if (row >= R) return;                      // a whole warp, or none
    const bool kept = G == 32 || C <= 32 * G;  // a warp is not asked for more
    const auto each = [&](const auto& f) {
        if (kept) {
#pragma unroll
            for (int i = 0; i < KEPT; ++i)
                if ((i * G + lane) * V < C) f(i, (i * G + lane) * V);
        } else {
            for (int c = lane * V; c < C; c += G * V) f(0, c);
        }
    };
    Pack<T, V> a[KEPT], b[KEPT];
    const auto load = [&](int i, int c) {
        a[i] = load_pack<V>(x + first + c);
        if (residual) b[i] = load_pack<V>(residual + first + c);
    };
    const auto at = [&](int i, int j) { return residual ? to_float(a[i].v[j]) + to_float(b[i].v[j]) : to_float(a[i].v[j]); };
    if (kept) each(load);  // all loads before the first is waited for
    float squares = 0.0f;
    each([&](int i, int c) {
        if (!kept) load(i, c);
        Pack<T, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float v = at(i, j);
            squares = fmaf(v, v, squares);
            out.v[j] = from_float<T>(v);
        }
        if (total) store_pack(total + first + c, out);
    });
    const float scale = rsqrt_exact(group_sum<G>(squares, room) / float(C) + eps);
    if (rstd && lane == 0) rstd[row] = scale;
    each([&](int i, int c) {
        if (!kept) load(i, c);
        const auto w = load_pack<V>(weight + c);
        Pack<T, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) out.v[j] = from_float<T>(at(i, j) * scale * to_float(w.v[j]));
        store_pack(y + first + c, out);
    });
}

// A block takes a piece of `rows` rows. Its sums for the weight's gradient are in shared memory, every column with one thread: they
// become row blockIdx.x of partial (pieces, C), where that is not null. dx may be dy or dtotal.
template <class T, int V> __device__ void backward(T* dx, float* partial, const T* dy, const T* dtotal, const T* x, const T* weight,
                                                   const float* rstd, int R, int C, int rows) {
    FASTLM_SHARED(float, room, THREADS / 32);
    FASTLM_DYNAMIC_SHARED(memory);
    float* const sums = reinterpret_cast<float*>(memory);
    constexpr int KEPT = 16 / V;
    const bool kept = C <= 16 * THREADS;
    const auto each = [&](const auto& f) {
        if (kept) {
#pragma unroll
            for (int i = 0; i < KEPT; ++i)
                if ((i * THREADS + int(threadIdx.x)) * V < C) f(i, (i * THREADS + int(threadIdx.x)) * V);
        } else {
            for (int c = int(threadIdx.x) * V; c < C; c += THREADS * V) f(0, c);
        }
    };
    if (partial) each([&](int, int c) { clear_own<V>(sums, c, C); });
    const int64_t begin = int64_t(blockIdx.x) * rows, end = begin + rows < R ? begin + rows : R;
    Pack<T, V> d[KEPT], n[KEPT];
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * C;
        const auto load = [&](int i, int c) { d[i] = load_pack<V>(dy + first + c), n[i] = load_pack<V>(x + first + c); };
        if (kept) each(load);
        const float scale = rstd[row];
        float sum = 0.0f;
        each([&](int i, int c) {
            if (!kept) load(i, c);
            const auto w = load_pack<V>(weight + c);
            float dn[V];
#pragma unroll
            for (int j = 0; j < V; ++j) {
                dn[j] = to_float(d[i].v[j]) * (to_float(n[i].v[j]) * scale);
                sum = fmaf(dn[j], to_float(w.v[j]), sum);
            }
            if (partial) add_own<V>(sums, c, C, dn);
        });
        const float mean = block_sum<THREADS>(sum, room) / float(C);
        each([&](int i, int c) {
            if (!kept) load(i, c);
            const auto w = load_pack<V>(weight + c);
            Pack<T, V> out, more;
            if (dtotal) more = load_pack<V>(dtotal + first + c);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float g = to_float(d[i].v[j]) * to_float(w.v[j]), normal = to_float(n[i].v[j]) * scale;
                const float a = scale * fmaf(-normal, mean, g);
                out.v[j] = from_float<T>(dtotal ? a + to_float(more.v[j]) : a);
            }
            store_pack(dx + first + c, out);
        });
    }
    if (partial) each([&](int, int c) { write_own<V>(partial + int64_t(blockIdx.x) * C, sums, c, C); });
}

// partial (pieces, C) for rows that are too wide for sums in shared memory: a block sums a piece of `rows` rows for 256 columns.
template <class T>
__device__ void backward_partial(float* partial, const T* dy, const T* x, const float* rstd, int R, int C, int rows) {
    const int64_t begin = int64_t(blockIdx.x) * rows, end = begin + rows < R ? begin + rows : R;
    const int c = int(blockIdx.y) * THREADS + int(threadIdx.x);
    if (c >= C) return;
    float sum = 0.0f;
    for (int64_t row = begin; row < end; ++row) sum = fmaf(to_float(dy[row * C + c]), to_float(x[row * C + c]) * rstd[row], sum);
    partial[int64_t(blockIdx.x) * C + c] = sum;
}

}  // namespace

#define FASTLM_FORWARD(T, suffix, G, V)                                                                         \
    FASTLM_GLOBAL void __launch_bounds__(THREADS, 1) rms_norm_forward_##suffix(                                 \
        T* y, T* total, float* rstd, const T* x, const T* residual, const T* weight, int R, int C, float eps) { \
        forward<T, G, V>(y, total, rstd, x, residual, weight, R, C, eps);                                       \
    }                                                                                                           \
    FASTLM_KERNEL(rms_norm_forward_##suffix)
#define FASTLM_BACKWARD(T, suffix, V)                                                                                \
    FASTLM_GLOBAL void __launch_bounds__(THREADS)                                                                    \
        rms_norm_backward_##suffix(T* dx, float* partial, const T* dy, const T* dtotal, const T* x, const T* weight, \
                                   const float* rstd, int R, int C, int rows) {                                      \
        backward<T, V>(dx, partial, dy, dtotal, x, weight, rstd, R, C, rows);                                        \
    }                                                                                                                \
    FASTLM_KERNEL(rms_norm_backward_##suffix)
// warp and block want rows of whole packs; any takes all.
#define FASTLM_FORMS(T, suffix)                                                                                                  \
    FASTLM_FORWARD(T, warp_##suffix, 32, kPack<T>)                                                                               \
    FASTLM_FORWARD(T, block_##suffix, THREADS, kPack<T>)                                                                         \
    FASTLM_FORWARD(T, any_##suffix, THREADS, 1)                                                                                  \
    FASTLM_BACKWARD(T, block_##suffix, kPack<T>)                                                                                 \
    FASTLM_BACKWARD(T, any_##suffix, 1)                                                                                          \
    FASTLM_GLOBAL void __launch_bounds__(THREADS)                                                                                \
        rms_norm_backward_partial_##suffix(float* partial, const T* dy, const T* x, const float* rstd, int R, int C, int rows) { \
        backward_partial<T>(partial, dy, x, rstd, R, C, rows);                                                                   \
    }                                                                                                                            \
    FASTLM_KERNEL(rms_norm_backward_partial_##suffix)
FASTLM_FORMS(float, fp32)
FASTLM_FORMS(bfloat16, bf16)

// dweight (C,) += the partial sums.
FASTLM_GLOBAL void __launch_bounds__(512) rms_norm_backward_parameters(float* dweight, const float* partial, int pieces, int C) {
    sum_pieces(dweight, partial, pieces, C, C);
}
FASTLM_KERNEL(rms_norm_backward_parameters)
