// SPDX-License-Identifier: Apache-2.0
// The skip map read by columns: for each key tile a bit per row tile. From forward.gate_bits to column_bits.
//
// One warp per 32 x 32 bits: blocks of kTransposeWarps warps, grid (ceil(row words * key words /
// kTransposeWarps), heads, batch) with row words = column_bits.stride_tile, key words = gate_bits.stride_tile.
// Every word of a sequence's key tiles is written.
#pragma once

#include "policy/column_parts.cuh"
#include "policy/key_work.cuh"

namespace fsa::kernels {

inline constexpr int32 kTransposeWarps = 4;

template <int32 kTileKeys>
FSA_DEVICE void transpose_bits(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  ptx::admit_next_kernel();
  clear_part_counts(params);
  const int32 row_words = static_cast<int32>(params.column_bits.stride_tile);
  const int32 key_words = static_cast<int32>(p.gate_bits.stride_tile);
  const int32 item = static_cast<int32>(blockIdx.x) * kTransposeWarps + thread_id() / kWarpThreads;
  if (item >= row_words * key_words) return;
  const int32 row_word = item % row_words, key_word = item / row_words;
  WorkTile work;
  describe_sequence(p, static_cast<int32>(blockIdx.z), static_cast<int32>(blockIdx.y), work);

  const int32 row = (row_word * 32 + lane_id()) * kRowsPerWarpgroup;
  const int32 keys = p.cu_seqlens_k ? p.cu_seqlens_k[work.sequence + 1] - work.k_begin : p.max_seqlen_k;
  const uint32 bits =
      row < work.rows
          ? static_cast<uint32>(tile_bits(p.gate_bits, p.cu_seqlens_q != nullptr, work, row)[key_word])
          : 0;
  uint32 own = 0;
#pragma unroll
  for (int32 bit = 0; bit < 32; ++bit) {
    const uint32 column = __ballot_sync(0xffffffffu, (bits >> bit & 1) != 0);
    if (lane_id() == bit) own = column;
  }
  const int32 tile = key_word * 32 + lane_id();
  if (tile * kTileKeys >= keys) return;
  const TileBits& to = params.column_bits;
  const int32 before = p.cu_seqlens_k ? work.k_begin / kTileKeys + work.sequence : 0;
  to.words[work.k_map_batch * to.stride_batch + work.head * to.stride_head +
           (before + tile) * to.stride_tile + row_word] = static_cast<int32>(own);
}

}  // namespace fsa::kernels
