#include "kernels/adamw/adamw.h"

#include <cmath>
#include <vector>

#include "csrc/bind/bind.h"

FASTLM_KERNELS(AdamWKernels, adamw)

namespace fastlm {
namespace {

void cut(std::vector<TensorPiece>& pieces, int64_t tensor, int64_t n) {
    for (int64_t begin = 0; begin < n; begin += kAdamWPiece)
        pieces.push_back({tensor, begin, begin + kAdamWPiece < n ? begin + kAdamWPiece : n});
}

// Whether x is a C-contiguous float32 array of the shape of `like`.
bool plain(const py::handle& x, const py::handle& like, bool writeable) {
    if (!py::isinstance<py::array_t<float>>(x) || !py::isinstance<py::array>(like)) return false;
    const auto a = py::reinterpret_borrow<py::array>(x), b = py::reinterpret_borrow<py::array>(like);
    if (!(a.flags() & py::array::c_style) || (writeable && !a.writeable()) || a.ndim() != b.ndim()) return false;
    for (int i = 0; i < int(a.ndim()); ++i)
        if (a.shape(i) != b.shape(i)) return false;
    return true;
}

}  // namespace

void bind_adamw(py::module_& m) {
    // Whether nothing stands in the way of a step: equally long lists of plain arrays. Where false, Python says what does.
    m.def("adamw_ready", [](const py::list& parameters, const py::list& gradients, const py::list& ms, const py::list& vs) {
        const size_t n = parameters.size();
        if (gradients.size() != n || ms.size() != n || vs.size() != n) return false;
        for (size_t i = 0; i < n; ++i) {
            const py::handle p = parameters[i];
            if (!plain(p, p, true) || !plain(gradients[i], p, false) || !plain(ms[i], p, true) || !plain(vs[i], p, true))
                return false;
        }
        return true;
    });
    // Lists of arrays; step >= 1 counts from 1. Every scalar is computed in float64 and rounded once.
    m.def("adamw_step", [](const py::list& parameters, const py::list& gradients, const py::list& ms, const py::list& vs,
                           const std::vector<double>& weight_decays, int64_t step, double lr, double beta1, double beta2,
                           double eps, double scale) {
        std::vector<AdamWTensor> tensors;
        std::vector<TensorPiece> pieces;
        for (size_t i = 0; i < parameters.size(); ++i) {
            const auto n = int64_t(py::reinterpret_borrow<py::array>(parameters[i]).size());
            tensors.push_back({f32(parameters[i]), f32(ms[i]), f32(vs[i]), f32(gradients[i]), n, float(1 - lr * weight_decays[i])});
            cut(pieces, int64_t(i), n);
        }
        const AdamWStep p{tensors.data(),
                          pieces.data(),
                          int64_t(pieces.size()),
                          float(beta1),
                          float(beta2),
                          float(1 - beta1),
                          float(1 - beta2),
                          float(lr / (1 - std::pow(beta1, double(step)))),
                          float(std::sqrt(1 - std::pow(beta2, double(step)))),
                          float(eps),
                          float(scale)};
        NoGil nogil;
        adamw_kernels().step(p);
    });
    // Sum of squares over a list of float32 arrays: per piece, then in piece order.
    m.def("square_sum", [](const py::list& arrays) {
        std::vector<const float*> pointers;
        std::vector<TensorPiece> pieces;
        for (size_t i = 0; i < arrays.size(); ++i) {
            pointers.push_back(f32(arrays[i]));
            cut(pieces, int64_t(i), int64_t(py::reinterpret_borrow<py::array>(arrays[i]).size()));
        }
        std::vector<double> partial(pieces.size());
        const SquareSum p{partial.data(), pointers.data(), pieces.data(), int64_t(pieces.size())};
        NoGil nogil;
        adamw_kernels().square_sum(p);
        double sum = 0;
        for (double x : partial) sum += x;
        return sum;
    });
}

}  // namespace fastlm
