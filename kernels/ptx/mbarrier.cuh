// SPDX-License-Identifier: Apache-2.0
// Shared-memory barriers with a phase bit and a byte count.
#pragma once

#include "core/base.cuh"

namespace fsa::kernels::ptx {

struct alignas(8) Mbarrier {
  uint64 state;
};

FSA_DEVICE void init(Mbarrier& barrier, uint32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other threads' first waits.
FSA_DEVICE void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FSA_DEVICE void arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

FSA_DEVICE void arrive_expect_bytes(Mbarrier& barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

FSA_DEVICE bool try_wait(Mbarrier& barrier, uint32 phase) {
  uint32 done;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.b32 %0, 1, 0, complete;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(&barrier)), "r"(phase)
      : "memory");
  return done != 0;
}

FSA_DEVICE void wait(Mbarrier& barrier, uint32 phase) {
#ifdef FSA_DEVICE_CHECKS
  // A lost arrival becomes an error instead of a hang.
  for (int32 spins = 0; !try_wait(barrier, phase); ++spins)
    if (spins == 1 << 22) __trap();
#else
  while (!try_wait(barrier, phase)) {
  }
#endif
}

}  // namespace fsa::kernels::ptx
