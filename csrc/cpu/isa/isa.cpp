#include "cpu/isa/isa.h"

#include <atomic>
#include <stdexcept>

#ifndef DISTILBERT_FAST_SCALAR_ONLY
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace distilbert_fast {

#ifndef DISTILBERT_FAST_SCALAR_ONLY
// setup.py leaves out the tiers that the compiler cannot compile; weak, their addresses are then null.
extern const Kernels kernels_avx2 __attribute__((weak));
extern const GemmKernel gemm_int8_avx_vnni __attribute__((weak));
extern const GemmKernel gemm_codebook16_avx_vnni __attribute__((weak));
extern const Kernels kernels_avx512 __attribute__((weak));
extern const Kernels kernels_avx512_bf16 __attribute__((weak));
extern const Kernels kernels_amx __attribute__((weak));
#endif

namespace {

struct Tier {
  const char* name;
  const Kernels* kernels;
  std::string lacks;      // empty: it can run here
  bool preferred = true;  // to those below, where it can run
};

#ifdef DISTILBERT_FAST_SCALAR_ONLY

bool is_amd() { return false; }

std::vector<Tier> find_tiers() {
  const std::string reason = "this is not an x86-64 build";
  return {{"amx", nullptr, reason},      {"avx512_bf16", nullptr, reason}, {"avx512_vnni", nullptr, reason},
          {"avx_vnni", nullptr, reason}, {"avx2", nullptr, reason},        {"scalar", &kernels_scalar, ""}};
}

#else

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(unsigned leaf, unsigned subleaf) {
  Leaf out;
  __get_cpuid_count(leaf, subleaf, &out.eax, &out.ebx, &out.ecx, &out.edx);  // leaves zeros if there is no such leaf
  return out;
}

// The register states that the operating system saves: bit 1 SSE, 2 AVX, 5-7 AVX-512, 17-18 AMX.
uint64_t saved_states(const Leaf& features) {
  if (!(features.ecx >> 27 & 1)) return 0;  // no OSXSAVE
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux hands out the 8 KiB of tile state only to a process that asks: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
bool tiles_permitted() {
#ifdef __linux__
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

struct Feature {
  bool present;
  const char* name;
};

std::string lacking(std::initializer_list<Feature> features) {
  std::string names;
  for (const Feature& feature : features) {
    if (!feature.present) names += (names.empty() ? "" : ", ") + std::string(feature.name);
  }
  return names.empty() ? "" : "the processor lacks " + names;
}

bool is_amd() {
  static const bool amd = cpuid(0, 0).ebx == signature_AMD_ebx;  // a hypervisor takes microseconds to answer
  return amd;
}

// The AVX2 tier with other int8 products: made here, for at import nothing of a tier may run.
const Kernels* kernels_avx_vnni() {
  if (&kernels_avx2 == nullptr || &gemm_int8_avx_vnni == nullptr) return nullptr;
  static const Kernels kernels = [] {
    Kernels copy = kernels_avx2;
    copy.gemm_int8 = gemm_int8_avx_vnni;
    copy.gemm_codebook16 = gemm_codebook16_avx_vnni;
    copy.match_groups = nullptr;
    copy.code_flip = 0x80;
    return copy;
  }();
  return &kernels;
}

std::vector<Tier> find_tiers() {
  const Leaf one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const uint64_t states = saved_states(one);
  const auto bit = [](unsigned bits, int i) { return (bits >> i & 1) != 0; };
  const auto saves = [states](uint64_t wanted) { return (states & wanted) == wanted; };

  std::string avx2 = lacking(
      {{bit(one.ecx, 28), "avx"}, {bit(one.ecx, 12), "fma"}, {bit(one.ecx, 29), "f16c"}, {bit(seven.ebx, 5), "avx2"}});
  if (avx2.empty() && !saves(0x6)) avx2 = "the operating system does not save AVX registers";

  std::string avx_vnni = avx2;
  if (avx_vnni.empty()) avx_vnni = lacking({{bit(seven_one.eax, 4), "avx_vnni"}});

  std::string avx512 = avx2;
  if (avx512.empty()) {
    avx512 = lacking({{bit(seven.ebx, 16), "avx512f"},
                      {bit(seven.ebx, 17), "avx512dq"},
                      {bit(seven.ebx, 30), "avx512bw"},
                      {bit(seven.ebx, 31), "avx512vl"},
                      {bit(seven.ecx, 11), "avx512_vnni"}});
  }
  if (avx512.empty() && !saves(0xe6)) avx512 = "the operating system does not save AVX-512 registers";

  std::string bf16 = avx512;
  if (bf16.empty()) bf16 = lacking({{bit(seven_one.eax, 5), "avx512_bf16"}});

  std::string amx = avx512;
  if (amx.empty()) {
    amx =
        lacking({{bit(seven.edx, 24), "amx_tile"}, {bit(seven.edx, 25), "amx_int8"}, {bit(seven.edx, 22), "amx_bf16"}});
  }
  if (amx.empty() && !(saves(0x600e6) && tiles_permitted())) amx = "the operating system does not grant AMX tiles";

  // Intel's vector units take vdpbf16ps every second cycle: half the rate of float32 FMA. AMD's take two a cycle.
  return {{"amx", &kernels_amx, amx},
          {"avx512_bf16", &kernels_avx512_bf16, bf16, is_amd()},
          {"avx512_vnni", &kernels_avx512, avx512},
          {"avx_vnni", kernels_avx_vnni(), avx_vnni},
          {"avx2", &kernels_avx2, avx2},
          {"scalar", &kernels_scalar, ""}};
}

#endif

const std::vector<Tier>& tiers() {
  static const std::vector<Tier> found = [] {
    std::vector<Tier> all = find_tiers();
    for (Tier& tier : all) {
      if (!tier.kernels && tier.lacks.empty()) tier.lacks = "the compiler of this build could not compile it";
    }
    return all;
  }();
  return found;
}

const Tier* best() {
  for (const Tier& tier : tiers()) {
    if (tier.lacks.empty() && tier.preferred) return &tier;
  }
  return nullptr;  // never: the scalar tier lacks nothing
}

std::atomic<const Tier*>& in_use() {
  static std::atomic<const Tier*> tier{best()};
  return tier;
}

std::atomic<bool> asked{false};

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed)->kernels; }

bool prefers_own_gemm() { return is_amd() && isa().compare(0, 6, "avx512") == 0; }

std::string isa() { return in_use().load()->name; }

void set_isa(const std::string& name) {
  for (const Tier& tier : tiers()) {
    if (name != tier.name) continue;
    if (!tier.lacks.empty()) throw std::invalid_argument("ISA tier '" + name + "' cannot run here: " + tier.lacks);
    in_use().store(&tier);
    asked = true;
    return;
  }
  throw std::invalid_argument("ISA tier must be amx, avx512_bf16, avx512_vnni, avx_vnni, avx2 or scalar, got '" + name +
                              "'");
}

bool scalar_by_default() { return in_use().load()->kernels == &kernels_scalar && !asked; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Tier& tier : tiers()) {
    if (tier.lacks.empty()) names.push_back(tier.name);
  }
  return names;
}

std::map<std::string, std::string> missing_isas() {
  std::map<std::string, std::string> reasons;
  for (const Tier& tier : tiers()) {
    if (!tier.lacks.empty()) reasons[tier.name] = tier.lacks;
  }
  return reasons;
}

}  // namespace distilbert_fast
