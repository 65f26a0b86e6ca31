#include "kernels/dequantize/dequantize.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(DequantizeKernels, dequantize)

namespace fastlm {

void bind_dequantize(py::module_& m) {
    // w (R, C) float32; blocks (rows, bytes of a row) uint8; ids (R,) int32, int64 or None, checked to be in range.
    m.def("dequantize", [](const py::array& w, const py::array& blocks, const py::object& ids, int kind) {
        const bool narrow = !ids.is_none() && py::reinterpret_borrow<py::array>(ids).itemsize() == 4;
        const DequantizeForward p{f32(w),
                                  data<const uint8_t>(blocks),
                                  narrow ? nullptr : data<const int64_t>(ids),
                                  narrow ? data<const int32_t>(ids) : nullptr,
                                  rows(w),
                                  last(w),
                                  Quant(kind)};
        launch(dequantize_kernels().forward, p);
    });
    py::dict formats;  // name -> (ggml type id, weights in a block, bytes of a block)
    for (const auto& f : kQuantFormats) formats[f.name] = py::make_tuple(int(f.kind), f.values, f.bytes);
    m.attr("quant_formats") = formats;
}

}  // namespace fastlm
