#include "kernels/fast_inner_product/fast_inner_product.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(FastInnerProductKernels, fast_inner_product)

namespace fastlm {

void bind_fast_inner_product(py::module_& m) {
    m.def("has_fast_inner_product", [] { return fast_inner_product_kernels().linear && adds_beside_fma(); });
    m.attr("fast_inner_product_gain") = double(kFipPeriod) / double(kFipProducts);
    m.def("fast_inner_product", [](const py::array& y, const py::object& z, const py::array& x, const py::array& w,
                                   const py::object& bias, const py::object& residual, int activation) {
        const FastInnerProduct p{
            f32(y), f32(z), nullptr, f32(x), f32(w), f32(bias), f32(residual), rows(x), dim(w, 0), last(x), Activation(activation)};
        const FastInnerProductKernels& kernels = fast_inner_product_kernels();
        launch(kernels.linear, p, &FastInnerProduct::workspace, kernels.workspace(p));
    });
    // ys[i] = x ws[i]^T + biases[i]; at most as many as `together`.
    m.def("fast_inner_products", [](const std::vector<py::array>& ys, const py::array& x, const std::vector<py::array>& ws,
                                    const std::vector<py::object>& biases) {
        FastInnerProducts p{};
        for (size_t i = 0; i < ys.size(); ++i)
            p.each[i] = {f32(ys[i]), nullptr, nullptr,       f32(x),  f32(ws[i]),      f32(biases[i]),
                         nullptr,    rows(x), dim(ws[i], 0), last(x), Activation::none};
        p.count = int64_t(ys.size());
        const FastInnerProductKernels& kernels = fast_inner_product_kernels();
        launch(kernels.linears, p, &FastInnerProducts::workspace, kernels.workspace(p.each[0]));
    });
}

}  // namespace fastlm
