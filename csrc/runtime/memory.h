// Memory for arrays: blocks cut from large mappings, the smallest hole that fits first, neighbours joined when they come back. The
// first touch of a fresh page costs more than most kernels, so what comes back is kept; what was not needed for some time goes
// back to the system. Blocks of any sizes share the same pages: a training step needs what its live arrays need, no more.
#pragma once

#include <cstddef>

namespace fastlm {

void* cached_allocate(size_t bytes);  // 64-byte aligned; throws std::bad_alloc
void cached_free(void* memory, size_t bytes);
size_t cached_block(size_t bytes);  // what a block of so many bytes takes, its distance from the next one included
size_t cached_bytes();              // held for reuse now
size_t live_bytes();                // in use now
size_t peak_bytes();                // the most in use at once since the last reset_peak
void reset_peak();
void release_cached();  // what is held for reuse, back to the system

}  // namespace fastlm
