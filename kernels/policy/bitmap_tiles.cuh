// SPDX-License-Identifier: Apache-2.0
// The key tiles that a bit map leaves open, among those that `Visible` (RangeTiles, BandTiles) describes. A
// CTA walks the union of its row tiles; each warpgroup visits those of its own bits.
//
// A row tile with a visible key tile has an open one, the first: the gate has nothing to compare it with. So
// a work tile with segments is never empty.
#pragma once

#include "policy/work_tile.cuh"

namespace fsa::kernels {

template <class Visible, int32 kBlockM>
struct BitmapTiles {
  static constexpr bool kListed = true;
  static constexpr bool kHalfFirst = false, kHalfLast = false;
  static constexpr bool kInOrder = true;
  static constexpr int32 kRowTiles = kBlockM / kRowsPerWarpgroup;

  class Walk {
   public:
    FSA_DEVICE Walk(const ForwardParams& params, const WorkTile& work) : work_(work) {
#pragma unroll
      for (int32 w = 0; w < kRowTiles; ++w)
        row_tile_[w] = work.m_begin + w * kRowsPerWarpgroup < work.seqlen_q
                           ? tile_bits(params.gate_bits, params.cu_seqlens_q != nullptr, work,
                                       work.m_begin + w * kRowsPerWarpgroup)
                           : nullptr;
    }

    FSA_DEVICE bool next(TileInfo& info) {
      for (;;) {
        if (tile_ < end_) {
          if (segment_ == work_.num_segments) return false;
          const Segment& segment = work_.segments[segment_++];
          tile_ = segment.first;
          end_ = segment.first - segment.count + 1;
          masked_ = segment.masked;
        }
        fetch(tile_ / 32);
        uint32 open = 0;
#pragma unroll
        for (int32 w = 0; w < kRowTiles; ++w) open |= bits_[w];
        open &= 0xffffffffu >> (31 - tile_ % 32);
        if (open == 0) {
          tile_ = tile_ / 32 * 32 - 1;
          continue;
        }
        const int32 bit = 31 - __clz(static_cast<int32>(open));
        const int32 found = tile_ / 32 * 32 + bit;
        tile_ = found - 1;
        if (found < end_) continue;
        info = {found, masked_ ? TileInfo::kMasked : 0, -1, 0};
#pragma unroll
        for (int32 w = 0; w < kRowTiles; ++w)
          info.flags |= static_cast<int32>(bits_[w] >> bit & 1) << (TileInfo::kOwnShift + w);
        return true;
      }
    }

   private:
    FSA_DEVICE void fetch(int32 word) {
      if (word == word_) return;
      word_ = word;
#pragma unroll
      for (int32 w = 0; w < kRowTiles; ++w)
        bits_[w] = row_tile_[w] ? static_cast<uint32>(row_tile_[w][word]) : 0;
    }

    const WorkTile& work_;
    const int32* row_tile_[kRowTiles];
    uint32 bits_[kRowTiles];
    int32 word_ = -1;
    int32 segment_ = 0;
    int32 tile_ = -1;
    int32 end_ = 0;
    int32 masked_ = 0;
  };

  FSA_DEVICE static void describe(const ForwardParams& params, ListedWorkTile& work) {
    Visible::describe(params, work);
    TileInfo first;
    if (work.num_segments > 0 && Walk(params, work).next(first)) work.first = first;
  }
};

}  // namespace fsa::kernels
