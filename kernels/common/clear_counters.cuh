// SPDX-License-Identifier: Apache-2.0
// Before an attention kernel whose work tiles a counter hands out: one block that clears the counters. The attention
// kernel is launched early and begins beside it, because no CTA needs a counter for its first work tile.
#pragma once

#include "core/base.cuh"
#include "core/params.h"
#include "ptx/sync.cuh"

namespace fsa::kernels {

inline constexpr int32 kClearThreads = 32;

FSA_DEVICE void clear_counters(int32* counters) {
  ptx::admit_next_kernel();
  if (thread_id() < kWorkCounters) counters[thread_id()] = 0;
}

}  // namespace fsa::kernels
