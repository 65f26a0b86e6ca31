// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3":
// a pure function of key and counter, hence the same stream on any machine, in any order, on any number of threads.
#pragma once

#include <cstdint>

namespace fastlm {
namespace {

struct Philox {
    uint32_t word[4];
};

[[maybe_unused]] inline Philox philox(Philox counter, uint32_t key0, uint32_t key1) {
    uint32_t* c = counter.word;
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
        const uint32_t c0 = uint32_t(b >> 32) ^ c[1] ^ key0, c2 = uint32_t(a >> 32) ^ c[3] ^ key1;
        c[0] = c0, c[1] = uint32_t(b), c[2] = c2, c[3] = uint32_t(a);
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return counter;
}

// A number in [0, 1) with 53 random bits, from stream `seed`, row `row`, step `step`.
[[maybe_unused]] inline double philox_uniform(uint64_t seed, uint64_t row, uint64_t step) {
    const Philox r =
        philox({{uint32_t(row), uint32_t(row >> 32), uint32_t(step), uint32_t(step >> 32)}}, uint32_t(seed), uint32_t(seed >> 32));
    return (double(r.word[0] >> 5) * 67108864.0 + double(r.word[1] >> 6)) / 9007199254740992.0;
}

}  // namespace
}  // namespace fastlm
