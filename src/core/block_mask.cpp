// SPDX-License-Identifier: Apache-2.0
#include "core/block_mask.h"

#include <algorithm>

namespace fsa {

void fill_block_codes(const Problem& problem, const BlockLists& lists, std::int64_t batch, std::int64_t head,
                      std::int32_t* codes) {
  const std::int64_t row_blocks = problem.row_blocks(), key_blocks = problem.key_blocks();
  std::fill_n(codes, row_blocks * key_blocks, kHiddenBlock);
  for (std::int64_t row = 0; row < row_blocks; ++row, codes += key_blocks) {
    if (lists.full.present)
      for (std::int64_t i = 0; i < lists.full.count(batch, head, row); ++i)
        codes[lists.full.index(batch, head, row, i)] = kFullBlock;
    if (!lists.partial.present) continue;
    const std::int32_t begin = lists.begin[batch * lists.begin_stride_batch + head * lists.begin_stride_head +
                                           row * lists.begin_stride_row];
    for (std::int32_t i = 0; i < lists.partial.count(batch, head, row); ++i)
      codes[lists.partial.index(batch, head, row, i)] = begin + i;
  }
}

HeadBlocks::HeadBlocks(const Problem& problem, const Arguments& args, std::int64_t batch, std::int64_t head)
    : present_(problem.has_block_mask) {
  if (!present_) return;
  table_.key_blocks = problem.key_blocks();
  table_.block_rows = problem.block_rows;
  table_.block_keys = problem.block_keys;
  table_.bits = args.block_mask.bits;
  codes_.resize(static_cast<std::size_t>(problem.row_blocks() * table_.key_blocks));
  fill_block_codes(problem, args.block_mask, batch, head, codes_.data());
}

}  // namespace fsa
