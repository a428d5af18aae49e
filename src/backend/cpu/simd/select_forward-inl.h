// SPDX-License-Identifier: Apache-2.0
// NSA: the forward of the compressed branch selects blocks on its way, so that scores and exponentials are computed once
// for both. An item holds all heads of a group.
//
//   after a tile of windows has joined O, P = 2^(S - m), m the row maximum so far:
//     score of a block += sum of weight * P over the windows of the tile; where the tile to the right began the block,
//     what is there is rescaled as O was
//   at the end:
//     rank of a block = sum over the heads of score * 2^(m then - m) / l;  choose_blocks-inl.h
//
// Memory: one score per block and row, one maximum per tile and row.
#pragma once

#include "backend/cpu/simd/choose_blocks-inl.h"
#include "backend/cpu/simd/forward-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

class BlockSelection {
 public:
  static constexpr bool kReadsScores = true;

  HWY_INLINE BlockSelection(const Problem& attention, const NsaProblem& problem, const NsaArguments& args)
      : p_(problem),
        args_(args),
        shape_(block_weights(problem)),
        tile_keys_(skip_tile_keys(attention.head_dim)) {}

  HWY_INLINE std::size_t carve(std::int64_t units, char* base) {
    Arena arena{base};
    weights_ = arena.floats(shape_.count());
    for (std::int64_t u = 0; u < units; ++u) {
      scores_[u] = arena.floats(most_blocks(p_) * kRows);
      maxima_[u] = arena.floats(ceil_div(p_.max_seqlen_k, tile_keys_) * kRows);
      begun_[u] = covered_[u] = 0;
    }
    if (base != nullptr) shape_.fill(weights_);
    return arena.used;
  }

  // Tile n of unit u: the windows [first, first + count) of it. `factors`: what O was multiplied with.
  HWY_INLINE void tile(std::int64_t u, const ForwardRowTile& t, std::int64_t n, std::int64_t first,
                       std::int64_t count, const float* probabilities, const float* factors) {
    const std::int64_t before = shape_.overlap - 1;
    const std::int64_t begin = n * tile_keys_ + first, end = begin + count;
    const std::int64_t block_begin = begin / shape_.per_block;
    const std::int64_t block_end = (end - 1 + before) / shape_.per_block + 1;
    if (covered_[u] == 0) covered_[u] = begun_[u] = block_end;
    for (std::int64_t block = block_begin; block < block_end; ++block) {
      const std::int64_t origin = block * shape_.per_block - before;  // window of the first weight
      const std::int64_t low = max_of(begin, origin), high = min_of(end, origin + shape_.count());
      for (std::int64_t r = 0; r < t.tile.lanes; r += kLanes) {
        Float sum = hn::Zero(kFloat);
        for (std::int64_t w = low; w < high; ++w)
          sum = hn::MulAdd(hn::Load(kFloat, probabilities + (w - begin) * kTilePitch + r),
                           hn::Set(kFloat, weights_[w - origin]), sum);
        float* score = scores_[u] + block * kRows + r;
        if (block >= begun_[u]) sum = hn::MulAdd(hn::Load(kFloat, score), hn::Load(kFloat, factors + r), sum);
        hn::Store(sum, kFloat, score);
      }
    }
    begun_[u] = block_begin;
    for (std::int64_t r = 0; r < t.tile.lanes; r += kLanes)
      hn::Store(hn::LoadU(kFloat, t.row_max + r), kFloat, maxima_[u] + n * kRows + r);
  }

  HWY_INLINE void finish(const ForwardItem& item, const ForwardRowTile* tiles, std::int64_t count) {
    const NsaSequence sequence = nsa_sequence(p_, args_, item.sequence.batch);
    for (std::int64_t u = 0; u < count; u += p_.group_size) {
      const RowTile& tile = tiles[u].tile;
      const std::int64_t first_position = tile.begin + sequence.offset();
      const std::int64_t last_position = first_position + tile.rows - 1;
      const BlockRows target = block_rows(args_.selected_blocks, sequence, item.kv_head, tile.begin);
      if (keeps_all(p_, last_position)) {
        choose_blocks(p_, tile, first_position, nullptr, target);
        continue;
      }
      const std::int64_t blocks = last_position / p_.block_size + 1;
      for (std::int64_t g = 0; g < p_.group_size; ++g) add_head(u, u + g, tiles[u + g], blocks);
      auto* ranks = reinterpret_cast<std::int32_t*>(scores_[u]);
      for (std::int64_t block = 0; block < blocks; ++block)
        for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
          const Float score = hn::Load(kFloat, scores_[u] + block * kRows + r);
          hn::Store(rank_of(score), kInt, ranks + block * kRows + r);
        }
      choose_blocks(p_, tile, first_position, ranks, target);
    }
  }

 private:
  // The scores of unit u as probabilities, added to those of unit `sum`, the first head.
  HWY_INLINE void add_head(std::int64_t sum, std::int64_t u, const ForwardRowTile& t, std::int64_t blocks) {
    const Float empty = hn::Set(kFloat, kNegativeInfinity), zero = hn::Zero(kFloat);
    for (std::int64_t r = 0; r < t.tile.lanes; r += kLanes) {
      const Float max = hn::LoadU(kFloat, t.row_max + r), total = hn::LoadU(kFloat, t.row_sum + r);
      const Float base = hn::IfThenElse(hn::Eq(max, empty), zero, max);
      const Float share = hn::IfThenElse(hn::Eq(total, zero), zero, hn::Div(hn::Set(kFloat, 1.0f), total));
      Float factor = zero;
      std::int64_t of_tile =
          -1;  // whose maximum `factor` is for: the left-most tile that has windows of the block
      for (std::int64_t block = 0; block < blocks; ++block) {
        float* target = scores_[sum] + block * kRows + r;
        Float score = zero;
        if (block < covered_[u]) {
          const std::int64_t window = max_of<std::int64_t>(block * shape_.per_block - shape_.overlap + 1, 0);
          if (const std::int64_t n = window / tile_keys_; n != of_tile) {
            of_tile = n;
            factor = hn::Mul(exp2(hn::Sub(hn::Load(kFloat, maxima_[u] + n * kRows + r), base)), share);
          }
          score = hn::Mul(hn::Load(kFloat, scores_[u] + block * kRows + r), factor);
        }
        hn::Store(u == sum ? score : hn::Add(hn::Load(kFloat, target), score), kFloat, target);
      }
    }
  }

  const NsaProblem& p_;
  const NsaArguments& args_;
  BlockWeights shape_;
  std::int64_t tile_keys_;
  float* weights_;
  float* scores_[kMaxUnitsPerItem];         // [blocks][64]
  float* maxima_[kMaxUnitsPerItem];         // [tiles][64]
  std::int64_t begun_[kMaxUnitsPerItem];    // from this block on there are scores
  std::int64_t covered_[kMaxUnitsPerItem];  // up to this block
};

HWY_INLINE std::size_t select_forward_scratch(const Problem& attention, const NsaProblem& p,
                                              std::int64_t units) {
  const NsaArguments none;
  return forward_scratch<FloatForward>(attention) + BlockSelection(attention, p, none).carve(units, nullptr);
}

HWY_INLINE void select_forward(const Problem& attention, const Arguments& args, const NsaProblem& p,
                               const NsaArguments& selection_args, const ForwardItem& item, void* memory) {
  BlockSelection selection(attention, p, selection_args);
  selection.carve(item.unit_end - item.unit_begin,
                  static_cast<char*>(memory) + forward_scratch<FloatForward>(attention));
  forward<FloatForward>(attention, args, item, memory, selection);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
