// SPDX-License-Identifier: Apache-2.0
// `window_sizes`: per key-value head a near band, a gap, a distant band and the first keys of the sequence.
//
//   d = row + offset - key >= 0 and (d < near, or near + right <= d < near + right + left, or key < sink)
#pragma once

#include "policy/mask.cuh"
#include "policy/segment_walk.cuh"

namespace fsa::kernels {

struct Bands {
  int32 sink;
  int32 near;
  int32 far_begin;  // distances [far_begin, far_end)
  int32 far_end;
};

FSA_DEVICE Bands load_bands(const ForwardParams& params, int32 kv_head) {
  const int32* const sizes = params.window_sizes + kv_head * params.window_sizes_stride;
  // No sequence is longer than this, and sums of three stay in range.
  const auto size = [&](int32 column) { return min_of(max_of(sizes[column], 0), kOpenWindow / 2); };
  const int32 sink = size(0), left = size(1), right = size(2), near = size(3);
  if (right == 0 || left == 0) return {sink, near + left, near + left, near + left};  // one band
  return {sink, near, near + right, min_of(near + right, kOpenWindow) + left};
}

struct BandMask {
  template <int32 kCount>
  FSA_DEVICE static SeenKeys<kCount> seen(const ForwardParams& params, const WorkTile& work, const TileInfo&,
                                          int32 row, int32 key_begin) {
    SeenKeys<kCount> keys;
    const Bands bands = load_bands(params, work.kv_head);
    const int32 first_key = key_begin + fragment_column(lane_id(), 0);
    // Keys behind the sequence's end lie behind the diagonal of every row in use.
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const int32 diagonal = row + 8 * slot + work.offset() - first_key;
      const int32 near_begin = keys_before(diagonal - bands.near + 1), end = keys_before(diagonal + 1);
      const int32 far_begin = keys_before(diagonal - bands.far_end + 1);
      const int32 far_end = keys_before(diagonal - bands.far_begin + 1);
      const int32 sink = keys_before(min_of(bands.sink - first_key, diagonal + 1));
#pragma unroll
      for (int32 word = 0; word < kKeyWords<kCount>; ++word)
        keys.words[slot][word] =
            key_bits(near_begin, end, word) | key_bits(far_begin, far_end, word) | low_bits(sink - 32 * word);
    }
    return keys;
  }
};

// The runs of key tiles of a work tile: at most three of the near band, three of the distant one, two of the
// sink, from right to left. A tile that two of them share belongs to the first, as a masked one: masks are
// evaluated by the whole rule.
template <int32 kBlockM, int32 kBlockN>
struct BandTiles {
  static constexpr bool kListed = false;
  static constexpr bool kHalfFirst = false, kHalfLast = false;
  static constexpr bool kInOrder = true;  // from right to left
  using Walk = SegmentWalk;

  FSA_DEVICE static void describe(const ForwardParams& params, WorkTile& work) {
    work.num_segments = 0;
    const int32 last_row = min_of(work.m_begin + kBlockM, work.seqlen_q) - 1;
    if (last_row < work.m_begin) return;
    const Bands bands = load_bands(params, work.kv_head);
    const int32 top = work.m_begin + work.offset(), bottom = last_row + work.offset();  // last keys seen
    int32 limit = ceil_div(work.seqlen_k, kBlockN);  // tiles from here on are taken
    append_band(work, top, bottom, 0, bands.near, limit);
    append_band(work, top, bottom, bands.far_begin, bands.far_end, limit);
    const int32 seen_sink = max_of(min_of(bands.sink, bottom + 1), 0);  // by some row
    const int32 full_sink = max_of(min_of(bands.sink, top + 1), 0) / kBlockN;
    append(work, full_sink, ceil_div(seen_sink, kBlockN), 1, limit);
    append(work, 0, full_sink, 0, limit);
  }

 private:
  // Keys at the distances [begin, end) of rows whose last keys are top..bottom.
  FSA_DEVICE static void append_band(WorkTile& work, int32 top, int32 bottom, int32 begin, int32 end,
                                     int32& limit) {
    if (begin >= end) return;
    const int32 seen_end = min_of(bottom - begin + 1, work.seqlen_k);  // by some row
    const int32 seen_begin = max_of(top - end + 1, 0);
    if (seen_end <= seen_begin) return;
    const int32 all_end = max_of(min_of(top - begin + 1, work.seqlen_k), 0);  // by every row
    const int32 all_begin = max_of(bottom - end + 1, 0);
    const int32 right = ceil_div(seen_end, kBlockN), left = seen_begin / kBlockN;
    const int32 full_right = max_of(left, min_of(right, all_end / kBlockN));
    const int32 full_left = min_of(full_right, max_of(left, ceil_div(all_begin, kBlockN)));
    append(work, full_right, right, 1, limit);
    append(work, full_left, full_right, 0, limit);
    append(work, left, full_left, 1, limit);
  }

  FSA_DEVICE static void append(WorkTile& work, int32 begin, int32 end, int32 masked, int32& limit) {
    end = min_of(end, limit);
    if (begin >= end) return;
    work.segments[work.num_segments++] = {end - 1, end - begin, masked};
    limit = begin;
  }
};

}  // namespace fsa::kernels
