// The thread pool's one verb. Safe to include in files compiled per instruction set: it declares plain functions and one template
// with internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlm {

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

// Cuts [0, n) at multiples of `grain` and calls `f` once for each piece, on any thread, in any order. The cuts depend on n and
// grain alone, never on the number of threads, so that a result summed per piece and then in piece order has the same bits always.
// Called from inside a piece, or while another thread is using the pool, it runs the pieces one after the other.
void parallel_run(int64_t n, int64_t grain, RangeFunction f, void* context);

// This thread's scratch memory: at least `bytes`, 64-byte aligned, valid until the next call on the same thread. Grows, never
// shrinks.
void* scratch(size_t bytes);

int num_threads();            // 1 on a thread that computes alone
void set_num_threads(int n);  // 1 to 1024
void compute_alone(bool on);  // on: what this thread calls runs on it alone
int default_num_threads();    // FASTLM_NUM_THREADS, else the CPUs that affinity and cgroup quota leave

namespace {

template <class F> void parallel_for(int64_t n, int64_t grain, const F& f) {
    parallel_run(
        n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace
}  // namespace fastlm
