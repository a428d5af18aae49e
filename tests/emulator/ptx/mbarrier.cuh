// SPDX-License-Identifier: Apache-2.0
// kernels/ptx/mbarrier.cuh on the CPU.
#pragma once

#include "core/base.cuh"

namespace fsa::kernels::ptx {

struct alignas(8) Mbarrier {
  uint16 arrivals;  // of a phase
  uint16 pending;
  int32 bytes : 31;  // announced and not there yet
  uint32 phase : 1;
};
static_assert(sizeof(Mbarrier) == 8);

inline void complete_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.phase ^= 1;
}
inline void change(Mbarrier& barrier, int32 arrivals, int32 bytes) {
  const std::lock_guard lock(emulator::memory);
  if (barrier.pending < arrivals) std::abort();
  barrier.bytes += bytes;
  barrier.pending = static_cast<uint16>(barrier.pending - arrivals);
  complete_phase(barrier);
}

inline void init(Mbarrier& barrier, uint32 arrivals) {
  barrier = {static_cast<uint16>(arrivals), static_cast<uint16>(arrivals), 0, 0};
}
inline void fence_init() {}
inline void arrive(Mbarrier& barrier) { change(barrier, 1, 0); }
inline void arrive_expect_bytes(Mbarrier& barrier, uint32 bytes) {
  change(barrier, 1, static_cast<int32>(bytes));
}
inline void bytes_arrived(Mbarrier& barrier, int32 bytes) { change(barrier, 0, -bytes); }
inline bool try_wait(Mbarrier& barrier, uint32 phase) {
  const std::lock_guard lock(emulator::memory);
  return barrier.phase != phase;
}
inline void wait(Mbarrier& barrier, uint32 phase) {
  emulator::poll([&] { return barrier.phase != phase; });
}

}  // namespace fsa::kernels::ptx
