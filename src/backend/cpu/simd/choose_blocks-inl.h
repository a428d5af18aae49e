// SPDX-License-Identifier: Apache-2.0
// NSA selection: which blocks the tokens of a row tile keep, from the scores of all blocks they can see. One lane per
// token; scores lie block by block, [block][64], as integers that order like them.
//
// The least rank that is kept is found by bisection: a pass counts, for all lanes at once, the blocks of a rank or more.
// That is one comparison and one addition per block, pass and vector, whatever top_k is: 16 passes take 300 cycles a token
// at 32k where a list of the best, changed block by block, took 4500.
#pragma once

#include "backend/cpu/simd/scores-inl.h"
#include "core/nsa_problem.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

using Int = hn::Vec<IntTag>;

inline constexpr std::int32_t kForcedRank = 0x7f800001;  // above every float, infinity included
inline constexpr std::int32_t kNanRank = -1;
inline constexpr std::int32_t kNoCandidate = -2;

// The rank of a score, which is 0 or more or NaN.
HWY_INLINE Int rank_of(Float score) {
  const auto is_nan = hn::RebindMask(kInt, hn::IsNaN(score));
  return hn::IfThenElse(is_nan, hn::Set(kInt, kNanRank), hn::BitCast(kInt, score));
}

// How many windows a block shares with its neighbours, and what a window at each place counts: entry o is that of
// window j * per_block - (overlap - 1) + o in block j.
struct BlockWeights {
  std::int64_t per_block;  // block_size / compress_stride
  std::int64_t overlap;    // compress_block / compress_stride

  HWY_INLINE std::int64_t count() const { return per_block + overlap - 1; }
  HWY_INLINE void fill(float* weights) const {
    for (std::int64_t o = 0; o < count(); ++o) {
      weights[o] = 0;
      for (std::int64_t r = 0; r < overlap; ++r) weights[o] += o - r >= 0 && o - r < per_block ? 1.0f : 0.0f;
    }
  }
};

HWY_INLINE BlockWeights block_weights(const NsaProblem& p) {
  return {p.block_size / p.compress_stride, p.compress_block / p.compress_stride};
}

// Row `row` of a table of blocks, and how far its rows and entries are apart.
struct BlockRows {
  std::int32_t* first;
  std::int64_t stride_row, stride_slot;
};

HWY_INLINE BlockRows block_rows(const BlockTable& table, const NsaSequence& s, std::int64_t kv_head,
                                std::int64_t row) {
  return {table.data + s.batch * table.stride_batch + kv_head * table.stride_head +
              (s.q_begin + row) * table.stride_row,
          table.stride_row, table.stride_slot};
}

// Whether the tokens keep every block up to their own, whatever the scores: nobody asks for them then.
HWY_INLINE bool keeps_all(const NsaProblem& p, std::int64_t last_position) {
  return last_position / p.block_size < p.top_k;
}

// `ranks`: of the blocks up to that of the last token; changed. Null where the tokens keep all.
HWY_INLINE void choose_blocks(const NsaProblem& p, const RowTile& tile, std::int64_t first_position,
                              std::int32_t* ranks, const BlockRows& target) {
  alignas(64) std::int32_t wanted[kRows];
  std::int64_t own[kRows], found[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) {
    own[r] = r < tile.rows ? (first_position + r) / p.block_size : -1;
    wanted[r] = static_cast<std::int32_t>(min_of(p.top_k, own[r] + 1));
    found[r] = 0;
  }
  const auto put = [&](std::int64_t row, std::int64_t block) {
    target.first[row * target.stride_row + found[row]++ * target.stride_slot] =
        static_cast<std::int32_t>(block);
  };
  const std::int64_t blocks = own[tile.rows - 1] + 1;
  if (ranks == nullptr) {
    for (std::int64_t r = 0; r < tile.rows; ++r)
      for (std::int64_t block = 0; block <= own[r]; ++block) put(r, block);
  } else {
    const auto settle = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block)
        for (std::int64_t r = 0; r < tile.rows; ++r) {
          std::int32_t& rank = ranks[block * kRows + r];
          if (block > own[r])
            rank = kNoCandidate;
          else if (block < p.init_blocks || block > own[r] - p.local_blocks)
            rank = kForcedRank;
        }
    };
    const std::int64_t first = min_of(p.init_blocks, blocks);
    settle(0, first);
    settle(max_of(first, min_of(own[0] - p.local_blocks, own[0]) + 1), blocks);
    for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
      const Int want = hn::Load(kInt, wanted + r), one = hn::Set(kInt, 1);
      // So many have rank `low` or more that it is enough; those of `high` or more, `at_high`, are too few.
      Int low = hn::Set(kInt, kNanRank), high = hn::Set(kInt, kForcedRank + 1), at_high = hn::Zero(kInt);
      auto searching = hn::Gt(want, hn::Zero(kInt));
      while (!hn::AllFalse(kInt, searching)) {
        const Int middle = hn::Add(low, hn::ShiftRight<1>(hn::Sub(high, low)));
        const Int below = hn::Sub(middle, one);
        Int count = hn::Zero(kInt);
        for (std::int64_t block = 0; block < blocks; ++block)
          count = hn::IfThenElse(hn::Gt(hn::Load(kInt, ranks + block * kRows + r), below),
                                 hn::Add(count, one), count);
        const auto too_few = hn::And(searching, hn::Lt(count, want));
        low = hn::IfThenElse(hn::AndNot(too_few, searching), middle, low);
        high = hn::IfThenElse(too_few, middle, high);
        at_high = hn::IfThenElse(too_few, count, at_high);
        // Exactly as many as are wanted: there is no tie to break.
        const auto exact = hn::And(searching, hn::Eq(count, want));
        high = hn::IfThenElse(exact, hn::Add(low, one), high);
        at_high = hn::IfThenElse(exact, hn::Zero(kInt), at_high);
        searching = hn::And(searching, hn::Gt(hn::Sub(high, low), one));
      }
      low = hn::IfThenElse(hn::Gt(want, hn::Zero(kInt)), low, high);  // lanes beyond the rows keep nothing
      Int equals = hn::Sub(want, at_high);                            // of rank `low`, the first ones
      for (std::int64_t block = 0; block < blocks; ++block) {
        const Int rank = hn::Load(kInt, ranks + block * kRows + r);
        const auto tied = hn::And(hn::Eq(rank, low), hn::Gt(equals, hn::Zero(kInt)));
        equals = hn::IfThenElse(tied, hn::Sub(equals, one), equals);
        std::uint64_t bits = 0;
        hn::StoreMaskBits(kInt, hn::Or(hn::Gt(rank, low), tied), reinterpret_cast<std::uint8_t*>(&bits));
        for (; bits != 0; bits &= bits - 1) put(r + __builtin_ctzll(bits), block);
      }
    }
  }
  for (std::int64_t r = 0; r < tile.rows; ++r)
    while (found[r] < p.top_k) put(r, -1);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
