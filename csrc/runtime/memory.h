// A cache of large blocks. The first touch of a fresh page costs more than most kernels; a block that comes back is reused.
#pragma once

#include <cstddef>

namespace fastlm {

void* cached_allocate(size_t bytes);  // 64-byte aligned; throws std::bad_alloc
void cached_free(void* memory, size_t bytes);
size_t cached_bytes();  // held for reuse now
void release_cached();  // back to the system

}  // namespace fastlm
