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

// The pieces of one thread, and for a worker what it is to do: one line of cache, since between cores a line is what costs. A
// thread takes the pieces of its own share first, from region to region the same part of the range: what it wrote last is in its
// own cache.
struct alignas(64) Share {
    std::atomic<uint64_t> state{0};  // a region's number and a State
    std::atomic<int64_t> next{0};
    int64_t end = 0, grain = 1;
    RangeFunction f = nullptr;
    void* context = nullptr;
    int64_t shares = 0;

    void work() {
        while (next.load(std::memory_order_relaxed) < end) {
            const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
            if (begin < end) f(context, begin, begin + grain < end ? begin + grain : end);
        }
    }
};
enum State : uint64_t { idle = 0, posted = 1, taken = 2 };

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads), shares_(new Share[size_t(threads)]) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { run(i); });
    }

    ~Pool() {
        stop_.store(true);
        wake_all();
        for (auto& w : workers_) w.join();
    }

    // The caller holds the pool's lock.
    void region(int64_t n, int64_t grain, RangeFunction f, void* context) {
        const int64_t pieces = (n - 1) / grain + 1, shares = pieces < threads_ ? pieces : threads_;
        const uint64_t number = ++number_ << 2;
        for (int64_t i = 0; i < shares; ++i) {
            Share& s = shares_[i];
            const int64_t last = (i + 1) * pieces / shares * grain;
            s.end = last < n ? last : n;
            s.next.store(i * pieces / shares * grain, std::memory_order_relaxed);
            s.grain = grain, s.f = f, s.context = context, s.shares = shares;
            s.state.store(number | (i ? posted : taken), std::memory_order_release);
        }
        std::atomic_thread_fence(std::memory_order_seq_cst);  // posted before the sleepers are counted; theirs is in run()
        if (sleepers_.load(std::memory_order_relaxed) > 0) wake_all();
        for (int64_t i = 0; i < shares; ++i) shares_[i].work();
        // Now every piece is taken. A worker that has not come yet is let go, so that none is waited for that has yet to wake.
        for (int64_t i = 1; i < shares; ++i) {
            std::atomic<uint64_t>& state = shares_[i].state;
            uint64_t expected = number | posted;
            if (state.compare_exchange_strong(expected, number | idle, std::memory_order_acq_rel)) continue;
            for (int spins = 0; state.load(std::memory_order_acquire) != (number | idle); ++spins) {
                relax();
                if (spins > 4096) std::this_thread::yield();
            }
        }
    }

  private:
    void wake_all() {
        std::lock_guard<std::mutex> lock(mutex_);
        condition_.notify_all();
    }

    void run(int index);

    const int64_t threads_;
    const std::unique_ptr<Share[]> shares_;
    uint64_t number_ = 0;
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable condition_;
    std::vector<std::thread> workers_;
};

thread_local bool inside = false;
thread_local bool alone = false;

void Pool::run(int index) {
    inside = true;  // a kernel inside a kernel runs on its own thread alone
    Share& own = shares_[index];
    auto changed = [&] {
        return (own.state.load(std::memory_order_seq_cst) & 3) == posted || stop_.load(std::memory_order_relaxed);
    };
    while (!stop_.load(std::memory_order_relaxed)) {
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
            std::atomic_thread_fence(std::memory_order_seq_cst);
            condition_.wait(lock, changed);
            sleepers_.fetch_sub(1, std::memory_order_relaxed);
        }
        uint64_t state = own.state.load(std::memory_order_acquire);
        if ((state & 3) != posted) continue;
        const uint64_t number = state & ~uint64_t(3);
        if (!own.state.compare_exchange_strong(state, number | taken, std::memory_order_acq_rel)) continue;
        own.work();
        const int64_t shares = own.shares;
        // Then what others have left; a share that is not of this region yet is its owner's to fill.
        for (int64_t i = 1; i < shares; ++i) {
            Share& other = shares_[(index + i) % shares];
            if ((other.state.load(std::memory_order_acquire) & ~uint64_t(3)) == number) other.work();
        }
        own.state.store(number | idle, std::memory_order_release);
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

void compute_alone(bool on) { alone = on; }

int num_threads() {
    if (alone) return 1;
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
