// SPDX-License-Identifier: Apache-2.0
// kernels/ptx/sync.cuh on the CPU.
#pragma once

#include "core/base.cuh"

namespace fsa::kernels::ptx {

inline void barrier_sync(int32 id, int32 threads) { emulator::named_barriers[id].sync(threads); }
inline bool barrier_any(int32 id, int32 threads, bool vote) {
  emulator::NamedBarrier& barrier = emulator::named_barriers[id];
  if (vote) barrier.any = true;
  barrier.sync(threads);
  const bool any = barrier.any;
  barrier.sync(threads);  // all have read it
  barrier.any = false;
  barrier.sync(threads);
  return any;
}
inline void fence_shared_for_async() {}
inline void wait_for_kernel_before() { emulator::wait_for_kernel_before(); }
inline void admit_next_kernel() {}
inline void pause(uint32) {}
template <int32 kRegisters>
void grow_registers() {}
template <int32 kRegisters>
void shrink_registers() {}

}  // namespace fsa::kernels::ptx
