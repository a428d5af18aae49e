// SPDX-License-Identifier: Apache-2.0
// Named barriers, proxy fences, register redistribution.
#pragma once

#include "core/base.cuh"

namespace fsa::kernels::ptx {

// Named barrier `id` (1..15; 0 is __syncthreads) of `threads` threads.
FSA_DEVICE void barrier_sync(int32 id, int32 threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same where warps wait in different places of the code.
FSA_DEVICE void barrier_sync_anywhere(int32 id, int32 threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FSA_DEVICE void barrier_arrive(int32 id, int32 threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// True in every thread when `vote` is true in one of them.
FSA_DEVICE bool barrier_any(int32 id, int32 threads, bool vote) {
  uint32 any;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.b32 mine, %1, 0;\n"
      "barrier.cta.red.or.pred.aligned all, %2, %3, mine;\n"
      "selp.b32 %0, 1, 0, all;\n"
      "}\n"
      : "=r"(any)
      : "r"(static_cast<uint32>(vote)), "r"(id), "r"(threads)
      : "memory");
  return any != 0;
}

// A byte of shared memory that others look at without a barrier.
FSA_DEVICE void store_byte(uint8* to, uint32 value) {
  asm volatile("st.volatile.shared.u8 [%0], %1;" ::"r"(shared_address(to)), "r"(value) : "memory");
}

// A word of shared memory once its bits in `mask` are those of `value`.
FSA_DEVICE uint32 wait_masked(const uint32* from, uint32 mask, uint32 value) {
  for (int32 spins = 0;; ++spins) {
    uint32 word;
    asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(word) : "r"(shared_address(from)) : "memory");
    if ((word & mask) == value) return word;
#ifdef FSA_DEVICE_CHECKS
    if (spins == 1 << 22) __trap();
#endif
  }
}

// Orders this thread's ordinary shared-memory writes before later reads by WGMMA and the copy engine.
FSA_DEVICE void fence_shared_for_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Until the kernel before in the stream is over, where this one was launched without waiting for it.
FSA_DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Blocks of the next kernel, launched like that, may begin once every block of this one has said so: they take the
// processors that have nothing left to do.
FSA_DEVICE void admit_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// About so many nanoseconds.
FSA_DEVICE void pause(uint32 ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }

template <int32 kRegisters>
FSA_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int32 kRegisters>
FSA_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fsa::kernels::ptx
