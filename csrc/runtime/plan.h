// A plan: kernels and copies of their arguments in the order in which they were launched, to be run again with nothing in between.
// It knows memory, functions and structs of numbers and pointers alone: what a plan runs can also be captured as a graph of a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

namespace fastlm {

// Memory of what a recorded step computes between its inputs and its outputs. What is given back is used again by what is recorded
// later, as it will be in every run: the plan's order is the recording's. The smallest hole that fits is cut, neighbours are
// joined. Where `by_size` is set, a large block is used again by one of its size alone. Then rows lie where rows lay: a thread that
// takes the same rows of every array finds them in its own caches, and never has to ask another core for a line to overwrite. It
// takes more memory where sizes are many.
class Arena {
  public:
    Arena() = default;
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    void* allocate(size_t bytes, bool floats = false);  // 64-byte aligned
    void release(void* memory);
    bool holds(const void* memory) const;
    size_t bytes() const;
    bool by_size = false;
    void spoil();  // nan into what held floats only, zeros elsewhere: what no kernel writes anew will show

  private:
    struct Slab {
        char* memory;
        size_t asked, bytes, used;  // used: all blocks that began here ended before it
    };
    char* cut(size_t asked, size_t bytes);  // from the smallest hole that fits, else from a new slab for what was asked
    void give(char* memory, size_t bytes);
    std::map<char*, size_t> holes_, blocks_;
    std::map<size_t, std::vector<char*>> same_;     // large blocks that are free, by their size
    std::vector<std::pair<char*, size_t>> others_;  // blocks that held something other than floats
    std::vector<Slab> slabs_;
};

class Plan {
  public:
    template <class Args> void add(void (*kernel)(const Args&), const Args& args) {
        static_assert(std::is_trivially_copyable_v<Args> && alignof(Args) <= alignof(std::max_align_t));
        const size_t at = arguments_.size();
        arguments_.resize(at + (sizeof(Args) + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t));
        std::memcpy(static_cast<void*>(&arguments_[at]), static_cast<const void*>(&args), sizeof(Args));
        const auto call = [](void (*erased)(), const void* p) {
            reinterpret_cast<void (*)(const Args&)>(erased)(*static_cast<const Args*>(p));
        };
        steps_.push_back({call, reinterpret_cast<void (*)()>(kernel), at, &typeid(Args)});
    }

    void run() const {
        for (const Step& step : steps_) step.call(step.kernel, &arguments_[step.at]);
    }
    // Up to `most` runs, no new one once `seconds` have passed. After each the `count` ids go to the next row of `found`; one below
    // 0 or among `ends` makes it the last. Returns how many were made.
    int64_t run_on(int64_t most, double seconds, const int32_t* ids, int64_t count, int32_t* found, const int32_t* ends,
                   int64_t n_ends) const;
    std::vector<double> time(int rounds) const;  // seconds of each step, the shortest of `rounds` runs
    std::vector<std::string> names() const;      // of the steps' argument structs: Matmul, RopeForward, ...
    size_t size() const { return steps_.size(); }

    // A copy of what a recorded struct points to beside arrays, a list of other pointers: it lives as long as the plan.
    template <class T> const T* keep(const std::vector<T>& list) {
        static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= alignof(std::max_align_t));
        kept_.push_back(std::make_unique<char[]>(list.size() * sizeof(T)));
        std::memcpy(kept_.back().get(), list.data(), list.size() * sizeof(T));
        return reinterpret_cast<const T*>(kept_.back().get());
    }

    // Something was done that cannot be recorded; the first reason stays.
    void refuse(const char* reason) {
        if (refused.empty()) refused = reason;
    }

    std::shared_ptr<Arena> arena = std::make_shared<Arena>();
    std::string refused;
    bool deferred = false;  // what is launched is only noted, to be run for the first time by run()

  private:
    struct Step {
        void (*call)(void (*)(), const void*);
        void (*kernel)();
        size_t at;
        const std::type_info* type;
    };
    std::vector<Step> steps_;
    std::vector<std::max_align_t> arguments_;
    std::vector<std::unique_ptr<char[]>> kept_;
};

// The plan that this thread records into; null where it does not. A binding looks here, a kernel never does.
Plan*& recording();

}  // namespace fastlm
