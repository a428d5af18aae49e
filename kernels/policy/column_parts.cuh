// SPDX-License-Identifier: Apache-2.0
// Where the parts of a long column leave their sums.
#pragma once

#include "policy/key_work.cuh"
#include "tile/fragment.cuh"

namespace fsa::kernels {

// For split_columns. By the kernel before it, which makes the columns.
FSA_DEVICE void clear_part_counts(const BackwardParams& params) {
  const bool first = thread_id() == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
  if (first && params.part_counts != nullptr) params.part_counts->blocks = 0;
}

// A line of head_dim + head_dim_v floats, both padded, per key of the tile.
template <class Types>
FSA_DEVICE float* partial_rows(const BackwardParams& params, int32 slot) {
  return params.partial_sums + static_cast<int64>(slot) * backward_slot_floats(Types::kTile);
}

// One float per key.
template <class Types>
FSA_DEVICE float* partial_deltas(const BackwardParams& params, int32 slot) {
  return partial_rows<Types>(params, slot) + Types::kBlockN * (Types::kDim + Types::kDimV);
}

// Sums of one part, for sum_parts: of the warpgroup's 64 keys from `first_key` on, and of the columns of its accumulators,
// all or the first or second half. Eight bytes a thread, 32 a quad: once in kLeastPart row tiles or less.
template <class Types>
FSA_DEVICE void store_part(const BackwardParams& params, int32 slot, int32 first_key, int32 half,
                           const float (&rK)[Types::kGradDim / 2], const float (&rV)[Types::kGradDimV / 2]) {
  const int32 thread = own_thread();
  float* const sums = partial_rows<Types>(params, slot) + fragment_column(thread % kWarpThreads, 0);
#pragma unroll
  for (int32 i = 0; i < kRowsPerThread; ++i) {
    float* const row = sums + (first_key + fragment_row(thread, i)) * (Types::kDim + Types::kDimV);
#pragma unroll
    for (int32 j = 0; j < Types::kGradDim / 2; j += 4)
      *reinterpret_cast<float2*>(row + half * Types::kGradDim + j * 2) =
          make_float2(rK[j + 2 * i], rK[j + 2 * i + 1]);
#pragma unroll
    for (int32 j = 0; j < Types::kGradDimV / 2; j += 4)
      *reinterpret_cast<float2*>(row + Types::kDim + half * Types::kGradDimV + j * 2) =
          make_float2(rV[j + 2 * i], rV[j + 2 * i + 1]);
  }
}

// A part that no row sees. All consumers, of which this is `thread`.
template <class Types>
FSA_DEVICE void clear_part(const BackwardParams& params, int32 slot, int32 thread) {
  float* const sums = partial_rows<Types>(params, slot);
  for (int32 i = thread; i < backward_slot_floats(Types::kTile); i += Types::kConsumerThreads) sums[i] = 0;
}

}  // namespace fsa::kernels
