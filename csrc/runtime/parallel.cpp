// Workers spin for a short while after a region and then park. Nothing here allocates once the pool runs.
#include "csrc/runtime/parallel.h"

#include <sched.h>
#include <unistd.h>

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace fastlm {
namespace {

// Long enough to bridge the gap between two kernels of one decode step, short enough not to be seen in a process monitor.
constexpr auto kSpin = std::chrono::microseconds(60);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Region {
    RangeFunction f = nullptr;
    void* context = nullptr;
    int64_t n = 0, grain = 1;
    std::atomic<int64_t> next{0};

    void work() {
        for (;;) {
            const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
            if (begin >= n) return;
            f(context, begin, begin + grain < n ? begin + grain : n);
        }
    }
};

class Pool {
  public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { run(); });
    }

    ~Pool() {
        stop_.store(true);
        wake_all();
        for (auto& w : workers_) w.join();
    }

    // The caller holds the pool's lock.
    void region(int64_t n, int64_t grain, RangeFunction f, void* context) {
        region_.f = f, region_.context = context, region_.n = n, region_.grain = grain;
        region_.next.store(0, std::memory_order_relaxed);
        gate_.fetch_and(~kClosed, std::memory_order_release);
        epoch_.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) wake_all();
        region_.work();
        // Close the gate and wait only for workers that are inside: one that wakes too late finds it closed and never touches
        // region_.
        gate_.fetch_or(kClosed, std::memory_order_acq_rel);
        for (int spins = 0; gate_.load(std::memory_order_acquire) != kClosed; ++spins) {
            relax();
            if (spins > 4096) std::this_thread::yield();
        }
    }

  private:
    static constexpr uint32_t kClosed = 1u << 31;

    void wake_all() {
        std::lock_guard<std::mutex> lock(mutex_);
        condition_.notify_all();
    }

    void run();

    Region region_;
    std::atomic<uint32_t> gate_{kClosed};  // workers inside, and the closed bit
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable condition_;
    std::vector<std::thread> workers_;
};

thread_local bool inside = false;

void Pool::run() {
    inside = true;  // a kernel inside a kernel runs on its own thread alone
    uint64_t seen = 0;
    while (!stop_.load(std::memory_order_relaxed)) {
        auto changed = [&] { return epoch_.load(std::memory_order_seq_cst) != seen || stop_.load(std::memory_order_relaxed); };
        const auto until = std::chrono::steady_clock::now() + kSpin;
        bool ready = changed();
        while (!ready && std::chrono::steady_clock::now() < until) {
            for (int i = 0; i < 64 && !ready; ++i) {
                relax();
                ready = changed();
            }
        }
        if (!ready) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            condition_.wait(lock, changed);
            sleepers_.fetch_sub(1, std::memory_order_relaxed);
        }
        seen = epoch_.load(std::memory_order_acquire);
        if (!(gate_.fetch_add(1, std::memory_order_acq_rel) & kClosed)) region_.work();
        gate_.fetch_sub(1, std::memory_order_acq_rel);
    }
}

std::mutex* pool_mutex = new std::mutex;  // never destroyed: daemon threads may outlive main
Pool* pool = nullptr;
std::atomic<int> wanted{0};
bool fork_handler = false;

// The workers of the parent do not exist in the child: forget them, and start anew when first needed.
void after_fork_in_child() {
    pool = nullptr;
    pool_mutex = new std::mutex;
    inside = false;
}

int cgroup_cpus() {
    FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r");
    if (!f) return 1 << 20;
    long long quota = 0, period = 0;
    const int read = std::fscanf(f, "%lld %lld", &quota, &period);  // "max 100000" reads none
    std::fclose(f);
    if (read != 2 || quota <= 0 || period <= 0) return 1 << 20;
    const long long cpus = (quota + period - 1) / period;
    return cpus < 1 ? 1 : int(cpus);
}

struct Scratch {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Scratch() { std::free(memory); }
};
thread_local Scratch thread_scratch;

}  // namespace

int default_num_threads() {
    if (const char* text = std::getenv("FASTLM_NUM_THREADS")) {
        char* end = nullptr;
        const long n = std::strtol(text, &end, 10);
        if (end == text || *end || n < 1 || n > 1024)
            throw std::invalid_argument("FASTLM_NUM_THREADS must be a whole number from 1 to 1024, got \"" + std::string(text) +
                                        "\"");
        return int(n);
    }
    cpu_set_t set;
    int cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : int(std::thread::hardware_concurrency());
    if (cpus < 1) cpus = 1;
    const int quota = cgroup_cpus();
    return cpus < quota ? cpus : quota;
}

int num_threads() {
    int n = wanted.load();
    if (n == 0) wanted.store(n = default_num_threads());
    return n;
}

void set_num_threads(int n) {
    if (n < 1 || n > 1024) throw std::invalid_argument("[set_num_threads] n must be from 1 to 1024, got " + std::to_string(n));
    std::lock_guard<std::mutex> lock(*pool_mutex);
    if (n == wanted.load()) return;
    delete pool;
    pool = nullptr;
    wanted.store(n);
}

void parallel_run(int64_t n, int64_t grain, RangeFunction f, void* context) {
    if (n <= 0) return;
    if (grain < 1) grain = 1;
    if (n > grain && !inside && num_threads() > 1) {
        std::unique_lock<std::mutex> lock(*pool_mutex, std::try_to_lock);
        if (lock.owns_lock()) {
            if (!fork_handler) {
                pthread_atfork(nullptr, nullptr, after_fork_in_child);
                fork_handler = true;
            }
            if (!pool) pool = new Pool(num_threads());
            inside = true;
            pool->region(n, grain, f, context);
            inside = false;
            return;
        }
    }
    for (int64_t begin = 0; begin < n; begin += grain) f(context, begin, begin + grain < n ? begin + grain : n);
}

void* scratch(size_t bytes) {
    Scratch& s = thread_scratch;
    if (bytes > s.bytes) {
        std::free(s.memory);
        s.bytes = (bytes + 4095) / 4096 * 4096;
        s.memory = std::aligned_alloc(64, s.bytes);
        if (!s.memory) {
            s.bytes = 0;
            throw std::bad_alloc();
        }
    }
    return s.memory;
}

}  // namespace fastlm
