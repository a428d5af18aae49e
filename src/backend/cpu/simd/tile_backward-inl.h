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
// stay in the first-level cache (8 KB each, twice). P and dS are kept in bfloat16 for the last two row tiles that met a
// key tile, and dV and dK sum 128 rows at once: C of these two is 2 * 128 * head_dim floats per key tile, and loading and
// storing it for 64 rows would take as long as the products.
//
// Rows are packed once per call, with their statistics, and not once per block: of a sparse backward, which meets few
// tiles of a block, packing would be a sixth.
#pragma once

#include "backend/cpu/simd/backward-inl.h"
#include "backend/cpu/simd/tile_gate-inl.h"
#include "backend/cpu/simd/tiles-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

// Q and dO of a row tile as B operands, in the workspace.
struct PackedRows {
  Tiles query, grad_out;              // of S and dP: pairs of columns
  Tiles query_pairs, grad_out_pairs;  // of dK and dV: pairs of rows

  static HWY_INLINE PackedRows at(const Problem& p, char* data) {
    PackedRows rows;
    const auto take = [&](std::int64_t outer, std::int64_t k_tiles) HWY_ATTR {
      const Tiles tiles{data, k_tiles};
      data += outer * k_tiles * kTileBytes;
      return tiles;
    };
    constexpr std::int64_t kTiles = kRows / kTileRows, kPairs = kRows / kTileTerms;
    rows.query = take(kTiles, tiles_of(p.head_dim, kTileTerms));
    rows.grad_out = take(kTiles, tiles_of(p.head_dim_v, kTileTerms));
    rows.query_pairs = take(tiles_of(p.head_dim, kTileRows), kPairs);
    rows.grad_out_pairs = take(tiles_of(p.head_dim_v, kTileRows), kPairs);
    return rows;
  }
  static HWY_INLINE std::size_t bytes(const Problem& p) {
    const std::int64_t rows =
        kRows * (tiles_of(p.head_dim, kTileTerms) + tiles_of(p.head_dim_v, kTileTerms)) * kTileTerms;
    const std::int64_t pairs =
        kRows * (tiles_of(p.head_dim, kTileRows) + tiles_of(p.head_dim_v, kTileRows)) * kTileRows;
    return static_cast<std::size_t>(2 * (rows + pairs));
  }
};

// After the statistics of a row tile; `staging` holds [64][head_dim_v].
HWY_INLINE void pack_rows_of_backward(const Problem& p, const Arguments& args, const BackwardBuffers& buffers,
                                      const RowTileItem& item, std::uint16_t* staging) {
  const Sequence& sequence = item.sequence;
  const std::int64_t index = buffer_tile(buffers, item.head, item.tile_begin, item.tile);
  const std::int64_t begin = item.tile * kRows, count = min_of(kRows, sequence.seqlen_q - begin);
  const PackedRows packed =
      PackedRows::at(p, buffers.packed_rows + index * static_cast<std::int64_t>(PackedRows::bytes(p)));
  Rows rows;  // what lies beyond them is packed as zeros, and its P is 0
  rows.read(row_source(args.query, sequence.batch, sequence.q_begin, item.head), begin, count);
  pack_columns_to_tiles(rows, kRows / kTileRows, p.head_dim, packed.query);
  pack_row_pairs_to_tiles(rows, p.head_dim, packed.query_pairs);
  rows.read(row_source(args.grad_out, sequence.batch, sequence.q_begin, item.head), begin, count);
  for (std::int64_t r = 0; r < count; ++r) {
    // A row without a key may carry any garbage in grad_out: its P is 0, and 0 times that must be 0.
    if (buffers.lse_log2[index * kRows + r] == __builtin_inff()) {
      rows.row[r] = nullptr;
    } else if (args.grad_out.stride_dim != 1) {
      std::uint16_t* target = staging + r * p.head_dim_v;
      for (std::int64_t c = 0; c < p.head_dim_v; ++c)
        std::memcpy(target + c, rows.row[r] + c * args.grad_out.stride_dim * 2, 2);
      rows.row[r] = reinterpret_cast<const char*>(target);
    }
  }
  pack_columns_to_tiles(rows, kRows / kTileRows, p.head_dim_v, packed.grad_out);
  pack_row_pairs_to_tiles(rows, p.head_dim_v, packed.grad_out_pairs);
}

struct TileBackward {
  static constexpr std::int64_t kSlots = 2;  // row tiles whose P and dS wait for dV and dK
  static constexpr std::int64_t kSlotTiles = kRows / kTileTerms;  // of k
  static constexpr std::int64_t kStrip = 32;                      // keys
  static constexpr std::int64_t kMostTiles = 8;                   // of a block

  Tiles key, value, key_t;           // of the block
  PackedRows rows;                   // of the row tile at hand
  Tiles probabilities, grad_scores;  // A of dV and dK, of the block and the waiting row tiles
  Tiles grad_scores_t;               // B of dQ, of one row tile and key tile
  float* gate_slopes;                // g' of one row tile and key tile; with a gate
  std::int64_t slot;                 // of the row tile and key tile at hand
  std::int64_t tile_keys;
  std::int64_t key_tiles;            // of the block, in use
  std::int64_t last_keys;            // in the last of them
  std::int64_t waiting[kMostTiles];  // per key tile: slots in use
  PackedRows waiting_rows[kMostTiles][kSlots];

  // The block is what stays in half a second-level cache of 2 MB.
  static HWY_INLINE std::int64_t block_tiles(const Problem& p) {
    const std::int64_t d = tiles_of(p.head_dim, kTileTerms) * kTileTerms;
    const std::int64_t dv = tiles_of(p.head_dim_v, kTileTerms) * kTileTerms;
    const std::int64_t bytes_per_key = 2 * d * 2 + dv * 2 + (d + dv) * 4 + 2 * kSlots * kRows * 2;
    return max_of<std::int64_t>(
        1, min_of<std::int64_t>(kMostTiles, (1 << 20) / (bytes_per_key * skip_tile_keys(p.head_dim))));
  }

  HWY_INLINE void carve(const Problem& p, std::int64_t block_keys, Arena& arena) {
    const auto take = [&](std::int64_t outer, std::int64_t k_tiles) HWY_ATTR {
      return Tiles{reinterpret_cast<char*>(arena.floats(outer * k_tiles * (kTileBytes / 4))), k_tiles};
    };
    tile_keys = skip_tile_keys(p.head_dim);
    const std::int64_t d32 = tiles_of(p.head_dim, kTileTerms), dv32 = tiles_of(p.head_dim_v, kTileTerms);
    const std::int64_t d16 = tiles_of(p.head_dim, kTileRows);
    key = take(block_keys / kTileRows, d32);
    value = take(block_keys / kTileRows, dv32);
    key_t = take(d16, block_keys / kTileTerms);
    probabilities = take(block_keys / kTileRows, kSlots * kSlotTiles);
    grad_scores = take(block_keys / kTileRows, kSlots * kSlotTiles);
    grad_scores_t = take(kRows / kTileRows, tile_keys / kTileTerms);
    gate_slopes = p.has_gate ? arena.floats(tile_keys * kRows) : nullptr;
  }

  HWY_INLINE void pack_block(const Problem& p, const RowSource& keys, const RowSource& values,
                             std::int64_t begin, std::int64_t count) {
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
  HWY_INLINE void pack_row_tile(const Problem& p, const Arguments&, const LogitPolicies&, const Sequence&,
                                std::int64_t /*head*/, BackwardRowTile& t, const Scratch&) {
    t.tile.lanes = kRows;
    rows = PackedRows::at(p, t.packed);
  }

  static constexpr std::int64_t kKeyUnit = kTileTerms;

  enum class Logits : std::uint8_t {
    none,
    gate,  // log-sigmoid alone: its gradients are summed while dS is in registers
    any,   // dS is kept in float, the tanh of softcap may be wanted
  };

  template <class Scratch>
  HWY_INLINE void tile(const Problem& p, const LogitPolicies& logit, const Visibility& visibility,
                       const Scratch& s, BackwardRowTile& t, std::int64_t key_begin, std::int64_t tile_begin,
                       std::int64_t first, std::int64_t keys, const PartialTile* partial) {
    const std::int64_t in_block = tile_begin + first, b = tile_begin / tile_keys;
    slot = waiting[b];
    const std::int64_t strips = tiles_of(keys, kStrip), first_tile = in_block / kTileRows;
    const bool gate_alone = logit.pair_gate && logit.log_sigmoid && logit.softcap_log2 == 0 && !logit.alibi;
    const Logits logits = gate_alone ? Logits::gate : logit.any() ? Logits::any : Logits::none;
    const bool passes = logits != Logits::none || partial != nullptr;  // over whole score tiles
    const float* delta = s.delta + in_block;
    float* grad_delta = s.grad_delta + in_block;
    if (passes) {
      tile_product<false>(key.from(first_tile, 0), 2 * strips, rows.query, kRows / kTileRows, 0, key.k_tiles,
                          s.scores, kRows);
      if (logits == Logits::gate) add_gate(logit, t.tile, delta, keys, s.scores);
      if (logits == Logits::any) {
        const Float factor = hn::Set(kFloat, logit.pre_scale);
        for (std::int64_t i = 0; i < keys * kRows; i += kLanes)
          hn::Store(hn::Mul(hn::Load(kFloat, s.scores + i), factor), kFloat, s.scores + i);
        apply_logit(logit, t.tile, delta, visibility.offset, key_begin + first, keys, s.scores, s.tanh);
      }
      if (partial != nullptr) apply_partial_tile(*partial, t.tile, first, keys, s.scores);
    }
    const float scale = logits == Logits::any ? 1.0f : logit.pre_scale;
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
        const std::int64_t n = first_tile + 2 * i;
        const GateStrip gate{gate_slopes + i * kStrip * kRows, delta + i * kStrip, grad_delta + i * kStrip};
        if (logits == Logits::none)
          grad_strip_of<Logits::none>(t, half, n, i, scale, score_strip(i), grad_strip(i), nullptr, gate);
        else if (logits == Logits::gate)
          grad_strip_of<Logits::gate>(t, half, n, i, scale, score_strip(i), grad_strip(i), nullptr, gate);
        else
          grad_strip_of<Logits::any>(t, half, n, i, scale, score_strip(i), grad_strip(i), tanh, gate);
      }
    if (logit.pair_gate && !gate_alone) add_gate_grads(logit, t, keys, delta, s.grad_scores, grad_delta);
    clear_outside(b, first_tile, 2 * strips);
    waiting_rows[b][slot] = rows;
    const Tiles columns = key_t.from(0, in_block / kTileTerms);
    const std::int64_t d_tiles = tiles_of(p.head_dim, kTileRows);
    if (t.touched)
      tile_product<true>(columns, d_tiles, grad_scores_t, kRows / kTileRows, 0, strips, t.grad_query, kRows);
    else
      tile_product<false>(columns, d_tiles, grad_scores_t, kRows / kTileRows, 0, strips, t.grad_query, kRows);
    if (++waiting[b] == kSlots) finish_tile(p, b, s);
  }

  // P and dS of the keys of a tile that no row sees, and that were left out.
  HWY_INLINE void clear_outside(std::int64_t b, std::int64_t first, std::int64_t count) const {
    const std::int64_t begin = b * tile_keys / kTileRows, end = begin + key_rows_of(b);
    const auto clear = [&](const Tiles& tiles, std::int64_t n) HWY_ATTR {
      float* tile = reinterpret_cast<float*>(tiles.at(n, slot * kSlotTiles));
      zero(tile, kSlotTiles * kTileBytes / 4);
    };
    for (std::int64_t n = begin; n < end; ++n) {
      if (n >= first && n < first + count) continue;
      clear(probabilities, n);
      clear(grad_scores, n);
    }
  }

  // Of the strip at hand.
  struct GateStrip {
    const float* slopes;
    const float* delta;
    float* grad_delta;
  };

  // scores += log(sigmoid(alpha_i delta_j)), before the scale, and the slope sigmoid(-alpha_i delta_j) to 2^-14: its
  // products are summed and then rounded to 2^-9.
  HWY_INLINE void add_gate(const LogitPolicies& logit, const RowTile& tile, const float* delta,
                           std::int64_t keys, float* scores) const {
    const GateKeys gate_keys(delta, keys);
    for (std::int64_t r = 0; r < kRows; r += kLanes) {
      const TileGate gate(logit, tile, r, gate_keys);
      if (gate.near)
        add_near_gate(gate, gate_keys, keys, scores + r, gate_slopes + r);
      else
        add_far_gate(gate, gate_keys, keys, scores + r, gate_slopes + r);
      for (std::int64_t j = keys; j < round_up(keys, kStrip); ++j)
        hn::Store(hn::Zero(kFloat), kFloat, gate_slopes + j * kRows + r);
    }
  }
  static HWY_INLINE void add_near_gate(const TileGate& rows, const GateKeys& gate_keys, std::int64_t keys,
                                       float* scores, float* slopes) {
    const NearGate gate(rows.alpha);
    const Quadratics log_cosh(kLogCosh), tanh_ratio(kTanhRatio);
    const float* const delta = gate_keys.delta;
    const float* const sizes = gate_keys.sizes;
    for (std::int64_t j = 0; j < keys; ++j) {
      float* s = scores + j * kRows;
      const float delta_j = delta[j];
      const Float w = gate.argument(sizes[j]);
      hn::Store(gate.add(log_cosh, w, delta_j, hn::Load(kFloat, s)), kFloat, s);
      hn::Store(gate.slope(tanh_ratio, w, delta_j), kFloat, slopes + j * kRows);
    }
  }
  static HWY_INLINE void add_far_gate(const TileGate& rows, const GateKeys& gate_keys, std::int64_t keys,
                                      float* scores, float* slopes) {
    const FarGate gate(rows.alpha);
    for (std::int64_t j = 0; j < keys; ++j) {
      const Float x = gate.argument(gate_keys.delta[j]);
      const Float y = exp2_of_minus_abs(x);
      float* s = scores + j * kRows;
      hn::Store(gate.add(x, y, hn::Load(kFloat, s)), kFloat, s);
      hn::Store(gate.slope(x, y), kFloat, slopes + j * kRows);
    }
  }

  // S and dP of 32 keys and 32 rows; without S when `scores` is null.
  HWY_INLINE void strip_products(std::int64_t n, std::int64_t half, float* scores, float* grads) const {
    if (scores != nullptr)
      tile_block<2, 2, false>(key.at(n, 0), key.k_tiles * kTileBytes, rows.query.at(2 * half, 0),
                              rows.query.k_tiles * kTileBytes, key.k_tiles, scores + half * kTileTerms,
                              kRows);
    tile_block<2, 2, false>(value.at(n, 0), value.k_tiles * kTileBytes, rows.grad_out.at(2 * half, 0),
                            rows.grad_out.k_tiles * kTileBytes, value.k_tiles, grads + half * kTileTerms,
                            kRows);
  }

  // Keys of a strip beyond the last one: P and dS must be 0.
  HWY_INLINE void hide_beyond(std::int64_t keys, float* scores, float* tanh) const {
    for (std::int64_t i = max_of<std::int64_t>(keys, 0) * kRows; i < kStrip * kRows; i += kLanes) {
      hn::Store(hn::Set(kFloat, kNegativeInfinity), kFloat, scores + i);
      if (tanh != nullptr) hn::Store(hn::Zero(kFloat), kFloat, tanh + i);
    }
  }

  // Of 32 rows and 32 keys: d alpha_i += sum_j dS g' delta_j, d delta_j += sum_i dS g' alpha_i.
  struct GateSums {
    Float alpha0, alpha1, sum0, sum1;
    alignas(64) float by_key[kStrip * kLanes];

    HWY_INLINE GateSums(const BackwardRowTile& t, std::int64_t row)
        : alpha0(hn::LoadU(kFloat, t.tile.alpha + row)),
          alpha1(hn::LoadU(kFloat, t.tile.alpha + row + kLanes)),
          sum0(hn::Zero(kFloat)),
          sum1(sum0) {}
    HWY_INLINE void add(const GateStrip& gate, std::int64_t key, std::int64_t at, Float ds0, Float ds1) {
      const Float g0 = hn::Mul(ds0, hn::Load(kFloat, gate.slopes + at));
      const Float g1 = hn::Mul(ds1, hn::Load(kFloat, gate.slopes + at + kLanes));
      const Float delta = hn::Set(kFloat, gate.delta[key]);
      sum0 = hn::MulAdd(g0, delta, sum0);
      sum1 = hn::MulAdd(g1, delta, sum1);
      hn::Store(hn::MulAdd(g1, alpha1, hn::Mul(g0, alpha0)), kFloat, by_key + key * kLanes);
    }
    HWY_INLINE void finish(const BackwardRowTile& t, std::int64_t row, const GateStrip& gate) const {
      float* a = t.grad_alpha + row;
      hn::Store(hn::Add(hn::Load(kFloat, a), sum0), kFloat, a);
      hn::Store(hn::Add(hn::Load(kFloat, a + kLanes), sum1), kFloat, a + kLanes);
      for (std::int64_t key = 0; key < kStrip; key += kLanes) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(by_key + (key + i) * kLanes);
        transpose_16x16(r);
        Float sum{_mm512_castsi512_ps(r[0])};
#pragma GCC unroll 16
        for (int i = 1; i < 16; ++i) sum = hn::Add(sum, Float{_mm512_castsi512_ps(r[i])});
        float* d = gate.grad_delta + key;
        hn::Store(hn::Add(hn::Load(kFloat, d), sum), kFloat, d);
      }
    }
  };

  // P and dS of 32 keys and 32 rows, rounded to bfloat16.
  template <Logits kLogits>
  HWY_INLINE void grad_strip_of(const BackwardRowTile& t, std::int64_t half, std::int64_t n, std::int64_t k,
                                float scale, const float* scores, float* grads, const float* tanh,
                                const GateStrip& gate) const {
    const std::int64_t row = half * kTileTerms;
    const Float factor = hn::Set(kFloat, scale);
    const Float lse0 = hn::Load(kFloat, t.lse_log2 + row), lse1 = hn::Load(kFloat, t.lse_log2 + row + kLanes);
    const Float dot0 = hn::Load(kFloat, t.dots + row), dot1 = hn::Load(kFloat, t.dots + row + kLanes);
    const std::int64_t k_row = slot * kSlotTiles + half;
    char* low = grad_scores_t.at(2 * half, k);
    char* high = grad_scores_t.at(2 * half + 1, k);
    GateSums sums(t, row);
    for (std::int64_t j = 0; j < kStrip; j += 2) {
      __m512i rounded[2];
#pragma GCC unroll 2
      for (std::int64_t i = 0; i < 2; ++i) {
        const std::int64_t at = (j + i) * kRows + row;
        const Float p0 = exp2_short(hn::MulSub(hn::Load(kFloat, scores + at), factor, lse0));
        const Float p1 = exp2_short(hn::MulSub(hn::Load(kFloat, scores + at + kLanes), factor, lse1));
        Float ds0 = hn::Mul(p0, hn::Sub(hn::Load(kFloat, grads + at), dot0));
        Float ds1 = hn::Mul(p1, hn::Sub(hn::Load(kFloat, grads + at + kLanes), dot1));
        if constexpr (kLogits == Logits::gate) sums.add(gate, j + i, at, ds0, ds1);
        if constexpr (kLogits == Logits::any) {
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
    if constexpr (kLogits == Logits::gate) sums.finish(t, row, gate);
  }

  // Tiles of 16 keys in use of a key tile.
  HWY_INLINE std::int64_t key_rows_of(std::int64_t b) const {
    return 2 * tiles_of(b + 1 < key_tiles ? tile_keys : last_keys, kStrip);
  }

  template <class Scratch>
  HWY_INLINE void finish_block(const Problem& p, const Scratch& s) {
    for (std::int64_t b = 0; b < key_tiles; ++b)
      if (waiting[b] > 0) finish_tile(p, b, s);
  }

  // dV and dK of a key tile and the row tiles that wait.
  template <class Scratch>
  HWY_INLINE void finish_tile(const Problem& p, std::int64_t b, const Scratch& s) {
    const PackedRows* packed = waiting_rows[b];
    const std::int64_t n = b * tile_keys / kTileRows;
    const Tiles grad_out[kSlots] = {packed[0].grad_out_pairs, packed[1].grad_out_pairs};
    const Tiles query[kSlots] = {packed[0].query_pairs, packed[1].query_pairs};
    add_product(probabilities.from(n, 0), key_rows_of(b), grad_out, waiting[b],
                tiles_of(p.head_dim_v, kTileRows), s.grad_value + b * tile_keys * s.value_pitch,
                s.value_pitch);
    add_product(grad_scores.from(n, 0), key_rows_of(b), query, waiting[b], tiles_of(p.head_dim, kTileRows),
                s.grad_key + b * tile_keys * s.key_pitch, s.key_pitch);
    waiting[b] = 0;
  }

  // C += sum over the slots of A times B; n_tiles is even.
  static HWY_NOINLINE void add_product(const Tiles& a, std::int64_t n_tiles, const Tiles* b,
                                       std::int64_t slots, std::int64_t v_tiles, float* c,
                                       std::int64_t c_pitch) {
    for (std::int64_t n = 0; n < n_tiles; n += 2)
      for (std::int64_t v = 0; v < v_tiles; v += 2) {
        float* block = c + n * kTileRows * c_pitch + v * kTileRows;
        if (v + 1 < v_tiles)
          add_block<2>(a, n, b, slots, v, block, c_pitch);
        else
          add_block<1>(a, n, b, slots, v, block, c_pitch);
      }
  }
  template <int kV>
  static HWY_INLINE void add_block(const Tiles& a, std::int64_t n, const Tiles* b, std::int64_t slots,
                                   std::int64_t v, float* c, std::int64_t c_pitch) {
    start_block<2, kV, true>(c, c_pitch);
    for (std::int64_t i = 0; i < slots; ++i)
      add_terms<2, kV>(a.at(n, i * kSlotTiles), a.k_tiles * kTileBytes, b[i].at(v, 0),
                       b[i].k_tiles * kTileBytes, kSlotTiles);
    store_block<2, kV>(c, c_pitch);
  }
};

}  // namespace fsa::cpu::FSA_SIMD_TARGET
