// SPDX-License-Identifier: Apache-2.0
// Additions to global memory, and counters that order them.
#pragma once

#include "core/base.cuh"

namespace fsa::kernels::ptx {

// Four consecutive floats, aligned to 16 bytes; each is added on its own.
FSA_DEVICE void add_four(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}

// Contiguous floats from shared memory by the copy engine; addresses and size are multiples of 16. Part of the
// thread's next group of stores.
FSA_DEVICE void add_bytes(float* to, const void* shared, int32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// Between additions of the copy engine and ordinary accesses to global memory.
FSA_DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

FSA_DEVICE void fence_global() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

FSA_DEVICE int32 load_acquire(const int32* from) {
  int32 value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// Ordered before later accesses by a fence_global() between.
FSA_DEVICE int32 load_relaxed(const int32* from) {
  int32 value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

FSA_DEVICE void wait_until_equal(const int32* counter, int32 value) {
#ifdef FSA_DEVICE_CHECKS
  for (int32 spins = 0; load_acquire(counter) != value; ++spins)
    if (spins == 1 << 22) __trap();
#else
  while (load_acquire(counter) != value) {
  }
#endif
}

FSA_DEVICE void add_release(int32* counter, int32 value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

}  // namespace fsa::kernels::ptx
