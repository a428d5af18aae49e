// SPDX-License-Identifier: Apache-2.0
// Forward in bfloat16 on AMX tiles: the policy Arithmetic of forward-inl.h.
//
// Q^T and P are the B operands, K and V^T the A operands, all packed to tiles; S and O^T stay float. Three things
// differ from the float arithmetic:
//
// - Scores are left as q . k, exactly as the tile unit summed them: the factor pre_scale joins in the argument of the
//   exponential, where it is the same instruction as the subtraction. Scaling Q would round it once more.
// - O is rescaled only when the maximum of a row grew by more than 8 in base 2. A P of up to 2^8 rounds to bfloat16 with
//   the same relative error, and sums stay far from overflow.
// - The exponentials of 16 rows are computed between the tile products of the 16 rows before them: the vector ports and
//   the tile unit work side by side.
#pragma once

#include "backend/cpu/simd/forward-inl.h"
#include "backend/cpu/simd/tile_gate-inl.h"
#include "backend/cpu/simd/tiles-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

inline constexpr float kLazyMax = 8;

struct TileForward {
  Tiles key;                      // A: [key][head_dim]
  Tiles value;                    // A: [head_dim_v][key]
  Tiles probabilities;            // B: [key][row], 16 rows each, two of them in turn
  float* quarters;                // scores of 16 rows, [key][16], two of them in turn
  float score_scale;              // what the scores of the present tile are still to be multiplied with
  bool have_maxima;               // `best` holds the maxima of the present tile
  alignas(64) float best[kRows];  // of the scores as they are
  std::int64_t q_tiles;           // of head_dim
  std::int64_t head_dim_v;

  static HWY_INLINE std::int64_t query_floats(const Problem& p) {
    return tiles_of(p.head_dim, kTileTerms) * (kRows / kTileRows) * (kTileBytes / 4);
  }

  HWY_INLINE void carve(const Problem& p, Arena& arena) {
    const std::int64_t keys = skip_tile_keys(p.head_dim);
    q_tiles = tiles_of(p.head_dim, kTileTerms);
    head_dim_v = p.head_dim_v;
    const auto take = [&](std::int64_t outer, std::int64_t k_tiles) HWY_ATTR {
      return Tiles{reinterpret_cast<char*>(arena.floats(outer * k_tiles * (kTileBytes / 4))), k_tiles};
    };
    key = take(keys / kTileRows, q_tiles);
    value = take(tiles_of(p.head_dim_v, kTileRows), keys / kTileTerms);
    probabilities = take(2, keys / kTileTerms);
    quarters = arena.floats(2 * keys * kTileRows);
  }

  HWY_INLINE Tiles query_tiles(float* query) const { return Tiles{reinterpret_cast<char*>(query), q_tiles}; }

  HWY_INLINE void pack_query(const Problem& p, const LogitPolicies&, const RowSource& source,
                             const RowTile& tile, float* /*staging*/, float* query) const {
    Rows rows;
    rows.read(source, tile.begin, tile.rows);
    pack_columns_to_tiles(rows, tile.lanes / kTileRows, p.head_dim, query_tiles(query));
  }
  HWY_INLINE void pack_keys(const Problem& p, const RowSource& source, std::int64_t begin,
                            std::int64_t keys) const {
    Rows rows;
    rows.read(source, begin, keys);
    pack_rows_to_tiles(rows, 2 * tiles_of(keys, kTileTerms), p.head_dim, key);
  }
  HWY_INLINE void pack_values(const Problem& p, const RowSource& source, std::int64_t begin,
                              std::int64_t keys) {
    Rows rows;
    rows.read(source, begin, keys);
    pack_transposed_to_tiles(rows, p.head_dim_v, tiles_of(keys, kTileTerms), value);
  }

  static constexpr std::int64_t kKeyUnit = kTileTerms;

  HWY_INLINE void scores(const Problem&, const LogitPolicies& logit, const ForwardRowTile& t,
                         std::int64_t first, std::int64_t keys, const PartialTile* masked, float* scores) {
    const Tiles query = query_tiles(t.query), key = this->key.from(first / kTileRows, 0);
    const std::int64_t v_tiles = t.tile.lanes / kTileRows, padded = round_up(keys, kTileTerms);
    const bool scaled =
        logit.any() || !(logit.pre_scale > 0);  // the maximum of -2 s is not -2 times that of s
    score_scale = scaled ? 1.0f : logit.pre_scale;
    have_maxima = masked == nullptr && !scaled && keys == padded;
    if (have_maxima) {
      product_with_maxima(key, query, v_tiles, padded / kTileRows, scores);
      return;
    }
    tile_product<false>(key, padded / kTileRows, query, v_tiles, 0, q_tiles, scores, kRows);
    if (scaled && !logit.any()) scale_scores(t.tile, logit.pre_scale, keys, scores);
  }

  HWY_INLINE void scale_scores(const RowTile& tile, float pre_scale, std::int64_t keys, float* scores) const {
    const Float factor = hn::Set(kFloat, pre_scale);
    for (std::int64_t j = 0; j < keys; ++j)
      for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
        float* s = scores + j * kRows + r;
        hn::Store(hn::Mul(hn::Load(kFloat, s), factor), kFloat, s);
      }
  }

  HWY_INLINE void logits(const LogitPolicies& logit, const RowTile& tile, const float* delta,
                         std::int64_t offset, std::int64_t key_begin, std::int64_t keys, bool masked,
                         float* scores) {
    have_maxima =
        !masked && logit.pair_gate && logit.softcap_log2 == 0 && !logit.alibi && keys % kTileTerms == 0;
    if (have_maxima) {
      gate_with_maxima(logit, tile, delta, keys, scores);
      return;
    }
    scale_scores(tile, logit.pre_scale, keys, scores);
    apply_logit(logit, tile, delta, offset, key_begin, keys, scores, nullptr);
  }

  // scores = pre_scale * (scores + g(alpha_i * delta_j)) and their maxima, in one pass instead of three.
  HWY_INLINE void gate_with_maxima(const LogitPolicies& logit, const RowTile& tile, const float* delta,
                                   std::int64_t keys, float* scores) {
    const Float factor = hn::Set(kFloat, logit.pre_scale);
    const GateKeys gate_keys(delta, keys);
    for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
      Maxima maxima;
      const auto store = [&](std::int64_t j, const auto& add) HWY_ATTR {
        float* s = scores + j * kRows + r;
        const Float x = hn::Mul(add(hn::Load(kFloat, s)), factor);
        hn::Store(x, kFloat, s);
        maxima.add(x);
      };
      TileGate(logit, tile, r, gate_keys).for_keys(gate_keys, 0, keys, store);
      hn::Store(maxima.result(), kFloat, best + r);
    }
  }

  // The maxima of a block of C, NaN where a score is NaN, are taken while the tile unit computes the next one.
  HWY_INLINE void product_with_maxima(const Tiles& key, const Tiles& query, std::int64_t v_tiles,
                                      std::int64_t n_tiles, float* scores) {
    const std::int64_t step = q_tiles * kTileBytes;
    for (std::int64_t v = 0; v < v_tiles; v += 2) {
      const bool two = v + 1 < v_tiles;
      Maxima first, second;
      for (std::int64_t n = 0; n <= n_tiles; n += 2) {
        float* c = scores + n * kTileRows * kRows + v * kTileRows;
        if (n < n_tiles && two)
          tile_block<2, 2, false>(key.at(n, 0), step, query.at(v, 0), step, q_tiles, c, kRows);
        else if (n < n_tiles)
          tile_block<2, 1, false>(key.at(n, 0), step, query.at(v, 0), step, q_tiles, c, kRows);
        if (n == 0) continue;
        const float* s = c - 2 * kTileRows * kRows;
        for (std::int64_t j = 0; j < 2 * kTileRows; j += 2, s += 2 * kRows) {
          first.add(hn::Load(kFloat, s), hn::Load(kFloat, s + kRows));
          if (two) second.add(hn::Load(kFloat, s + kTileRows), hn::Load(kFloat, s + kTileRows + kRows));
        }
      }
      hn::Store(first.result(), kFloat, best + v * kTileRows);
      if (two) hn::Store(second.result(), kFloat, best + (v + 1) * kTileRows);
    }
  }

  struct Maxima {
    Float even = hn::Set(kFloat, kNegativeInfinity), odd = even;
    __mmask16 poisoned = 0;

    HWY_INLINE void add(Float x, Float y) {
      poisoned = static_cast<__mmask16>(poisoned | _mm512_cmp_ps_mask(x.raw, y.raw, _CMP_UNORD_Q));
      even = hn::Max(even, x);
      odd = hn::Max(odd, y);
    }
    HWY_INLINE void add(Float x) { add(x, x); }
    HWY_INLINE Float result() const {
      return Float{_mm512_mask_mov_ps(hn::Max(even, odd).raw, poisoned, hn::NaN(kFloat).raw)};
    }
  };

  HWY_INLINE void maxima(const ForwardRowTile& t, std::int64_t keys, bool propagate_nan, float* scores,
                         float* maxima) {
    // Keys beyond the last one up to a whole tile: their terms must be 0.
    for (std::int64_t j = keys; j < round_up(keys, kTileTerms); ++j)
      for (std::int64_t r = 0; r < t.tile.lanes; r += kLanes)
        hn::Store(hn::Set(kFloat, kNegativeInfinity), kFloat, scores + j * kRows + r);
    if (!have_maxima) row_maxima(scores, keys, t.tile.lanes, best, propagate_nan);
    const Float factor = hn::Set(kFloat, score_scale);
    for (std::int64_t r = 0; r < t.tile.lanes; r += kLanes)
      hn::Store(hn::Mul(hn::Load(kFloat, best + r), factor), kFloat, maxima + r);
  }

  HWY_INLINE void accumulate(const Problem&, ForwardRowTile& t, std::int64_t first, std::int64_t keys,
                             const PartialTile* /*masked*/, const float* maxima, float* scores,
                             float* factors) {
    const std::int64_t k_first = first / kTileTerms;
    const std::int64_t v_tiles = t.tile.lanes / kTileRows, k_tiles = tiles_of(keys, kTileTerms);
    for (std::int64_t v = 0; v < v_tiles; ++v)
      update_maximum(t, v, hn::Load(kFloat, maxima + v * kTileRows), factors);
    const std::int64_t d_tiles = tiles_of(head_dim_v, kTileRows);
    for (std::int64_t v = 0; v <= v_tiles; ++v) {
      Exponentials e(score_scale);
      if (v < v_tiles) start_exponentials(e, t, v, k_tiles, scores + v * kTileRows, kRows);
      if (v > 0) multiply_values(t, v - 1, d_tiles, k_first, k_tiles, e);
      e.compute(e.pairs);
      if (v < v_tiles) add_row_sums(t, v, e, factors);
    }
  }

  // A tile that softcap, ALiBi and the vote leave alone needs no scores of 64 rows: those of 16 rows are computed, pass
  // gate and mask, are turned into P and multiplied with V while they are in the first-level cache.
  HWY_INLINE bool fuses(const LogitPolicies& logit, std::int64_t keys, const PartialTile* masked) const {
    return logit.pre_scale > 0 && logit.softcap_log2 == 0 && !logit.alibi && q_tiles <= 4 &&
           (keys % kTileTerms == 0 || masked != nullptr);
  }

  HWY_INLINE void attend(const LogitPolicies& logit, ForwardRowTile& t, std::int64_t keys, const float* delta,
                         const PartialTile* masked, float* factors) {
    score_scale = logit.pre_scale;
    if (logit.pair_gate || masked != nullptr)
      attend_quarters<true>(logit, t, keys, delta, masked, factors);
    else
      attend_quarters<false>(logit, t, keys, delta, masked, factors);
  }

  //   tile unit      S 0 | S 1   | S 2, V P 0 | S 3, V P 1 | V P 2 | V P 3
  //   vector ports       | exp 0 | exp 1      | exp 2      | exp 3 |
  template <bool kPasses>
  HWY_INLINE void attend_quarters(const LogitPolicies& logit, ForwardRowTile& t, std::int64_t keys,
                                  const float* delta, const PartialTile* masked, float* factors) {
    const Tiles query = query_tiles(t.query);
    const std::int64_t v_tiles = t.tile.lanes / kTileRows, d_tiles = tiles_of(head_dim_v, kTileRows);
    KeyTerms terms[kRows / kTileRows];
    for (std::int64_t v = 0; v < v_tiles; ++v)
      terms[v] = masked == nullptr ? KeyTerms{0, keys / kTileTerms} : terms_seen(*masked, v);
    const GateKeys gate_keys(delta, logit.pair_gate ? keys : 0);
    for (std::int64_t v = -1; v <= v_tiles; ++v) {
      Exponentials e(score_scale);
      const bool exponentials = v >= 0 && v < v_tiles && terms[v].count > 0;
      if (exponentials) start_exponentials(e, t, v, terms[v].count, quarter(v), kTileRows);
      const std::int64_t products = v > 0 ? d_tiles * terms[v - 1].count : 0;
      if (v + 1 < v_tiles && terms[v + 1].count > 0) {
        const KeyTerms& next = terms[v + 1];
        e.spread_over(2 * next.count * q_tiles + products);
        const QuarterLogits passes(logit, t.tile, v + 1, next, gate_keys, masked);
        multiply_keys<kPasses>(t, query.at(v + 1, 0), v + 1, next, passes, quarter(v + 1), factors, e);
      }
      if (v > 0) multiply_values(t, v - 1, d_tiles, terms[v - 1].first, terms[v - 1].count, e);
      e.compute(e.pairs);
      if (exponentials) add_row_sums(t, v, e, factors);
    }
  }

  // Tiles of 32 keys.
  struct KeyTerms {
    std::int64_t first = 0, count = 0;
  };

  // Those of which one of 16 rows sees a key.
  HWY_INLINE KeyTerms terms_seen(const PartialTile& partial, std::int64_t v) const {
    const auto sees = [&](std::int64_t k) {
      std::uint64_t rows = 0;
      for (std::int64_t j = 0; j < kTileTerms; ++j) rows |= partial.rows_of_key[k * kTileTerms + j];
      return (rows >> (v * kTileRows) & 0xFFFF) != 0;
    };
    std::int64_t first = partial.begin / kTileTerms, end = tiles_of(partial.end, kTileTerms);
    while (first < end && !sees(first)) ++first;
    while (end > first && !sees(end - 1)) --end;
    return {first, end - first};
  }

  // Gate and mask of 16 rows.
  struct QuarterLogits {
    const GateKeys& gate_keys;
    TileGate gate;
    bool gated;
    const std::uint64_t* rows = nullptr;  // of each key; null: all
    std::int64_t first_key, first_row;

    HWY_INLINE QuarterLogits(const LogitPolicies& logit, const RowTile& tile, std::int64_t v,
                             const KeyTerms& keys, const GateKeys& tile_keys, const PartialTile* masked)
        : gate_keys(tile_keys),
          gate(logit, tile, v * kTileRows, tile_keys),
          gated(logit.pair_gate),
          first_key(keys.first * kTileTerms),
          first_row(v * kTileRows) {
      if (masked != nullptr) rows = masked->rows_of_key + first_key;
    }

    // scores of the keys [j, j + 16), before the scale.
    HWY_INLINE void apply(std::int64_t j, float* scores) const {
      if (gated) {
        const std::int64_t begin = first_key + j;
        float* const first = scores - begin * kTileRows;
        gate.for_keys(gate_keys, begin, begin + kTileRows, [&](std::int64_t key, const auto& add) HWY_ATTR {
          float* s = first + key * kTileRows;
          hn::Store(add(hn::Load(kFloat, s)), kFloat, s);
        });
      }
      if (rows == nullptr) return;
      const __m512 hidden = _mm512_set1_ps(kNegativeInfinity);
      for (std::int64_t i = 0; i < kTileRows; ++i) {
        float* s = scores + i * kTileRows;
        const auto seen = static_cast<__mmask16>(rows[j + i] >> first_row);
        _mm512_store_ps(s, _mm512_mask_mov_ps(hidden, seen, _mm512_load_ps(s)));
      }
    }
  };

  HWY_INLINE float* quarter(std::int64_t v) const {
    return quarters + (v & 1) * value.k_tiles * kTileTerms * kTileRows;
  }

  // The new subtrahend of 16 rows in row_max, 2^(old - new) in factors, and the rows of O^T times that where it is not 1.
  HWY_INLINE void update_maximum(ForwardRowTile& t, std::int64_t v, Float tile_max, float* factors) const {
    float* row_max = t.row_max + v * kTileRows;
    const Float old_max = hn::LoadU(kFloat, row_max);
    const auto grows = hn::Gt(tile_max, hn::Add(old_max, hn::Set(kFloat, kLazyMax)));
    const Float new_max = hn::IfThenElse(grows, tile_max, old_max);
    const Float factor = hn::IfThenElse(grows, exp2(hn::Sub(old_max, new_max)), hn::Set(kFloat, 1.0f));
    hn::Store(factor, kFloat, factors + v * kTileRows);
    if (hn::AllFalse(kFloat, grows)) return;
    hn::StoreU(new_max, kFloat, row_max);
    if (!t.started) return;
    for (std::int64_t d = 0; d < head_dim_v; ++d) {
      float* o = t.out + d * kRows + v * kTileRows;
      hn::Store(hn::Mul(hn::Load(kFloat, o), factor), kFloat, o);
    }
  }

  // The exponentials of 16 rows, in portions between tile instructions: the tile unit takes as long for a load and a
  // product as the vector ports for eight exponentials, and more than a few waiting tile instructions would fill the
  // scheduler.
  struct Exponentials {
    Float scale, base, sum0, sum1;
    const float* source = nullptr;
    std::int64_t pitch = 0;
    char* target = nullptr;
    std::int64_t pairs = 0, done = 0, per_step = 0;

    HWY_INLINE explicit Exponentials(float score_scale)
        : scale(hn::Set(kFloat, score_scale)), base(hn::Zero(kFloat)), sum0(base), sum1(base) {}

    HWY_INLINE void spread_over(std::int64_t steps) { per_step = (pairs - done + steps - 1) / steps; }
    HWY_INLINE void compute(std::int64_t end) {
      for (; done < end; ++done) {
        const float* pair = source + done * 2 * pitch;
        const Float p0 = exp2_short(hn::MulSub(hn::Load(kFloat, pair), scale, base));
        const Float p1 = exp2_short(hn::MulSub(hn::Load(kFloat, pair + pitch), scale, base));
        sum0 = hn::Add(sum0, p0);
        sum1 = hn::Add(sum1, p1);
        _mm512_store_si512(target + done * 64, pair_up(p0, p1));
      }
    }
    HWY_INLINE void step() { compute(min_of(pairs, done + per_step)); }
  };

  HWY_INLINE void start_exponentials(Exponentials& e, const ForwardRowTile& t, std::int64_t v,
                                     std::int64_t k_tiles, const float* scores, std::int64_t pitch) const {
    e.pairs = k_tiles * (kTileTerms / 2);
    e.source = scores;
    e.pitch = pitch;
    e.target = probabilities.at(v & 1, 0);
    const Float base = hn::LoadU(kFloat, t.row_max + v * kTileRows);
    // A row without a key so far has -inf; subtracting 0 instead keeps its terms 0 and not NaN.
    e.base = hn::IfThenElse(hn::Eq(base, hn::Set(kFloat, kNegativeInfinity)), hn::Zero(kFloat), base);
  }

  HWY_INLINE void add_row_sums(ForwardRowTile& t, std::int64_t v, const Exponentials& e,
                               const float* factors) const {
    float* row_sum = t.row_sum + v * kTileRows;
    const Float factor = hn::Load(kFloat, factors + v * kTileRows);
    hn::StoreU(hn::MulAdd(hn::LoadU(kFloat, row_sum), factor, hn::Add(e.sum0, e.sum1)), kFloat, row_sum);
  }

  // Scores of 16 rows. Q^T stays in registers 4 to 7; passes and maxima of 16 keys are taken one step behind.
  template <bool kPasses>
  HWY_INLINE void multiply_keys(ForwardRowTile& t, const char* query, std::int64_t v, const KeyTerms& terms,
                                const QuarterLogits& passes, float* scores, float* factors,
                                Exponentials& e) const {
    load_resident(query, q_tiles);
    Float m0 = hn::Set(kFloat, kNegativeInfinity), m1 = m0;
    constexpr std::int64_t kSize = kTileRows * kTileRows;
    const auto maxima_of = [&](std::int64_t n) HWY_ATTR {
      float* s = scores + n * kSize;
      if constexpr (kPasses) passes.apply(n * kTileRows, s);
#pragma GCC unroll 16
      for (int j = 0; j < kTileRows; j += 2) {
        m0 = hn::Max(m0, hn::Load(kFloat, s + j * kTileRows));
        m1 = hn::Max(m1, hn::Load(kFloat, s + (j + 1) * kTileRows));
      }
    };
    const Tiles key = this->key.from(2 * terms.first, 0);
    const std::int64_t n_tiles = 2 * terms.count;
    for (std::int64_t n = 0; n < n_tiles; n += 2) {
      tile_zero<0>();
      multiply_row<0>(key.at(n, 0), q_tiles, e);
      tile_store<0>(scores + n * kSize, kTileRows * 4);
      if (n > 0) maxima_of(n - 1);
      tile_zero<1>();
      multiply_row<1>(key.at(n + 1, 0), q_tiles, e);
      tile_store<1>(scores + (n + 1) * kSize, kTileRows * 4);
      maxima_of(n);
    }
    maxima_of(n_tiles - 1);
    const Float tile_max = hn::Mul(hn::Max(m0, m1), hn::Set(kFloat, score_scale));
    update_maximum(t, v, tile_max, factors);
  }

  // O^T += V^T P for 16 rows; P stays in registers 4 to 7.
  HWY_INLINE void multiply_values(ForwardRowTile& t, std::int64_t v, std::int64_t d_tiles,
                                  std::int64_t k_first, std::int64_t k_tiles, Exponentials& e) const {
    constexpr std::int64_t kRowBytes = kRows * 4;
    if (k_tiles == 0) {
      if (t.started) return;
      for (std::int64_t d = 0; d < d_tiles * kTileRows; ++d)
        hn::Store(hn::Zero(kFloat), kFloat, t.out + d * kRows + v * kTileRows);
      return;
    }
    load_resident(probabilities.at(v & 1, 0), k_tiles);
    e.spread_over(d_tiles * k_tiles);
    float* c = t.out + v * kTileRows;
    for (std::int64_t d = 0; d < d_tiles; d += 2) {
      if (t.started)
        tile_load<0>(c, kRowBytes);
      else
        tile_zero<0>();
      multiply_row<0>(value.at(d, k_first), k_tiles, e);
      tile_store<0>(c, kRowBytes);
      c += kTileRows * kRows;
      if (d + 1 == d_tiles) break;
      if (t.started)
        tile_load<1>(c, kRowBytes);
      else
        tile_zero<1>();
      multiply_row<1>(value.at(d + 1, k_first), k_tiles, e);
      tile_store<1>(c, kRowBytes);
      c += kTileRows * kRows;
    }
  }

  // Register kC += up to four tiles of A times registers 4 to 7.
  template <int kC>
  HWY_INLINE void multiply_row(const char* a, std::int64_t k_tiles, Exponentials& e) const {
    tile_load<2>(a, 64);
    tile_multiply<kC, 2, 4>();
    e.step();
    if (k_tiles > 1) {
      tile_load<3>(a + kTileBytes, 64);
      tile_multiply<kC, 3, 5>();
      e.step();
    }
    if (k_tiles > 2) {
      tile_load<2>(a + 2 * kTileBytes, 64);
      tile_multiply<kC, 2, 6>();
      e.step();
    }
    if (k_tiles > 3) {
      tile_load<3>(a + 3 * kTileBytes, 64);
      tile_multiply<kC, 3, 7>();
      e.step();
    }
  }
};

}  // namespace fsa::cpu::FSA_SIMD_TARGET
