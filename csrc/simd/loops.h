// Loops over a row: whole vectors without masks, then what is left of the row once, masked.
#pragma once

#define FASTLM_LAMBDA __attribute__((always_inline))

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// All W lanes of a vector.
struct Whole {
    __attribute__((always_inline)) vf load(const float* p) const { return FASTLM_ISA::load(p); }
    __attribute__((always_inline)) void store(float* p, vf v) const { FASTLM_ISA::store(p, v); }
    __attribute__((always_inline)) vf keep(vf v) const { return v; }
};

// The first n lanes of a vector, 0 < n < W. Memory beyond them is not touched.
struct Part {
    int64_t n;
    __attribute__((always_inline)) vf load(const float* p) const { return load_n(p, n); }
    __attribute__((always_inline)) void store(float* p, vf v) const { store_n(p, v, n); }
    // The other lanes become zero: for a value that is about to be summed and is not zero where a load gave zero.
    __attribute__((always_inline)) vf keep(vf v) const { return select(lt(to_float(iota()), set(float(n))), v, zero()); }
};

// f(c, lanes) for every vector of [0, n): `[&](int64_t c, auto v) FASTLM_LAMBDA { v.store(y + c, v.load(x + c)); }`
template <class F> FASTLM_INLINE void each_vector(int64_t n, const F& f) {
    int64_t c = 0;
    for (; c + W <= n; c += W) f(c, Whole{});
    if (c < n) f(c, Part{n - c});
}

// f(c, u, lanes) with u from 0 to 3 in turn: four sums that do not wait for one another.
template <class F> FASTLM_INLINE void each_vector_of_4(int64_t n, const F& f) {
    int64_t c = 0;
    for (; c + 4 * W <= n; c += 4 * W) {
        f(c, 0, Whole{});
        f(c + W, 1, Whole{});
        f(c + 2 * W, 2, Whole{});
        f(c + 3 * W, 3, Whole{});
    }
    for (; c + W <= n; c += W) f(c, 0, Whole{});
    if (c < n) f(c, 1, Part{n - c});
}

FASTLM_INLINE float reduce_add_4(const vf* s) { return reduce_add((s[0] + s[1]) + (s[2] + s[3])); }

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
