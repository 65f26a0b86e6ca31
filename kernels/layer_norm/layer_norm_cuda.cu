// Layer normalization in CUDA C++; the contract is layer_norm.h, with T float or bfloat16 for activations and parameters.
//
// A block of 256 threads takes a row. A thread keeps its columns in registers where the row has at most 256 * KEPT, so that a row
// is read once; longer rows are read again, from L2.
#include "csrc/cuda/device.h"

namespace {

constexpr int THREADS = 256, KEPT = 16;

template <class T> __device__ float at(const T* x, const T* residual, int64_t i) {
    const float v = to_float(x[i]);
    return residual ? v + to_float(residual[i]) : v;
}

template <class T> __device__ void forward(T* y, T* total, float* stats, const T* x, const T* residual, const T* weight,
                                           const T* bias, int C, float eps) {
    FASTLM_SHARED(float, room, THREADS / 32);
    const int64_t row = blockIdx.x, first = row * C;
    const bool kept = C <= THREADS * KEPT;
    float v[KEPT];
    float sum = 0.0f;
    if (kept) {
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            const int c = i * THREADS + int(threadIdx.x);
            v[i] = c < C ? at(x, residual, first + c) : 0.0f;
            if (total && c < C) total[first + c] = from_float<T>(v[i]);
            sum += v[i];
        }
    } else {
        for (int c = int(threadIdx.x); c < C; c += THREADS) {
            const float a = at(x, residual, first + c);
            if (total) total[first + c] = from_float<T>(a);
            sum += a;
        }
    }
    const float mean = block_sum<THREADS>(sum, room) / float(C);
    // `mean` is rounded: `rest` is what it lacks.
    float rests = 0.0f, squares = 0.0f;
    const auto deviate = [&](float a) {
        const float d = a - mean;
        rests += d;
        squares = fmaf(d, d, squares);
    };
    if (kept) {
#pragma unroll
        for (int i = 0; i < KEPT; ++i)
            if (i * THREADS + int(threadIdx.x) < C) deviate(v[i]);
    } else {
        for (int c = int(threadIdx.x); c < C; c += THREADS) deviate(at(x, residual, first + c));
    }
    const float rest = block_sum<THREADS>(rests, room) / float(C);
    const float variance = block_sum<THREADS>(squares, room) / float(C) - rest * rest;
    const float rstd = rsqrt_exact((variance < 0.0f ? 0.0f : variance) + eps), shift = -rest * rstd;
    if (stats && threadIdx.x == 0) stats[3 * row] = mean, stats[3 * row + 1] = shift, stats[3 * row + 2] = rstd;
    const auto write = [&](int c, float a) {
        const float normal = fmaf(a - mean, rstd, shift), w = to_float(weight[c]);
        y[first + c] = from_float<T>(bias ? fmaf(normal, w, to_float(bias[c])) : normal * w);
    };
    if (kept) {
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            const int c = i * THREADS + int(threadIdx.x);
            if (c < C) write(c, v[i]);
        }
    } else {
        for (int c = int(threadIdx.x); c < C; c += THREADS) write(c, at(x, residual, first + c));
    }
}

template <class T>
__device__ void backward_x(T* dx, const T* dy, const T* dtotal, const T* x, const T* weight, const float* stats, int C) {
    FASTLM_SHARED(float, room, THREADS / 32);
    const int64_t row = blockIdx.x, first = row * C;
    const float mean = stats[3 * row], shift = stats[3 * row + 1], rstd = stats[3 * row + 2];
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (int c = int(threadIdx.x); c < C; c += THREADS) {
        const float g = to_float(dy[first + c]) * to_float(weight[c]), normal = fmaf(to_float(x[first + c]) - mean, rstd, shift);
        sum_g += g;
        sum_gn = fmaf(g, normal, sum_gn);
    }
    const float mean_g = block_sum<THREADS>(sum_g, room) / float(C), mean_gn = block_sum<THREADS>(sum_gn, room) / float(C);
    for (int c = int(threadIdx.x); c < C; c += THREADS) {
        const float g = to_float(dy[first + c]) * to_float(weight[c]), normal = fmaf(to_float(x[first + c]) - mean, rstd, shift);
        const float d = rstd * (g - fmaf(normal, mean_gn, mean_g));
        dx[first + c] = from_float<T>(dtotal ? d + to_float(dtotal[first + c]) : d);
    }
}

// partial (pieces, 2, C): a block sums a piece of 32 rows for 256 columns.
template <class T> __device__ void backward_partial(float* partial, const T* dy, const T* x, const float* stats, int R, int C) {
    const int64_t piece = blockIdx.x;
    const int c = int(blockIdx.y) * THREADS + int(threadIdx.x);
    if (c >= C) return;
    float dweight = 0.0f, dbias = 0.0f;
    for (int64_t row = piece * 32; row < piece * 32 + 32 && row < R; ++row) {
        const float d = to_float(dy[row * C + c]);
        dweight = fmaf(d, fmaf(to_float(x[row * C + c]) - stats[3 * row], stats[3 * row + 2], stats[3 * row + 1]), dweight);
        dbias += d;
    }
    partial[2 * piece * C + c] = dweight;
    partial[(2 * piece + 1) * C + c] = dbias;
}

}  // namespace

#define FASTLM_FORMS(T, suffix)                                                                                                   \
    FASTLM_GLOBAL void __launch_bounds__(THREADS) layer_norm_forward_##suffix(                                                    \
        T* y, T* total, float* stats, const T* x, const T* residual, const T* weight, const T* bias, int C, float eps) {          \
        forward<T>(y, total, stats, x, residual, weight, bias, C, eps);                                                           \
    }                                                                                                                             \
    FASTLM_KERNEL(layer_norm_forward_##suffix)                                                                                    \
    FASTLM_GLOBAL void __launch_bounds__(THREADS) layer_norm_backward_x_##suffix(T* dx, const T* dy, const T* dtotal, const T* x, \
                                                                                 const T* weight, const float* stats, int C) {    \
        backward_x<T>(dx, dy, dtotal, x, weight, stats, C);                                                                       \
    }                                                                                                                             \
    FASTLM_KERNEL(layer_norm_backward_x_##suffix)                                                                                 \
    FASTLM_GLOBAL void __launch_bounds__(THREADS)                                                                                 \
        layer_norm_backward_partial_##suffix(float* partial, const T* dy, const T* x, const float* stats, int R, int C) {         \
        backward_partial<T>(partial, dy, x, stats, R, C);                                                                         \
    }                                                                                                                             \
    FASTLM_KERNEL(layer_norm_backward_partial_##suffix)
FASTLM_FORMS(float, fp32)
FASTLM_FORMS(bfloat16, bf16)

// dweight, dbias (C,) += the partial sums, in their order; either may be null.
FASTLM_GLOBAL void __launch_bounds__(THREADS)
    layer_norm_backward_parameters(float* dweight, float* dbias, const float* partial, int pieces, int C) {
    const int c = int(blockIdx.x) * THREADS + int(threadIdx.x);
    if (c >= C) return;
    float sum_w = 0.0f, sum_b = 0.0f;
    for (int64_t i = 0; i < pieces; ++i) {
        sum_w += partial[2 * i * C + c];
        sum_b += partial[(2 * i + 1) * C + c];
    }
    if (dweight) dweight[c] += sum_w;
    if (dbias) dbias[c] += sum_b;
}
FASTLM_KERNEL(layer_norm_backward_parameters)
