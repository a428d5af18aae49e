// SPDX-License-Identifier: Apache-2.0
// Backward in bfloat16 on AMX tiles: the policy Arithmetic of backward-inl.h.
//
//   product               A (as it lies)    B (pairs)
//   S  = K Q^T            K[key][d]         Q^T, pairs of d
//   dP = V dO^T           V[key][d]         dO^T, pairs of d
//   dQ^T += K^T dS        K^T[d][key]       dS, pairs of keys
//   dV += P dO            P[key][row]       dO, pairs of rows
//   dK += dS Q            dS[key][row]      Q, pairs of rows
//
// S and dP are computed for 32 keys at a time, one step ahead of the vector code that turns them into P and dS, so both
// stay in the first-level cache (8 KB each, twice). P and dS are kept in bfloat16 for two row tiles, and dV and dK sum 128
// rows at once: C of these two is 2 * 128 * head_dim floats per key tile, and loading and storing it for 64 rows would
// take as long as the products.
#pragma once

#include "backend/cpu/simd/backward-inl.h"
#include "backend/cpu/simd/tiles-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

struct TileBackward {
  static constexpr std::int64_t kSlots = 2;  // row tiles whose P and dS wait for dV and dK
  static constexpr std::int64_t kSlotTiles = kRows / kTileTerms;  // of k
  static constexpr std::int64_t kStrip = 32;                      // keys

  Tiles key, value, key_t;            // of the block
  Tiles query, grad_out;              // B of S and dP, of the row tile
  Tiles query_pairs, grad_out_pairs;  // B of dK and dV, of the waiting row tiles
  Tiles probabilities, grad_scores;   // A of dV and dK, of the block and the waiting row tiles
  Tiles grad_scores_t;                // B of dQ, of one row tile and key tile
  std::uint16_t* staging;             // grad_out with strange strides, [64][head_dim_v]
  std::int64_t slot;                  // of the row tile at hand
  std::int64_t tile_keys;
  std::int64_t key_tiles;   // of the block, in use
  std::int64_t last_keys;   // in the last of them
  std::uint8_t waiting[8];  // per key tile: bits of the slots whose P and dS wait

  // The block is what stays in half a second-level cache of 2 MB.
  static HWY_INLINE std::int64_t block_tiles(const Problem& p) {
    const std::int64_t d = tiles_of(p.head_dim, kTileTerms) * kTileTerms;
    const std::int64_t dv = tiles_of(p.head_dim_v, kTileTerms) * kTileTerms;
    const std::int64_t bytes_per_key = 2 * d * 2 + dv * 2 + (d + dv) * 4 + 2 * kSlots * kRows * 2;
    return max_of<std::int64_t>(
        1, min_of<std::int64_t>(8, (1 << 20) / (bytes_per_key * skip_tile_keys(p.head_dim))));
  }

  HWY_INLINE void carve(const Problem& p, std::int64_t block_keys, Arena& arena) {
    const auto take = [&](std::int64_t outer, std::int64_t k_tiles) HWY_ATTR {
      return Tiles{reinterpret_cast<char*>(arena.floats(outer * k_tiles * (kTileBytes / 4))), k_tiles};
    };
    tile_keys = skip_tile_keys(p.head_dim);
    const std::int64_t d32 = tiles_of(p.head_dim, kTileTerms), dv32 = tiles_of(p.head_dim_v, kTileTerms);
    const std::int64_t d16 = tiles_of(p.head_dim, kTileRows), dv16 = tiles_of(p.head_dim_v, kTileRows);
    key = take(block_keys / kTileRows, d32);
    value = take(block_keys / kTileRows, dv32);
    key_t = take(d16, block_keys / kTileTerms);
    query = take(kRows / kTileRows, d32);
    grad_out = take(kRows / kTileRows, dv32);
    query_pairs = take(d16, kSlots * kSlotTiles);
    grad_out_pairs = take(dv16, kSlots * kSlotTiles);
    probabilities = take(block_keys / kTileRows, kSlots * kSlotTiles);
    grad_scores = take(block_keys / kTileRows, kSlots * kSlotTiles);
    grad_scores_t = take(kRows / kTileRows, tile_keys / kTileTerms);
    staging = reinterpret_cast<std::uint16_t*>(arena.floats(kRows * tiles_of(p.head_dim_v, 2)));
  }

  HWY_INLINE void pack_block(const Problem& p, const RowSource& keys, const RowSource& values,
                             std::int64_t begin, std::int64_t count) {
    slot = kSlots - 1;
    key_tiles = tiles_of(count, tile_keys);
    last_keys = count - (key_tiles - 1) * tile_keys;
    for (std::int64_t b = 0; b < key_tiles; ++b) {
      waiting[b] = 0;
      const std::int64_t in_tile = min_of(tile_keys, count - b * tile_keys);
      const std::int64_t n_tiles = 2 * tiles_of(in_tile, kTileTerms);
      const std::int64_t n = b * tile_keys / kTileRows, k = b * tile_keys / kTileTerms;
      Rows rows;
      rows.read(keys, begin + b * tile_keys, in_tile);
      pack_rows_to_tiles(rows, n_tiles, p.head_dim, Tiles{key.at(n, 0), key.k_tiles});
      pack_transposed_to_tiles(rows, p.head_dim, n_tiles / 2, Tiles{key_t.at(0, k), key_t.k_tiles});
      rows.read(values, begin + b * tile_keys, in_tile);
      pack_rows_to_tiles(rows, n_tiles, p.head_dim_v, Tiles{value.at(n, 0), value.k_tiles});
    }
  }

  template <class Scratch>
  HWY_INLINE void pack_row_tile(const Problem& p, const Arguments& args, const LogitPolicies&,
                                const Sequence& sequence, std::int64_t head, BackwardRowTile& t, Scratch& s) {
    if (slot == kSlots - 1) finish_block(p, s);
    slot = (slot + 1) % kSlots;
    t.tile.lanes = kRows;  // what lies beyond the rows is packed as zeros, and its P is 0
    Rows rows;
    rows.read(row_source(args.query, sequence.batch, sequence.q_begin, head), t.tile.begin, t.tile.rows);
    pack_columns_to_tiles(rows, kRows / kTileRows, p.head_dim, query);
    pack_row_pairs_to_tiles(rows, kSlotTiles, p.head_dim, query_pairs, slot * kSlotTiles);
    read_grad_out(p, args, sequence, head, t, rows);
    pack_columns_to_tiles(rows, kRows / kTileRows, p.head_dim_v, grad_out);
    pack_row_pairs_to_tiles(rows, kSlotTiles, p.head_dim_v, grad_out_pairs, slot * kSlotTiles);
  }

  HWY_INLINE void read_grad_out(const Problem& p, const Arguments& args, const Sequence& sequence,
                                std::int64_t head, const BackwardRowTile& t, Rows& rows) const {
    const RowSource source = row_source(args.grad_out, sequence.batch, sequence.q_begin, head);
    rows.read(source, t.tile.begin, t.tile.rows);
    for (std::int64_t r = 0; r < t.tile.rows; ++r) {
      // A row without a key may carry any garbage in grad_out: its P is 0, and 0 times that must be 0.
      if (t.lse_log2[r] == __builtin_inff()) {
        rows.row[r] = nullptr;
      } else if (args.grad_out.stride_dim != 1) {
        std::uint16_t* target = staging + r * p.head_dim_v;
        for (std::int64_t c = 0; c < p.head_dim_v; ++c)
          std::memcpy(target + c, rows.row[r] + c * args.grad_out.stride_dim * 2, 2);
        rows.row[r] = reinterpret_cast<const char*>(target);
      }
    }
  }

  template <class Scratch>
  HWY_INLINE void tile(const Problem& p, const LogitPolicies& logit, const Visibility& visibility,
                       const Scratch& s, BackwardRowTile& t, std::int64_t key_begin, std::int64_t keys,
                       std::int64_t in_block, bool masked, const PartialTile* partial) {
    const std::int64_t strips = tiles_of(keys, kStrip), first_tile = in_block / kTileRows;
    const bool passes = logit.any() || masked || partial != nullptr;  // over whole score tiles
    if (passes) {
      tile_product<false>(Tiles{key.at(first_tile, 0), key.k_tiles}, 2 * strips, query, kRows / kTileRows, 0,
                          key.k_tiles, s.scores, kRows);
      if (logit.any()) {
        const Float factor = hn::Set(kFloat, logit.pre_scale);
        for (std::int64_t i = 0; i < keys * kRows; i += kLanes)
          hn::Store(hn::Mul(hn::Load(kFloat, s.scores + i), factor), kFloat, s.scores + i);
        apply_logit(logit, t.tile, s.delta + in_block, visibility.offset, key_begin, keys, s.scores, s.tanh);
      }
      if (partial != nullptr)
        apply_partial_tile(*partial, t.tile, keys, s.scores);
      else if (masked)
        apply_mask(visibility, t.tile, key_begin, keys, s.scores);
    }
    const float scale = logit.any() ? 1.0f : logit.pre_scale;
    // Strips take turns in two places, unless whole tiles are wanted.
    const auto score_strip = [&](std::int64_t i)
                                 HWY_ATTR { return s.scores + (passes ? i : i & 1) * kStrip * kRows; };
    const auto grad_strip = [&](std::int64_t i)
                                HWY_ATTR { return s.grad_scores + (passes ? i : i & 1) * kStrip * kRows; };
    for (std::int64_t i = -1; i < strips; ++i)
      for (std::int64_t half = 0; half < kSlotTiles; ++half) {
        if (i + 1 < strips)
          strip_products(first_tile + 2 * (i + 1), half, passes ? nullptr : score_strip(i + 1),
                         grad_strip(i + 1));
        if (i < 0) continue;
        float* tanh = s.tanh == nullptr ? nullptr : s.tanh + i * kStrip * kRows;
        if (half == 0) hide_beyond(keys - i * kStrip, score_strip(i), tanh);
        if (logit.any())
          grad_strip_of<true>(t, half, first_tile + 2 * i, i, scale, score_strip(i), grad_strip(i), tanh);
        else
          grad_strip_of<false>(t, half, first_tile + 2 * i, i, scale, score_strip(i), grad_strip(i), nullptr);
      }
    if (logit.pair_gate)
      add_gate_grads(logit, t, keys, s.delta + in_block, s.grad_scores, s.grad_delta + in_block);
    waiting[in_block / tile_keys] |= static_cast<std::uint8_t>(1u << slot);
    const Tiles columns{key_t.at(0, in_block / kTileTerms), key_t.k_tiles};
    const std::int64_t d_tiles = tiles_of(p.head_dim, kTileRows);
    if (t.touched)
      tile_product<true>(columns, d_tiles, grad_scores_t, kRows / kTileRows, 0, strips, t.grad_query, kRows);
    else
      tile_product<false>(columns, d_tiles, grad_scores_t, kRows / kTileRows, 0, strips, t.grad_query, kRows);
  }

  // S and dP of 32 keys and 32 rows; without S when `scores` is null.
  HWY_INLINE void strip_products(std::int64_t n, std::int64_t half, float* scores, float* grads) const {
    if (scores != nullptr)
      tile_block<2, 2, false>(key.at(n, 0), key.k_tiles * kTileBytes, query.at(2 * half, 0),
                              query.k_tiles * kTileBytes, key.k_tiles, scores + half * kTileTerms, kRows);
    tile_block<2, 2, false>(value.at(n, 0), value.k_tiles * kTileBytes, grad_out.at(2 * half, 0),
                            grad_out.k_tiles * kTileBytes, value.k_tiles, grads + half * kTileTerms, kRows);
  }

  // Keys of a strip beyond the last one: P and dS must be 0.
  HWY_INLINE void hide_beyond(std::int64_t keys, float* scores, float* tanh) const {
    for (std::int64_t i = max_of<std::int64_t>(keys, 0) * kRows; i < kStrip * kRows; i += kLanes) {
      hn::Store(hn::Set(kFloat, kNegativeInfinity), kFloat, scores + i);
      if (tanh != nullptr) hn::Store(hn::Zero(kFloat), kFloat, tanh + i);
    }
  }

  // P and dS of 32 keys and 32 rows, rounded to bfloat16. kLogit: the tanh may be wanted, and dS in float too.
  template <bool kLogit>
  HWY_INLINE void grad_strip_of(const BackwardRowTile& t, std::int64_t half, std::int64_t n, std::int64_t k,
                                float scale, const float* scores, float* grads, const float* tanh) const {
    const std::int64_t row = half * kTileTerms;
    const Float factor = hn::Set(kFloat, scale);
    const Float lse0 = hn::Load(kFloat, t.lse_log2 + row), lse1 = hn::Load(kFloat, t.lse_log2 + row + kLanes);
    const Float dot0 = hn::Load(kFloat, t.dots + row), dot1 = hn::Load(kFloat, t.dots + row + kLanes);
    const std::int64_t k_row = slot * kSlotTiles + half;
    char* low = grad_scores_t.at(2 * half, k);
    char* high = grad_scores_t.at(2 * half + 1, k);
    for (std::int64_t j = 0; j < kStrip; j += 2) {
      __m512i rounded[2];
#pragma GCC unroll 2
      for (std::int64_t i = 0; i < 2; ++i) {
        const std::int64_t at = (j + i) * kRows + row;
        const Float p0 = exp2_short(hn::MulSub(hn::Load(kFloat, scores + at), factor, lse0));
        const Float p1 = exp2_short(hn::MulSub(hn::Load(kFloat, scores + at + kLanes), factor, lse1));
        Float ds0 = hn::Mul(p0, hn::Sub(hn::Load(kFloat, grads + at), dot0));
        Float ds1 = hn::Mul(p1, hn::Sub(hn::Load(kFloat, grads + at + kLanes), dot1));
        if constexpr (kLogit) {
          if (tanh != nullptr) {
            const Float one = hn::Set(kFloat, 1.0f);
            const Float t0 = hn::Load(kFloat, tanh + at), t1 = hn::Load(kFloat, tanh + at + kLanes);
            ds0 = hn::Mul(ds0, hn::NegMulAdd(t0, t0, one));
            ds1 = hn::Mul(ds1, hn::NegMulAdd(t1, t1, one));
          }
          hn::Store(ds0, kFloat, grads + at);
          hn::Store(ds1, kFloat, grads + at + kLanes);
        }
        const std::int64_t tile = n + (j + i) / kTileRows, line = (j + i) % kTileRows * 64;
        rounded[i] = pack_words(ds0, ds1);
        _mm512_store_si512(probabilities.at(tile, k_row) + line, pack_words(p0, p1));
        _mm512_store_si512(grad_scores.at(tile, k_row) + line, rounded[i]);
      }
      _mm512_store_si512(low + j / 2 * 64, _mm512_unpacklo_epi16(rounded[0], rounded[1]));
      _mm512_store_si512(high + j / 2 * 64, _mm512_unpackhi_epi16(rounded[0], rounded[1]));
    }
  }

  // dV and dK of the row tiles that wait.
  template <class Scratch>
  HWY_INLINE void finish_block(const Problem& p, Scratch& s) {
    for (std::int64_t b = 0; b < key_tiles; ++b) {
      if (waiting[b] == 0) continue;
      const std::int64_t begin = waiting[b] == 2 ? kSlotTiles : 0;
      const std::int64_t count = waiting[b] == 3 ? 2 * kSlotTiles : kSlotTiles;
      const std::int64_t n = b * tile_keys / kTileRows;
      const std::int64_t keys = b + 1 < key_tiles ? tile_keys : last_keys;
      const std::int64_t n_tiles = 2 * tiles_of(keys, kStrip);
      tile_product<true>(Tiles{probabilities.at(n, 0), probabilities.k_tiles}, n_tiles, grad_out_pairs,
                         tiles_of(p.head_dim_v, kTileRows), begin, count,
                         s.grad_value + b * tile_keys * s.value_pitch, s.value_pitch);
      tile_product<true>(Tiles{grad_scores.at(n, 0), grad_scores.k_tiles}, n_tiles, query_pairs,
                         tiles_of(p.head_dim, kTileRows), begin, count,
                         s.grad_key + b * tile_keys * s.key_pitch, s.key_pitch);
      waiting[b] = 0;
    }
  }
};

}  // namespace fsa::cpu::FSA_SIMD_TARGET
