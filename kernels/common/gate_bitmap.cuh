// SPDX-License-Identifier: Apache-2.0
// Which key tiles each row tile of 64 rows visits: the visible ones, less those that the gate test closes.
// Without the test (gate_test = 0) it is the skip map of a dense call. With it, the attention kernel's
// BitmapTiles, and the skip map where no vote follows.
//
// From the right-most visible tile leftwards, with c the gate of the best pair that the extremes of alpha and
// delta allow and b the best c so far: closed when b is finite and (c - b) * scale < log(gamma); otherwise b
// becomes max(b, c). With gamma <= 1 the best before each tile is a running maximum, which the warp scans 32
// tiles at a time.
//
// One warp per (row tile, head, sequence): blocks of kBitmapWarps warps, grid (ceil(largest number of row
// tiles / kBitmapWarps), heads, batch). Every word of a sequence's row tiles is written.
#pragma once

#include "common/gate_prepare.cuh"
#include "policy/logit.cuh"

namespace fsa::kernels {

inline constexpr int32 kBitmapWarps = 4;

class GateTest {
 public:
  FSA_DEVICE GateTest(const ForwardParams& params, const WorkTile& work)
      : params_(params), scale_(params.softmax_scale_log2) {
    float gamma = params.gate_threshold > 0 ? params.gate_threshold : 1.0f / work.seqlen_k;
    if (params.adaptive_gate && params.causal_lengths)  // smallest at the first row
      gamma *= static_cast<float>(work.m_begin + work.offset() + 1) / work.seqlen_k;
    active_ = params.gate_test && gamma > 0;
    if (!active_) return;
    log2_gamma_ = ptx::log2_approx(gamma);

    for (int32 row = work.m_begin + lane_id(); row < min_of(work.m_begin + kRowsPerWarpgroup, work.seqlen_q);
         row += kWarpThreads) {
      const float alpha =
          load_scalar(params.alpha, work.q_map_batch, static_cast<int64>(work.q_begin) + row, work.head);
      alpha_.include({alpha, alpha});
    }
    alpha_.reduce_warp();
  }

  // The best gate of the row tile and a key tile, whose extremes of delta are at `delta`; one lane each.
  FSA_DEVICE float bound(const float* delta) const {
    if (!active_) return 0;
    const float best = alpha_.largest_product({delta[0], delta[1]});
    return params_.log_sigmoid_gate ? PairGate<true>::gate(best) : best;
  }

  // Which of 32 tiles stay open, lane by lane from the highest bit down; `bound` of the lane's own tile.
  FSA_DEVICE uint32 open(uint32 visible, float bound) {
    if (!active_) return visible;
    if (log2_gamma_ > 0) return open_one_by_one(visible, bound);
    // A closed tile is no new best, so the best before a tile is that of all visible ones before it.
    const bool mine = (visible >> lane_id() & 1) != 0;
    float best = mine ? fmaxf(bound, -kInfinity) : -kInfinity;  // ignores NaN
#pragma unroll
    for (int32 distance = 1; distance < kWarpThreads; distance *= 2) {
      const float other = __shfl_down_sync(0xffffffffu, best, distance);
      if (lane_id() + distance < kWarpThreads) best = fmaxf(best, other);
    }
    const float after = __shfl_down_sync(0xffffffffu, best, 1);
    const float before = lane_id() == kWarpThreads - 1 ? best_ : fmaxf(best_, after);
    best_ = fmaxf(best_, __shfl_sync(0xffffffffu, best, 0));
    return __ballot_sync(0xffffffffu, mine && !closes(bound, before));
  }

 private:
  FSA_DEVICE bool closes(float bound, float best) const {
    return best > -kInfinity && best < kInfinity && (bound - best) * scale_ < log2_gamma_;
  }

  FSA_DEVICE uint32 open_one_by_one(uint32 visible, float bound) {
    uint32 open = 0;
    while (visible != 0) {
      const int32 bit = 31 - __clz(static_cast<int32>(visible));
      visible &= ~(1u << bit);
      const float next = __shfl_sync(0xffffffffu, bound, bit);
      if (closes(next, best_)) continue;
      best_ = fmaxf(best_, next);
      open |= 1u << bit;
    }
    return open;
  }

  const ForwardParams& params_;
  const float scale_;
  bool active_;
  float log2_gamma_;
  float best_ = -kInfinity;
  Extremes alpha_;
};

FSA_DEVICE bool visited(const WorkTile& work, int32 tile) {
  for (int32 s = 0; s < work.num_segments; ++s) {
    const Segment& segment = work.segments[s];
    if (tile <= segment.first && tile > segment.first - segment.count) return true;
  }
  return false;
}

// Tiles: RangeTiles or BandTiles with 64 rows.
template <class Tiles, int32 kTileKeys>
FSA_DEVICE void gate_bitmap(const ForwardParams& params) {
  __shared__ WorkTile works[kBitmapWarps];
  const int32 warp = thread_id() / kWarpThreads;
  WorkTile& work = works[warp];
  const int32 row_tile = static_cast<int32>(blockIdx.x) * kBitmapWarps + warp;
  if (lane_id() == 0) {
    describe_sequence(params, static_cast<int32>(blockIdx.z), static_cast<int32>(blockIdx.y), work);
    work.m_begin = row_tile * kRowsPerWarpgroup;
    Tiles::describe(params, work);
  }
  __syncwarp();
  if (work.m_begin >= work.rows) return;

  GateTest test(params, work);
  const int64 first = params.cu_seqlens_k ? work.k_begin / kTileKeys + work.sequence : 0;
  const int64 begin =
      (work.k_map_batch * params.gate_delta_stride_batch + work.kv_head * params.gate_delta_stride_head) /
          kTileKeys +
      first;
  int32* const words = tile_bits(params.gate_bits, params.cu_seqlens_q != nullptr, work, work.m_begin);
  for (int32 word = static_cast<int32>(params.gate_bits.stride_tile) - 1; word >= 0; --word) {
    const int32 tile = word * 32 + lane_id();
    const bool visible = visited(work, tile);
    const float bound = visible ? test.bound(params.gate_extremes + (begin + tile) * 2) : 0.0f;
    const uint32 open = test.open(__ballot_sync(0xffffffffu, visible), bound);
    if (lane_id() == 0) words[word] = static_cast<int32>(open);
  }
}

}  // namespace fsa::kernels
