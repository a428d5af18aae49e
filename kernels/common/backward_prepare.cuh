// SPDX-License-Identifier: Apache-2.0
// Before the backward kernel, for each row tile: what its query rows need (lse in base 2, out_dot_grad =
// rowsum(out * grad_out) - grad_lse, both folded where there is no logit chain, alpha of the pair gate), its part of the sink's gradient, and zeros where
// dQ and grad_alpha are summed up. The first block clears the work counters.
//
// One block of kPrepareThreads per (row tile, head, sequence): grid (largest number of row tiles, heads,
// batch). Memory-bound: 4 head_dim_v + 4 head_dim bytes a row.
#pragma once

#include "policy/gate_terms.cuh"
#include "policy/key_work.cuh"
#include "policy/logit.cuh"
#include "policy/scalar.cuh"
#include "ptx/math.cuh"
#include "ptx/sync.cuh"

namespace fsa::kernels {

inline constexpr int32 kPrepareThreads = 256;

// Sum of products of eight pairs of 2-byte elements.
template <ElementType kElement>
FSA_DEVICE float dot_units(uint4 a, uint4 b) {
  const uint32 pairs_a[4] = {a.x, a.y, a.z, a.w}, pairs_b[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int32 i = 0; i < 4; ++i) {
    const float2 x = ptx::unpack<kElement>(pairs_a[i]), y = ptx::unpack<kElement>(pairs_b[i]);
    sum += x.x * y.x + x.y * y.y;
  }
  return sum;
}

// Minus that, times kLeastFoldedScale or more, is an exponent whose power is 0; the sum of three bfloat16 is finite.
inline constexpr float kNeverExponent = 1e38f;

// Each as three bfloat16: 8 of its 24 bits, 8 of the rest, and the rest of that.
FSA_DEVICE uint4 folded_row(float lse, float out_dot_grad) {
  constexpr ElementType kBf16 = ElementType::bf16;
  uint32 parts[3];
#pragma unroll
  for (int32 i = 0; i < 3; ++i) {
    parts[i] = ptx::pack<kBf16>(lse, out_dot_grad);
    const float2 part = ptx::unpack<kBf16>(parts[i]);
    lse -= part.x;
    out_dot_grad -= part.y;
  }
  constexpr uint32 kLow = 0xffffu, kHigh = ~kLow;
  return {(parts[0] & kLow) | (parts[1] << 16), (parts[2] & kLow) | (parts[0] & kHigh),
          (parts[1] >> 16) | (parts[2] & kHigh), 0};
}

template <class Types>
FSA_DEVICE void backward_prepare(const BackwardParams& params) {
  constexpr int32 kBlockM = Types::kBlockM, kVectors = Types::kTile.row_vectors;
  constexpr int32 kLanes = min_of(Types::kDimV / 8, kWarpThreads);  // of a row
  constexpr int32 kRowsAtOnce = kPrepareThreads / kLanes;
  const ForwardParams& p = params.forward;
  alignas(16) __shared__ float vectors[kVectors][kBlockM];
  __shared__ float sink_terms[kBlockM];
  const int32 tile = static_cast<int32>(blockIdx.x), head = static_cast<int32>(blockIdx.y);
  const int32 thread = static_cast<int32>(threadIdx.x);
  WorkTile work;
  describe_sequence(p, static_cast<int32>(blockIdx.z), head, work);
  ptx::admit_next_kernel();  // the main kernel sets up while the last blocks end
  const int32 sequence_head = static_cast<int32>(blockIdx.z) * p.num_heads + head;
  if (tile + sequence_head == 0) {
    if (p.work_counter != nullptr && thread < kWorkCounters) p.work_counter[thread] = 0;
    if (params.part_counts != nullptr && thread == 0) params.part_counts->blocks = 0;
    if (params.clears != nullptr && thread == 0) params.clears[0] = 0;
  }
  if (tile + thread == 0) {
    params.sums_done[sequence_head] = 0;
    if (params.clears != nullptr) params.clears[1 + sequence_head] = 0;  // there are no more waves than heads
  }
  if (tile * kBlockM >= work.rows) return;
  const int64 number = row_tile_number<kBlockM>(params, work, head, tile);

  if (!Types::kFirstStores &&
      (params.clears == nullptr || sequence_head / p.group_size < params.key_heads_per_wave)) {
    float4* const sums =
        reinterpret_cast<float4*>(params.grad_query_sum) + number * (kBlockM * Types::kDim / 4);
    for (int32 i = thread; i < kBlockM * Types::kDim / 4; i += kPrepareThreads)
      sums[i] = make_float4(0, 0, 0, 0);
  }
  if (thread < kBackwardWarps && Types::kDeterministic) params.turns[number * kBackwardWarps + thread] = 0;

  const float sink = Types::kSink ? load_scalar(p.sink, 0, 0, head) : 0.0f;
#pragma unroll
  for (int32 first = 0; first < kBlockM; first += kRowsAtOnce) {
    const int32 in_tile = first + thread / kLanes, unit = thread % kLanes;
    const int32 row = tile * kBlockM + in_tile;
    const bool used = row < work.seqlen_q;
    float sum = 0;
    if (used && unit < p.head_dim_v / 8) {
      const int64 position = static_cast<int64>(work.q_begin) + row;
      sum = dot_units<Types::kElement>(
          *reinterpret_cast<const uint4*>(static_cast<const uint16*>(p.out) +
                                          work.q_map_batch * p.out_stride_batch +
                                          position * p.out_stride_row + head * p.out_stride_head + unit * 8),
          *reinterpret_cast<const uint4*>(
              static_cast<const uint16*>(params.grad_out) + work.q_map_batch * params.grad_out_stride_batch +
              position * params.grad_out_stride_row + head * params.grad_out_stride_head + unit * 8));
    }
#pragma unroll
    for (int32 distance = kLanes / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (unit != 0) continue;
    const int64 position = static_cast<int64>(work.q_begin) + row;
    float lse = -kInfinity;
    if (used) {
      lse = p.lse[work.q_map_batch * p.lse_stride_batch + head * p.lse_stride_head + position];
      if (params.grad_lse != nullptr)
        sum -= params.grad_lse[work.q_map_batch * params.grad_lse_stride_batch +
                               head * params.grad_lse_stride_head + position * params.grad_lse_stride_row];
    }
    // A row without a key, or beyond the used length: p = 2^(s - inf) = 0.
    const bool empty = lse == -kInfinity;
    if constexpr (Types::kFolded) {
      reinterpret_cast<uint4*>(&vectors[0][0])[in_tile] =
          folded_row(empty ? -kNeverExponent : -lse * kLog2e / p.softmax_scale_log2, empty ? 0.0f : -sum);
    } else {
      const int32 at = row_vector_position(in_tile);
      vectors[0][at] = empty ? kInfinity : lse * kLog2e;
      vectors[1][at] = empty ? 0.0f : sum;
    }
    if constexpr (Types::kPairGate)
      vectors[Types::kAlphaVector][row_vector_position(in_tile)] =
          used ? load_scalar(p.alpha, work.q_map_batch, position, head) : 0.0f;
    if constexpr (Types::kSink)
      sink_terms[in_tile] = empty ? 0.0f : -sum * ptx::exp2_approx((sink - lse) * kLog2e);
  }
  __syncthreads();

  for (int32 i = thread; i < kVectors * kBlockM; i += kPrepareThreads)
    params.row_vectors[number * (kVectors * kBlockM) + i] = vectors[i / kBlockM][i % kBlockM];
  if constexpr (Types::kPairGate)
    if (thread < kBlockM) params.grad_alpha_sum[number * kBlockM + thread] = 0;
  if constexpr (Types::kGateTerms) {
    Extremes extremes;  // every warp of all rows
    for (int32 row = thread % kWarpThreads; row < min_of(kBlockM, work.seqlen_q - tile * kBlockM);
         row += kWarpThreads) {
      const float alpha = vectors[Types::kAlphaVector][row_vector_position(row)];
      extremes.include({alpha, alpha});
    }
    extremes.reduce_warp();
    if (thread < kBlockM)
      store_gate_terms<Types::kLogGate, false, kBlockM>(
          params.gate_row_terms + number * gate_term_bytes(kBlockM), thread,
          vectors[Types::kAlphaVector][row_vector_position(thread)], tile * kBlockM + thread < work.seqlen_q,
          extremes);
  }
  if constexpr (Types::kSink) {
    if (thread < kWarpThreads) {
      float sum = 0;
      for (int32 i = thread; i < kBlockM; i += kWarpThreads) sum += sink_terms[i];
#pragma unroll
      for (int32 distance = kWarpThreads / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (thread == 0) params.grad_sink_sum[number] = sum;
    }
  }
}

}  // namespace fsa::kernels
