// Matrix products in CUDA C++; the contract is matmul.h, on float32 or bfloat16 with float32 sums.
//
// bfloat16: tensor cores of a warp fed by cp.async (sm_80 and later), and on sm_90a of a warpgroup fed by TMA. float32: exact
// multiply-adds, one chain over k. Which one the host chooses is in matmul_gpu.py.
#include "kernels/matmul/hopper_cuda.h"

namespace {

constexpr int THREADS = 256, TILE = 128;

// --- bfloat16 by mma: tiles of 128 x 128, 32 deep, in four stages; eight warps of 64 x 32 each ---

constexpr int DEPTH = 32, STAGES = 4, OPERAND = TILE * DEPTH * 2, STAGE = 2 * OPERAND;

// Where 16 bytes lie: of rows of 4 pieces (k major) or of 16 (rows of k), turned so that eight rows meet all banks.
template <bool K_MAJOR> __device__ __forceinline__ int piece(int row, int at) {
    return K_MAJOR ? (row * 4 + (at ^ (row / 2 & 3))) * 16 : (row * 16 + (at ^ (row & 7))) * 16;
}

// 128 rows or columns from `first` on, 32 k from k0 on, of a matrix stored (count, K) or (K, count).
template <bool K_MAJOR>
__device__ __forceinline__ void fetch(char* shared, const bfloat16* x, int first, int count, int k0, int K) {
#pragma unroll
    for (int j = 0; j < OPERAND / 16 / THREADS; ++j) {
        const int i = int(threadIdx.x) + j * THREADS, row = K_MAJOR ? i / 4 : i / 16, at = K_MAJOR ? i % 4 : i % 16;
        const int mn = K_MAJOR ? first + row : first + at * 8, k = K_MAJOR ? k0 + at * 8 : k0 + row;
        const bool there = mn < count && k < K;
        const bfloat16* from = K_MAJOR ? x + int64_t(mn) * K + k : x + int64_t(k) * count + mn;
        ptx::cp_async_16(shared + piece<K_MAJOR>(row, at), there ? from : x, there ? 16 : 0);
    }
}

template <class C, bool A_T, bool B_T>
__device__ __forceinline__ void multiply(const Output<C, bfloat16>& out, const bfloat16* a, const bfloat16* b, int K, Place tile) {
    FASTLM_DYNAMIC_SHARED(memory);
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, m0 = tile.m * TILE, n0 = tile.n * TILE;
    const int wm = warp / 4 * 64, wn = warp % 4 * 32, steps = (K + DEPTH - 1) / DEPTH;
    const auto load = [&](int step) {
        char* stage = memory + step % STAGES * STAGE;
        if (step < steps) {
            fetch<!A_T>(stage, a, m0, out.M, step * DEPTH, K);
            fetch<B_T>(stage + OPERAND, b, n0, out.N, step * DEPTH, K);
        }
        ptx::cp_async_commit();
    };
    float sums[4][4][4] = {};  // of rows 16 i, columns 8 j: as mma has them
    const int row = m0 + wm + lane / 4, column = n0 + wn + lane % 4 * 2;
    if (out.accumulate)
        each_part(sums, [&](int i, float (&own)[4][4]) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h) out.start(row + 16 * i + 8 * h, column + 8 * j, own[j][2 * h], own[j][2 * h + 1]);
        });
    for (int step = 0; step < STAGES - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<STAGES - 2>();
        __syncthreads();  // this stage is there for all, and the one before is free
        load(step + STAGES - 1);
        const char *as = memory + step % STAGES * STAGE, *bs = as + OPERAND;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            uint32_t x[4][4], y[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int m = wm + 16 * i;
                if (A_T) ptx::ldmatrix_x4_trans(x[i], as + piece<false>(k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2));
                else ptx::ldmatrix_x4(x[i], as + piece<true>(m + lane % 16, k / 8 + lane / 16));
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int n = wn + 16 * j;
                if (B_T) ptx::ldmatrix_x4(y[j], bs + piece<true>(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
                else ptx::ldmatrix_x4_trans(y[j], bs + piece<false>(k + lane % 16, n / 8 + lane / 16));
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) ptx::mma_16816(sums[i][j], x[i], y[j / 2] + 2 * (j % 2));
        }
    }
    each_part(sums, [&](int i, float (&own)[4][4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) out.finish(row + 16 * i + 8 * h, column + 8 * j, own[j][2 * h], own[j][2 * h + 1]);
    });
}

// --- float32: tiles of 128 x 128, 16 deep, two in shared memory; a thread has 8 x 8 sums ---

constexpr int DEEP = 16, ROW = TILE + 4;  // the four keep columns apart in the banks

// Four neighbours of a row, as float32; zero where they are not there. Rows of a multiple of four elements are read at once.
template <class T> __device__ __forceinline__ void four(float* v, const T* x, int64_t at, int left, bool whole) {
    if (whole && left > 0) {
        struct alignas(4 * sizeof(T)) Four {
            T v[4];
        };
        const Four f = *reinterpret_cast<const Four*>(x + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = to_float(f.v[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = i < left ? to_float(x[at + i]) : 0.0f;
    }
}

// This thread's eight elements of 128 rows or columns and 16 k: into registers, and from there to shared memory, (k, 128).
template <bool K_MAJOR, class T> struct Portion {
    float v[2][4];

    __device__ __forceinline__ void read(const T* x, int first, int count, int k0, int K) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int mn = first + (K_MAJOR ? int(threadIdx.x) / 4 + 64 * j : int(threadIdx.x) % 32 * 4);
            const int k = k0 + (K_MAJOR ? int(threadIdx.x) % 4 * 4 : int(threadIdx.x) / 32 + 8 * j);
            if (K_MAJOR) four(v[j], x, int64_t(mn) * K + k, mn < count ? K - k : 0, K % 4 == 0);
            else four(v[j], x, int64_t(k) * count + mn, k < K ? count - mn : 0, count % 4 == 0);
        }
    }
    __device__ __forceinline__ void write(float* shared) const {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (K_MAJOR) shared[(int(threadIdx.x) % 4 * 4 + i) * ROW + int(threadIdx.x) / 4 + 64 * j] = v[j][i];
                else shared[(int(threadIdx.x) / 32 + 8 * j) * ROW + int(threadIdx.x) % 32 * 4 + i] = v[j][i];
            }
    }
};

template <class B, bool A_T, bool B_T>
__device__ __forceinline__ void multiply_exactly(const Output<float, float>& out, const float* a, const B* b, int K, Place tile) {
    FASTLM_DYNAMIC_SHARED(memory);
    float *as = reinterpret_cast<float*>(memory), *bs = as + 2 * DEEP * ROW;
    const int x = int(threadIdx.x) % 16 * 4, y = int(threadIdx.x) / 16 * 4, m0 = tile.m * TILE, n0 = tile.n * TILE;
    float sums[8][8] = {};
    const auto row = [&](int i) { return m0 + y + i % 4 + i / 4 * 64; };
    const auto column = [&](int j) { return n0 + x + j % 4 + j / 4 * 64; };
    if (out.accumulate)
        each_part(sums, [&](int i, float (&own)[8]) {
#pragma unroll
            for (int j = 0; j < 8; j += 2) out.start(row(i), column(j), own[j], own[j + 1]);
        });
    Portion<!A_T, float> pa;
    Portion<B_T, B> pb;
    pa.read(a, m0, out.M, 0, K);
    pb.read(b, n0, out.N, 0, K);
    pa.write(as);
    pb.write(bs);
    __syncthreads();
    for (int k0 = 0, turn = 0; k0 < K; k0 += DEEP, turn ^= 1) {
        const bool more = k0 + DEEP < K;
        if (more) {
            pa.read(a, m0, out.M, k0 + DEEP, K);
            pb.read(b, n0, out.N, k0 + DEEP, K);
        }
        const float *at = as + turn * DEEP * ROW, *bt = bs + turn * DEEP * ROW;
#pragma unroll
        for (int k = 0; k < DEEP; ++k) {
            float u[8], v[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) u[i] = at[k * ROW + y + i % 4 + i / 4 * 64], v[i] = bt[k * ROW + x + i % 4 + i / 4 * 64];
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(u[i], v[j], sums[i][j]);
        }
        if (more) {
            pa.write(as + (turn ^ 1) * DEEP * ROW);
            pb.write(bs + (turn ^ 1) * DEEP * ROW);
        }
        __syncthreads();
    }
    each_part(sums, [&](int i, float (&own)[8]) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) out.finish(row(i), column(j), own[j], own[j + 1]);
    });
}

// The arguments of a batch's matrix. flags: 8 accumulate, 16 a and 32 b differ by the matrix.
template <class C, class A, class B> struct Matrix {
    Output<C, A> out;
    const A* a;
    const B* b;
    Place tile;

    __device__ __forceinline__ Matrix(C* c, C* z, const A* a_, const B* b_, const A* bias, const C* residual, int M, int N, int K,
                                      int flags, int activation) {
        const int tiles_m = (M + TILE - 1) / TILE, tiles_n = (N + TILE - 1) / TILE;
        const int64_t matrix = int(blockIdx.x) / (tiles_m * tiles_n), at = matrix * M * N;
        out = {c + at, z ? z + at : z, bias, residual ? residual + at : residual, M, N, activation, (flags & 8) != 0};
        a = flags & 16 ? a_ + matrix * M * K : a_;
        b = flags & 32 ? b_ + matrix * K * N : b_;
        tile = place(int(blockIdx.x) % (tiles_m * tiles_n), tiles_m, tiles_n);
    }
};

}  // namespace

#define FASTLM_FORM(name, C, A, B, body, ...)                                                                                \
    FASTLM_GLOBAL void __launch_bounds__(THREADS) name(C* c, C* z, const A* a, const B* b, const A* bias, const C* residual, \
                                                       int M, int N, int K, int flags, int activation) {                     \
        const Matrix<C, A, B> p(c, z, a, b, bias, residual, M, N, K, flags, activation);                                     \
        body<__VA_ARGS__>(p.out, p.a, p.b, K, p.tile);                                                                       \
    }                                                                                                                        \
    FASTLM_KERNEL(name)
// Named by the types of a, b and c, and by what is transposed.
FASTLM_FORM(matmul_bf16_bf16_bf16_nn, bfloat16, bfloat16, bfloat16, multiply, bfloat16, false, false)
FASTLM_FORM(matmul_bf16_bf16_bf16_nt, bfloat16, bfloat16, bfloat16, multiply, bfloat16, false, true)
FASTLM_FORM(matmul_bf16_bf16_bf16_tn, bfloat16, bfloat16, bfloat16, multiply, bfloat16, true, false)
FASTLM_FORM(matmul_bf16_bf16_fp32_nt, float, bfloat16, bfloat16, multiply, float, false, true)
FASTLM_FORM(matmul_bf16_bf16_fp32_tn, float, bfloat16, bfloat16, multiply, float, true, false)
FASTLM_FORM(matmul_fp32_fp32_fp32_nn, float, float, float, multiply_exactly, float, false, false)
FASTLM_FORM(matmul_fp32_fp32_fp32_nt, float, float, float, multiply_exactly, float, false, true)
FASTLM_FORM(matmul_fp32_fp32_fp32_tn, float, float, float, multiply_exactly, float, true, false)
FASTLM_FORM(matmul_fp32_bf16_fp32_nn, float, float, bfloat16, multiply_exactly, bfloat16, false, false)
FASTLM_FORM(matmul_fp32_bf16_fp32_nt, float, float, bfloat16, multiply_exactly, bfloat16, false, true)
