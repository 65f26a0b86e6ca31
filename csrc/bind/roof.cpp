#include "kernels/roof/roof.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(RoofKernels, roof)

namespace fastlm {

void bind_roof(py::module_& m) {
    // Returns the operations done.
    m.def("roof_fma", [](const py::array& y, int64_t rounds) {
        const RoofFma p{f32(y), dim(y, 0), rounds};
        NoGil nogil;
        roof_kernels().fma(p);
        return p.pieces * p.rounds * roof_kernels().flops;
    });
    m.def("roof_read", [](const py::array& y, const py::array& x) {
        const RoofRead p{f32(y), f32(x), dim(x, 0)};
        NoGil nogil;
        roof_kernels().read(p);
    });
    m.def("roof_copy", [](const py::array& y, const py::array& x) {
        const RoofCopy p{f32(y), f32(x), dim(x, 0)};
        NoGil nogil;
        roof_kernels().copy(p);
    });
    m.attr("roof_piece") = kRoofPiece;
}

}  // namespace fastlm
