// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/selected_lists.h"

#include <algorithm>

#include "core/skip_tile.h"

namespace fsa::cpu {
namespace {

std::int64_t blocks_bound(const NsaProblem& p) { return ceil_div(p.max_seqlen_k, p.block_size); }

// One token after the other, a few blocks each: sorting them beats clearing a counter per block of the sequence.
bool sorts(const NsaProblem& p, std::int64_t tokens, std::int64_t blocks) {
  return tokens == 1 && p.top_k < blocks;
}

}  // namespace

std::size_t lists_bytes(const NsaProblem& p, std::int64_t tokens) {
  const std::int64_t entries = tokens * p.top_k;
  const std::int64_t blocks = std::min(entries, blocks_bound(p));
  // tokens, block, begin, and per block of the sequence a counter and the last token counted.
  return static_cast<std::size_t>(entries + 2 * blocks + 1 + 2 * blocks_bound(p)) * sizeof(std::int32_t);
}

SelectedLists build_lists(const NsaProblem& p, const NsaArguments& args, const NsaSequence& sequence,
                          std::int64_t kv_head, std::int64_t row_begin, std::int64_t row_end, void* memory) {
  const std::int64_t tokens = row_end - row_begin;
  const std::int64_t entries = tokens * p.top_k;
  const std::int64_t own_last = (row_end - 1 + sequence.offset()) / p.block_size;
  const std::int64_t blocks = own_last + 1;  // that a token of the chunk may see
  const std::int64_t listed = std::min(entries, blocks_bound(p));
  auto* token_list = static_cast<std::int32_t*>(memory);
  std::int32_t* block_list = token_list + entries;
  std::int32_t* begin = block_list + listed;
  std::int32_t* count = begin + listed + 1;
  std::int32_t* last = count + blocks_bound(p);

  SelectedLists lists{0, block_list, begin, token_list};
  const auto block_at = [&](std::int64_t token, std::int64_t slot) -> std::int64_t {
    return args.selected_blocks.at(sequence.batch, kv_head, sequence.q_begin + row_begin + token, slot);
  };
  if (sorts(p, tokens, blocks)) {
    std::int64_t used = 0;
    for (std::int64_t slot = 0; slot < p.top_k; ++slot) {
      const std::int64_t b = block_at(0, slot);
      if (b >= 0 && b <= own_last) token_list[used++] = static_cast<std::int32_t>(b);
    }
    std::sort(token_list, token_list + used);
    lists.blocks = std::unique(token_list, token_list + used) - token_list;
    for (std::int64_t i = 0; i < lists.blocks; ++i) {
      block_list[i] = token_list[i];
      token_list[i] = 0;
      begin[i] = static_cast<std::int32_t>(i);
    }
    begin[lists.blocks] = static_cast<std::int32_t>(lists.blocks);
    return lists;
  }

  std::fill_n(count, blocks, 0);
  std::fill_n(last, blocks, -1);
  const auto each_entry = [&](std::int64_t round, auto&& visit) {
    for (std::int64_t token = 0; token < tokens; ++token) {
      const std::int64_t own = (row_begin + token + sequence.offset()) / p.block_size;
      const auto mark = static_cast<std::int32_t>(round * tokens + token);
      for (std::int64_t slot = 0; slot < p.top_k; ++slot) {
        const std::int64_t b = block_at(token, slot);
        if (b < 0 || b > own || last[b] == mark) continue;
        last[b] = mark;
        visit(b, token);
      }
    }
  };
  each_entry(0, [&](std::int64_t b, std::int64_t) { ++count[b]; });
  std::int32_t sum = 0;
  for (std::int64_t b = 0; b < blocks; ++b) {
    if (count[b] == 0) continue;
    block_list[lists.blocks] = static_cast<std::int32_t>(b);
    begin[lists.blocks++] = sum;
    sum += count[b];
    count[b] = sum - count[b];  // where the next token of the block goes
  }
  begin[lists.blocks] = sum;
  each_entry(1, [&](std::int64_t b, std::int64_t token) {
    token_list[count[b]++] = static_cast<std::int32_t>(token);
  });
  return lists;
}

}  // namespace fsa::cpu
