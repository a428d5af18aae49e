// SPDX-License-Identifier: Apache-2.0
// kernels/ptx/sync.cuh on the CPU.
#pragma once

#include "core/base.cuh"

namespace fsa::emulator {

// How often a thread has voted by a barrier, and a warp by a byte of shared memory.
inline std::atomic<int> barrier_votes = 0, bytes_stored = 0;

}  // namespace fsa::emulator

namespace fsa::kernels::ptx {

inline void barrier_sync(int32 id, int32 threads) { emulator::named_barriers[id].sync(threads); }
inline void barrier_sync_anywhere(int32 id, int32 threads) { barrier_sync(id, threads); }
inline bool barrier_any(int32 id, int32 threads, bool vote) {
  emulator::NamedBarrier& barrier = emulator::named_barriers[id];
  ++emulator::barrier_votes;
  if (vote) barrier.any = true;
  barrier.sync(threads);
  const bool any = barrier.any;
  barrier.sync(threads);  // all have read it
  barrier.any = false;
  barrier.sync(threads);
  return any;
}
inline void store_byte(uint8* to, uint32 value) {
  const std::lock_guard lock(emulator::memory);
  ++emulator::bytes_stored;
  *to = static_cast<uint8>(value);
}
inline uint32 wait_masked(const uint32* from, uint32 mask, uint32 value) {
  uint32 word = 0;
  emulator::poll([&] {
    word = *from;
    return (word & mask) == value;
  });
  return word;
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
