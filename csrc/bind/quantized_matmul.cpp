#include "kernels/quantized_matmul/quantized_matmul.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(QuantizedMatmulKernels, quantized_matmul)

namespace fastlm {

void bind_quantized_matmul(py::module_& m) {
    m.def("quantized_packed_bytes",
          [](int64_t N, int64_t K, int32_t kind) { return quantized_matmul_kernels().packed_bytes(N, K, Quant(kind)); });
    m.def("quantized_pack", [](const py::array& packed, const py::array& blocks, int64_t N, int64_t K, int32_t kind) {
        const QuantizedPack p{data<uint8_t>(packed), data<uint8_t>(blocks), N, K, Quant(kind)};
        const Prepare nogil;
        quantized_matmul_kernels().pack(p);
    });
    m.def("quantized_matmul",
          [](const py::array& c, const py::object& z, const py::array& a, const py::array& packed, const py::object& bias,
             const py::object& residual, int64_t M, int64_t N, int64_t K, int32_t kind, int activation) {
              const QuantizedMatmul p{f32(c),        f32(z), nullptr, f32(a), data<uint8_t>(packed), f32(bias),
                                      f32(residual), M,      N,       K,      Quant(kind),           Activation(activation)};
              const QuantizedMatmulKernels& kernels = quantized_matmul_kernels();
              launch(kernels.matmul, p, &QuantizedMatmul::workspace, kernels.workspace(p));
          });
    // c[i] = a packed[i]^T + bias[i], weights of one kind.
    m.def("quantized_matmuls", [](const std::vector<py::array>& c, const py::array& a, const std::vector<py::array>& packed,
                                  const std::vector<py::object>& bias, int32_t kind) {
        QuantizedMatmuls p{};
        for (size_t i = 0; i < c.size(); ++i)
            p.each[i] = {f32(c[i]), nullptr,    nullptr, f32(a),      data<uint8_t>(packed[i]), f32(bias[i]), nullptr,
                         rows(a),   last(c[i]), last(a), Quant(kind), Activation::none};
        p.count = int64_t(c.size());
        launch(quantized_matmul_kernels().matmuls, p, &QuantizedMatmuls::workspace,
               quantized_matmul_kernels().workspace(p.each[0]));
    });
}

}  // namespace fastlm
