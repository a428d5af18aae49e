// SPDX-License-Identifier: Apache-2.0
// Before gated attention: delta as float32 in whole key tiles, the extremes of each tile, and its terms where the gate
// is folded into Q K^T. One block of kTileKeys threads per (key tile, key-value head, sequence): grid (largest number of
// key tiles, kv_heads, batch).
#pragma once

#include "policy/gate_terms.cuh"
#include "policy/scalar.cuh"
#include "policy/schedule.cuh"

namespace fsa::kernels {

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
  extremes = of_warp[0];
  for (int32 warp = 1; warp < kTileKeys / kWarpThreads; ++warp) extremes.include(of_warp[warp]);
  const int64 number = begin / kTileKeys;
  if (thread_id() == 0)
    *reinterpret_cast<float2*>(params.gate_extremes + number * 2) = {extremes.low, extremes.high};
  if (params.gate_terms == nullptr) return;
  uint8* const terms = params.gate_terms + number * gate_term_bytes(kTileKeys);
  if (params.log_sigmoid_gate)
    store_gate_terms<true, true, kTileKeys>(terms, thread_id(), delta, used, extremes);
  else
    store_gate_terms<false, true, kTileKeys>(terms, thread_id(), delta, used, extremes);
}

}  // namespace fsa::kernels
