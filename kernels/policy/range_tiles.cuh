// SPDX-License-Identifier: Apache-2.0
// Key tiles of a work tile when every row sees one interval of keys: at most a masked run, a full run and
// another masked run, from right to left.
#pragma once

#include "policy/mask.cuh"
#include "policy/segment_walk.cuh"

namespace fsa::kernels {

template <class Mask, int32 kBlockM, int32 kBlockN>
struct RangeTiles {
  static constexpr bool kListed = false;
  static constexpr bool kInOrder = true;  // from right to left
  // Where the mask has an edge, the tile at it is half empty for some warpgroups. Two warpgroups lose 3 % where only one
  // of them has less to do, as when causal (H200, 2026-11).
  static constexpr bool kHalfTiles = kBlockN == 2 * kRowsPerWarpgroup;
  static constexpr bool kHalfFirst =
      kHalfTiles && Mask::kRightEdge && (Mask::kLeftEdge || kBlockM > 2 * kRowsPerWarpgroup);
  static constexpr bool kHalfLast = kHalfTiles && Mask::kLeftEdge;
  using Walk = SegmentWalk;

  FSA_DEVICE static void describe(const ForwardParams& params, WorkTile& work) {
    work.num_segments = 0;
    const int32 last_row = min_of(work.m_begin + kBlockM, work.seqlen_q) - 1;
    if (last_row < work.m_begin) return;
    // Interval ends grow with the row: all rows together see [top.begin, bottom.end), each sees
    // [bottom.begin, top.end).
    const KeyRange top = Mask::visible(params, work, work.m_begin);
    const KeyRange bottom = Mask::visible(params, work, last_row);
    if (bottom.end <= top.begin) return;

    const int32 right = ceil_div(bottom.end, kBlockN);  // one past the last tile
    const int32 left = top.begin / kBlockN;
    const int32 full_right = max_of(left, min_of(right, max_of(top.end, 0) / kBlockN));
    const int32 full_left = min_of(full_right, max_of(left, ceil_div(bottom.begin, kBlockN)));
    append(work, full_right, right, 1);
    append(work, full_left, full_right, 0);
    if constexpr (kHalfFirst) {
      if (full_right < right) work.segments[0].masked |= unseen_right(params, work, right - 1, last_row);
    }
    if constexpr (kHalfLast) {
      const int32 unseen = left < full_left && work.num_segments > 0 ? unseen_left(params, work, left) : 0;
      if (unseen != 0) {  // a run of its own
        append(work, left + 1, full_left, 1);
        append(work, left, left + 1, 1 | unseen);
        return;
      }
    }
    append(work, left, full_left, 1);
  }

 private:
  // Of which warpgroups no row sees the right half of this tile.
  FSA_DEVICE static int32 unseen_right(const ForwardParams& params, const WorkTile& work, int32 tile,
                                       int32 last_row) {
    int32 unseen = 0;
    for (int32 w = 0; w < kBlockM / kRowsPerWarpgroup; ++w) {
      const int32 row = min_of(last_row, work.m_begin + (w + 1) * kRowsPerWarpgroup - 1);
      if (Mask::visible(params, work, row).end <= tile * kBlockN + kBlockN / 2) unseen |= Segment::half(w);
    }
    return unseen;
  }

  // Of which warpgroups no row sees the left half of this tile.
  FSA_DEVICE static int32 unseen_left(const ForwardParams& params, const WorkTile& work, int32 tile) {
    int32 unseen = 0;
    for (int32 w = 0; w < kBlockM / kRowsPerWarpgroup; ++w) {
      const int32 row = work.m_begin + w * kRowsPerWarpgroup;
      if (Mask::visible(params, work, row).begin >= tile * kBlockN + kBlockN / 2) unseen |= Segment::half(w);
    }
    return unseen;
  }

  FSA_DEVICE static void append(WorkTile& work, int32 begin, int32 end, int32 masked) {
    if (begin < end) work.segments[work.num_segments++] = {end - 1, end - begin, masked};
  }
};

}  // namespace fsa::kernels
