#include "dequantize.h"

#include "blocks.h"
#include "csrc/runtime/parallel.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kPiece = 1 << 15;  // weights that one piece decodes, about: 128 KiB of output

template <class Block> void rows(const DequantizeForward& p) {
    const int64_t blocks = p.C / Block::kValues, bytes = blocks * Block::kBytes;
    parallel_for(p.R, p.C >= kPiece ? 1 : kPiece / p.C, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const uint8_t* b = p.blocks + (p.ids ? p.ids[r] : p.ids32 ? p.ids32[r] : r) * bytes;
            float* w = p.w + r * p.C;
            for (int64_t i = 0; i < blocks; ++i) Block::decode(b + i * Block::kBytes, w + i * Block::kValues);
        }
    });
}

void forward(const DequantizeForward& p) {
    if (p.R == 0 || p.C == 0) return;
    switch (p.kind) {
        case Quant::Q4_0: return rows<BlockQ4_0>(p);
        case Quant::Q4_1: return rows<BlockQ4_1>(p);
        case Quant::Q5_0: return rows<BlockQ5_0>(p);
        case Quant::Q5_1: return rows<BlockQ5_1>(p);
        case Quant::Q8_0: return rows<BlockQ8_0>(p);
        case Quant::Q4_K: return rows<BlockQ4_K>(p);
        case Quant::Q5_K: return rows<BlockQ5_K>(p);
        case Quant::Q6_K: return rows<BlockQ6_K>(p);
    }
}

}  // namespace

extern const DequantizeKernels dequantize_kernels = {forward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
