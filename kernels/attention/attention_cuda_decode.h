// Few queries against a long cache: decoding. Keys are split into chunks; a block takes one chunk of one group for all of its
// (query, head) pairs, so that keys and values are read once, and attention_combine joins the chunks in their order. No atomics:
// the same bits every run, and a sequence's bits do not depend on its neighbours.
//
// A warp takes every WARPS-th tile of the chunk and keeps its own ring of tiles in shared memory, which cp.async fills ahead: warps
// wait for nobody until the end, where their sums are joined in their order. NARROW: queries of bfloat16 and products by mma, 16
// rows by 16 keys; an int8 tile becomes bfloat16 first. Else float32: 8 rows by 8 keys, a key's four lanes taking 16 bytes in turn
// for scores, a lane its columns for sums.
#pragma once

#include "kernels/attention/attention_cuda_tile.h"

namespace attention {

// A cache's keys or values: (B, S, G, .), or pages (pages, page, G, .). Strides count elements.
template <class S> struct Store {
    const S* p;
    int batch, time, head;
};

// Where pages are: table (B, blocks), or null. A tile of keys lies within one page. A number that is no page's is taken for one
// that is: nothing else is read.
struct Pages {
    const int* table;
    int row, page, pages;  // row: from row to row of the table

    __device__ int64_t at(int b, int start, int batch, int time) const {
        if (!table) return int64_t(b) * batch + int64_t(start) * time;
        const int n = larger(0, smaller(table[int64_t(b) * row + start / page], pages - 1));
        return int64_t(n) * batch + int64_t(start % page) * time;
    }
};

// A tile of keys or values in shared memory: KEYS rows of HEAD elements. The rows of what mma reads are 16 bytes apart in the
// banks, others 64.
template <class S, int HEAD, int KEYS, bool NARROW> struct Tile {
    static constexpr bool BYTES = sizeof(S) == 1;
    static constexpr int WIDE = HEAD * int(sizeof(S));
    static constexpr int ROW = NARROW && !BYTES ? WIDE + 16 : WIDE % 128 ? WIDE : WIDE + 64;
    static constexpr int SCALES = KEYS * ROW;  // of int8, behind the rows
    static constexpr int SIZE = SCALES + (BYTES ? 4 * KEYS : 0);

    // Zeros beyond `count` rows and `width` elements.
    static __device__ void fetch(char* to, const S* from, int64_t stride, int count, int width) {
        constexpr int EACH = BYTES ? 4 : 16, PIECES = WIDE / EACH;
        const char* const source = reinterpret_cast<const char*>(from);
        for (int i = lane_of(); i < KEYS * PIECES; i += 32) {
            const int r = i / PIECES, c = i % PIECES * EACH;
            const bool there = r < count && c < width * int(sizeof(S));
            const char* const at = there ? source + r * stride * int(sizeof(S)) + c : source;
            if constexpr (BYTES) ptx::cp_async_4(to + r * ROW + c, at, there ? 4 : 0);  // rows are 4 bytes longer than D
            else ptx::cp_async_16(to + r * ROW + c, at, there ? 16 : 0);
        }
        if constexpr (BYTES) {
            const int r = lane_of();
            if (r < KEYS) ptx::cp_async_4(to + SCALES + 4 * r, r < count ? source + r * stride + width : source, r < count ? 4 : 0);
        }
    }
    static __device__ float scale(const char* tile, int key) {
        if constexpr (BYTES) return reinterpret_cast<const float*>(tile + SCALES)[key];
        else return 1.0f;
    }
};

__device__ inline float byte_of(uint32_t word, int i) { return float(int(word << (24 - 8 * i)) >> 24); }

// Numbers of four bytes in shared memory.
template <class S> __device__ inline void numbers(float* x, uint32_t word) {
    if constexpr (sizeof(S) == 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = byte_of(word, i);
    } else if constexpr (sizeof(S) == 2) {
        x[0] = ptx::from_bits(word << 16), x[1] = ptx::from_bits(word & 0xffff0000u);
    } else {
        x[0] = ptx::from_bits(word);
    }
}

struct alignas(16) Words {
    uint32_t w[4];
};

// Joins what several parts (chunks, warps) hold: the weight of one part's sums against the largest score of all.
__device__ inline float part_weight(float top, float best) { return exp2f((top - (best == NONE ? 0.0f : best)) * LOG2E); }

// What a block is told.
struct Decoding {
    float *partial, *sums;  // (B T H, splits, E) and (B T H, splits, 2): sums of values; the largest score and the sum of weights
    const void* q;
    int q_narrow, q_batch, q_time;  // q_narrow: q is bfloat16
    int splits, chunk;
    Pages pages;
};

// One (query, head) pair of a group.
struct Pair {
    int t, h, low, high;

    __device__ Pair(const Given& g, const Sequence& seq, int group, int row, int rows) {
        t = row / g.share, h = group * g.share + row % g.share;
        low = row < rows ? seq.low(t) : 0, high = row < rows ? seq.high(t) : 0;
    }
};

// A score from a product: scaled (the sign is in q), with a bias, -inf where hidden.
__device__ inline float finished(float s, float factor, const Bias& bias, int64_t bias_at, int c, const Pair& pair) {
    if (c < pair.low || c >= pair.high) return NONE;
    s *= factor;
    return bias.p ? s + bias.p[bias_at + c] : s;
}

// Sixteen rows on tensor cores.
template <class S, int HEAD> struct Narrow {
    static constexpr int KEYS = 16, ROWS = 16, STRIDE = kStride<bfloat16, HEAD>;
    using Keys = Tile<S, HEAD, KEYS, true>;
    static constexpr int QUERIES = ROWS * STRIDE * 2,
                         EXTRA = Keys::BYTES ? KEYS * STRIDE * 2 : 0;  // shared memory: block's, warp's
    float sums[HEAD / 8][4] = {}, top[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f};

    static __device__ void put_query(char* qs, int r, int d, float x) {
        reinterpret_cast<bfloat16*>(qs)[r * STRIDE + d] = to_bfloat16(x);
    }
    // The tile as mma reads it.
    static __device__ const bfloat16* widened(const char* tile, char* extra) {
        if constexpr (Keys::BYTES) {
            __syncwarp();  // what was here may still be read
            bfloat16* const to = reinterpret_cast<bfloat16*>(extra);
            for (int i = lane_of(); i < KEYS * HEAD / 4; i += 32) {
                const int r = i / (HEAD / 4), c = i % (HEAD / 4) * 4;
                const uint32_t word = *reinterpret_cast<const uint32_t*>(tile + r * Keys::ROW + c);
                uint32_t* const out = reinterpret_cast<uint32_t*>(to + r * STRIDE + c);
                out[0] = ptx::pack(byte_of(word, 0), byte_of(word, 1)), out[1] = ptx::pack(byte_of(word, 2), byte_of(word, 3));
            }
            __syncwarp();
            return to;
        } else {
            return reinterpret_cast<const bfloat16*>(tile);
        }
    }
    __device__ void add(const char* qs, const char* k, const char* v, char* extra, const Given& g, const Bias& bias, int b,
                        const Pair (&pairs)[2], int start) {
        float s[KEYS / 8][4];
        products<HEAD, KEYS>(s, reinterpret_cast<const bfloat16*>(qs), widened(k, extra));
        const int column = 2 * (lane_of() % 4);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int64_t at = int64_t(b) * bias.batch + int64_t(pairs[r].h) * bias.head + int64_t(pairs[r].t) * bias.time;
            float largest = top[r];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int key = n * 8 + column + j;
                    float& x = s[n][2 * r + j];
                    x = finished(x, fabsf(g.scale) * Keys::scale(k, key), bias, at, start + key, pairs[r]);
                    largest = fmaxf(largest, x);
                }
            largest = quad_max(largest);
            const float base = largest == NONE ? 0.0f : largest, shrink = weight<bfloat16>(top[r], base, LOG2E);
            top[r] = largest, total[r] *= shrink;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& x = s[n][2 * r + j];
                    x = weight<bfloat16>(x, base, LOG2E);
                    total[r] += x;
                    x *= Keys::scale(v, n * 8 + column + j);
                }
#pragma unroll
            for (int n = 0; n < HEAD / 8; ++n) sums[n][2 * r] *= shrink, sums[n][2 * r + 1] *= shrink;
        }
        accumulate<HEAD, KEYS, HEAD>(sums, s, widened(v, extra), nullptr);
    }
    // Rows of HEAD sums, and each row's numbers.
    __device__ void close(float* out, float* tops, float* totals) {
        const int row = lane_of() / 4, column = 2 * (lane_of() % 4);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float all = quad_sum(total[r]);
            if (lane_of() % 4 == 0) tops[row + 8 * r] = top[r], totals[row + 8 * r] = all;
#pragma unroll
            for (int n = 0; n < HEAD / 8; ++n)
                store_two(out + (row + 8 * r) * HEAD + n * 8 + column, sums[n][2 * r], sums[n][2 * r + 1]);
        }
    }
    static __device__ int row_of(int r) { return lane_of() / 4 + 8 * r; }  // of the lane's pairs
};

// Eight rows in float32. In a score's part the lane is key lane / 4 and, once summed, rows 2 (lane % 4) and the next.
template <class S, int HEAD> struct Exact {
    static constexpr int KEYS = 8, ROWS = 8, EACH = 16 / sizeof(S), COLUMNS = HEAD / 32;
    using Keys = Tile<S, HEAD, KEYS, false>;
    static constexpr int QUERIES = ROWS * HEAD * 4,
                         EXTRA = (KEYS + 1) * ROWS * 4;  // extra: weights by key and row; what rows shrink by
    float sums[ROWS][COLUMNS] = {}, top[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f};

    static __device__ void put_query(char* qs, int r, int d, float x) { reinterpret_cast<float*>(qs)[r * HEAD + d] = x; }

    __device__ void add(const char* qs, const char* k, const char* v, char* extra, const Given& g, const Bias& bias, int b,
                        const Pair (&pairs)[2], int start) {
        const float* const queries = reinterpret_cast<const float*>(qs);
        float* const weights = reinterpret_cast<float*>(extra);
        const int key = lane_of() / 4, quarter = lane_of() % 4;
        float part[ROWS][4] = {};
#pragma unroll 2
        for (int i = quarter; i < HEAD / EACH; i += 4) {
            const Words piece = *reinterpret_cast<const Words*>(k + key * Keys::ROW + 16 * i);
            float x[EACH];
#pragma unroll
            for (int w = 0; w < 4; ++w) numbers<S>(x + w * (EACH / 4), piece.w[w]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int e = 0; e < EACH; e += 4) {
                    const Four y = *reinterpret_cast<const Four*>(queries + r * HEAD + i * EACH + e);
                    part[r][0] = fmaf(x[e], y.x, part[r][0]), part[r][1] = fmaf(x[e + 1], y.y, part[r][1]);
                    part[r][2] = fmaf(x[e + 2], y.z, part[r][2]), part[r][3] = fmaf(x[e + 3], y.w, part[r][3]);
                }
        }
        // The four lanes of a key add their shares, and each keeps two rows.
        float half[4], s[2];
        const bool upper = quarter & 2, odd = quarter & 1;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float low = (part[r][0] + part[r][2]) + (part[r][1] + part[r][3]);
            const float high = (part[r + 4][0] + part[r + 4][2]) + (part[r + 4][1] + part[r + 4][3]);
            half[r] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, 2);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
            s[r] = (odd ? half[r + 2] : half[r]) + __shfl_xor_sync(0xffffffffu, odd ? half[r] : half[r + 2], 1);
        const float factor = fabsf(g.scale) * Keys::scale(k, key), value = Keys::scale(v, key);
        __syncwarp();  // the weights before may still be read
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int64_t at = int64_t(b) * bias.batch + int64_t(pairs[r].h) * bias.head + int64_t(pairs[r].t) * bias.time;
            s[r] = finished(s[r], factor, bias, at, start + key, pairs[r]);
            float largest = fmaxf(top[r], s[r]);
#pragma unroll
            for (int d = 4; d < 32; d *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
            const float base = largest == NONE ? 0.0f : largest, shrink = weight<float>(top[r], base, LOG2E);
            const float p = weight<float>(s[r], base, LOG2E);
            top[r] = largest, total[r] = fmaf(total[r], shrink, p);
            weights[key * ROWS + 2 * quarter + r] = p * value;
            if (key == 0) weights[KEYS * ROWS + 2 * quarter + r] = shrink;
        }
#ifndef FASTLM_PLANT_DECODE_NO_WARP_BARRIER  // a test of the emulator leaves it out
        __syncwarp();
#endif
        float sum[ROWS][COLUMNS] = {};  // a chain for these keys: one over all would round worse than NumPy's sum
#pragma unroll 2
        for (int c = 0; c < KEYS; ++c) {
            float x[COLUMNS];
            values(x, v + c * Keys::ROW);
#pragma unroll
            for (int r = 0; r < ROWS; r += 4) {
                const Four p = *reinterpret_cast<const Four*>(weights + c * ROWS + r);
#pragma unroll
                for (int e = 0; e < COLUMNS; ++e) {
                    sum[r][e] = fmaf(p.x, x[e], sum[r][e]), sum[r + 1][e] = fmaf(p.y, x[e], sum[r + 1][e]);
                    sum[r + 2][e] = fmaf(p.z, x[e], sum[r + 2][e]), sum[r + 3][e] = fmaf(p.w, x[e], sum[r + 3][e]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int e = 0; e < COLUMNS; ++e) sums[r][e] = fmaf(sums[r][e], weights[KEYS * ROWS + r], sum[r][e]);
    }
    // The lane's columns of a row of values: two neighbours (four of 8 columns) at a time.
    static __device__ void values(float* x, const char* row) {
        constexpr int RUN = COLUMNS < 4 ? COLUMNS : 4;
#pragma unroll
        for (int i = 0; i < COLUMNS; i += RUN) {
            const char* const at = row + (i * 32 + lane_of() * RUN) * int(sizeof(S));
            if constexpr (RUN * sizeof(S) == 2) {
                const uint32_t word = *reinterpret_cast<const uint16_t*>(at);
                x[i] = byte_of(word, 0), x[i + 1] = byte_of(word, 1);
            } else {
                constexpr int COUNT = RUN * int(sizeof(S)) / 4;
                struct alignas(4 * COUNT) Piece {
                    uint32_t w[COUNT];
                };
                const Piece piece = *reinterpret_cast<const Piece*>(at);
#pragma unroll
                for (int w = 0; w < COUNT; ++w) numbers<S>(x + i + w * (4 / int(sizeof(S))), piece.w[w]);
            }
        }
    }
    __device__ void close(float* out, float* tops, float* totals) {
        constexpr int RUN = COLUMNS < 4 ? COLUMNS : 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int d = 4; d < 32; d *= 2) total[r] += __shfl_xor_sync(0xffffffffu, total[r], d);
            if (lane_of() < 4) tops[2 * lane_of() + r] = top[r], totals[2 * lane_of() + r] = total[r];
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int e = 0; e < COLUMNS; ++e) out[r * HEAD + e / RUN * RUN * 32 + lane_of() * RUN + e % RUN] = sums[r][e];
    }
    static __device__ int row_of(int r) { return 2 * (lane_of() % 4) + r; }
};

template <class Way, class S, int HEAD, int WARPS> __device__ void decode(Decoding d, Store<S> k, Store<S> v, Bias bias, Given g) {
    using Keys = typename Way::Keys;
    constexpr int KEYS = Way::KEYS, ROWS = Way::ROWS, STAGE = 2 * Keys::SIZE, MINE = 2 * STAGE + Way::EXTRA;
    static_assert(MINE >= ROWS * HEAD * 4, "a warp's sums take the place of its tiles");
    FASTLM_DYNAMIC_SHARED(room);
    FASTLM_SHARED(float, tops, WARPS* ROWS);
    FASTLM_SHARED(float, totals, WARPS* ROWS);
    const int warp = warp_of(), G = g.H / g.share;
    char *const qs = room, *const stages = room + Way::QUERIES + warp * MINE, *const extra = stages + 2 * STAGE;
    const int split = int(blockIdx.x) % d.splits, group = int(blockIdx.x) / d.splits % G, b = int(blockIdx.x) / d.splits / G;
    const int first = int(blockIdx.y) * ROWS, rows = smaller(ROWS, g.T * g.share - first);
    const Sequence seq(g, b);
    // Keys of the chunk that any row sees, and the tiles that they lie in; this warp's are those of one remainder.
    const int from = larger(split * d.chunk, seq.low(first / g.share));
    const int to = smaller(split * d.chunk + d.chunk, seq.high((first + rows - 1) / g.share));
    const int begin = from / KEYS, end = from < to ? (to + KEYS - 1) / KEYS : begin;
    const auto fetch_tile = [&](int tile, int i) {
        if (tile < end) {
            const int start = tile * KEYS;
            char* const at = stages + i % 2 * STAGE;
            Keys::fetch(at, k.p + d.pages.at(b, start, k.batch, k.time) + group * k.head, k.time, seq.keys - start, g.D);
            Keys::fetch(at + Keys::SIZE, v.p + d.pages.at(b, start, v.batch, v.time) + group * v.head, v.time, seq.keys - start,
                        g.E);
        }
        ptx::cp_async_commit();
    };
    int tile = begin + (warp + WARPS - begin % WARPS) % WARPS;
    fetch_tile(tile, 0);
    const float sign = g.scale > 0.0f ? 1.0f : g.scale < 0.0f ? -1.0f : 0.0f;
    for (int i = int(threadIdx.x); i < ROWS * HEAD; i += 32 * WARPS) {
        const int r = i / HEAD, e = i % HEAD, t = (first + r) / g.share, h = group * g.share + (first + r) % g.share;
        float x = 0.0f;
        if (r < rows && e < g.D && begin < end) {
            const int64_t at = int64_t(b) * d.q_batch + int64_t(t) * d.q_time + h * g.D + e;
            x = d.q_narrow ? to_float(static_cast<const bfloat16*>(d.q)[at]) : static_cast<const float*>(d.q)[at];
        }
        Way::put_query(qs, r, e, x * sign);
    }
    const Pair pairs[2] = {{g, seq, group, first + Way::row_of(0), first + rows},
                           {g, seq, group, first + Way::row_of(1), first + rows}};
    Way way;
    __syncthreads();
    for (int i = 0; tile < end; tile += WARPS, ++i) {
        fetch_tile(tile + WARPS, i + 1);
#ifndef FASTLM_PLANT_DECODE_NO_WAIT  // a test of the emulator leaves it out
        ptx::cp_async_wait<1>();
#endif
        __syncwarp();
        const char* const at = stages + i % 2 * STAGE;
        way.add(qs, at, at + Keys::SIZE, extra, g, bias, b, pairs, tile * KEYS);
        __syncwarp();  // before the tile after the next comes here
    }
    ptx::cp_async_wait<0>();
    __syncwarp();
    way.close(reinterpret_cast<float*>(stages), tops + warp * ROWS, totals + warp * ROWS);
#ifndef FASTLM_PLANT_DECODE_NO_BARRIER  // a test of the emulator leaves it out
    __syncthreads();
#endif
    for (int r = warp; r < rows; r += WARPS) {
        float best = NONE, all = 0.0f, share[WARPS];
        for (int w = 0; w < WARPS; ++w) best = fmaxf(best, tops[w * ROWS + r]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) share[w] = part_weight(tops[w * ROWS + r], best), all += share[w] * totals[w * ROWS + r];
        const int t = (first + r) / g.share, h = group * g.share + (first + r) % g.share;
        const int64_t at = ((int64_t(b) * g.T + t) * g.H + h) * d.splits + split;
        if (lane_of() == 0) d.sums[2 * at] = best, d.sums[2 * at + 1] = all;
        if (best == NONE && all == 0.0f) continue;  // nothing seen here: combine reads no sums
        for (int e = lane_of(); e < g.E; e += 32) {
            float x = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w)
                x = fmaf(share[w], reinterpret_cast<const float*>(room + Way::QUERIES + w * MINE)[r * HEAD + e], x);
            d.partial[at * g.E + e] = x;
        }
    }
}

// y (rows, E): a block joins the chunks of one row, in their order.
template <int THREADS> __device__ void combine(void* y, int narrow, const float* partial, const float* sums, int splits, int E) {
    const int64_t row = blockIdx.x;
    const float* const numbers = sums + 2 * row * splits;
    float best = NONE, all = 0.0f;
    for (int i = 0; i < splits; ++i) best = fmaxf(best, numbers[2 * i]);
    for (int i = 0; i < splits; ++i) all = fmaf(part_weight(numbers[2 * i], best), numbers[2 * i + 1], all);
    const float inverse = all == 0.0f ? 0.0f : 1.0f / all;
    for (int e = int(threadIdx.x); e < E; e += THREADS) {
        float x = 0.0f;
#pragma unroll 4
        for (int i = 0; i < splits; ++i) {
            const float top = numbers[2 * i];
            if (top != NONE || numbers[2 * i + 1] != 0.0f) x = fmaf(part_weight(top, best), partial[(row * splits + i) * E + e], x);
        }
        x *= inverse;
        if (narrow) static_cast<bfloat16*>(y)[row * E + e] = to_bfloat16(x);
        else static_cast<float*>(y)[row * E + e] = x;
    }
}

}  // namespace attention
