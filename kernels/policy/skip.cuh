// SPDX-License-Identifier: Apache-2.0
// Is a key tile worth its exponentials and P V? Decided by each warpgroup for its own 64 rows.
#pragma once

#include "policy/online_softmax.cuh"
#include "policy/work_tile.cuh"

namespace fsa::kernels {

// Every tile is.
struct Never {
  static constexpr bool kVotes = false;
  FSA_DEVICE Never(const ForwardParams&, const WorkTile&, int32) {}
};

// A row wants a tile when its largest probability there, by what is known so far, may reach threshold /
// visible_len: when scale max S >= scale m + log2 l + log2(threshold / visible_len). The right side is kept
// per row as `cut`. A row that has seen no key yet wants any tile in which it sees one. The tile is kept when
// one row wants it.
class ThresholdSkip {
 public:
  static constexpr bool kVotes = true;

  // `row`: the thread's first row, from the start of the sequence.
  FSA_DEVICE ThresholdSkip(const ForwardParams& params, const WorkTile& work, int32 row) {
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      used_[slot] = row + 8 * slot < work.seqlen_q;
      const int32 length = params.causal_lengths ? row + 8 * slot + work.offset() + 1 : work.seqlen_k;
      log2_threshold_[slot] = ptx::log2_approx(min_of(params.threshold / max_of(length, 1), 1.0f));
      cut_[slot] = -kLargestFloat;  // above the -inf of a row without a visible key, below everything else
    }
  }

  FSA_DEVICE bool wants(const OnlineSoftmax::RowPair& top, float scale) const {
    return any_reaches(top, scale, [&](int32 slot) { return cut_[slot]; });
  }

  // The same for row maxima which are 0 where they are less and m is above zero; false where that leaves it open.
  FSA_DEVICE bool surely_wants(const OnlineSoftmax& softmax, const OnlineSoftmax::RowPair& top,
                               float scale) const {
    return any_reaches(top, scale, [&](int32 slot) {
      return fmaxf(cut_[slot], softmax.row_max[slot] > 0 ? kLeastFloat : -kLargestFloat);
    });
  }

  // After a kept tile.
  FSA_DEVICE void raise(const OnlineSoftmax& softmax, float scale) {
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const float sum = softmax.total(slot);
      cut_[slot] = sum == 0 ? -kLargestFloat
                            : softmax.row_max[slot] * scale + ptx::log2_approx(sum) + log2_threshold_[slot];
    }
  }

  // Whether no row of the warp wants a tile for logits of zero or less, nor has an m below zero.
  FSA_DEVICE bool positive(const OnlineSoftmax& softmax) const {
    return __all_sync(0xffffffffu, (!used_[0] || cut_[0] > 0) && (!used_[1] || cut_[1] > 0) &&
                                       softmax.row_max[0] >= 0 && softmax.row_max[1] >= 0);
  }

  // One thread for the row tile of `row`; key tile `tile` was kept.
  FSA_DEVICE static void record(const ForwardParams& params, const WorkTile& work, int32 row, int32 tile) {
    if (params.skip_map == nullptr) return;
    const TileBits map = {params.skip_map, params.skip_map_stride_batch, params.skip_map_stride_head,
                          params.skip_map_stride_tile};
    atomicOr(tile_bits(map, params.cu_seqlens_q != nullptr, work, row) + tile / 32, 1 << (tile % 32));
  }

 private:
  static constexpr float kLargestFloat = __builtin_bit_cast(float, 0x7f7fffffu);
  static constexpr float kLeastFloat = __builtin_bit_cast(float, 0x00800000u);  // above zero

  // Whether one of the thread's rows has its maximum at enough(slot) or above. A NaN does: it must not be hidden.
  template <class Enough>
  FSA_DEVICE bool any_reaches(const OnlineSoftmax::RowPair& top, float scale, Enough enough) const {
    bool reaches = false;
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const float least = enough(slot);
      reaches = reaches || (used_[slot] && !(top.of[slot] * scale < least));
    }
    return reaches;
  }

  float cut_[kRowsPerThread];
  float log2_threshold_[kRowsPerThread];
  bool used_[kRowsPerThread];
};

}  // namespace fsa::kernels
