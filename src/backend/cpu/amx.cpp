// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/amx.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace fsa::cpu {
namespace {

constexpr long kArchRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;                   // XFEATURE_XTILEDATA

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

// The states that the operating system saves when it switches threads.
std::uint64_t saved_states() {
  if ((cpuid(1, 0).ecx >> 27 & 1) == 0) return 0;  // OSXSAVE: without it XGETBV is no instruction
  std::uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

bool machine_has_tiles() {
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;
  constexpr std::uint64_t kStates = std::uint64_t{3} << 17;  // configuration and data
  if ((cpuid(7, 0).edx & (kBfloat16 | kTile)) != (kBfloat16 | kTile)) return false;
  if ((saved_states() & kStates) != kStates) return false;
  const Registers palette = cpuid(0x1D, 1);  // of the registers: 8 of 16 rows of 64 bytes
  return palette.ebx >> 16 >= 8 && (palette.ebx & 0xFFFF) == 64 && (palette.ecx & 0xFFFF) == 16;
}

}  // namespace

bool amx_granted() {
  static const bool granted =
      machine_has_tiles() && syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) == 0;
  return granted;
}

}  // namespace fsa::cpu

#else

namespace fsa::cpu {

bool amx_granted() { return false; }

}  // namespace fsa::cpu

#endif
