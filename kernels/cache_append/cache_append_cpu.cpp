#include "cache_append.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

void put(float* to, const float* x, int64_t n) { std::memcpy(to, x, size_t(n) * sizeof(float)); }

void put(uint16_t* to, const float* x, int64_t n) {
    int64_t c = 0;
    for (; c + W <= n; c += W) store_bf16(to + c, load(x + c));
    if (c == n) return;
    uint16_t rest[W];
    store_bf16(rest, load_n(x + c, n - c));
    std::memcpy(to + c, rest, size_t(n - c) * sizeof(uint16_t));
}

void put(int8_t* to, const float* x, int64_t n) {
    vf top = zero(), check = zero();
    for (int64_t c = 0; c < n; c += W) {
        const vf a = load_n(x + c, n - c);
        top = max(top, abs(a));
        check = fma(a, zero(), check);  // nan where a is not finite
    }
    float scale = reduce_max(top) / 127.0f;
    if (any(is_nan(check))) scale = NAN;
    else if (scale < 1.17549435e-38f) scale = 0.0f;
    const float divisor = scale > 0.0f ? scale : 1.0f;
    for (int64_t c = 0; c < n; c += W) {
        float a[W];
        store(a, scale > 0.0f ? round(load_n(x + c, n - c) / set(divisor)) : zero());
        for (int64_t i = 0; i < W && c + i < n; ++i) to[c + i] = int8_t(a[i]);
    }
    std::memcpy(to + n, &scale, sizeof scale);
}

template <class T> void append(const CacheAppend& p) {
    const int64_t tail = p.kind == CacheKind::int8 ? 4 : 0, row = p.G * (p.D + p.E);
    parallel_for(p.B * p.T, row > 0 ? 32768 / row + 1 : 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / p.T, t = i % p.T;
            const int64_t at = p.starts ? p.positions[b] + t : p.positions[i];
            if (at < 0 || at >= p.capacity) continue;
            const int64_t page = p.table ? p.table[b * p.table_row + at / p.page] : b, place = p.table ? at % p.page : at;
            if (p.table && (page < 0 || page >= p.pages)) continue;
            T* keys = static_cast<T*>(p.keys) + page * p.keys_batch + place * p.keys_time;
            T* values = static_cast<T*>(p.values) + page * p.values_batch + place * p.values_time;
            const float *k = p.k + b * p.k_batch + t * p.k_time, *v = p.v + b * p.v_batch + t * p.v_time;
            for (int64_t g = 0; g < p.G; ++g) {
                put(keys + g * (p.D + tail), k + g * p.D, p.D);
                put(values + g * (p.E + tail), v + g * p.E, p.E);
            }
        }
    });
}

void forward(const CacheAppend& p) {
    if (p.kind == CacheKind::float32) append<float>(p);
    if (p.kind == CacheKind::bfloat16) append<uint16_t>(p);
    if (p.kind == CacheKind::int8) append<int8_t>(p);
}

}  // namespace

extern const CacheAppendKernels cache_append_kernels = {forward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
