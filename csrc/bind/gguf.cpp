// _C.gguf_parse: a file's bytes to (version, metadata, tensors). The parser found every value whole before one object is made.
#include "csrc/formats/gguf.h"

#include "csrc/bind/bind.h"

namespace fastlm {
namespace {

using gguf::Cursor;
using gguf::Type;

py::object text(std::string_view s) {
    PyObject* o = PyUnicode_DecodeUTF8(s.data(), Py_ssize_t(s.size()), "strict");
    if (!o) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(o);
}

py::dtype dtype_of(Type type) {
    switch (type) {
        case Type::U8: return py::dtype::of<uint8_t>();
        case Type::I8: return py::dtype::of<int8_t>();
        case Type::U16: return py::dtype::of<uint16_t>();
        case Type::I16: return py::dtype::of<int16_t>();
        case Type::U32: return py::dtype::of<uint32_t>();
        case Type::I32: return py::dtype::of<int32_t>();
        case Type::F32: return py::dtype::of<float>();
        case Type::U64: return py::dtype::of<uint64_t>();
        case Type::I64: return py::dtype::of<int64_t>();
        case Type::F64: return py::dtype::of<double>();
        default: return py::dtype::of<bool>();
    }
}

// Numbers become a NumPy array, strings and arrays a list.
py::object array(Cursor& c, uint64_t& budget) {
    const Cursor::ArrayHead head = c.array(budget);
    if (head.type == Type::String || head.type == Type::Array) {
        py::list items(head.count);
        for (uint64_t i = 0; i < head.count; ++i) {
            py::object item = head.type == Type::String ? text(c.string(gguf::kMaxStringBytes, "a string")) : array(c, budget);
            PyList_SET_ITEM(items.ptr(), Py_ssize_t(i), item.release().ptr());
        }
        return std::move(items);
    }
    const uint64_t bytes = head.count * gguf::type_bytes(head.type);
    const uint8_t* from = c.bytes(bytes, "an array");
    py::array a(dtype_of(head.type), std::vector<py::ssize_t>{py::ssize_t(head.count)});
    auto* to = static_cast<uint8_t*>(a.mutable_data());
    if (bytes) std::memcpy(to, from, bytes);
    if (head.type == Type::Bool)
        for (uint64_t i = 0; i < bytes; ++i) to[i] = to[i] != 0;  // a bool that is neither 0 nor 1 would be undefined
    return std::move(a);
}

template <class T> T scalar(Cursor& c) {
    T v;
    std::memcpy(&v, c.bytes(sizeof v, "a value"), sizeof v);
    return v;
}

py::object value(Cursor& c, Type type) {
    uint64_t budget = gguf::kMaxElements;
    switch (type) {
        case Type::U8: return py::int_(scalar<uint8_t>(c));
        case Type::I8: return py::int_(scalar<int8_t>(c));
        case Type::U16: return py::int_(scalar<uint16_t>(c));
        case Type::I16: return py::int_(scalar<int16_t>(c));
        case Type::U32: return py::int_(scalar<uint32_t>(c));
        case Type::I32: return py::int_(scalar<int32_t>(c));
        case Type::F32: return py::float_(scalar<float>(c));
        case Type::U64: return py::int_(scalar<uint64_t>(c));
        case Type::I64: return py::int_(scalar<int64_t>(c));
        case Type::F64: return py::float_(scalar<double>(c));
        case Type::Bool: return py::bool_(scalar<uint8_t>(c) != 0);
        case Type::String: return text(c.string(gguf::kMaxStringBytes, "a string"));
        case Type::Array: return array(c, budget);
    }
    return py::none();
}

// -> (version, {key: value}, [(name, kind, shape, offset in the file, bytes)])
py::tuple parse(const py::buffer& buffer) {
    const py::buffer_info info = buffer.request();
    const auto* data = static_cast<const uint8_t*>(info.ptr);
    const auto size = uint64_t(info.size) * uint64_t(info.itemsize);
    const gguf::File file = gguf::parse(data, size);
    py::dict metadata;
    for (const auto& v : file.values) {
        Cursor c(data, size, v.offset);
        metadata[text(v.key)] = value(c, v.type);
    }
    py::list tensors;
    for (const auto& t : file.tensors) {
        py::tuple shape(t.ndim);
        for (int i = 0; i < t.ndim; ++i) shape[size_t(i)] = t.shape[i];
        tensors.append(py::make_tuple(text(t.name), gguf::tensor_format(t.type)->name, shape, t.offset, t.bytes));
    }
    return py::make_tuple(file.version, metadata, tensors);
}

}  // namespace

void bind_gguf(py::module_& m) {
    // Its arguments are (message, byte): the caller knows the file's name.
    static PyObject* error = nullptr;
    if (!error) {
        error = PyErr_NewException("fastlm._C.ParseError", PyExc_ValueError, nullptr);
        if (!error) throw py::error_already_set();
    }
    m.attr("ParseError") = py::reinterpret_borrow<py::object>(error);
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const gguf::Error& e) { PyErr_SetObject(error, py::make_tuple(e.what(), e.offset).ptr()); }
    });
    m.def("gguf_parse", &parse, py::arg("buffer"));
}

}  // namespace fastlm
