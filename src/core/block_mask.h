// SPDX-License-Identifier: Apache-2.0
// From the lists of a block mask to its table of codes (core/block_codes.h).
#pragma once

#include <cstdint>
#include <vector>

#include "core/block_codes.h"
#include "core/problem.h"

namespace fsa {

// codes[row_block * key_blocks + key_block] of one batch entry and query head. Reads the lists, which must be
// checked and readable.
void fill_block_codes(const Problem& problem, const BlockLists& lists, std::int64_t batch, std::int64_t head,
                      std::int32_t* codes);

// The mask of one batch entry and query head, with memory of its own. Without a block mask every key is
// visible.
class HeadBlocks {
 public:
  HeadBlocks() = default;
  HeadBlocks(const Problem& problem, const Arguments& args, std::int64_t batch, std::int64_t head);

  bool present() const { return present_; }
  std::int32_t code(std::int64_t row, std::int64_t key) const {
    if (!present_) return kFullBlock;
    return codes_[static_cast<std::size_t>(row / table_.block_rows * table_.key_blocks +
                                           key / table_.block_keys)];
  }
  bool sees(std::int64_t row, std::int64_t key) const {
    const std::int32_t block = code(row, key);
    return block < 0 ? block == kFullBlock : (word(block, row, key) >> (key % 32) & 1) != 0;
  }
  // 32 keys of a row in partial block `code`, from the multiple of 32 at or before `key`.
  std::uint32_t word(std::int32_t block, std::int64_t row, std::int64_t key) const {
    return block_words(table_, block, row)[key % table_.block_keys / 32];
  }
  std::int64_t block_keys() const { return table_.block_keys; }

 private:
  bool present_ = false;
  BlockCodes table_;
  std::vector<std::int32_t> codes_;
};

}  // namespace fsa
