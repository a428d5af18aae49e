// SPDX-License-Identifier: Apache-2.0
// One unit of scheduling: block_m query rows of one head, and the runs of key tiles that they visit. The
// producer writes it to shared memory; everybody else reads it there.
#pragma once

#include "core/base.cuh"
#include "core/config.h"
#include "core/params.h"

namespace fsa::kernels {

// Key tiles first, first - 1, ..., first - count + 1.
struct Segment {
  int32 first;
  int32 count;
  int32 masked;  // not 0: some element of these tiles is invisible to some row

  // In `masked`: of the first tile at a right edge, of the only one of a run at a left edge, warpgroup w sees nothing of
  // the outer half.
  static constexpr int32 half(int32 warpgroup) { return 2 << warpgroup; }
  FSA_DEVICE bool sees_half(int32 warpgroup) const { return (masked & half(warpgroup)) != 0; }
};

// One key tile of a list.
struct TileInfo {
  int32 tile;  // -1: none, with flags 0
  int32 flags;
  int32 block;      // of a block mask's bits, -1: none
  int32 block_key;  // the tile's first key, from the start of that block

  static constexpr int32 kMasked = 1;    // some element is invisible to some row
  static constexpr int32 kOwnShift = 1;  // bit 1 + w: warpgroup w visits it
  static constexpr int32 kFlagBits = 4;

  FSA_DEVICE bool exists() const { return tile >= 0; }
  FSA_DEVICE bool masked() const { return (flags & kMasked) != 0; }
  FSA_DEVICE bool belongs_to(int32 warpgroup) const { return (flags >> (kOwnShift + warpgroup) & 1) != 0; }
};

// A TileInfo in shared memory, tile and flags in one word: a loop that is steered by one word from a uniform address
// keeps its stages and descriptors in uniform registers. Steered by two, or by what a shuffle or a vote makes of them,
// it does not (ptxas of CUDA 13.0), and a sixth of the instructions of a step are copies between registers.
struct ListedTile {
  int32 place;
  int32 block;
  int32 block_key;

  ListedTile() = default;
  FSA_DEVICE ListedTile(const TileInfo& info)
      : place(info.tile << TileInfo::kFlagBits | info.flags), block(info.block), block_key(info.block_key) {}
  FSA_DEVICE TileInfo info() const {
    return {place >> TileInfo::kFlagBits, place & ((1 << TileInfo::kFlagBits) - 1), block, block_key};
  }
};
static_assert(sizeof(ListedTile) == kListedTileBytes, "config.h must know the size of a ListedTile");

struct WorkTile {
  int32 sequence;     // -1: no more work
  int32 q_map_batch;  // batch coordinate in the tensor maps: `sequence`, or 0 when packed
  int32 k_map_batch;
  int32 head;
  int32 kv_head;
  int32 q_begin;  // row of the sequence's first query in the tensor
  int32 k_begin;
  int32 rows;      // that the tensor holds for the sequence
  int32 seqlen_q;  // of them in use
  int32 seqlen_k;
  int32 m_begin;       // first row of the tile, from the sequence's start
  int32 num_segments;  // 0: no row sees a key
  Segment segments[kMaxSegments];

  FSA_DEVICE int32 offset() const { return seqlen_k - seqlen_q; }
};
static_assert(sizeof(WorkTile) == kWorkTileBytes, "config.h must know the size of a WorkTile");

// With the first tile of its list; each further one travels with the keys of the one before.
struct ListedWorkTile : WorkTile {
  ListedTile first;
};

// Where the bits of a row tile of 64 rows begin, in a map over skip tiles.
FSA_DEVICE int32* tile_bits(const TileBits& map, bool packed, const WorkTile& work, int32 row) {
  const int32 before = packed ? work.q_begin / kRowsPerWarpgroup + work.sequence : 0;
  return map.words + work.q_map_batch * map.stride_batch + work.head * map.stride_head +
         (before + row / kRowsPerWarpgroup) * map.stride_tile;
}

}  // namespace fsa::kernels
