#include "kernels/matmul/matmul.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(MatmulKernels, matmul)

namespace fastlm {

void bind_matmul(py::module_& m) {
    // c (batch, M, N); a_step and b_step are 0 where a matrix is shared by the batch. a may be some columns of a wider matrix.
    m.def("matmul", [](const py::array& c, const py::object& z, const py::array& a, const py::array& b, const py::object& bias,
                       const py::object& residual, int64_t batch, int64_t M, int64_t N, int64_t K, int64_t a_step, int64_t b_step,
                       bool a_transposed, bool b_transposed, int b_type, bool accumulate, int activation) {
        Matmul p{f32(c), f32(z), nullptr, f32(a), data<void>(b), f32(bias),    f32(residual),   batch,      M,
                 N,      K,      a_step,  b_step, a_transposed,  b_transposed, Storage(b_type), accumulate, Activation(activation)};
        if (a.ndim() == 2 && a.strides(0) > a.shape(1) * py::ssize_t(sizeof(float)))
            p.a_row = a.strides(0) / int64_t(sizeof(float));
        launch(matmul_kernels().matmul, p, &Matmul::workspace, matmul_kernels().workspace(p));
    });
    // c[i] = a b[i]^T + bias[i]; at most as many as kTogether.
    m.def("matmuls", [](const std::vector<py::array>& c, const py::array& a, const std::vector<py::array>& b,
                        const std::vector<py::object>& bias, int b_type) {
        Matmuls p{};
        for (size_t i = 0; i < c.size(); ++i)
            p.each[i] = {f32(c[i]),
                         nullptr,
                         nullptr,
                         f32(a),
                         data<void>(b[i]),
                         f32(bias[i]),
                         nullptr,
                         1,
                         rows(a),
                         last(c[i]),
                         last(a),
                         0,
                         0,
                         false,
                         true,
                         Storage(b_type),
                         false,
                         Activation::none};
        p.count = int64_t(c.size());
        launch(matmul_kernels().matmuls, p, &Matmuls::workspace, matmul_kernels().workspace(p.each[0]));
    });
    m.attr("together") = kTogether;
    m.def("linear_backward", [](const py::object& dz, const py::object& dbias, const py::object& partial, const py::array& dy,
                                const py::object& z, int activation) {
        const LinearBackward p{f32(dz), f32(dbias), f32(partial), f32(dy), f32(z), rows(dy), last(dy), Activation(activation)};
        launch(matmul_kernels().linear_backward, p);
    });
    m.def("linear_activation", [](const py::array& y, const py::array& z, int activation) {
        launch(matmul_kernels().activate, {f32(y), f32(z), int64_t(z.size()), Activation(activation)});
    });
    // ys[i] (K, N) = the weights of groups[i] (N_j, K), transposed, side by side: what a recorded step reads, itself no part of it.
    m.def("turn", [](const std::vector<py::array>& ys, const std::vector<std::vector<py::array>>& groups) {
        std::vector<Turn> turns;
        for (size_t i = 0; i < ys.size(); ++i) {
            float* y = f32(ys[i]);
            for (const py::array& w : groups[i]) {
                turns.push_back({y, f32(w), dim(w, 0), dim(w, 1), last(ys[i])});
                y += dim(w, 0);
            }
        }
        const Prepare nogil;
        for (const Turn& t : turns) matmul_kernels().turn(t);
    });
    m.attr("linear_rows") = kLinearRows;
}

}  // namespace fastlm
