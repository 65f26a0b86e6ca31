// Recording: what a thread launches between Plan.begin and Plan.end can be run again by Plan.run, without Python.
#include "csrc/runtime/plan.h"

#include <stdexcept>

#include "csrc/bind/bind.h"

namespace fastlm {
namespace {

// The arrays outside the plan's own memory that recorded structs point to. Whoever records keeps them alive: fastlm/backend.py.
py::list*& noted() {
    thread_local py::list* arrays = nullptr;
    return arrays;
}

template <class T> struct Advance {
    T* y;
    const T* x;
    int64_t n, by;
};
template <class T> void advance(const Advance<T>& p) {
    for (int64_t i = 0; i < p.n; ++i) p.y[i] = T(p.x[i] + T(p.by));
}

struct Positions {
    int32_t* y;             // (n, time)
    const int32_t* starts;  // (n,)
    int64_t n, time;
};
void positions(const Positions& p) {
    for (int64_t i = 0; i < p.n; ++i)
        for (int64_t t = 0; t < p.time; ++t) p.y[i * p.time + t] = p.starts[i] + int32_t(t);
}

struct Widen {
    int64_t* y;
    const int32_t* x;
    int64_t n;
};
void widen(const Widen& p) {
    for (int64_t i = 0; i < p.n; ++i) p.y[i] = p.x[i];
}

struct Zero {
    void* y;
    int64_t bytes;
};
void zero(const Zero& p) { std::memset(p.y, 0, size_t(p.bytes)); }

struct PyPlan {
    Plan plan;
    py::list arrays;

    void begin(bool deferred) {
        if (recording()) throw std::runtime_error("[plan] this thread records already");
        plan.deferred = plan.arena->by_size = deferred;
        recording() = &plan, noted() = &arrays;
    }
    py::list end() {
        if (recording() == &plan) recording() = nullptr, noted() = nullptr;
        return std::exchange(arrays, py::list());
    }
    ~PyPlan() { end(); }
};

}  // namespace

void note(const py::object& array, const void* memory) {
    if (!recording()->arena->holds(memory)) noted()->append(array);
}

void bind_plan(py::module_& m) {
    m.def("advance", [](const py::array& y, const py::array& x, int64_t by) {
        const auto n = int64_t(x.size());
        if (x.itemsize() == 4) return launch(&advance<int32_t>, {data<int32_t>(y), data<int32_t>(x), n, by});
        launch(&advance<int64_t>, {data<int64_t>(y), data<int64_t>(x), n, by});
    });
    m.def("positions", [](const py::array& y, const py::array& starts) {
        launch(&positions, {data<int32_t>(y), data<int32_t>(starts), int64_t(starts.size()), last(y)});
    });
    m.def("widen",
          [](const py::array& y, const py::array& x) { launch(&widen, {data<int64_t>(y), data<int32_t>(x), int64_t(x.size())}); });
    m.def("zero", [](const py::array& y) { launch(&zero, {data<void>(y), int64_t(y.nbytes())}); });
    py::class_<PyPlan>(m, "Plan")
        .def(py::init<>())
        .def("begin", &PyPlan::begin, py::arg("deferred") = false)
        .def("end", &PyPlan::end)
        .def(
            "run", [](const PyPlan& p) { p.plan.run(); }, py::call_guard<py::gil_scoped_release>())
        .def("run_on",
             [](const PyPlan& p, const py::array& found, const py::array& ids, const py::array& ends, double seconds) {
                 auto *to = data<int32_t>(found), *from = data<int32_t>(ids), *last = data<int32_t>(ends);
                 const auto most = dim(found, 0), count = int64_t(ids.size()), n = int64_t(ends.size());
                 const py::gil_scoped_release nogil;
                 return p.plan.run_on(most, seconds, from, count, to, last, n);
             })
        .def("__len__", [](const PyPlan& p) { return p.plan.size(); })
        .def("names", [](const PyPlan& p) { return p.plan.names(); })
        .def(
            "time", [](const PyPlan& p, int rounds) { return p.plan.time(rounds); }, py::call_guard<py::gil_scoped_release>())
        .def("refuse", [](PyPlan& p, const std::string& reason) { p.plan.refuse(reason.c_str()); })
        .def_property_readonly("refused", [](const PyPlan& p) { return p.plan.refused; })
        .def_property_readonly("bytes", [](const PyPlan& p) { return p.plan.arena->bytes(); })
        .def("spoil", [](PyPlan& p) { p.plan.arena->spoil(); });
}

}  // namespace fastlm
