// SPDX-License-Identifier: Apache-2.0
// A position in a ring of shared-memory stages.
//
// Consumers wait on full[stage()] for phase(), producers on empty[stage()] for phase() ^ 1, which passes at
// once the first time round.
#pragma once

#include "core/base.cuh"

namespace fsa::kernels {

// One register: the producer has few.
template <int32 kStages>
struct Ring {
  uint32 position = 0;

  FSA_DEVICE int32 stage() const { return static_cast<int32>(position % kStages); }
  FSA_DEVICE uint32 phase() const { return position / kStages & 1; }
  FSA_DEVICE void advance() { ++position; }
};

}  // namespace fsa::kernels
