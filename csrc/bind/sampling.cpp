#include "kernels/sampling/sampling.h"

#include <vector>

#include "csrc/bind/bind.h"
#include "csrc/runtime/philox.h"

FASTLM_KERNELS(SamplingKernels, sampling)

namespace fastlm {
namespace {

// The first row that has a status instead of an index; -1: none.
int64_t first_negative(const int32_t* index, int64_t n, int64_t stride) {
    for (int64_t i = 0; i < n; ++i)
        if (index[i * stride] < 0) return i;
    return -1;
}

struct Uniforms {
    double* u;              // (B,)
    const uint64_t* seeds;  // (B,)
    const int64_t* steps;   // (B,)
    int64_t B;
};
void draw(const Uniforms& p) {
    for (int64_t b = 0; b < p.B; ++b) p.u[b] = philox_uniform(p.seeds[b], 0, uint64_t(p.steps[b]));
}

}  // namespace

void bind_sampling(py::module_& m) {
    // uniform (B,) float64, or None: then Philox(seed, row, step). A negative token is a kSample... status.
    m.def("sample", [](const py::array& token, const py::array& logits, const py::object& uniform, const py::object& previous,
                       const py::object& previous_begin, int64_t top_k, double top_p, float temperature, float min_p, float penalty,
                       uint64_t seed, uint64_t step) {
        const int64_t B = rows(logits), V = last(logits);
        const double* u = data<double>(uniform);
        std::vector<double> drawn;
        if (!u) {
            if (recording()) recording()->refuse("random numbers that the host draws: give seed and step as arrays");
            for (int64_t b = 0; b < B; ++b) drawn.push_back(philox_uniform(seed, uint64_t(b), step));
            u = drawn.data();
        }
        const Sample p{
            data<int32_t>(token), f32(logits), u,      data<int32_t>(previous), data<int64_t>(previous_begin), B, V, top_k, top_p,
            temperature,          min_p,       penalty};
        launch(sampling_kernels().sample, p);
        return first_negative(p.token, B, 1);
    });
    m.def("top_k", [](const py::array& values, const py::array& indices, const py::array& x) {
        const TopK p{f32(values), data<int32_t>(indices), f32(x), rows(x), last(x), last(values)};
        launch(sampling_kernels().top_k, p);
        return first_negative(p.indices, p.R, p.k);
    });
    m.def("argmax", [](const py::array& index, const py::array& x, bool token) {
        const Argmax p{data<int32_t>(index), f32(x), rows(x), last(x), token};
        launch(sampling_kernels().argmax, p);
        return first_negative(p.index, p.R, 1);
    });
    // u[b]: what row 0 draws from stream seeds[b] at step steps[b].
    m.def("philox_uniforms", [](const py::array& u, const py::array& seeds, const py::array& steps) {
        launch(&draw, {data<double>(u), data<uint64_t>(seeds), data<int64_t>(steps), int64_t(u.size())});
    });
    m.def("philox", [](const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
        const Philox r = philox({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
        return std::array<uint32_t, 4>{r.word[0], r.word[1], r.word[2], r.word[3]};
    });
    m.def("philox_uniform", &philox_uniform, py::arg("seed"), py::arg("row"), py::arg("step"));
}

}  // namespace fastlm
