#include "csrc/runtime/memory.h"

#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <utility>

namespace fastlm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kPage = 4096, kHuge = size_t(2) << 20;
constexpr size_t kMapping = size_t(64) << 20;  // the first mapping: address space, not memory
constexpr size_t kStagger = 320;  // five cache lines between blocks, else arrays of one size would compete for the same cache sets
constexpr auto kIdle = std::chrono::seconds(10);

struct Hole {
    size_t size, used;  // used: bytes at its beginning, about, that were written to once and still have pages
};

class Heap {
  public:
    char* take(size_t size) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto found = by_size_.lower_bound({size, nullptr});
        if (found == by_size_.end()) {
            if (!map(size)) {
                release(held_);
                if (!map(size)) return nullptr;
            }
            found = by_size_.lower_bound({size, nullptr});
        }
        char* at = found->second;
        const Hole hole = holes_.at(at);
        erase(at, hole.size);
        const size_t used = hole.used < size ? hole.used : size;
        held_ -= used;
        if (hole.size > size) insert(at + size, {hole.size - size, hole.used - used});
        live_ += size;
        if (live_ > peak_) peak_ = live_;
        if (held_ < least_held_) least_held_ = held_;
        return at;
    }

    void give(char* at, size_t size) {
        std::lock_guard<std::mutex> lock(mutex_);
        live_ -= size;
        held_ += size;
        Hole hole{size, size};
        auto next = holes_.lower_bound(at);
        if (next != holes_.end() && next->first == at + size) {
            hole.size += next->second.size, hole.used += next->second.used;
            by_size_.erase({next->second.size, next->first});
            next = holes_.erase(next);
        }
        if (next != holes_.begin()) {
            const auto before = std::prev(next);
            if (before->first + before->second.size == at) {
                at = before->first;
                hole.size += before->second.size, hole.used += before->second.used;
                erase(at, before->second.size);
            }
        }
        insert(at, hole);
        const auto now = Clock::now();
        if (now - since_ > kIdle) {  // what lay idle all this time is not needed
            release(least_held_);
            since_ = now, least_held_ = held_;
        }
    }

    size_t held() { return locked(held_); }
    size_t live() { return locked(live_); }
    size_t peak() { return locked(peak_); }
    void reset_peak() {
        std::lock_guard<std::mutex> lock(mutex_);
        peak_ = live_;
    }
    void release_all() {
        std::lock_guard<std::mutex> lock(mutex_);
        release(held_);
    }

  private:
    size_t locked(const size_t& value) {
        std::lock_guard<std::mutex> lock(mutex_);
        return value;
    }

    void insert(char* at, Hole hole) {
        holes_.emplace(at, hole);
        by_size_.emplace(hole.size, at);
    }
    void erase(char* at, size_t size) {
        holes_.erase(at);
        by_size_.erase({size, at});
    }

    // A new hole of at least `size`, joined to the one behind it: the system puts mappings next to one another where it can.
    bool map(size_t size) {
        const size_t least = mapped_ > kMapping ? mapped_ : kMapping;  // doubling: few mappings, whose ends do not go to waste
        if (map_exactly(size > least ? (size + kHuge - 1) / kHuge * kHuge : least)) return true;
        return least > size && map_exactly((size + kHuge - 1) / kHuge * kHuge);
    }

    bool map_exactly(size_t size) {
        void* found = mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) return false;
        char* begin = static_cast<char*>(found);  // the end is aligned, so that the next mapping can touch this one
        char* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + kHuge - 1) / kHuge * kHuge);
        if (at > begin) munmap(begin, size_t(at - begin));
        if (at + size < begin + size + kHuge) munmap(at + size, size_t(begin + kHuge - at));
#ifdef MADV_HUGEPAGE
        madvise(at, size, MADV_HUGEPAGE);
#endif
        Hole hole{size, 0};
        const auto next = holes_.find(at + size);
        if (next != holes_.end()) {
            hole.size += next->second.size, hole.used += next->second.used;
            erase(next->first, next->second.size);
        }
        insert(at, hole);
        mapped_ += size;
        return true;
    }

    // Gives the pages of about `bytes` back, those of the largest holes first.
    void release(size_t bytes) {
        for (auto i = by_size_.rbegin(); i != by_size_.rend() && bytes >= kPage; ++i) {
            Hole& hole = holes_.at(i->second);
            if (hole.used < kPage) continue;
            // Pages that lie within the hole as a whole; where all are to go, those behind `used` as well, which is an estimate.
            char* first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(i->second) + kPage - 1) / kPage * kPage);
            char* last = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(i->second + hole.size) / kPage * kPage);
            size_t gone = hole.used;
            if (gone > bytes) {
                gone = bytes;
                first += (hole.used - bytes) / kPage * kPage;
            }
            if (last > first) madvise(first, size_t(last - first), MADV_DONTNEED);
            hole.used -= gone;
            held_ -= gone;
            bytes -= gone;
        }
    }

    std::mutex mutex_;
    std::map<char*, Hole> holes_;
    std::set<std::pair<size_t, char*>> by_size_;
    size_t held_ = 0, live_ = 0, peak_ = 0, least_held_ = 0, mapped_ = 0;
    Clock::time_point since_ = Clock::now();
};

Heap& heap() {
    static Heap* h = new Heap;  // never destroyed: arrays may die after static destructors
    return *h;
}

}  // namespace

// The stagger grows with the size, so that arrays of 9 and of 3 MiB fit where one of 12 was; never a multiple of a page.
size_t cached_block(size_t bytes) {
    const size_t steps = bytes >> 20;
    return (bytes + kPage - 1) / kPage * kPage + kStagger * (steps + (steps % 64 == 0));
}

void* cached_allocate(size_t bytes) {
    if (bytes > SIZE_MAX / 4) throw std::bad_alloc();
    void* memory = heap().take(cached_block(bytes));
    if (!memory) throw std::bad_alloc();
    return memory;
}

void cached_free(void* memory, size_t bytes) {
    if (memory) heap().give(static_cast<char*>(memory), cached_block(bytes));
}

size_t cached_bytes() { return heap().held(); }
size_t live_bytes() { return heap().live(); }
size_t peak_bytes() { return heap().peak(); }
void reset_peak() { heap().reset_peak(); }
void release_cached() { heap().release_all(); }

}  // namespace fastlm
