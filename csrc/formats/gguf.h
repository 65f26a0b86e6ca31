// The reader of GGUF files, versions 2 and 3, little-endian. It looks at bytes that it did not write: every count, length and
// offset is checked against what is left of the file before anything is read or allocated, and nothing is copied. Format: ggml's
// docs/gguf.md.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace fastlm {
namespace gguf {

enum class Type : uint32_t {  // of a metadata value
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12
};

// Hard limits. Real files stay far below: a vocabulary of 400 thousand tokens, a few thousand tensors, chat templates of 100 kB.
constexpr uint64_t kMaxKeys = 1 << 16, kMaxTensors = 1 << 18;
constexpr uint64_t kMaxKeyBytes = 1 << 16, kMaxNameBytes = 1 << 10, kMaxStringBytes = 1 << 24;
constexpr uint64_t kMaxElements = 1 << 24;  // of one array, or of all arrays within one value
constexpr int kMaxDepth = 4;                // arrays within arrays
constexpr uint32_t kMaxDims = 4;
constexpr uint64_t kMaxAlignment = 1 << 20;

// What the file did wrong, and at which byte.
struct Error : std::runtime_error {
    Error(uint64_t at, const std::string& what) : std::runtime_error(what), offset(at) {}
    uint64_t offset;
};

struct Value {
    std::string_view key;
    Type type;        // of the value; Array: see `Cursor`
    uint64_t offset;  // of its first byte, after the type
};

struct Tensor {
    std::string_view name;
    int ndim;
    int64_t shape[kMaxDims];  // row-major: the last axis is contiguous
    uint32_t type;            // ggml's id, one that `tensor_format` knows
    uint64_t offset, bytes;   // in the file
};

struct File {
    uint32_t version;
    uint64_t alignment, data_offset;
    std::vector<Value> values;
    std::vector<Tensor> tensors;
};

struct TensorFormat {
    uint32_t type;
    const char* name;
    uint32_t values, bytes;  // of a block; bytes 0: a type that exists but is not read
};
const TensorFormat* tensor_format(uint32_t type);  // null for a number that ggml does not define

// Bytes with a position. Every read is checked.
class Cursor {
  public:
    Cursor(const uint8_t* data, uint64_t size, uint64_t at = 0) : data_(data), size_(size), at_(at) {}
    uint64_t at() const { return at_; }
    uint64_t left() const { return size_ - at_; }
    template <class T> T number(const char* what);
    const uint8_t* bytes(uint64_t n, const char* what);  // the next n bytes
    std::string_view string(uint64_t limit, const char* what);
    Type type(const char* what);

    struct ArrayHead {
        Type type;
        uint64_t count;
    };
    // Type and count of an array; `budget` is what is left of kMaxElements, and is charged.
    ArrayHead array(uint64_t& budget);
    [[noreturn]] void fail(const std::string& what) const { throw Error(at_, what); }

  private:
    const uint8_t* data_;
    uint64_t size_, at_;
};

uint64_t type_bytes(Type type);  // of a number or a bool; 0 for String and Array

// Everything but the values' contents, which were walked and found whole. Throws Error; std::bad_alloc is out of reach.
File parse(const uint8_t* data, uint64_t size);

}  // namespace gguf
}  // namespace fastlm
