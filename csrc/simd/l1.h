// Which rows of a matrix can be read side by side where they lie.
#pragma once

#include <cstdint>

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Whether rows this far apart, pages but for a few bytes, share one place in the first-level cache, which holds fewer lines of one
// than a microkernel reads rows.
inline bool share_l1(int64_t bytes) {
    constexpr int64_t kPage = 4096, kFew = 16;
    const int64_t over = bytes % kPage;
    return over < kFew || over > kPage - kFew;
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
