// SPDX-License-Identifier: Apache-2.0
// Before gated attention: delta as float32 in whole key tiles, and the extremes of each tile. One block of
// kTileKeys threads per (key tile, key-value head, sequence): grid (largest number of key tiles, kv_heads,
// batch).
#pragma once

#include "policy/scalar.cuh"
#include "policy/schedule.cuh"
#include "ptx/math.cuh"

namespace fsa::kernels {

// {smallest, largest}; NaN when one value is NaN.
struct Extremes {
  float low = kInfinity;
  float high = -kInfinity;

  FSA_DEVICE void include(const Extremes& other) {
    low = ptx::min_nan(low, other.low);
    high = ptx::max_nan(high, other.high);
  }
  FSA_DEVICE void reduce_warp() {
#pragma unroll
    for (int32 distance = kWarpThreads / 2; distance > 0; distance /= 2)
      include({__shfl_xor_sync(0xffffffffu, low, distance), __shfl_xor_sync(0xffffffffu, high, distance)});
  }
};

template <int32 kTileKeys>
FSA_DEVICE void gate_prepare(const ForwardParams& params) {
  __shared__ Extremes of_warp[kTileKeys / kWarpThreads];
  const int32 tile = static_cast<int32>(blockIdx.x), kv_head = static_cast<int32>(blockIdx.y);
  WorkTile work;
  describe_sequence(params, static_cast<int32>(blockIdx.z), kv_head * params.group_size, work);
  if (tile * kTileKeys >= work.seqlen_k) return;

  const int32 key = tile * kTileKeys + thread_id();
  const bool used = key < work.seqlen_k;
  const float delta =
      used ? load_scalar(params.delta, work.k_map_batch, static_cast<int64>(work.k_begin) + key, kv_head)
           : 0.0f;
  const int64 first = params.cu_seqlens_k ? work.k_begin / kTileKeys + work.sequence : 0;
  const int64 begin = work.k_map_batch * params.gate_delta_stride_batch +
                      kv_head * params.gate_delta_stride_head + (first + tile) * kTileKeys;
  params.gate_delta[begin + thread_id()] = delta;

  Extremes extremes;
  if (used) extremes = {delta, delta};
  extremes.reduce_warp();
  if (lane_id() == 0) of_warp[thread_id() / kWarpThreads] = extremes;
  __syncthreads();
  if (thread_id() != 0) return;
  for (int32 warp = 1; warp < kTileKeys / kWarpThreads; ++warp) extremes.include(of_warp[warp]);
  params.gate_extremes[begin / kTileKeys * 2] = extremes.low;
  params.gate_extremes[begin / kTileKeys * 2 + 1] = extremes.high;
}

}  // namespace fsa::kernels
