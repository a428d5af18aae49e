// SPDX-License-Identifier: Apache-2.0
// The row tiles that a work unit of the backward visits: the forward's tile iterators seen from the keys. All
// heads of the group, one after the other. The producer keeps a Walk in shared memory: it has 24 registers.
//
// kShortColumns: most columns are seen by few rows. Where kSplits says that columns may be cut, the length of one is
// length() where kReadsLengths says so, else count(), by the 32 lanes of a warp together: each returns its share.
// Walk::skip(n) leaves out what the next n calls of next() would have found.
#pragma once

#include "policy/bitmap_tiles.cuh"
#include "policy/key_mask.cuh"
#include "policy/range_tiles.cuh"

namespace fsa::kernels {

// Runs of row tiles, from top to bottom.
class RowSegments {
 public:
  FSA_DEVICE explicit RowSegments(KeyWork& work) : work_(work) { work.num_segments = 0; }

  // Rows [begin, end) see some key of the tile, [full_begin, full_end) see every one.
  FSA_DEVICE void append(int32 block_m, RowRange some, RowRange all) {
    if (some.end <= some.begin) return;
    const int32 first = some.begin / block_m, last = ceil_div(some.end, block_m);
    // Rows beyond the used length hide nothing.
    const int32 all_end = all.end >= work_.seqlen_q ? last : max_of(all.end, 0) / block_m;
    const int32 full_begin = min_of(last, max_of(first, ceil_div(max_of(all.begin, 0), block_m)));
    const int32 full_end = max_of(full_begin, min_of(last, all_end));
    append(first, full_begin, 1);
    append(full_begin, full_end, 0);
    append(full_end, last, 1);
  }

 private:
  FSA_DEVICE void append(int32 begin, int32 end, int32 masked) {
    begin = max_of(begin, taken_);
    if (begin >= end) return;
    work_.segments[work_.num_segments++] = {begin, end - begin, masked};
    taken_ = end;
  }

  KeyWork& work_;
  int32 taken_ = 0;  // tiles before it are in a run already
};

class RowSegmentWalk {
 public:
  FSA_DEVICE void skip(const BackwardParams& params, const KeyWork& work, int32 count) {
    RowTileInfo info;
    while (count > 0) {
      const int32 of_run = min_of(count, remaining_);
      tile_ += of_run;
      remaining_ -= of_run;
      count -= of_run;
      if (count == 0 || !next(params, work, info)) return;
      --count;
    }
  }

  FSA_DEVICE void start(const BackwardParams&, const KeyWork& work) {
    head_ = work.head;
    segment_ = remaining_ = 0;
  }

  FSA_DEVICE bool next(const BackwardParams& params, const KeyWork& work, RowTileInfo& info) {
    if (remaining_ == 0) {
      if (segment_ == work.num_segments) {
        if (head_ + 1 == work.head + params.forward.group_size) return false;
        ++head_;
        segment_ = 0;
      }
      const Segment& segment = work.segments[segment_++];
      tile_ = segment.first;
      remaining_ = segment.count;
      masked_ = segment.masked;
    }
    info.set(tile_++, head_, masked_ != 0);
    --remaining_;
    return true;
  }

  // The last call of next() found the last.
  FSA_DEVICE bool ended(const BackwardParams& params, const KeyWork& work) const {
    return remaining_ == 0 && segment_ == work.num_segments &&
           head_ + 1 == work.head + params.forward.group_size;
  }

 private:
  int32 head_;
  int32 segment_;
  int32 tile_;
  int32 remaining_;
  int32 masked_;
};

// Of a WindowMask.
template <class Mask, int32 kBlockM, int32 kBlockN>
struct RangeRows {
  using Walk = RowSegmentWalk;
  static constexpr bool kSplits = false;
  static constexpr bool kShortColumns = Mask::kLeftEdge;

  FSA_DEVICE static void describe(const BackwardParams& params, KeyWork& work) {
    RowSegments segments(work);
    const int32 last_key = min_of(work.n_begin + kBlockN, work.seqlen_k) - 1;
    if (last_key < work.n_begin) return;
    const RowRange first = KeyMask<Mask>::visible(params.forward, work, work.n_begin);
    const RowRange last = KeyMask<Mask>::visible(params.forward, work, last_key);
    // Unused keys are masked, whatever the row.
    segments.append(kBlockM, {first.begin, last.end},
                    work.partial(kBlockN) ? RowRange{0, 0} : RowRange{last.begin, first.end});
  }

  FSA_DEVICE static int32 count(const BackwardParams& params, const KeyWork& work) {
    int32 tiles = 0;
    for (int32 i = 0; i < work.num_segments; ++i) tiles += work.segments[i].count;
    return tiles * params.forward.group_size;
  }

  // Of RowTileBrief's flags: whether the second half of the keys sees nothing of the first row tile, and the first half
  // nothing of the last.
  FSA_DEVICE static int32 unseen_ends(const BackwardParams& params, const KeyWork& work) {
    const Segment& last = work.segments[work.num_segments - 1];
    return (sees_none(params, work, work.segments[0].first, work.n_begin + kRowsPerWarpgroup)
                ? RowTileBrief::kSecondPasses
                : 0) |
           (sees_none(params, work, last.first + last.count - 1, work.n_begin) ? RowTileBrief::kFirstEnds : 0);
  }

  // Whether kRowsPerWarpgroup keys from `key` on see nothing of a whole row tile.
  FSA_DEVICE static bool sees_none(const BackwardParams& params, const KeyWork& work, int32 tile, int32 key) {
    const int32 row = tile * kBlockM;
    if (row + kBlockM > work.seqlen_q) return false;
    return KeyMask<Mask>::visible(params.forward, work, key).begin >= row + kBlockM ||
           KeyMask<Mask>::visible(params.forward, work, key + kRowsPerWarpgroup - 1).end <= row;
  }

  // How many key tiles of this row tile were issued before this one: from the last backwards, or from the first on.
  FSA_DEVICE static int32 rank(const BackwardParams& params, const KeyWork& work, const RowTileInfo& info) {
    const int32 tile = work.n_begin / kBlockN, first_row = info.tile * kBlockM;
    if (ascends(params, work.part.key_tile))
      return tile - Mask::visible(params.forward, work, first_row).begin / kBlockN;
    const int32 last_row = min_of(first_row + kBlockM, work.seqlen_q) - 1;
    return ceil_div(Mask::visible(params.forward, work, last_row).end, kBlockN) - 1 - tile;
  }
};

// Of a BandMask. Deterministic sums need BitmapRows around it, which know the rank of a tile.
template <int32 kBlockM, int32 kBlockN>
struct BandRows {
  using Walk = RowSegmentWalk;
  static constexpr bool kSplits = true;
  static constexpr bool kShortColumns = true;
  static constexpr bool kReadsLengths = false;

  FSA_DEVICE static int32 count(const BackwardParams& params, const KeyWork& work, int32 lane) {
    return lane < work.num_segments ? work.segments[lane].count * params.forward.group_size : 0;
  }

  FSA_DEVICE static void describe(const BackwardParams& params, KeyWork& work) {
    RowSegments segments(work);
    const int32 last_key = min_of(work.n_begin + kBlockN, work.seqlen_k) - 1;
    if (last_key < work.n_begin) return;
    const Bands bands = load_bands(params.forward, work.kv_head);
    const int32 top = work.n_begin - work.offset(), bottom = last_key - work.offset();
    const bool partial = work.partial(kBlockN);
    if (work.n_begin < bands.sink) {  // of these every later row sees one
      const bool all = !partial && last_key < bands.sink;
      segments.append(kBlockM, {max_of(top, 0), work.seqlen_q},
                      all ? RowRange{bottom, kOpenWindow} : RowRange{0, 0});
      return;
    }
    band(segments, work, top, bottom, 0, bands.near, partial);
    band(segments, work, top, bottom, bands.far_begin, bands.far_end, partial);
  }

 private:
  FSA_DEVICE static void band(RowSegments& segments, const KeyWork& work, int32 top, int32 bottom,
                              int32 begin, int32 end, bool partial) {
    if (begin >= end) return;
    segments.append(kBlockM, {max_of(top + begin, 0), min_of(bottom + end, work.seqlen_q)},
                    partial ? RowRange{0, 0} : RowRange{bottom + begin, top + end});
  }
};

// The row tiles that a bit map keeps for this key tile, of those that `Visible` describes.
template <class Visible, int32 kBlockN>
struct BitmapRows {
  static constexpr bool kSplits = true;
  static constexpr bool kShortColumns = true;
  static constexpr bool kReadsLengths = false;

  FSA_DEVICE static void describe(const BackwardParams& params, KeyWork& work) {
    Visible::describe(params, work);
  }

  FSA_DEVICE static int32 count(const BackwardParams& params, const KeyWork& work, int32 lane) {
    const int32 words = static_cast<int32>(params.column_bits.stride_tile);
    int32 found = 0;
    for (int32 head = 0; head < params.forward.group_size; ++head)
      for (int32 word = lane; word < words; word += kWarpThreads)
        found += __popc(column_words(params, work, work.head + head)[word]);
    return work.num_segments > 0 ? found : 0;
  }

  class Walk {
   public:
    FSA_DEVICE void skip(const BackwardParams& params, const KeyWork& work, int32 count) {
      RowTileInfo info;
      while (count > 0) {
        const int32 last = min_of(end_, (tile_ / 32 + 1) * 32);  // of the same word
        if (tile_ < last) {
          fetch();
          const uint32 open = bits_ >> tile_ % 32 << tile_ % 32 & 0xffffffffu >> (31 - (last - 1) % 32);
          const int32 here = __popc(open);
          if (here <= count) {
            tile_ = last;
            count -= here;
            continue;
          }
        }
        if (!next(params, work, info)) return;
        --count;
      }
    }

    FSA_DEVICE void start(const BackwardParams& params, const KeyWork& work) {
      head_ = work.head;
      start_head(params, work);
    }

    FSA_DEVICE bool next(const BackwardParams& params, const KeyWork& work, RowTileInfo& info) {
      for (;;) {
        if (tile_ >= end_) {
          if (segment_ == work.num_segments) {
            if (head_ + 1 == work.head + params.forward.group_size) return false;
            ++head_;
            start_head(params, work);
          }
          const Segment& segment = work.segments[segment_++];
          tile_ = segment.first;
          end_ = segment.first + segment.count;
          masked_ = segment.masked;
        }
        fetch();
        const uint32 open = bits_ >> tile_ % 32 << tile_ % 32;
        const int32 found = open == 0 ? (word_ + 1) * 32 : word_ * 32 + __ffs(static_cast<int32>(open)) - 1;
        tile_ = min_of(found, end_);
        if (open == 0 || found >= end_) continue;
        info.set(tile_++, head_, masked_ != 0);
        return true;
      }
    }

   private:
    FSA_DEVICE void start_head(const BackwardParams& params, const KeyWork& work) {
      segment_ = tile_ = end_ = 0;
      word_ = -1;
      words_ = column_words(params, work, head_);
    }
    FSA_DEVICE void fetch() {
      if (tile_ / 32 == word_) return;
      word_ = tile_ / 32;
      bits_ = static_cast<uint32>(words_[word_]);
    }

    const int32* words_;
    uint32 bits_;
    int32 word_;
    int32 head_;
    int32 segment_;
    int32 tile_;
    int32 end_;
    int32 masked_;
  };

  FSA_DEVICE static int32 rank(const BackwardParams& params, const KeyWork& work, const RowTileInfo& info) {
    WorkTile of_head = work;
    of_head.head = info.head;
    const int32* const words = tile_bits(params.forward.gate_bits, params.forward.cu_seqlens_q != nullptr,
                                         of_head, info.tile * kRowsPerWarpgroup);
    const int32 tile = work.n_begin / kBlockN, key_tiles = ceil_div(work.seqlen_k, kBlockN);
    int32 count = tile % 32 == 31 ? 0 : __popc(static_cast<uint32>(words[tile / 32]) >> (tile % 32 + 1));
    for (int32 word = tile / 32 + 1; word < ceil_div(key_tiles, 32); ++word) count += __popc(words[word]);
    return count;
  }

 private:
  FSA_DEVICE static const int32* column_words(const BackwardParams& params, const KeyWork& work, int32 head) {
    const TileBits& map = params.column_bits;
    const int32 before = params.forward.cu_seqlens_k ? work.k_begin / kBlockN + work.sequence : 0;
    return map.words + work.k_map_batch * map.stride_batch + head * map.stride_head +
           (before + work.n_begin / kBlockN) * map.stride_tile;
  }
};

// The blocks of a block mask, by the column lists of block_columns. kBlockM = 64.
template <int32 kBlockM, int32 kBlockN>
struct ListRows {
  static_assert(kBlockM == kRowsPerWarpgroup, "row blocks are multiples of 64 rows");
  static constexpr bool kSplits = true;
  static constexpr bool kShortColumns = true;
  static constexpr bool kReadsLengths = true;

  FSA_DEVICE static void describe(const BackwardParams&, KeyWork& work) {
    work.num_segments = work.n_begin < work.seqlen_k && work.seqlen_q > 0 ? 1 : 0;
  }

  // To a few row tiles: the last block of a list may reach beyond the rows.
  FSA_DEVICE static int32 length(const BackwardParams& params, const KeyWork& work) {
    if (work.n_begin >= work.seqlen_k || work.seqlen_q <= 0) return 0;
    int32 blocks = 0;
    for (int32 head = 0; head < params.forward.group_size; ++head)
      blocks += params.list_count[list_of(params, work, work.head + head)];
    return blocks * (params.forward.blocks.block_rows / kBlockM);
  }

  class Walk {
   public:
    FSA_DEVICE void skip(const BackwardParams& params, const KeyWork& work, int32 count) {
      RowTileInfo info;
      const int32 per_block = params.forward.blocks.block_rows / kBlockM;
      while (count > 0) {
        const int32 whole =
            work.seqlen_q / params.forward.blocks.block_rows;  // blocks, whose tiles all exist
        if (remaining_ == 0 && entry_ < count_ && count >= per_block && entries_[entry_].row_block < whole) {
          ++entry_;
          count -= per_block;
          continue;
        }
        if (!next(params, work, info)) return;
        --count;
      }
    }

    FSA_DEVICE void start(const BackwardParams& params, const KeyWork& work) {
      head_ = work.head;
      start_head(params, work);
    }

    FSA_DEVICE bool next(const BackwardParams& params, const KeyWork& work, RowTileInfo& info) {
      for (;;) {
        if (remaining_ == 0) {
          if (entry_ == count_) {
            if (head_ + 1 == work.head + params.forward.group_size) return false;
            ++head_;
            start_head(params, work);
            continue;
          }
          current_ = entries_[entry_++];
          remaining_ = params.forward.blocks.block_rows / kBlockM;
        }
        const int32 in_block = params.forward.blocks.block_rows / kBlockM - remaining_--;
        const int32 tile = current_.row_block * (params.forward.blocks.block_rows / kBlockM) + in_block;
        if (tile * kBlockM >= work.seqlen_q) continue;
        const int32 to_right =
            tiles_in_block(params, work) - 1 - work.n_begin % params.forward.blocks.block_keys / kBlockN;
        info.set(tile, head_, current_.bits >= 0 || work.partial(kBlockN));
        info.list_rank = current_.rank + to_right;
        info.block = current_.bits;
        info.block_row = in_block * kBlockM;
        return true;
      }
    }

   private:
    FSA_DEVICE static int32 tiles_in_block(const BackwardParams& params, const KeyWork& work) {
      const int32 keys = params.forward.blocks.block_keys, begin = work.n_begin / keys * keys;
      return ceil_div(min_of(keys, work.seqlen_k - begin), kBlockN);
    }
    FSA_DEVICE void start_head(const BackwardParams& params, const KeyWork& work) {
      const int64 list = list_of(params, work, head_);
      count_ = params.list_count[list];
      entries_ = params.list_entries + list * params.list_capacity;
      entry_ = remaining_ = 0;
    }

    const ColumnEntry* entries_;
    ColumnEntry current_;
    int32 head_;
    int32 count_;
    int32 entry_;
    int32 remaining_;  // row tiles of the current block
  };

  FSA_DEVICE static int32 rank(const BackwardParams&, const KeyWork&, const RowTileInfo& info) {
    return info.list_rank;
  }

 private:
  FSA_DEVICE static int64 list_of(const BackwardParams& params, const KeyWork& work, int32 head) {
    return work.sequence * params.list_stride_batch + head * params.list_stride_head +
           work.n_begin / params.forward.blocks.block_keys;
  }
};

}  // namespace fsa::kernels
