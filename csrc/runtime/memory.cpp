#include "csrc/runtime/memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <vector>

namespace fastlm {
namespace {

constexpr size_t kMostCached = size_t(4) << 30;

struct Cache {
    std::mutex mutex;
    std::map<size_t, std::vector<void*>> free_blocks;
    size_t bytes = 0;
};
Cache& cache() {
    static Cache* c = new Cache;  // never destroyed: arrays may die after static destructors
    return *c;
}

// Eight sizes an octave: a block is at most one eighth larger than what was asked for.
size_t size_class(size_t bytes) {
    size_t step = 4096;
    while (step * 16 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

// Large blocks ask for huge pages: a product walks over more small ones than the TLB holds, and 512 page faults become one.
void* allocate(size_t size) {
    constexpr size_t huge = size_t(2) << 20;
    void* memory = std::aligned_alloc(size >= huge ? huge : 64, size);
#ifdef MADV_HUGEPAGE
    if (memory && size >= huge) madvise(memory, size / huge * huge, MADV_HUGEPAGE);
#endif
    return memory;
}

}  // namespace

void* cached_allocate(size_t bytes) {
    if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
    const size_t size = size_class(bytes ? bytes : 1);
    {
        Cache& c = cache();
        std::lock_guard<std::mutex> lock(c.mutex);
        auto it = c.free_blocks.find(size);
        if (it != c.free_blocks.end() && !it->second.empty()) {
            void* memory = it->second.back();
            it->second.pop_back();
            c.bytes -= size;
            return memory;
        }
    }
    void* memory = allocate(size);
    if (!memory) {
        release_cached();
        memory = allocate(size);
    }
    if (!memory) throw std::bad_alloc();
    return memory;
}

void cached_free(void* memory, size_t bytes) {
    if (!memory) return;
    const size_t size = size_class(bytes ? bytes : 1);
    Cache& c = cache();
    std::lock_guard<std::mutex> lock(c.mutex);
    if (c.bytes + size > kMostCached) {
        std::free(memory);
        return;
    }
    c.free_blocks[size].push_back(memory);
    c.bytes += size;
}

size_t cached_bytes() {
    Cache& c = cache();
    std::lock_guard<std::mutex> lock(c.mutex);
    return c.bytes;
}

void release_cached() {
    Cache& c = cache();
    std::lock_guard<std::mutex> lock(c.mutex);
    for (auto& entry : c.free_blocks)
        for (void* memory : entry.second) std::free(memory);
    c.free_blocks.clear();
    c.bytes = 0;
}

}  // namespace fastlm
