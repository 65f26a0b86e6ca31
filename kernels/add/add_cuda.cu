// Sums of arrays in CUDA C++: out (n,) = x (n,) + y (period,), repeated. out may be x.
#include "csrc/cuda/device.h"

namespace {

constexpr int THREADS = 256, EACH = 4;

template <class T, class Y> __device__ void add(T* out, const T* x, const Y* y, int n, int period) {
    const int64_t first = int64_t(blockIdx.x) * THREADS * EACH + threadIdx.x;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int64_t at = first + i * THREADS;
        if (at < n) out[at] = from_float<T>(to_float(x[at]) + to_float(y[at % period]));
    }
}

}  // namespace

#define FASTLM_FORM(T, Y, suffix)                                                                                   \
    FASTLM_GLOBAL void __launch_bounds__(THREADS) add_##suffix(T* out, const T* x, const Y* y, int n, int period) { \
        add<T, Y>(out, x, y, n, period);                                                                            \
    }                                                                                                               \
    FASTLM_KERNEL(add_##suffix)
FASTLM_FORM(float, float, fp32_fp32)
FASTLM_FORM(float, bfloat16, fp32_bf16)
FASTLM_FORM(bfloat16, float, bf16_fp32)
FASTLM_FORM(bfloat16, bfloat16, bf16_bf16)
