// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 matrices on AMX tiles, and the layouts they read.
//
//   C[n][v] (+)= sum_k A[n][k] * B[k][v],  A and B bfloat16, C float
//
// A tile register holds 16 rows of 64 bytes: 16 x 32 elements of A (a row is 32 consecutive k), or 16 pairs of k by 16
// columns of B (k and k + 1 of a column side by side), or 16 x 16 of C. One TDPBF16PS multiplies 16 x 32 by 32 x 16 in 16
// cycles. Both operands are kept as sequences of such tiles, 1 KB each, k fastest: a load is 16 consecutive cache
// lines whatever the shape was. Extents that do not fill a tile are padded with zeros when they are packed.
//
// A block of 2 x 2 tiles of C takes four loads (8 cycles each) for four products (64 cycles): the tile unit is the
// limit, and its latency of 52 cycles is covered by the four accumulators.
//
// The tile instructions are written as assembly: they need no compiler flag, and the compiler keeps them in order with
// the vector code around them.
#pragma once

#include <immintrin.h>

#include "backend/cpu/simd/gemm-inl.h"
#include "backend/cpu/simd/kv_source-inl.h"
#include "backend/cpu/simd/scores-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

static_assert(kLanes == 16, "one vector of floats is one row of a tile of C");
static_assert(kTilePitch == kRows, "score tiles are dense");

inline constexpr std::int64_t kTileRows = 16;   // n of A and C, v of B and C
inline constexpr std::int64_t kTileTerms = 32;  // k
inline constexpr std::int64_t kTileBytes = 1024;

// A packed operand: tile (outer, k) at data + (outer * k_tiles + k) * kTileBytes; outer is n / 16 or v / 16.
struct Tiles {
  char* data = nullptr;
  std::int64_t k_tiles = 0;

  HWY_INLINE char* at(std::int64_t outer, std::int64_t k) const {
    return data + (outer * k_tiles + k) * kTileBytes;
  }
  HWY_INLINE Tiles from(std::int64_t outer, std::int64_t k) const { return {at(outer, k), k_tiles}; }
};

HWY_INLINE std::int64_t tiles_of(std::int64_t extent, std::int64_t unit) {
  return (extent + unit - 1) / unit;
}

// The tile registers belong to the thread while one lives; all of them are 16 rows of 64 bytes.
class TileSession {
 public:
  HWY_INLINE TileSession() {
    Configuration c;
    for (int t = 0; t < 8; ++t) {
      c.row_bytes[t] = 64;
      c.rows[t] = 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(c));
  }
  // Registers in their initial state cost nothing when the kernel switches threads.
  HWY_INLINE ~TileSession() { asm volatile("tilerelease"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

 private:
  struct Configuration {  // of the palette 1, as LDTILECFG reads it
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  };
  static_assert(sizeof(Configuration) == 64, "LDTILECFG reads 64 bytes");
};

template <int kTile>
HWY_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
HWY_INLINE void tile_load(const void* source, std::int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(source), "r"(row_bytes), "i"(kTile) : "memory");
}
// Registers 4 to 7: up to four tiles that follow each other, for as long as other operands pass by.
HWY_INLINE void load_resident(const char* tiles, std::int64_t count) {
  tile_load<4>(tiles, 64);
  if (count > 1) tile_load<5>(tiles + kTileBytes, 64);
  if (count > 2) tile_load<6>(tiles + 2 * kTileBytes, 64);
  if (count > 3) tile_load<7>(tiles + 3 * kTileBytes, 64);
}
template <int kTile>
HWY_INLINE void tile_store(void* target, std::int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(target), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
HWY_INLINE void tile_multiply() {  // C += A B
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// Registers: 0 to 3 hold C, 4 and 5 A, 6 and 7 B.

// kN x kV tiles of C: started, terms added, stored; `c` and the distances of tiles of one operand from the next in n or v.
template <int kN, int kV, bool kAdd>
HWY_INLINE void start_block(const float* c, std::int64_t c_pitch) {
  const std::int64_t row_bytes = c_pitch * 4;
  const float* c1 = c + kTileRows * c_pitch;
  if constexpr (kAdd) {
    tile_load<0>(c, row_bytes);
    if constexpr (kV > 1) tile_load<1>(c + kTileRows, row_bytes);
    if constexpr (kN > 1) tile_load<2>(c1, row_bytes);
    if constexpr (kN > 1 && kV > 1) tile_load<3>(c1 + kTileRows, row_bytes);
  } else {
    tile_zero<0>();
    if constexpr (kV > 1) tile_zero<1>();
    if constexpr (kN > 1) tile_zero<2>();
    if constexpr (kN > 1 && kV > 1) tile_zero<3>();
  }
}
template <int kN, int kV>
HWY_INLINE void add_terms(const char* a, std::int64_t a_step, const char* b, std::int64_t b_step,
                          std::int64_t k_tiles) {
  for (std::int64_t k = 0; k < k_tiles; ++k) {
    tile_load<4>(a, 64);
    tile_load<6>(b, 64);
    tile_multiply<0, 4, 6>();
    if constexpr (kV > 1) {
      tile_load<7>(b + b_step, 64);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (kN > 1) {
      tile_load<5>(a + a_step, 64);
      tile_multiply<2, 5, 6>();
      if constexpr (kV > 1) tile_multiply<3, 5, 7>();
    }
    a += kTileBytes;
    b += kTileBytes;
  }
}
template <int kN, int kV>
HWY_INLINE void store_block(float* c, std::int64_t c_pitch) {
  const std::int64_t row_bytes = c_pitch * 4;
  float* c1 = c + kTileRows * c_pitch;
  tile_store<0>(c, row_bytes);
  if constexpr (kV > 1) tile_store<1>(c + kTileRows, row_bytes);
  if constexpr (kN > 1) tile_store<2>(c1, row_bytes);
  if constexpr (kN > 1 && kV > 1) tile_store<3>(c1 + kTileRows, row_bytes);
}

template <int kN, int kV, bool kAdd>
HWY_INLINE void tile_block(const char* a, std::int64_t a_step, const char* b, std::int64_t b_step,
                           std::int64_t k_tiles, float* c, std::int64_t c_pitch) {
  start_block<kN, kV, kAdd>(c, c_pitch);
  add_terms<kN, kV>(a, a_step, b, b_step, k_tiles);
  store_block<kN, kV>(c, c_pitch);
}

// C of n_tiles x v_tiles tiles; terms [k_begin, k_begin + k_tiles) of both operands.
template <bool kAdd>
HWY_NOINLINE void tile_product(const Tiles& a, std::int64_t n_tiles, const Tiles& b, std::int64_t v_tiles,
                               std::int64_t k_begin, std::int64_t k_tiles, float* c, std::int64_t c_pitch) {
  const std::int64_t a_step = a.k_tiles * kTileBytes, b_step = b.k_tiles * kTileBytes;
  std::int64_t n = 0;
  for (; n + 2 <= n_tiles; n += 2) {
    float* row = c + n * kTileRows * c_pitch;
    std::int64_t v = 0;
    for (; v + 2 <= v_tiles; v += 2)
      tile_block<2, 2, kAdd>(a.at(n, k_begin), a_step, b.at(v, k_begin), b_step, k_tiles, row + v * kTileRows,
                             c_pitch);
    if (v < v_tiles)
      tile_block<2, 1, kAdd>(a.at(n, k_begin), a_step, b.at(v, k_begin), b_step, k_tiles, row + v * kTileRows,
                             c_pitch);
  }
  if (n == n_tiles) return;
  float* row = c + n * kTileRows * c_pitch;
  std::int64_t v = 0;
  for (; v + 2 <= v_tiles; v += 2)
    tile_block<1, 2, kAdd>(a.at(n, k_begin), a_step, b.at(v, k_begin), b_step, k_tiles, row + v * kTileRows,
                           c_pitch);
  if (v < v_tiles)
    tile_block<1, 1, kAdd>(a.at(n, k_begin), a_step, b.at(v, k_begin), b_step, k_tiles, row + v * kTileRows,
                           c_pitch);
}

// ---------------------------------------------------------------------------------------------- packing

// Addresses of rows of bfloat16; a null row is a row of zeros.
struct Rows {
  const char* row[kPointerChunk];

  HWY_INLINE void read(const RowSource& source, std::int64_t begin, std::int64_t count) {
    row_pointers(source, begin, count, row);
    for (std::int64_t r = count; r < kPointerChunk; ++r) row[r] = nullptr;
  }
};

// Columns [32 chunk, 32 chunk + 32) of a row of `dim` elements, zeros beyond them.
struct Chunk {
  std::int64_t offset;
  __mmask32 inside;

  HWY_INLINE Chunk(std::int64_t index, std::int64_t dim) : offset(index * 64) {
    const std::int64_t left = dim - index * 32;
    inside = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
  }
  HWY_INLINE __m512i load(const char* row) const {
    return row == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(inside, row + offset);
  }
};

// 16 x 16 numbers of 32 bits.
HWY_INLINE void transpose_16x16(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xDD);
    r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
    r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

// A[n][k]: row n of the source is n, its columns are k.
HWY_NOINLINE void pack_rows_to_tiles(const Rows& rows, std::int64_t n_tiles, std::int64_t dim,
                                     const Tiles& target) {
  for (std::int64_t k = 0; k < target.k_tiles; ++k) {
    const Chunk chunk(k, dim);
    for (std::int64_t n = 0; n < n_tiles; ++n)
      for (std::int64_t r = 0; r < kTileRows; ++r)
        _mm512_store_si512(target.at(n, k) + r * 64, chunk.load(rows.row[n * kTileRows + r]));
  }
}

// B[k][v]: row v of the source is column v, its columns are k.
HWY_NOINLINE void pack_columns_to_tiles(const Rows& rows, std::int64_t v_tiles, std::int64_t dim,
                                        const Tiles& target) {
  for (std::int64_t v = 0; v < v_tiles; ++v)
    for (std::int64_t k = 0; k < target.k_tiles; ++k) {
      const Chunk chunk(k, dim);
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = chunk.load(rows.row[v * kTileRows + i]);
      transpose_16x16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(target.at(v, k) + i * 64, r[i]);
    }
}

// Interleaving two rows word by word leaves, in each half of a 128-bit part, four pairs: column i of the first result is
// column first_column(i) of the rows, the second result holds those 4 further on.
HWY_INLINE constexpr std::int64_t first_column(std::int64_t i) { return i / 4 * 8 + i % 4; }

// A[n][k]: the rows of the source are k, its columns are n.
HWY_NOINLINE void pack_transposed_to_tiles(const Rows& rows, std::int64_t dim, std::int64_t k_tiles,
                                           const Tiles& target) {
  for (std::int64_t c = 0; c * 32 < dim; ++c) {
    const Chunk chunk(c, dim);
    const std::int64_t columns = min_of<std::int64_t>(32, round_up(dim - c * 32, kTileRows));
    for (std::int64_t k = 0; k < k_tiles; ++k) {
      __m512i low[16], high[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __m512i x = chunk.load(rows.row[k * kTileTerms + 2 * i]);
        const __m512i y = chunk.load(rows.row[k * kTileTerms + 2 * i + 1]);
        low[i] = _mm512_unpacklo_epi16(x, y);
        high[i] = _mm512_unpackhi_epi16(x, y);
      }
      transpose_16x16(low);
      transpose_16x16(high);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const std::int64_t column = first_column(i);
        if (column >= columns) break;
        char* tile = target.at(c * 2 + column / kTileRows, k);
        _mm512_store_si512(tile + column % kTileRows * 64, low[i]);
        _mm512_store_si512(tile + (column % kTileRows + 4) * 64, high[i]);
      }
    }
  }
}

// Rows of a group of 32 in the order in which pack_words leaves them: its pair q holds rows pair_row(q) and the next.
HWY_INLINE constexpr std::int64_t pair_row(std::int64_t q) {
  return q / 4 * 4 + q % 2 * 2 + (q % 4 / 2) * 16;
}

// B[k][v]: the rows of the source are k, in the order of pair_row, its columns are v.
HWY_NOINLINE void pack_row_pairs_to_tiles(const Rows& rows, std::int64_t dim, const Tiles& target) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (std::int64_t c = 0; c * 32 < dim; ++c) {
    const Chunk chunk(c, dim);
    const bool whole = dim - c * 32 > kTileRows;
    for (std::int64_t k = 0; k < target.k_tiles; ++k)
      for (std::int64_t q = 0; q < 16; ++q) {
        const std::int64_t row = k * kTileTerms + pair_row(q);
        const __m512i x = chunk.load(rows.row[row]), y = chunk.load(rows.row[row + 1]);
        _mm512_store_si512(target.at(2 * c, k) + q * 64, _mm512_permutex2var_epi16(x, first, y));
        if (whole)
          _mm512_store_si512(target.at(2 * c + 1, k) + q * 64, _mm512_permutex2var_epi16(x, second, y));
      }
  }
}

// ---------------------------------------------------------------------------------------------- rounding

// The nearest bfloat16 in the upper half of each number, ties away from zero; what the lower half holds is left over.
HWY_INLINE __m512i round_to_upper(Float x) {
  return _mm512_add_epi32(_mm512_castps_si512(x.raw), _mm512_set1_epi32(0x8000));
}

// Element by element the pair (x, y): rows of B whose k are those of x and y.
HWY_INLINE __m512i pair_up(Float x, Float y) {
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(round_to_upper(x), 16), round_to_upper(y));
}

// 32 numbers as a row of A; in the order of pair_row.
HWY_INLINE __m512i pack_words(Float low, Float high) {
  return _mm512_packus_epi32(_mm512_srli_epi32(round_to_upper(low), 16),
                             _mm512_srli_epi32(round_to_upper(high), 16));
}

// 2^x to 3e-6, a hundredth of the rounding to bfloat16 that follows and under what the sum of a row may lose. Ten
// instructions with the argument and the sum: VREDUCEPS leaves x - floor(x), VSCALEFPS takes the floor itself, and
// what would be denormal is flushed to zero by the mode the thread is in. -inf gives 0, NaN gives NaN.
HWY_INLINE Float exp2_short(Float x) {
  const Float f{_mm512_reduce_ps(x.raw, 0x09)};
  Float p = hn::Set(kFloat, 1.3534167911688112e-2f);
  p = hn::MulAdd(p, f, hn::Set(kFloat, 5.2011460619067564e-2f));
  p = hn::MulAdd(p, f, hn::Set(kFloat, 2.4144275688618344e-1f));
  p = hn::MulAdd(p, f, hn::Set(kFloat, 6.9300383447106470e-1f));
  p = hn::MulAdd(p, f, hn::Set(kFloat, 1.0000025933706653f));
  return Float{_mm512_scalef_ps(p.raw, x.raw)};
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
