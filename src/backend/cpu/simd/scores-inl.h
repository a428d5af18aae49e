// SPDX-License-Identifier: Apache-2.0
// The score tile and the policies that act on it: Logit (pair gate, softcap, ALiBi) and Mask.
//
// A score tile is stored key by key, one lane per row: scores[key][row]. Row statistics are then vectors and need no
// horizontal sums, and both products that follow read the tile as it is.
//
// Units: the product with the packed query leaves pre_scale * (q . k). Without softcap pre_scale is
// softmax_scale * log2 e and the scores are base-2 logits at once; with softcap it is softmax_scale / softcap, the
// argument of tanh.
#pragma once

#include "backend/cpu/simd/kv_source-inl.h"
#include "backend/cpu/simd/math-inl.h"
#include "core/problem.h"
#include "core/skip_tile.h"
#include "core/visibility.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

// What the scores of one row tile need beyond q and k.
struct RowTile {
  std::int64_t begin = 0;  // first row, in the sequence
  std::int64_t rows = 0;   // 1 to 64
  std::int64_t lanes = 0;  // rows in whole vectors
  float slope = 0;         // ALiBi, times log2 e
  float alpha[kRows];      // pair gate, query side; 0 beyond rows
};

struct LogitPolicies {
  float pre_scale = 1;
  float softcap_log2 = 0;  // softcap * log2 e; 0 = off
  bool pair_gate = false;
  bool log_sigmoid = true;
  bool alibi = false;

  HWY_INLINE bool any() const { return pair_gate || softcap_log2 != 0 || alibi; }
};

HWY_INLINE LogitPolicies logit_policies(const Problem& problem) {
  LogitPolicies p;
  p.pre_scale = static_cast<float>(problem.softcap > 0 ? problem.softmax_scale / problem.softcap
                                                       : problem.softmax_scale * kLog2E);
  p.softcap_log2 = static_cast<float>(problem.softcap * kLog2E);
  p.pair_gate = problem.has_gate;
  p.log_sigmoid = problem.log_sigmoid_gate;
  p.alibi = problem.has_alibi;
  return p;
}

// scores += pre_scale * g(alpha_i * delta_j)
HWY_INLINE void add_pair_gate(const LogitPolicies& p, const RowTile& tile, const float* delta,
                              std::int64_t keys, float* scores) {
  const Float pre_scale = hn::Set(kFloat, p.pre_scale);
  for (std::int64_t j = 0; j < keys; ++j) {
    const Float delta_j = hn::Set(kFloat, delta[j]);
    for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
      const Float product = hn::Mul(hn::LoadU(kFloat, tile.alpha + r), delta_j);
      const Float gate = p.log_sigmoid ? log_sigmoid(product) : product;
      float* s = scores + j * kTilePitch + r;
      hn::Store(hn::MulAdd(gate, pre_scale, hn::Load(kFloat, s)), kFloat, s);
    }
  }
}

// scores = tanh(scores) * softcap * log2 e; the tanh is kept for the backward when `tanh_out` is given.
HWY_INLINE void apply_softcap(const LogitPolicies& p, const RowTile& tile, std::int64_t keys, float* scores,
                              float* tanh_out) {
  const Float cap = hn::Set(kFloat, p.softcap_log2);
  for (std::int64_t j = 0; j < keys; ++j) {
    for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
      float* s = scores + j * kTilePitch + r;
      const Float t = tanh(hn::Load(kFloat, s));
      if (tanh_out != nullptr) hn::Store(t, kFloat, tanh_out + j * kTilePitch + r);
      hn::Store(hn::Mul(t, cap), kFloat, s);
    }
  }
}

// scores -= slope * |i + offset - j|. The distance of row 0 is an exact integer; lanes add at most 63.
HWY_INLINE void add_alibi(const RowTile& tile, std::int64_t offset, std::int64_t key_begin, std::int64_t keys,
                          float* scores) {
  const Float slope = hn::Set(kFloat, -tile.slope);
  for (std::int64_t j = 0; j < keys; ++j) {
    const Float first = hn::Set(kFloat, static_cast<float>(tile.begin + offset - key_begin - j));
    for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
      float* s = scores + j * kTilePitch + r;
      const Float distance = hn::Abs(hn::Add(first, hn::Iota(kFloat, static_cast<float>(r))));
      hn::Store(hn::MulAdd(distance, slope, hn::Load(kFloat, s)), kFloat, s);
    }
  }
}

HWY_INLINE void apply_logit(const LogitPolicies& p, const RowTile& tile, const float* delta,
                            std::int64_t offset, std::int64_t key_begin, std::int64_t keys, float* scores,
                            float* tanh_out) {
  if (p.pair_gate) add_pair_gate(p, tile, delta, keys, scores);
  if (p.softcap_log2 != 0) apply_softcap(p, tile, keys, scores, tanh_out);
  if (p.alibi) add_alibi(tile, offset, key_begin, keys, scores);
}

inline constexpr std::int64_t kMostTileKeys = 128;

// A tile of which not every row sees every key: bit r of word j, row r sees key j. Outside of the keys [begin, end) no
// row sees one.
struct PartialTile {
  std::uint64_t rows_of_key[kMostTileKeys];
  std::int64_t begin, end;

  // Sets begin and end from the words of `keys` keys; one key remains at least. No row sees what follows them up to
  // whole tiles of 32.
  HWY_INLINE void trim(std::int64_t keys) {
    for (std::int64_t j = keys; j < round_up(keys, 32); ++j) rows_of_key[j] = 0;
    begin = 0;
    end = keys;
    while (end > 1 && rows_of_key[end - 1] == 0) --end;
    while (begin < end - 1 && rows_of_key[begin] == 0) ++begin;
  }
};

// Rows of [row_begin, row_begin + rows), counted from row_begin, that see a key through the bands and the sink.
HWY_INLINE std::uint64_t rows_seeing(const Visibility& v, std::int64_t row_begin, std::int64_t rows,
                                     std::int64_t key) {
  const std::int64_t diagonal = position_of_key(v, key) - v.offset - row_begin;
  std::uint64_t bits = 0;
  const auto add = [&](std::int64_t low, std::int64_t high) {
    low = max_of<std::int64_t>(diagonal + low, 0);
    high = min_of<std::int64_t>(diagonal + high, rows - 1);
    if (low <= high) bits |= (~std::uint64_t{0} >> (63 - (high - low))) << low;
  };
  add(v.bands[0].low, v.bands[0].high);
  if (v.bands[1].low <= v.bands[1].high) add(v.bands[1].low, v.bands[1].high);
  if (key < v.sink) add(0, kFarAway);
  return bits;
}

HWY_INLINE void read_bands(const Visibility& v, const RowTile& tile, std::int64_t key_begin,
                           std::int64_t keys, PartialTile& partial) {
  for (std::int64_t j = 0; j < keys; ++j)
    partial.rows_of_key[j] = rows_seeing(v, tile.begin, tile.rows, key_begin + j);
  partial.trim(keys);
}

// scores = -inf where the row does not see the key, for the keys [first, first + keys) of the tile.
HWY_INLINE void apply_partial_tile(const PartialTile& partial, const RowTile& tile, std::int64_t first,
                                   std::int64_t keys, float* scores) {
  const Float hidden = hn::Set(kFloat, kNegativeInfinity);
  const std::uint64_t all = ~std::uint64_t{0} >> (64 - tile.rows);
  for (std::int64_t j = 0; j < keys; ++j) {
    const std::uint64_t rows = partial.rows_of_key[first + j];
    if (rows == all) continue;
    for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
      const std::uint64_t bits = rows >> r;  // LoadMaskBits may read eight bytes
      const auto seen = hn::LoadMaskBits(kFloat, reinterpret_cast<const std::uint8_t*>(&bits));
      float* s = scores + j * kTilePitch + r;
      hn::Store(hn::IfThenElse(seen, hn::Load(kFloat, s), hidden), kFloat, s);
    }
  }
}

HWY_INLINE Visibility visibility_of(const Problem& problem, const Arguments& args, const Sequence& sequence,
                                    std::int64_t kv_head) {
  std::int64_t sizes[4] = {};
  if (problem.has_window_sizes)
    for (int c = 0; c < 4; ++c)
      sizes[c] = args.window_sizes
                     .data[kv_head * args.window_sizes.stride_row + c * args.window_sizes.stride_column];
  return make_visibility(problem, sequence, sizes);
}

HWY_INLINE RowTile make_row_tile(const Problem& problem, const Arguments& args, const Sequence& sequence,
                                 std::int64_t head, std::int64_t tile_index) {
  RowTile tile;
  tile.begin = tile_index * kRows;
  tile.rows = min_of(kRows, sequence.seqlen_q - tile.begin);
  tile.lanes = round_up(tile.rows, kLanes);
  if (problem.has_alibi)
    tile.slope =
        static_cast<float>(static_cast<double>(load_scalar(args.alibi_slopes.data, args.alibi_slopes.dtype,
                                                           sequence.batch * args.alibi_slopes.stride_batch +
                                                               head * args.alibi_slopes.stride_head)) *
                           kLog2E);
  if (problem.has_gate) {
    for (float& a : tile.alpha) a = 0;
    pack_scalars(row_source(args.alpha, sequence.batch, sequence.q_begin, head), tile.begin, tile.rows,
                 tile.alpha);
  }
  return tile;
}

// Walks key tiles from the right-most one leftwards.
struct TileCursor {
  TileRanges ranges;
  int index = -1;
  std::int64_t tile = -1;  // -1: no more

  HWY_INLINE void start() {
    index = ranges.count - 1;
    tile = index >= 0 ? ranges.range[index].end - 1 : -1;
  }
  HWY_INLINE void advance() {
    if (--tile >= ranges.range[index].begin) return;
    --index;
    tile = index >= 0 ? ranges.range[index].end - 1 : -1;
  }
};

// Carves aligned arrays out of a thread's scratch memory; with base null it only counts.
struct Arena {
  char* base;
  std::size_t used = 0;

  HWY_INLINE float* floats(std::int64_t count) {
    float* result = base == nullptr ? nullptr : reinterpret_cast<float*>(base + used);
    used += static_cast<std::size_t>(round_up(count * 4, 64));
    return result;
  }
};

// rows [begin, begin + count) of `source`, at most 64, times `factor`, transposed: target[dim][row], zero beyond the
// rows up to whole vectors. `staging` holds 64 rows at pitch round_up(dim, kLanes).
HWY_INLINE void pack_transposed(const RowSource& source, std::int64_t begin, std::int64_t count,
                                std::int64_t dim, float factor, float* staging, float* target,
                                std::int64_t target_pitch = kTilePitch) {
  // Rows that are float and at one distance need no staging.
  if (kTransposesWide && source.dtype == DType::float32 && source.pages == nullptr &&
      source.gather == nullptr && count % 16 == 0 && dim % 4 == 0)
    return transpose_wide(reinterpret_cast<const float*>(source.row(begin)), source.row_bytes / 4, count, dim,
                          factor, target, target_pitch);
  const std::int64_t pitch = round_up(dim, kLanes);
  pack_rows(source, begin, count, dim, staging, pitch);
  if (factor != 1.0f) {
    const Float scale = hn::Set(kFloat, factor);
    for (std::int64_t i = 0; i < count * pitch; i += kLanes)
      hn::Store(hn::Mul(hn::Load(kFloat, staging + i), scale), kFloat, staging + i);
  }
  const std::int64_t lanes = round_up(count, kLanes);
  for (std::int64_t i = count * pitch; i < lanes * pitch; i += kLanes)
    hn::Store(hn::Zero(kFloat), kFloat, staging + i);
  transpose(staging, pitch, lanes, round_up(dim, 4), target, target_pitch);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
