// SPDX-License-Identifier: Apache-2.0
// Which CTA computes which work tile when each has a list of its own length: as LongestFirst, but the last of them in
// the order of their lengths. Lists of a random mask end with some CTA still in a long one: 4 to 6 % of the time for
// 16 work tiles a CTA.
//
// Nothing is stored: a warp counts, each time, how many lists of a group are as long as a length.
#pragma once

#include "policy/schedule.cuh"

namespace fsa::kernels {

template <class Tiles, int32 kBlockM>
class LongestListFirst : public LongestFirst<kBlockM> {
  using Base = LongestFirst<kBlockM>;

 public:
  static constexpr bool kByWarp = true;  // next() is for a whole warp

  FSA_DEVICE explicit LongestListFirst(const ForwardParams& params) : Base(params) {}

  // Lists are not packed, so that every index is a work tile.
  FSA_DEVICE bool next(const ForwardParams& params, WorkTile& work) {
    if (lane_id() == 0) this->take(params);
    const int32 index = warp_uniform(this->index_);
    if (index >= Base::count(params)) return false;
    const int32 tile = ranked(params, index);
    if (lane_id() == 0) Base::describe(params, tile, work);
    return true;
  }

 private:
  // Groups are counted from the end. Earlier tiles leave no CTA idle, and the first of each CTA cannot wait.
  static constexpr int32 kGroups = 2;
  static constexpr int32 kGroupTiles = 256;
  static constexpr int32 kTilesPerLane = kGroupTiles / kWarpThreads;

  // The tile of this place: in the groups, the longest first.
  FSA_DEVICE int32 ranked(const ForwardParams& params, int32 place) {
    const int32 first = static_cast<int32>(gridDim.x), count = Base::count(params);
    const int32 group = (count - 1 - place) / kGroupTiles;
    if (place < first || group >= kGroups) return place;
    const int32 end = count - group * kGroupTiles, begin = max_of(first, end - kGroupTiles);

    if (begin != begin_) load(params, begin, end);
    int32 longest = 0;
#pragma unroll
    for (int32 i = 0; i < kTilesPerLane; ++i) longest = max_of(longest, lengths_[i]);
    const auto reaching = [&](int32 limit) {
      int32 mine = 0;
#pragma unroll
      for (int32 i = 0; i < kTilesPerLane; ++i) mine += lengths_[i] >= limit ? 1 : 0;
      return __reduce_add_sync(0xffffffffu, mine);
    };
    int32 rank = place - begin;
    int32 low = 0,
          high = __reduce_max_sync(0xffffffffu, longest) + 1;  // more than `rank` reach low, not high
    while (high - low > 1) {
      const int32 middle = (low + high) / 2;
      (reaching(middle) > rank ? low : high) = middle;
    }
    rank -= reaching(high);  // among those of length `low`, in their order
    int32 found = begin;
#pragma unroll
    for (int32 i = 0; i < kTilesPerLane; ++i) {
      const uint32 equal = __ballot_sync(0xffffffffu, lengths_[i] == low);
      const bool here = lengths_[i] == low && __popc(equal << (kWarpThreads - 1 - lane_id())) == rank + 1;
      const uint32 chosen = __ballot_sync(0xffffffffu, here);
      if (chosen != 0) found = begin + i * kWarpThreads + __ffs(static_cast<int32>(chosen)) - 1;
      rank -= __popc(equal);
    }
    return found;
  }

  FSA_DEVICE void load(const ForwardParams& params, int32 begin, int32 end) {
    begin_ = begin;
#pragma unroll 2
    for (int32 i = kTilesPerLane - 1; i >= 0;
         --i) {  // moved up one by one, two at a time: eight were 2000 instructions
#pragma unroll
      for (int32 j = kTilesPerLane - 1; j > 0; --j) lengths_[j] = lengths_[j - 1];
      const int32 tile = begin + i * kWarpThreads + lane_id();
      const int32 blocks = length(params, min_of(tile, end - 1));
      lengths_[0] = tile < end ? blocks : -1;
    }
  }

  FSA_DEVICE static int32 length(const ForwardParams& params, int32 index) {
    WorkTile work;
    const int32 head = Base::head_of(params, index, work.m_begin);
    work.sequence = head / params.num_heads;
    work.head = head - work.sequence * params.num_heads;
    return Tiles::length(params, work);
  }

  int32 begin_ = -1;  // of the group whose lengths are there
  int32 lengths_[kTilesPerLane] = {};
};

}  // namespace fsa::kernels
