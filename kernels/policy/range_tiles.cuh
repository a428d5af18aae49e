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
    append(work, left, full_left, 1);
  }

 private:
  FSA_DEVICE static void append(WorkTile& work, int32 begin, int32 end, int32 masked) {
    if (begin < end) work.segments[work.num_segments++] = {end - 1, end - begin, masked};
  }
};

}  // namespace fsa::kernels
