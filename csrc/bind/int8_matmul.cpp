#include "kernels/int8_matmul/int8_matmul.h"

#include "csrc/bind/bind.h"
#include "csrc/bind/workspace.h"

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

static const Int8MatmulKernels& kernels() {
#if defined(__x86_64__)
    if (has_vnni()) return active_isa() == Isa::avx512 ? avx512_vnni::int8_matmul_kernels : avx2_vnni::int8_matmul_kernels;
#endif
    return int8_matmul_kernels();
}

void bind_int8_matmul(py::module_& m) {
    m.def("int8_matmul",
          [](const py::array& c, const py::object& z, const py::array& a, const py::array& packed, const py::object& bias,
             const py::object& residual, int64_t M, int64_t N, int64_t K, int32_t kind, int activation) {
              QuantizedMatmul p{f32(c),        f32(z), nullptr, f32(a), data<uint8_t>(packed), f32(bias),
                                f32(residual), M,      N,       K,      Quant(kind),           Activation(activation)};
              NoGil nogil;
              Workspace workspace(kernels().workspace(p));
              p.workspace = static_cast<float*>(workspace.memory);
              kernels().matmul(p);
          });
    // Returns the operations done.
    m.def("roof_int8", [](const py::array& y, int64_t rounds, bool scaled) {
        const Int8Peak p{f32(y), dim(y, 0), rounds, scaled};
        NoGil nogil;
        kernels().peak(p);
        return p.pieces * p.rounds * kernels().operations;
    });
}

}  // namespace fastlm
