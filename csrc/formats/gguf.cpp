#include "csrc/formats/gguf.h"

#include <algorithm>
#include <cstring>

namespace fastlm {
namespace gguf {
namespace {

constexpr TensorFormat kFormats[] = {
    {0, "F32", 1, 4},       {1, "F16", 1, 2},        {2, "Q4_0", 32, 18},    {3, "Q4_1", 32, 20},   {6, "Q5_0", 32, 22},
    {7, "Q5_1", 32, 24},    {8, "Q8_0", 32, 34},     {9, "Q8_1", 32, 0},     {10, "Q2_K", 256, 0},  {11, "Q3_K", 256, 0},
    {12, "Q4_K", 256, 144}, {13, "Q5_K", 256, 176},  {14, "Q6_K", 256, 210}, {15, "Q8_K", 256, 0},  {16, "IQ2_XXS", 256, 0},
    {17, "IQ2_XS", 256, 0}, {18, "IQ3_XXS", 256, 0}, {19, "IQ1_S", 256, 0},  {20, "IQ4_NL", 32, 0}, {21, "IQ3_S", 256, 0},
    {22, "IQ2_S", 256, 0},  {23, "IQ4_XS", 256, 0},  {24, "I8", 1, 1},       {25, "I16", 1, 2},     {26, "I32", 1, 4},
    {27, "I64", 1, 8},      {28, "F64", 1, 8},       {29, "IQ1_M", 256, 0},  {30, "BF16", 1, 2},    {34, "TQ1_0", 256, 0},
    {35, "TQ2_0", 256, 0},  {39, "MXFP4", 32, 0},    {40, "NVFP4", 64, 0},   {41, "Q1_0", 128, 0},
};

std::string text(uint64_t n) { return std::to_string(n); }

// A name for a message: printable ASCII, at most 80 bytes of it.
std::string quoted(std::string_view s) {
    std::string out = "'";
    for (char c : s.substr(0, 80)) out += (c >= 32 && c < 127) ? c : '?';
    return out + (s.size() > 80 ? "...'" : "'");
}

bool utf8(std::string_view s) {
    const auto* p = reinterpret_cast<const uint8_t*>(s.data());
    const auto* end = p + s.size();
    while (p < end) {
        if (*p < 0x80) {
            ++p;
            continue;
        }
        const int extra = *p >= 0xF0 ? 3 : *p >= 0xE0 ? 2 : 1;
        if (*p < 0xC2 || *p > 0xF4 || end - p <= extra) return false;
        const uint8_t low = *p == 0xE0 ? 0xA0 : *p == 0xF0 ? 0x90 : 0x80, high = *p == 0xED ? 0x9F : *p == 0xF4 ? 0x8F : 0xBF;
        if (p[1] < low || p[1] > high) return false;
        for (int i = 2; i <= extra; ++i)
            if (p[i] < 0x80 || p[i] > 0xBF) return false;
        p += extra + 1;
    }
    return true;
}

// Walks an array and everything in it. Its bytes bound the work: an element takes at least one.
void walk_array(Cursor& c, uint64_t& budget, int depth) {
    if (depth > kMaxDepth) c.fail("arrays within arrays at most " + text(kMaxDepth) + " deep, got more");
    const Cursor::ArrayHead head = c.array(budget);
    if (head.type == Type::Array) {
        for (uint64_t i = 0; i < head.count; ++i) walk_array(c, budget, depth + 1);
    } else if (head.type == Type::String) {
        for (uint64_t i = 0; i < head.count; ++i) {
            const uint64_t at = c.at();
            if (!utf8(c.string(kMaxStringBytes, "a string"))) throw Error(at, "a string must be valid UTF-8");
        }
    } else {
        c.bytes(head.count * type_bytes(head.type), "an array");  // count <= kMaxElements: no overflow
    }
}

void walk_value(Cursor& c, Type type) {
    uint64_t budget = kMaxElements;
    if (type == Type::Array) {
        walk_array(c, budget, 1);
    } else if (type == Type::String) {
        const uint64_t at = c.at();
        if (!utf8(c.string(kMaxStringBytes, "a string"))) throw Error(at, "a string must be valid UTF-8");
    } else {
        c.bytes(type_bytes(type), "a value");
    }
}

// Sorted rather than hashed: no choice of names makes it slow.
template <class Item>
void refuse_duplicates(const std::vector<Item>& items, std::string_view Item::* name, const uint8_t* data, const char* what) {
    std::vector<std::string_view> names;
    names.reserve(items.size());
    for (const auto& item : items) names.push_back(item.*name);
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end())
        throw Error(uint64_t(reinterpret_cast<const uint8_t*>(twice->data()) - data),
                    std::string("each ") + what + " once, got " + quoted(*twice) + " twice");
}

Tensor read_tensor(Cursor& c) {
    Tensor t{};
    const uint64_t start = c.at();
    t.name = c.string(kMaxNameBytes, "a tensor's name");
    if (t.name.empty() || !utf8(t.name)) throw Error(start, "a tensor's name must be UTF-8 and not empty");
    const std::string who = "tensor " + quoted(t.name);
    const uint64_t dims_at = c.at();
    const auto ndim = c.number<uint32_t>("the number of axes");
    if (ndim > kMaxDims) throw Error(dims_at, who + " must have at most " + text(kMaxDims) + " axes, got " + text(ndim));
    t.ndim = int(ndim);
    uint64_t elements = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {  // ggml names the contiguous axis first
        const uint64_t at = c.at();
        const auto n = c.number<uint64_t>("an axis");
        if (n == 0 || n > uint64_t(INT64_MAX)) throw Error(at, who + " must have axes of 1 or more, got " + text(n));
        if (__builtin_mul_overflow(elements, n, &elements) || elements > uint64_t(INT64_MAX))
            throw Error(at, who + " has more elements than can be counted");
        t.shape[i] = int64_t(n);
    }
    const uint64_t type_at = c.at();
    t.type = c.number<uint32_t>("a tensor's type");
    const TensorFormat* f = tensor_format(t.type);
    if (!f) throw Error(type_at, who + " must have a type that ggml defines, got " + text(t.type));
    if (!f->bytes)
        throw Error(type_at, who + " is " + f->name + ", which is not read: requantise the model to Q4_K, Q5_K, Q6_K, Q8_0 or F16");
    const auto row = uint64_t(t.ndim ? t.shape[t.ndim - 1] : 1);
    if (row % f->values)
        throw Error(dims_at, who + ": a row must be a multiple of " + text(f->values) + " for " + f->name + ", got " + text(row));
    if (__builtin_mul_overflow(elements / f->values, uint64_t(f->bytes), &t.bytes))
        throw Error(dims_at, who + " has more bytes than can be counted");
    t.offset = c.number<uint64_t>("a tensor's offset");
    return t;
}

}  // namespace

const TensorFormat* tensor_format(uint32_t type) {
    for (const auto& f : kFormats)
        if (f.type == type) return &f;
    return nullptr;
}

uint64_t type_bytes(Type type) {
    switch (type) {
        case Type::U8:
        case Type::I8:
        case Type::Bool: return 1;
        case Type::U16:
        case Type::I16: return 2;
        case Type::U32:
        case Type::I32:
        case Type::F32: return 4;
        case Type::U64:
        case Type::I64:
        case Type::F64: return 8;
        case Type::String:
        case Type::Array: break;
    }
    return 0;
}

const uint8_t* Cursor::bytes(uint64_t n, const char* what) {
    if (n > left()) fail(std::string(what) + " of " + text(n) + " bytes does not fit: the file ends after " + text(left()));
    const uint8_t* p = data_ + at_;
    at_ += n;
    return p;
}

template <class T> T Cursor::number(const char* what) {
    T v;
    std::memcpy(&v, bytes(sizeof v, what), sizeof v);
    return v;
}
template uint32_t Cursor::number<uint32_t>(const char*);
template uint64_t Cursor::number<uint64_t>(const char*);

std::string_view Cursor::string(uint64_t limit, const char* what) {
    const uint64_t start = at_;
    const auto n = number<uint64_t>(what);
    if (n > limit) throw Error(start, std::string(what) + " must have at most " + text(limit) + " bytes, got " + text(n));
    return {reinterpret_cast<const char*>(bytes(n, what)), size_t(n)};
}

Type Cursor::type(const char* what) {
    const uint64_t start = at_;
    const auto v = number<uint32_t>(what);
    if (v > uint32_t(Type::F64)) throw Error(start, std::string(what) + " must be from 0 to 12, got " + text(v));
    return Type(v);
}

Cursor::ArrayHead Cursor::array(uint64_t& budget) {
    const Type t = type("an array's type");
    const uint64_t start = at_;
    const auto count = number<uint64_t>("an array's length");
    if (count > budget)
        throw Error(start, "a value must have at most " + text(kMaxElements) + " elements, got more: " + text(count));
    const uint64_t smallest = t == Type::String ? 8 : t == Type::Array ? 12 : type_bytes(t);
    if (count > left() / smallest)
        throw Error(start, "an array of " + text(count) + " elements does not fit: the file ends after " + text(left()) + " bytes");
    budget -= count;
    return {t, count};
}

File parse(const uint8_t* data, uint64_t size) {
    File file{};
    Cursor c(data, size);
    if (std::memcmp(c.bytes(4, "the magic number"), "GGUF", 4) != 0) throw Error(0, "a GGUF file must start with 'GGUF'");
    file.version = c.number<uint32_t>("the version");
    if (file.version != 2 && file.version != 3) {
        const bool big = file.version != 0 && (file.version & 0xFFFF) == 0;
        throw Error(4, big ? "the file is big-endian, which is not read" : "the version must be 2 or 3, got " + text(file.version));
    }
    const auto tensors = c.number<uint64_t>("the number of tensors");
    const auto values = c.number<uint64_t>("the number of keys");
    if (tensors > kMaxTensors || tensors > c.left() / 24)
        throw Error(8, text(tensors) + " tensors do not fit: the limit is " + text(std::min(kMaxTensors, c.left() / 24)));
    if (values > kMaxKeys || values > c.left() / 13)
        throw Error(16, text(values) + " keys do not fit: the limit is " + text(std::min(kMaxKeys, c.left() / 13)));

    file.alignment = 32;
    for (uint64_t i = 0; i < values; ++i) {
        Value v{};
        const uint64_t start = c.at();
        v.key = c.string(kMaxKeyBytes, "a key");
        if (v.key.empty() || !utf8(v.key)) throw Error(start, "a key must be UTF-8 and not empty");
        v.type = c.type("a value's type");
        v.offset = c.at();
        if (v.key == "general.alignment") {
            if (v.type != Type::U32) throw Error(v.offset - 4, "general.alignment must be a 32-bit unsigned number");
            Cursor peek = c;
            file.alignment = peek.number<uint32_t>("general.alignment");
            // A multiple of 8 (gguf.md), so that every tensor is aligned for its type.
            if (file.alignment < 8 || file.alignment > kMaxAlignment || (file.alignment & (file.alignment - 1)))
                throw Error(v.offset, "general.alignment must be a power of two from 8 to " + text(kMaxAlignment) + ", got " +
                                          text(file.alignment));
        }
        walk_value(c, v.type);
        file.values.push_back(v);
    }
    refuse_duplicates(file.values, &Value::key, data, "key");

    std::vector<uint64_t> starts;  // of the tensors' records, for messages
    for (uint64_t i = 0; i < tensors; ++i) {
        starts.push_back(c.at());
        file.tensors.push_back(read_tensor(c));
    }
    refuse_duplicates(file.tensors, &Tensor::name, data, "tensor");

    const uint64_t padding = (file.alignment - c.at() % file.alignment) % file.alignment;
    if (tensors && padding > c.left()) c.fail("the tensors' data is missing: the file ends here");
    file.data_offset = c.at() + std::min(padding, c.left());
    const uint64_t room = size - file.data_offset;
    for (size_t i = 0; i < file.tensors.size(); ++i) {
        Tensor& t = file.tensors[i];
        if (t.offset % file.alignment)
            throw Error(starts[i], "tensor " + quoted(t.name) + " must start at a multiple of " + text(file.alignment) + ", got " +
                                       text(t.offset));
        if (t.offset > room || t.bytes > room - t.offset)
            throw Error(starts[i], "tensor " + quoted(t.name) + " takes " + text(t.bytes) + " bytes at " + text(t.offset) +
                                       " of the data, which has " + text(room) + ": the file is truncated or corrupt");
        t.offset += file.data_offset;
    }
    return file;
}

}  // namespace gguf
}  // namespace fastlm
