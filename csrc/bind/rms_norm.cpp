#include "kernels/rms_norm/rms_norm.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(RmsNormKernels, rms_norm)

namespace fastlm {

void bind_rms_norm(py::module_& m) {
    m.def("rms_norm_forward", [](const py::array& y, const py::object& total, const py::object& rstd, const py::array& x,
                                 const py::object& residual, const py::array& weight, float eps) {
        const RmsNormForward p{f32(y), f32(total), f32(rstd), f32(x), f32(residual), f32(weight), rows(x), last(x), eps};
        launch(rms_norm_kernels().forward, p);
    });
    m.def("rms_norm_backward", [](const py::array& dx, const py::object& dweight, const py::object& partial, const py::array& dy,
                                  const py::object& dtotal, const py::array& x, const py::array& weight, const py::array& rstd) {
        const RmsNormBackward p{f32(dx), f32(dweight), f32(partial), f32(dy), f32(dtotal),
                                f32(x),  f32(weight),  f32(rstd),    rows(x), last(x)};
        launch(rms_norm_kernels().backward, p);
    });
    m.attr("rms_norm_rows") = kRmsNormRows;
}

}  // namespace fastlm
