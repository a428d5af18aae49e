// SPDX-License-Identifier: Apache-2.0
// After the backward kernel: the sums of a column's parts, added in their order, become gradients of its keys.
#pragma once

#include "policy/column_parts.cuh"
#include "policy/scalar.cuh"
#include "policy/store_gradient.cuh"
#include "ptx/math.cuh"
#include "ptx/sync.cuh"

namespace fsa::kernels {

inline constexpr int32 kSumThreads = 128;

// Blocks of kSumThreads threads, grid (most_slots, block_n / kSumRows): at its first slot a column has kSumRows keys for
// each.
template <class Types>
FSA_DEVICE void sum_parts(const BackwardParams& params) {
  constexpr int32 kColumns = Types::kDim + Types::kDimV, kUnits = kColumns / 8;
  const int32 slot = static_cast<int32>(blockIdx.x);
  ptx::wait_for_kernel_before();
  if (slot >= params.part_counts->slots) return;
  const SplitColumn column = params.split_columns[slot];
  if (column.parts == 0) return;
  __shared__ KeyWork work;
  if (thread_id() == 0) Types::Schedule::describe(params, column.key_tile, work);
  __syncthreads();
  const int32 first = static_cast<int32>(blockIdx.y) * kSumRows;
  const float* const sums = partial_rows<Types>(params, slot);
  for (int32 item = thread_id(); item < kSumRows * kUnits; item += kSumThreads) {
    const int32 row = first + item / kUnits, unit = item % kUnits;
    if (work.n_begin + row >= work.keys) continue;
    float total[8] = {};
#pragma unroll 4  // asked for before the first is added
    for (int32 part = 0; part < column.parts; ++part) {
      const float4* const from = reinterpret_cast<const float4*>(
          sums + static_cast<int64>(part) * backward_slot_floats(Types::kTile) + row * kColumns + unit * 8);
      const float4 a = from[0], b = from[1];
      const float of_part[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int32 i = 0; i < 8; ++i) total[i] += of_part[i];
    }
    const auto store = [&](const GradientRows& to, int32 to_column, float scale) {
      if (to_column >= to.columns) return;
      uint32 packed[4];
#pragma unroll
      for (int32 i = 0; i < 4; ++i)
        packed[i] = ptx::pack<Types::kElement>(total[2 * i] * scale, total[2 * i + 1] * scale);
      *reinterpret_cast<uint4*>(to.row(work, work.n_begin + row) + to_column) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
    };
    if (unit < Types::kDim / 8)
      store(grad_key_rows(params), unit * 8, params.softmax_scale);
    else
      store(grad_value_rows(params), unit * 8 - Types::kDim, 1.0f);
  }

  if constexpr (Types::kPairGate) {
    const int32 row = first + thread_id(), key = work.n_begin + row;
    if (thread_id() >= kSumRows || key >= work.keys) return;
    float total = 0;
    for (int32 part = 0; part < column.parts; ++part)
      total += partial_deltas<Types>(params, slot + part)[row];
    store_scalar(params.grad_delta, work.k_map_batch, static_cast<int64>(work.k_begin) + key, work.kv_head,
                 key < work.seqlen_k ? total * params.softmax_scale : 0.0f);
  }
}

}  // namespace fsa::kernels
