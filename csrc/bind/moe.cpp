#include "kernels/moe/moe.h"

#include <vector>

#include "csrc/bind/bind.h"
#include "csrc/runtime/parallel.h"
#include "kernels/matmul/matmul.h"

FASTLM_KERNELS(MoeKernels, moe)
FASTLM_KERNELS(MatmulKernels, matmul)

namespace fastlm {

// Products below this are dealt to the threads whole; larger ones are cut between the threads, one after the other.
constexpr int64_t kWhole = 1 << 26;

static void multiply(Matmul p) {
    const MatmulKernels& kernels = matmul_kernels();
    Workspace workspace(kernels.workspace(p));
    p.workspace = static_cast<float*>(workspace.memory);
    kernels.matmul(p);
}

void bind_moe(py::module_& m) {
    m.def("moe_route", [](const py::array& probabilities, const py::array& experts, const py::array& logits) {
        const MoeRoute p{f32(probabilities), data<int32_t>(experts), f32(logits), rows(logits), last(logits), last(experts)};
        launch(moe_kernels().route, p);
    });
    m.def("moe_gather", [](const py::array& y, const py::array& x, const py::array& indices) {
        const MoeGather p{f32(y), f32(x), data<int32_t>(indices), rows(y), last(y)};
        launch(moe_kernels().gather, p);
    });
    m.def("moe_combine", [](const py::array& out, const py::array& y, const py::array& slots, const py::object& weights,
                            const py::object& residual) {
        const MoeCombine p{f32(out), f32(y), data<int32_t>(slots), f32(weights), f32(residual), rows(out), last(out), last(slots)};
        launch(moe_kernels().combine, p);
    });
    m.def("moe_combine_backward", [](const py::array& dy, const py::array& dweights, const py::array& dout, const py::array& y,
                                     const py::array& slots, const py::array& weights) {
        const MoeCombineBackward p{f32(dy),      f32(dweights), f32(dout),  f32(y),     data<int32_t>(slots),
                                   f32(weights), rows(dout),    last(dout), last(slots)};
        launch(moe_kernels().combine_backward, p);
    });
    // One product a group: c[i] (M_i, N_i) = or += a[i] b[i]. Each has the bits that matmul gives it alone.
    m.def("grouped_matmul",
          [](const std::vector<py::array>& c, const py::object& z, const std::vector<py::array>& a, const std::vector<py::array>& b,
             bool a_transposed, bool b_transposed, const std::vector<int>& types, bool accumulate, int activation) {
              std::vector<Matmul> jobs;
              int64_t work = 0;
              for (size_t i = 0; i < c.size(); ++i) {
                  const int64_t M = dim(c[i], 0), N = dim(c[i], 1), K = dim(a[i], a_transposed ? 0 : 1);
                  if (M == 0 || N == 0) continue;
                  float* kept = z.is_none() ? nullptr : f32(py::list(z)[i]);
                  jobs.push_back({f32(c[i]), kept, nullptr, f32(a[i]), data<void>(b[i]), nullptr, nullptr, 1, M, N, K, 0, 0,
                                  a_transposed, b_transposed, Storage(types[i]), accumulate, Activation(activation)});
                  work += M * N * K;
              }
              NoGil nogil;
              const int64_t n = int64_t(jobs.size());
              if (n < 2 * num_threads() || work / n >= kWhole) {
                  for (const Matmul& job : jobs) multiply(job);
                  return;
              }
              parallel_for(n, 1, [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) multiply(jobs[size_t(i)]);
              });
          });
}

}  // namespace fastlm
