// SPDX-License-Identifier: Apache-2.0
// A block mask as a table: one code per row block and key block, so that a tile finds its block without a
// search.
// Included by files that are compiled once per instruction set, so everything here is always inlined.
#pragma once

#include <cstdint>

namespace fsa {

// Codes of blocks; any other is a partial block, the number of its bits in partial_bits.
inline constexpr std::int32_t kHiddenBlock = -2;
inline constexpr std::int32_t kFullBlock = -1;

struct BlockCodes {
  const std::int32_t* codes = nullptr;  // [.., row blocks, key blocks]
  std::int64_t stride_batch = 0;        // 0 where shared
  std::int64_t stride_head = 0;
  std::int64_t key_blocks = 0;
  std::int64_t block_rows = 1;
  std::int64_t block_keys = 1;
  const std::uint32_t* bits = nullptr;
};

static inline __attribute__((always_inline)) std::int32_t block_code(const BlockCodes& table,
                                                                     std::int64_t batch, std::int64_t head,
                                                                     std::int64_t row, std::int64_t key) {
  return table.codes[batch * table.stride_batch + head * table.stride_head +
                     row / table.block_rows * table.key_blocks + key / table.block_keys];
}

// The bits of a row in partial block `code`; word 0 holds the first keys of the block.
static inline __attribute__((always_inline)) const std::uint32_t* block_words(const BlockCodes& table,
                                                                              std::int32_t code,
                                                                              std::int64_t row) {
  return table.bits + (code * table.block_rows + row % table.block_rows) * (table.block_keys / 32);
}

}  // namespace fsa
