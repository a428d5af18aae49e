// SPDX-License-Identifier: Apache-2.0
// Several sums over lanes at a time.
#pragma once

#include "core/base.cuh"

namespace fsa::kernels {

// Adds kCount values up over kLanes lanes that lie kStride apart, in exchanges in which a lane gives half of its sums away
// as long as it has several: in the end kCount / kLanes of them, or one, lie in front. advance(n): the lane keeps the upper
// half, n sums further on.
template <int32 kLanes, int32 kStride, int32 kCount, class Advance>
FSA_DEVICE void sum_lanes(float (&sums)[kCount], int32 lane, Advance advance) {
#pragma unroll
  for (int32 exchange = 0; kLanes >> exchange > 1; ++exchange) {
    const int32 distance = kLanes / 2 * kStride >> exchange, count = kCount / 2 >> exchange;
    const bool upper = (lane & distance) != 0;
    if (count == 0) sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], distance);
    if (upper) advance(count);
#pragma unroll
    for (int32 i = 0; i < kCount / 2; ++i) {
      if (i >= count) continue;
      sums[i] = (upper ? sums[i + count] : sums[i]) +
                __shfl_xor_sync(0xffffffffu, upper ? sums[i] : sums[i + count], distance);
    }
  }
}

}  // namespace fsa::kernels
