#include "kernels/activation/activation.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(ActivationKernels, activation)

namespace fastlm {

void bind_activation(py::module_& m) {
    m.def("activation_forward", [](const py::array& y, const py::array& x, int kind) {
        const ActivationForward p{f32(y), f32(x), int64_t(x.size()), Activation(kind)};
        launch(activation_kernels().forward, p);
    });
    m.def("activation_backward", [](const py::array& dx, const py::array& dy, const py::array& x, int kind) {
        const ActivationBackward p{f32(dx), f32(dy), f32(x), int64_t(x.size()), Activation(kind)};
        launch(activation_kernels().backward, p);
    });
    m.def("simd_map", [](const std::string& name, const py::array& y, const py::array& x) {
        if (!activation_kernels().probe(name.c_str(), f32(y), f32(x), int64_t(x.size())))
            throw py::value_error("[simd_map] no function is called \"" + name + "\"");
    });
    py::dict kinds;
    kinds["gelu"] = int(Activation::gelu);
    kinds["gelu_tanh"] = int(Activation::gelu_tanh);
    kinds["silu"] = int(Activation::silu);
    kinds["relu"] = int(Activation::relu);
    m.attr("activation_kinds") = kinds;
}

}  // namespace fastlm
