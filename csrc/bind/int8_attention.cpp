#include "kernels/int8_attention/int8_attention.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(Int8AttentionKernels, int8_attention)

namespace fastlm {

#if defined(__x86_64__)
namespace avx2_vnni {
extern const Int8AttentionKernels int8_attention_kernels;
}
namespace avx512_vnni {
extern const Int8AttentionKernels int8_attention_kernels;
}
#endif

namespace {

const Int8AttentionKernels& kernels() {
#if defined(__x86_64__)
    if (has_vnni()) return active_isa() == Isa::avx512 ? avx512_vnni::int8_attention_kernels : avx2_vnni::int8_attention_kernels;
#endif
    return int8_attention_kernels();
}

int64_t stride(const py::array& a, int axis) { return a.strides(axis) / int64_t(a.itemsize()); }

}  // namespace

void bind_int8_attention(py::module_& m) {
    m.attr("int8_attention_keys") = kInt8AttentionKeys;
    m.attr("int8_attention_depth") = kInt8AttentionDepth;
    // q, k, v (B, T or S, heads, .), or with offsets (R, heads, .), `longest` tokens in the longest sequence.
    m.def("int8_attention", [](const py::array& y, const py::array& q, const py::array& k, const py::array& v,
                               const py::object& lengths, const py::object& offsets, int64_t longest, double scale) {
        Int8Attention p{};
        p.y = f32(y), p.q = f32(q), p.k = f32(k), p.v = f32(v);
        p.lengths = data<int32_t>(lengths), p.offsets = data<int32_t>(offsets);
        const int time = offsets.is_none() ? 1 : 0;
        p.q_time = stride(q, time), p.k_time = stride(k, time), p.v_time = stride(v, time);
        p.H = dim(q, time + 1), p.G = dim(k, time + 1), p.D = dim(q, time + 2), p.E = dim(v, time + 2);
        if (time == 1) {
            p.q_batch = stride(q, 0), p.k_batch = stride(k, 0), p.v_batch = stride(v, 0);
            p.B = dim(q, 0), p.T = dim(q, 1), p.S = dim(k, 1);
        } else {
            p.B = last(py::reinterpret_borrow<py::array>(offsets)) - 1, p.T = p.S = longest;
        }
        p.scale = scale;
        launch(kernels().forward, p);
    });
}

}  // namespace fastlm
