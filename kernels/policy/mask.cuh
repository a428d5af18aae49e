// SPDX-License-Identifier: Apache-2.0
// Which keys a row sees when that is one interval per row: sequence end, causal, scalar window.
#pragma once

#include "policy/work_tile.cuh"
#include "ptx/math.cuh"
#include "tile/fragment.cuh"

namespace fsa::kernels {

struct KeyRange {  // [begin, end)
  int32 begin;
  int32 end;
};

// Of the thread's keys of one row, taken in order: how many lie before `limit` (counted from its first key).
// They come in pairs, eight keys apart.
FSA_DEVICE int32 keys_before(int32 limit) {
  const int32 keys = max_of(limit, 0);
  return keys / 8 * 2 + min_of(keys % 8, 2);
}

// The lowest `count` bits.
FSA_DEVICE uint32 low_bits(int32 count) {
  return ~ptx::shift_left(0xffffffffu, static_cast<uint32>(max_of(count, 0)));
}

// The same by another instruction: where a complement is all that there is to a mask, its bits are tested one by one.
FSA_DEVICE uint32 bits_before(int32 count) {
  return ptx::shift_left(1u, static_cast<uint32>(max_of(count, 0))) - 1;
}

// Bits [begin, end) of word `word`.
FSA_DEVICE uint32 key_bits(int32 begin, int32 end, int32 word) {
  return low_bits(end - 32 * word) & ~low_bits(begin - 32 * word);
}

template <int32 kCount>
inline constexpr int32 kKeyWords = (kCount / 2 + 31) / 32;  // of each of a thread's rows

// Hides the keys of one row and word whose bit is 0, from logits or from probabilities. Bits move to predicates eight at a time, where comparing
// positions costs one or two instructions a key.
template <bool kLogits = true, int32 kCount>
FSA_DEVICE void hide_unseen(float (&rS)[kCount], int32 slot, int32 word, uint32 seen) {
#pragma unroll
  for (int32 bit = 0; bit < 32; ++bit) {
    const int32 key = 32 * word + bit;
    if (key >= kCount / 2) continue;
    const int32 i = key / 2 * 4 + 2 * slot + key % 2;
    rS[i] = (seen >> bit & 1) != 0 ? rS[i] : kLogits ? -kInfinity : 0.0f;
  }
}

// The keys that a thread's rows see of one tile; bits as in hide_unseen.
template <int32 kCount>
struct SeenKeys {
  uint32 words[kRowsPerThread][kKeyWords<kCount>];
  FSA_DEVICE void hide_others(float (&rS)[kCount]) const {
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot)
#pragma unroll
      for (int32 word = 0; word < kKeyWords<kCount>; ++word) hide_unseen(rS, slot, word, words[slot][word]);
  }
  // Whether all rows of the warp see all of its columns.
  FSA_DEVICE bool all() const {
    uint32 both = words[0][0] & words[1][0];
#pragma unroll
    for (int32 word = 1; word < kKeyWords<kCount>; ++word) both &= words[0][word] & words[1][word];
    return __all_sync(0xffffffffu, (~both & low_bits(kCount / 2)) == 0);
  }
};

// kLeft, kRight: the window is limited on that side (causal: on the right, by zero).
template <bool kLeft, bool kRight>
struct WindowMask {
  static constexpr bool kLeftEdge = kLeft, kRightEdge = kRight;

  FSA_DEVICE static KeyRange visible(const ForwardParams& params, const WorkTile& work, int32 row) {
    const int32 diagonal = row + work.offset();
    KeyRange range = {0, work.seqlen_k};
    if constexpr (kLeft) range.begin = max_of(0, diagonal - params.window_left);
    if constexpr (kRight) range.end = min_of(work.seqlen_k, diagonal + params.window_right + 1);
    return range;
  }

  // Of rows `row` and `row + 8` (the thread's two), of the keys from `key_begin`.
  template <int32 kCount>
  FSA_DEVICE static SeenKeys<kCount> seen(const ForwardParams& params, const WorkTile& work, const TileInfo&,
                                          int32 row, int32 key_begin) {
    SeenKeys<kCount> keys;
    const int32 first_key = key_begin + fragment_column(lane_id(), 0);
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const KeyRange range = visible(params, work, row + 8 * slot);
      const int32 end = keys_before(range.end - first_key);
      const int32 begin = kLeft ? keys_before(range.begin - first_key) : 0;
#pragma unroll
      for (int32 word = 0; word < kKeyWords<kCount>; ++word)
        keys.words[slot][word] = kLeft ? key_bits(begin, end, word) : bits_before(end - 32 * word);
    }
    return keys;
  }
};

}  // namespace fsa::kernels
