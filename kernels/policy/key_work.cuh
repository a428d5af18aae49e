// SPDX-License-Identifier: Apache-2.0
// One unit of scheduling of the backward: block_n keys of one key-value head, and the row tiles of all query
// heads of its group that see them. The producer writes it to shared memory; everybody else reads it there.
#pragma once

#include "core/backward.h"
#include "policy/schedule.cuh"

namespace fsa::kernels {

// Known not to be negative, which saves the sign's share of every division: some 60 instructions a tile.
FSA_DEVICE int32 own_lane() { return static_cast<int32>(static_cast<uint32>(thread_id()) % kWarpThreads); }
FSA_DEVICE int32 own_thread() {  // of the warpgroup
  return static_cast<int32>(static_cast<uint32>(thread_id()) % kWarpgroupThreads);
}

// `head` is the group's first. Segments are runs of row tiles: first, first + 1, ...
struct alignas(16) KeyWork : WorkTile {
  int32 n_begin;  // first key of the tile, from the sequence's start
  int32 keys;     // that the tensor holds for the sequence
  int32 number;   // work units of this CTA before it
  int32 loads;    // of those, the ones that loaded keys
  ColumnPart part;

  FSA_DEVICE bool partial(int32 block_n) const { return n_begin + block_n > seqlen_k; }
};
static_assert(sizeof(KeyWork) == kKeyWorkBytes, "backward.h must know the size of a KeyWork");

// What every consumer thread wants of every row tile, in one read: while multiplies run, a read of shared
// memory takes some 150 clocks.
struct alignas(16) RowTileBrief {
  int32 tile;
  int32 flags;   // and from kRankShift on the rank
  int32 used;    // rows from the tile's first on, to the end of the sequence: a full tile has block_m or more
  int32 number;  // row_tile_number

  static constexpr int32 kMasked = 1;  // some element is invisible
  static constexpr int32 kLast = 2;    // of the work
  // Where warpgroups pass over what they do not see, see backward_alternate.cuh.
  static constexpr int32 kFirstEnds = 4;  // the first warpgroup sees nothing of the last, which is the next or this
  static constexpr int32 kSecondPasses = 8;  // the second sees nothing of this, the first
  static constexpr int32 kRankShift = 4;

  FSA_DEVICE bool masked() const { return (flags & kMasked) != 0; }
  FSA_DEVICE bool last() const { return (flags & kLast) != 0; }
  // Of this key tile among those of the row tile; deterministic.
  FSA_DEVICE int32 rank() const { return flags >> kRankShift; }
  // The rank, and whether it is the last of the work, in one number.
  FSA_DEVICE int32 order() const { return flags >> 1; }
  static constexpr int32 kOrderLast = 1, kOrderRankShift = kRankShift - 1;
};

// One row tile of one head. It travels with the stage that holds its Q.
struct RowTileInfo : RowTileBrief {
  int32 head;
  int32 list_rank;  // of a key tile in a list
  int32 block;      // of a block mask's bits, -1: none
  int32 block_row;  // the tile's first row, from the start of that block

  FSA_DEVICE void set(int32 tile_, int32 head_, bool masked) {
    tile = tile_;
    head = head_;
    flags = masked ? kMasked : 0;
    list_rank = block_row = 0;
    block = -1;
  }
};
static_assert(sizeof(RowTileInfo) == kRowTileInfoBytes, "backward.h must know the size of a RowTileInfo");

template <int32 kBlockM>
FSA_DEVICE int64 row_tile_number(const BackwardParams& params, const WorkTile& work, int32 head, int32 tile) {
  const int32 before = params.forward.cu_seqlens_q ? work.q_begin / kBlockM + work.sequence : 0;
  return (static_cast<int64>(work.q_map_batch) * params.forward.num_heads + head) * params.row_tiles +
         before + tile;
}

// Deterministic: whether the unit at this place of the order is one of the wave that goes from the first key tile to the
// last.
FSA_DEVICE bool ascends(const BackwardParams& params, int32 place) { return place >= params.ascending_from; }

// Key tiles from the first of a sequence (the longest when causal) to the last; key heads fastest within a wave, whose
// Q, dO and dQ sums fit the L2 together where that leaves a key tile for each processor. A counter hands the work out,
// or without one each CTA takes every gridDim.x-th unit.
//
// Deterministic: key tiles add in the order in which they are issued, so whoever waits waits for work issued before its
// own, wherever CTAs run. For that every unit comes from the counter, and none is taken ahead of time: it would start
// late, and later units wait for it. The order is from the last key tile to the first, in which a row tile of a causal call
// is reached by one after the other. But it ends with the longest ones: some processors then have nothing to do for the
// length of one, 6 % of the time. So the last heads of a causal call may form a wave that goes from the first key tile to
// the last. There units that begin together wait for each other, the k-th for k row tiles, which is why not all heads do.
//
// kSplits: long columns may have been cut; their parts follow each other. kDescribesAhead: whoever asks for a unit has
// time to wait for the counter, and holds one that has not begun already.
template <int32 kBlockN, bool kDeterministic, bool kSplits>
class KeySchedule {
 public:
  struct Place {
    int32 batch_head;  // key head
    int32 in_order;    // of its key tiles
  };
  FSA_DEVICE static int32 wave_of(const BackwardParams& params, int32 index) {
    return index / (params.key_heads_per_wave * blocks(params));
  }
  // In the order of all heads' key tiles.
  FSA_DEVICE static Place place_of(const BackwardParams& params, int32 index) {
    const bool last = kDeterministic && ascends(params, index);
    const int32 last_wave =
        kDeterministic ? params.ascending_from / blocks(params) : heads(params);  // its first head
    const int32 first_head = last ? last_wave : wave_of(params, index) * params.key_heads_per_wave;
    const int32 wave_heads =
        last ? heads(params) - first_head : min_of(params.key_heads_per_wave, last_wave - first_head);
    const int32 in_wave = index - first_head * blocks(params);
    return {first_head + in_wave % wave_heads, in_wave / wave_heads};
  }
  // False when there is no key tile at this place, the sequence being too short.
  FSA_DEVICE static bool describe(const BackwardParams& params, int32 index, KeyWork& work) {
    const ForwardParams& p = params.forward;
    const auto [batch_head, in_order] = place_of(params, index);
    const int32 kv_heads = p.num_heads / p.group_size;
    const int32 sequence = batch_head / kv_heads;

    describe_sequence(p, sequence, (batch_head - sequence * kv_heads) * p.group_size, work);
    work.keys = p.cu_seqlens_k ? p.cu_seqlens_k[sequence + 1] - work.k_begin : p.max_seqlen_k;
    const bool first_to_last = !kDeterministic || ascends(params, index);
    work.n_begin = (first_to_last ? in_order : blocks(params) - 1 - in_order) * kBlockN;
    return work.n_begin < work.keys;
  }
  FSA_DEVICE static int32 key_tiles(const BackwardParams& params) { return blocks(params) * heads(params); }

  FSA_DEVICE void start(const BackwardParams&) {
    index_ = kDeterministic ? kNone : static_cast<int32>(blockIdx.x);
  }

  // The next unit's place, asked for while there is something else to do, for the counter takes 2300 clocks to answer; but
  // not a unit ahead: who has a long one would hold another that somebody else could begin (causal, 32 query heads on 8
  // key heads: -20 %).
  FSA_DEVICE void ask(const BackwardParams& params) { index_ = take(params); }

  // False when there is no more; otherwise everything but the segments is filled in.
  FSA_DEVICE bool next(const BackwardParams& params, KeyWork& work) {
    for (;;) {
      if (index_ == kNone) ask(params);
      const int32 index = index_;
      if (index >= units(params)) return false;
      index_ = kNone;
      work.part = {index, 0, kRestOfColumn, -1};
      if constexpr (kSplits)
        if (params.column_parts != nullptr) work.part = params.column_parts[index];
      if (describe(params, work.part.key_tile, work)) return true;
    }
  }

  FSA_DEVICE static void finish(const BackwardParams& params) {
    LongestFirst<kBlockN>::finish(params.forward);
  }

 private:
  FSA_DEVICE static int32 take(const BackwardParams& params) {
    const int32 first = kDeterministic ? 0 : static_cast<int32>(gridDim.x);  // whose first is its own number
    return first + atomicAdd(params.forward.work_counter, 1);
  }

  FSA_DEVICE static int32 blocks(const BackwardParams& params) {
    return ceil_div(params.forward.max_seqlen_k, kBlockN);
  }
  FSA_DEVICE static int32 heads(const BackwardParams& params) {
    return params.forward.batch * (params.forward.num_heads / params.forward.group_size);
  }

  FSA_DEVICE static int32 units(const BackwardParams& params) {
    if constexpr (kSplits)
      if (params.column_parts != nullptr) return params.part_counts->parts;
    return key_tiles(params);
  }

  static constexpr int32 kNone = -1;
  int32 index_;  // of the next unit, where that has been asked for
};

}  // namespace fsa::kernels
