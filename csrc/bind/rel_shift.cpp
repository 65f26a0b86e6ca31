#include "kernels/rel_shift/rel_shift.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(RelShiftKernels, rel_shift)

namespace fastlm {

void bind_rel_shift(py::module_& m) {
    m.def("rel_shift_forward",
          [](const py::array& out, const py::array& q, const py::array& u, const py::array& rt, int64_t positions,
             const py::array& starts, const py::object& segment, const py::object& query_segments, const py::object& key_segments,
             const py::object& mask, float scale) {
              const RelShiftForward p{f32(out),
                                      f32(q),
                                      f32(u),
                                      f32(rt),
                                      data<int32_t>(starts),
                                      f32(segment),
                                      f32(query_segments),
                                      f32(key_segments),
                                      f32(mask),
                                      dim(q, 0),
                                      dim(q, 1),
                                      dim(q, 2),
                                      dim(q, 3),
                                      dim(out, 3),
                                      positions,
                                      dim(rt, 2),
                                      scale};
              launch(rel_shift_kernels().forward, p);
          });
    m.def("rel_shift_backward", [](const py::array& dq, const py::object& dr, const py::object& dsegment, const py::array& dout,
                                   const py::array& q, const py::array& u, const py::array& r, const py::array& starts,
                                   const py::object& query_segments, const py::object& key_segments, float scale) {
        const RelShiftBackward p{f32(dq),
                                 f32(dr),
                                 f32(dsegment),
                                 f32(dout),
                                 f32(q),
                                 f32(u),
                                 f32(r),
                                 data<int32_t>(starts),
                                 f32(query_segments),
                                 f32(key_segments),
                                 dim(q, 0),
                                 dim(q, 1),
                                 dim(q, 2),
                                 dim(q, 3),
                                 dim(dout, 3),
                                 dim(r, 0),
                                 scale};
        launch(rel_shift_kernels().backward, p);
    });
}

}  // namespace fastlm
