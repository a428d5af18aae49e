// SPDX-License-Identifier: Apache-2.0
// Block masks: lists of full and partial key blocks per block of query rows, and the bits of partial blocks.
// Blocks are counted from the start of the sequence on both sides. An index outside the sequence is no block.
#pragma once

#include "policy/mask.cuh"

namespace fsa::kernels {

// Which list a row tile of 64 rows reads.
struct BlockList {
  int32 row_block;
  const int32* indices;
  int32 count;
};

FSA_DEVICE BlockList full_list(const ForwardParams& params, const WorkTile& work, int32 row_block) {
  const BlockLists& b = params.blocks;
  if (b.full_count == nullptr) return {row_block, nullptr, 0};
  return {row_block,
          b.full_indices + work.sequence * b.full_indices_stride_batch +
              work.head * b.full_indices_stride_head + row_block * b.full_indices_stride_row,
          b.full_count[work.sequence * b.full_stride_batch + work.head * b.full_stride_head +
                       row_block * b.full_stride_row]};
}

FSA_DEVICE int64 partial_position(const ForwardParams& params, const WorkTile& work, int32 row_block) {
  const BlockLists& b = params.blocks;
  return work.sequence * b.partial_stride_batch + work.head * b.partial_stride_head +
         row_block * b.partial_stride_row;
}

FSA_DEVICE BlockList partial_list(const ForwardParams& params, const WorkTile& work, int32 row_block) {
  const BlockLists& b = params.blocks;
  return {row_block,
          b.partial_indices + work.sequence * b.partial_indices_stride_batch +
              work.head * b.partial_indices_stride_head + row_block * b.partial_indices_stride_row,
          b.partial_count[partial_position(params, work, row_block)]};
}

struct ListMask {
  // Few tiles are masked, and bits take eight registers: they are read when they are wanted.
  template <int32 kCount>
  struct Seen {
    const ForwardParams& params;
    const WorkTile& work;
    TileInfo info;
    int32 row;
    int32 key_begin;
    FSA_DEVICE bool all() const { return !info.masked(); }
    FSA_DEVICE void hide_others(float (&rS)[kCount]) const { apply(params, work, info, rS, row, key_begin); }
  };

  template <int32 kCount>
  FSA_DEVICE static Seen<kCount> seen(const ForwardParams& params, const WorkTile& work, const TileInfo& info,
                                      int32 row, int32 key_begin) {
    return {params, work, info, row, key_begin};
  }

 private:
  template <int32 kCount>
  FSA_DEVICE static void apply(const ForwardParams& params, const WorkTile& work, const TileInfo& info,
                               float (&rS)[kCount], int32 row, int32 key_begin) {
    constexpr int32 kWords = kCount * 2 / 32;
    const int32 thread_column = fragment_column(lane_id(), 0);
    const int32 end = work.seqlen_k - key_begin - thread_column;
    uint32 seen[kRowsPerThread][kWords];  // bit c % 32 of word c / 32: the thread's column c
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot)
#pragma unroll
      for (int32 word = 0; word < kWords; ++word) {
        seen[slot][word] = 0xffffffffu;
        if (info.block < 0) continue;
        const BlockLists& b = params.blocks;
        const int64 line = static_cast<int64>(info.block) * b.block_rows + (row + 8 * slot) % b.block_rows;
        seen[slot][word] = b.bits[line * (b.block_keys / 32) + info.block_key / 32 + word] >> thread_column;
      }
#pragma unroll
    for (int32 i = 0; i < kCount; ++i) {
      const int32 column = fragment_column(0, i);
      const bool visible = column < end && (seen[fragment_slot(i)][column / 32] >> column % 32 & 1) != 0;
      rS[i] = visible ? rS[i] : -kInfinity;
    }
  }
};

template <int32 kBlockM, int32 kBlockN>
struct ListTiles {
  static constexpr bool kListed = true;
  static constexpr bool kHalfFirst = false, kHalfLast = false;
  static constexpr bool kInOrder = false;
  static constexpr int32 kRowTiles = kBlockM / kRowsPerWarpgroup;

  // Full blocks first, then partial ones; row blocks smaller than the CTA's tile one after the other.
  class Walk {
   public:
    FSA_DEVICE Walk(const ForwardParams& params, const WorkTile& work) : params_(params), work_(work) {}

    FSA_DEVICE bool next(TileInfo& info) {
      for (;;) {
        if (remaining_ == 0 && !next_block()) return false;
        const int32 tile = tile_--;
        --remaining_;
        const int32 key = tile * kBlockN;
        if (key >= work_.seqlen_k) continue;
        const bool masked = partial_ || key + kBlockN > work_.seqlen_k;
        info = {tile, (masked ? TileInfo::kMasked : 0) | own_ << TileInfo::kOwnShift, block_,
                remaining_ * kBlockN};
        return true;
      }
    }

   private:
    // Tiles of the next listed block, from right to left.
    FSA_DEVICE bool next_block() {
      for (;;) {
        while (position_ == 0)
          if (!next_list()) return false;
        const int32 index = list_.indices[--position_];
        const int32 tiles = params_.blocks.block_keys / kBlockN;
        if (index < 0 || index > (work_.seqlen_k - 1) / params_.blocks.block_keys) continue;
        block_ = partial_ ? params_.blocks.bits_begin[partial_position(params_, work_, list_.row_block)] +
                                position_
                          : -1;
        tile_ = index * tiles + tiles - 1;
        remaining_ = tiles;
        return true;
      }
    }

    FSA_DEVICE bool next_list() {
      if (own_ != 0 && !partial_) {
        partial_ = true;
        list_ = partial_list(params_, work_, list_.row_block);
      } else {
        if (row_tile_ == kRowTiles) return false;
        const int32 row = work_.m_begin + row_tile_ * kRowsPerWarpgroup;
        if (row >= work_.seqlen_q) return false;
        const int32 row_block = row / params_.blocks.block_rows;
        own_ = 0;
        do {  // all warpgroups of this row block
          own_ |= 1 << row_tile_++;
        } while (row_tile_ < kRowTiles &&
                 (work_.m_begin + row_tile_ * kRowsPerWarpgroup) / params_.blocks.block_rows == row_block);
        partial_ = false;
        list_ = full_list(params_, work_, row_block);
      }
      position_ = list_.count;
      return true;
    }

    const ForwardParams& params_;
    const WorkTile& work_;
    BlockList list_ = {0, nullptr, 0};
    int32 row_tile_ = 0;   // first that has not been looked at
    int32 own_ = 0;        // warpgroups of the current list
    int32 position_ = 0;   // blocks left in it
    int32 remaining_ = 0;  // tiles left in the current block
    int32 tile_ = 0;
    int32 block_ = -1;
    bool partial_ = false;
  };

  FSA_DEVICE static void describe(const ForwardParams& params, ListedWorkTile& work) {
    TileInfo first;
    work.num_segments = work.seqlen_k > 0 && Walk(params, work).next(first) ? 1 : 0;
    if (work.num_segments > 0) work.first = first;
  }

  // Blocks listed for the rows of `work`, of which only sequence, head and m_begin are known.
  FSA_DEVICE static int32 length(const ForwardParams& params, const WorkTile& work) {
    int32 blocks = 0, previous = -1;
#pragma unroll
    for (int32 w = 0; w < kRowTiles; ++w) {
      const int32 row = min_of(work.m_begin + w * kRowsPerWarpgroup, params.max_seqlen_q - 1);
      const int32 row_block = row / params.blocks.block_rows;
      const int32 listed =
          full_list(params, work, row_block).count + partial_list(params, work, row_block).count;
      blocks += row_block != previous ? listed : 0;
      previous = row_block;
    }
    return blocks;
  }
};

}  // namespace fsa::kernels
