#include "attention_rows.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

int64_t chunks_of(int64_t keys) { return (keys + kChunk - 1) / kChunk; }

int64_t longest(const AttentionInputs& p) {
    int64_t keys = 0;
    for (int64_t b = 0; b < p.B; ++b) keys = most(keys, length(p, b));
    return keys;
}

int64_t workspace(const AttentionForward& p) {
    const int64_t chunks = chunks_of(longest(p.in));
    return chunks <= 1 ? 0 : p.in.B * p.in.G * chunks * p.in.T * (p.in.H / p.in.G) * row_width(p.in);
}

// The rows of (b, g) are finished, `step` floats apart. `totals` may be this thread's scratch memory.
void close(const AttentionForward& p, int64_t b, int64_t g, const float* totals, int64_t step) {
    const int64_t share = p.in.H / p.in.G, R = p.in.T * share;
    bool bad[kMaxRows];
    for (int64_t r = 0; r < R; ++r) bad[r] = !close_row(p, b, r / share, g * share + r % share, totals + r * step);
    if (p.in.T == 1) return;
    // Rows see different keys: one that is inf or nan may have reached a row that it is hidden from. See attention_cpu.cpp.
    for (int64_t r = 0; r < R; ++r)
        if (bad[r]) one_row(p, b, g, r);
}

// Pieces are (b, chunk of keys, g), g innermost: the groups' keys lie in the same pages.
void forward(const AttentionForward& p) {
    const AttentionInputs& in = p.in;
    const int64_t R = in.T * (in.H / in.G), chunks = most(1, chunks_of(longest(in))), width = row_width(in),
                  pieces = in.B * chunks * in.G;
    if (pieces == 0 || R == 0) return;
    const int64_t cost = least(longest(in), kChunk) * (in.D + in.E);
    // Waking a thread costs some microseconds: a piece is worth about two, and a small call is one piece.
    const int64_t grain = pieces * cost <= 100000 ? pieces : most(1, 16000 / most(1, cost));
    parallel_for(pieces, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t g = i % in.G, c = i / in.G % chunks, b = i / in.G / chunks;
            float* memory = static_cast<float*>(scratch(rows_bytes(in, R) + size_t(R * width) * sizeof(float)));
            float* out = chunks == 1 ? memory : p.partial + ((b * in.G + g) * chunks + c) * R * width;
            if (c * kChunk >= length(in, b) && chunks > 1) continue;
            Rows rows;
            open_rows(rows, in, b, g, 0, R, memory + R * width);
            const int64_t low = most(c * kChunk, rows.low_min), high = least((c + 1) * kChunk, rows.high_max);
            if (low < high) rows_chunk(out, rows, in, low, high);
            else
                for (int64_t r = 0; r < R; ++r) open_total(out + r * width, in);
            if (chunks == 1) close(p, b, g, out, width);
        }
    });
    if (chunks == 1) return;
    parallel_for(in.B * in.G, most(1, 65536 / (R * width * chunks)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            float* totals = p.partial + i * chunks * R * width;
            const int64_t used = chunks_of(length(in, i / in.G));
            for (int64_t r = 0; r < R; ++r) {
                float* total = totals + r * width;
                if (used == 0) open_total(total, in);
                for (int64_t c = 1; c < used; ++c) merge_row(total, total + c * R * width, in);
            }
            close(p, i / in.G, i % in.G, totals, width);
        }
    });
}

}  // namespace

extern const AttentionDecodeKernels attention_decode_kernels = {workspace, forward, 16};

}  // namespace FASTLM_ISA
}  // namespace fastlm
