// Writes new keys and values into a cache, at positions read from memory: a recorded step is replayed with other positions.
#pragma once

#include <cstdint>

namespace fastlm {

// How a cache holds a head's vector of D numbers.
enum class CacheKind : int {
    float32,
    bfloat16,  // rounded to nearest, ties to even
    int8,  // D + 4 bytes: n (D,) int8, then a float32 s, not aligned; the numbers are s n. s = max |x| / 127, n = x / s to nearest,
           // ties to even. Below 2^-126 s becomes 0 and so does the vector; with an inf or nan in it s is nan, and so is all of it.
};

// Strides count elements of their array (int8: bytes); a head's is its width, the last axis is contiguous.
struct CacheAppend {
    void* keys;                // (B, capacity, G, D); int8: (B, capacity, G, D + 4)
    void* values;              // (B, capacity, G, E); int8: (B, capacity, G, E + 4)
    const float* k;            // (B, T, G, D)
    const float* v;            // (B, T, G, E)
    const int32_t* positions;  // (B, T): where each goes, no two of a sequence to the same place; starts: (B,), that of the first
    const int32_t* table;      // (B, blocks) or null. Pages: keys and values are (pages, page, G, .), and what is at position i of
                               // sequence b is number i % page of page table[b][i / page]; capacity = blocks page
    int64_t table_row, page, pages;  // from row to row of the table; positions of a page; how many there are
    int64_t keys_batch, keys_time, values_batch, values_time, k_batch, k_time, v_batch, v_time;
    int64_t B, T, capacity, G, D, E;
    CacheKind kind;
    bool starts;
};

struct CacheAppendKernels {
    void (*forward)(const CacheAppend&);  // what would go outside [0, capacity), or to no page, is left out
};

}  // namespace fastlm
