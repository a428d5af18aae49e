// SPDX-License-Identifier: Apache-2.0
// Random block masks for tests: the lists that a call takes, and the element mask that they stand for.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "test_util.h"

namespace fsa::test {

struct MaskShape {
  std::int64_t block_rows = 128;
  std::int64_t block_keys = 128;
  bool per_batch = true;  // else one mask for all batch entries
  bool per_head = true;
  bool full = true;  // there are lists of full blocks
  bool partial = true;
};

// The truth, element by element.
struct ElementMask {
  std::int64_t batch, heads, rows, keys;  // of which the first two may be 1
  std::vector<char> visible;

  char& at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
    return visible[static_cast<std::size_t>(
        (((batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h)) * rows + i) * keys + j)];
  }
};

// Gives a call a mask of hidden, full and partial blocks, a third each; lists are in random order, with
// nonsense behind their counts.
inline ElementMask give_block_mask(Attention& a, const MaskShape& shape, Random& random) {
  const std::int64_t row_blocks = (a.setup.seqlen_q + shape.block_rows - 1) / shape.block_rows;
  const std::int64_t key_blocks = (a.setup.seqlen_k + shape.block_keys - 1) / shape.block_keys;
  ElementMask mask{shape.per_batch ? a.setup.batch : 1,
                   shape.per_head ? a.setup.num_heads : 1,
                   a.setup.seqlen_q,
                   a.setup.seqlen_k,
                   {}};
  mask.visible.assign(static_cast<std::size_t>(mask.batch * mask.heads * mask.rows * mask.keys), 0);
  const std::int64_t lines = mask.batch * mask.heads * row_blocks, columns = key_blocks + 2;
  const std::int64_t words = shape.block_keys / 32;
  struct List {
    std::vector<std::int32_t> counts, indices;
  };
  List lists[2];  // full, partial
  std::vector<std::int32_t> begin, bits;
  for (std::int64_t line = 0; line < lines; ++line) {
    const std::int64_t b = line / row_blocks / mask.heads, h = line / row_blocks % mask.heads;
    const std::int64_t first_row = line % row_blocks * shape.block_rows;
    std::vector<std::int32_t> order(static_cast<std::size_t>(key_blocks));
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(i)))]);
    std::vector<std::int32_t> chosen[2];
    begin.push_back(
        static_cast<std::int32_t>(static_cast<std::int64_t>(bits.size()) / (shape.block_rows * words)));
    for (const std::int32_t block : order) {
      const std::int64_t kind = random.below(3);
      if (kind == 2 || !(kind == 0 ? shape.full : shape.partial)) continue;
      chosen[kind].push_back(block);
      for (std::int64_t i = 0; i < shape.block_rows; ++i)
        for (std::int64_t word = 0; word < words; ++word) {
          // Sparse and empty words, so that some tiles of a partial block show nothing.
          const std::uint64_t drawn = random.below(3) == 0 ? random.bits() & random.bits() : 0;
          const auto seen = kind == 0 ? ~std::uint32_t{0} : static_cast<std::uint32_t>(drawn);
          if (kind == 1) bits.push_back(static_cast<std::int32_t>(seen));
          for (std::int64_t bit = 0; bit < 32; ++bit) {
            const std::int64_t row = first_row + i, key = block * shape.block_keys + word * 32 + bit;
            if (row < mask.rows && key < mask.keys) mask.at(b, h, row, key) = seen >> bit & 1;
          }
        }
    }
    for (int kind = 0; kind < 2; ++kind) {
      lists[kind].counts.push_back(static_cast<std::int32_t>(chosen[kind].size()));
      chosen[kind].resize(static_cast<std::size_t>(columns), -77);
      lists[kind].indices.insert(lists[kind].indices.end(), chosen[kind].begin(), chosen[kind].end());
    }
  }
  a.block_rows = shape.block_rows;
  a.block_keys = shape.block_keys;
  if (shape.full) {
    a.full_kv_num_blocks = Buffer::ints(lists[0].counts, {mask.batch, mask.heads, row_blocks});
    a.full_kv_indices = Buffer::ints(lists[0].indices, {mask.batch, mask.heads, row_blocks, columns});
  }
  if (shape.partial) {
    a.kv_num_blocks = Buffer::ints(lists[1].counts, {mask.batch, mask.heads, row_blocks});
    a.kv_indices = Buffer::ints(lists[1].indices, {mask.batch, mask.heads, row_blocks, columns});
    a.partial_begin = Buffer::ints(begin, {mask.batch, mask.heads, row_blocks});
    const std::int64_t blocks = static_cast<std::int64_t>(bits.size()) / (shape.block_rows * words);
    a.partial_bits = Buffer::ints(bits, {blocks, shape.block_rows, words});
  }
  return mask;
}

}  // namespace fsa::test
