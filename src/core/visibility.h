// SPDX-License-Identifier: Apache-2.0
// Which keys a row sees, as integer bands, and which key tiles a row tile sees, without looking at elements.
//
// With d = i + off - position(j) the distance from row i back to key j, every mask of the library is
//   0 <= j < seqlen_k  and  (d in band 0  or  d in band 1  or  (d >= 0 and j < sink)).
// position(j) is j, or the last token of window j where keys are compressed.
// Included by files that are compiled once per instruction set, so everything here has internal linkage or is
// always inlined: the linker must never pick an AVX-512 copy for a machine without it.
#pragma once

#include <cstdint>

#include "core/problem.h"

#define FSA_ALWAYS_INLINE inline __attribute__((always_inline))

namespace fsa {

struct Band {  // inclusive; empty when low > high
  std::int64_t low = 0;
  std::int64_t high = -1;
};

struct Visibility {
  Band bands[2];
  std::int64_t sink = 0;    // keys [0, sink) are visible to every row at or after them
  std::int64_t offset = 0;  // position of row 0
  std::int64_t seqlen_k = 0;
  std::int64_t key_base = 0;  // position of key j: key_base + j * key_stride
  std::int64_t key_stride = 1;
  bool unlimited = false;  // every row sees every key: no element test needed anywhere
};

enum class TileVisibility : std::uint8_t { none, partial, full };

constexpr std::int64_t kFarAway = std::int64_t{1} << 40;  // beyond any sequence, far from overflow

static FSA_ALWAYS_INLINE std::int64_t position_of_key(const Visibility& v, std::int64_t key) {
  return v.key_base + key * v.key_stride;
}

static FSA_ALWAYS_INLINE std::int64_t floor_divide(std::int64_t value, std::int64_t unit) {
  return value >= 0 ? value / unit : -((unit - 1 - value) / unit);
}

// Last key at or before a position; the first one at or after it is 1 + this of position - 1.
static FSA_ALWAYS_INLINE std::int64_t last_key_at(const Visibility& v, std::int64_t position) {
  return floor_divide(position - v.key_base, v.key_stride);
}

// window_sizes: the row [sink, left, right, near] of the key head; read only when the problem has them.
static FSA_ALWAYS_INLINE Visibility make_visibility(const Problem& problem, const Sequence& sequence,
                                                    const std::int64_t* window_sizes) {
  const std::int64_t window_left = problem.window_left, window_right = problem.window_right;
  Visibility v;
  v.offset = sequence.offset;
  v.seqlen_k = sequence.seqlen_k;
  if (problem.compress_block > 0) {
    v.key_base = problem.compress_block - 1;
    v.key_stride = problem.compress_stride;
  }
  if (problem.has_window_sizes) {
    const std::int64_t left = window_sizes[1], right = window_sizes[2], near = window_sizes[3];
    v.sink = window_sizes[0];
    v.bands[0] = {0, near - 1};
    v.bands[1] = {near + right, near + right + left - 1};
    return v;
  }
  v.bands[0] = {window_right < 0 ? -kFarAway : -window_right, window_left < 0 ? kFarAway : window_left};
  if (problem.causal && v.bands[0].low < 0) v.bands[0].low = 0;
  v.unlimited = !problem.causal && window_left < 0 && window_right < 0;
  return v;
}

static FSA_ALWAYS_INLINE bool is_visible(const Visibility& v, std::int64_t row, std::int64_t key) {
  const std::int64_t d = row + v.offset - position_of_key(v, key);
  return key >= 0 && key < v.seqlen_k &&
         ((d >= v.bands[0].low && d <= v.bands[0].high) || (d >= v.bands[1].low && d <= v.bands[1].high) ||
          (d >= 0 && key < v.sink));
}

// Rows [row_begin, row_end) by keys [key_begin, key_end), both inside the sequence. Exact for `none`; a tile
// that two touching bands cover together is called partial.
static FSA_ALWAYS_INLINE TileVisibility classify_tile(const Visibility& v, std::int64_t row_begin,
                                                      std::int64_t row_end, std::int64_t key_begin,
                                                      std::int64_t key_end) {
  if (row_begin >= row_end || key_begin >= key_end) return TileVisibility::none;
  if (v.unlimited) return TileVisibility::full;
  const std::int64_t d_min = row_begin + v.offset - position_of_key(v, key_end - 1);
  const std::int64_t d_max = row_end - 1 + v.offset - position_of_key(v, key_begin);
  bool any = false;
  for (const Band& band : v.bands) {
    if (band.low > band.high) continue;
    if (d_min >= band.low && d_max <= band.high) return TileVisibility::full;
    any = any || (d_max >= band.low && d_min <= band.high);
  }
  if (v.sink > key_begin && d_max >= 0) {
    if (v.sink >= key_end && d_min >= 0) return TileVisibility::full;
    any = true;
  }
  return any ? TileVisibility::partial : TileVisibility::none;
}

struct TileRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// Up to three disjoint ranges, ascending.
struct TileRanges {
  TileRange range[3];
  int count = 0;
};

static FSA_ALWAYS_INLINE void add_range(TileRanges& ranges, std::int64_t first, std::int64_t last,
                                        std::int64_t limit, std::int64_t tile) {
  if (first < 0) first = 0;
  if (last > limit - 1) last = limit - 1;
  if (first > last) return;
  ranges.range[ranges.count++] = {first / tile, last / tile + 1};
}

static FSA_ALWAYS_INLINE void merge_ranges(TileRanges& ranges) {
  for (int i = 1; i < ranges.count; ++i)  // insertion sort by begin: at most three entries
    for (int j = i; j > 0 && ranges.range[j].begin < ranges.range[j - 1].begin; --j) {
      const TileRange swapped = ranges.range[j];
      ranges.range[j] = ranges.range[j - 1];
      ranges.range[j - 1] = swapped;
    }
  int out = 0;
  for (int i = 0; i < ranges.count; ++i) {
    if (out > 0 && ranges.range[i].begin <= ranges.range[out - 1].end) {
      if (ranges.range[i].end > ranges.range[out - 1].end) ranges.range[out - 1].end = ranges.range[i].end;
    } else {
      ranges.range[out++] = ranges.range[i];
    }
  }
  ranges.count = out;
}

// Key tiles in which some row of [row_begin, row_end) sees a key; tiles of `tile` keys. A superset by at most the
// tiles between touching bands: ask classify_tile before computing one.
static FSA_ALWAYS_INLINE TileRanges visible_key_tiles(const Visibility& v, std::int64_t row_begin,
                                                      std::int64_t row_end, std::int64_t tile) {
  TileRanges ranges;
  if (row_begin >= row_end) return ranges;
  const std::int64_t first = row_begin + v.offset, last = row_end - 1 + v.offset;
  for (const Band& band : v.bands)
    if (band.low <= band.high)
      add_range(ranges, last_key_at(v, first - band.high - 1) + 1, last_key_at(v, last - band.low),
                v.seqlen_k, tile);
  if (v.sink > 0) add_range(ranges, 0, last < v.sink - 1 ? last : v.sink - 1, v.seqlen_k, tile);
  merge_ranges(ranges);
  return ranges;
}

// Row tiles in which some row of the sequence sees a key of [key_begin, key_end); the transposed question.
static FSA_ALWAYS_INLINE TileRanges visible_row_tiles(const Visibility& v, std::int64_t seqlen_q,
                                                      std::int64_t key_begin, std::int64_t key_end,
                                                      std::int64_t tile) {
  TileRanges ranges;
  if (key_begin >= key_end) return ranges;
  const std::int64_t first = position_of_key(v, key_begin) - v.offset;
  const std::int64_t last = position_of_key(v, key_end - 1) - v.offset;
  for (const Band& band : v.bands)
    if (band.low <= band.high) add_range(ranges, first + band.low, last + band.high, seqlen_q, tile);
  if (key_begin < v.sink) add_range(ranges, first, seqlen_q - 1, seqlen_q, tile);
  merge_ranges(ranges);
  return ranges;
}

}  // namespace fsa
