// SPDX-License-Identifier: Apache-2.0
// Before the backward kernel, for each row tile: what its query rows need (lse in base 2, out_dot_grad =
// rowsum(out * grad_out) - grad_lse, both folded where there is no logit chain, alpha of the pair gate), its part
// of the sink's gradient, and zeros where grad_alpha is summed up and where turns are counted. Of dQ's sums it
// clears those of the first wave of heads, or all where the main kernel clears none, or none where who comes first
// stores them. The first block clears the work counters.
//
// One block of kPrepareThreads per (row tile, head, sequence): grid (largest number of row tiles, heads,
// batch). Memory-bound: 4 head_dim_v bytes a row, and 4 head_dim where it clears. A warp has rows of its own, asks for
// all of them before it uses the first, and waits for no other warp.
#pragma once

#include "policy/gate_terms.cuh"
#include "policy/key_work.cuh"
#include "policy/logit.cuh"
#include "policy/scalar.cuh"
#include "ptx/math.cuh"
#include "ptx/sync.cuh"
#include "tile/lane_sums.cuh"

namespace fsa::kernels {

inline constexpr int32 kPrepareThreads = 256;

// That fit a processor: 48 registers a thread hold 128 bytes of rows, 80 hold 256; gates and sinks want a few more.
// Left alone, ptxas takes 78 and 142.
template <class Types>
inline constexpr int32 kPrepareBlocks = (Types::kDimV > 128 ? 3 : 5) - (Types::kPairGate || Types::kSink);

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

// The thread's share of kRows consecutive rows from `row` on. Rows behind `last` are read as that one: nobody
// uses them, and no load waits for a condition.
template <int32 kRows>
FSA_DEVICE void load_units(uint4 (&units)[kRows], const void* tensor, int64 first, int64 stride, int32 row,
                           int32 last) {
  const uint16* from = static_cast<const uint16*>(tensor) + first;
#pragma unroll
  for (int32 i = 0; i < kRows; ++i) {
    units[i] = *reinterpret_cast<const uint4*>(from);
    if (row + i < last) from += stride;
  }
}

template <class Types>
FSA_DEVICE void backward_prepare(const BackwardParams& params) {
  constexpr int32 kBlockM = Types::kBlockM, kVectors = Types::kTile.row_vectors;
  constexpr int32 kLanes = min_of(Types::kDimV / 8, kWarpThreads);  // of a row
  constexpr int32 kWarpRows = kBlockM / (kPrepareThreads / kWarpThreads);
  constexpr int32 kRows = kWarpRows * kLanes / kWarpThreads;  // of a thread
  constexpr int32 kSumLanes = kWarpThreads / kWarpRows;       // that end with the same row's sum
  static_assert(kLanes * 8 == Types::kDimV, "a unit of eight columns each");
  static_assert(kSumLanes * kRows == kLanes, "lanes end with the rows in their order");
  const ForwardParams& p = params.forward;
  // Heads first: rows of all heads lie side by side in memory, and so do those that are read at one time.
  const uint32 block = blockIdx.y * gridDim.x + blockIdx.x;
  const int32 tile = static_cast<int32>(block / gridDim.y), head = static_cast<int32>(block % gridDim.y);
  const int32 thread = static_cast<int32>(threadIdx.x);
  WorkTile work;
  describe_sequence(p, static_cast<int32>(blockIdx.z), head, work);
  ptx::admit_next_kernel();  // the main kernel sets up while the last blocks end
  const int32 sequence_head = static_cast<int32>(blockIdx.z) * p.num_heads + head;
  if (tile + sequence_head == 0) {
    if (p.work_counter != nullptr && thread < kWorkCounters) p.work_counter[thread] = 0;
    const bool has_columns = params.list_count != nullptr || params.column_bits.words != nullptr;
    if (!has_columns && params.part_counts != nullptr && thread == 0) params.part_counts->blocks = 0;
    if (params.clears != nullptr && thread == 0) params.clears[0] = 0;
  }
  if (tile + thread == 0) {
    if (params.column_parts == nullptr) params.sums_done[sequence_head] = 0;  // else split_columns does
    if (params.clears != nullptr) params.clears[1 + sequence_head] = 0;  // there are no more waves than heads
  }
  // Launched without waiting for the kernels that make columns, of which the main kernel has to find all.
  if (block == gridDim.x * gridDim.y - 1 && blockIdx.z + 1 == gridDim.z) ptx::wait_for_kernel_before();
  if (tile * kBlockM >= work.rows) return;
  const int64 number = row_tile_number<kBlockM>(params, work, head, tile);

  const int32 lane = own_lane();
  const int32 first_row =
      tile * kBlockM + static_cast<int32>(static_cast<uint32>(thread) / kWarpThreads) * kWarpRows;
  const int32 last_row = max_of(work.seqlen_q, 1) - 1;
  const int32 units = p.head_dim_v / 8, unit = lane % kLanes, column = min_of(unit, units - 1) * 8;
  const int32 row = min_of(first_row + lane / kLanes * kRows, last_row);
  uint4 out[kRows], grad_out[kRows];
  load_units(out, p.out,
             work.q_map_batch * p.out_stride_batch + (work.q_begin + row) * p.out_stride_row +
                 head * p.out_stride_head + column,
             p.out_stride_row, row, last_row);
  load_units(grad_out, params.grad_out,
             work.q_map_batch * params.grad_out_stride_batch +
                 (work.q_begin + row) * params.grad_out_stride_row + head * params.grad_out_stride_head +
                 column,
             params.grad_out_stride_row, row, last_row);

  // The row whose sum the lane will have.
  const int32 sum_row = first_row + lane / kSumLanes, in_tile = sum_row - tile * kBlockM;
  const bool used = sum_row < work.seqlen_q;
  const int64 position = static_cast<int64>(work.q_begin) + min_of(sum_row, last_row);
  float lse = p.lse[work.q_map_batch * p.lse_stride_batch + head * p.lse_stride_head + position];
  float grad_lse = 0;
  if (params.grad_lse != nullptr)
    grad_lse = params.grad_lse[work.q_map_batch * params.grad_lse_stride_batch +
                               head * params.grad_lse_stride_head + position * params.grad_lse_stride_row];
  float alpha = 0;
  if constexpr (Types::kPairGate)
    if (used) alpha = load_scalar(p.alpha, work.q_map_batch, position, head);
  const float sink = Types::kSink ? load_scalar(p.sink, 0, 0, head) : 0.0f;

  // Behind the loads, which wait for nothing.
  if (params.turns != nullptr) {
    if (thread < kBackwardWarps) params.turns[number * kBackwardWarps + thread] = 0;
  } else if (params.clears == nullptr || sequence_head / p.group_size < params.key_heads_per_wave) {
    float4* const sums =
        reinterpret_cast<float4*>(params.grad_query_sum) + number * (kBlockM * Types::kDim / 4) + thread;
#pragma unroll
    for (int32 i = 0; i < kBlockM * Types::kDim / 4; i += kPrepareThreads) sums[i] = make_float4(0, 0, 0, 0);
  }

  float sums[kRows];
#pragma unroll
  for (int32 i = 0; i < kRows; ++i) {
    const float sum = dot_units<Types::kElement>(out[i], grad_out[i]);
    sums[i] = unit < units ? sum : 0.0f;
  }
  sum_lanes<kLanes, 1>(sums, lane, [](int32) {});  // leaves that of sum_row in front
  const float sum = sums[0] - grad_lse;
  // A row without a key, or beyond the used length: p = 2^(s - inf) = 0.
  if (!used) lse = -kInfinity;
  const bool empty = lse == -kInfinity;
  const bool writes = lane % kSumLanes == 0;
  float* const vectors = params.row_vectors + number * (kVectors * kBlockM);
  if (writes) {
    if constexpr (Types::kFolded) {
      reinterpret_cast<uint4*>(vectors)[in_tile] =
          folded_row(empty ? -kNeverExponent : -lse * kLog2e / p.softmax_scale_log2, empty ? 0.0f : -sum);
    } else {
      const int32 at = row_vector_position(in_tile);
      vectors[at] = empty ? kInfinity : lse * kLog2e;
      vectors[kBlockM + at] = empty ? 0.0f : sum;
    }
    if constexpr (Types::kPairGate)
      vectors[Types::kAlphaVector * kBlockM + row_vector_position(in_tile)] = alpha;
  }
  if constexpr (Types::kPairGate)
    if (thread < kBlockM) params.grad_alpha_sum[number * kBlockM + thread] = 0;

  if constexpr (Types::kGateTerms) {
    __shared__ float alphas[kBlockM];
    if (writes) alphas[in_tile] = alpha;
    __syncthreads();
    Extremes extremes;  // every warp of all rows
    for (int32 i = lane; i < min_of(kBlockM, work.seqlen_q - tile * kBlockM); i += kWarpThreads)
      extremes.include({alphas[i], alphas[i]});
    extremes.reduce_warp();
    if (thread < kBlockM)
      store_gate_terms<Types::kLogGate, false, kBlockM>(
          params.gate_row_terms + number * gate_term_bytes(kBlockM), thread, alphas[thread],
          tile * kBlockM + thread < work.seqlen_q, extremes);
  }
  if constexpr (Types::kSink) {
    __shared__ float terms[kBlockM];
    if (writes) terms[in_tile] = empty ? 0.0f : -sum * ptx::exp2_approx((sink - lse) * kLog2e);
    __syncthreads();
    if (thread < kWarpThreads) {
      float of_tile = 0;
      for (int32 i = thread; i < kBlockM; i += kWarpThreads) of_tile += terms[i];
#pragma unroll
      for (int32 distance = kWarpThreads / 2; distance > 0; distance /= 2)
        of_tile += __shfl_xor_sync(0xffffffffu, of_tile, distance);
      if (thread == 0) params.grad_sink_sum[number] = of_tile;
    }
  }
}

}  // namespace fsa::kernels
