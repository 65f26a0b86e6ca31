// Memory that a kernel works in for the length of one call, from the block cache.
#pragma once

#include "csrc/runtime/memory.h"

#include <cstdint>

namespace fastlm {

struct Workspace {
    size_t bytes;
    void* memory;
    explicit Workspace(int64_t n) : bytes(size_t(n)), memory(n ? cached_allocate(size_t(n)) : nullptr) {}
    ~Workspace() { cached_free(memory, bytes); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
};

}  // namespace fastlm
