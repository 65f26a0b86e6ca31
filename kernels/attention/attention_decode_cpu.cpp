#include "attention_rows.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kAloneKeys = 12000;  // numbers of keys and values below which waking a thread costs more than it gives
constexpr int64_t kNear = 1 << 13;     // numbers that the first cache holds
constexpr int64_t kLead = 1 << 15;     // bytes that are on their way while others are read

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

// The rows of `groups` groups are finished, `width` floats each. They may lie in this thread's scratch memory.
void close(const AttentionForward& p, int64_t b, int64_t g, int64_t groups, const float* totals, int64_t width) {
    const int64_t share = p.in.H / p.in.G, R = p.in.T * share;
    bool bad[kMaxRows];
    for (int64_t i = 0; i < groups * R; ++i)
        bad[i] = !close_row(p, b, i % R / share, (g + i / R) * share + i % share, totals + i * width);
    if (p.in.T == 1) return;
    // Rows see different keys: one that is inf or nan may have reached a row that it is hidden from. See attention_cpu.cpp.
    for (int64_t i = 0; i < groups * R; ++i)
        if (bad[i]) one_row(p, b, g + i / R, i % R);
}

// One piece of a call: the keys [low, high) of one chunk, for `groups` groups from g on.
struct Piece {
    int64_t b, g, groups, chunk, low, high;
};

// Its keys, or its values.
template <class S, bool Keys> Ahead::Run run_of(const AttentionInputs& p, const Piece& at) {
    constexpr int64_t size = sizeof(typename S::T);
    if (at.low >= at.high) return {nullptr, 0, 0, 0};
    const int64_t width = at.groups * ((Keys ? p.D : p.E) + S::kExtra) * size;
    const void* from = Keys ? key<S>(p, at.b, at.low, at.g) : value<S>(p, at.b, at.low, at.g);
    return {static_cast<const char*>(from), at.high - at.low, width, (Keys ? p.k_time : p.v_time) * size};
}

// Pieces are (b, chunk of keys, some neighbouring groups): as many groups as leave each thread several pieces, since what lies
// together is best read together.
void forward(const AttentionForward& p) {
    const AttentionInputs& in = p.in;
    const int64_t R = in.T * (in.H / in.G), chunks = most(1, chunks_of(longest(in))), width = row_width(in);
    if (in.B * in.G * R == 0) return;
    // Waking a thread costs some microseconds: a small call is one piece, and then neighbours stay together.
    const bool small = in.B * in.G * longest(in) * (in.D + in.E) <= kAloneKeys;
    int64_t groups = least(in.G, most(1, kMaxRows / R));
    while (!small && groups > 1 && in.B * chunks * ((in.G + groups - 1) / groups) < 4 * num_threads()) groups = (groups + 1) / 2;
    const int64_t blocks = (in.G + groups - 1) / groups, pieces = in.B * chunks * blocks;
    const int64_t cost = least(longest(in), kChunk) * groups * (in.D + in.E);
    const int64_t grain = small ? pieces : most(1, 8000 / most(1, cost));
    const bool near = in.B * in.G * longest(in) * (in.D + in.E) <= kNear;
    const bool far = !near && (!in.table || in.page % kChunk == 0);  // a chunk in one page lies as it does without pages
    parallel_for(pieces, grain, [&](int64_t begin, int64_t end) {
        const auto piece = [&](int64_t i) {
            Piece at{i / blocks / chunks, i % blocks * groups, 0, i / blocks % chunks, 0, 0};
            at.groups = least(groups, in.G - at.g);
            int64_t unused;
            visible(in, at.b, 0, at.low, unused), visible(in, at.b, in.T - 1, unused, at.high);
            at.low = most(at.chunk * kChunk, at.low), at.high = least((at.chunk + 1) * kChunk, at.high);
            return at;
        };
        for (int64_t i = begin; i < end; ++i) {
            const Piece at = piece(i);
            const int64_t b = at.b, g = at.g, n = at.groups, c = at.chunk;
            if (c * kChunk >= length(in, b) && chunks > 1) continue;
            const int64_t own = chunks == 1 ? n * R * width : 0;
            float* memory =
                static_cast<float*>(scratch(size_t(own + packed_floats(in, R) + n * rows_floats(in, R)) * sizeof(float)));
            float *packed = memory + own, *packed_rows = packed + packed_floats(in, R);
            const int64_t step = chunks * R * width;
            float* out = chunks == 1 ? memory : p.partial + ((b * in.G + g) * chunks + c) * R * width;
            Ahead ahead;
            if (far)
                each_store(in, [&](auto kind) {
                    using S = decltype(kind);
                    ahead.add(run_of<S, true>(in, at)), ahead.add(run_of<S, false>(in, at));
                    if (i + 1 < pieces) ahead.add(run_of<S, true>(in, piece(i + 1)));
                });
            ahead.step(kLead);
            Rows rows[kMaxRows];
            for (int64_t k = 0; k < n; ++k) open_rows(rows[k], in, b, g + k, 0, R, packed_rows + k * rows_floats(in, R));
            if (at.low < at.high) {
                rows_chunk(out, step, rows, n, in, at.low, at.high, packed, ahead);
            } else {
                for (int64_t k = 0; k < n; ++k)
                    for (int64_t r = 0; r < R; ++r) open_total(out + k * step + r * width, in);
            }
            if (chunks == 1) close(p, b, g, n, out, width);
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
            close(p, i / in.G, i % in.G, 1, totals, width);
        }
    });
}

}  // namespace

extern const AttentionDecodeKernels attention_decode_kernels = {workspace, forward, kMaxRows};

}  // namespace FASTLM_ISA
}  // namespace fastlm
