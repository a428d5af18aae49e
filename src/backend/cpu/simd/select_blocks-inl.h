// SPDX-License-Identifier: Apache-2.0
// NSA block scores and top-k. One item is up to 64 tokens of one key head; one lane per token.
//
//   for each tile of compressed keys that the tokens can choose from, left to right:
//     for each head of the group:  P += 2^(Q K^T - lse)        group sum, window by window
//     for each block of the tile:  score = sum of weight[o] * P[window j a - (c - 1) + o]
//       lanes whose score beats their smallest kept one insert it
//
// a = block_size / s, c = l / s; weight[o] counts the s-token strides of the window inside the block. The last c - 1
// windows of a tile are carried to the next, so no row of scores is ever stored whole.
#pragma once

#include "backend/cpu/simd/compress-inl.h"
#include "backend/cpu/simd/gemm-inl.h"
#include "backend/cpu/simd/nsa_table.h"
#include "backend/cpu/simd/scores-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

struct SelectShape {
  std::int64_t per_block;  // a
  std::int64_t overlap;    // c
  std::int64_t windows;    // per tile: whole blocks, 128 windows where a block has no more
};

HWY_INLINE SelectShape select_shape(const NsaProblem& p) {
  SelectShape shape;
  shape.per_block = p.block_size / p.compress_stride;
  shape.overlap = p.compress_block / p.compress_stride;
  shape.windows = max_of<std::int64_t>(1, 128 / shape.per_block) * shape.per_block;
  return shape;
}

struct SelectScratch {
  std::int64_t key_pitch;
  float *query, *lse, *lse_low;  // [group][head_dim][64], [group][64]
  float *key, *scores;           // [windows][key_pitch], [windows][64]
  float* sums;                   // [overlap - 1 + windows][64]: group sums, the carried ones first
  float *weights, *staging;
  std::uint64_t* best;  // [64][top_k]

  HWY_INLINE std::size_t carve(const NsaProblem& p, char* base) {
    Arena arena{base};
    const SelectShape shape = select_shape(p);
    key_pitch = packed_pitch(p.head_dim);
    query = arena.floats(p.group_size * round_up(p.head_dim, 4) * kRows);
    lse = arena.floats(p.group_size * kRows);
    lse_low = arena.floats(p.group_size * kRows);
    key = arena.floats(shape.windows * key_pitch);
    scores = arena.floats(shape.windows * kRows);
    sums = arena.floats((shape.overlap - 1 + shape.windows) * kRows);
    weights = arena.floats(shape.per_block + shape.overlap - 1);
    staging = arena.floats(kRows * round_up(p.head_dim, 16));
    best = reinterpret_cast<std::uint64_t*>(arena.floats(2 * kRows * p.top_k));
    return arena.used;
  }
};

HWY_INLINE std::size_t select_scratch(const NsaProblem& p) {
  SelectScratch scratch;
  return scratch.carve(p, nullptr);
}

// A score and its block as one number: a larger one is a better choice, of equal scores the lower block. Scores are
// probabilities, 0 or more; -1 stands for NaN, below all of them.
HWY_INLINE std::uint64_t rank_of(float score, std::int64_t block) {
  std::uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const std::uint64_t high = score < 0 ? 0 : std::uint64_t{bits} + 1;
  return high << 32 | (0xffffffffu - static_cast<std::uint32_t>(block));
}
HWY_INLINE float score_of(std::uint64_t rank) {
  if (rank >> 32 == 0) return -1.0f;
  const auto bits = static_cast<std::uint32_t>((rank >> 32) - 1);
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}
HWY_INLINE std::int32_t block_of(std::uint64_t rank) {
  return static_cast<std::int32_t>(0xffffffffu - static_cast<std::uint32_t>(rank));
}

// What is kept of one token, in no order: a newcomer replaces the worst, which is then looked for again. Both are
// short loops without branches; keeping the list sorted cost twice as much.
struct TopBlocks {
  std::uint64_t* rank;
  std::int64_t count;
  std::int64_t worst;

  HWY_INLINE void insert(std::uint64_t value, std::int64_t capacity) {
    rank[count < capacity ? count++ : worst] = value;
    if (count < capacity) return;
    std::uint64_t smallest = rank[0];
    for (std::int64_t i = 1; i < capacity; ++i) smallest = min_of(smallest, rank[i]);
    for (std::int64_t i = 0; i < capacity; ++i) worst = rank[i] == smallest ? i : worst;
  }
};

// sums[window] += P of every head, for windows [begin, begin + count).
HWY_INLINE void add_probabilities(const NsaProblem& p, const NsaArguments& args, const RowsItem& item,
                                  const SelectScratch& s, const Visibility& visibility, const RowTile& tile,
                                  std::int64_t begin, std::int64_t count, float* sums) {
  const NsaSequence& sequence = item.sequence;
  pack_rows(row_source(args.key, sequence.batch, sequence.k_begin, item.kv_head), begin, count, p.head_dim,
            s.key, s.key_pitch);
  const TileVisibility seen =
      classify_tile(visibility, tile.begin, tile.begin + tile.rows, begin, begin + count);
  PartialTile partial;
  if (seen == TileVisibility::partial) read_bands(visibility, tile, begin, count, partial);
  for (std::int64_t g = 0; g < p.group_size; ++g) {
    gemm<Init::zero>(Gemm{s.query + g * round_up(p.head_dim, 4) * kRows, kRows, s.key, s.key_pitch, 1,
                          p.head_dim, s.scores, kRows},
                     count, tile.lanes);
    if (seen == TileVisibility::partial) apply_partial_tile(partial, tile, 0, count, s.scores);
    for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
      const Float lse = hn::Load(kFloat, s.lse + g * kRows + r),
                  lse_low = hn::Load(kFloat, s.lse_low + g * kRows + r);
      for (std::int64_t j = 0; j < count; ++j) {
        float* target = sums + j * kRows + r;
        const Float x = exp2(hn::Sub(hn::Sub(hn::Load(kFloat, s.scores + j * kRows + r), lse), lse_low));
        hn::Store(g == 0 ? x : hn::Add(hn::Load(kFloat, target), x), kFloat, target);
      }
    }
  }
}

// Ascending numbers of the blocks that a token keeps, then -1.
HWY_INLINE void store_blocks(const NsaProblem& p, const TopBlocks& top, std::int32_t* target,
                             std::int64_t stride) {
  for (std::int64_t i = 0; i < top.count; ++i) {
    const std::int32_t number = block_of(top.rank[i]);
    std::int64_t at = i;
    for (; at > 0 && target[(at - 1) * stride] > number; --at)
      target[at * stride] = target[(at - 1) * stride];
    target[at * stride] = number;
  }
  for (std::int64_t i = top.count; i < p.top_k; ++i) target[i * stride] = -1;
}

HWY_INLINE void select_blocks(const NsaProblem& p, const NsaArguments& args, const RowsItem& item,
                              void* memory) {
  SelectScratch s;
  s.carve(p, static_cast<char*>(memory));
  const SelectShape shape = select_shape(p);
  const NsaSequence& sequence = item.sequence;
  const std::int64_t carried = shape.overlap - 1;
  RowTile tile;
  tile.begin = item.begin;
  tile.rows = item.end - item.begin;
  tile.lanes = round_up(tile.rows, kLanes);
  Visibility visibility;
  visibility.bands[0] = {0, kFarAway};
  visibility.offset = sequence.offset();
  visibility.seqlen_k = sequence.compressed;
  visibility.key_base = p.compress_block - 1;
  visibility.key_stride = p.compress_stride;

  for (std::int64_t o = 0; o < shape.per_block + carried; ++o) {
    float weight = 0;
    for (std::int64_t r = 0; r < shape.overlap; ++r)
      weight += o - r >= 0 && o - r < shape.per_block ? 1.0f : 0.0f;
    s.weights[o] = weight;
  }
  for (std::int64_t g = 0; g < p.group_size; ++g) {
    const std::int64_t head = item.kv_head * p.group_size + g;
    pack_transposed(row_source(args.query, sequence.batch, sequence.q_begin, head), tile.begin, tile.rows,
                    p.head_dim, static_cast<float>(p.softmax_scale * kLog2E), s.staging,
                    s.query + g * round_up(p.head_dim, 4) * kRows);
    for (std::int64_t r = 0; r < kRows; ++r) {
      float lse = kNegativeInfinity;
      if (r < tile.rows)
        lse = static_cast<const float*>(
            args.lse.data)[sequence.batch * args.lse.stride_batch + head * args.lse.stride_head +
                           (sequence.q_begin + tile.begin + r) * args.lse.stride_row];
      const double exact = static_cast<double>(lse) * kLog2E;
      // A row that sees no window has P = 2^(S - inf) = 0.
      const float high = lse == kNegativeInfinity ? __builtin_inff() : static_cast<float>(exact);
      s.lse[g * kRows + r] = high;
      s.lse_low[g * kRows + r] =
          __builtin_isfinite(lse) ? static_cast<float>(exact - static_cast<double>(high)) : 0.0f;
    }
  }

  const std::int64_t first_position = tile.begin + sequence.offset();
  TopBlocks top[kRows];
  std::int64_t own[kRows];  // block of the token itself
  float worst[kRows];       // a score must be above it to be kept
  for (std::int64_t r = 0; r < kRows; ++r) {
    top[r] = {s.best + r * p.top_k, 0, 0};
    worst[r] = r < tile.rows ? kNegativeInfinity : __builtin_inff();
    own[r] = (first_position + r) / p.block_size;
  }
  const std::int64_t first_own = own[0], last_own = own[tile.rows - 1];
  const auto insert = [&](std::int64_t r, float score, std::int64_t block) {
    top[r].insert(rank_of(score, block), p.top_k);
    if (top[r].count == p.top_k) worst[r] = score_of(top[r].rank[top[r].worst]);
  };

  clear_floats(s.sums, carried * kRows);
  const std::int64_t visible =
      last_key_at(visibility, first_position + tile.rows - 1) + 1;  // windows of the last row
  const std::int64_t usable = min_of(max_of<std::int64_t>(visible, 0), sequence.compressed);
  for (std::int64_t begin = 0; begin < (last_own + 1) * shape.per_block; begin += shape.windows) {
    const std::int64_t count = max_of<std::int64_t>(0, min_of(shape.windows, usable - begin));
    float* sums = s.sums + carried * kRows;
    if (count > 0) add_probabilities(p, args, item, s, visibility, tile, begin, count, sums);
    clear_floats(sums + count * kRows, (shape.windows - count) * kRows);
    for (std::int64_t i = 0; i < shape.windows; i += shape.per_block) {
      const std::int64_t block = (begin + i) / shape.per_block;
      if (block > last_own) break;
      // Blocks that are free to choose for every token of the tile; the others are looked at one by one.
      const bool plain = block >= p.init_blocks && block <= first_own - p.local_blocks;
      for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
        Float score = hn::Zero(kFloat);
        for (std::int64_t o = 0; o < shape.per_block + carried; ++o)
          score = hn::MulAdd(hn::Load(kFloat, s.sums + (i + o) * kRows + r), hn::Set(kFloat, s.weights[o]),
                             score);
        score = hn::IfThenElse(hn::IsNaN(score), hn::Set(kFloat, -1.0f), score);  // below every real score
        float lanes[kLanes];
        if (plain) {
          const auto above = hn::Gt(score, hn::LoadU(kFloat, worst + r));
          if (hn::AllFalse(kFloat, above)) continue;
          hn::StoreU(score, kFloat, lanes);
          for (std::int64_t lane = 0; lane < kLanes; ++lane)
            if (lanes[lane] > worst[r + lane]) insert(r + lane, lanes[lane], block);
          continue;
        }
        hn::StoreU(score, kFloat, lanes);
        for (std::int64_t row = r; row < min_of(r + kLanes, tile.rows); ++row) {
          if (block > own[row]) continue;
          const bool forced = block < p.init_blocks || block > own[row] - p.local_blocks;
          const float value = forced ? __builtin_inff() : lanes[row - r];
          if (forced || value > worst[row]) insert(row, value, block);
        }
      }
    }
    for (std::int64_t i = 0; i < carried * kRows; ++i) s.sums[i] = s.sums[shape.windows * kRows + i];
  }
  for (std::int64_t r = 0; r < tile.rows; ++r)
    store_blocks(p, top[r],
                 args.selected_blocks.data + sequence.batch * args.selected_blocks.stride_batch +
                     item.kv_head * args.selected_blocks.stride_head +
                     (sequence.q_begin + tile.begin + r) * args.selected_blocks.stride_row,
                 args.selected_blocks.stride_slot);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
