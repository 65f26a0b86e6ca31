// One vector type, `vf`, and its verbs, for the instruction set this translation unit is compiled for.
//
// The build compiles every kernels/*/*_cpu.cpp once per instruction set and defines FASTLM_ISA to its name. Everything here lives
// in an unnamed namespace inside fastlm::FASTLM_ISA, so no symbol can be merged with another translation unit's: a function
// compiled for AVX-512 must never be the one that an older CPU runs.
#pragma once

#include <cmath>
#include <cstdint>

#ifndef FASTLM_ISA
#error "FASTLM_ISA must name the instruction set: scalar, avx2, avx512 or neon"
#endif

#define FASTLM_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

// The same for a member function.
#define FASTLM_MEMBER inline __attribute__((always_inline))

#if defined(FASTLM_ISA_AVX512)
#include "avx512.h"
#elif defined(FASTLM_ISA_AVX2)
#include "avx2.h"
#elif defined(FASTLM_ISA_NEON)
#include "neon.h"
#else
#include "scalar.h"
#endif

#include "math.h"

#include "loops.h"
