// What this machine can do at best: fused multiply-adds from registers, a read of memory and a copy. Measured, never assumed.
#pragma once

#include <cstdint>

namespace fastlm {

struct RoofFma {
    float* y;        // (pieces,)  keeps the compiler from dropping the work
    int64_t pieces;  // spread over the threads
    int64_t rounds;  // of kRoofChains vector multiply-adds in each piece
};

struct RoofRead {
    float* y;        // (ceil(n / kRoofPiece),)  sums
    const float* x;  // (n,)
    int64_t n;
};

struct RoofCopy {
    float* y;        // (n,)
    const float* x;  // (n,)
    int64_t n;
};

constexpr int64_t kRoofChains = 12;      // independent chains: two units, four cycles of latency, and some to spare
constexpr int64_t kRoofPiece = 1 << 16;  // floats that one piece reads or copies

struct RoofKernels {
    int64_t flops;  // of one round
    void (*fma)(const RoofFma&);
    void (*read)(const RoofRead&);
    void (*copy)(const RoofCopy&);
};

}  // namespace fastlm
