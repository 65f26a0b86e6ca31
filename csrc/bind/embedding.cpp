#include "kernels/embedding/embedding.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(EmbeddingKernels, embedding)

namespace fastlm {
namespace {

EmbeddingIds embedding_ids(const py::array& ids) {
    const bool narrow = ids.itemsize() == 4;
    return {narrow ? data<int32_t>(ids) : nullptr, narrow ? nullptr : data<int64_t>(ids), int64_t(ids.size())};
}

}  // namespace

void bind_embedding(py::module_& m) {
    m.def("embedding_first_outside",
          [](const py::array& ids, int64_t V) { return embedding_kernels().first_outside(embedding_ids(ids), V); });
    m.def("embedding_forward", [](const py::array& y, const py::array& ids, const py::array& weight) {
        const bool wide = weight.itemsize() == 4;
        const EmbeddingForward p{f32(y), embedding_ids(ids), wide ? f32(weight) : nullptr, wide ? nullptr : data<uint16_t>(weight),
                                 last(weight)};
        launch(embedding_kernels().forward, p);
    });
    m.def("embedding_backward", [](const py::array& dweight, const py::array& ids, const py::array& dy) {
        const EmbeddingBackward p{f32(dweight), embedding_ids(ids), f32(dy), last(dweight)};
        launch(embedding_kernels().backward, p);
    });
}

}  // namespace fastlm
