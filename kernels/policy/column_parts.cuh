// SPDX-License-Identifier: Apache-2.0
// Where the parts of a long column leave their sums.
#pragma once

#include "policy/key_work.cuh"

namespace fsa::kernels {

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

}  // namespace fsa::kernels
