#include "csrc/runtime/plan.h"

#include <cxxabi.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iterator>

#include "csrc/runtime/memory.h"

namespace fastlm {

using Clock = std::chrono::steady_clock;

Arena::~Arena() {
    for (const Slab& slab : slabs_) cached_free(slab.memory, slab.asked);
}

constexpr size_t kLarge = size_t(1) << 20;

void* Arena::allocate(size_t bytes, bool floats) {
    const size_t asked = bytes;
    bytes = bytes < kLarge ? (bytes ? bytes + 63 : 64) / 64 * 64 : cached_block(bytes);
    char* memory;
    if (const auto same = same_.find(bytes); same != same_.end() && !same->second.empty()) {
        memory = same->second.back();
        same->second.pop_back();
    } else {
        memory = cut(asked, bytes);
    }
    blocks_.emplace(memory, bytes);
    if (!floats) others_.push_back({memory, bytes});
    return memory;
}

char* Arena::cut(size_t asked, size_t bytes) {
    constexpr size_t kSlab = size_t(1) << 18;
    auto best = holes_.end();
    for (auto i = holes_.begin(); i != holes_.end(); ++i)
        if (i->second >= bytes && (best == holes_.end() || i->second < best->second)) best = i;
    if (best == holes_.end()) {
        asked = std::max(asked, kSlab);
        slabs_.push_back({static_cast<char*>(cached_allocate(asked)), asked, cached_block(asked), 0});
        give(slabs_.back().memory, slabs_.back().bytes);  // joined to the slab before, if that ends there
        for (best = holes_.begin(); best->second < bytes;) ++best;
    }
    char* memory = best->first;
    const size_t rest = best->second - bytes;
    holes_.erase(best);
    if (rest > 0) holes_.emplace(memory + bytes, rest);
    for (Slab& slab : slabs_)
        if (memory >= slab.memory && memory < slab.memory + slab.bytes)
            slab.used = std::max(slab.used, size_t(memory + bytes - slab.memory));
    return memory;
}

void Arena::release(void* memory) {
    const auto block = blocks_.find(static_cast<char*>(memory));
    if (by_size && block->second >= kLarge) same_[block->second].push_back(block->first);
    else give(block->first, block->second);
    blocks_.erase(block);
}

void Arena::give(char* memory, size_t bytes) {
    const auto hole = holes_.emplace(memory, bytes).first, next = std::next(hole);
    if (next != holes_.end() && memory + bytes == next->first) hole->second += next->second, holes_.erase(next);
    if (hole == holes_.begin()) return;
    const auto before = std::prev(hole);
    if (before->first + before->second == memory) before->second += hole->second, holes_.erase(hole);
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
    for (const Slab& slab : slabs_) std::memset(slab.memory, 0xff, slab.used);
    for (const auto& [memory, bytes] : others_) std::memset(memory, 0, bytes);
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
