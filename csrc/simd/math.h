// Elementary functions on vf, the same source for every instruction set. Errors are bounds against float64 over the whole range,
// checked by tests/runtime/test_simd.py.
#pragma once

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// e^x, 1 ulp; 0 below -104, inf above 88.73, nan stays nan.
FASTLM_INLINE vf exp(vf x) {
    const vf clamped = min(max(x, set(-104.0f)), set(89.0f));
    const vf n = round(clamped * set(1.44269504f));
    // Cody-Waite: ln 2 in two parts, so that r is exact to the last bit that matters.
    vf r = fnma(n, set(0.693145751953125f), clamped);
    r = fnma(n, set(1.42860682e-6f), r);
    // e^r = 1 + r + r^2 p(r), minimax on |r| <= ln(2) / 2: relative error 4e-9.
    vf p = set(1.38145406e-3f);
    p = fma(p, r, set(8.36874545e-3f));
    p = fma(p, r, set(4.16683890e-2f));
    p = fma(p, r, set(1.66665211e-1f));
    p = fma(p, r, set(0.49999994f));
    p = fma(p * r, r, r) + set(1.0f);
    // 2^n in two factors: n may leave the exponent range of one (subnormal results, 2^128).
    const vi i = to_int(n);
    const vi half = subi(shr<1>(addi(i, seti(512))), seti(256));
    const vf a = as_float(shl<23>(addi(half, seti(127))));
    const vf b = as_float(shl<23>(addi(subi(i, half), seti(127))));
    const vf y = (p * a) * b;
    return select(is_nan(x), x, y);
}

// 2^(x unit) for x <= 0 and unit > 0; low: -127 / unit, finite. 1 ulp or so of the product as it is, not rounded: the reduced
// argument comes from one fma. 0 below 2^-126.5 (no subnormal results), nan stays nan.
FASTLM_INLINE vf exp2_negative(vf x, vf unit, vf low) {
    const vf clamped = max(low, x);  // this order of operands keeps nan
    const vf magic = set(12583039.0f);
    const vf shifted = fma(clamped, unit, magic);  // 1.5 * 2^23 + 127: the low bits now hold round(x unit) + 127
    const vf r = fma(clamped, unit, magic - shifted);
    vf p = set(1.535329636e-4f);  // minimax fit of 2^r on [-1/2, 1/2], exactly 1 at 0
    p = fma(p, r, set(1.339895229e-3f));
    p = fma(p, r, set(9.618438120e-3f));
    p = fma(p, r, set(5.550332285e-2f));
    p = fma(p, r, set(2.402264790e-1f));
    p = fma(p, r, set(6.931472029e-1f));
    p = fma(p, r, set(1.0f));
    return p * as_float(shl<23>(as_int(shifted)));  // -127 gives the exponent field 0: the factor is 0
}

// Natural logarithm, 1 ulp; -inf at 0, nan below, inf and nan stay.
FASTLM_INLINE vf log(vf x) {
    const vm tiny = lt(x, set(1.17549435e-38f));
    const vf scaled = select(tiny, x * set(8388608.0f), x);
    const vi ix = subi(as_int(scaled), seti(0x3F3504F3));  // so that m lies in [sqrt(1/2), sqrt(2))
    // Arithmetic shift by 23 of a possibly negative number: bias it first.
    const vi e = subi(shr<23>(addi(ix, seti(0x40000000))), seti(128));
    const vf m = as_float(subi(as_int(scaled), shl<23>(e)));
    const vf n = to_float(e) - select(tiny, set(23.0f), zero());
    const vf f = m - set(1.0f);
    const vf s = f / (f + set(2.0f));
    const vf z = s * s;
    // 2 atanh(s) = 2s + 2s z (1/3 + z/5 + z^2/7 + ...)
    vf p = set(0.22222222f);
    p = fma(p, z, set(0.28571429f));
    p = fma(p, z, set(0.4f));
    p = fma(p, z, set(0.66666667f));
    const vf hfsq = set(0.5f) * f * f;
    const vf tail = fma(s, fma(z, p, hfsq), n * set(1.42860682e-6f));
    vf y = fma(n, set(0.693145751953125f), f - (hfsq - tail));
    y = select(eq(x, zero()), set(-INFINITY), y);
    y = select(eq(x, set(INFINITY)), x, y);
    return select(lt(x, zero()), set(NAN), select(is_nan(x), x, y));
}

// Hyperbolic tangent, 1.5 ulp.
FASTLM_INLINE vf tanh(vf x) {
    const vf a = min(abs(x), set(10.0f));
    // Near zero 1 - 2 / (e^2a + 1) cancels: use the odd series of a rational form instead.
    const vf z = a * a;
    vf p = set(-5.70498872745e-3f);
    p = fma(p, z, set(2.06390887954e-2f));
    p = fma(p, z, set(-5.37397155531e-2f));
    p = fma(p, z, set(1.33314422036e-1f));
    p = fma(p, z, set(-3.33332819422e-1f));
    const vf small = fma(p * z, a, a);
    const vf large = set(1.0f) - set(2.0f) / (exp(a + a) + set(1.0f));
    vf y = select(lt(a, set(0.625f)), small, large);
    y = as_float(ori(as_int(y), andi(as_int(x), seti(int32_t(0x80000000)))));
    return select(is_nan(x), x, y);
}

// erf(a) / a as a minimax polynomial in z = a^2 on [0, 1].
FASTLM_INLINE vf erf_quotient(vf z) {
    vf p = set(7.853859671e-5f);
    p = fma(p, z, set(-8.010193116e-4f));
    p = fma(p, z, set(5.188327628e-3f));
    p = fma(p, z, set(-2.685381190e-2f));
    p = fma(p, z, set(1.128358515e-1f));
    p = fma(p, z, set(-3.761262582e-1f));
    return fma(p, z, set(1.128379166f));
}

// erfc(a) e^(a^2), relative error 2.5e-7 for a >= 1: t times a minimax polynomial in t = 1 / (1 + 0.4 a), fitted on [1, 9.5].
FASTLM_INLINE vf erfc_scaled(vf a) {
    const vf t = set(1.0f) / fma(set(0.4f), a, set(1.0f));
    vf q = set(-0.117370754f);
    q = fma(q, t, set(0.246633753f));
    q = fma(q, t, set(0.0049162521f));
    q = fma(q, t, set(0.214964151f));
    q = fma(q, t, set(0.19818607f));
    q = fma(q, t, set(0.226788446f));
    q = fma(q, t, set(0.225620806f));
    return q * t;
}

// Error function, 2.5 ulp.
FASTLM_INLINE vf erf(vf x) {
    const vf a = min(abs(x), set(4.2f));  // erfc(4.2) = 2.9e-9: 1 in float32
    const vf z = a * a;
    const vf large = fnma(erfc_scaled(a), exp(zero() - z), set(1.0f));
    vf y = select(lt(a, set(1.0f)), erf_quotient(z) * a, large);
    y = as_float(ori(as_int(y), andi(as_int(x), seti(int32_t(0x80000000)))));
    return select(is_nan(x), x, y);
}

// 1 / (1 + e^-x), 2.5 ulp; 0 for x < -88.73, where it is below the smallest normal number.
FASTLM_INLINE vf sigmoid(vf x) { return set(1.0f) / (set(1.0f) + exp(zero() - x)); }

// Round to nearest even; nan stays nan.
FASTLM_INLINE void store_bf16(uint16_t* p, vf v) {
    const vi u = as_int(v);
    const vi rounded = addi(u, addi(seti(0x7FFF), andi(shr<16>(u), seti(1))));
    const vi quiet = ori(u, seti(0x00400000));
    store_u16(p, shr<16>(as_int(select(is_nan(v), as_float(quiet), as_float(rounded)))));
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
