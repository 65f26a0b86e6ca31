#include "kernels/quantize/quantize.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(QuantizeKernels, quantize)

namespace fastlm {

void bind_quantize(py::module_& m) {
    m.def("quantize", [](const py::array& blocks, const py::array& x, int32_t kind) {
        const Quantize p{data<uint8_t>(blocks), f32(x), dim(x, 0), dim(x, 1), Quant(kind)};
        NoGil nogil;
        return quantize_kernels().quantize(p);
    });
}

}  // namespace fastlm
