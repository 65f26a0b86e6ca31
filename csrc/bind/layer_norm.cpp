#include "kernels/layer_norm/layer_norm.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(LayerNormKernels, layer_norm)

namespace fastlm {

void bind_layer_norm(py::module_& m) {
    m.def("layer_norm_forward", [](const py::array& y, const py::object& total, const py::object& stats, const py::array& x,
                                   const py::object& residual, const py::array& weight, const py::object& bias, float eps) {
        const LayerNormForward p{f32(y),      f32(total), f32(stats), f32(x),  f32(residual),
                                 f32(weight), f32(bias),  rows(x),    last(x), eps};
        launch(layer_norm_kernels().forward, p);
    });
    m.def("layer_norm_backward",
          [](const py::array& dx, const py::object& dweight, const py::object& dbias, const py::object& partial,
             const py::array& dy, const py::object& dtotal, const py::array& x, const py::array& weight, const py::array& stats) {
              const LayerNormBackward p{f32(dx), f32(dweight), f32(dbias), f32(partial), f32(dy), f32(dtotal),
                                        f32(x),  f32(weight),  f32(stats), rows(x),      last(x)};
              launch(layer_norm_kernels().backward, p);
          });
    m.attr("layer_norm_rows") = kLayerNormRows;
}

}  // namespace fastlm
