// SPDX-License-Identifier: Apache-2.0
// NSA block scores and top-k. One item is up to 64 tokens of one key head; one lane per token.
//
//   for each tile of compressed keys that the tokens can choose from, left to right:
//     for each head of the group:  P += 2^(Q K^T - lse)        group sum, window by window
//     for each block of the tile:  score = sum of weight[o] * P[window j a - (c - 1) + o]
//   the best blocks of every lane: choose_blocks-inl.h
//
// a = block_size / s, c = l / s; weight[o] counts the s-token strides of the window inside the block. The last c - 1
// windows of a tile are carried to the next, so the probabilities are never stored whole; the scores, one per block, are.
#pragma once

#include "backend/cpu/simd/choose_blocks-inl.h"
#include "backend/cpu/simd/compress-inl.h"
#include "backend/cpu/simd/gemm-inl.h"
#include "backend/cpu/simd/nsa_table.h"
#include "backend/cpu/simd/scores-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

// Windows per tile: whole blocks, 128 windows where a block has no more.
HWY_INLINE std::int64_t select_windows(const NsaProblem& p) {
  const std::int64_t per_block = block_weights(p).per_block;
  return max_of<std::int64_t>(1, 128 / per_block) * per_block;
}

struct SelectScratch {
  std::int64_t key_pitch;
  float *query, *lse, *lse_low;  // [group][head_dim][64], [group][64]
  float *key, *scores;           // [windows][key_pitch], [windows][64]
  float* sums;                   // [overlap - 1 + windows][64]: group sums, the carried ones first
  float *weights, *staging;
  std::int32_t* ranks;  // [blocks][64]

  HWY_INLINE std::size_t carve(const NsaProblem& p, char* base) {
    Arena arena{base};
    const BlockWeights shape = block_weights(p);
    const std::int64_t windows = select_windows(p);
    key_pitch = packed_pitch(p.head_dim);
    query = arena.floats(p.group_size * round_up(p.head_dim, 4) * kTilePitch);
    lse = arena.floats(p.group_size * kRows);
    lse_low = arena.floats(p.group_size * kRows);
    key = arena.floats(windows * key_pitch);
    scores = arena.floats(windows * kTilePitch);
    sums = arena.floats((shape.overlap - 1 + windows) * kRows);
    weights = arena.floats(shape.count());
    staging = arena.floats(kRows * round_up(p.head_dim, 16));
    ranks = reinterpret_cast<std::int32_t*>(arena.floats(kRows * most_blocks(p)));
    return arena.used;
  }
};

HWY_INLINE std::size_t select_scratch(const NsaProblem& p) {
  SelectScratch scratch;
  return scratch.carve(p, nullptr);
}

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
    gemm<Init::zero>(Gemm{s.query + g * round_up(p.head_dim, 4) * kTilePitch, kTilePitch, s.key, s.key_pitch,
                          1, p.head_dim, s.scores, kTilePitch},
                     count, tile.lanes);
    if (seen == TileVisibility::partial) apply_partial_tile(partial, tile, 0, count, s.scores);
    for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
      const Float lse = hn::Load(kFloat, s.lse + g * kRows + r),
                  lse_low = hn::Load(kFloat, s.lse_low + g * kRows + r);
      for (std::int64_t j = 0; j < count; ++j) {
        float* target = sums + j * kRows + r;
        const Float x = exp2(hn::Sub(hn::Sub(hn::Load(kFloat, s.scores + j * kTilePitch + r), lse), lse_low));
        hn::Store(g == 0 ? x : hn::Add(hn::Load(kFloat, target), x), kFloat, target);
      }
    }
  }
}

HWY_INLINE void select_blocks(const NsaProblem& p, const NsaArguments& args, const RowsItem& item,
                              void* memory) {
  SelectScratch s;
  s.carve(p, static_cast<char*>(memory));
  const BlockWeights shape = block_weights(p);
  const std::int64_t windows = select_windows(p);
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

  const std::int64_t first_position = tile.begin + sequence.offset();
  const std::int64_t last_position = first_position + tile.rows - 1;
  const BlockRows target = block_rows(args.selected_blocks, sequence, item.kv_head, tile.begin);
  if (keeps_all(p, last_position)) return choose_blocks(p, tile, first_position, nullptr, target);

  shape.fill(s.weights);
  for (std::int64_t g = 0; g < p.group_size; ++g) {
    const std::int64_t head = item.kv_head * p.group_size + g;
    pack_transposed(row_source(args.query, sequence.batch, sequence.q_begin, head), tile.begin, tile.rows,
                    p.head_dim, static_cast<float>(p.softmax_scale * kLog2E), s.staging,
                    s.query + g * round_up(p.head_dim, 4) * kTilePitch);
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

  clear_floats(s.sums, carried * kRows);
  const std::int64_t visible = last_key_at(visibility, last_position) + 1;  // windows of the last row
  const std::int64_t usable = min_of(max_of<std::int64_t>(visible, 0), sequence.compressed);
  const std::int64_t blocks = last_position / p.block_size + 1;
  for (std::int64_t begin = 0; begin < blocks * shape.per_block; begin += windows) {
    const std::int64_t count = max_of<std::int64_t>(0, min_of(windows, usable - begin));
    float* sums = s.sums + carried * kRows;
    if (count > 0) add_probabilities(p, args, item, s, visibility, tile, begin, count, sums);
    clear_floats(sums + count * kRows, (windows - count) * kRows);
    for (std::int64_t i = 0; i < windows; i += shape.per_block) {
      const std::int64_t block = (begin + i) / shape.per_block;
      if (block >= blocks) break;
      for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
        Float score = hn::Zero(kFloat);
        for (std::int64_t o = 0; o < shape.count(); ++o)
          score = hn::MulAdd(hn::Load(kFloat, s.sums + (i + o) * kRows + r), hn::Set(kFloat, s.weights[o]),
                             score);
        hn::Store(rank_of(score), kInt, s.ranks + block * kRows + r);
      }
    }
    for (std::int64_t i = 0; i < carried * kRows; ++i) s.sums[i] = s.sums[windows * kRows + i];
  }
  choose_blocks(p, tile, first_position, s.ranks, target);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
