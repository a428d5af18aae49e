// SPDX-License-Identifier: Apache-2.0
// NSA selection: which blocks the tokens of a row tile keep, from the scores of all blocks they can see. One lane per
// token; scores lie block by block, [block][64], as integers that order like them.
//
// The least rank that is kept is found by bisection: a pass counts, for all lanes at once, the blocks of a rank or more.
// That is one comparison and one addition per block, pass and vector, whatever top_k is: 0.5 us a token at 32k where a list
// of the best, changed block by block, took 1.5. A first pass narrows the interval.
#pragma once

#include "backend/cpu/simd/gemm-inl.h"
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

inline constexpr int kTogether =
    kPanel < kRows / kLanes ? kPanel : kRows / kLanes;  // vectors whose passes are one

// Between which ranks the search of every lane begins: the least of the greatest ranks of `most_wanted` ranges of blocks,
// each of which has one to take, and the greatest that is not forced.
template <int kVectors>
HWY_INLINE void first_interval(const std::int32_t* ranks, std::int64_t blocks, std::int64_t most_wanted,
                               Int* low, Int* greatest) {
  const Int none = hn::Set(kInt, kNoCandidate), forced = hn::Set(kInt, kForcedRank);
  for (int v = 0; v < kVectors; ++v) {
    low[v] = forced;
    greatest[v] = none;
  }
  for (std::int64_t range = 0; range < most_wanted; ++range) {
    Int best[kVectors];
    for (int v = 0; v < kVectors; ++v) best[v] = none;
    const std::int64_t end = (range + 1) * blocks / most_wanted;
    for (std::int64_t block = range * blocks / most_wanted; block < end; ++block) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Int rank = hn::Load(kInt, ranks + block * kRows + v * kLanes);
        best[v] = hn::Max(best[v], rank);
        greatest[v] = hn::Max(greatest[v], hn::IfThenElse(hn::Eq(rank, forced), none, rank));
      }
    }
    for (int v = 0; v < kVectors; ++v) low[v] = hn::Min(low[v], best[v]);
  }
  for (int v = 0; v < kVectors; ++v) low[v] = hn::Max(low[v], hn::Set(kInt, kNanRank));
}

// What the lanes want, at most `most`, and how many blocks they take whatever the scores.
struct Wanted {
  alignas(64) std::int32_t blocks[kRows];
  alignas(64) std::int32_t forced[kRows];
  std::int64_t most;
};

// The lanes of `kVectors` vectors. Alone a vector's count is one chain of additions, slower than the loads.
template <int kVectors>
HWY_NOINLINE void choose_lanes(const std::int32_t* ranks, std::int64_t blocks, const Wanted& wanted,
                               std::int64_t first_lane, std::int32_t** end, std::int64_t stride_slot) {
  const Int one = hn::Set(kInt, 1), zero = hn::Zero(kInt);
  // So many have rank `low` or more that it is enough; those of `high` or more, `at_high`, are too few.
  Int want[kVectors], low[kVectors], high[kVectors], at_high[kVectors];
  first_interval<kVectors>(ranks, blocks, wanted.most, low, high);
  for (int v = 0; v < kVectors; ++v) {
    want[v] = hn::Load(kInt, wanted.blocks + first_lane + v * kLanes);
    at_high[v] = hn::Load(kInt, wanted.forced + first_lane + v * kLanes);
    // Lanes that take nothing else, or nothing, are done before they start.
    const auto search = hn::Gt(want[v], at_high[v]);
    low[v] = hn::IfThenElse(search, low[v], hn::Set(kInt, kForcedRank));
    high[v] = hn::Add(hn::IfThenElse(search, high[v], low[v]), one);
    at_high[v] = hn::IfThenElse(search, at_high[v], zero);
  }
  for (bool searching = true; searching;) {
    Int below[kVectors], count[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      below[v] = hn::Sub(hn::Add(low[v], hn::ShiftRight<1>(hn::Sub(high[v], low[v]))), one);
      count[v] = zero;
    }
    for (std::int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        count[v] = hn::IfThenElse(hn::Gt(hn::Load(kInt, ranks + block * kRows + v * kLanes), below[v]),
                                  hn::Add(count[v], one), count[v]);
    }
    searching = false;
    for (int v = 0; v < kVectors; ++v) {
      const Int middle = hn::Add(below[v], one);
      const auto open = hn::Gt(hn::Sub(high[v], low[v]), one);
      const auto too_few = hn::And(open, hn::Lt(count[v], want[v]));
      const auto exact = hn::And(open, hn::Eq(count[v], want[v]));  // no tie to break
      low[v] = hn::IfThenElse(hn::AndNot(too_few, open), middle, low[v]);
      high[v] = hn::IfThenElse(too_few, middle, hn::IfThenElse(exact, hn::Add(low[v], one), high[v]));
      at_high[v] = hn::IfThenElse(too_few, count[v], hn::IfThenElse(exact, zero, at_high[v]));
      searching = searching || !hn::AllFalse(kInt, hn::Gt(hn::Sub(high[v], low[v]), one));
    }
  }
  Int equals[kVectors];  // of rank `low`, the first ones
  for (int v = 0; v < kVectors; ++v) {
    // Lanes without a token have whatever the memory held for ranks, and take none.
    low[v] = hn::IfThenElse(hn::Gt(want[v], zero), low[v], hn::Set(kInt, 0x7fffffff));
    equals[v] = hn::IfThenElse(hn::Gt(want[v], zero), hn::Sub(want[v], at_high[v]), zero);
  }
  for (std::int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Int rank = hn::Load(kInt, ranks + block * kRows + v * kLanes);
      const auto tied = hn::And(hn::Eq(rank, low[v]), hn::Gt(equals[v], zero));
      equals[v] = hn::IfThenElse(tied, hn::Sub(equals[v], one), equals[v]);
      std::uint64_t bits = 0;
      hn::StoreMaskBits(kInt, hn::Or(hn::Gt(rank, low[v]), tied), reinterpret_cast<std::uint8_t*>(&bits));
      for (; bits != 0; bits &= bits - 1) {
        std::int32_t*& place = end[v * kLanes + __builtin_ctzll(bits)];
        *place = static_cast<std::int32_t>(block);
        place += stride_slot;
      }
    }
  }
}

// `ranks`: of the blocks up to that of the last token; changed. Null where the tokens keep all.
HWY_INLINE void choose_blocks(const NsaProblem& p, const RowTile& tile, std::int64_t first_position,
                              std::int32_t* ranks, const BlockRows& target) {
  Wanted wanted;
  wanted.most = p.top_k;
  std::int64_t own[kRows], found[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) {
    own[r] = r < tile.rows ? (first_position + r) / p.block_size : -1;
    wanted.blocks[r] = static_cast<std::int32_t>(min_of(p.top_k, own[r] + 1));
    wanted.forced[r] = static_cast<std::int32_t>(min_of(p.init_blocks + p.local_blocks, own[r] + 1));
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
    std::int32_t* end[kRows];  // where the next number of each row goes
    for (std::int64_t r = 0; r < tile.rows; ++r) end[r] = target.first + r * target.stride_row;
    std::int64_t r = 0;
    for (; r + kTogether * kLanes <= round_up(tile.lanes, kTogether * kLanes); r += kTogether * kLanes)
      choose_lanes<kTogether>(ranks + r, blocks, wanted, r, end + r, target.stride_slot);
    for (std::int64_t row = 0; row < tile.rows; ++row) found[row] = wanted.blocks[row];
  }
  for (std::int64_t r = 0; r < tile.rows; ++r)
    while (found[r] < p.top_k) put(r, -1);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
