#include "rms_norm.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

void forward_row(const RmsNormForward& p, int64_t r) {
    const float* x = p.x + r * p.C;
    vf squares[4] = {zero(), zero(), zero(), zero()};
    if (p.residual) {
        const float* residual = p.residual + r * p.C;
        float* total = p.total + r * p.C;
        each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
            const vf a = v.load(x + c) + v.load(residual + c);
            v.store(total + c, a);
            squares[u] = fma(a, a, squares[u]);
        });
        x = total;
    } else {
        each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
            const vf a = v.load(x + c);
            squares[u] = fma(a, a, squares[u]);
        });
    }
    const float rstd = 1.0f / std::sqrt(reduce_add_4(squares) / float(p.C) + p.eps);
    if (p.rstd) p.rstd[r] = rstd;
    const vf scale = set(rstd);
    float* y = p.y + r * p.C;
    each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(y + c, v.load(x + c) * scale * v.load(p.weight + c)); });
}

void forward(const RmsNormForward& p) {
    parallel_for(p.R, kRmsNormRows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) forward_row(p, r);
    });
}

void backward_row(const RmsNormBackward& p, int64_t r, float* dweight) {
    const float *dy = p.dy + r * p.C, *x = p.x + r * p.C;
    const vf scale = set(p.rstd[r]);
    vf sum[4] = {zero(), zero(), zero(), zero()};
    each_vector_of_4(p.C, [&](int64_t c, int u, auto v) FASTLM_LAMBDA {
        const vf dn = v.load(dy + c) * (v.load(x + c) * scale);
        sum[u] = fma(dn, v.load(p.weight + c), sum[u]);
        if (dweight) v.store(dweight + c, v.load(dweight + c) + dn);
    });
    const vf mean = set(reduce_add_4(sum) / float(p.C));
    const float* dtotal = p.dtotal ? p.dtotal + r * p.C : nullptr;
    float* dx = p.dx + r * p.C;
    each_vector(p.C, [&](int64_t c, auto v) FASTLM_LAMBDA {
        const vf g = v.load(dy + c) * v.load(p.weight + c), normal = v.load(x + c) * scale;
        const vf d = scale * fnma(normal, mean, g);
        v.store(dx + c, dtotal ? d + v.load(dtotal + c) : d);
    });
}

void backward(const RmsNormBackward& p) {
    parallel_for(p.R, kRmsNormRows, [&](int64_t begin, int64_t end) {
        float* dweight = p.dweight ? p.partial + begin / kRmsNormRows * p.C : nullptr;
        if (dweight) std::memset(dweight, 0, size_t(p.C) * sizeof(float));
        for (int64_t r = begin; r < end; ++r) backward_row(p, r, dweight);
    });
    if (!p.dweight) return;
    const int64_t pieces = (p.R + kRmsNormRows - 1) / kRmsNormRows;
    parallel_for(p.C, 128, [&](int64_t begin, int64_t end) {
        each_vector(end - begin, [&](int64_t offset, auto v) FASTLM_LAMBDA {
            const int64_t c = begin + offset;
            vf sum = zero();
            for (int64_t i = 0; i < pieces; ++i) sum = sum + v.load(p.partial + i * p.C + c);
            v.store(p.dweight + c, v.load(p.dweight + c) + sum);
        });
    });
}

}  // namespace

extern const RmsNormKernels rms_norm_kernels = {forward, backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
