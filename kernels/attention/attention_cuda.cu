// Attention in CUDA C++; the contract is attention.h, the arguments are those of attention_triton.py. Head dimensions and strides
// are multiples of 16 elements, pointers of 16 bytes.
//
// Forward: FlashAttention-2 (Dao 2023). A block shares the keys and values, whose next tile cp.async fetches while this one is
// multiplied; scores, weights and sums never leave the registers.
#include "kernels/attention/attention_cuda_backward.h"
#include "kernels/attention/attention_cuda_decode.h"
#include "kernels/attention/attention_cuda_tile.h"

namespace attention {

template <class T, int HEAD, int WARPS, int N>
__device__ void forward(T* y, float* stats, Rows<T> q, Rows<T> k, Rows<T> v, Bias bias, Given g, int tiles) {
    constexpr int STRIDE = kStride<T, HEAD>, THREADS = 32 * WARPS, ROWS = 16 * WARPS, STAGE = 2 * N * STRIDE;
    FASTLM_DYNAMIC_SHARED(room);
    T *const qs = reinterpret_cast<T*>(room), *const stages = qs + ROWS * STRIDE;
    float* const weights = reinterpret_cast<float*>(stages + 2 * STAGE);
    const int tile = tiles - 1 - int(blockIdx.x) % tiles, b = int(blockIdx.x) / tiles / g.H, h = int(blockIdx.x) / tiles % g.H;
    const Sequence seq(g, b);
    const int begin = tile * ROWS, warp = warp_of();
    if (begin >= seq.queries) return;
    const T* const k0 = k.p + int64_t(b) * k.batch + int64_t(seq.first) * k.time + h / g.share * g.D;
    const T* const v0 = v.p + int64_t(b) * v.batch + int64_t(seq.first) * v.time + h / g.share * g.E;
    const float steep = bias.steep(g);
    const int last = smaller(begin + ROWS, seq.queries) - 1;
    const int from = seq.low(begin) / N * N, to = seq.high(last);  // keys that any row sees
    const int all_from = seq.low(last), all_to = seq.high(begin);  // keys that every row sees
    const auto fetch_tile = [&](int start) {
        T* const at = stages + (start - from) / N % 2 * STAGE;
        if (start < to) {
            fetch<T, HEAD, N, THREADS>(at, k0 + int64_t(start) * k.time, k.time, seq.keys - start, g.D);
            fetch<T, HEAD, N, THREADS>(at + N * STRIDE, v0 + int64_t(start) * v.time, v.time, seq.keys - start, g.E);
        }
        ptx::cp_async_commit();
    };
    fetch<T, HEAD, ROWS, THREADS>(qs, q.p + int64_t(b) * q.batch + int64_t(seq.first + begin) * q.time + h * g.D, q.time,
                                  seq.queries - begin, g.D);
    fetch_tile(from);
    float sums[HEAD / 8][4] = {}, top[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f};
    for (int start = from; start < to; start += N) {
        fetch_tile(start + N);
#ifndef FASTLM_PLANT_NO_WAIT  // a test of the emulator leaves it out
        ptx::cp_async_wait<1>();
#endif
        __syncthreads();
        const T* const ks = stages + (start - from) / N % 2 * STAGE;
        float s[N / 8][4];
        products<HEAD, N>(s, qs + warp * 16 * STRIDE, ks);
        finish<false, N>(s, g, seq, bias, b, h, begin + warp * 16, start, start < all_from || start + N > all_to);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float largest = top[r];
#pragma unroll
            for (int n = 0; n < N / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            largest = quad_max(largest);
            const float base = largest == NONE ? 0.0f : largest, shrink = weight<T>(top[r], base, steep);
            top[r] = largest;
            total[r] *= shrink;
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int j = 2 * r; j < 2 * r + 2; ++j) total[r] += s[n][j] = weight<T>(s[n][j], base, steep);
#pragma unroll
            for (int n = 0; n < HEAD / 8; ++n) sums[n][2 * r] *= shrink, sums[n][2 * r + 1] *= shrink;
        }
        accumulate<HEAD, N, HEAD>(sums, s, ks + N * STRIDE, weights + warp * kWeights<T, N>);
        __syncthreads();  // before the tile after the next comes here
    }
    ptx::cp_async_wait<0>();
    const int t0 = begin + warp * 16;
    const int64_t row0 = seq.row(g, b) + t0;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(total[r]);
        inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
        const int t = lane_of() / 4 + 8 * r;
        if (lane_of() % 4 || t0 + t >= seq.queries) continue;
        float* const at = stats + 2 * ((row0 + t) * g.H + h);
        at[0] = top[r] == NONE ? 0.0f : top[r], at[1] = inverse[r];
    }
    store<T, HEAD>(y + (row0 * g.H + h) * g.E, int64_t(g.H) * g.E, seq.queries - t0, g.E, sums, inverse[0], inverse[1]);
}

}  // namespace attention

#define FASTLM_GIVEN                                                                                                              \
    const int *lengths, int form, int T, int S, int H, int share, int D, int E, int q_batch, int q_time, int k_batch, int k_time, \
        int v_batch, int v_time, int bias_batch, int bias_head, int bias_time, int causal, int window, float scale, float unit
#define FASTLM_TAKEN                                                            \
    attention::Bias{bias, bias_batch, bias_head, bias_time}, attention::Given { \
        lengths, form, T, S, H, share, D, E, causal, window, scale, unit        \
    }
// X: the type of q, k, v, of a name; N: keys (kv: queries) of a tile.
#define FASTLM_FORM(X, NAME, HEAD, WARPS, N, BACK_WARPS, BACK_N)                                                                  \
    FASTLM_GLOBAL void __launch_bounds__(32 * WARPS, 1) attention_forward_##NAME##_##HEAD(                                        \
        X* y, float* stats, const X* q, const X* k, const X* v, const float* bias, FASTLM_GIVEN, int tiles) {                     \
        attention::forward<X, HEAD, WARPS, N>(y, stats, {q, q_batch, q_time}, {k, k_batch, k_time}, {v, v_batch, v_time},         \
                                              FASTLM_TAKEN, tiles);                                                               \
    }                                                                                                                             \
    FASTLM_KERNEL(attention_forward_##NAME##_##HEAD)                                                                              \
    FASTLM_GLOBAL void __launch_bounds__(32 * BACK_WARPS, 1) attention_backward_q_##NAME##_##HEAD(                                \
        X* dq, float* delta, const X* dy, const X* y, const float* stats, const X* q, const X* k, const X* v, const float* bias,  \
        FASTLM_GIVEN, int dq_batch, int dq_time, int tiles) {                                                                     \
        attention::backward_q<X, HEAD, BACK_WARPS, BACK_N>(dq, dq_batch, dq_time, delta, dy, y, stats, {q, q_batch, q_time},      \
                                                           {k, k_batch, k_time}, {v, v_batch, v_time}, FASTLM_TAKEN, tiles);      \
    }                                                                                                                             \
    FASTLM_KERNEL(attention_backward_q_##NAME##_##HEAD)                                                                           \
    FASTLM_GLOBAL void __launch_bounds__(32 * BACK_WARPS, 1) attention_backward_kv_##NAME##_##HEAD(                               \
        X* dk, X* dv, const float* delta, const X* dy, const float* stats, const X* q, const X* k, const X* v, const float* bias, \
        FASTLM_GIVEN, int dk_batch, int dk_time, int dv_batch, int dv_time, int tiles) {                                          \
        attention::backward_kv<X, HEAD, BACK_WARPS, BACK_N>(dk, dk_batch, dk_time, dv, dv_batch, dv_time, delta, dy, stats,       \
                                                            {q, q_batch, q_time}, {k, k_batch, k_time}, {v, v_batch, v_time},     \
                                                            FASTLM_TAKEN, tiles);                                                 \
    }                                                                                                                             \
    FASTLM_KERNEL(attention_backward_kv_##NAME##_##HEAD)
FASTLM_FORM(bfloat16, bf16, 64, 4, 64, 4, 64)
FASTLM_FORM(bfloat16, bf16, 128, 4, 64, 4, 32)
FASTLM_FORM(bfloat16, bf16, 256, 4, 32, 2, 16)
FASTLM_FORM(float, fp32, 64, 4, 32, 4, 32)
FASTLM_FORM(float, fp32, 128, 2, 16, 2, 16)
FASTLM_FORM(float, fp32, 256, 1, 8, 1, 16)

// The gradient of a bias is one form for all head dimensions.
#define FASTLM_BIAS(X, NAME, WARPS, N)                                                                                            \
    FASTLM_GLOBAL void __launch_bounds__(32 * WARPS, 1) attention_backward_bias_##NAME(                                           \
        float* dbias, const float* delta, const X* dy, const float* stats, const X* q, const X* k, const X* v, const float* bias, \
        FASTLM_GIVEN, int B, int batches, int heads, int row_tiles, int key_tiles) {                                              \
        attention::backward_bias<X, 64, WARPS, N>(dbias, delta, dy, stats, {q, q_batch, q_time}, {k, k_batch, k_time},            \
                                                  {v, v_batch, v_time}, FASTLM_TAKEN, B, batches, heads, row_tiles, key_tiles);   \
    }                                                                                                                             \
    FASTLM_KERNEL(attention_backward_bias_##NAME)
FASTLM_BIAS(bfloat16, bf16, 4, 64)
FASTLM_BIAS(float, fp32, 4, 32)

// Decoding. WAY: Narrow or Exact; X: the cache's type.
#define FASTLM_DECODE(WAY, NAME, X, CACHE, HEAD, WARPS)                                                                        \
    FASTLM_GLOBAL void __launch_bounds__(32 * WARPS, 1) attention_decode_##NAME##_##CACHE##_##HEAD(                            \
        float* partial, float* sums, const void* q, const X* k, const X* v, const float* bias, const int* table, FASTLM_GIVEN, \
        int q_narrow, int k_head, int v_head, int splits, int chunk, int table_row, int page, int pages) {                     \
        attention::decode<attention::WAY<X, HEAD>, X, HEAD, WARPS>(                                                            \
            {partial, sums, q, q_narrow, q_batch, q_time, splits, chunk, {table, table_row, page, pages}},                     \
            {k, k_batch, k_time, k_head}, {v, v_batch, v_time, v_head}, FASTLM_TAKEN);                                         \
    }                                                                                                                          \
    FASTLM_KERNEL(attention_decode_##NAME##_##CACHE##_##HEAD)
#define FASTLM_DECODES(HEAD, WARPS)                          \
    FASTLM_DECODE(Narrow, bf16, bfloat16, bf16, HEAD, WARPS) \
    FASTLM_DECODE(Narrow, bf16, int8_t, i8, HEAD, WARPS)     \
    FASTLM_DECODE(Exact, fp32, float, fp32, HEAD, WARPS)     \
    FASTLM_DECODE(Exact, fp32, bfloat16, bf16, HEAD, WARPS)  \
    FASTLM_DECODE(Exact, fp32, int8_t, i8, HEAD, WARPS)
FASTLM_DECODES(64, 4)
FASTLM_DECODES(128, 4)
FASTLM_DECODES(256, 2)

FASTLM_GLOBAL void __launch_bounds__(64)
    attention_combine(void* y, int narrow, const float* partial, const float* sums, int splits, int E) {
    attention::combine<64>(y, narrow, partial, sums, splits, E);
}
FASTLM_KERNEL(attention_combine)
