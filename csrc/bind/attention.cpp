#include "kernels/attention/attention.h"

#include <algorithm>

#include "csrc/bind/bind.h"

FASTLM_KERNELS(AttentionKernels, attention)
FASTLM_KERNELS(AttentionDecodeKernels, attention_decode)
FASTLM_KERNELS(AttentionBackwardKernels, attention_backward)

namespace fastlm {
namespace {

int64_t stride(const py::array& a, int axis) { return a.strides(axis) / int64_t(a.itemsize()); }
// The stride of an axis that may be broadcast.
int64_t spread(const py::array& a, int axis) { return a.shape(axis) == 1 ? 0 : stride(a, axis); }

// From token to token of (B, T, H, D) that is evenly spaced; the stride of an axis of one is arbitrary.
int64_t token_stride(const py::array& a) {
    return a.shape(0) > 1 && a.shape(1) > 0 ? stride(a, 0) / int64_t(a.shape(1)) : stride(a, 1);
}

// q (R, H, D), k and v (R, G, .), `longest` tokens in the longest of the sequences.
AttentionInputs packed(const py::array& q, const py::array& k, const py::array& v, const py::array& offsets, int64_t longest,
                       int64_t window, double scale, bool causal) {
    AttentionInputs p{};
    p.q = f32(q), p.k = data<void>(k), p.v = data<void>(v), p.offsets = data<int32_t>(offsets);
    p.q_time = stride(q, 0), p.k_time = stride(k, 0), p.v_time = stride(v, 0);
    p.B = dim(offsets, 0) - 1, p.rows = dim(q, 0), p.T = p.S = longest;
    p.H = dim(q, 1), p.G = dim(k, 1), p.D = dim(q, 2), p.E = dim(v, 2);
    p.window = window, p.scale = scale, p.causal = causal;
    return p;
}

AttentionInputs inputs(const py::array& q, const py::array& k, const py::array& v, const py::object& bias,
                       const py::object& lengths, int64_t window, double scale, bool causal, const py::object& table) {
    AttentionInputs p{};
    p.q = f32(q), p.k = data<void>(k), p.v = data<void>(v), p.bias = f32(bias), p.lengths = data<int32_t>(lengths);
    p.q_batch = stride(q, 0), p.q_time = stride(q, 1);
    p.k_batch = stride(k, 0), p.k_time = stride(k, 1);
    p.v_batch = stride(v, 0), p.v_time = stride(v, 1);
    if (p.bias) {
        const auto a = py::reinterpret_borrow<py::array>(bias);
        p.bias_batch = spread(a, 0), p.bias_head = spread(a, 1), p.bias_time = stride(a, 2);
    }
    p.B = dim(q, 0), p.T = dim(q, 1), p.S = dim(k, 1), p.H = dim(q, 2), p.G = dim(k, 2), p.D = dim(q, 3);
    p.kind = k.itemsize() == 4 ? CacheKind::float32 : k.itemsize() == 2 ? CacheKind::bfloat16 : CacheKind::int8;
    p.E = dim(v, 3) - (p.kind == CacheKind::int8 ? 4 : 0);
    p.rows = p.B * p.T, p.window = window, p.scale = scale, p.causal = causal;
    if (!table.is_none()) {
        const auto a = py::reinterpret_borrow<py::array>(table);
        p.table = data<int32_t>(table), p.table_row = stride(a, 0), p.page = dim(k, 1), p.pages = dim(k, 0),
        p.S = dim(a, 1) * p.page;
    }
    return p;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void run_backward(AttentionBackward& p, int64_t units) {
    // Few (b, g) pairs: split the keys too. By the shapes alone, so that the bits do not depend on the threads.
    const AttentionInputs& in = p.in;
    constexpr int64_t kPieces = 32;
    const int64_t tiles = ceil_div(in.S, kAttentionKeys), few = units >= 8 ? 4 : 1;
    const int64_t wanted = ceil_div(kPieces, units > 0 ? units : 1);
    p.chunk = std::max(ceil_div(tiles, wanted), few) * kAttentionKeys;
    p.chunks = tiles ? ceil_div(in.S, p.chunk) : 1;
    const int64_t floats = p.chunks > 1 ? p.chunks * in.rows * in.H * in.D : 0;
    launch(attention_backward_kernels().backward, p, &AttentionBackward::partial, floats * int64_t(sizeof(float)));
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention_forward", [](const py::array& y, const py::object& stats, const py::array& q, const py::array& k,
                                  const py::array& v, const py::object& bias, const py::object& lengths, int64_t window,
                                  double scale, bool causal, const py::object& table) {
        const AttentionForward p{f32(y), f32(stats), nullptr, inputs(q, k, v, bias, lengths, window, scale, causal, table)};
        const AttentionInputs& in = p.in;
        const int64_t rows = in.T * (in.H / in.G);
        if (!p.stats && rows <= attention_decode_kernels().max_rows) {
            AttentionForward most = p;
            if (recording()) most.in.lengths = nullptr;  // the lengths of a recorded step grow up to S
            const int64_t floats = attention_decode_kernels().workspace(most);
            launch(attention_decode_kernels().forward, p, &AttentionForward::partial, floats * int64_t(sizeof(float)));
        } else {
            launch(attention_kernels().forward, p);
        }
    });
    m.def("attention_backward",
          [](const py::array& dq, const py::array& dk, const py::array& dv, const py::object& dbias, const py::array& dy,
             const py::array& y, const py::array& stats, const py::array& q, const py::array& k, const py::array& v,
             const py::object& bias, const py::object& lengths, int64_t window, double scale, bool causal) {
              AttentionBackward p{};
              p.dq = f32(dq), p.dk = f32(dk), p.dv = f32(dv), p.dbias = f32(dbias);
              p.dq_row = token_stride(dq), p.dk_row = token_stride(dk), p.dv_row = token_stride(dv);
              p.dy = f32(dy), p.y = f32(y), p.stats = f32(stats);
              p.in = inputs(q, k, v, bias, lengths, window, scale, causal, py::none());
              const AttentionInputs& in = p.in;
              int64_t units = in.B * in.G;
              if (p.dbias) {
                  const auto a = py::reinterpret_borrow<py::array>(dbias);
                  p.dbias_batch = spread(a, 0), p.dbias_head = spread(a, 1);
                  units = (p.dbias_batch ? in.B : 1) * (p.dbias_head ? in.G : 1);
              }
              run_backward(p, units);
          });
    m.def("attention_packed_forward",
          [](const py::array& y, const py::object& stats, const py::array& q, const py::array& k, const py::array& v,
             const py::array& offsets, int64_t longest, int64_t window, double scale, bool causal) {
              const AttentionForward p{f32(y), f32(stats), nullptr, packed(q, k, v, offsets, longest, window, scale, causal)};
              launch(attention_kernels().forward, p);
          });
    m.def("attention_packed_backward",
          [](const py::array& dq, const py::array& dk, const py::array& dv, const py::array& dy, const py::array& y,
             const py::array& stats, const py::array& q, const py::array& k, const py::array& v, const py::array& offsets,
             int64_t longest, int64_t window, double scale, bool causal) {
              AttentionBackward p{};
              p.dq = f32(dq), p.dk = f32(dk), p.dv = f32(dv), p.dy = f32(dy), p.y = f32(y), p.stats = f32(stats);
              p.dq_row = stride(dq, 0), p.dk_row = stride(dk, 0), p.dv_row = stride(dv, 0);
              p.in = packed(q, k, v, offsets, longest, window, scale, causal);
              run_backward(p, p.in.B * p.in.G);
          });
    m.attr("attention_keys") = kAttentionKeys;
    m.attr("attention_chunk") = kAttentionChunk;
}

}  // namespace fastlm
