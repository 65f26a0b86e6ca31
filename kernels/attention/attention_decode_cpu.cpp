#include "attention_rows.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Pieces are (b, chunk of keys, g), g innermost: the groups' keys lie in the same pages.
void forward(const AttentionForward& p) {
    const AttentionInputs& in = p.in;
    const int64_t share = in.H / in.G, R = in.T * share, chunks = most(1, (in.S + kChunk - 1) / kChunk), step = in.E + 2;
    const int64_t pieces = in.B * chunks * in.G, cost = least(in.S, kChunk) * (in.D + in.E);
    if (pieces == 0 || R == 0) return;
    // Waking a thread costs some microseconds: a piece is worth about two, and a small call is one piece.
    const int64_t grain = pieces * cost <= 100000 ? pieces : most(1, 16000 / most(1, cost));
    parallel_for(pieces, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t g = i % in.G, c = i / in.G % chunks, b = i / in.G / chunks;
            float* out = p.partial + ((b * in.G + g) * chunks + c) * R * step;
            Rows rows;
            open_rows(rows, in, b, g, 0, R, static_cast<float*>(scratch(rows_bytes(in, R))));
            const int64_t low = most(c * kChunk, rows.low[0]), high = least((c + 1) * kChunk, rows.high[R - 1]);
            if (low < high) {
                rows_chunk(out, rows, in, low, high);
                continue;
            }
            for (int64_t r = 0; r < R; ++r) out[r * step + in.E] = -INFINITY, out[r * step + in.E + 1] = 0.0f;
        }
    });
    parallel_for(in.B * in.G, most(1, 65536 / (R * step * chunks)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            for (int64_t r = 0; r < R; ++r) {
                const int64_t b = i / in.G, t = r / share, h = i % in.G * share + r % share;
                merge_row(p, b, t, h, p.partial + (i * chunks * R + r) * step, R * step, chunks);
                if (in.T == 1) continue;  // every row sees the same keys
                bool finite = true;
                const float* y = p.y + output(in, b, t, h) * in.E;
                for (int64_t e = 0; e < in.E; ++e) finite = finite && std::isfinite(y[e]);
                if (!finite) one_row(p, b, i % in.G, r);  // see attention_cpu.cpp
            }
    });
}

}  // namespace

extern const AttentionDecodeKernels attention_decode_kernels = {forward, W * 3 / 4};

}  // namespace FASTLM_ISA
}  // namespace fastlm
