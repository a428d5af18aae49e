// SPDX-License-Identifier: Apache-2.0
// Decode in bfloat16 on AMX tiles: the policy Arithmetic of decode-inl.h.
//
//   product               A                      B
//   S^T = K Q^T           K[key][d] in memory    Q^T[d][row], packed once per item
//   O += P V              P[row][key]            V[key][d], pairs of keys
//
// The rows of a product are the heads of a group, 16 at a time; fewer leave columns of a tile unused, which costs
// nothing where memory is the limit. Rows of K are operands as they lie wherever 16 of them are evenly spaced; those of V
// are interleaved in pairs on their way to the first-level cache. Scores turn into the layout of decode-inl.h, 16 x 16
// at a time, so that policies, masks, votes and the softmax are those of the float path.
//
// Interleaving stays within parts of 128 bits: columns of O lie in the order that it leaves until they are stored.
#pragma once

#include "backend/cpu/simd/decode-inl.h"
#include "backend/cpu/simd/tiles-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

struct TileDecode {
  static constexpr std::int64_t kRowUnit = kTileRows;
  static constexpr std::int64_t kColumnUnit = kTileTerms;
  static constexpr std::int64_t kResident = 4;  // tiles of Q^T, or of P, that stay in registers 4 to 7

  std::int64_t q_tiles;  // of head_dim
  char* key;             // A: 16 keys that cannot be read where they are
  char* pairs;           // B: tile_keys x 32 columns of V
  Tiles probabilities;   // A: [row][key]
  float* products_t;     // [row / 16][key][16]
  char* zeros;           // a row of V

  static HWY_INLINE std::int64_t row_tiles(const Problem& p) { return tiles_of(p.group_size, kTileRows); }
  static HWY_INLINE std::int64_t query_floats(const Problem& p) {
    return row_tiles(p) * tiles_of(p.head_dim, kTileTerms) * (kTileBytes / 4);
  }

  HWY_INLINE void carve(const Problem& p, Arena& arena) {
    const std::int64_t keys = skip_tile_keys(p.head_dim);
    const auto take = [&](std::int64_t tiles) HWY_ATTR {
      return reinterpret_cast<char*>(arena.floats(tiles * (kTileBytes / 4)));
    };
    q_tiles = tiles_of(p.head_dim, kTileTerms);
    key = take(q_tiles);
    pairs = take(2 * keys / kTileTerms);
    probabilities = Tiles{take(row_tiles(p) * keys / kTileTerms), keys / kTileTerms};
    products_t = arena.floats(row_tiles(p) * keys * kTileRows);
    zeros = reinterpret_cast<char*>(arena.floats(round_up(p.head_dim_v, kTileTerms) / 2));
  }

  // The factor of the softmax joins when the scores are turned: Q is not rounded once more.
  HWY_INLINE void pack_query(const Problem& p, const Arguments& args, const Sequence& sequence,
                             const LogitPolicies&, std::int64_t first_head, float* query) const {
    Rows rows;
    for (std::int64_t v = 0; v < row_tiles(p); ++v) {
      for (std::int64_t r = 0; r < kTileRows; ++r) {
        const std::int64_t g = v * kTileRows + r;
        rows.row[r] =
            g < p.group_size ? row_source(args.query, sequence.batch, 0, first_head + g).row(0) : nullptr;
      }
      pack_columns_to_tiles(rows, 1, p.head_dim, Tiles{query_tile(query, v), q_tiles});
    }
    std::memset(zeros, 0, static_cast<std::size_t>(round_up(p.head_dim_v, kTileTerms) * 2));
    std::memset(probabilities.data, 0,
                static_cast<std::size_t>(row_tiles(p) * probabilities.k_tiles * kTileBytes));
  }
  HWY_INLINE char* query_tile(float* query, std::int64_t v) const {
    return reinterpret_cast<char*>(query) + v * q_tiles * kTileBytes;
  }

  // 16 keys as A: where they are, and how far a row and 32 columns are from the next.
  struct Keys {
    const char* data;
    std::int64_t row_bytes, step;
  };

  template <class Context>
  HWY_INLINE Keys keys_at(const Context& c, const DecodeHead& head, std::int64_t j, std::int64_t keys) const {
    const bool even = !c.p.gathered && (c.key.pages == nullptr || c.key.page_size % kTileRows == 0);
    if (even && c.p.head_dim % kTileTerms == 0 && j + kTileRows <= keys)
      return {c.rows.key[j] + head.key_offset, c.key.row_bytes, kTileTerms * 2};
    Rows rows;
    for (std::int64_t r = 0; r < kTileRows; ++r)
      rows.row[r] = j + r < keys ? c.rows.key[j + r] + head.key_offset : nullptr;
    pack_rows_to_tiles(rows, 1, c.p.head_dim, Tiles{key, q_tiles});
    return {key, kTileTerms * 2, kTileBytes};
  }

  template <class Context>
  HWY_INLINE void products(Context& c, const DecodeHead& head, std::int64_t keys) const {
    const std::int64_t v_tiles = row_tiles(c.p), tile_keys = c.s.tile_keys;
    const auto block = [&](std::int64_t v, std::int64_t j)
                           HWY_ATTR { return products_t + (v * tile_keys + j) * kTileRows; };
    if (v_tiles == 1) load_resident(query_tile(head.query, 0), q_tiles);
    for (std::int64_t j = 0; j < keys; j += kTileRows) {
      const Keys a = keys_at(c, head, j, keys);
      for (std::int64_t v = 0; v < v_tiles; ++v) {
        if (v_tiles > 1) load_resident(query_tile(head.query, v), q_tiles);
        tile_zero<0>();
        multiply_keys(c, a, query_tile(head.query, v));
        tile_store<0>(block(v, j), kTileRows * 4);
      }
    }
    const Float scale = hn::Set(kFloat, c.logit.pre_scale);
    for (std::int64_t v = 0; v < v_tiles; ++v) {
      const std::int64_t rows = min_of(kTileRows, c.p.group_size - v * kTileRows);
      for (std::int64_t j = 0; j < keys; j += kTileRows) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(block(v, j) + i * kTileRows);
        transpose_16x16(x);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          if (r == rows) break;
          hn::Store(hn::Mul(Float{_mm512_castsi512_ps(x[r])}, scale), kFloat,
                    c.s.scores + (v * kTileRows + r) * tile_keys + j);
        }
      }
    }
  }

  // Register 0 += 16 keys times 16 rows.
  template <class Context>
  HWY_INLINE void multiply_keys(Context& c, const Keys& a, const char* query) const {
    const char* data = a.data;
    tile_load<2>(data, a.row_bytes);
    tile_multiply<0, 2, 4>();
    c.key_fetch.pieces(4);
    if (q_tiles > 1) {
      tile_load<3>(data + a.step, a.row_bytes);
      tile_multiply<0, 3, 5>();
    }
    c.key_fetch.pieces(4);
    if (q_tiles > 2) {
      tile_load<2>(data + 2 * a.step, a.row_bytes);
      tile_multiply<0, 2, 6>();
    }
    c.key_fetch.pieces(4);
    if (q_tiles > 3) {
      tile_load<3>(data + 3 * a.step, a.row_bytes);
      tile_multiply<0, 3, 7>();
    }
    c.key_fetch.pieces(4);
    for (std::int64_t k = kResident; k < q_tiles; ++k) {
      tile_load<2>(data + k * a.step, a.row_bytes);
      tile_load<1>(query + k * kTileBytes, 64);
      tile_multiply<0, 2, 1>();
    }
  }

  template <class Context>
  HWY_INLINE void add_values(Context& c, const DecodeHead& head, std::int64_t keys) const {
    const std::int64_t v_tiles = row_tiles(c.p), k_tiles = tiles_of(keys, kTileTerms);
    for (std::int64_t g = 0; g < c.p.group_size; ++g) pack_probabilities(c, g, keys);
    const char* rows[kPointerChunk];
    for (std::int64_t j = 0; j < k_tiles * kTileTerms; ++j)
      rows[j] = j < keys ? c.rows.value[j] + head.value_offset : zeros;
    const std::int64_t chunks = tiles_of(c.p.head_dim_v, kTileTerms);
    const std::int64_t pieces = tiles_of(c.s.tile_keys, chunks * k_tiles);
    const std::int64_t pitch = c.s.value_pitch;
    if (v_tiles == 1) load_resident(probabilities.at(0, 0), k_tiles);
    for (std::int64_t i = 0; i < chunks; ++i) {
      const Chunk chunk(i, c.p.head_dim_v);
      for (std::int64_t k = 0; k < k_tiles; ++k) {
        pack_pairs(rows + k * kTileTerms, chunk, pairs + 2 * k * kTileBytes);
        c.value_fetch.pieces(pieces);
      }
      for (std::int64_t v = 0; v < v_tiles; ++v) {
        if (v_tiles > 1) load_resident(probabilities.at(v, 0), k_tiles);
        float* out = head.out + v * kTileRows * pitch + i * kTileTerms;
        tile_load<0>(out, pitch * 4);
        tile_load<1>(out + kTileRows, pitch * 4);
        multiply_values<4>(0);
        if (k_tiles > 1) multiply_values<5>(1);
        if (k_tiles > 2) multiply_values<6>(2);
        if (k_tiles > 3) multiply_values<7>(3);
        tile_store<0>(out, pitch * 4);
        tile_store<1>(out + kTileRows, pitch * 4);
      }
    }
  }

  template <int kP>
  HWY_INLINE void multiply_values(std::int64_t k) const {
    const char* b = pairs + 2 * k * kTileBytes;
    tile_load<2>(b, 64);
    tile_multiply<0, kP, 2>();
    tile_load<3>(b + kTileBytes, 64);
    tile_multiply<1, kP, 3>();
  }

  // Row g of P in bfloat16, its keys in the order of pair_row.
  template <class Context>
  HWY_INLINE void pack_probabilities(const Context& c, std::int64_t g, std::int64_t keys) const {
    const float* row = c.s.scores + g * c.s.tile_keys;
    for (std::int64_t j = 0; j < keys; j += kTileTerms) {
      const Float low = hn::Load(kFloat, row + j);
      const Float high = j + kTileRows < keys ? hn::Load(kFloat, row + j + kTileRows) : hn::Zero(kFloat);
      _mm512_store_si512(probabilities.at(g / kTileRows, j / kTileTerms) + g % kTileRows * 64,
                         pack_words(low, high));
    }
  }

  // 32 columns of 32 rows as two tiles of B; column first_column(i) is column i of the first, those 4 further on are the
  // second's.
  HWY_INLINE void pack_pairs(const char* const* rows, const Chunk& chunk, char* target) const {
#pragma GCC unroll 4
    for (std::int64_t q = 0; q < kTileRows; ++q) {
      const __m512i x = chunk.load(rows[pair_row(q)]), y = chunk.load(rows[pair_row(q) + 1]);
      _mm512_store_si512(target + q * 64, _mm512_unpacklo_epi16(x, y));
      _mm512_store_si512(target + kTileBytes + q * 64, _mm512_unpackhi_epi16(x, y));
    }
  }

  HWY_INLINE void store_row(const float* out, std::int64_t columns, float* target) const {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (std::int64_t i = 0; i < columns; i += kTileTerms) {
      const __m512 x = _mm512_load_ps(out + i), y = _mm512_load_ps(out + i + kTileRows);
      _mm512_store_ps(target + i, _mm512_permutex2var_ps(x, low, y));
      if (i + kTileRows < columns)
        _mm512_store_ps(target + i + kTileRows, _mm512_permutex2var_ps(x, high, y));
    }
  }
};

}  // namespace fsa::cpu::FSA_SIMD_TARGET
