// What every binding file uses: array pointers, the released GIL, and the kernel table of the active instruction set.
//
// Shapes and dtypes were checked in fastlm/ops; these calls are private and check only what costs nothing.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cassert>

#include "csrc/runtime/isa.h"

namespace py = pybind11;

namespace fastlm {

// The data pointer of an array; the null pointer for None.
template <class T> T* data(const py::object& array) {
    if (array.is_none()) return nullptr;
    assert(py::isinstance<py::array>(array));
    return reinterpret_cast<T*>(py::detail::array_proxy(array.ptr())->data);
}
inline float* f32(const py::object& array) { return data<float>(array); }
inline int64_t dim(const py::array& array, int axis) { return int64_t(array.shape(axis)); }
// Product of all axes but the last.
inline int64_t rows(const py::array& array) {
    int64_t n = 1;
    for (int i = 0; i + 1 < array.ndim(); ++i) n *= array.shape(i);
    return n;
}
inline int64_t last(const py::array& array) { return array.ndim() ? int64_t(array.shape(array.ndim() - 1)) : 1; }

using NoGil = py::gil_scoped_release;

}  // namespace fastlm

// FASTLM_KERNELS(LayerNormKernels, layer_norm) declares the tables that the per-instruction-set files define and the function
// layer_norm_kernels(), which returns the active one.
#if defined(__x86_64__)
#define FASTLM_EACH_TABLE(Type, name) \
    namespace scalar {                \
    extern const Type name##_kernels; \
    }                                 \
    namespace avx2 {                  \
    extern const Type name##_kernels; \
    }                                 \
    namespace avx512 {                \
    extern const Type name##_kernels; \
    }
#define FASTLM_TABLES(name) {&scalar::name##_kernels, &avx2::name##_kernels, &avx512::name##_kernels, nullptr}
#elif defined(__aarch64__)
#define FASTLM_EACH_TABLE(Type, name) \
    namespace scalar {                \
    extern const Type name##_kernels; \
    }                                 \
    namespace neon {                  \
    extern const Type name##_kernels; \
    }
#define FASTLM_TABLES(name) {&scalar::name##_kernels, nullptr, nullptr, &neon::name##_kernels}
#else
#define FASTLM_EACH_TABLE(Type, name) \
    namespace scalar {                \
    extern const Type name##_kernels; \
    }
#define FASTLM_TABLES(name) {&scalar::name##_kernels, nullptr, nullptr, nullptr}
#endif
#define FASTLM_KERNELS(Type, name)                                        \
    namespace fastlm {                                                    \
    FASTLM_EACH_TABLE(Type, name)                                         \
    static const Type& name##_kernels() {                                 \
        static const Type* const tables[kIsaCount] = FASTLM_TABLES(name); \
        return *tables[int(active_isa())];                                \
    }                                                                     \
    }
