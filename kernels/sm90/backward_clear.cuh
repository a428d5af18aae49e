// SPDX-License-Identifier: Apache-2.0
// Zeros where dQ is summed up, written beside the main loop, before anybody adds there. backward_prepare clears only what
// the first wave of heads adds to: its writes keep memory busy while nothing multiplies, 30 us for 134 MB.
#pragma once

#include "ptx/reduce.cuh"
#include "ptx/sync.cuh"
#include "sm90/backward_types.cuh"

namespace fsa::kernels::sm90 {

// Between two row tiles of 32 KB: 0 and 5 us do as well, at 12 us windows of 512 keys wait (-14 %).
inline constexpr uint32 kClearPause = 2000;  // ns

// An idle warp of every CTA. A counter hands row tiles out, so that whoever waits for one waits for a CTA that runs.
template <class Types>
FSA_DEVICE void clear_sums(const BackwardParams& params) {
  constexpr int32 kUnits = Types::kBlockM * Types::kDim / 4;
  int32 wave = 1;
  for (;;) {
    int32 tile = own_lane() == 0 ? atomicAdd(params.clears, 1) : 0;
    tile = __shfl_sync(0xffffffffu, tile, 0);
    if (tile >= params.clears_in_all) return;
    float4* const sums = reinterpret_cast<float4*>(params.grad_query_sum) +
                         static_cast<int64>(tile + params.clears_of_wave) * kUnits + own_lane();
#pragma unroll 4
    for (int32 i = 0; i < kUnits; i += kWarpThreads) sums[i] = make_float4(0, 0, 0, 0);
    ptx::fence_async_global();
    __syncwarp();
    while (tile >= wave * params.clears_of_wave) ++wave;
    if (own_lane() == 0) ptx::add_release(params.clears + 1 + wave, 1);
    ptx::pause(kClearPause);
  }
}

// Before the first addition of a unit.
template <class Types>
FSA_DEVICE void wait_cleared(const BackwardParams& params, const KeyWork& work) {
  if (params.clears == nullptr) return;
  const int32 wave = Types::Schedule::wave_of(params, work.part.key_tile);
  if (wave == 0) return;
  ptx::wait_until_equal(
      params.clears + 1 + wave,
      min_of(params.clears_of_wave, params.clears_in_all - (wave - 1) * params.clears_of_wave));
  ptx::fence_async_global();
}

}  // namespace fsa::kernels::sm90
