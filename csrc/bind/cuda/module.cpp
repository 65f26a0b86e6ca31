// The extension module fastlm._cuda: the driver as Python sees it. It imports on every machine; `status` says what is there.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <memory>

#include "csrc/runtime/cuda/driver.h"

namespace py = pybind11;

namespace fastlm::cuda {
namespace {

using NoGil = py::gil_scoped_release;

// Device memory that goes back to the pool with its last owner, in the order of the stream that it came from.
struct Block {
    Pointer pointer;
    size_t bytes;
    Stream stream;
    Block(size_t bytes, uintptr_t stream) : pointer(allocate(bytes, Stream(stream))), bytes(bytes), stream(Stream(stream)) {}
    Block(const Block&) = delete;
    ~Block() { free(pointer, stream); }
};

struct Graph {
    CUgraphExec ready;
    explicit Graph(CUgraphExec ready) : ready(ready) {}
    Graph(const Graph&) = delete;
    ~Graph() { destroy_graph(ready); }
};

struct Event {
    CUevent event = create_event();
    Event() = default;
    Event(const Event&) = delete;
    ~Event() { destroy_event(event); }
};

// A loaded image; kernels keep it alive.
struct Module {
    std::string image;
    CUmodule module;
    explicit Module(std::string bytes) : image(std::move(bytes)), module(load_module(image.data())) {}
    Module(const Module&) = delete;
    ~Module() { unload_module(module); }
};

// One entry point, ready to be launched. signature: a letter for each argument: p pointer, i int32, l int64, f float32, t tensor
// map.
struct Kernel {
    std::shared_ptr<Module> module;
    Launch config;
    std::string signature;
};

std::shared_ptr<Kernel> make_kernel(std::shared_ptr<Module> module, const std::string& name, std::string signature, uint32_t block,
                                    uint32_t shared, uint32_t cluster, bool overlap) {
    if (signature.size() > 64)
        throw py::value_error("[cuda] " + name + " has " + std::to_string(signature.size()) +
                              " arguments, at most 64 are allowed.");
    for (const char c : signature)
        if (!std::strchr("pilft", c)) throw py::value_error("[cuda] signature must be made of p, i, l, f and t, got " + signature);
    auto kernel = std::make_shared<Kernel>();
    kernel->config.function = function(module->module, name.c_str(), int(shared));
    kernel->config.block = block, kernel->config.shared = shared, kernel->config.cluster = cluster,
    kernel->config.overlap = overlap;
    kernel->module = std::move(module);
    kernel->signature = std::move(signature);
    return kernel;
}

void call(const Kernel& kernel, const std::array<uint32_t, 3>& grid, uintptr_t stream, const py::args& args) {
    const size_t n = kernel.signature.size();
    if (args.size() != n)
        throw py::type_error("[cuda] the kernel takes " + std::to_string(n) + " arguments, got " + std::to_string(args.size()) +
                             ".");
    alignas(64) CUtensorMap maps[8];
    alignas(8) unsigned char values[64][8];
    void* pointers[64];
    size_t map = 0;
    for (size_t i = 0; i < n; ++i) {
        const py::handle a = args[i];
        pointers[i] = values[i];
        const auto put = [&](auto value) { std::memcpy(values[i], &value, sizeof value); };
        switch (kernel.signature[i]) {
            case 'p': put(a.cast<uint64_t>()); break;
            case 'i': put(a.cast<int32_t>()); break;
            case 'l': put(a.cast<int64_t>()); break;
            case 'f': put(a.cast<float>()); break;
            default:
                if (map == 8) throw py::type_error("[cuda] at most 8 tensor maps are allowed.");
                const auto bytes = a.cast<std::string>();
                if (bytes.size() != sizeof(CUtensorMap)) throw py::type_error("[cuda] a tensor map has 128 bytes.");
                std::memcpy(&maps[map], bytes.data(), sizeof(CUtensorMap));
                pointers[i] = &maps[map++];
        }
    }
    Launch config = kernel.config;
    for (int axis = 0; axis < 3; ++axis) config.grid[axis] = grid[size_t(axis)];
    if (!grid[0] || !grid[1] || !grid[2]) return;  // nothing to do; the driver refuses an empty grid
    NoGil nogil;
    launch(config, Stream(stream), pointers);
}

void* host(const py::array& a) { return const_cast<void*>(a.data()); }

void contiguous(const py::array& a) {
    if (!(a.flags() & py::array::c_style)) throw py::value_error("[cuda] the array must be C-contiguous.");
}

}  // namespace
}  // namespace fastlm::cuda

PYBIND11_MODULE(_cuda, m) {
    using namespace fastlm::cuda;
    py::register_exception<Error>(m, "CudaError", PyExc_RuntimeError);
    m.def("status", [] { return py::make_tuple(status().usable, status().why, status().driver_version); });
    m.def("properties", [] {
        const Properties p = properties();
        py::dict d;
        d["name"] = p.name, d["capability"] = py::make_tuple(p.major, p.minor), d["multiprocessors"] = p.multiprocessors;
        d["shared_memory"] = p.shared_memory, d["memory"] = p.memory;
        return d;
    });
    m.def("memory", [] {
        const Memory found = memory();
        return py::make_tuple(found.used, found.reserved);
    });
    py::class_<Block>(m, "Block")
        .def(py::init<size_t, uintptr_t>(), py::arg("bytes"), py::arg("stream") = 0)
        .def_property_readonly("pointer", [](const Block& b) { return uint64_t(b.pointer); })
        .def_readonly("bytes", &Block::bytes);
    m.def("copy_in", [](uint64_t to, const py::array& from, uintptr_t stream) {
        contiguous(from);
        const size_t bytes = size_t(from.nbytes());
        const void* source = host(from);
        NoGil nogil;
        copy_in(Pointer(to), source, bytes, Stream(stream));
    });
    m.def("copy_out", [](py::array& to, uint64_t from, uintptr_t stream) {
        contiguous(to);
        void* target = to.mutable_data();
        const size_t bytes = size_t(to.nbytes());
        NoGil nogil;
        copy_out(target, Pointer(from), bytes, Stream(stream));
    });
    m.def("copy", [](uint64_t to, uint64_t from, size_t bytes, uintptr_t stream) { copy(to, from, bytes, Stream(stream)); });
    m.def("copy_2d", [](uint64_t to, size_t to_pitch, uint64_t from, size_t from_pitch, size_t width, size_t rows,
                        uintptr_t stream) { copy_2d(to, to_pitch, from, from_pitch, width, rows, Stream(stream)); });
    m.def("fill", [](uint64_t p, uint8_t byte, size_t bytes, uintptr_t stream) { fill(p, byte, bytes, Stream(stream)); });
    m.def("create_stream", [] { return uintptr_t(create_stream()); });
    m.def("destroy_stream", [](uintptr_t stream) { destroy_stream(Stream(stream)); });
    m.def("synchronize", [](uintptr_t stream) { synchronize(Stream(stream)); }, py::call_guard<NoGil>());
    py::class_<Event>(m, "Event")
        .def(py::init<>())
        .def("record", [](const Event& e, uintptr_t stream) { record(e.event, Stream(stream)); })
        .def("wait", [](const Event& e, uintptr_t stream) { wait(Stream(stream), e.event); })
        .def("until", [](const Event& from, const Event& to) { return milliseconds(from.event, to.event); }, "milliseconds");
    m.def("begin_capture", [](uintptr_t stream) { begin_capture(Stream(stream)); });
    py::class_<Graph>(m, "Graph").def("launch", [](const Graph& g, uintptr_t stream) { launch_graph(g.ready, Stream(stream)); });
    m.def("end_capture", [](uintptr_t stream) { return std::make_unique<Graph>(end_capture(Stream(stream))); });
    py::class_<Module, std::shared_ptr<Module>>(m, "Module").def(py::init([](const py::bytes& image) {
        return std::make_shared<Module>(std::string(image));
    }));
    py::class_<Kernel, std::shared_ptr<Kernel>>(m, "Kernel")
        .def(py::init(&make_kernel), py::arg("module"), py::arg("name"), py::arg("signature"), py::arg("block"),
             py::arg("shared") = 0, py::arg("cluster") = 1, py::arg("overlap") = false)
        .def("__call__", &call);
    m.def("tensor_map",
          [](uint64_t p, uint64_t rows, uint64_t columns, uint64_t row_bytes, uint32_t box_rows, uint32_t box_columns) {
              const CUtensorMap map = tensor_map(p, rows, columns, row_bytes, box_rows, box_columns);
              return py::bytes(reinterpret_cast<const char*>(&map), sizeof map);
          });
}
