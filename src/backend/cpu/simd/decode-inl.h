// SPDX-License-Identifier: Apache-2.0
// Decode: one query row per head against a long cache. Memory-bound: K and V are read once, in order.
//
// The rows of a (sequence, key head) are the heads of its group. Three phases, each a set of independent items:
//   plan     (sequence, key head)            only with a gate test or a threshold: which tiles are candidates, and the
//                                            cut of each row from the probe tiles
//   decode   (sequence, key heads, splits)   scores, vote, softmax, P V over the key tiles of fixed key ranges
//   combine  (sequence, key head)            the splits, in order
// Scores are stored scores[row][key], one lane per key: the transpose of forward's, because rows are few.
//
// Both products are a policy Arithmetic: FloatDecode below, and TileDecode of tile_decode-inl.h.
#pragma once

#include "backend/cpu/simd/gemm-inl.h"
#include "backend/cpu/simd/kernel_table.h"
#include "backend/cpu/simd/skip-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

// Rows of one tensor on their way to the second-level cache, in pieces of one row of one head. Where the heads of a row
// lie side by side their pieces are fetched one after the other, so that memory is read in order.
struct RowFetch {
  const char* const* rows = nullptr;  // of the first head
  std::int64_t count = 0;
  std::int64_t heads = 1;
  std::int64_t head_step = 0;  // bytes
  std::int64_t bytes = 0;      // of a piece
  std::int64_t row = 0, head = 0;

  // Of one head, 8 KB: rows of 256 bytes, 2 KB apart, are read at 8 GB/s without fetching, at 16 with 32 rows ahead; 8 and
  // 128 are no better than none.
  HWY_INLINE std::int64_t rows_ahead() const { return max_of<std::int64_t>(1, 8192 / bytes); }

  HWY_INLINE void pieces(std::int64_t n) {
    for (; n > 0 && row < count; --n) {
      const char* piece = rows[row] + head * head_step;
      for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(piece + b, 0, 2);
      if (++head == heads) {
        head = 0;
        ++row;
      }
    }
  }
};

// Rows of K and V of a tile, and of the one that is fetched meanwhile, of the first head of an item.
struct DecodeRows {
  const char* key[2 * kPointerChunk];
  const char* value[2 * kPointerChunk];
};

struct DecodeHead {
  std::int64_t index = 0;  // of the item's first head on
  Visibility visibility;
  std::int64_t key_offset = 0, value_offset = 0;  // bytes from the first head
  RowSource delta;
  float* query;                              // as Arithmetic packs it
  float* out;                                // [group in Arithmetic::kRowUnit][value_pitch]
  float *alpha, *slope, *row_max, *row_sum;  // [group]
};

template <class Arithmetic>
struct DecodeScratch {
  Arithmetic arithmetic;
  std::int64_t value_pitch, tile_keys;
  float* scores;  // [group][tile_keys]
  float *delta, *distance;
  DecodeHead heads[kMostDecodeHeads];

  HWY_INLINE std::size_t carve(const Problem& p, char* base) {
    Arena arena{base};
    tile_keys = skip_tile_keys(p.head_dim);
    value_pitch = packed_pitch(round_up(p.head_dim_v, Arithmetic::kColumnUnit));
    scores = arena.floats(p.group_size * tile_keys);
    delta = arena.floats(tile_keys);
    distance = arena.floats(tile_keys);
    for (std::int64_t h = 0; h < decode_heads(p); ++h) {
      heads[h].query = arena.floats(Arithmetic::query_floats(p));
      heads[h].out = arena.floats(round_up(p.group_size, Arithmetic::kRowUnit) * value_pitch);
      heads[h].alpha = arena.floats(p.group_size);
      heads[h].slope = arena.floats(p.group_size);
      heads[h].row_max = arena.floats(p.group_size);
      heads[h].row_sum = arena.floats(p.group_size);
    }
    arithmetic.carve(p, arena);
    return arena.used;
  }
};

template <class Arithmetic>
struct DecodeContext {
  const Problem& p;
  const Arguments& args;
  const Sequence& sequence;
  std::int64_t kv_head;  // the first one of the item
  std::int64_t heads;
  LogitPolicies logit;
  RowSource key, value;    // of the first head
  std::int64_t positions;  // keys, or gathered indices
  std::int64_t tiles;
  DecodeScratch<Arithmetic> s;
  DecodeRows rows;
  RowFetch key_fetch, value_fetch;
  std::int64_t fetched = -1;    // the tile whose first keys were fetched ahead
  bool values_fetched = false;  // and its first values: not where a vote spared those before them

  HWY_INLINE DecodeContext(const Problem& problem, const Arguments& arguments, const DecodeItem& item,
                           void* memory)
      : p(problem),
        args(arguments),
        sequence(item.sequence),
        kv_head(item.kv_head),
        heads(item.heads),
        logit(logit_policies(p)),
        key(key_source(p, args, args.key, sequence, kv_head)),
        value(key_source(p, args, args.value, sequence, kv_head)),
        positions(p.gathered ? p.gather_size : sequence.seqlen_k) {
    s.carve(p, static_cast<char*>(memory));
    tiles = ceil_div(positions, s.tile_keys);
    for (std::int64_t h = 0; h < heads; ++h) {
      DecodeHead& head = s.heads[h];
      head.index = kv_head + h;
      head.visibility = visibility_of(p, args, sequence, head.index);
      head.key_offset = h * args.key.stride_head * bytes_of(args.key.dtype);
      head.value_offset = h * args.value.stride_head * bytes_of(args.value.dtype);
      if (p.has_gate) head.delta = key_source(p, args, args.delta, sequence, head.index);
      const std::int64_t first = head.index * p.group_size;
      s.arithmetic.pack_query(p, args, sequence, logit, first, head.query);
      for (std::int64_t g = 0; g < p.group_size; ++g) {
        const RowTile tile = make_row_tile(p, args, sequence, first + g, 0);
        head.slope[g] = tile.slope;
        head.alpha[g] = p.has_gate ? tile.alpha[0] : 0.0f;
      }
    }
    const auto fetch = [&](const Operand& operand, std::int64_t dim, const char* const* list) HWY_ATTR {
      const std::int64_t size = bytes_of(operand.dtype);
      return RowFetch{list, 0, heads, operand.stride_head * size, dim * size};
    };
    key_fetch = fetch(args.key, p.head_dim, rows.key);
    value_fetch = fetch(args.value, p.head_dim_v, rows.value);
  }
  DecodeContext(const DecodeContext&) = delete;
  DecodeContext& operator=(const DecodeContext&) = delete;

  HWY_INLINE std::int64_t tile_begin(std::int64_t n) const { return n * s.tile_keys; }
  HWY_INLINE std::int64_t keys_of(std::int64_t n) const {
    return min_of(s.tile_keys, positions - tile_begin(n));
  }

  // Gathered position of ordinal j: its key, or -1.
  HWY_INLINE std::int64_t position_of(std::int64_t j) const {
    if (key.gather == nullptr) return j;
    return key.gather[j * key.gather_stride];
  }
  HWY_INLINE bool sees(const DecodeHead& head, std::int64_t j) const {
    const std::int64_t position = position_of(j);
    return position >= 0 && (head.visibility.unlimited || is_visible(head.visibility, 0, position));
  }
  HWY_INLINE TileVisibility classify(const DecodeHead& head, std::int64_t n) const {
    const std::int64_t begin = tile_begin(n), keys = keys_of(n);
    if (!p.gathered) return classify_tile(head.visibility, 0, 1, begin, begin + keys);
    std::int64_t seen = 0;
    for (std::int64_t j = 0; j < keys; ++j) seen += sees(head, begin + j) ? 1 : 0;
    return seen == 0 ? TileVisibility::none : seen == keys ? TileVisibility::full : TileVisibility::partial;
  }

  // Addresses of the rows of a tile; a gathered position of -1 reads key 0 and is masked afterwards.
  HWY_INLINE void pointers(RowSource source, std::int64_t n, const char** list) const {
    const std::int64_t begin = tile_begin(n), keys = keys_of(n);
    if (!p.gathered) return row_pointers(source, begin, keys, list);
    source.gather = nullptr;
    for (std::int64_t j = 0; j < keys; ++j)
      list[j] = source.row(max_of<std::int64_t>(position_of(begin + j), 0));
  }

  // Before tile n is read. Several heads: the tile `next` (-1: none) is fetched whole while this one is computed, memory
  // in its order. One head, whose rows lie apart: rows a little further on, the first ones of `next` at the end.
  // Of values that a vote may spare the first rows alone are fetched before it.
  HWY_INLINE void start_tile(std::int64_t n, std::int64_t next) {
    const std::int64_t keys = keys_of(n), more = next < 0 ? 0 : keys_of(next);
    pointers(key, n, rows.key);
    pointers(value, n, rows.value);
    if (more > 0) {
      pointers(key, next, rows.key + keys);
      pointers(value, next, rows.value + keys);
    }
    const auto start = [&](RowFetch& fetch, std::int64_t count, bool ahead) HWY_ATTR {
      fetch.count = count;
      fetch.head = 0;
      fetch.row = heads > 1 ? keys : ahead ? fetch.rows_ahead() : 0;
      if (fetch.row == 0) fetch.pieces(fetch.rows_ahead());
    };
    start(key_fetch, keys + more, fetched == n);
    start(value_fetch, keys + more, fetched == n && values_fetched);
    values_fetched = false;
    fetched = next;
  }
};

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

// Products in float: a key row meets all rows of the group while it is in registers.
struct FloatDecode {
  static constexpr std::int64_t kRowUnit = 1;        // of `out`
  static constexpr std::int64_t kColumnUnit = 1;     // of `out`
  static constexpr std::int64_t kValuesAtOnce = 32;  // widened: in the first-level cache

  std::int64_t query_pitch;
  float *key, *value;

  static HWY_INLINE std::int64_t query_floats(const Problem& p) {
    return p.group_size * packed_pitch(p.head_dim);
  }
  HWY_INLINE void carve(const Problem& p, Arena& arena) {
    query_pitch = packed_pitch(p.head_dim);
    key = arena.floats(query_pitch);
    value = arena.floats(kValuesAtOnce * packed_pitch(p.head_dim_v));
  }

  HWY_INLINE void pack_query(const Problem& p, const Arguments& args, const Sequence& sequence,
                             const LogitPolicies& logit, std::int64_t first_head, float* query) const {
    const Float scale = hn::Set(kFloat, logit.pre_scale);
    for (std::int64_t g = 0; g < p.group_size; ++g) {
      float* row = query + g * query_pitch;
      pack_rows(row_source(args.query, sequence.batch, 0, first_head + g), 0, 1, p.head_dim, row, 0);
      for (std::int64_t i = 0; i < p.head_dim; i += kLanes)
        hn::Store(hn::Mul(hn::Load(kFloat, row + i), scale), kFloat, row + i);
    }
  }

  template <class T>
  HWY_INLINE void dot_row(const Problem& p, const float* query, const T* row, std::int64_t dim,
                          std::int64_t score_pitch, float* scores) const {
    std::int64_t g = 0;
    for (; g + 4 <= p.group_size; g += 4)
      dot_rows<4>(query + g * query_pitch, query_pitch, row, dim, score_pitch, scores + g * score_pitch);
    for (; g < p.group_size; ++g)
      dot_rows<1>(query + g * query_pitch, query_pitch, row, dim, score_pitch, scores + g * score_pitch);
  }

  // scores = pre_scale * q . k for the keys of a tile.
  template <class Context>
  HWY_INLINE void products(Context& c, const DecodeHead& head, std::int64_t keys) const {
    const std::int64_t dim = c.p.head_dim, pitch = c.s.tile_keys;
    with_element_type(c.key.dtype, [&](auto* type) HWY_ATTR {
      using T = std::remove_pointer_t<decltype(type)>;
      for (std::int64_t j = 0; j < keys; ++j) {
        const T* row = reinterpret_cast<const T*>(c.rows.key[j] + head.key_offset);
        c.key_fetch.pieces(1);
        if (dim % kLanes == 0) {
          dot_row(c.p, head.query, row, dim, pitch, c.s.scores + j);
        } else {  // widened and padded first: nothing may be read beyond it
          widen_row(row, dim, key);
          dot_row(c.p, head.query, key, round_up(dim, kLanes), pitch, c.s.scores + j);
        }
      }
    });
  }

  // O += P V for the rows of the group.
  template <class Context>
  HWY_INLINE void add_values(Context& c, const DecodeHead& head, std::int64_t keys) const {
    const std::int64_t dim = c.p.head_dim_v;
    const bool in_place = c.value.dtype == DType::float32 && c.value.pages == nullptr && !c.p.gathered &&
                          dim % kLanes == 0 && c.value.row_bytes % 4 == 0;
    for (std::int64_t j = 0; j < keys; j += kValuesAtOnce) {
      const std::int64_t count = min_of(kValuesAtOnce, keys - j);
      const float* values = value;
      std::int64_t pitch = packed_pitch(dim);
      if (in_place) {
        values = reinterpret_cast<const float*>(c.rows.value[j] + head.value_offset);
        pitch = c.value.row_bytes / 4;
      } else {
        with_element_type(c.value.dtype, [&](auto* type) HWY_ATTR {
          using T = std::remove_pointer_t<decltype(type)>;
          for (std::int64_t r = 0; r < count; ++r)
            widen_row(reinterpret_cast<const T*>(c.rows.value[j + r] + head.value_offset), dim,
                      value + r * pitch);
        });
      }
      c.value_fetch.pieces(count);
      gemm<Init::add>(Gemm{values, pitch, c.s.scores + j, c.s.tile_keys, 1, count, head.out, c.s.value_pitch},
                      c.p.group_size, round_up(dim, kLanes));
    }
  }

  HWY_INLINE void store_row(const float* out, std::int64_t columns, float* target) const {
    for (std::int64_t i = 0; i < columns; i += kLanes)
      hn::Store(hn::Load(kFloat, out + i), kFloat, target + i);
  }
};

// Base-2 logits of a tile for every row of the group; -inf where the key is not seen and beyond `keys`.
template <class Context>
HWY_INLINE void decode_scores(Context& c, const DecodeHead& head, std::int64_t n, TileVisibility seen) {
  const auto& s = c.s;
  const std::int64_t begin = c.tile_begin(n), keys = c.keys_of(n);
  s.arithmetic.products(c, head, keys);
  const std::int64_t padded = round_up(keys, kLanes);
  for (std::int64_t g = 0; g < c.p.group_size; ++g)
    for (std::int64_t j = keys; j < padded; ++j) s.scores[g * s.tile_keys + j] = kNegativeInfinity;
  if (c.logit.any()) {
    for (std::int64_t j = 0; j < padded; ++j) {
      const std::int64_t key = j < keys ? max_of<std::int64_t>(c.position_of(begin + j), 0) : 0;
      s.distance[j] = static_cast<float>(c.sequence.seqlen_k - 1 - key);
      RowSource delta = head.delta;
      delta.gather = nullptr;
      s.delta[j] = c.logit.pair_gate && j < keys ? load_scalar(delta.row(key), delta.dtype, 0) : 0.0f;
    }
    for (std::int64_t g = 0; g < c.p.group_size; ++g) {
      const Float alpha = hn::Set(kFloat, head.alpha[g]), slope = hn::Set(kFloat, -head.slope[g]);
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
    if (c.sees(head, begin + j)) continue;
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

template <class Context>
HWY_INLINE std::uint32_t* open_words(const Context& c, const DecodeBuffers& b) {
  return b.open + (c.sequence.batch * c.p.num_kv_heads + c.kv_head) * b.words;
}

// Marks the candidates: tiles in which the query sees a key and which the gate leaves open.
template <class Context>
HWY_INLINE void find_candidates(const Context& c, std::uint32_t* open, std::int64_t words) {
  const DecodeHead& head = c.s.heads[0];
  for (std::int64_t w = 0; w < words; ++w) open[w] = 0;
  GateTest gate = make_gate_test(c.p, c.sequence, 0, head.alpha, c.p.group_size);
  for (std::int64_t n = c.tiles - 1; n >= 0; --n) {
    if (c.classify(head, n) == TileVisibility::none) continue;
    if (gate.on) {
      const std::int64_t begin = c.tile_begin(n), keys = c.keys_of(n);
      std::int64_t count = 0;
      if (c.p.gathered) {
        RowSource delta = head.delta;
        delta.gather = nullptr;
        for (std::int64_t j = 0; j < keys; ++j)
          if (c.position_of(begin + j) >= 0)
            c.s.delta[count++] = load_scalar(delta.row(c.position_of(begin + j)), delta.dtype, 0);
      } else {
        pack_scalars(head.delta, begin, keys, c.s.delta);
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

HWY_INLINE void start_rows(const Problem& p, const DecodeHead& head) {
  for (std::int64_t g = 0; g < p.group_size; ++g) {
    head.row_max[g] = kNegativeInfinity;
    head.row_sum[g] = 0;
  }
}

// cut[row] = log2-sum of the probe tiles + log2 thr.
template <class Context>
HWY_INLINE void probe(Context& c, const std::uint32_t* open, float* cut) {
  const DecodeHead& head = c.s.heads[0];
  const Probes probes = find_probes(open, c.tiles);
  start_rows(c.p, head);
  for (std::int64_t n = 0; n < c.tiles; ++n) {
    if (!test_bit(open, n) || !probes.contains(n)) continue;
    c.start_tile(n, -1);
    decode_scores(c, head, n, c.classify(head, n));
    for (std::int64_t g = 0; g < c.p.group_size; ++g) {
      float* scores = c.s.scores + g * c.s.tile_keys;
      const float tile_max = decode_row_max(scores, c.keys_of(n));
      if (tile_max == kNegativeInfinity) continue;
      const float max = tile_max > head.row_max[g] || tile_max != tile_max ? tile_max : head.row_max[g];
      head.row_sum[g] = head.row_sum[g] * __builtin_exp2f(head.row_max[g] - max) +
                        decode_exponentials(scores, c.keys_of(n), max);
      head.row_max[g] = max;
    }
  }
  const float log2_thr = log2_threshold(c.p, c.sequence, 0);
  for (std::int64_t g = 0; g < c.p.group_size; ++g)
    cut[g] =
        head.row_sum[g] == 0 ? kLowestCut : head.row_max[g] + __builtin_log2f(head.row_sum[g]) + log2_thr;
}

template <class Arithmetic>
HWY_INLINE void decode_plan(const Problem& p, const Arguments& args, const DecodeBuffers& buffers,
                            const DecodeItem& item, void* memory) {
  DecodeContext<Arithmetic> c(p, args, item, memory);
  std::uint32_t* open = open_words(c, buffers);
  find_candidates(c, open, buffers.words);
  if (p.threshold > 0)
    probe(c, open, buffers.cut + item.sequence.batch * p.num_heads + item.kv_head * p.group_size);
}

template <class Context>
HWY_INLINE bool decode_vote(const Context& c, const float* cut, std::int64_t keys) {
  for (std::int64_t g = 0; g < c.p.group_size; ++g)
    if (!(decode_row_max(c.s.scores + g * c.s.tile_keys, keys) < cut[g])) return true;
  return false;
}

template <class Context>
HWY_INLINE void decode_softmax(const Context& c, const DecodeHead& head, std::int64_t keys) {
  for (std::int64_t g = 0; g < c.p.group_size; ++g) {
    float* scores = c.s.scores + g * c.s.tile_keys;
    const float tile_max = decode_row_max(scores, keys);
    const float max = tile_max > head.row_max[g] || tile_max != tile_max ? tile_max : head.row_max[g];
    const float base = max == kNegativeInfinity ? 0.0f : max;
    const float factor = head.row_max[g] == max ? 1.0f : __builtin_exp2f(head.row_max[g] - base);
    head.row_sum[g] = head.row_sum[g] * factor + decode_exponentials(scores, keys, base);
    head.row_max[g] = max;
    if (factor == 1.0f) continue;
    const Float scale = hn::Set(kFloat, factor);
    float* out = head.out + g * c.s.value_pitch;
    for (std::int64_t i = 0; i < c.s.value_pitch; i += kLanes)
      hn::Store(hn::Mul(hn::Load(kFloat, out + i), scale), kFloat, out + i);
  }
}

// The key tiles of one split, for the heads of the item; `end`: of the tiles of the item.
template <class Arithmetic>
HWY_INLINE void decode_split(DecodeContext<Arithmetic>& c, const DecodeBuffers& buffers, std::int64_t split,
                             std::int64_t end) {
  const Problem& p = c.p;
  const auto& s = c.s;
  for (std::int64_t h = 0; h < c.heads; ++h) {
    start_rows(p, s.heads[h]);
    for (std::int64_t i = 0; i < round_up(p.group_size, Arithmetic::kRowUnit) * s.value_pitch; ++i)
      s.heads[h].out[i] = 0;
  }
  // Sparse items have one head.
  const std::uint32_t* open = p.skips_tiles() ? open_words(c, buffers) : nullptr;
  const Probes probes = p.threshold > 0 ? find_probes(open, c.tiles) : Probes{};
  const float* cut =
      p.threshold > 0 ? buffers.cut + c.sequence.batch * p.num_heads + c.kv_head * p.group_size : nullptr;
  const std::int64_t first = split * buffers.keys_per_split / s.tile_keys;
  const std::int64_t last = min_of(c.tiles, (split + 1) * buffers.keys_per_split / s.tile_keys);
  for (std::int64_t n = first; n < last; ++n) {
    if (open != nullptr && !test_bit(open, n)) continue;
    TileVisibility seen[kMostDecodeHeads];
    bool any = false;
    for (std::int64_t h = 0; h < c.heads; ++h) {
      seen[h] = c.classify(s.heads[h], n);
      any = any || seen[h] != TileVisibility::none;
    }
    if (!any) continue;
    std::int64_t next = n + 1;
    while (open != nullptr && next < end && !test_bit(open, next)) ++next;
    c.start_tile(n, next < end ? next : -1);
    const std::int64_t keys = c.keys_of(n);
    for (std::int64_t h = 0; h < c.heads; ++h) {
      const DecodeHead& head = s.heads[h];
      if (seen[h] == TileVisibility::none) continue;
      decode_scores(c, head, n, seen[h]);
      if (cut != nullptr && !probes.contains(n) && !decode_vote(c, cut, keys)) continue;
      decode_softmax(c, head, keys);
      s.arithmetic.add_values(c, head, keys);
      c.values_fetched = true;
    }
  }
  for (std::int64_t h = 0; h < c.heads; ++h) {
    const DecodeHead& head = s.heads[h];
    for (std::int64_t g = 0; g < p.group_size; ++g) {
      const std::int64_t slot =
          (c.sequence.batch * p.num_heads + head.index * p.group_size + g) * buffers.splits + split;
      buffers.row_max[slot] = head.row_max[g];
      buffers.row_sum[slot] = head.row_sum[g];
      s.arithmetic.store_row(head.out + g * s.value_pitch, round_up(p.head_dim_v, kLanes),
                             buffers.partial_out + slot * buffers.pitch);
    }
  }
}

template <class Arithmetic>
HWY_INLINE void decode(const Problem& p, const Arguments& args, const DecodeBuffers& buffers,
                       const DecodeItem& item, void* memory) {
  DecodeContext<Arithmetic> c(p, args, item, memory);
  const std::int64_t end_split = item.split + item.splits;
  const std::int64_t end = min_of(c.tiles, end_split * buffers.keys_per_split / c.s.tile_keys);
  for (std::int64_t split = item.split; split < end_split; ++split) decode_split(c, buffers, split, end);
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

template <class Arithmetic>
HWY_INLINE std::size_t decode_scratch(const Problem& p) {
  DecodeScratch<Arithmetic> scratch;
  const std::size_t combine = static_cast<std::size_t>(round_up(p.head_dim_v, kLanes) * 4);
  return max_of(scratch.carve(p, nullptr), combine);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
