#include "csrc/runtime/plan.h"

#include <cxxabi.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "csrc/runtime/memory.h"

namespace fastlm {

using Clock = std::chrono::steady_clock;

Arena::~Arena() {
    for (const Slab& slab : slabs_) cached_free(slab.memory, slab.bytes);
}

void* Arena::allocate(size_t bytes, bool floats) {
    constexpr size_t kSlab = size_t(1) << 18;
    bytes = (bytes ? bytes + 63 : 64) / 64 * 64;
    Block* best = nullptr;
    for (Block& b : blocks_)
        if (b.free && b.bytes >= bytes && b.bytes <= 2 * bytes && (!best || b.bytes < best->bytes)) best = &b;
    if (best) {
        best->free = false, best->floats = best->floats && floats;
        return best->memory;
    }
    if (slabs_.empty() || slabs_.back().bytes - slabs_.back().used < bytes) {
        const size_t size = bytes < kSlab ? kSlab : bytes;
        slabs_.push_back({static_cast<char*>(cached_allocate(size)), size, 0});
    }
    Slab& slab = slabs_.back();
    char* memory = slab.memory + slab.used;
    slab.used += bytes;
    blocks_.push_back({memory, bytes, false, floats});
    return memory;
}

void Arena::release(void* memory) {
    for (Block& b : blocks_)
        if (b.memory == memory) b.free = true;
}

bool Arena::holds(const void* memory) const {
    for (const Slab& slab : slabs_)
        if (memory >= slab.memory && memory < slab.memory + slab.bytes) return true;
    return false;
}

size_t Arena::bytes() const {
    size_t sum = 0;
    for (const Slab& slab : slabs_) sum += slab.bytes;
    return sum;
}

void Arena::spoil() {
    for (const Block& b : blocks_) std::memset(b.memory, b.floats ? 0xff : 0, b.bytes);
}

int64_t Plan::run_on(int64_t most, double seconds, const int32_t* ids, int64_t count, int32_t* found, const int32_t* ends,
                     int64_t n_ends) const {
    const auto start = Clock::now();
    for (int64_t done = 1; done <= most; ++done, found += count) {
        run();
        bool last = std::chrono::duration<double>(Clock::now() - start).count() >= seconds;
        for (int64_t i = 0; i < count; ++i) {
            found[i] = ids[i];
            last = last || ids[i] < 0 || std::find(ends, ends + n_ends, ids[i]) != ends + n_ends;
        }
        if (last) return done;
    }
    return most;
}

std::vector<double> Plan::time(int rounds) const {
    std::vector<double> best(steps_.size(), 1e30);
    for (int round = 0; round < rounds; ++round)
        for (size_t i = 0; i < steps_.size(); ++i) {
            const auto start = Clock::now();
            steps_[i].call(steps_[i].kernel, &arguments_[steps_[i].at]);
            const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
            if (seconds < best[i]) best[i] = seconds;
        }
    return best;
}

std::vector<std::string> Plan::names() const {
    std::vector<std::string> names;
    for (const Step& step : steps_) {
        int status = 0;
        char* text = abi::__cxa_demangle(step.type->name(), nullptr, nullptr, &status);
        std::string name = text ? text : step.type->name();
        std::free(text);
        names.push_back(name.substr(name.rfind(':') + 1));
    }
    return names;
}

Plan*& recording() {
    thread_local Plan* active = nullptr;
    return active;
}

}  // namespace fastlm
