// SPDX-License-Identifier: Apache-2.0
// What happens to Q K^T before the softmax.
#pragma once

#include "policy/work_tile.cuh"

namespace fsa::kernels {

// Nothing: the softmax multiplies by the scale inside its exponent, for free.
struct Scale {
  FSA_DEVICE static float exponent_scale(const ForwardParams& params) { return params.softmax_scale_log2; }

  template <int32 kCount>
  FSA_DEVICE static void apply(const ForwardParams&, const WorkTile&, float (&)[kCount]) {}
};

}  // namespace fsa::kernels
