#include "embedding.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

FASTLM_INLINE int64_t at(const EmbeddingIds& ids, int64_t i) { return ids.ids32 ? int64_t(ids.ids32[i]) : ids.ids64[i]; }

template <class T, class U> int64_t first_outside_of(const T* ids, int64_t n, U limit) {
    constexpr int64_t kBlock = 1024;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t end = begin + kBlock < n ? begin + kBlock : n;
        bool bad = false;  // no exit from this loop, so that the compiler makes vectors of it; a negative id is a huge unsigned one
        for (int64_t i = begin; i < end; ++i) bad |= U(ids[i]) >= limit;
        for (int64_t i = begin; bad && i < end; ++i)
            if (U(ids[i]) >= limit) return i;
    }
    return -1;
}

int64_t first_outside(const EmbeddingIds& ids, int64_t V) {
    if (ids.ids32) return first_outside_of(ids.ids32, ids.N, V > INT32_MAX ? uint32_t(INT32_MAX) + 1 : uint32_t(V));
    return first_outside_of(ids.ids64, ids.N, uint64_t(V));
}

void forward(const EmbeddingForward& p) {
    const int64_t grain = 8192 / (p.C > 0 ? p.C : 1);
    parallel_for(p.ids.N, grain > 0 ? grain : 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = at(p.ids, i) * p.C;
            float* y = p.y + i * p.C;
            if (p.weight) {
                std::memcpy(y, p.weight + row, size_t(p.C) * sizeof(float));
                continue;
            }
            const uint16_t* w = p.weight_bf16 + row;
            int64_t c = 0;
            for (; c + W <= p.C; c += W) store(y + c, load_bf16(w + c));
            if (c < p.C) {
                uint16_t rest[W] = {};
                std::memcpy(rest, w + c, size_t(p.C - c) * sizeof(uint16_t));
                store_n(y + c, load_bf16(rest), p.C - c);
            }
        }
    });
}

// Split over columns: each element of dweight has one writer, which adds in the order of the ids.
void backward(const EmbeddingBackward& p) {
    constexpr int64_t kColumns = 128, kAhead = 4;
    parallel_for(p.C, kColumns, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < p.ids.N; ++i) {
            if (i + kAhead < p.ids.N) {
                const float* next = p.dweight + at(p.ids, i + kAhead) * p.C + begin;
                for (int64_t c = 0; c < end - begin; c += 16) __builtin_prefetch(next + c, 1);
                for (int64_t c = 0; c < end - begin; c += 16) __builtin_prefetch(p.dy + (i + kAhead) * p.C + begin + c);
            }
            const float* dy = p.dy + i * p.C + begin;
            float* dweight = p.dweight + at(p.ids, i) * p.C + begin;
            each_vector(end - begin,
                        [&](int64_t c, auto v) FASTLM_LAMBDA { v.store(dweight + c, v.load(dweight + c) + v.load(dy + c)); });
        }
    });
}

}  // namespace

extern const EmbeddingKernels embedding_kernels = {first_outside, forward, backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
