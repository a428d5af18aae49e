// SPDX-License-Identifier: Apache-2.0
// Policy BlockMask: which blocks a row tile sees, and the bits of a partial one. A skip tile lies in one
// block.
#pragma once

#include "backend/cpu/simd/scores-inl.h"
#include "core/block_codes.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

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
    if (by_bands) tile.rows_of_key[j] &= rows_seeing(v, row_begin, rows, key_begin + j);
    any |= tile.rows_of_key[j];
  }
  tile.trim(keys);
  return any != 0;
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
