// SPDX-License-Identifier: Apache-2.0
// Forward: one item is up to eight row tiles of one key head that walk their key tiles together, right to left.
//
//   for each key tile n, from the right-most that any row tile sees:
//     for each row tile that sees n (bands, block mask):
//       gate test        closed: neither K nor V is touched
//       S = K Q^T        K widened to float and packed once per item
//       logit, mask
//       vote             all rows below their cut: V is not touched
//       softmax          m, l per row; P = 2^(S - m) in place
//       O = O * 2^(m_old - m) + V^T P
//
// Everything of a row tile is kept transposed, one lane per row: Q^T, S, P, O^T. Every row tile computes the same bits
// whichever item and thread it falls to.
//
// Policy Arithmetic: what K, V and P are packed to, and the two products. FloatForward is below, TileForward in
// tile_forward-inl.h. Policy Observer: what else is made of P, nothing or the selection of select_forward-inl.h.
#pragma once

#include "backend/cpu/simd/block_mask-inl.h"
#include "backend/cpu/simd/gemm-inl.h"
#include "backend/cpu/simd/kernel_table.h"
#include "backend/cpu/simd/seen_squares-inl.h"
#include "backend/cpu/simd/skip-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

struct ForwardRowTile {
  RowTile tile;
  std::int64_t head;
  TileCursor cursor;
  GateTest gate;
  bool started;  // O^T holds something
  float* query;  // Q^T as the arithmetic packs it
  float* out;    // [head_dim_v][64]
  std::int32_t* map;
  float row_max[kRows];
  float row_sum[kRows];
  float cut[kRows];
  float log2_thr[kRows];
};

template <class Arithmetic>
struct ForwardScratch {
  Arithmetic arithmetic;
  float *scores, *maxima, *factors, *delta, *staging;
  float* query[kMaxUnitsPerItem];
  float* out[kMaxUnitsPerItem];

  HWY_INLINE std::size_t carve(const Problem& p, char* base) {
    Arena arena{base};
    const std::int64_t keys = skip_tile_keys(p.head_dim);
    scores = arena.floats(keys * kTilePitch);
    maxima = arena.floats(kRows);
    factors = arena.floats(kRows);
    delta = arena.floats(keys);
    staging = arena.floats(kRows * round_up(max_of(p.head_dim, p.head_dim_v), 16));
    for (std::int64_t u = 0; u < kMaxUnitsPerItem; ++u) {
      query[u] = arena.floats(Arithmetic::query_floats(p));
      out[u] = arena.floats(round_up(p.head_dim_v, 16) * kRows);
    }
    arithmetic.carve(p, arena);
    return arena.used;
  }
};

// Online softmax of one kept tile: P replaces the scores, factors holds 2^(m_old - m_new).
HWY_INLINE void softmax_update(ForwardRowTile& t, std::int64_t keys, const float* maxima, float* scores,
                               float* factors) {
  for (std::int64_t r = 0; r < t.tile.lanes; r += kLanes) {
    const Float old_max = hn::LoadU(kFloat, t.row_max + r);
    const Float new_max = hn::Max(old_max, hn::Load(kFloat, maxima + r));
    // A row without a key so far has -inf; subtracting 0 instead keeps its terms 0 and not NaN.
    const Float empty = hn::Set(kFloat, kNegativeInfinity);
    const Float base = hn::IfThenElse(hn::Eq(new_max, empty), hn::Zero(kFloat), new_max);
    const Float factor = exp2(hn::Sub(old_max, base));
    Float sum0 = hn::Zero(kFloat), sum1 = hn::Zero(kFloat);
    std::int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      float* s = scores + j * kTilePitch + r;
      const Float p0 = exp2(hn::Sub(hn::Load(kFloat, s), base));
      const Float p1 = exp2(hn::Sub(hn::Load(kFloat, s + kTilePitch), base));
      hn::Store(p0, kFloat, s);
      hn::Store(p1, kFloat, s + kTilePitch);
      sum0 = hn::Add(sum0, p0);
      sum1 = hn::Add(sum1, p1);
    }
    if (j < keys) {
      float* s = scores + j * kTilePitch + r;
      const Float p0 = exp2(hn::Sub(hn::Load(kFloat, s), base));
      hn::Store(p0, kFloat, s);
      sum0 = hn::Add(sum0, p0);
    }
    const Float sum = hn::MulAdd(hn::LoadU(kFloat, t.row_sum + r), factor, hn::Add(sum0, sum1));
    hn::StoreU(new_max, kFloat, t.row_max + r);
    hn::StoreU(sum, kFloat, t.row_sum + r);
    hn::Store(factor, kFloat, factors + r);
  }
}

// Products in float: K and V widened, one row per key.
struct FloatForward {
  float *key, *value;
  std::int64_t key_pitch, value_pitch;

  static HWY_INLINE std::int64_t query_floats(const Problem& p) {
    return round_up(p.head_dim, 4) * kTilePitch;
  }

  HWY_INLINE void carve(const Problem& p, Arena& arena) {
    const std::int64_t keys = skip_tile_keys(p.head_dim);
    key_pitch = packed_pitch(p.head_dim);
    value_pitch = packed_pitch(p.head_dim_v);
    key = arena.floats(keys * key_pitch);
    value = arena.floats(keys * value_pitch);
  }

  HWY_INLINE void pack_query(const Problem& p, const LogitPolicies& logit, const RowSource& source,
                             const RowTile& tile, float* staging, float* query) const {
    pack_transposed(source, tile.begin, tile.rows, p.head_dim, logit.pre_scale, staging, query);
  }
  HWY_INLINE void pack_keys(const Problem& p, const RowSource& source, std::int64_t begin,
                            std::int64_t keys) const {
    pack_rows(source, begin, keys, p.head_dim, key, key_pitch);
  }
  HWY_INLINE void pack_values(const Problem& p, const RowSource& source, std::int64_t begin,
                              std::int64_t keys) const {
    pack_rows(source, begin, keys, p.head_dim_v, value, value_pitch);
  }

  static constexpr std::int64_t kKeyUnit = 1;  // a tile's keys in use begin at a multiple of it

  // scores = pre_scale * K Q^T for the keys [first, first + keys) of the tile, which the mask, if any, will hide in part;
  // what it hides may be left out.
  HWY_INLINE void scores(const Problem& p, const LogitPolicies&, const ForwardRowTile& t, std::int64_t first,
                         std::int64_t keys, const PartialTile* masked, float* scores) {
    const SeenSquares squares(masked, first, keys, t.tile.lanes);
    squares.by_keys([&](Span k, Span rows) HWY_ATTR {
      gemm<Init::zero>(Gemm{t.query + rows.begin, kTilePitch, key + (first + k.begin) * key_pitch, key_pitch,
                            1, p.head_dim, scores + k.begin * kTilePitch + rows.begin, kTilePitch},
                       k.count(), rows.count());
    });
  }
  // `masked`: some of them will be hidden.
  HWY_INLINE void logits(const LogitPolicies& logit, const RowTile& tile, const float* delta,
                         std::int64_t offset, std::int64_t key_begin, std::int64_t keys, bool /*masked*/,
                         float* scores) const {
    apply_logit(logit, tile, delta, offset, key_begin, keys, scores, nullptr);
  }
  // Whether attend() takes a tile whose scores nobody asks for.
  HWY_INLINE bool fuses(const LogitPolicies&, std::int64_t, const PartialTile*) const { return false; }
  HWY_INLINE void attend(const LogitPolicies&, ForwardRowTile&, std::int64_t, const float*,
                         const PartialTile*, float*) {}
  HWY_INLINE void maxima(const ForwardRowTile& t, std::int64_t keys, bool propagate_nan, float* scores,
                         float* maxima) {
    row_maxima(scores, keys, t.tile.lanes, maxima, propagate_nan);
  }
  // Softmax of a kept tile, and its share of O^T.
  HWY_INLINE void accumulate(const Problem& p, ForwardRowTile& t, std::int64_t first, std::int64_t keys,
                             const PartialTile* masked, const float* maxima, float* scores, float* factors) {
    softmax_update(t, keys, maxima, scores, factors);
    const SeenSquares squares(masked, first, keys, t.tile.lanes);
    squares.by_rows([&](Span rows, Span k) HWY_ATTR {
      const Gemm product{scores + k.begin * kTilePitch + rows.begin,
                         kTilePitch,
                         value + (first + k.begin) * value_pitch,
                         1,
                         value_pitch,
                         k.count(),
                         t.out + rows.begin,
                         kRows};
      if (t.started)
        gemm<Init::scale>(product, p.head_dim_v, rows.count(), factors + rows.begin);
      else
        gemm<Init::zero>(product, p.head_dim_v, rows.count());
    });
  }
};

HWY_INLINE void update_cut(ForwardRowTile& t) {
  for (std::int64_t r = 0; r < t.tile.rows; ++r)
    t.cut[r] = t.row_sum[r] > 0 ? t.row_max[r] + __builtin_log2f(t.row_sum[r]) + t.log2_thr[r] : kLowestCut;
}

template <class Arithmetic>
HWY_INLINE void start_row_tile(const Problem& p, const Arguments& args, const Sequence& sequence,
                               const Visibility& visibility, const LogitPolicies& logit,
                               const Arithmetic& arithmetic, std::int64_t head, std::int64_t tile_index,
                               float* staging, ForwardRowTile& t) {
  t.head = head;
  t.tile = make_row_tile(p, args, sequence, head, tile_index);
  t.started = false;
  arithmetic.pack_query(p, logit, row_source(args.query, sequence.batch, sequence.q_begin, head), t.tile,
                        staging, t.query);
  t.gate = make_gate_test(p, sequence, t.tile.begin, t.tile.alpha, t.tile.rows);
  for (std::int64_t r = 0; r < kRows; ++r) {
    t.row_max[r] = kNegativeInfinity;
    t.row_sum[r] = 0;
    t.cut[r] = kLowestCut;
    t.log2_thr[r] = p.threshold > 0 && r < t.tile.rows ? log2_threshold(p, sequence, t.tile.begin + r) : 0.0f;
  }
  t.map = nullptr;
  if (args.skip_map.present)
    t.map = args.skip_map.data + sequence.batch * args.skip_map.stride_batch +
            head * args.skip_map.stride_head +
            (sequence.row_tile_begin + tile_index) * args.skip_map.stride_tile;
  t.cursor.ranges =
      visible_key_tiles(visibility, t.tile.begin, t.tile.begin + t.tile.rows, skip_tile_keys(p.head_dim));
  t.cursor.start();
}

// out = O / l and lse = (m + log2 l) ln 2, the sink joined; a row without a key gets 0 and -inf.
HWY_INLINE void finish_row_tile(const Problem& p, const Arguments& args, const Sequence& sequence,
                                ForwardRowTile& t, float* staging, float* factors) {
  float sink_log2 = kNegativeInfinity;
  if (p.has_sink)
    sink_log2 = static_cast<float>(
        static_cast<double>(load_scalar(args.sink.data, args.sink.dtype, t.head * args.sink.stride_head)) *
        kLog2E);
  const std::int64_t batch = sequence.batch;  // packed tensors have stride_batch 0
  for (std::int64_t r = 0; r < kRows; ++r) {
    const double max = t.row_max[r], sum = t.row_sum[r];
    double lse_log2 = sum > 0 || sum != sum ? max + __builtin_log2(sum) : -__builtin_inf();
    double total = sum;
    if (p.has_sink && r < t.tile.rows) {
      if (sum == 0) {
        lse_log2 = static_cast<double>(sink_log2);
      } else {
        total = sum + __builtin_exp2(static_cast<double>(sink_log2) - max);
        // A sink far above the logits overflows the sum; the weights are 0 then, and lse is the sink.
        lse_log2 = __builtin_isinf(total) ? static_cast<double>(sink_log2) : max + __builtin_log2(total);
      }
    }
    factors[r] = sum == 0 ? 0.0f : static_cast<float>(1.0 / total);
    if (args.lse.present() && r < t.tile.rows)
      static_cast<float*>(args.lse.data)[batch * args.lse.stride_batch + t.head * args.lse.stride_head +
                                         (sequence.q_begin + t.tile.begin + r) * args.lse.stride_row] =
          static_cast<float>(lse_log2 * kLn2);
  }
  const std::int64_t pitch = round_up(p.head_dim_v, 4);
  if (t.started) {
    for (std::int64_t column = 0; column < p.head_dim_v; ++column)
      for (std::int64_t r = 0; r < t.tile.lanes; r += kLanes) {
        float* o = t.out + column * kRows + r;
        hn::Store(hn::Mul(hn::Load(kFloat, o), hn::Load(kFloat, factors + r)), kFloat, o);
      }
    transpose(t.out, kRows, pitch, round_up(t.tile.rows, 4), staging, pitch);
  } else {
    for (std::int64_t i = 0; i < t.tile.rows * pitch; ++i) staging[i] = 0;
  }
  const RowSource target = row_source(args.out, batch, sequence.q_begin, t.head);
  with_element_type(args.out.dtype, [&](auto* type) HWY_ATTR {
    using T = std::remove_pointer_t<decltype(type)>;
    for (std::int64_t r = 0; r < t.tile.rows; ++r)
      narrow_row(staging + r * pitch, p.head_dim_v, 1.0f,
                 reinterpret_cast<T*>(const_cast<char*>(target.row(t.tile.begin + r))));
  });
}

// The tiles of one key position that an item has loaded so far.
struct LoadedTile {
  bool key = false;
  bool value = false;
  bool delta = false;
  Extremes delta_extremes;
};

struct NoObserver {
  static constexpr bool kReadsScores = false;
  HWY_INLINE void tile(std::int64_t, const ForwardRowTile&, std::int64_t, std::int64_t, std::int64_t,
                       const float*, const float*) {}
  HWY_INLINE void finish(const ForwardItem&, const ForwardRowTile*, std::int64_t) {}
};

template <class Arithmetic, class Observer>
HWY_INLINE void forward(const Problem& p, const Arguments& args, const ForwardItem& item, void* memory,
                        Observer& observer) {
  const Sequence& sequence = item.sequence;
  const LogitPolicies logit = logit_policies(p);
  const Visibility visibility = visibility_of(p, args, sequence, item.kv_head);
  const std::int64_t tile_keys = skip_tile_keys(p.head_dim);
  const std::int64_t row_tiles = ceil_div(sequence.seqlen_q, kRows);
  const RowSource key_rows = key_source(p, args, args.key, sequence, item.kv_head);
  const RowSource value_rows = key_source(p, args, args.value, sequence, item.kv_head);
  RowSource delta_rows;
  if (p.has_gate) delta_rows = key_source(p, args, args.delta, sequence, item.kv_head);

  ForwardScratch<Arithmetic> scratch;
  scratch.carve(p, static_cast<char*>(memory));
  Arithmetic& arithmetic = scratch.arithmetic;
  ForwardRowTile tiles[kMaxUnitsPerItem];
  PartialTile partial;
  const std::int64_t count = item.unit_end - item.unit_begin;
  for (std::int64_t u = 0; u < count; ++u) {
    const std::int64_t unit = item.unit_begin + u;
    tiles[u].query = scratch.query[u];
    tiles[u].out = scratch.out[u];
    start_row_tile(p, args, sequence, visibility, logit, arithmetic,
                   item.kv_head * p.group_size + unit % p.group_size, row_tiles - 1 - unit / p.group_size,
                   scratch.staging, tiles[u]);
  }

  for (;;) {
    std::int64_t n = -1;
    for (std::int64_t u = 0; u < count; ++u) n = max_of(n, tiles[u].cursor.tile);
    if (n < 0) break;
    const std::int64_t key_begin = n * tile_keys;
    const std::int64_t keys = min_of(tile_keys, sequence.seqlen_k - key_begin);
    LoadedTile loaded;
    for (std::int64_t u = 0; u < count; ++u) {
      ForwardRowTile& t = tiles[u];
      if (t.cursor.tile != n) continue;
      t.cursor.advance();
      const TileVisibility seen =
          classify_tile(visibility, t.tile.begin, t.tile.begin + t.tile.rows, key_begin, key_begin + keys);
      if (seen == TileVisibility::none) continue;
      std::int32_t block = kFullBlock;
      if (item.blocks != nullptr) {
        block = block_code(*item.blocks, sequence.batch, t.head, t.tile.begin, key_begin);
        if (block == kHiddenBlock ||
            (block >= 0 && !read_partial_tile(*item.blocks, block, visibility, t.tile.begin, t.tile.rows,
                                              key_begin, keys, seen == TileVisibility::partial, partial)))
          continue;
      }
      if (p.has_gate && !loaded.delta) {
        pack_scalars(delta_rows, key_begin, keys, scratch.delta);
        loaded.delta_extremes = extremes_of(scratch.delta, keys);
        loaded.delta = true;
      }
      if (t.gate.on && !t.gate.open(loaded.delta_extremes)) continue;
      if (!loaded.key) {
        arithmetic.pack_keys(p, key_rows, key_begin, keys);
        loaded.key = true;
      }
      const PartialTile* masked = nullptr;
      std::int64_t first = 0, used = keys;  // of the tile's keys, those that some row sees
      if (block >= 0 || seen == TileVisibility::partial) {
        if (block < 0) read_bands(visibility, t.tile, key_begin, keys, partial);
        masked = &partial;
        first = partial.begin / Arithmetic::kKeyUnit * Arithmetic::kKeyUnit;
        used = partial.end - first;
      }
      const bool fused =
          !Observer::kReadsScores && !(p.threshold > 0) && arithmetic.fuses(logit, keys, masked);
      if (!fused) {
        arithmetic.scores(p, logit, t, first, used, masked, scratch.scores);
        if (logit.any())
          arithmetic.logits(logit, t.tile, scratch.delta + first, visibility.offset, key_begin + first, used,
                            masked != nullptr, scratch.scores);
        if (masked != nullptr) apply_partial_tile(partial, t.tile, first, used, scratch.scores);
        arithmetic.maxima(t, used, p.threshold > 0, scratch.scores, scratch.maxima);
        if (p.threshold > 0 && !vote(scratch.maxima, t.cut, t.tile.rows)) continue;
      }
      if (t.map != nullptr)
        t.map[n >> 5] = static_cast<std::int32_t>(static_cast<std::uint32_t>(t.map[n >> 5]) | 1u << (n & 31));
      if (!loaded.value) {
        arithmetic.pack_values(p, value_rows, key_begin, keys);
        loaded.value = true;
      }
      if (fused)
        arithmetic.attend(logit, t, keys, scratch.delta, masked, scratch.factors);
      else
        arithmetic.accumulate(p, t, first, used, masked, scratch.maxima, scratch.scores, scratch.factors);
      observer.tile(u, t, n, first, used, scratch.scores, scratch.factors);
      t.started = true;
      if (p.threshold > 0) update_cut(t);
    }
  }
  observer.finish(item, tiles, count);
  for (std::int64_t u = 0; u < count; ++u)
    finish_row_tile(p, args, sequence, tiles[u], scratch.staging, scratch.factors);
}

template <class Arithmetic>
HWY_INLINE void forward(const Problem& p, const Arguments& args, const ForwardItem& item, void* memory) {
  NoObserver observer;
  forward<Arithmetic>(p, args, item, memory, observer);
}

template <class Arithmetic>
HWY_INLINE std::size_t forward_scratch(const Problem& problem) {
  ForwardScratch<Arithmetic> scratch;
  return scratch.carve(problem, nullptr);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
