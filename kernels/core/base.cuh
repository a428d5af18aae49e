// SPDX-License-Identifier: Apache-2.0
// Small device-side basics.
#pragma once

#include "core/types.h"

#define FSA_DEVICE __device__ __forceinline__

namespace fsa::kernels {

inline constexpr int32 kWarpThreads = 32;
inline constexpr int32 kWarpgroupThreads = 128;
inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);
inline constexpr float kLn2 = 0.693147180559945309f;

template <class T>
FSA_DEVICE constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FSA_DEVICE constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
FSA_DEVICE constexpr int32 ceil_div(int32 a, int32 b) { return (a + b - 1) / b; }

// The same in every lane, in a form that the compiler can keep in uniform registers.
FSA_DEVICE int32 warp_uniform(int32 value) { return __shfl_sync(0xffffffffu, value, 0); }
// The same of all lanes already: ptxas keeps in uniform registers what follows from a vote, and not what a lane read.
FSA_DEVICE bool warp_any(bool value) { return __any_sync(0xffffffffu, value ? 1 : 0) != 0; }

#ifdef FSA_EMULATED  // tests/emulator
FSA_DEVICE int32 thread_id() { return static_cast<int32>(threadIdx.x); }
FSA_DEVICE int32 opaque(int32 value) { return value; }
FSA_DEVICE uint8* dynamic_shared() { return emulator::shared_memory; }
#else
// Read anew each time: what is derived from it then stays local, where the compiler would otherwise compute
// addresses of the prologue and epilogue ahead of the persistent loop and spill them.
FSA_DEVICE int32 thread_id() {
  int32 id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
}
// A value that the compiler knows nothing about: what is derived from it inside a loop stays there.
FSA_DEVICE int32 opaque(int32 value) {
  asm volatile("" : "+r"(value));
  return value;
}
FSA_DEVICE uint8* dynamic_shared() {
  extern __shared__ uint8 shared[];
  return shared;
}
#endif

FSA_DEVICE int32 lane_id() { return thread_id() % kWarpThreads; }
FSA_DEVICE int32 warpgroup_thread() { return thread_id() % kWarpgroupThreads; }

FSA_DEVICE uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

}  // namespace fsa::kernels
