#include "kernels/cross_entropy/cross_entropy.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(CrossEntropyKernels, cross_entropy)

namespace fastlm {
namespace {

struct SumLosses {
    float* y;
    const float* loss;  // (n,)
    int64_t n;
    double scale;
};
void sum_losses(const SumLosses& p) {
    double sum = 0;
    for (int64_t i = 0; i < p.n; ++i) sum += double(p.loss[i]);
    *p.y = float(sum * p.scale);
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
    // How many targets count, and the index of the first that is neither in [0, V) nor ignore_index (-1 where all are good).
    m.def("cross_entropy_check", [](const py::array& targets, int64_t V, int64_t ignore_index) {
        const int64_t* t = data<int64_t>(targets);
        const int64_t n = int64_t(targets.size());
        int64_t count = 0, bad = -1;
        for (int64_t i = n - 1; i >= 0; --i) {
            if (t[i] == ignore_index) continue;
            ++count;
            if (t[i] < 0 || t[i] >= V) bad = i;
        }
        return py::make_tuple(count, bad);
    });
    m.def("cross_entropy_forward", [](const py::array& loss, const py::array& stats, const py::object& dlogits,
                                      const py::array& logits, const py::array& targets, int64_t ignore_index, float scale) {
        const CrossEntropyForward p{f32(loss),    f32(stats),   f32(dlogits), f32(logits), data<int64_t>(targets),
                                    rows(logits), last(logits), ignore_index, scale};
        launch(cross_entropy_kernels().forward, p);
    });
    m.def("cross_entropy_backward", [](const py::array& dlogits, const py::array& dy, const py::array& logits,
                                       const py::array& stats, const py::array& targets, int64_t ignore_index) {
        const CrossEntropyBackward p{f32(dlogits),           f32(dy),      f32(logits),  f32(stats),
                                     data<int64_t>(targets), rows(logits), last(logits), ignore_index};
        launch(cross_entropy_kernels().backward, p);
    });
    // y () = scale * the sum of the losses, which is taken in order in float64.
    m.def("cross_entropy_sum", [](const py::array& y, const py::array& loss, double scale) {
        launch(&sum_losses, {f32(y), f32(loss), int64_t(loss.size()), scale});
    });
    m.def("log_softmax", [](const py::array& y, const py::array& logits) {
        const LogSoftmax p{f32(y), f32(logits), rows(logits), last(logits)};
        launch(cross_entropy_kernels().log_softmax, p);
    });
    m.def("add", [](const py::array& y, const py::array& x, const py::array& z) {
        launch(cross_entropy_kernels().scale_add, {f32(y), f32(x), f32(z), int64_t(x.size()), 1.0f});
    });
    m.def("scale_add", [](const py::array& y, const py::array& x, float a, bool add) {
        const ScaleAdd p{f32(y), f32(x), add ? f32(y) : nullptr, int64_t(x.size()), a};
        launch(cross_entropy_kernels().scale_add, p);
    });
}

}  // namespace fastlm
