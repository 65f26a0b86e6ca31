#include "kernels/gated/gated.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(GatedKernels, gated)

namespace fastlm {
namespace {

// Elements from one row to the next of an array whose leading axes are evenly spaced; what fastlm/ops/gated.py made sure of.
int64_t row_stride(const py::array& a) {
    if (a.flags() & py::array::c_style) return last(a);  // an axis of one element may have any stride
    return int64_t(a.strides(a.ndim() - 2)) / int64_t(sizeof(float));
}

}  // namespace

void bind_gated(py::module_& m) {
    m.def("gated_forward", [](const py::array& y, const py::array& gate, const py::array& up, int kind) {
        const GatedForward p{f32(y), f32(gate), f32(up), rows(y), last(y), row_stride(gate), row_stride(up), Activation(kind)};
        launch(gated_kernels().forward, p);
    });
    m.def("gated_backward", [](const py::array& dgate, const py::array& dup, const py::array& dy, const py::array& gate,
                               const py::array& up, int kind) {
        const GatedBackward p{f32(dgate), f32(dup),          f32(dy),         f32(gate),        f32(up),        rows(dy),
                              last(dy),   row_stride(dgate), row_stride(dup), row_stride(gate), row_stride(up), Activation(kind)};
        launch(gated_kernels().backward, p);
    });
}

}  // namespace fastlm
