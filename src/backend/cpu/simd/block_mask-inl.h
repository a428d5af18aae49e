// SPDX-License-Identifier: Apache-2.0
// Policy BlockMask: which blocks a row tile sees, and the bits of a partial one. A skip tile lies in one
// block.
#pragma once

#include "backend/cpu/simd/scores-inl.h"
#include "core/block_codes.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

inline constexpr std::int64_t kMostTileKeys = 128;

// Of a tile in a partial block, bit r of word j: row r sees key j. What a score tile is masked with.
struct PartialTile {
  std::uint64_t rows_of_key[kMostTileKeys];
};

// bit c of word r <-> bit r of word c, by halves: 32x32 squares, then 16x16 in each, ...
HWY_INLINE void transpose_bits(std::uint64_t* words) {
  std::uint64_t low = 0xffffffffu;  // columns of the left one of two squares
  for (int side = 32; side != 0; side /= 2, low ^= low << side)
    for (int row = 0; row < 64; row = ((row | side) + 1) & ~side) {
      const std::uint64_t swapped = (words[row] >> side ^ words[row | side]) & low;
      words[row | side] ^= swapped;
      words[row] ^= swapped << side;
    }
}

HWY_INLINE std::uint64_t bits_of(const RowRanges& ranges) {
  std::uint64_t bits = 0;
  for (int c = 0; c < ranges.count; ++c) {
    const int first = ranges.first[c] + 1, count = ranges.last[c] - first;
    bits |= (~std::uint64_t{0} >> (64 - count)) << first;
  }
  return bits;
}

// Rows [row_begin, row_begin + rows) by keys [key_begin, key_begin + keys) of partial block `block`;
// `by_bands`: some of them are hidden by the bands, too. False when no row sees a key.
HWY_INLINE bool read_partial_tile(const BlockCodes& table, std::int32_t block, const Visibility& v,
                                  std::int64_t row_begin, std::int64_t rows, std::int64_t key_begin,
                                  std::int64_t keys, bool by_bands, PartialTile& tile) {
  const std::int64_t first_word = key_begin % table.block_keys / 32;
  for (std::int64_t half = 0; half < keys; half += 64) {
    std::uint64_t* words = tile.rows_of_key + half;
    for (std::int64_t r = 0; r < 64; ++r) {
      words[r] = 0;
      if (r >= rows) continue;
      const std::uint32_t* pair = block_words(table, block, row_begin + r) + first_word + half / 32;
      words[r] = pair[0] | std::uint64_t{pair[1]} << 32;
    }
    transpose_bits(words);
  }
  std::uint64_t any = 0;
  for (std::int64_t j = 0; j < keys; ++j) {
    if (by_bands) tile.rows_of_key[j] &= bits_of(rows_seeing(v, row_begin, rows, key_begin + j));
    any |= tile.rows_of_key[j];
  }
  return any != 0;
}

// scores = -inf where the row does not see the key.
HWY_INLINE void apply_partial_tile(const PartialTile& partial, const RowTile& tile, std::int64_t keys,
                                   float* scores) {
  const Float hidden = hn::Set(kFloat, kNegativeInfinity);
  const std::uint64_t all = ~std::uint64_t{0} >> (64 - tile.rows);
  for (std::int64_t j = 0; j < keys; ++j) {
    if (partial.rows_of_key[j] == all) continue;
    for (std::int64_t r = 0; r < tile.lanes; r += kLanes) {
      const std::uint64_t bits = partial.rows_of_key[j] >> r;  // LoadMaskBits may read eight bytes
      const auto seen = hn::LoadMaskBits(kFloat, reinterpret_cast<const std::uint8_t*>(&bits));
      float* s = scores + j * kRows + r;
      hn::Store(hn::IfThenElse(seen, hn::Load(kFloat, s), hidden), kFloat, s);
    }
  }
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
