#include "kernels/cache_append/cache_append.h"

#include "csrc/bind/bind.h"

FASTLM_KERNELS(CacheAppendKernels, cache_append)

namespace fastlm {

void bind_cache_append(py::module_& m) {
    m.def("cache_append", [](const py::array& keys, const py::array& values, const py::array& k, const py::array& v,
                             const py::array& positions, int kind, const py::object& table) {
        CacheAppend p{};
        p.keys = data<void>(keys), p.values = data<void>(values);
        p.k = f32(k), p.v = f32(v), p.positions = data<int32_t>(positions);
        const int64_t size = int64_t(keys.itemsize()), f = sizeof(float);
        p.keys_batch = keys.strides(0) / size, p.keys_time = keys.strides(1) / size;
        p.values_batch = values.strides(0) / size, p.values_time = values.strides(1) / size;
        p.k_batch = k.strides(0) / f, p.k_time = k.strides(1) / f, p.v_batch = v.strides(0) / f, p.v_time = v.strides(1) / f;
        p.B = dim(k, 0), p.T = dim(k, 1), p.capacity = dim(keys, 1), p.G = dim(k, 2), p.D = dim(k, 3), p.E = dim(v, 3);
        if (!table.is_none()) {
            const auto a = py::reinterpret_borrow<py::array>(table);
            p.table = data<int32_t>(table), p.table_row = a.strides(0) / int64_t(sizeof(int32_t));
            p.page = dim(keys, 1), p.pages = dim(keys, 0), p.capacity = dim(a, 1) * p.page;
        }
        p.kind = CacheKind(kind), p.starts = positions.ndim() == 1;
        launch(cache_append_kernels().forward, p);
    });
}

}  // namespace fastlm
