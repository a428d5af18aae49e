// SPDX-License-Identifier: Apache-2.0
#include "api/index_checks.h"

#include <algorithm>
#include <vector>

#include "api/checks.h"
#include "core/skip_tile.h"

namespace fsa {
namespace {

constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;

void check_seqused(const char* name, const IndexTable& table, std::int64_t batch, std::int64_t limit,
                   const char* unit) {
  if (!table.present) return;
  const std::int64_t used = table.at(batch);
  if (used < 0) fail(kInvalid, name, "[", batch, "]: ", used, ", must not be negative");
  if (used > limit)
    fail(kInvalid, name, "[", batch, "]: ", used, ", but sequence ", batch, " has room for ", limit, " ",
         unit);
}

}  // namespace

void check_cu_seqlens(const char* name, const IndexTable& table, std::int64_t batch, const char* tensor,
                      std::int64_t total) {
  if (table.at(0) != 0) fail(kInvalid, name, "[0]: ", table.at(0), ", must be 0");
  for (std::int64_t i = 1; i <= batch; ++i)
    if (table.at(i) < table.at(i - 1))
      fail(kInvalid, name, "[", i, "]: ", table.at(i), " is below ", name, "[", i - 1,
           "] = ", table.at(i - 1), "; it must not decrease");
  if (table.at(batch) > total)
    fail(kInvalid, name, "[", batch, "]: ", table.at(batch), ", but ", tensor, " has only ", total, " rows");
}

void check_compressed_keys(const char* keys_name, std::int64_t batch, std::int64_t keys, bool more_allowed,
                           std::int64_t tokens, std::int64_t compress_block, std::int64_t compress_stride) {
  const std::int64_t needed = compressed_length(tokens, compress_block, compress_stride);
  if (more_allowed ? keys < needed : keys != needed)
    fail(kInvalid, keys_name, ": sequence ", batch, " has ", keys, " compressed keys, but its ", tokens,
         " tokens make ", needed, " with compress_block ", compress_block, " and compress_stride ",
         compress_stride);
}

void check_tokens(std::int64_t batch, std::int64_t tokens, std::int64_t rows, const char* hint) {
  if (tokens < rows)
    fail(kInvalid, "seqused_k[", batch, "]: ", tokens, " tokens, but the sequence has ", rows,
         " rows, each of them a token", hint);
}

Lengths check_lengths(const Problem& problem, const Arguments& args) {
  Lengths lengths;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const Sequence s = sequence(problem, args, b);
    check_seqused("seqused_q", args.seqused_q, b, s.rows, "rows");
    if (problem.compress_block == 0) check_seqused("seqused_k", args.seqused_k, b, s.keys, "keys");
    lengths.max_rows = std::max(lengths.max_rows, s.rows);
    lengths.max_keys = std::max(lengths.max_keys, s.keys);
    lengths.max_seqlen_q = std::max(lengths.max_seqlen_q, s.seqlen_q);
    lengths.max_seqlen_k = std::max(lengths.max_seqlen_k, s.seqlen_k);
  }
  return lengths;
}

void check_compressed_lengths(const Problem& problem, const Arguments& args) {
  const std::int64_t block = problem.compress_block, stride = problem.compress_stride;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const Sequence s = sequence(problem, args, b);
    const std::int64_t tokens = s.offset + s.seqlen_q;
    check_tokens(b, tokens, s.seqlen_q, "; with compress_block seqused_k counts tokens");
    check_compressed_keys("key", b, s.keys, args.seqused_k.present || args.seqused_q.present, tokens, block,
                          stride);
  }
}

void check_page_table(const Problem& problem, const Arguments& args) {
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const std::int64_t pages = ceil_div(args.seqused_k.at(b), problem.page_size);
    for (std::int64_t i = 0; i < pages; ++i) {
      const std::int64_t page = args.page_table.at(b, i);
      if (page < 0 || page >= problem.num_pages)
        fail(kInvalid, "page_table[", b, ", ", i, "]: ", page, ", must be from 0 to ", problem.num_pages - 1,
             " (key has ", problem.num_pages, " pages)");
    }
  }
}

void check_gather_indices(const Problem& problem, const Arguments& args) {
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const std::int64_t keys = sequence(problem, args, b).seqlen_k;
    for (std::int64_t i = 0; i < problem.gather_size; ++i) {
      const std::int64_t key = args.gather_kv_indices.at(b, i);
      if (key < -1 || key >= keys)
        fail(kInvalid, "gather_kv_indices[", b, ", ", i, "]: ", key,
             ", must be -1 (none) or a key of sequence ", b, ", which has ", keys);
    }
  }
}

void check_window_sizes(const Problem& problem, const Arguments& args) {
  for (std::int64_t head = 0; head < problem.num_kv_heads; ++head)
    for (std::int64_t column = 0; column < 4; ++column) {
      const std::int64_t size = args.window_sizes.at(head, column);
      if (size < 0)
        fail(kInvalid, "window_sizes[", head, ", ", column, "]: ", size, ", must not be negative");
    }
}

namespace {

// The lists of one kind in one batch entry, head and row block: counts, key blocks, no block twice.
class ListCheck {
 public:
  explicit ListCheck(std::int64_t key_blocks)
      : key_blocks_(key_blocks), seen_(static_cast<std::size_t>(key_blocks), -1) {}

  // `line` numbers the (batch entry, head, row block).
  void check(const char* kind, const BlockList& list, std::int64_t batch, std::int64_t head,
             std::int64_t row_block, std::int64_t line) {
    if (!list.present) return;
    const auto where = [&] { return text_of("[", batch, ", ", head, ", ", row_block); };
    const std::int64_t count = list.count(batch, head, row_block);
    if (count < 0 || count > list.columns)
      fail(kInvalid, "block_mask.", kind, "kv_num_blocks", where(), "]: ", count, ", must be from 0 to ",
           list.columns, ", the columns of ", kind, "kv_indices");
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t block = list.index(batch, head, row_block, i);
      if (block < 0 || block >= key_blocks_)
        fail(kInvalid, "block_mask.", kind, "kv_indices", where(), ", ", i, "]: ", block,
             ", must be from 0 to ", key_blocks_ - 1, ", the last block of keys");
      std::int64_t& last = seen_[static_cast<std::size_t>(block)];
      if (last == line)
        fail(kInvalid, "block_mask.", kind, "kv_indices", where(), ", ", i, "]: ", block,
             ", but this row block lists that block already; list each once");
      last = line;
    }
  }

 private:
  std::int64_t key_blocks_;
  std::vector<std::int64_t> seen_;  // the last line that listed a block
};

}  // namespace

void check_block_mask(const Problem& problem, const BlockLists& lists) {
  if (problem.batch == 0) return;
  ListCheck check(problem.key_blocks());
  std::int64_t line = 0;
  for (std::int64_t b = 0; b < problem.mask_batch; ++b)
    for (std::int64_t h = 0; h < problem.mask_heads; ++h)
      for (std::int64_t row = 0; row < problem.row_blocks(); ++row, ++line) {
        check.check("", lists.partial, b, h, row, line);
        check.check("full_", lists.full, b, h, row, line);
        if (!lists.partial.present) continue;
        const std::int64_t begin = lists.begin[b * lists.begin_stride_batch + h * lists.begin_stride_head +
                                               row * lists.begin_stride_row];
        const std::int64_t count = lists.partial.count(b, h, row);
        if (count > 0 && (begin < 0 || begin + count > lists.bit_blocks))
          fail(kInvalid, "block_mask.partial_begin[", b, ", ", h, ", ", row, "]: ", begin, " with ", count,
               " blocks, but partial_bits has ", lists.bit_blocks);
      }
}

}  // namespace fsa
