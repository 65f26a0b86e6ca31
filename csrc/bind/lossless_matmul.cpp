#include "kernels/lossless_matmul/lossless_matmul.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(LosslessMatmulKernels, lossless_matmul)

namespace fastlm {

void bind_lossless_matmul(py::module_& m) {
    // Where (the beginnings of the entries, the entries) lie, and all bytes.
    m.def("lossless_layout", [](int64_t size, int64_t N, int64_t K, int64_t count) {
        const LosslessLayout at(size, N, K, count);
        return py::make_tuple(at.first, at.entries, at.bytes);
    });
    m.def("lossless_survey", [](const py::array& counts, const py::array& w) {
        const LosslessSurvey p{data<int32_t>(counts), data<void>(w), dim(w, 0), dim(w, 1), int64_t(w.itemsize())};
        const Prepare nogil;
        lossless_matmul_kernels().survey(p);
    });
    m.def("lossless_pack", [](const py::array& packed, const py::array& w) {
        const LosslessPack p{data<uint8_t>(packed), data<void>(w), dim(w, 0), dim(w, 1), int64_t(w.itemsize())};
        const Prepare nogil;
        lossless_matmul_kernels().pack(p);
    });
    // w: rows `ids`, int32 or int64 of any shape, or all. Where the weight is bfloat16, as that or as float32.
    m.def("lossless_unpack", [](const py::array& w, const py::array& packed, const py::object& ids, int64_t size) {
        const bool narrow = !ids.is_none() && py::reinterpret_borrow<py::array>(ids).itemsize() == 4;
        const LosslessUnpack p{data<void>(w),
                               data<uint8_t>(packed),
                               narrow ? nullptr : data<int64_t>(ids),
                               narrow ? data<int32_t>(ids) : nullptr,
                               rows(w),
                               last(w),
                               size,
                               int64_t(w.itemsize()) > size};
        launch(lossless_matmul_kernels().unpack, p);
    });
    m.def("lossless_matmul",
          [](const py::array& c, const py::object& z, const py::array& a, const py::array& packed, const py::object& bias,
             const py::object& residual, int64_t M, int64_t N, int64_t K, int64_t size, int activation) {
              const LosslessMatmul p{f32(c), f32(z), nullptr, f32(a), data<uint8_t>(packed), f32(bias), f32(residual),
                                     M,      N,      K,       size,   Activation(activation)};
              const LosslessMatmulKernels& kernels = lossless_matmul_kernels();
              launch(kernels.matmul, p, &LosslessMatmul::workspace, kernels.workspace(p));
          });
    // c[i] = a packed[i]^T + bias[i], weights of one size.
    m.def("lossless_matmuls", [](const std::vector<py::array>& c, const py::array& a, const std::vector<py::array>& packed,
                                 const std::vector<py::object>& bias, int64_t size) {
        LosslessMatmuls p{};
        for (size_t i = 0; i < c.size(); ++i)
            p.each[i] = {f32(c[i]), nullptr,    nullptr, f32(a), data<uint8_t>(packed[i]), f32(bias[i]), nullptr,
                         rows(a),   last(c[i]), last(a), size,   Activation::none};
        p.count = int64_t(c.size());
        launch(lossless_matmul_kernels().matmuls, p, &LosslessMatmuls::workspace, lossless_matmul_kernels().workspace(p.each[0]));
    });
}

}  // namespace fastlm
