// The models of ptx.h on the host. Asynchronous copies are carried out where they are waited for (schedules 0 and 2) or at once
// (schedule 1): the one shows a wait that is missing, the other a barrier that is missing before memory is used again.
#pragma once

#include "csrc/cuda/device.h"

namespace ptx {

using emulator::state;

inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const char*>(p) - emulator::shared_base()); }

inline float widened(uint32_t word, int half) { return to_float(bfloat16{uint16_t(word >> (16 * half))}); }
inline uint32_t pack(float low, float high) { return uint32_t(to_bfloat16(low).bits) | uint32_t(to_bfloat16(high).bits) << 16; }
inline float from_bits(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float exp2(float x) { return std::exp2(x); }
inline void barrier_sync(int id, int threads) { emulator::meet(state.named[id], unsigned(threads)); }

inline void aligned(const void* p, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) % bytes && state.error.empty())
        state.error = std::string(what) + ": an address is not aligned";
}

inline void cp_async(void* shared, const void* global, int size, int bytes) {
    aligned(shared, size_t(size), "cp.async");
    if (bytes) aligned(global, size_t(size), "cp.async");
    emulator::later(emulator::self().copies, [=] {
        std::memcpy(shared, global, size_t(bytes));
        std::memset(static_cast<char*>(shared) + bytes, 0, size_t(size - bytes));
    });
}
inline void cp_async_16(void* shared, const void* global, int bytes = 16) { cp_async(shared, global, 16, bytes); }
inline void cp_async_4(void* shared, const void* global, int bytes = 4) { cp_async(shared, global, 4, bytes); }
inline void cp_async_commit() { emulator::self().copies.commit(); }
template <int N> inline void cp_async_wait() { emulator::self().copies.wait(N); }

// Every lane hands in what it has; the last one computes for all of them.
struct Lane {
    const void* in[2];
    void* out;
};

template <int MATRICES, bool TRANSPOSED> inline void ldmatrix(uint32_t* r, const void* row) {
    Lane mine{{row, nullptr}, r};
    aligned(row, 16, "ldmatrix");
    emulator::warp_together(&mine, [](void** lanes) {
        for (int m = 0; m < MATRICES; ++m) {
            uint16_t element[8][8];
            for (int i = 0; i < 8; ++i) std::memcpy(element[i], static_cast<Lane*>(lanes[8 * m + i])->in[0], 16);
            for (int l = 0; l < 32; ++l) {
                const int g = l / 4, t = 2 * (l % 4);
                const uint32_t low = TRANSPOSED ? element[t][g] : element[g][t],
                               high = TRANSPOSED ? element[t + 1][g] : element[g][t + 1];
                static_cast<uint32_t*>(static_cast<Lane*>(lanes[l])->out)[m] = low | high << 16;
            }
        }
    });
}
inline void ldmatrix_x4(uint32_t* r, const void* row) { ldmatrix<4, false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t* r, const void* row) { ldmatrix<4, true>(r, row); }
inline void ldmatrix_x2(uint32_t* r, const void* row) { ldmatrix<2, false>(r, row); }
inline void ldmatrix_x2_trans(uint32_t* r, const void* row) { ldmatrix<2, true>(r, row); }

// The sixteen products are added in double and rounded once; what the hardware does between is not specified.
inline void mma_16816(float* d, const uint32_t* a, const uint32_t* b) {
    Lane mine{{a, b}, d};
    emulator::warp_together(&mine, [](void** lanes) {
        float A[16][16], B[8][16];
        for (int l = 0; l < 32; ++l) {
            const Lane& lane = *static_cast<Lane*>(lanes[l]);
            const uint32_t *x = static_cast<const uint32_t*>(lane.in[0]), *y = static_cast<const uint32_t*>(lane.in[1]);
            const int g = l / 4, t = 2 * (l % 4);
            for (int i = 0; i < 4; ++i)
                for (int h = 0; h < 2; ++h) A[g + 8 * (i % 2)][t + 8 * (i / 2) + h] = widened(x[i], h);
            for (int i = 0; i < 2; ++i)
                for (int h = 0; h < 2; ++h) B[g][t + 8 * i + h] = widened(y[i], h);
        }
        for (int l = 0; l < 32; ++l) {
            float* out = static_cast<float*>(static_cast<Lane*>(lanes[l])->out);
            for (int i = 0; i < 4; ++i) {
                const float *x = A[l / 4 + 8 * (i / 2)], *y = B[2 * (l % 4) + i % 2];
                double sum = out[i];
                for (int k = 0; k < 16; ++k) sum += double(x[k]) * double(y[k]);
                out[i] = float(sum);
            }
        }
    });
}

// --- sm_90a ---

struct Mbarrier {
    int32_t bytes;  // expected and not there yet
    uint32_t phase : 1, count : 12, arrived : 12, known : 7;
};
static_assert(sizeof(Mbarrier) == 8);
constexpr uint32_t kKnown = 0x5a;

inline void mbarrier_check(Mbarrier* b) {
    if (b->known != kKnown && state.error.empty()) state.error = "a barrier in shared memory is used before it is there";
    if (b->arrived == b->count && b->bytes == 0) b->arrived = 0, b->phase ^= 1, ++state.steps;
}
inline void mbarrier_init(Mbarrier* b, int count) { *b = {0, 0, uint32_t(count), 0, kKnown}; }
inline void mbarrier_init_done() {}
inline void mbarrier_arrive(Mbarrier* b) {
    b->arrived = b->arrived + 1;
    mbarrier_check(b);
}
inline void mbarrier_expect(Mbarrier* b, int bytes) {
    b->bytes += bytes;
    mbarrier_arrive(b);
}
// Copies that are awaited here are carried out now.
inline void mbarrier_wait(Mbarrier* b, int parity) {
    while (b->phase == unsigned(parity) && state.error.empty()) {
        const auto pending = state.bulk.find(b);
        if (pending == state.bulk.end()) {
            emulator::yield();
            continue;
        }
        const auto work = std::move(pending->second);
        state.bulk.erase(pending);
        work();
    }
}

struct TensorMap {  // as Emulated.tensor_map packs it
    char* base;
    uint64_t rows, columns, row_bytes;
    uint32_t box_rows, box_columns;
    uint64_t unused[11];
};
static_assert(sizeof(TensorMap) == 128);

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// f(in shared memory, in the matrix or null) for every 16 bytes of the box.
template <class F> void each_piece(uint32_t shared, const TensorMap& map, int column, int row, const F& f) {
    for (uint32_t r = 0; r < map.box_rows; ++r)
        for (uint32_t c = 0; c < map.box_columns; ++c) {
            const int64_t y = int64_t(row) + r, x = int64_t(column) + c;
            const bool there = y >= 0 && x >= 0 && y < int64_t(map.rows) && x < int64_t(map.columns);
            f(emulator::shared_base() + swizzled(shared + 128 * r + 2 * c),
              there ? map.base + y * int64_t(map.row_bytes) + 2 * x : nullptr);
        }
}
inline void tma_load(void* shared, const TensorMap* map, int column, int row, Mbarrier* b) {
    aligned(shared, 1024, "tma_load");
    const uint32_t at = shared_address(shared);
    const auto work = [=, map = *map] {
        each_piece(at, map, column, row, [](char* to, const char* from) {
            if (from) std::memcpy(to, from, 2);
            else std::memset(to, 0, 2);
        });
        b->bytes -= int32_t(map.box_rows * map.box_columns * 2);
        mbarrier_check(b);
    };
    if (state.eager) work();
    else state.bulk.emplace(b, work);
}
inline void tma_store(const TensorMap* map, int column, int row, const void* shared) {
    aligned(shared, 1024, "tma_store");
    const uint32_t at = shared_address(shared);
    emulator::later(emulator::self().stores, [=, map = *map] {
        each_piece(at, map, column, row, [](const char* from, char* to) {
            if (to) std::memcpy(to, from, 2);
        });
    });
}
inline void tma_store_commit() { emulator::self().stores.commit(); }
template <int N> inline void tma_store_wait() { emulator::self().stores.wait(N); }
inline void tma_prefetch(const TensorMap*) {}
inline void async_fence() {}
template <int N> inline void more_registers() {}
template <int N> inline void fewer_registers() {}

inline uint64_t descriptor(const void* shared, int block = 16) {
    return uint64_t(shared_address(shared) >> 4) | uint64_t(block >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// Element (mn, k) of the sixteen k that a descriptor points to.
inline float described(uint64_t d, bool mn_major, int mn, int k) {
    const uint32_t start = uint32_t(d & 0x3fff) << 4, block = uint32_t(d >> 16 & 0x3fff) << 4,
                   eight = uint32_t(d >> 32 & 0x3fff) << 4;
    const uint32_t at = mn_major
                            ? uint32_t(mn / 64) * block + uint32_t(k / 8) * eight + uint32_t(k % 8) * 128 + uint32_t(mn % 64) * 2
                            : uint32_t(mn / 8) * eight + uint32_t(mn % 8) * 128 + uint32_t(k) * 2;
    bfloat16 v;
    std::memcpy(&v, emulator::shared_base() + swizzled(start + at), 2);
    return to_float(v);
}

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::self().products.commit(); }
template <int N> inline void wgmma_wait() { emulator::self().products.wait(N); }

// Each thread computes what it holds; a (row, k) gives the left matrix.
template <int N, bool B_MN, class A> void begin_wgmma(float* d, const A& a, uint64_t b) {
    emulator::later(emulator::self().products, [=] {
        const int lane = int(emulator::lane()), row = int(state.current / 32 % 4) * 16 + lane / 4;
        float x[2][16];
        for (int h = 0; h < 2; ++h)
            for (int k = 0; k < 16; ++k) x[h][k] = a(row + 8 * h, k);
        for (int n = 0; n < N / 4; ++n) {  // two columns of every eight
            const int column = n / 2 * 8 + lane % 4 * 2 + n % 2;
            double sums[2] = {d[n / 2 * 4 + n % 2], d[n / 2 * 4 + 2 + n % 2]};
            for (int k = 0; k < 16; ++k) {
                const double y = described(b, B_MN, column, k);
                for (int h = 0; h < 2; ++h) sums[h] += double(x[h][k]) * y;
            }
            for (int h = 0; h < 2; ++h) d[n / 2 * 4 + 2 * h + n % 2] = float(sums[h]);
        }
    });
}
template <int N, bool A_MN, bool B_MN> void wgmma(float* d, uint64_t a, uint64_t b) {
    begin_wgmma<N, B_MN>(d, [a](int row, int k) { return described(a, A_MN, row, k); }, b);
}
template <int N, bool B_MN> void wgmma(float* d, const uint32_t* a, uint64_t b) {
    const uint32_t held[4] = {a[0], a[1], a[2], a[3]};
    // Rows and columns of other lanes: what they hold is handed over now, as all of the warp issue the instruction together.
    struct Rows {
        float x[2][16];
    } rows;
    for (int k = 0; k < 16; ++k)
        for (int h = 0; h < 2; ++h) {
            const uint32_t word = emulator::shuffle(held[h + 2 * (k / 8)], emulator::lane() / 4 * 4 + size_t(k % 8 / 2));
            rows.x[h][k] = widened(word, k % 2);
        }
    begin_wgmma<N, B_MN>(d, [rows](int row, int k) { return rows.x[row / 8 % 2][k]; }, b);
}

}  // namespace ptx
