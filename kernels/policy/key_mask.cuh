// SPDX-License-Identifier: Apache-2.0
// The masks of the forward seen from the keys: S transposed, keys down, query rows across.
#pragma once

#include "policy/band_mask.cuh"
#include "policy/key_work.cuh"
#include "policy/list_tiles.cuh"

namespace fsa::kernels {

struct RowRange {  // [begin, end)
  int32 begin;
  int32 end;
};

// Of a forward mask. apply: rP holds probabilities of keys `key` and `key + 8` (the thread's two) by the query rows
// from `row_begin`; those of pairs that do not see each other may be anything and become 0. Rows beyond the used length need no mask: their lse is +inf.
template <class Mask>
struct KeyMask;

template <bool kLeft, bool kRight>
struct KeyMask<WindowMask<kLeft, kRight>> {
  // Rows that see a key of the used length.
  FSA_DEVICE static RowRange visible(const ForwardParams& params, const WorkTile& work, int32 key) {
    RowRange range = {0, work.seqlen_q};
    if constexpr (kRight) range.begin = max_of(0, key - params.window_right - work.offset());
    if constexpr (kLeft) range.end = min_of(work.seqlen_q, key + params.window_left - work.offset() + 1);
    return range;
  }

  template <int32 kCount>
  FSA_DEVICE static void apply(const BackwardParams& params, const KeyWork& work, const RowTileInfo&,
                               float (&rP)[kCount], int32 key, int32 row_begin) {
    const int32 first_row = row_begin + fragment_column(own_lane(), 0);
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const RowRange range = visible(params.forward, work, key + 8 * slot);
      const int32 end = key + 8 * slot < work.seqlen_k ? keys_before(range.end - first_row) : 0;
      const int32 begin = kRight ? keys_before(range.begin - first_row) : 0;
#pragma unroll
      for (int32 word = 0; word < kKeyWords<kCount>; ++word)
        hide_unseen<false>(rP, slot, word, kRight ? key_bits(begin, end, word) : low_bits(end - 32 * word));
    }
  }
};

template <>
struct KeyMask<BandMask> {
  template <int32 kCount>
  FSA_DEVICE static void apply(const BackwardParams& params, const KeyWork& work, const RowTileInfo&,
                               float (&rP)[kCount], int32 key, int32 row_begin) {
    const Bands bands = load_bands(params.forward, work.kv_head);
    const int32 first_row = row_begin + fragment_column(own_lane(), 0);
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const int32 own = key + 8 * slot;
      const int32 diagonal = own - work.offset() - first_row;  // of the thread's rows, the first that sees it
      const bool used = own < work.seqlen_k;
      const int32 begin = keys_before(diagonal);
      const int32 near_end = used ? keys_before(own < bands.sink ? kOpenWindow : diagonal + bands.near) : 0;
      const int32 far_begin = keys_before(diagonal + bands.far_begin);
      const int32 far_end = used ? keys_before(diagonal + bands.far_end) : 0;
#pragma unroll
      for (int32 word = 0; word < kKeyWords<kCount>; ++word)
        hide_unseen<false>(rP, slot, word,
                           key_bits(begin, near_end, word) | key_bits(far_begin, far_end, word));
    }
  }
};

template <>
struct KeyMask<ListMask> {
  template <int32 kCount>
  FSA_DEVICE static void apply(const BackwardParams& params, const KeyWork& work, const RowTileInfo& info,
                               float (&rP)[kCount], int32 key, int32 row_begin) {
    const BlockLists& b = params.forward.blocks;
    const int32 words = b.block_keys / 32;
#pragma unroll
    for (int32 i = 0; i < kCount; ++i) {
      const int32 own = key + 8 * fragment_slot(i);
      bool visible = own < work.seqlen_k;
      if (visible && info.block >= 0) {
        const int32 in_block = own % b.block_keys;
        const int32 row =
            row_begin - info.tile * kRowsPerWarpgroup + info.block_row + fragment_column(own_lane(), i);
        const int64 line = static_cast<int64>(info.block) * b.block_rows + row;
        visible = (b.bits[line * words + in_block / 32] >> in_block % 32 & 1) != 0;
      }
      rP[i] = visible ? rP[i] : 0.0f;
    }
  }
};

}  // namespace fsa::kernels
