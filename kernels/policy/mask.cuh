// SPDX-License-Identifier: Apache-2.0
// Which keys a row sees, as one interval per row: sequence end, causal, scalar window.
#pragma once

#include "policy/work_tile.cuh"
#include "tile/fragment.cuh"

namespace fsa::kernels {

struct KeyRange {  // [begin, end)
  int32 begin;
  int32 end;
};

// kLeft, kRight: the window is limited on that side (causal: on the right, by zero).
template <bool kLeft, bool kRight>
struct WindowMask {
  FSA_DEVICE static KeyRange visible(const ForwardParams& params, const WorkTile& work, int32 row) {
    const int32 diagonal = row + work.offset();
    KeyRange range = {0, work.seqlen_k};
    if constexpr (kLeft) range.begin = max_of(0, diagonal - params.window_left);
    if constexpr (kRight) range.end = min_of(work.seqlen_k, diagonal + params.window_right + 1);
    return range;
  }

  // rS: logits of rows `row` and `row + 8` (the thread's two) by the keys from `key_begin`.
  template <int32 kCount>
  FSA_DEVICE static void apply(const ForwardParams& params, const WorkTile& work, float (&rS)[kCount],
                               int32 row, int32 key_begin) {
    const int32 thread_column = fragment_column(lane_id(), 0);
    KeyRange range[kRowsPerThread];
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      range[slot] = visible(params, work, row + 8 * slot);
      range[slot].begin -= key_begin + thread_column;
      range[slot].end -= key_begin + thread_column;
    }
#pragma unroll
    for (int32 i = 0; i < kCount; ++i) {
      const int32 column = fragment_column(0, i);
      const KeyRange& seen = range[fragment_slot(i)];
      bool visible = column < seen.end;
      if constexpr (kLeft) visible = visible && column >= seen.begin;
      rS[i] = visible ? rS[i] : -kInfinity;
    }
  }
};

}  // namespace fsa::kernels
