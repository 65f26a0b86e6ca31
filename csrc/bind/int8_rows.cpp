#include "kernels/int8_rows/int8_rows.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(Int8RowsKernels, int8_rows)

namespace fastlm {

#if defined(__x86_64__)
namespace avx2_vnni {
extern const Int8RowsKernels int8_rows_kernels;
}
namespace avx512_vnni {
extern const Int8RowsKernels int8_rows_kernels;
}
#endif

static const Int8RowsKernels& rows_kernels() {
#if defined(__x86_64__)
    if (has_vnni()) return active_isa() == Isa::avx512 ? avx512_vnni::int8_rows_kernels : avx2_vnni::int8_rows_kernels;
#endif
    return int8_rows_kernels();
}

void bind_int8_rows(py::module_& m) {
    m.attr("int8_rows_depth") = kInt8RowsDepth;
    m.def("int8_rows_packed_bytes", [](int64_t N, int64_t K) { return rows_kernels().packed_bytes(N, K); });
    m.def("int8_rows_pack", [](const py::array& packed, const py::array& blocks, int64_t N, int64_t K) {
        const Int8RowsPack p{data<uint8_t>(packed), data<uint8_t>(blocks), N, K};
        const Prepare nogil;
        rows_kernels().pack(p);
    });
    m.def("int8_rows",
          [](const py::array& c, const py::object& z, const py::array& a, const py::array& packed, const py::object& columns,
             const py::object& bias, const py::object& residual, int64_t M, int64_t N, int64_t K, int activation) {
              Int8RowsTogether p{};
              p.each[0] = {f32(c), f32(z), f32(a), data<uint8_t>(packed), f32(columns), f32(bias), f32(residual),
                           M,      N,      K,      Activation(activation)};
              p.count = 1;
              launch(rows_kernels().matmul, p, &Int8RowsTogether::workspace, rows_kernels().workspace(M, K));
          });
    // c[i] = a packed[i]^T + bias[i], weights with the same columns.
    m.def("int8_rows_together", [](const std::vector<py::array>& c, const py::array& a, const std::vector<py::array>& packed,
                                   const py::object& columns, const std::vector<py::object>& bias) {
        Int8RowsTogether p{};
        for (size_t i = 0; i < c.size(); ++i)
            p.each[i] = {f32(c[i]), nullptr,    f32(a),  data<uint8_t>(packed[i]), f32(columns), f32(bias[i]), nullptr,
                         rows(a),   last(c[i]), last(a), Activation::none};
        p.count = int64_t(c.size());
        launch(rows_kernels().matmul, p, &Int8RowsTogether::workspace, rows_kernels().workspace(rows(a), last(a)));
    });
}

}  // namespace fastlm
