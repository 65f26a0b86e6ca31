// The models of ptx.h on the host. Asynchronous copies are carried out where they are waited for (schedules 0 and 2) or at once
// (schedule 1): the one shows a wait that is missing, the other a barrier that is missing before memory is used again.
#pragma once

#include "csrc/cuda/device.h"

namespace ptx {

using emulator::state;

inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const char*>(p) - emulator::shared_base()); }

inline float widened(uint32_t word, int half) { return to_float(bfloat16{uint16_t(word >> (16 * half))}); }
inline uint32_t pack(float low, float high) { return uint32_t(to_bfloat16(low).bits) | uint32_t(to_bfloat16(high).bits) << 16; }
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

}  // namespace ptx
