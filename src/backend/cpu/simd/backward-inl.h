// SPDX-License-Identifier: Apache-2.0
// Backward: one item owns a range of keys of one key head and walks the row tiles of every query head of the group.
//
//   for each block of key tiles:
//     for each head of the group, each row tile that sees the block (and kept a tile of it):
//       for each such key tile:
//         S = K Q^T -> logit, mask -> P = 2^(S - lse)
//         dP = V dO^T,  dS = P (dP - out_dot_grad) [(1 - tanh^2) with softcap]
//         dV += P dO,   dK += dS Q,   dQ^T += K^T dS
//     dK, dV of the block are complete: the whole group was summed in float
//
// Five products, one pass. dQ of an item goes to the buffer of its key segment; finish_rows adds the segments in order,
// so the bits do not depend on which thread computed what. With a skip map only the kept tiles are visited.
//
// Policy Arithmetic: what the block and the row tile are packed to, and the five products. FloatBackward is below,
// TileBackward in tile_backward-inl.h.
#pragma once

#include "backend/cpu/simd/block_mask-inl.h"
#include "backend/cpu/simd/gemm-inl.h"
#include "backend/cpu/simd/kernel_table.h"
#include "backend/cpu/simd/seen_squares-inl.h"
#include "backend/cpu/simd/skip-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

template <class Arithmetic>
HWY_INLINE std::int64_t backward_block_keys(const Problem& p) {
  return Arithmetic::block_tiles(p) * skip_tile_keys(p.head_dim);
}

// Of the block and of the pair of tiles at hand.
template <class Arithmetic>
struct BackwardScratch {
  Arithmetic arithmetic;
  std::int64_t key_pitch, value_pitch, block_keys;
  float *grad_key, *grad_value, *delta, *grad_delta;  // of the block
  float *scores, *grad_scores, *tanh, *staging;

  HWY_INLINE std::size_t carve(const Problem& p, char* base) {
    Arena arena{base};
    const std::int64_t keys = skip_tile_keys(p.head_dim);
    block_keys = backward_block_keys<Arithmetic>(p);
    key_pitch = packed_pitch(p.head_dim);
    value_pitch = packed_pitch(p.head_dim_v);
    grad_key = arena.floats(block_keys * key_pitch);
    grad_value = arena.floats(block_keys * value_pitch);
    delta = arena.floats(block_keys);
    grad_delta = arena.floats(block_keys);
    scores = arena.floats(keys * kTilePitch);
    grad_scores = arena.floats(keys * kTilePitch);
    tanh = p.softcap > 0 ? arena.floats(keys * kTilePitch) : nullptr;
    staging = arena.floats(kRows * round_up(max_of(p.head_dim, p.head_dim_v), 16));
    arithmetic.carve(p, block_keys, arena);
    return arena.used;
  }
};

// Row r of grad_out as float; any strides.
HWY_INLINE void load_grad_out_row(const Problem& p, const Arguments& args, const Sequence& sequence,
                                  std::int64_t head, std::int64_t row, float* target) {
  const Operand& g = args.grad_out;
  const RowSource source = row_source(g, sequence.batch, sequence.q_begin, head);
  if (g.stride_dim == 1) {
    pack_rows(source, row, 1, p.head_dim_v, target, 0);
    return;
  }
  const std::int64_t padded = round_up(p.head_dim_v, kLanes);
  for (std::int64_t c = 0; c < padded; ++c)
    target[c] = c < p.head_dim_v ? load_scalar(source.row(row), g.dtype, c * g.stride_dim) : 0.0f;
}

HWY_INLINE std::int64_t buffer_tile(const BackwardBuffers& b, std::int64_t head, std::int64_t tile_begin,
                                    std::int64_t tile) {
  return head * b.tiles_per_head + tile_begin + tile;
}

HWY_INLINE std::int64_t part_of(const RowParts& parts, std::int64_t head_in_group, std::int64_t tile) {
  return parts.begin + head_in_group * parts.tiles + tile - parts.first_tile;
}

// Phase 1, per row tile: rowsum(out * grad_out) - grad_lse, the base-2 lse, and the sink's share of its gradient.
HWY_INLINE void row_statistics(const Problem& p, const Arguments& args, const BackwardBuffers& buffers,
                               const RowTileItem& item, void* memory) {
  const Sequence& sequence = item.sequence;
  float* out_row = static_cast<float*>(memory);
  float* grad_row = out_row + round_up(p.head_dim_v, 16);
  const std::int64_t slot = buffer_tile(buffers, item.head, item.tile_begin, item.tile);
  float* dots = buffers.out_dot_grad + slot * kRows;
  float* lse_log2 = buffers.lse_log2 + slot * kRows;
  float* lse_log2_low = buffers.lse_log2_low + slot * kRows;
  const std::int64_t begin = item.tile * kRows;
  const std::int64_t rows = min_of(kRows, sequence.seqlen_q - begin);
  const RowSource out = row_source(args.out, sequence.batch, sequence.q_begin, item.head);
  const RowSource grad_out = row_source(args.grad_out, sequence.batch, sequence.q_begin, item.head);
  double sink = 0, sink_grad = 0;
  if (p.has_sink)
    sink =
        static_cast<double>(load_scalar(args.sink.data, args.sink.dtype, item.head * args.sink.stride_head));
  for (std::int64_t r = 0; r < kRows; ++r) {
    dots[r] = 0;
    lse_log2[r] = __builtin_inff();  // 2^(S - inf) = 0: rows beyond the tile contribute nothing
    lse_log2_low[r] = 0;
    if (r >= rows) continue;
    const std::int64_t row = begin + r;
    if (r + kRowsAhead < rows) {
      fetch_row(out, row + kRowsAhead, p.head_dim_v);
      fetch_row(grad_out, row + kRowsAhead, p.head_dim_v);
    }
    const auto at = [&](const Operand& o) HWY_ATTR {
      return sequence.batch * o.stride_batch + item.head * o.stride_head +
             (sequence.q_begin + row) * o.stride_row;
    };
    const float lse = static_cast<const float*>(args.lse.data)[at(args.lse)];
    if (lse == kNegativeInfinity) continue;  // a row without a key has no gradient
    pack_rows(out, row, 1, p.head_dim_v, out_row, 0);
    load_grad_out_row(p, args, sequence, item.head, row, grad_row);
    Float sum = hn::Zero(kFloat);
    for (std::int64_t c = 0; c < p.head_dim_v; c += kLanes)
      sum = hn::MulAdd(hn::Load(kFloat, out_row + c), hn::Load(kFloat, grad_row + c), sum);
    dots[r] = hn::GetLane(hn::SumOfLanes(kFloat, sum));
    if (args.grad_lse.present()) dots[r] -= static_cast<const float*>(args.grad_lse.data)[at(args.grad_lse)];
    const double exact = static_cast<double>(lse) * kLog2E;
    lse_log2[r] = static_cast<float>(exact);
    if (__builtin_isfinite(lse))
      lse_log2_low[r] = static_cast<float>(exact - static_cast<double>(lse_log2[r]));
    if (p.has_sink)
      sink_grad -= __builtin_exp(sink - static_cast<double>(lse)) * static_cast<double>(dots[r]);
  }
  if (p.has_sink) buffers.sink_partial[slot] = sink_grad;
}

struct BackwardRowTile {
  RowTile tile;
  const float* dots;
  const float* lse_log2;
  const float* lse_log2_low;
  float* grad_query;  // [head_dim][64] of this segment
  float* grad_alpha;  // [64] of this segment, or null
  char* packed;       // Q and dO in the workspace, where an arithmetic packs them there
  bool touched;       // grad_query holds something
};

// P = 2^(S - lse) over the scores and dS over the products dP, for kVectors vectors of rows.
template <int kVectors>
HWY_INLINE void grad_scores_of_rows(const BackwardRowTile& t, Span keys, std::int64_t row, const float* tanh,
                                    float* scores, float* grad_scores) {
  Float lse[kVectors], lse_low[kVectors], dot[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    lse[v] = hn::Load(kFloat, t.lse_log2 + row + v * kLanes);
    lse_low[v] = hn::Load(kFloat, t.lse_log2_low + row + v * kLanes);
    dot[v] = hn::Load(kFloat, t.dots + row + v * kLanes);
  }
  for (std::int64_t j = keys.begin; j < keys.end; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t at = j * kTilePitch + row + v * kLanes;
      const Float p = exp2(hn::Sub(hn::Sub(hn::Load(kFloat, scores + at), lse[v]), lse_low[v]));
      Float ds = hn::Mul(p, hn::Sub(hn::Load(kFloat, grad_scores + at), dot[v]));
      if (tanh != nullptr) {
        const Float th = hn::Load(kFloat, tanh + at);
        ds = hn::Mul(ds, hn::NegMulAdd(th, th, hn::Set(kFloat, 1.0f)));
      }
      hn::Store(p, kFloat, scores + at);
      hn::Store(ds, kFloat, grad_scores + at);
    }
  }
}

// Rows whose keys one pass walks: one vector where it is a cache line, all rows where it is less. Scores and products
// together exceed the first-level cache, and half a line at a time each line came twice.
inline constexpr std::int64_t kRowsAtOnce = kLanes < 16 ? kRows : kLanes;

// The same for the lanes of the tile; 0 outside of `rows`.
HWY_INLINE void grad_scores_of(const BackwardRowTile& t, Span keys, Span rows, const float* tanh,
                               float* scores, float* grad_scores) {
  for (std::int64_t r = 0; r < t.tile.lanes;) {
    if (r < rows.begin || r >= rows.end) {
      for (std::int64_t j = keys.begin; j < keys.end; ++j) {
        hn::Store(hn::Zero(kFloat), kFloat, scores + j * kTilePitch + r);
        hn::Store(hn::Zero(kFloat), kFloat, grad_scores + j * kTilePitch + r);
      }
      r += kLanes;
    } else if (kRowsAtOnce > kLanes && r + kRowsAtOnce <= rows.end) {
      grad_scores_of_rows<kRowsAtOnce / kLanes>(t, keys, r, tanh, scores, grad_scores);
      r += kRowsAtOnce;
    } else {
      grad_scores_of_rows<1>(t, keys, r, tanh, scores, grad_scores);
      r += kLanes;
    }
  }
}

// d alpha_i += sum_j dS g'(alpha_i delta_j) delta_j,  d delta_j += sum_i dS g'(alpha_i delta_j) alpha_i.
HWY_INLINE void add_gate_grads(const LogitPolicies& logit, const BackwardRowTile& t, std::int64_t keys,
                               const float* delta, const float* grad_scores, float* grad_delta) {
  for (std::int64_t j = 0; j < keys; ++j) {
    const Float delta_j = hn::Set(kFloat, delta[j]);
    Float sum = hn::Zero(kFloat);
    for (std::int64_t r = 0; r < t.tile.lanes; r += kLanes) {
      const Float alpha = hn::LoadU(kFloat, t.tile.alpha + r);
      Float ds = hn::Load(kFloat, grad_scores + j * kTilePitch + r);
      if (logit.log_sigmoid) ds = hn::Mul(ds, sigmoid_of_minus(hn::Mul(alpha, delta_j)));
      sum = hn::MulAdd(ds, alpha, sum);
      float* a = t.grad_alpha + r;
      hn::Store(hn::MulAdd(ds, delta_j, hn::Load(kFloat, a)), kFloat, a);
    }
    grad_delta[j] += hn::GetLane(hn::SumOfLanes(kFloat, sum));
  }
}

// The keys of one block and what is accumulated for them.
struct KeyBlock {
  std::int64_t begin = 0;  // keys, in the sequence; all in use
  std::int64_t end = 0;
};

HWY_INLINE void zero(float* data, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) data[i] = 0;
}

// Products in float.
struct FloatBackward {
  std::int64_t key_pitch, value_pitch;
  float *key, *value;                              // of the block
  float *query, *query_t, *grad_out, *grad_out_t;  // of the row tile

  // Key tiles that share one packing of a row tile: as many as leave K, V, dK and dV in a 1 MB second-level cache.
  static HWY_INLINE std::int64_t block_tiles(const Problem& p) {
    const std::int64_t pitch = packed_pitch(p.head_dim) + packed_pitch(p.head_dim_v);
    const std::int64_t bytes_per_tile = 2 * pitch * skip_tile_keys(p.head_dim) * 4;
    return max_of<std::int64_t>(1, min_of<std::int64_t>(4, (1 << 20) / bytes_per_tile));
  }

  HWY_INLINE void carve(const Problem& p, std::int64_t block_keys, Arena& arena) {
    key_pitch = packed_pitch(p.head_dim);
    value_pitch = packed_pitch(p.head_dim_v);
    key = arena.floats(block_keys * key_pitch);
    value = arena.floats(block_keys * value_pitch);
    query = arena.floats(kRows * key_pitch);
    query_t = arena.floats(round_up(p.head_dim, 4) * kTilePitch);
    grad_out = arena.floats(kRows * value_pitch);
    grad_out_t = arena.floats(round_up(p.head_dim_v, 4) * kTilePitch);
  }

  HWY_INLINE void pack_block(const Problem& p, const RowSource& keys, const RowSource& values,
                             std::int64_t begin, std::int64_t count) {
    pack_rows(keys, begin, count, p.head_dim, key, key_pitch);
    pack_rows(values, begin, count, p.head_dim_v, value, value_pitch);
  }

  template <class Scratch>
  HWY_INLINE void pack_row_tile(const Problem& p, const Arguments& args, const LogitPolicies& logit,
                                const Sequence& sequence, std::int64_t head, BackwardRowTile& t,
                                const Scratch& s) {
    const RowSource rows = row_source(args.query, sequence.batch, sequence.q_begin, head);
    pack_rows(rows, t.tile.begin, t.tile.rows, p.head_dim, query, key_pitch);
    pack_transposed(rows, t.tile.begin, t.tile.rows, p.head_dim, logit.pre_scale, s.staging, query_t);
    for (std::int64_t r = 0; r < t.tile.rows; ++r) {
      float* row = grad_out + r * value_pitch;
      // A row without a key may carry any garbage in grad_out: its P is 0, and 0 times that must be 0.
      if (t.lse_log2[r] == __builtin_inff())
        zero(row, round_up(p.head_dim_v, kLanes));
      else
        load_grad_out_row(p, args, sequence, head, t.tile.begin + r, row);
    }
    RowSource packed_rows;
    packed_rows.base = reinterpret_cast<const char*>(grad_out);
    packed_rows.row_bytes = value_pitch * 4;
    pack_transposed(packed_rows, 0, t.tile.rows, p.head_dim_v, 1.0f, s.staging, grad_out_t);
  }

  static constexpr std::int64_t kKeyUnit = 1;  // a tile's keys in use begin at a multiple of it

  // One row tile and the keys [first, first + keys) of a key tile that begins at `tile_begin` in the block.
  template <class Scratch>
  HWY_INLINE void tile(const Problem& p, const LogitPolicies& logit, const Visibility& visibility,
                       const Scratch& s, BackwardRowTile& t, std::int64_t key_begin, std::int64_t tile_begin,
                       std::int64_t first, std::int64_t keys, const PartialTile* partial) {
    const std::int64_t in_block = tile_begin + first;
    const float* tile_key = key + in_block * key_pitch;
    const float* tile_value = value + in_block * value_pitch;
    const SeenSquares squares(partial, first, keys, t.tile.lanes);
    const auto products = [&](const float* rows_t, std::int64_t dims, const float* rows_of_keys,
                              std::int64_t pitch, float* target) HWY_ATTR {
      squares.by_keys([&](Span k, Span rows) HWY_ATTR {
        gemm<Init::zero>(Gemm{rows_t + rows.begin, kTilePitch, rows_of_keys + k.begin * pitch, pitch, 1, dims,
                              target + k.begin * kTilePitch + rows.begin, kTilePitch},
                         k.count(), rows.count());
      });
    };
    const auto add_to_keys = [&](const float* rows_packed, std::int64_t dims, std::int64_t pitch,
                                 const float* factors, float* target) HWY_ATTR {
      squares.by_keys([&](Span k, Span rows) HWY_ATTR {
        gemm<Init::add>(
            Gemm{rows_packed + rows.begin * pitch, pitch, factors + k.begin * kTilePitch + rows.begin,
                 kTilePitch, 1, min_of(rows.end, t.tile.rows) - rows.begin,
                 target + (in_block + k.begin) * pitch, pitch},
            k.count(), dims);
      });
    };
    products(query_t, p.head_dim, tile_key, key_pitch, s.scores);
    if (logit.any())
      apply_logit(logit, t.tile, s.delta + in_block, visibility.offset, key_begin + first, keys, s.scores,
                  s.tanh);
    if (partial != nullptr) apply_partial_tile(*partial, t.tile, first, keys, s.scores);
    products(grad_out_t, p.head_dim_v, tile_value, value_pitch, s.grad_scores);
    squares.by_keys([&](Span k, Span rows)
                        HWY_ATTR { grad_scores_of(t, k, rows, s.tanh, s.scores, s.grad_scores); });
    if (logit.pair_gate)
      add_gate_grads(logit, t, keys, s.delta + in_block, s.grad_scores, s.grad_delta + in_block);
    add_to_keys(grad_out, p.head_dim_v, value_pitch, s.scores, s.grad_value);
    add_to_keys(query, p.head_dim, key_pitch, s.grad_scores, s.grad_key);
    squares.by_rows([&](Span rows, Span k) HWY_ATTR {
      const Gemm grad_query{s.grad_scores + k.begin * kTilePitch + rows.begin,
                            kTilePitch,
                            tile_key + k.begin * key_pitch,
                            1,
                            key_pitch,
                            k.count(),
                            t.grad_query + rows.begin,
                            kRows};
      if (t.touched)
        gemm<Init::add>(grad_query, p.head_dim, rows.count());
      else
        gemm<Init::zero>(grad_query, p.head_dim, rows.count());
    });
  }

  template <class Scratch>
  HWY_INLINE void finish_block(const Problem&, const Scratch&) {}
};

// One row tile against the tiles of a block that it sees and kept.
template <class Arithmetic>
HWY_INLINE void backward_row_tile(const Problem& p, const Arguments& args, const BackwardBuffers& buffers,
                                  const BackwardItem& item, const LogitPolicies& logit,
                                  const Visibility& visibility, const KeyBlock& block, std::int64_t head,
                                  std::int64_t m, BackwardScratch<Arithmetic>& s) {
  const Sequence& sequence = item.sequence;
  const std::int64_t tile_keys = skip_tile_keys(p.head_dim);
  const std::int64_t row_begin = m * kRows, row_end = min_of(sequence.seqlen_q, row_begin + kRows);
  const std::int32_t* map = nullptr;
  if (args.skip_map.present)
    map = args.skip_map.data + sequence.batch * args.skip_map.stride_batch +
          head * args.skip_map.stride_head + (sequence.row_tile_begin + m) * args.skip_map.stride_tile;
  BackwardRowTile t;
  PartialTile partial;
  bool packed = false;
  const std::int64_t slot = buffer_tile(buffers, head, item.tile_begin, m);
  const std::int64_t part = part_of(item.rows, head - item.kv_head * p.group_size, m);
  for (std::int64_t key_begin = block.begin; key_begin < block.end; key_begin += tile_keys) {
    const std::int64_t n = key_begin / tile_keys;
    if (map != nullptr && (static_cast<std::uint32_t>(map[n >> 5]) >> (n & 31) & 1u) == 0) continue;
    const std::int64_t keys = min_of(tile_keys, block.end - key_begin);
    const TileVisibility seen = classify_tile(visibility, row_begin, row_end, key_begin, key_begin + keys);
    if (seen == TileVisibility::none) continue;
    std::int32_t code = kFullBlock;
    if (buffers.blocks != nullptr) {
      code = block_code(*buffers.blocks, sequence.batch, head, row_begin, key_begin);
      if (code == kHiddenBlock ||
          (code >= 0 && !read_partial_tile(*buffers.blocks, code, visibility, row_begin, row_end - row_begin,
                                           key_begin, keys, seen == TileVisibility::partial, partial)))
        continue;
    }
    if (!packed) {
      t.tile = make_row_tile(p, args, sequence, head, m);
      t.dots = buffers.out_dot_grad + slot * kRows;
      t.lse_log2 = buffers.lse_log2 + slot * kRows;
      t.lse_log2_low = buffers.lse_log2_low + slot * kRows;
      t.grad_query = buffers.grad_query + part * grad_query_floats(p);
      t.grad_alpha = p.has_gate ? buffers.grad_alpha + part * kRows : nullptr;
      t.packed = buffers.packed_rows + slot * buffers.packed_row_bytes;
      t.touched = buffers.touched[part] != 0;
      if (p.has_gate && !t.touched) zero(t.grad_alpha, kRows);
      s.arithmetic.pack_row_tile(p, args, logit, sequence, head, t, s);
      packed = true;
    }
    std::int64_t first = 0, used = keys;  // of the tile's keys, those that some row sees
    const bool masked = code >= 0 || seen == TileVisibility::partial;
    if (masked) {
      if (code < 0) read_bands(visibility, t.tile, key_begin, keys, partial);
      first = partial.begin / Arithmetic::kKeyUnit * Arithmetic::kKeyUnit;
      used = partial.end - first;
    }
    s.arithmetic.tile(p, logit, visibility, s, t, key_begin, key_begin - block.begin, first, used,
                      masked ? &partial : nullptr);
    t.touched = true;
  }
  if (packed) buffers.touched[part] = 1;
}

// Rows [begin, begin + count) of a gradient; `adds`: to what they hold.
HWY_INLINE void store_gradients(const RowSource& target, std::int64_t begin, std::int64_t count,
                                const float* grads, std::int64_t pitch, std::int64_t dim, float factor,
                                bool adds) {
  with_element_type(target.dtype, [&](auto* type) HWY_ATTR {
    using T = std::remove_pointer_t<decltype(type)>;
    for (std::int64_t r = 0; r < count; ++r) {
      T* row = reinterpret_cast<T*>(const_cast<char*>(target.row(begin + r)));
      if (adds)
        narrow_row_onto(grads + r * pitch, dim, factor, row);
      else
        narrow_row(grads + r * pitch, dim, factor, row);
    }
  });
}

template <class Arithmetic>
HWY_INLINE void store_key_grads(const Problem& p, const Arguments& args, const BackwardItem& item,
                                const KeyBlock& block, const BackwardScratch<Arithmetic>& s) {
  const Sequence& sequence = item.sequence;
  const auto store = [&](const Operand& operand, const float* grads, std::int64_t pitch, std::int64_t dim,
                         float factor) HWY_ATTR {
    const RowSource target = row_source(operand, sequence.batch, sequence.k_begin, item.kv_head);
    store_gradients(target, block.begin, block.end - block.begin, grads, pitch, dim, factor,
                    p.adds_grad_key_value);
  };
  const float scale = static_cast<float>(p.softmax_scale);
  store(args.grad_key, s.grad_key, s.key_pitch, p.head_dim, scale);
  store(args.grad_value, s.grad_value, s.value_pitch, p.head_dim_v, 1.0f);
  if (!args.grad_delta.present()) return;
  const RowSource target = row_source(args.grad_delta, sequence.batch, sequence.k_begin, item.kv_head);
  for (std::int64_t j = block.begin; j < block.end; ++j)
    store_scalar(s.grad_delta[j - block.begin] * scale, const_cast<char*>(target.row(j)),
                 args.grad_delta.dtype, 0);
}

template <class Arithmetic>
HWY_INLINE void backward(const Problem& p, const Arguments& args, const BackwardBuffers& buffers,
                         const BackwardItem& item, void* memory) {
  const Sequence& sequence = item.sequence;
  const LogitPolicies logit = logit_policies(p);
  const Visibility visibility = visibility_of(p, args, sequence, item.kv_head);
  BackwardScratch<Arithmetic> s;
  s.carve(p, static_cast<char*>(memory));
  for (std::int64_t begin = item.key_begin; begin < item.key_end; begin += s.block_keys) {
    const KeyBlock block{begin, min_of(item.key_end, begin + s.block_keys)};
    const std::int64_t keys = block.end - block.begin;
    zero(s.grad_key, keys * s.key_pitch);
    zero(s.grad_value, keys * s.value_pitch);
    zero(s.grad_delta, round_up(keys, 32));
    const std::int64_t used =
        min_of(block.end, sequence.seqlen_k);  // keys beyond it get zeros and are never read
    if (block.begin < used) {
      const KeyBlock in_use{block.begin, used};
      s.arithmetic.pack_block(p, row_source(args.key, sequence.batch, sequence.k_begin, item.kv_head),
                              row_source(args.value, sequence.batch, sequence.k_begin, item.kv_head), begin,
                              used - begin);
      if (p.has_gate) {
        pack_scalars(row_source(args.delta, sequence.batch, sequence.k_begin, item.kv_head), begin,
                     used - begin, s.delta);
        for (std::int64_t j = used - begin; j < round_up(used - begin, 32); ++j) s.delta[j] = 0;
      }
      const TileRanges row_tiles = visible_row_tiles(visibility, sequence.seqlen_q, begin, used, kRows);
      for (std::int64_t g = 0; g < p.group_size; ++g)
        for (int range = 0; range < row_tiles.count; ++range)
          for (std::int64_t m = row_tiles.range[range].begin; m < row_tiles.range[range].end; ++m)
            backward_row_tile(p, args, buffers, item, logit, visibility, in_use,
                              item.kv_head * p.group_size + g, m, s);
      s.arithmetic.finish_block(p, s);
    }
    store_key_grads(p, args, item, block, s);
  }
}

// Last phase, per row tile: dq and d alpha, the segments added in order.
HWY_INLINE void finish_rows(const Problem& p, const Arguments& args, const BackwardBuffers& buffers,
                            const RowTileItem& item, void* memory) {
  const Sequence& sequence = item.sequence;
  const std::int64_t begin = item.tile * kRows;
  const std::int64_t rows = min_of(kRows, sequence.seqlen_q - begin);
  const std::int64_t pitch = round_up(p.head_dim, 4);
  float* sum = static_cast<float*>(memory);
  float* staging = sum + pitch * kRows;
  float grad_alpha[kRows];
  zero(grad_alpha, kRows);
  const float* parts[kMostSegments];  // read side by side: one at a time they come at half the rate
  std::int64_t count = 0;
  const std::int64_t kv_head = item.head / p.group_size;
  const RowParts* of_segment =
      buffers.row_parts + (sequence.batch * p.num_kv_heads + kv_head) * buffers.segments;
  for (std::int64_t segment = 0; segment < buffers.segments; ++segment) {
    const RowParts& seen = of_segment[segment];
    if (item.tile < seen.first_tile || item.tile >= seen.first_tile + seen.tiles) continue;
    const std::int64_t part = part_of(seen, item.head - kv_head * p.group_size, item.tile);
    if (buffers.touched[part] == 0) continue;
    parts[count++] = buffers.grad_query + part * grad_query_floats(p);
    if (p.has_gate)
      for (std::int64_t r = 0; r < rows; ++r) grad_alpha[r] += buffers.grad_alpha[part * kRows + r];
  }
  for (std::int64_t c = 0; c < p.head_dim; ++c)
    for (std::int64_t r = 0; r < round_up(rows, kLanes); r += kLanes) {
      const std::int64_t i = c * kRows + r;
      Float total = hn::Zero(kFloat);
      for (std::int64_t n = 0; n < count; ++n) total = hn::Add(total, hn::Load(kFloat, parts[n] + i));
      hn::Store(total, kFloat, sum + i);
    }
  transpose(sum, kRows, pitch, round_up(rows, 4), staging, pitch);
  const float scale = static_cast<float>(p.softmax_scale);
  store_gradients(row_source(args.grad_query, sequence.batch, sequence.q_begin, item.head), begin, rows,
                  staging, pitch, p.head_dim, scale, p.adds_grad_query);
  if (!args.grad_alpha.present()) return;
  const RowSource alpha = row_source(args.grad_alpha, sequence.batch, sequence.q_begin, item.head);
  for (std::int64_t r = 0; r < rows; ++r)
    store_scalar(grad_alpha[r] * scale, const_cast<char*>(alpha.row(begin + r)), args.grad_alpha.dtype, 0);
}

template <class Arithmetic>
HWY_INLINE std::size_t backward_scratch(const Problem& p) {
  BackwardScratch<Arithmetic> scratch;
  const std::size_t items = scratch.carve(p, nullptr);
  const std::size_t rows = static_cast<std::size_t>(
      max_of(2 * round_up(p.head_dim_v, 16), 2 * round_up(p.head_dim, 4) * kRows) * 4);
  return max_of(items, rows);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
