// AdamW and the global norm over many tensors in CUDA C++; the contract is adamw.h. A block of 256 threads takes a piece of 4096
// elements of one tensor, by vectors of four.
//
// table (T, 8): addresses of parameter, m, v, gradient and of the bfloat16 copy (or 0), elements, bits of the weight decay.
// pieces (N, 2): tensor, and which piece of it.
#include "csrc/cuda/device.h"

namespace {

constexpr int THREADS = 256, PIECE = 4096;

struct alignas(16) Four {
    float v[4];
};
struct alignas(8) FourNarrow {
    bfloat16 v[4];
};
template <class T> __device__ T* pointer(const int64_t* table, int64_t tensor, int i) {
    return reinterpret_cast<T*>(table[8 * tensor + i]);
}
__device__ float float_of(int64_t bits) {
    const int narrow = int(bits);
    float f;
    memcpy(&f, &narrow, 4);
    return f;
}

template <class V> __device__ V total(V v, V* room) {
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < THREADS / 32; ++i) v += room[i];
    return v;
}

__device__ double power(double base, int n) {
    double p = 1.0;
    for (; n > 0; n >>= 1, base *= base)
        if (n & 1) p *= base;
    return p;
}

}  // namespace

// numbers: lr / (1 - beta1^step), sqrt(1 - beta2^step), lr, scale; a scale that is not finite changes nothing.
FASTLM_GLOBAL void __launch_bounds__(THREADS)
    adamw_step(const int64_t* table, const int* pieces, const float* numbers, float rest1, float rest2, float beta2, float eps) {
    const float step_size = numbers[0], bias2 = numbers[1], scale = numbers[3];
    if (!(fabsf(scale) < INFINITY)) return;
    const int64_t tensor = pieces[2 * blockIdx.x], start = int64_t(pieces[2 * blockIdx.x + 1]) * PIECE;
    float *p = pointer<float>(table, tensor, 0), *m = pointer<float>(table, tensor, 1), *v = pointer<float>(table, tensor, 2);
    const float* g = pointer<const float>(table, tensor, 3);
    bfloat16* copy = pointer<bfloat16>(table, tensor, 4);
    const int64_t n = table[8 * tensor + 5];
    const float keep = fmaf(-numbers[2], float_of(table[8 * tensor + 6]), 1.0f);
    const auto update = [&](float& p, float& m, float& v, float g) {
        g *= scale;
        m = fmaf(rest1, g - m, m);
        v = fmaf(rest2 * g, g, beta2 * v);
        p = fmaf(-step_size, m / (sqrtf(v) / bias2 + eps), p * keep);
    };
#pragma unroll
    for (int k = 0; k < PIECE / (4 * THREADS); ++k) {
        const int64_t at = start + 4 * (k * THREADS + int(threadIdx.x));
        if (at + 4 <= n) {
            Four a = *reinterpret_cast<Four*>(p + at), b = *reinterpret_cast<Four*>(m + at), c = *reinterpret_cast<Four*>(v + at);
            const Four d = *reinterpret_cast<const Four*>(g + at);
#pragma unroll
            for (int j = 0; j < 4; ++j) update(a.v[j], b.v[j], c.v[j], d.v[j]);
            *reinterpret_cast<Four*>(p + at) = a;
            *reinterpret_cast<Four*>(m + at) = b;
            *reinterpret_cast<Four*>(v + at) = c;
            if (copy) {
                FourNarrow e;
#pragma unroll
                for (int j = 0; j < 4; ++j) e.v[j] = to_bfloat16(a.v[j]);
                *reinterpret_cast<FourNarrow*>(copy + at) = e;
            }
        } else {
            for (int64_t i = at; i < n; ++i) {
                update(p[i], m[i], v[i], g[i]);
                if (copy) copy[i] = to_bfloat16(p[i]);
            }
        }
    }
}
FASTLM_KERNEL(adamw_step)

// What adamw_step reads, from memory; rest1 = 1 - beta1, rest2 = 1 - beta2; scale may be null.
FASTLM_GLOBAL void adamw_numbers(float* numbers, const int* step, const float* lr, const float* scale, float rest1, float rest2) {
    if (threadIdx.x != 0) return;
    numbers[0] = float(double(*lr) / (1 - power(1 - double(rest1), *step)));
    numbers[1] = sqrtf(float(1 - power(1 - double(rest2), *step)));
    numbers[2] = *lr;
    numbers[3] = scale ? *scale : 1.0f;
}
FASTLM_KERNEL(adamw_numbers)

FASTLM_GLOBAL void __launch_bounds__(THREADS) adamw_square_sum(double* partial, const int64_t* table, const int* pieces) {
    FASTLM_SHARED(double, room, THREADS / 32);
    const int64_t tensor = pieces[2 * blockIdx.x], start = int64_t(pieces[2 * blockIdx.x + 1]) * PIECE;
    const float* g = pointer<const float>(table, tensor, 3);
    const int64_t n = table[8 * tensor + 5];
    double sum = 0;
#pragma unroll
    for (int k = 0; k < PIECE / (4 * THREADS); ++k) {
        const int64_t at = start + 4 * (k * THREADS + int(threadIdx.x));
        if (at + 4 <= n) {
            const Four d = *reinterpret_cast<const Four*>(g + at);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum += double(d.v[j]) * double(d.v[j]);
        } else {
            for (int64_t i = at; i < n; ++i) sum += double(g[i]) * double(g[i]);
        }
    }
    sum = total(sum, room);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
FASTLM_KERNEL(adamw_square_sum)

FASTLM_GLOBAL void __launch_bounds__(THREADS) adamw_norm(float* norm, const double* partial, int n) {
    FASTLM_SHARED(double, room, THREADS / 32);
    double sum = 0;
    for (int i = int(threadIdx.x); i < n; i += THREADS) sum += partial[i];
    sum = total(sum, room);
    if (threadIdx.x == 0) *norm = float(sqrt(sum));
}
FASTLM_KERNEL(adamw_norm)

FASTLM_GLOBAL void adamw_clip(float* scale, const float* norm, float clip) {
    if (threadIdx.x == 0) *scale = *norm < INFINITY ? fminf(clip / (*norm + 1e-6f), 1.0f) : NAN;  // nan is not less either
}
FASTLM_KERNEL(adamw_clip)
