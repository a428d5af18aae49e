// SPDX-License-Identifier: Apache-2.0
// Decode: one query row per head against a long cache. Memory-bound: K and V are read once, in order.
//
// The rows of a (sequence, key head) are the heads of its group. Three phases, each a set of independent items:
//   plan     (sequence, key head)          only with a gate test or a threshold: which tiles are candidates, and the
//                                          cut of each row from the probe tiles
//   decode   (sequence, key head, split)   scores, vote, softmax, P V over the key tiles of one fixed key range
//   combine  (sequence, key head)          the splits, in order
// Scores are stored scores[row][key], one lane per key: the transpose of forward's, because rows are few.
#pragma once

#include "backend/cpu/simd/gemm-inl.h"
#include "backend/cpu/simd/kernel_table.h"
#include "backend/cpu/simd/skip-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

struct DecodeScratch {
  std::int64_t query_pitch, value_pitch, tile_keys;
  float* query;   // [group][query_pitch], times pre_scale
  float* scores;  // [group][tile_keys]
  float* out;     // [group][value_pitch]
  float *key, *value, *delta, *distance, *alpha, *slope, *row_max, *row_sum;

  HWY_INLINE std::size_t carve(const Problem& p, char* base) {
    Arena arena{base};
    tile_keys = skip_tile_keys(p.head_dim);
    query_pitch = packed_pitch(p.head_dim);
    value_pitch = packed_pitch(p.head_dim_v);
    query = arena.floats(p.group_size * query_pitch);
    scores = arena.floats(p.group_size * tile_keys);
    out = arena.floats(p.group_size * value_pitch);
    key = arena.floats(tile_keys * query_pitch);
    value = arena.floats(tile_keys * value_pitch);
    delta = arena.floats(tile_keys);
    distance = arena.floats(tile_keys);
    alpha = arena.floats(p.group_size);
    slope = arena.floats(p.group_size);
    row_max = arena.floats(p.group_size);
    row_sum = arena.floats(p.group_size);
    return arena.used;
  }
};

struct DecodeContext {
  const Problem& p;
  const Arguments& args;
  const Sequence& sequence;
  std::int64_t kv_head;
  LogitPolicies logit;
  Visibility visibility;
  RowSource key, value, delta;
  std::int64_t positions;  // keys, or gathered indices
  std::int64_t tiles;
  DecodeScratch s;
};

HWY_INLINE DecodeContext decode_context(const Problem& p, const Arguments& args, const DecodeItem& item,
                                        void* memory) {
  DecodeContext c{p,
                  args,
                  item.sequence,
                  item.kv_head,
                  logit_policies(p),
                  visibility_of(p, args, item.sequence, item.kv_head),
                  key_source(p, args, args.key, item.sequence, item.kv_head),
                  key_source(p, args, args.value, item.sequence, item.kv_head),
                  {},
                  p.gathered ? p.gather_size : item.sequence.seqlen_k,
                  0,
                  {}};
  if (p.has_gate) c.delta = key_source(p, args, args.delta, item.sequence, item.kv_head);
  c.s.carve(p, static_cast<char*>(memory));
  c.tiles = ceil_div(c.positions, c.s.tile_keys);
  const Float scale = hn::Set(kFloat, c.logit.pre_scale);
  for (std::int64_t g = 0; g < p.group_size; ++g) {
    const std::int64_t head = item.kv_head * p.group_size + g;
    float* row = c.s.query + g * c.s.query_pitch;
    pack_rows(row_source(args.query, item.sequence.batch, 0, head), 0, 1, p.head_dim, row, 0);
    for (std::int64_t i = 0; i < p.head_dim; i += kLanes)
      hn::Store(hn::Mul(hn::Load(kFloat, row + i), scale), kFloat, row + i);
    const RowTile tile = make_row_tile(p, args, item.sequence, head, 0);
    c.s.slope[g] = tile.slope;
    c.s.alpha[g] = p.has_gate ? tile.alpha[0] : 0.0f;
  }
  return c;
}

// Gathered position of ordinal j: its key, or -1.
HWY_INLINE std::int64_t position_of(const DecodeContext& c, std::int64_t j) {
  if (c.key.gather == nullptr) return j;
  return c.key.gather[j * c.key.gather_stride];
}

HWY_INLINE bool sees(const DecodeContext& c, std::int64_t j) {
  const std::int64_t key = position_of(c, j);
  return key >= 0 && (c.visibility.unlimited || is_visible(c.visibility, 0, key));
}

HWY_INLINE TileVisibility classify(const DecodeContext& c, std::int64_t begin, std::int64_t keys) {
  if (!c.p.gathered) return classify_tile(c.visibility, 0, 1, begin, begin + keys);
  std::int64_t seen = 0;
  for (std::int64_t j = 0; j < keys; ++j) seen += sees(c, begin + j) ? 1 : 0;
  return seen == 0 ? TileVisibility::none : seen == keys ? TileVisibility::full : TileVisibility::partial;
}

// Products of `rows` query rows with one key row.
template <int kCount, class T>
HWY_INLINE void dot_rows(const float* query, std::int64_t query_pitch, const T* key, std::int64_t dim,
                         std::int64_t score_pitch, float* scores) {
  Float sums[kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) sums[r] = hn::Zero(kFloat);
  for (std::int64_t i = 0; i < dim; i += kLanes) {
    const Float k = widen(key + i);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r)
      sums[r] = hn::MulAdd(k, hn::Load(kFloat, query + r * query_pitch + i), sums[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) scores[r * score_pitch] = hn::GetLane(hn::SumOfLanes(kFloat, sums[r]));
}

// Rows of one head lie far apart in memory, a walk that no hardware prefetcher follows. While the scores of a key are
// computed, the key kAhead rows on and the value of this key are fetched.
inline constexpr std::int64_t kAhead = 8;

HWY_INLINE void prefetch_row(const char* row, std::int64_t bytes) {
  for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
}

template <class T>
HWY_INLINE void dot_tile(const DecodeContext& c, const char* const* rows, const char* const* ahead,
                         const char* const* values, std::int64_t keys, std::int64_t dim) {
  const DecodeScratch& s = c.s;
  const std::int64_t key_bytes = c.p.head_dim * bytes_of(c.key.dtype);
  const std::int64_t value_bytes = c.p.head_dim_v * bytes_of(c.value.dtype);
  for (std::int64_t j = 0; j < keys; ++j) {
    const T* key = reinterpret_cast<const T*>(rows[j]);
    prefetch_row(ahead[j], key_bytes);
    prefetch_row(values[j], value_bytes);
    std::int64_t g = 0;
    for (; g + 4 <= c.p.group_size; g += 4)
      dot_rows<4>(s.query + g * s.query_pitch, s.query_pitch, key, dim, s.tile_keys,
                  s.scores + g * s.tile_keys + j);
    for (; g < c.p.group_size; ++g)
      dot_rows<1>(s.query + g * s.query_pitch, s.query_pitch, key, dim, s.tile_keys,
                  s.scores + g * s.tile_keys + j);
  }
}

// Addresses of `count` rows from position `begin`; a gathered position of -1 reads key 0 and is masked afterwards.
HWY_INLINE void position_pointers(const DecodeContext& c, RowSource source, std::int64_t begin,
                                  std::int64_t count, const char** rows) {
  if (!c.p.gathered) return row_pointers(source, begin, count, rows);
  source.gather = nullptr;
  for (std::int64_t j = 0; j < count; ++j)
    rows[j] = source.row(max_of<std::int64_t>(position_of(c, begin + j), 0));
}

HWY_INLINE void decode_products(const DecodeContext& c, std::int64_t begin, std::int64_t keys) {
  const char* rows[kPointerChunk + kAhead];
  const char* values[kPointerChunk];
  const std::int64_t known = min_of(keys + kAhead, c.positions - begin);
  position_pointers(c, c.key, begin, known, rows);
  position_pointers(c, c.value, begin, keys, values);
  for (std::int64_t j = known; j < keys + kAhead; ++j) rows[j] = rows[known - 1];
  const char* const* ahead = rows + kAhead;
  if (c.p.head_dim % kLanes == 0) {
    with_element_type(c.key.dtype, [&](auto* type) HWY_ATTR {
      dot_tile<std::remove_pointer_t<decltype(type)>>(c, rows, ahead, values, keys, c.p.head_dim);
    });
    return;
  }
  // A row that is not a whole number of vectors is widened and padded first: nothing may be read beyond it.
  const char* padded_rows[kPointerChunk];
  with_element_type(c.key.dtype, [&](auto* type) HWY_ATTR {
    using T = std::remove_pointer_t<decltype(type)>;
    for (std::int64_t j = 0; j < keys; ++j) {
      float* padded = c.s.key + j * c.s.query_pitch;
      widen_row(reinterpret_cast<const T*>(rows[j]), c.p.head_dim, padded);
      padded_rows[j] = reinterpret_cast<const char*>(padded);
    }
  });
  dot_tile<float>(c, padded_rows, ahead, values, keys, round_up(c.p.head_dim, kLanes));
}

// Base-2 logits of a tile for every row of the group; -inf where the key is not seen and beyond `keys`.
HWY_INLINE void decode_scores(const DecodeContext& c, std::int64_t begin, std::int64_t keys,
                              TileVisibility seen) {
  const DecodeScratch& s = c.s;
  decode_products(c, begin, keys);
  const std::int64_t padded = round_up(keys, kLanes);
  for (std::int64_t g = 0; g < c.p.group_size; ++g)
    for (std::int64_t j = keys; j < padded; ++j) s.scores[g * s.tile_keys + j] = kNegativeInfinity;
  if (c.logit.any()) {
    for (std::int64_t j = 0; j < padded; ++j) {
      const std::int64_t key = j < keys ? max_of<std::int64_t>(position_of(c, begin + j), 0) : 0;
      s.distance[j] = static_cast<float>(c.sequence.seqlen_k - 1 - key);
      RowSource delta = c.delta;
      delta.gather = nullptr;
      s.delta[j] = c.logit.pair_gate && j < keys ? load_scalar(delta.row(key), delta.dtype, 0) : 0.0f;
    }
    for (std::int64_t g = 0; g < c.p.group_size; ++g) {
      const Float alpha = hn::Set(kFloat, s.alpha[g]), slope = hn::Set(kFloat, -s.slope[g]);
      for (std::int64_t j = 0; j < padded; j += kLanes) {
        float* address = s.scores + g * s.tile_keys + j;
        Float x = hn::Load(kFloat, address);
        if (c.logit.pair_gate) {
          const Float product = hn::Mul(alpha, hn::Load(kFloat, s.delta + j));
          const Float gate = c.logit.log_sigmoid ? log_sigmoid(product) : product;
          x = hn::MulAdd(gate, hn::Set(kFloat, c.logit.pre_scale), x);
        }
        if (c.logit.softcap_log2 != 0) x = hn::Mul(tanh(x), hn::Set(kFloat, c.logit.softcap_log2));
        if (c.logit.alibi) x = hn::MulAdd(hn::Load(kFloat, s.distance + j), slope, x);
        hn::Store(x, kFloat, address);
      }
    }
    for (std::int64_t g = 0; g < c.p.group_size; ++g)  // a softcap makes the padding finite
      for (std::int64_t j = keys; j < padded; ++j) s.scores[g * s.tile_keys + j] = kNegativeInfinity;
  }
  if (seen == TileVisibility::full) return;
  for (std::int64_t j = 0; j < keys; ++j) {
    if (sees(c, begin + j)) continue;
    for (std::int64_t g = 0; g < c.p.group_size; ++g) s.scores[g * s.tile_keys + j] = kNegativeInfinity;
  }
}

// Largest score of a row, NaN if one is.
HWY_INLINE float decode_row_max(const float* scores, std::int64_t keys) {
  Float m = hn::Set(kFloat, kNegativeInfinity);
  auto poisoned = hn::Lt(hn::Zero(kFloat), hn::Zero(kFloat));
  for (std::int64_t j = 0; j < keys; j += kLanes) {
    const Float x = hn::Load(kFloat, scores + j);
    m = hn::Max(m, x);
    poisoned = hn::Or(poisoned, hn::IsNaN(x));
  }
  if (!hn::AllFalse(kFloat, poisoned)) return __builtin_nanf("");
  return hn::GetLane(hn::MaxOfLanes(kFloat, m));
}

// scores = 2^(scores - base); returns their sum.
HWY_INLINE float decode_exponentials(float* scores, std::int64_t keys, float base) {
  const Float shift = hn::Set(kFloat, base);
  Float sum = hn::Zero(kFloat);
  for (std::int64_t j = 0; j < keys; j += kLanes) {
    const Float p = exp2(hn::Sub(hn::Load(kFloat, scores + j), shift));
    hn::Store(p, kFloat, scores + j);
    sum = hn::Add(sum, p);
  }
  return hn::GetLane(hn::SumOfLanes(kFloat, sum));
}

HWY_INLINE bool test_bit(const std::uint32_t* words, std::int64_t n) {
  return (words[n >> 5] >> (n & 31) & 1u) != 0;
}

HWY_INLINE std::uint32_t* open_words(const DecodeContext& c, const DecodeBuffers& b) {
  return b.open + (c.sequence.batch * c.p.num_kv_heads + c.kv_head) * b.words;
}

// Marks the candidates: tiles in which the query sees a key and which the gate leaves open.
HWY_INLINE void find_candidates(const DecodeContext& c, std::uint32_t* open, std::int64_t words) {
  for (std::int64_t w = 0; w < words; ++w) open[w] = 0;
  GateTest gate = make_gate_test(c.p, c.sequence, 0, c.s.alpha, c.p.group_size);
  for (std::int64_t n = c.tiles - 1; n >= 0; --n) {
    const std::int64_t begin = n * c.s.tile_keys, keys = min_of(c.s.tile_keys, c.positions - begin);
    if (classify(c, begin, keys) == TileVisibility::none) continue;
    if (gate.on) {
      std::int64_t count = 0;
      if (c.p.gathered) {
        RowSource delta = c.delta;
        delta.gather = nullptr;
        for (std::int64_t j = 0; j < keys; ++j)
          if (position_of(c, begin + j) >= 0)
            c.s.delta[count++] = load_scalar(delta.row(position_of(c, begin + j)), delta.dtype, 0);
      } else {
        pack_scalars(c.delta, begin, keys, c.s.delta);
        count = keys;
      }
      if (!gate.open(extremes_of(c.s.delta, count))) continue;
    }
    open[n >> 5] |= 1u << (n & 31);
  }
}

inline constexpr std::int64_t kProbesAtEnd = 4;  // the last four candidates, besides the first

// Marks of the probe tiles among the candidates: the first and the last four.
struct Probes {
  std::int64_t first = -1;
  std::int64_t from = 0;  // candidates n >= from are probes

  HWY_INLINE bool contains(std::int64_t n) const { return n == first || n >= from; }
};

HWY_INLINE Probes find_probes(const std::uint32_t* open, std::int64_t tiles) {
  Probes probes;
  std::int64_t n = 0;
  while (n < tiles && !test_bit(open, n)) ++n;
  if (n == tiles) return probes;
  probes.first = n;
  std::int64_t count = 0;
  for (n = tiles - 1; n >= 0 && count < kProbesAtEnd; --n)
    if (test_bit(open, n)) {
      probes.from = n;
      ++count;
    }
  return probes;
}

// cut[row] = log2-sum of the probe tiles + log2 thr.
HWY_INLINE void probe(const DecodeContext& c, const std::uint32_t* open, float* cut) {
  const DecodeScratch& s = c.s;
  const Probes probes = find_probes(open, c.tiles);
  for (std::int64_t g = 0; g < c.p.group_size; ++g) {
    s.row_max[g] = kNegativeInfinity;
    s.row_sum[g] = 0;
  }
  for (std::int64_t n = 0; n < c.tiles; ++n) {
    if (!test_bit(open, n) || !probes.contains(n)) continue;
    const std::int64_t begin = n * s.tile_keys, keys = min_of(s.tile_keys, c.positions - begin);
    decode_scores(c, begin, keys, classify(c, begin, keys));
    for (std::int64_t g = 0; g < c.p.group_size; ++g) {
      float* scores = s.scores + g * s.tile_keys;
      const float tile_max = decode_row_max(scores, keys);
      if (tile_max == kNegativeInfinity) continue;
      const float max = tile_max > s.row_max[g] || tile_max != tile_max ? tile_max : s.row_max[g];
      s.row_sum[g] =
          s.row_sum[g] * __builtin_exp2f(s.row_max[g] - max) + decode_exponentials(scores, keys, max);
      s.row_max[g] = max;
    }
  }
  const float log2_thr = log2_threshold(c.p, c.sequence, 0);
  for (std::int64_t g = 0; g < c.p.group_size; ++g)
    cut[g] = s.row_sum[g] == 0 ? kLowestCut : s.row_max[g] + __builtin_log2f(s.row_sum[g]) + log2_thr;
}

HWY_INLINE void decode_plan(const Problem& p, const Arguments& args, const DecodeBuffers& buffers,
                            const DecodeItem& item, void* memory) {
  const DecodeContext c = decode_context(p, args, item, memory);
  std::uint32_t* open = open_words(c, buffers);
  find_candidates(c, open, buffers.words);
  if (p.threshold > 0)
    probe(c, open, buffers.cut + item.sequence.batch * p.num_heads + item.kv_head * p.group_size);
}

// O += P V for the rows of the group.
HWY_INLINE void decode_values(const DecodeContext& c, std::int64_t begin, std::int64_t keys) {
  const DecodeScratch& s = c.s;
  const bool in_place = c.value.dtype == DType::float32 && c.value.pages == nullptr && !c.p.gathered &&
                        c.p.head_dim_v % kLanes == 0 && c.value.row_bytes % 4 == 0;
  const float* value = s.value;
  std::int64_t pitch = s.value_pitch;
  if (in_place) {
    value = reinterpret_cast<const float*>(c.value.row(begin));
    pitch = c.value.row_bytes / 4;
  } else if (c.p.gathered) {
    RowSource source = c.value;
    source.gather = nullptr;
    for (std::int64_t j = 0; j < keys; ++j)
      pack_rows(source, max_of<std::int64_t>(position_of(c, begin + j), 0), 1, c.p.head_dim_v,
                s.value + j * pitch, 0);
  } else {
    pack_rows(c.value, begin, keys, c.p.head_dim_v, s.value, pitch);
  }
  gemm<Init::add>(Gemm{value, pitch, s.scores, s.tile_keys, 1, keys, s.out, s.value_pitch}, c.p.group_size,
                  round_up(c.p.head_dim_v, kLanes));
}

HWY_INLINE bool decode_vote(const DecodeContext& c, const float* cut, std::int64_t keys) {
  for (std::int64_t g = 0; g < c.p.group_size; ++g)
    if (!(decode_row_max(c.s.scores + g * c.s.tile_keys, keys) < cut[g])) return true;
  return false;
}

HWY_INLINE void decode_softmax(const DecodeContext& c, std::int64_t keys) {
  const DecodeScratch& s = c.s;
  for (std::int64_t g = 0; g < c.p.group_size; ++g) {
    float* scores = s.scores + g * s.tile_keys;
    const float tile_max = decode_row_max(scores, keys);
    const float max = tile_max > s.row_max[g] || tile_max != tile_max ? tile_max : s.row_max[g];
    const float base = max == kNegativeInfinity ? 0.0f : max;
    const float factor = s.row_max[g] == max ? 1.0f : __builtin_exp2f(s.row_max[g] - base);
    s.row_sum[g] = s.row_sum[g] * factor + decode_exponentials(scores, keys, base);
    s.row_max[g] = max;
    if (factor == 1.0f) continue;
    const Float scale = hn::Set(kFloat, factor);
    float* out = s.out + g * s.value_pitch;
    for (std::int64_t i = 0; i < s.value_pitch; i += kLanes)
      hn::Store(hn::Mul(hn::Load(kFloat, out + i), scale), kFloat, out + i);
  }
}

HWY_INLINE void decode(const Problem& p, const Arguments& args, const DecodeBuffers& buffers,
                       const DecodeItem& item, void* memory) {
  const DecodeContext c = decode_context(p, args, item, memory);
  const DecodeScratch& s = c.s;
  for (std::int64_t i = 0; i < p.group_size * s.value_pitch; ++i) s.out[i] = 0;
  for (std::int64_t g = 0; g < p.group_size; ++g) {
    s.row_max[g] = kNegativeInfinity;
    s.row_sum[g] = 0;
  }
  const std::uint32_t* open = p.skips_tiles() ? open_words(c, buffers) : nullptr;
  const Probes probes = p.threshold > 0 ? find_probes(open, c.tiles) : Probes{};
  const float* cut = p.threshold > 0
                         ? buffers.cut + item.sequence.batch * p.num_heads + item.kv_head * p.group_size
                         : nullptr;
  const std::int64_t first = item.split * buffers.keys_per_split / s.tile_keys;
  const std::int64_t last = min_of(c.tiles, (item.split + 1) * buffers.keys_per_split / s.tile_keys);
  for (std::int64_t n = first; n < last; ++n) {
    if (open != nullptr && !test_bit(open, n)) continue;
    const std::int64_t begin = n * s.tile_keys, keys = min_of(s.tile_keys, c.positions - begin);
    const TileVisibility seen = classify(c, begin, keys);
    if (seen == TileVisibility::none) continue;
    decode_scores(c, begin, keys, seen);
    if (cut != nullptr && !probes.contains(n) && !decode_vote(c, cut, keys)) continue;
    decode_softmax(c, keys);
    decode_values(c, begin, keys);
  }
  for (std::int64_t g = 0; g < p.group_size; ++g) {
    const std::int64_t slot =
        (item.sequence.batch * p.num_heads + item.kv_head * p.group_size + g) * buffers.splits + item.split;
    buffers.row_max[slot] = s.row_max[g];
    buffers.row_sum[slot] = s.row_sum[g];
    for (std::int64_t i = 0; i < round_up(p.head_dim_v, kLanes); i += kLanes)
      hn::Store(hn::Load(kFloat, s.out + g * s.value_pitch + i), kFloat,
                buffers.partial_out + slot * buffers.pitch + i);
  }
}

HWY_INLINE void decode_combine(const Problem& p, const Arguments& args, const DecodeBuffers& buffers,
                               const DecodeItem& item, void* memory) {
  float* sum = static_cast<float*>(memory);
  const std::int64_t padded = round_up(p.head_dim_v, kLanes);
  for (std::int64_t g = 0; g < p.group_size; ++g) {
    const std::int64_t head = item.kv_head * p.group_size + g;
    const std::int64_t slot = (item.sequence.batch * p.num_heads + head) * buffers.splits;
    float max = kNegativeInfinity;
    for (std::int64_t i = 0; i < buffers.splits; ++i)
      max = buffers.row_max[slot + i] > max || buffers.row_max[slot + i] != buffers.row_max[slot + i]
                ? buffers.row_max[slot + i]
                : max;
    double sink_log2 = -__builtin_inf();
    if (p.has_sink)
      sink_log2 =
          static_cast<double>(load_scalar(args.sink.data, args.sink.dtype, head * args.sink.stride_head)) *
          kLog2E;
    for (std::int64_t i = 0; i < padded; ++i) sum[i] = 0;
    double total = 0;
    if (max != kNegativeInfinity) {
      for (std::int64_t i = 0; i < buffers.splits; ++i) {
        if (buffers.row_max[slot + i] == kNegativeInfinity) continue;
        const float weight = __builtin_exp2f(buffers.row_max[slot + i] - max);
        total += static_cast<double>(weight) * static_cast<double>(buffers.row_sum[slot + i]);
        const Float w = hn::Set(kFloat, weight);
        const float* part = buffers.partial_out + (slot + i) * buffers.pitch;
        for (std::int64_t c = 0; c < padded; c += kLanes)
          hn::Store(hn::MulAdd(w, hn::Load(kFloat, part + c), hn::Load(kFloat, sum + c)), kFloat, sum + c);
      }
    }
    double lse_log2 = total == 0 ? -__builtin_inf() : static_cast<double>(max) + __builtin_log2(total);
    double denominator = total;
    if (p.has_sink) {
      denominator = total == 0 ? 0 : total + __builtin_exp2(sink_log2 - static_cast<double>(max));
      lse_log2 = total == 0 || __builtin_isinf(denominator)
                     ? sink_log2
                     : static_cast<double>(max) + __builtin_log2(denominator);
    }
    const float factor = total == 0 ? 0.0f : static_cast<float>(1.0 / denominator);
    if (args.lse.present())
      static_cast<float*>(
          args.lse.data)[item.sequence.batch * args.lse.stride_batch + head * args.lse.stride_head] =
          static_cast<float>(lse_log2 * kLn2);
    const RowSource target = row_source(args.out, item.sequence.batch, 0, head);
    with_element_type(args.out.dtype, [&](auto* type) HWY_ATTR {
      using T = std::remove_pointer_t<decltype(type)>;
      narrow_row(sum, p.head_dim_v, factor, reinterpret_cast<T*>(const_cast<char*>(target.row(0))));
    });
  }
}

HWY_INLINE std::size_t decode_scratch(const Problem& p) {
  DecodeScratch scratch;
  return scratch.carve(p, nullptr);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
