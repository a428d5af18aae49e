// SPDX-License-Identifier: Apache-2.0
// The columns of a block mask from its rows: for each key block the row blocks that list it, from top to
// bottom. The order of the row lists does not matter.
//
// One warp per key block: blocks of kColumnWarps warps, grid (ceil(key blocks / kColumnWarps), heads or 1 where
// the mask is shared, batch likewise). Ranks count keys in use: where seqused_k is given each batch entry needs
// columns of its own.
#pragma once

#include "policy/key_work.cuh"
#include "policy/list_tiles.cuh"

namespace fsa::kernels {

inline constexpr int32 kColumnWarps = 4;

// Of one list and one key block, by a warp: the position of the block in it (-1: absent), and how many key
// tiles of its other blocks lie to the right.
struct ListSearch {
  int32 position = -1;
  int32 tiles = 0;

  template <int32 kBlockN>
  FSA_DEVICE void read(const ForwardParams& p, const WorkTile& work, const BlockList& list, int32 block) {
    const int32 keys = p.blocks.block_keys;
    for (int32 first = 0; first < list.count; first += kWarpThreads) {
      const int32 at = first + lane_id();
      const int32 index = at < list.count ? list.indices[at] : -1;
      if (index == block) position = at;
      if (index > block) tiles += max_of(0, ceil_div(min_of(keys, work.seqlen_k - index * keys), kBlockN));
    }
  }
  FSA_DEVICE void reduce_warp() {
#pragma unroll
    for (int32 distance = kWarpThreads / 2; distance > 0; distance /= 2) {
      position = max_of(position, __shfl_xor_sync(0xffffffffu, position, distance));
      tiles += __shfl_xor_sync(0xffffffffu, tiles, distance);
    }
  }
};

template <int32 kBlockN>
FSA_DEVICE void block_columns(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  const int32 block = static_cast<int32>(blockIdx.x) * kColumnWarps + thread_id() / kWarpThreads;
  WorkTile work;
  describe_sequence(p, static_cast<int32>(blockIdx.z), static_cast<int32>(blockIdx.y), work);
  if (block >= ceil_div(p.max_seqlen_k, p.blocks.block_keys)) return;
  const int64 column = work.sequence * params.list_stride_batch + work.head * params.list_stride_head + block;
  ColumnEntry* const entries = params.list_entries + column * params.list_capacity;
  int32 count = 0;
  for (int32 row_block = 0; row_block < params.list_capacity; ++row_block) {
    ListSearch partial, full;
    partial.read<kBlockN>(p, work, partial_list(p, work, row_block), block);
    full.read<kBlockN>(p, work, full_list(p, work, row_block), block);
    full.tiles += partial.tiles;
    partial.reduce_warp();
    full.reduce_warp();
    if (partial.position < 0 && full.position < 0) continue;
    const int32 bits = partial.position < 0
                           ? -1
                           : p.blocks.bits_begin[partial_position(p, work, row_block)] + partial.position;
    if (lane_id() == 0) entries[count] = {row_block, bits, full.tiles, 0};
    ++count;
  }
  if (lane_id() == 0) params.list_count[column] = count;
}

}  // namespace fsa::kernels
