// Which instruction sets this build has, which of them this CPU runs, and which one is in use.
#pragma once

#include <string>
#include <vector>

namespace fastlm {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, neon = 3 };
constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);
std::vector<Isa> available_isas();  // best last
Isa active_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument where the name is unknown or the CPU lacks it
void choose_isa();                      // at import: FASTLM_ISA, else the best
// Whether dot products of bytes (VNNI) are there beside the instruction set in use: a feature of its own, on avx2 (AVX-VNNI) and on
// avx512. FASTLM_VNNI=0 turns it off.
bool has_vnni();
void set_vnni(bool on);  // off, or whatever the CPU has
// Whether the cores add floats beside their multiply-adds, on units of their own, at the full width of the instruction set in use:
// AMD's with AVX-512. FASTLM_FAST_INNER_PRODUCT=0 says no.
bool adds_beside_fma();
std::string cpu_name();
std::vector<std::string> cpu_features();

}  // namespace fastlm
