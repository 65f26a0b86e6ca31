#include "kernels/int8_matmul/int8_matmul.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(Int8MatmulKernels, int8_matmul)

namespace fastlm {

#if defined(__x86_64__)
namespace avx2_vnni {
extern const Int8MatmulKernels int8_matmul_kernels;
}
namespace avx512_vnni {
extern const Int8MatmulKernels int8_matmul_kernels;
}
#endif

const Int8MatmulKernels& int8_kernels() {
#if defined(__x86_64__)
    if (has_vnni()) return active_isa() == Isa::avx512 ? avx512_vnni::int8_matmul_kernels : avx2_vnni::int8_matmul_kernels;
#endif
    return int8_matmul_kernels();
}

void bind_int8_matmul(py::module_& m) {
    auto one = [](bool wide) {
        return [wide](const py::array& c, const py::object& z, const py::array& a, const py::array& packed, const py::object& bias,
                      const py::object& residual, int64_t M, int64_t N, int64_t K, int32_t kind, int activation) {
            const QuantizedMatmul p{f32(c),        f32(z), nullptr, f32(a), data<uint8_t>(packed), f32(bias),
                                    f32(residual), M,      N,       K,      Quant(kind),           Activation(activation)};
            const Int8MatmulKernels& k = int8_kernels();
            launch(wide ? k.wide : k.matmul, p, &QuantizedMatmul::workspace, (wide ? k.wide_workspace : k.workspace)(p));
        };
    };
    m.def("int8_matmul", one(false));
    m.def("int16_matmul", one(true));
    // c[i] = a packed[i]^T + bias[i], weights of one kind.
    m.def("int8_matmuls", [](const std::vector<py::array>& c, const py::array& a, const std::vector<py::array>& packed,
                             const std::vector<py::object>& bias, int32_t kind) {
        QuantizedMatmuls p{};
        for (size_t i = 0; i < c.size(); ++i)
            p.each[i] = {f32(c[i]), nullptr,    nullptr, f32(a),      data<uint8_t>(packed[i]), f32(bias[i]), nullptr,
                         rows(a),   last(c[i]), last(a), Quant(kind), Activation::none};
        p.count = int64_t(c.size());
        launch(int8_kernels().matmuls, p, &QuantizedMatmuls::workspace, int8_kernels().workspace(p.each[0]));
    });
    // c = act(a gate^T + gate_bias) * (a up^T + up_bias), weights of one kind.
    m.def("int8_gated", [](const py::array& c, const py::array& a, const py::array& gate, const py::array& up,
                           const py::object& gate_bias, const py::object& up_bias, int32_t kind, int activation) {
        QuantizedMatmuls p{};
        p.each[0] = {nullptr, nullptr, nullptr, f32(a),  data<uint8_t>(gate), f32(gate_bias),
                     nullptr, rows(a), last(c), last(a), Quant(kind),         Activation::none};
        p.each[1] = p.each[0];
        p.each[1].c = f32(c), p.each[1].packed = data<uint8_t>(up), p.each[1].bias = f32(up_bias);
        p.count = 2, p.gated = true, p.gate = Activation(activation);
        launch(int8_kernels().matmuls, p, &QuantizedMatmuls::workspace, int8_kernels().workspace(p.each[0]));
    });
    // Returns the operations done.
    m.def("roof_int8", [](const py::array& y, int64_t rounds, bool scaled) {
        const Int8Peak p{f32(y), dim(y, 0), rounds, scaled};
        NoGil nogil;
        int8_kernels().peak(p);
        return p.pieces * p.rounds * int8_kernels().operations;
    });
}

}  // namespace fastlm
