// Softmax cross-entropy in CUDA C++; the contract is cross_entropy.h, with T float or bfloat16 for logits and int32 targets.
//
// A block takes a row, by vectors of 16 bytes where the row's address allows. What fits stays in shared memory (`kept` bytes, the
// launch's dynamic shared memory), so that logits come from memory once; the rest of a longer row is read again, from L2. A thread
// keeps a maximum and a sum of its own: one exponential an element and pass, and the threads meet once.
#include "csrc/cuda/device.h"

namespace {

template <class T> struct alignas(16) Vector {
    static constexpr int N = 16 / int(sizeof(T));
    T v[N];
};

__device__ inline float finite(float m) { return m == -INFINITY ? 0.0f : m; }  // -inf - -inf would be nan

// The sum, or the maximum, over a block of any whole number of warps; `room` holds 32.
template <class V, class F> __device__ V over_block(V v, V* room, F combine) {
    for (int d = 16; d > 0; d /= 2) v = combine(v, __shfl_xor_sync(0xffffffffu, v, d));
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
    __syncthreads();
    v = room[0];
    for (int i = 1; i < int(blockDim.x) / 32; ++i) v = combine(v, room[i]);
    return v;
}
template <class V> __device__ V block_total(V v, V* room) {
    return over_block(v, room, [](V a, V b) { return a + b; });
}

// A row as this thread sees it: elements before the first whole vector and after the last one, one each at most, and vectors.
template <class T> struct Row {
    using Vec = Vector<T>;
    const T* x;
    const Vec* body;
    Vec* room;
    int head, vectors, kept, edge;  // edge: this thread's single element, or -1

    __device__ Row(const T* row, int V, char* shared, int bytes) : x(row), room(reinterpret_cast<Vec*>(shared)) {
        head = int((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
        head = head < V ? head : V;
        vectors = (V - head) / Vec::N;
        body = reinterpret_cast<const Vec*>(row + head);
        kept = bytes / 16;
        const int tail = head + vectors * Vec::N, t = int(threadIdx.x);
        edge = t < head ? t : t - head < V - tail ? tail + t - head : -1;
    }
};

struct Normaliser {
    float most, sum;  // of exp(x - most); nan where x has nan or +inf
};

template <class T> __device__ Normaliser normaliser(const Row<T>& row, float* room) {
    float m = -INFINITY, s = 0.0f;
    if (row.edge >= 0) {
        const float a = to_float(row.x[row.edge]);
        if (a > m) m = a;
        s = __expf(a - finite(m));
    }
    constexpr int AHEAD = 4;  // vectors that a thread asks for at once
    const int step = int(blockDim.x);
    for (int first = int(threadIdx.x); first < row.vectors; first += AHEAD * step) {
        Vector<T> ahead[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            if (first + k * step < row.vectors) ahead[k] = row.body[first + k * step];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int i = first + k * step;
            if (i >= row.vectors) break;
            const Vector<T>& a = ahead[k];
            if (i < row.kept) row.room[i] = a;
            float most = m;
#pragma unroll
            for (int j = 0; j < Vector<T>::N; ++j) most = fmaxf(most, to_float(a.v[j]));
            const float shift = finite(most);
            if (most > m) s *= __expf(m - shift);
            m = most;
#pragma unroll
            for (int j = 0; j < Vector<T>::N; ++j) s += __expf(to_float(a.v[j]) - shift);
        }
    }
    const float most = over_block(m, room, [](float a, float b) { return fmaxf(a, b); });
    return {most, block_total(s * __expf(m - finite(most)), room)};
}

// y[i] = f(i, x[i]) over the row; y may be x. By vectors, where y's address allows.
template <class T, class F> __device__ void map(T* y, const Row<T>& row, F f) {
    const bool whole = reinterpret_cast<uintptr_t>(y + row.head) % 16 == 0;
    if (row.edge >= 0) y[row.edge] = from_float<T>(f(row.edge, to_float(row.x[row.edge])));
    for (int i = int(threadIdx.x); i < row.vectors; i += int(blockDim.x)) {
        Vector<T> a = i < row.kept ? row.room[i] : row.body[i];
        const int first = row.head + i * Vector<T>::N;
#pragma unroll
        for (int j = 0; j < Vector<T>::N; ++j) a.v[j] = from_float<T>(f(first + j, to_float(a.v[j])));
        if (whole) *reinterpret_cast<Vector<T>*>(y + first) = a;
        else
            for (int j = 0; j < Vector<T>::N; ++j) y[first + j] = a.v[j];
    }
}

template <class T> __device__ void forward(float* loss, float* stats, T* dlogits, const T* logits, const int* targets,
                                           const float* scale, int V, int ignore_index, int bytes) {
    FASTLM_DYNAMIC_SHARED(shared);
    FASTLM_SHARED(float, room, 32);
    const int64_t r = blockIdx.x;
    const int target = targets[r];
    if (target == ignore_index) {
        if (threadIdx.x == 0) loss[r] = stats[2 * r] = stats[2 * r + 1] = 0.0f;
        if (dlogits)
            for (int c = int(threadIdx.x); c < V; c += int(blockDim.x)) dlogits[r * V + c] = from_float<T>(0.0f);
        return;
    }
    const Row<T> row(logits + r * V, V, shared, bytes);
    // Read before any gradient is written: dlogits may be logits.
    const float at_target = target >= 0 && target < V ? to_float(row.x[target]) : NAN;
    const Normaliser n = normaliser(row, room);
    const float inverse = 1.0f / n.sum;
    if (threadIdx.x == 0) {
        loss[r] = logf(n.sum) - (at_target - n.most);
        stats[2 * r] = n.most;
        stats[2 * r + 1] = inverse;
    }
    if (!dlogits) return;
    const float factor = *scale, both = inverse * factor;
    map(dlogits + r * V, row, [&](int c, float x) {
        const float e = __expf(x - n.most);
        return c == target ? (e * inverse - 1.0f) * factor : e * both;
    });
}

template <class T> __device__ void log_softmax(T* y, const T* logits, int V, int bytes) {
    FASTLM_DYNAMIC_SHARED(shared);
    FASTLM_SHARED(float, room, 32);
    const int64_t r = blockIdx.x;
    const Row<T> row(logits + r * V, V, shared, bytes);
    const Normaliser n = normaliser(row, room);
    const float log = logf(n.sum);
    map(y + r * V, row, [&](int, float x) { return (x - n.most) - log; });
}

constexpr int THREADS = 256, PIECE = 4096;

template <class T> __device__ void backward(T* dlogits, const float* dy, const T* logits, const float* stats, const int* targets,
                                            int V, int ignore_index) {
    const int64_t r = blockIdx.x, first = r * V;
    const int target = targets[r], end = V < (int(blockIdx.y) + 1) * PIECE ? V : (int(blockIdx.y) + 1) * PIECE;
    const float most = stats[2 * r], inverse = stats[2 * r + 1], factor = dy[r];
    for (int c = int(blockIdx.y) * PIECE + int(threadIdx.x); c < end; c += THREADS) {
        const float p = __expf(to_float(logits[first + c]) - most) * inverse;
        dlogits[first + c] = from_float<T>(target == ignore_index ? 0.0f : (c == target ? p - 1.0f : p) * factor);
    }
}

template <class T> __device__ void log_softmax_backward(T* dx, const T* dy, const T* y, int V) {
    FASTLM_SHARED(float, room, 32);
    const int64_t first = int64_t(blockIdx.x) * V;
    float sum = 0.0f;
    for (int c = int(threadIdx.x); c < V; c += THREADS) sum += to_float(dy[first + c]);
    sum = block_total(sum, room);
    for (int c = int(threadIdx.x); c < V; c += THREADS)
        dx[first + c] = from_float<T>(to_float(dy[first + c]) - expf(to_float(y[first + c])) * sum);
}

template <class T> __device__ void scale_by(T* y, const T* x, const float* a, int n, int add, int same) {
    const float factor = *a;
    if (!add && same && factor == 1.0f) return;
    const int64_t first = int64_t(blockIdx.x) * 4 * THREADS + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int64_t at = first + i * THREADS;
        if (at < n) y[at] = from_float<T>(to_float(x[at]) * factor + (add ? to_float(y[at]) : 0.0f));
    }
}

}  // namespace

#define FASTLM_FORMS(T, suffix)                                                                                                   \
    FASTLM_GLOBAL void __launch_bounds__(512)                                                                                     \
        cross_entropy_forward_##suffix(float* loss, float* stats, T* dlogits, const T* logits, const int* targets,                \
                                       const float* scale, int V, int ignore_index, int bytes) {                                  \
        forward<T>(loss, stats, dlogits, logits, targets, scale, V, ignore_index, bytes);                                         \
    }                                                                                                                             \
    FASTLM_KERNEL(cross_entropy_forward_##suffix)                                                                                 \
    FASTLM_GLOBAL void __launch_bounds__(512) log_softmax_##suffix(T* y, const T* logits, int V, int bytes) {                     \
        log_softmax<T>(y, logits, V, bytes);                                                                                      \
    }                                                                                                                             \
    FASTLM_KERNEL(log_softmax_##suffix)                                                                                           \
    FASTLM_GLOBAL void __launch_bounds__(THREADS) cross_entropy_backward_##suffix(                                                \
        T* dlogits, const float* dy, const T* logits, const float* stats, const int* targets, int V, int ignore_index) {          \
        backward<T>(dlogits, dy, logits, stats, targets, V, ignore_index);                                                        \
    }                                                                                                                             \
    FASTLM_KERNEL(cross_entropy_backward_##suffix)                                                                                \
    FASTLM_GLOBAL void __launch_bounds__(THREADS) log_softmax_backward_##suffix(T* dx, const T* dy, const T* y, int V) {          \
        log_softmax_backward<T>(dx, dy, y, V);                                                                                    \
    }                                                                                                                             \
    FASTLM_KERNEL(log_softmax_backward_##suffix)                                                                                  \
    FASTLM_GLOBAL void __launch_bounds__(THREADS) scale_by_##suffix(T* y, const T* x, const float* a, int n, int add, int same) { \
        scale_by<T>(y, x, a, n, add, same);                                                                                       \
    }                                                                                                                             \
    FASTLM_KERNEL(scale_by_##suffix)
FASTLM_FORMS(float, fp32)
FASTLM_FORMS(bfloat16, bf16)

FASTLM_GLOBAL void __launch_bounds__(THREADS) cross_entropy_narrow(int* narrow, const int64_t* targets, int n) {
    for (int64_t i = int64_t(blockIdx.x) * 1024 + threadIdx.x; i < n && i < (int64_t(blockIdx.x) + 1) * 1024; i += THREADS)
        narrow[i] = targets[i] == int(targets[i]) ? int(targets[i]) : INT32_MIN;
}
FASTLM_KERNEL(cross_entropy_narrow)

FASTLM_GLOBAL void __launch_bounds__(THREADS)
    cross_entropy_scale(float* scale, const int* targets, int R, int ignore_index, int mean) {
    FASTLM_SHARED(int, room, 32);
    int count = 0;
    for (int r = int(threadIdx.x); r < R; r += THREADS) count += targets[r] != ignore_index;
    count = block_total(count, room);
    if (threadIdx.x == 0) *scale = mean ? 1.0f / float(count > 1 ? count : 1) : 1.0f;
}
FASTLM_KERNEL(cross_entropy_scale)

FASTLM_GLOBAL void __launch_bounds__(THREADS) cross_entropy_total(float* total, const float* loss, const float* scale, int R) {
    FASTLM_SHARED(double, room, 32);
    double sum = 0;
    for (int r = int(threadIdx.x); r < R; r += THREADS) sum += double(loss[r]);
    sum = block_total(sum, room);
    if (threadIdx.x == 0) *total = float(sum * double(*scale));
}
FASTLM_KERNEL(cross_entropy_total)
