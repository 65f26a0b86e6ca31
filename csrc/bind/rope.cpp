#include "kernels/rope/rope.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(RopeKernels, rope)

namespace fastlm {

void bind_rope(py::module_& m) {
    m.def("rope_forward", [](const py::array& y, const py::array& x, const py::array& cos, const py::array& sin,
                             const py::object& positions, bool interleaved, bool inverse) {
        RopeForward p{};
        p.y = f32(y), p.x = f32(x), p.cos = f32(cos), p.sin = f32(sin), p.positions = data<int32_t>(positions);
        p.x_batch = x.strides(0) / int64_t(sizeof(float)), p.x_time = x.strides(1) / int64_t(sizeof(float));
        p.B = dim(x, 0), p.T = dim(x, 1), p.H = dim(x, 2), p.D = dim(x, 3), p.R = 2 * dim(cos, 1);
        if (p.positions && py::reinterpret_borrow<py::array>(positions).ndim() == 2) p.positions_batch = p.T;
        p.interleaved = interleaved, p.inverse = inverse;
        launch(rope_kernels().forward, p);
    });
}

}  // namespace fastlm
