// Sampling in CUDA C++; the contract is sampling.h, with T float or bfloat16 for logits.
//
// A block of 512 threads takes a row, which lies in shared memory where it fits (`row` null), else in global memory. Thresholds
// are found by radix selection, 11 bits at a time: a histogram of counts (top-k) or of masses (top-p) in shared memory. Masses are
// whole multiples of 2^-44: additions of whole numbers give the same sums in any order. Weights have the CPU's bits: nothing is
// fused.
#include "csrc/cuda/device.h"

namespace {

using Mass = unsigned long long;

constexpr int THREADS = 512, WARPS = THREADS / 32, BUCKETS = 2048;
constexpr int kNan = -1, kNothing = -2, kInfinite = -3, kBadPrevious = -4, kBadUniform = -5;  // as sampling.h
constexpr double kUnit = 17592186044416.0;                                                    // 2^44

__device__ uint32_t bits_of(float x) {
    uint32_t i;
    memcpy(&i, &x, 4);
    return i;
}
__device__ float float_of(uint32_t i) {
    float x;
    memcpy(&x, &i, 4);
    return x;
}
// Whole numbers in the order of the floats, backwards: the greatest float has the least.
__device__ uint32_t backwards(float x) {
    const uint32_t i = bits_of(x);
    return ~(i & 0x80000000u ? ~i : i | 0x80000000u);
}
__device__ Mass mass_of(float e) { return Mass(double(e) * kUnit); }

// e^x for x <= 0, as sampling_cpu.cpp has it.
__device__ float weight(float x) {
    const float clamped = fmaxf(x, -88.0f);
    const float n = rintf(__fmul_rn(clamped, 1.44269504f));
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, 0.693145751953125f)), __fmul_rn(n, 1.42860682e-6f));
    float p = 1.38888889e-3f;
    p = __fadd_rn(__fmul_rn(p, r), 8.33333333e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.16666667e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.66666667e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
    return x < -87.0f ? 0.0f : float_of(bits_of(p) + (uint32_t(int(n)) << 23));
}

// Of all threads' values, in all of them; `room` holds 32.
template <class V, class F> __device__ V over_block(V v, V* room, F combine) {
    for (int d = 16; d > 0; d /= 2) v = combine(v, __shfl_xor_sync(0xffffffffu, v, d));
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
    __syncthreads();
    v = room[0];
    for (int i = 1; i < int(blockDim.x) / 32; ++i) v = combine(v, room[i]);
    return v;
}
template <class V> __device__ V add(V a, V b) { return a + b; }
__device__ float greater(float a, float b) { return fmaxf(a, b); }
__device__ int less(int a, int b) { return a < b ? a : b; }

// The sum over the lanes up to this one.
template <class V> __device__ V up_to(V v) {
    const int lane = int(threadIdx.x) % 32;
    for (int d = 1; d < 32; d *= 2) {
        const V other = __shfl_up_sync(0xffffffffu, v, d);
        if (lane >= d) v += other;
    }
    return v;
}

struct Room {
    Mass* histogram;  // (BUCKETS,)
    Mass* sums;       // (32,)
    float* floats;    // (32,)
    int* numbers;     // (32,)
};

struct Found {
    uint32_t key;
    Mass below;  // of what has a lesser key
};

// The least key whose amounts, with those of all lesser keys, exceed the limit; `last` where there is none.
template <class Key, class Amount>
__device__ Found select(int n, Key key, Amount amount, Mass limit, uint32_t last, const Room& room) {
    Found found{0, 0};
    int shift = 32;
    while (shift > 0) {
        const int width = shift == 32 ? 11 : shift == 21 ? 11 : 10, before = shift;
        shift -= width;
        for (int i = int(threadIdx.x); i < BUCKETS; i += int(blockDim.x)) room.histogram[i] = 0;
        __syncthreads();
        for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
            const uint32_t k = key(i);
            if (before != 32 && (k >> before) != found.key) continue;
            const Mass a = amount(i);
            if (a) atomicAdd(&room.histogram[(k >> shift) & ((1u << width) - 1)], a);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            const int each = (1 << width) / 32, first = int(threadIdx.x) * each;
            Mass own = 0;
            for (int i = 0; i < each; ++i) own += room.histogram[first + i];
            const Mass end = found.below + up_to(own);
            if (threadIdx.x == 0) room.numbers[0] = -1;
            __syncwarp();
            if (end > limit && end - own <= limit) {  // one lane at most: sums only grow
                Mass sum = end - own;
                int i = first;
                while (sum + room.histogram[i] <= limit) sum += room.histogram[i++];
                room.numbers[0] = i;
                room.sums[0] = sum;
            }
            __syncwarp();
            if (threadIdx.x == 31 && room.numbers[0] < 0) {
                const int i = int((last >> shift) & ((1u << width) - 1));
                room.numbers[0] = i;
                room.sums[0] = end - room.histogram[i];
            }
        }
        __syncthreads();
        found.key = (found.key << width) | uint32_t(room.numbers[0]);
        found.below = room.sums[0];
        __syncthreads();
    }
    return found;
}

// The lowest index whose value is the greatest.
template <class At> __device__ int first_of(At at, int n, float greatest, const Room& room) {
    int index = INT32_MAX;
    for (int i = int(threadIdx.x); i < n && index == INT32_MAX; i += int(blockDim.x))
        if (at(i) == greatest) index = i;
    return over_block(index, room.numbers, less);
}

// A warp's part of the row, which lies at a stretch: begin .. end - 1.
struct Part {
    int begin, end;
    __device__ explicit Part(int n) {
        const int each = (n + THREADS - 1) / THREADS * 32, warp = int(threadIdx.x) / 32;
        begin = less(warp * each, n), end = less(begin + each, n);
    }
};

// Sets the first `drop` weights equal to `cut`, in the order of indices, to zero.
__device__ void drop_ties(float* e, int n, float cut, int drop, const Room& room) {
    const Part part(n);
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    int count = 0;
    for (int i = part.begin + lane; i < part.end; i += 32) count += e[i] == cut;
    for (int d = 16; d > 0; d /= 2) count += __shfl_xor_sync(0xffffffffu, count, d);
    if (lane == 0) room.numbers[warp] = count;
    __syncthreads();
    int rank = 0;
    for (int w = 0; w < warp; ++w) rank += room.numbers[w];
    for (int i = part.begin; i < part.end; i += 32) {
        const bool tie = i + lane < part.end && e[i + lane] == cut;
        const int upto = up_to(int(tie));
        if (tie && rank + upto <= drop) e[i + lane] = 0.0f;
        rank += __shfl_sync(0xffffffffu, upto, 31);
    }
    __syncthreads();
}

// The first index, in order, whose cumulative mass exceeds uniform * the mass of all; over the weights from `cut` on.
__device__ int draw(const float* e, int n, float cut, double uniform, const Room& room) {
    const Part part(n);
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const auto mass = [&](int i) { return e[i] >= cut ? mass_of(e[i]) : Mass(0); };
    Mass own = 0;
    for (int i = part.begin + lane; i < part.end; i += 32) own += mass(i);
    for (int d = 16; d > 0; d /= 2) own += __shfl_xor_sync(0xffffffffu, own, d);
    __syncthreads();
    if (lane == 0) room.sums[warp] = own;
    if (threadIdx.x == 0) room.numbers[0] = INT32_MAX;
    __syncthreads();
    Mass total = 0, before = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w == warp) before = total;
        total += room.sums[w];
    }
    Mass target = Mass(uniform * double(total));
    target = target < total ? target : total - 1;
    if (before <= target && target < before + own) {
        for (int i = part.begin; i < part.end; i += 32) {
            const Mass upto = before + up_to(i + lane < part.end ? mass(i + lane) : Mass(0));
            const Mass previous = __shfl_up_sync(0xffffffffu, upto, 1);
            if (upto > target && (lane == 0 || previous <= target)) room.numbers[0] = i + lane;
            before = __shfl_sync(0xffffffffu, upto, 31);
            if (before > target) break;
        }
    }
    __syncthreads();
    return room.numbers[0];
}

struct Settings {
    int top_k;  // 0: off
    float limit, rest, temperature, floor, penalty;
};

template <class T> __device__ int sample_row(float* row, const T* logits, double uniform, const int* previous, int ids, int n,
                                             const Settings& s, const Room& room) {
    const int step = int(blockDim.x), t = int(threadIdx.x);
    for (int i = t; i < n; i += step) row[i] = to_float(logits[i]);
    __syncthreads();
    int unknown = 0;
    for (int i = t; i < ids; i += step) {
        const int id = previous[i];
        unknown += id < -1 || id >= n;
        if (id < 0 || id >= n) continue;
        const float x = to_float(logits[id]);  // not from the row: an id that occurs twice counts once
        row[id] = x < 0.0f ? __fmul_rn(x, s.penalty) : x / s.penalty;
    }
    if (over_block(unknown, room.numbers, add<int>)) return kBadPrevious;
    float most = -INFINITY;
    int bad = 0;
    for (int i = t; i < n; i += step) {
        bad += row[i] != row[i];
        most = fmaxf(most, row[i]);
    }
    if (over_block(bad, room.numbers, add<int>)) return kNan;
    const float greatest = over_block(most, room.floats, greater), top = greatest / s.temperature;
    if (greatest == -INFINITY) return kNothing;
    if (!(uniform >= 0 && uniform < 1)) return kBadUniform;
    if (s.temperature == 0.0f) return first_of([&](int i) { return row[i]; }, n, greatest, room);
    if (top == INFINITY || top == -INFINITY) return kInfinite;
    uint32_t least = 0xffffffffu;  // backwards: all
    if (s.top_k > 0) {
        // At least k threads have a maximum from the k-th largest of these on, so few elements are below it and counted.
        uint32_t bound = 0xffffffffu;
        if (s.top_k <= THREADS && n >= THREADS) {
            const uint32_t own = backwards(most / s.temperature);
            bound =
                select(THREADS, [&](int) { return own; }, [](int) { return Mass(1); }, Mass(s.top_k - 1), 0xffffffffu, room).key;
        }
        least = select(
                    n, [&](int i) { return backwards(row[i] / s.temperature); },
                    [&](int i) { return Mass(backwards(row[i] / s.temperature) <= bound); }, Mass(s.top_k - 1), 0xffffffffu, room)
                    .key;
    }
    Mass own = 0;
    for (int i = t; i < n; i += step) {
        const float z = row[i] / s.temperature, e = backwards(z) <= least ? weight(__fsub_rn(z, top)) : 0.0f;
        row[i] = e;
        own += mass_of(e);
    }
    const Mass total = over_block(own, room.sums, add<Mass>);
    float cut = s.floor;
    if (s.limit > 0) {
        const Mass limit = Mass(double(total) * double(s.limit) + double(total) * double(s.rest));
        const Found found =
            select(n, [&](int i) { return bits_of(row[i]); }, [&](int i) { return mass_of(row[i]); }, limit, 0x3f800000u, room);
        const float at = float_of(found.key);
        int ties = 0;
        for (int i = t; i < n; i += step) ties += row[i] == at;
        ties = over_block(ties, room.numbers, add<int>);
        const Mass spare = Mass(ties - (at == 1.0f)), fit = (limit - found.below) / mass_of(at);  // the last one always stays
        const int drop = int(fit < spare ? fit : spare);
        if (drop > 0) drop_ties(row, n, at, drop, room);
        cut = fmaxf(cut, at);
    }
    return draw(row, n, cut, uniform, room);
}

template <class T> __device__ void sample(int* token, float* row, const T* logits, const double* uniform, const int* previous,
                                          const int64_t* begin, int V, const Settings& s) {
    FASTLM_SHARED(Mass, histogram, BUCKETS);
    FASTLM_SHARED(Mass, sums, 32);
    FASTLM_SHARED(float, floats, 32);
    FASTLM_SHARED(int, numbers, 32);
    FASTLM_DYNAMIC_SHARED(shared);
    const int64_t b = blockIdx.x;
    float* const own = row ? row + b * V : reinterpret_cast<float*>(shared);
    const int* ids = previous ? previous + begin[b] : nullptr;
    const int count = previous ? int(begin[b + 1] - begin[b]) : 0;
    const int found = sample_row(own, logits + b * V, uniform[b], ids, count, V, s, {histogram, sums, floats, numbers});
    if (threadIdx.x == 0) token[b] = found;
}

template <class T> __device__ void argmax(int* index, const T* x, int V, int token) {
    FASTLM_SHARED(float, floats, 32);
    FASTLM_SHARED(int, numbers, 32);
    const Room room{nullptr, nullptr, floats, numbers};
    const T* row = x + int64_t(blockIdx.x) * V;
    float most = -INFINITY;
    int bad = 0;
    for (int i = int(threadIdx.x); i < V; i += int(blockDim.x)) {
        const float v = to_float(row[i]);
        bad += v != v;
        most = fmaxf(most, v);
    }
    bad = over_block(bad, numbers, add<int>);
    most = over_block(most, floats, greater);
    const bool nothing = token && most == -INFINITY;
    const int found = bad ? kNan : nothing ? kNothing : first_of([&](int i) { return to_float(row[i]); }, V, most, room);
    if (threadIdx.x == 0) index[blockIdx.x] = found;
}

}  // namespace

#define FASTLM_FORMS(T, suffix)                                                                                                    \
    FASTLM_GLOBAL void __launch_bounds__(THREADS, 2)                                                                               \
        sample_##suffix(int* token, float* row, const T* logits, const double* uniform, const int* previous, const int64_t* begin, \
                        int V, int top_k, float limit, float rest, float temperature, float floor, float penalty) {                \
        sample<T>(token, row, logits, uniform, previous, begin, V, {top_k, limit, rest, temperature, floor, penalty});             \
    }                                                                                                                              \
    FASTLM_KERNEL(sample_##suffix)                                                                                                 \
    FASTLM_GLOBAL void __launch_bounds__(THREADS) argmax_##suffix(int* index, const T* x, int V, int token) {                      \
        argmax<T>(index, x, V, token);                                                                                             \
    }                                                                                                                              \
    FASTLM_KERNEL(argmax_##suffix)
FASTLM_FORMS(float, fp32)
FASTLM_FORMS(bfloat16, bf16)

// u[b] = row 0 of stream seeds[b] at step steps[b], as csrc/runtime/philox.h.
FASTLM_GLOBAL void philox_uniforms(double* u, const uint64_t* seeds, const int64_t* steps, int B) {
    const int b = int(blockIdx.x) * int(blockDim.x) + int(threadIdx.x);
    if (b >= B) return;
    uint32_t key0 = uint32_t(seeds[b]), key1 = uint32_t(seeds[b] >> 32);
    uint32_t c[4] = {0, 0, uint32_t(steps[b]), uint32_t(uint64_t(steps[b]) >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t p = uint64_t(0xD2511F53u) * c[0], q = uint64_t(0xCD9E8D57u) * c[2];
        const uint32_t c0 = uint32_t(q >> 32) ^ c[1] ^ key0, c2 = uint32_t(p >> 32) ^ c[3] ^ key1;
        c[0] = c0, c[1] = uint32_t(q), c[2] = c2, c[3] = uint32_t(p);
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    u[b] = (double(c[0] >> 5) * 67108864.0 + double(c[1] >> 6)) / 9007199254740992.0;
}
FASTLM_KERNEL(philox_uniforms)
