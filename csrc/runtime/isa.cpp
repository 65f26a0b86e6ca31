#include "csrc/runtime/isa.h"

#include <cstdlib>
#include <fstream>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastlm {
namespace {

Isa active = Isa::scalar;
bool vnni = true;

#if defined(__x86_64__)
bool cpu_avx_vnni() {  // gcc 12 does not know the name
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

bool cpu_runs(Isa isa) {
    switch (isa) {
        case Isa::scalar: return true;
#if defined(__x86_64__)
        // These also ask the operating system (xgetbv) whether it saves the wide registers.
        case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        case Isa::avx512:
            return cpu_runs(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__aarch64__)
        case Isa::neon: return true;
#endif
        default: return false;
    }
}

}  // namespace

const char* isa_name(Isa isa) {
    static const char* const names[kIsaCount] = {"scalar", "avx2", "avx512", "neon"};
    return names[int(isa)];
}

std::vector<Isa> available_isas() {
    std::vector<Isa> found;
    for (int i = 0; i < kIsaCount; ++i)
        if (cpu_runs(Isa(i))) found.push_back(Isa(i));
    return found;
}

Isa active_isa() { return active; }

void set_isa(const std::string& name) {
    std::string known;
    for (int i = 0; i < kIsaCount; ++i) {
        if (name == isa_name(Isa(i))) {
            if (!cpu_runs(Isa(i)))
                throw std::invalid_argument("FASTLM_ISA=" + name + ": this CPU (" + cpu_name() + ") cannot run it");
            active = Isa(i);
            return;
        }
        known += std::string(i ? ", " : "") + isa_name(Isa(i));
    }
    throw std::invalid_argument("FASTLM_ISA must be one of " + known + ", got \"" + name + "\"");
}

bool has_vnni() {
#if defined(__x86_64__)
    static const bool avx = cpu_avx_vnni(), avx512 = __builtin_cpu_supports("avx512vnni");
    return vnni && ((active == Isa::avx512 && avx512) || (active == Isa::avx2 && avx));
#else
    return false;
#endif
}

bool adds_beside_fma() {
#if defined(__x86_64__)
    static const bool beside = [] {
        const char* wish = std::getenv("FASTLM_FAST_INNER_PRODUCT");
        return __builtin_cpu_is("amd") && !(wish && std::string(wish) == "0");
    }();
    return beside && active == Isa::avx512;
#else
    return false;
#endif
}

void set_vnni(bool on) { vnni = on; }

void choose_isa() {
    if (const char* bit = std::getenv("FASTLM_VNNI")) vnni = std::string(bit) != "0";
    if (const char* name = std::getenv("FASTLM_ISA"); name && *name) set_isa(name);
    else active = available_isas().back();
}

std::string cpu_name() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);)
        if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
    return "unknown CPU";
}

std::vector<std::string> cpu_features() {
    std::vector<std::string> found;
#if defined(__x86_64__)
#define FASTLM_FEATURE(name) \
    if (__builtin_cpu_supports(name)) found.push_back(name);
    FASTLM_FEATURE("sse4.2")
    FASTLM_FEATURE("avx2")
    FASTLM_FEATURE("fma")
    FASTLM_FEATURE("f16c")
    FASTLM_FEATURE("avx512f")
    FASTLM_FEATURE("avx512bw")
    FASTLM_FEATURE("avx512dq")
    FASTLM_FEATURE("avx512vl")
    FASTLM_FEATURE("avx512vnni")
    if (cpu_avx_vnni()) found.push_back("avxvnni");
    FASTLM_FEATURE("avx512bf16")
#undef FASTLM_FEATURE
#elif defined(__aarch64__)
    found.push_back("neon");
#endif
    return found;
}

}  // namespace fastlm
