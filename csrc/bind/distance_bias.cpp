#include "kernels/distance_bias/distance_bias.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(DistanceBiasKernels, distance_bias)

namespace fastlm {

void bind_distance_bias(py::module_& m) {
    // positions (T,) with B = 1, or (B, T).
    m.def("distance_bias_forward",
          [](const py::array& y, const py::array& buckets, const py::array& weight, const py::array& positions, int64_t center) {
              const bool wide = weight.itemsize() == 4;
              const DistanceBiasForward p{f32(y),
                                          data<int32_t>(buckets),
                                          wide ? f32(weight) : nullptr,
                                          wide ? nullptr : data<uint16_t>(weight),
                                          data<int32_t>(positions),
                                          dim(y, 0),
                                          dim(y, 1),
                                          dim(y, 2),
                                          dim(y, 3),
                                          last(buckets),
                                          dim(weight, 0),
                                          center};
              launch(distance_bias_kernels().forward, p);
          });
    m.def("distance_bias_backward",
          [](const py::array& dweight, const py::array& dy, const py::array& buckets, const py::array& positions, int64_t center) {
              const DistanceBiasBackward p{
                  f32(dweight), f32(dy),    data<int32_t>(buckets), data<int32_t>(positions), dim(dy, 0), dim(dy, 1),
                  dim(dy, 2),   dim(dy, 3), last(buckets),          dim(dweight, 0),          center};
              launch(distance_bias_kernels().backward, p);
          });
}

}  // namespace fastlm
