// CUDA C++ on the host: every thread of a block is a fiber, blocks run one after another. The same .cu is compiled by nvcc for
// the device and by g++ -DFASTLM_EMULATE for tests.
//
// What it catches: a missing barrier (threads run in a shuffled order, some warps ahead of others, and shared memory is poisoned),
// barriers that not all threads reach, a missing wait for what is asynchronous (see ptx_model.h). Arrays overrun are seen by the
// guards of fastlm/cuda/emulated.py. It does not model timing, bank conflicts, weak ordering of memory, clusters.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __grid_constant__
#define __constant__ static const

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emulator {

// What one thread has begun and not waited for yet: groups, each to be carried out in order.
struct Pending {
    using Work = std::function<void()>;
    std::vector<std::vector<Work>> groups;
    std::vector<Work> open;

    void commit() {
        groups.push_back(std::move(open));
        open.clear();
    }
    void wait(size_t newest) {
        while (groups.size() > newest) {
            for (const Work& work : groups.front()) work();
            groups.erase(groups.begin());
        }
    }
    void clear() {
        groups.clear();
        open.clear();
    }
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    dim3 thread;
    bool done = false;
    uint64_t exchanged = 0;            // what a shuffle hands to the other lanes
    void* handed = nullptr;            // the same for warp_together
    Pending copies, stores, products;  // cp.async, stores by TMA, wgmma
};

struct Barrier {
    unsigned arrived = 0;
    unsigned long generation = 0;
};

struct State {
    std::vector<Fiber> fibers;
    size_t current = 0;
    ucontext_t scheduler;
    dim3 block_index, grid, block;
    std::function<void()> body;
    Barrier all, named[16];
    std::vector<Barrier> warps;
    std::vector<char> shared;
    size_t dynamic = 0;  // bytes of it, whole kilobytes
    std::string error;
    std::multimap<const void*, std::function<void()>> bulk;  // TMA's loads by the barrier that waits for them
    bool eager = false;                                      // asynchronous work is done at once, not where it is waited for
    unsigned long steps = 0;  // counts what a scheduler round brought about: no step in a round is a deadlock
};
inline State state;

inline Fiber& self() { return state.fibers[state.current]; }
inline size_t lane() { return state.current % 32; }
inline void yield() { swapcontext(&self().context, &state.scheduler); }

// The last one to come calls `last` before all go on.
template <class F> void meet(Barrier& b, unsigned count, const F& last) {
    const unsigned long generation = b.generation;
    ++state.steps;
    if (++b.arrived == count) {
        last();
        b.arrived = 0, ++b.generation;
    } else {
        while (b.generation == generation) yield();
    }
}
inline void meet(Barrier& b, unsigned count) {
    meet(b, count, [] {});
}
inline void sync_block() { meet(state.all, unsigned(state.fibers.size())); }
inline void sync_warp() {
    const size_t warp = state.current / 32;
    meet(state.warps[warp], unsigned(std::min<size_t>(32, state.fibers.size() - warp * 32)));
}

// f(what each lane handed in), once for the warp, which must be whole.
template <class F> void warp_together(void* mine, const F& f) {
    const size_t warp = state.current / 32;
    self().handed = mine;
    meet(state.warps[warp], 32, [&] {
        void* lanes[32];
        for (size_t l = 0; l < 32; ++l) lanes[l] = state.fibers[warp * 32 + l].handed;
        f(lanes);
    });
}
inline void later(Pending& pending, Pending::Work work) {
    if (state.eager) work();
    else pending.open.push_back(std::move(work));
}

template <class T> T shuffle(T value, size_t from) {
    static_assert(sizeof(T) <= 8);
    std::memcpy(&self().exchanged, &value, sizeof value);
    sync_warp();
    T result;
    const size_t other = state.current / 32 * 32 + from % 32;
    std::memcpy(&result, &state.fibers[other < state.fibers.size() ? other : state.current].exchanged, sizeof result);
    sync_warp();
    return result;
}

// Static shared arrays lie after the dynamic memory, which descriptors of matrices can reach only at the start.
constexpr size_t kStatic = 64 << 10;
inline size_t& reserved() {
    static size_t bytes = 0;
    return bytes;
}
inline size_t reserve(size_t bytes) {
    const size_t at = (reserved() + 127) / 128 * 128;
    reserved() = at + bytes;
    if (reserved() > kStatic) std::abort();
    return at;
}
inline char* shared_base() {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(state.shared.data()) + 1023) & ~uintptr_t(1023));
}
inline char* dynamic_shared() { return shared_base(); }
inline char* static_shared() { return shared_base() + state.dynamic; }

inline void trampoline() {
    state.body();
    self().stores.commit(), self().stores.wait(0);
    self().done = true;
    ++state.steps;
    swapcontext(&self().context, &state.scheduler);
}

inline void run_block(dim3 index, std::mt19937& random, bool shuffled) {
    const size_t n = state.fibers.size(), warps = (n + 31) / 32;
    state.block_index = index;
    state.all = Barrier();
    state.bulk.clear();
    for (Barrier& b : state.named) b = Barrier();
    state.warps.assign(warps, Barrier());
    std::fill(state.shared.begin(), state.shared.end(), char(0xff));
    for (size_t i = 0; i < n; ++i) {
        Fiber& f = state.fibers[i];
        f.done = false;
        f.copies.clear(), f.stores.clear(), f.products.clear();
        f.thread = dim3(unsigned(i % state.block.x), unsigned(i / state.block.x % state.block.y),
                        unsigned(i / (state.block.x * state.block.y)));
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &state.scheduler;
        makecontext(&f.context, trampoline, 0);
    }
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; ++i) order[i] = i;
    unsigned idle = 0;
    for (;;) {
        if (std::all_of(state.fibers.begin(), state.fibers.end(), [](const Fiber& f) { return f.done; })) break;
        if (shuffled) std::shuffle(order.begin(), order.end(), random);
        std::vector<char> held(warps, 0);  // some warps run ahead of the others
        if (shuffled)
            for (char& h : held) h = random() % 100 < 80;
        const unsigned long before = state.steps;
        for (const size_t i : order) {
            if (state.fibers[i].done || held[i / 32]) continue;
            state.current = i;
            swapcontext(&state.scheduler, &state.fibers[i].context);
        }
        idle = before == state.steps ? idle + 1 : 0;
        if (idle > (shuffled ? 400u : 3u)) {
            state.error = "deadlock: some threads wait at a barrier that the others never reach";
            return;
        }
    }
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** p, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<std::remove_reference_t<A>>*>(p[I])...);
}

struct Entry {
    std::function<void(void**)> run;
    std::string signature;  // p pointer, i int32, l int64, f float, t tensor map
};
template <class T> constexpr char letter() {
    if (std::is_pointer_v<T>) return 'p';
    if (std::is_same_v<T, float>) return 'f';
    if (std::is_integral_v<T>) return sizeof(T) == 8 ? 'l' : 'i';
    return 't';
}
inline std::map<std::string, Entry>& entries() {
    static std::map<std::string, Entry> e;
    return e;
}
template <class... A> int enter(const char* name, void (*kernel)(A...)) {
    entries()[name] = {[kernel](void** p) { call(kernel, p, std::index_sequence_for<A...>()); }, {letter<A>()...}};
    return 0;
}

}  // namespace emulator

#define threadIdx (emulator::self().thread)
#define blockIdx (emulator::state.block_index)
#define blockDim (emulator::state.block)
#define gridDim (emulator::state.grid)
#define __syncthreads emulator::sync_block
#define __syncwarp(...) emulator::sync_warp()
#define __shfl_xor_sync(mask, v, l) emulator::shuffle(v, emulator::lane() ^ size_t(l))
#define __shfl_sync(mask, v, l) emulator::shuffle(v, size_t(l))
#define __shfl_down_sync(mask, v, d) emulator::shuffle(v, std::min<size_t>(emulator::lane() + size_t(d), 31))
#define __shfl_up_sync(mask, v, d) \
    emulator::shuffle(v, emulator::lane() >= size_t(d) ? emulator::lane() - size_t(d) : emulator::lane())

inline float __expf(float x) { return std::exp(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
// Threads change only at barriers: nothing comes between.
template <class T> T atomicAdd(T* p, T v) {
    const T before = *p;
    *p = before + v;
    return before;
}

// Runs one launch; null, or what went wrong. Called from Python by ctypes.
extern "C" const char* emulate(const char* name, const int* grid, int block, int shared, int cluster, void** arguments, int count,
                               int seed, const char* signature) {
    using namespace emulator;
    const auto found = entries().find(name);
    state.error.clear();
    if (found == entries().end()) {
        state.error = "there is no such kernel";
    } else if (found->second.signature != std::string(signature, size_t(count))) {
        state.error = "its arguments are " + found->second.signature + ", got " + signature;
    } else if (cluster != 1) {
        state.error = "clusters are not emulated";
    }
    if (!state.error.empty()) return state.error.c_str();
    std::mt19937 random(static_cast<unsigned>(seed));
    state.grid = dim3(unsigned(grid[0]), unsigned(grid[1]), unsigned(grid[2]));
    state.block = dim3(unsigned(block));
    state.eager = seed % 3 == 1;
    state.dynamic = (size_t(shared) + 1023) / 1024 * 1024;
    state.shared.assign(state.dynamic + 1024 + kStatic, 0);
    state.body = [&] { found->second.run(arguments); };
    state.fibers.assign(size_t(block), Fiber());
    for (Fiber& f : state.fibers) f.stack.resize(128 << 10);
    for (int z = 0; z < grid[2]; ++z)
        for (int y = 0; y < grid[1]; ++y)
            for (int x = 0; x < grid[0]; ++x) {
                run_block(dim3(unsigned(x), unsigned(y), unsigned(z)), random, seed != 0);
                if (!state.error.empty()) return state.error.c_str();
            }
    return nullptr;
}
