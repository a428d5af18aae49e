// SPDX-License-Identifier: Apache-2.0
// Which keys a row sees when that is one interval per row: sequence end, causal, scalar window.
#pragma once

#include "policy/work_tile.cuh"
#include "tile/fragment.cuh"

namespace fsa::kernels {

struct KeyRange {  // [begin, end)
  int32 begin;
  int32 end;
};

// Hides the keys of the thread's fragment that `seen(slot, column)` does not show; columns count from the
// thread's first key.
template <int32 kCount, class Seen>
FSA_DEVICE void hide_unseen(float (&rS)[kCount], Seen seen) {
#pragma unroll
  for (int32 i = 0; i < kCount; ++i)
    rS[i] = seen(fragment_slot(i), fragment_column(0, i)) ? rS[i] : -kInfinity;
}

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
  FSA_DEVICE static void apply(const ForwardParams& params, const WorkTile& work, const TileInfo&,
                               float (&rS)[kCount], int32 row, int32 key_begin) {
    const int32 first_key = key_begin + fragment_column(lane_id(), 0);
    KeyRange range[kRowsPerThread];
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      range[slot] = visible(params, work, row + 8 * slot);
      range[slot].begin -= first_key;
      range[slot].end -= first_key;
    }
    hide_unseen(rS, [&](int32 slot, int32 column) {
      return column < range[slot].end && (!kLeft || column >= range[slot].begin);
    });
  }
};

}  // namespace fsa::kernels
