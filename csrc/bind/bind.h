// What every binding file uses: array pointers, `launch`, and the kernel table of the active instruction set.
//
// A binding fills a struct from arrays and ends in `launch(kernel, struct)`, so that a recorder sees it: see csrc/runtime/plan.h.
// Shapes and dtypes were checked in fastlm/ops; these calls are private and check only what costs nothing.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cassert>
#include <optional>
#include <stdexcept>
#include <vector>

#include "csrc/bind/workspace.h"
#include "csrc/runtime/isa.h"
#include "csrc/runtime/plan.h"

namespace py = pybind11;

namespace fastlm {

// Tells the recorder of an array whose memory a recorded struct points to: csrc/bind/plan.cpp.
void note(const py::object& array, const void* memory);

// The data pointer of an array; the null pointer for None.
template <class T> T* data(const py::object& array) {
    if (array.is_none()) return nullptr;
    assert(py::isinstance<py::array>(array));
    auto* memory = reinterpret_cast<T*>(py::detail::array_proxy(array.ptr())->data);
    if (recording()) note(array, memory);
    return memory;
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

// Runs a kernel without the GIL and, where this thread records, appends it and a copy of its arguments to the plan; a deferred plan
// will run it itself.
template <class Args> void launch(void (*kernel)(const Args&), const Args& args) {
    if (Plan* plan = recording()) {
        plan->add(kernel, args);
        if (plan->deferred) return;
    }
    const py::gil_scoped_release nogil;
    kernel(args);
}

// As above with `bytes` of memory to work in, whose address goes into the field `workspace`: the block cache's, or the plan's own.
template <class Args, class T> void launch(void (*kernel)(const Args&), Args args, T* Args::* workspace, int64_t bytes) {
    if (Plan* plan = recording()) {
        const std::shared_ptr<Arena> arena = plan->arena;
        args.*workspace = bytes > 0 ? static_cast<T*>(arena->allocate(size_t(bytes), std::is_floating_point_v<T>)) : nullptr;
        launch(kernel, args);
        if (bytes > 0) arena->release(args.*workspace);
        return;
    }
    const Workspace memory(bytes);
    args.*workspace = static_cast<T*>(memory.memory);
    launch(kernel, args);
}

// A list that a struct points to: itself, and where this thread records a copy that the plan keeps.
template <class T> const T* listed(const std::vector<T>& list) {
    Plan* plan = recording();
    return plan ? plan->keep(list) : list.data();
}

// For work whose arguments are not one plain struct, or that the host decides: releases the GIL, and a recording is refused. What
// it would read of a deferred plan is not there yet.
struct NoGil {
    NoGil() {
        if (Plan* plan = recording()) {
            plan->refuse("an operation of the host");
            if (plan->deferred) throw std::runtime_error("[plan] an operation of the host cannot be deferred");
        }
        nogil.emplace();
    }

  private:
    std::optional<py::gil_scoped_release> nogil;
};

// For what is prepared once and kept, such as a packed weight: it happens while a step is recorded, not when it is run again.
using Prepare = py::gil_scoped_release;

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
