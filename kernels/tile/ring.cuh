// SPDX-License-Identifier: Apache-2.0
// A position in a ring of shared-memory stages.
//
// Consumers wait on full[stage] with `phase`, producers on empty[stage] with `phase ^ 1`, which passes at once the
// first time round.
#pragma once

#include "core/base.cuh"

namespace fsa::kernels {

template <int32 kStages>
struct Ring {
  int32 stage = 0;
  uint32 phase = 0;

  FSA_DEVICE void advance() {
    if constexpr (kStages == 1) {
      phase ^= 1;
    } else {
      const bool wraps = stage == kStages - 1;
      stage = wraps ? 0 : stage + 1;
      phase ^= wraps;
    }
  }
};

}  // namespace fsa::kernels
