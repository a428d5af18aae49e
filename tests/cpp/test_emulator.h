// SPDX-License-Identifier: Apache-2.0
// What the tests that run device code on the CPU have in common.
#pragma once

#include <cstddef>
#include <random>
#include <vector>

#include "core/params.h"
#include "ptx/tma.cuh"

namespace fsa::test {

using kernels::int32;
using kernels::int64;
using kernels::uint16;

// [batch, rows, heads, columns]
template <class T>
struct Tensor {
  int32 rows, heads, columns;
  std::vector<T> values;

  Tensor(int32 batch, int32 rows_, int32 heads_, int32 columns_, T fill = T())
      : rows(rows_),
        heads(heads_),
        columns(columns_),
        values(static_cast<std::size_t>(batch) * rows * heads * columns, fill) {}
  T& at(int32 b, int32 row, int32 head, int32 column) {
    return values[((static_cast<std::size_t>(b) * rows + row) * heads + head) * columns + column];
  }
  int64 stride_batch() const { return static_cast<int64>(rows) * heads * columns; }
  int64 stride_row() const { return static_cast<int64>(heads) * columns; }
  int64 stride_head() const { return columns; }

  // In boxes of 64 columns by `box_rows` rows.
  kernels::TensorMap map(int32 batch, int32 box_rows = 64) {
    return kernels::ptx::tensor_map({values.data(),
                                     {columns, rows, heads, batch},
                                     {1, stride_row(), stride_head(), stride_batch()},
                                     box_rows});
  }
  kernels::ScalarOperand operand() {
    return {values.data(), stride_batch(), stride_row(), stride_head(), kernels::ScalarType::float32, 0};
  }
};

constexpr uint16 kNan = 0x7fc0;  // of bf16

// The lists of a block mask: a third of the blocks is absent, a third full, a third partial. One mask for all batch
// entries.
class RandomBlocks {
 public:
  static constexpr int32 kBlock = 128;  // rows and keys of a block

  RandomBlocks(std::mt19937& random, int32 heads, int32 seqlen_q, int32 seqlen_k)
      : row_blocks((seqlen_q + kBlock - 1) / kBlock), key_blocks((seqlen_k + kBlock - 1) / kBlock) {
    const int32 lists = heads * row_blocks;
    partial_count_.assign(lists, 0);
    full_count_.assign(lists, 0);
    bits_begin_.assign(lists, 0);
    partial_indices_.assign(lists * key_blocks, -1);
    full_indices_.assign(lists * key_blocks, -1);
    for (int32 list = 0; list < lists; ++list) {
      bits_begin_[list] = static_cast<int32>(bits_.size()) / (kBlock * kBlock / 32);
      for (int32 c = key_blocks - 1; c >= 0; --c) {
        const kernels::uint32 kind = random() % 3;
        if (kind == 1) full_indices_[list * key_blocks + full_count_[list]++] = c;
        if (kind == 2) {
          partial_indices_[list * key_blocks + partial_count_[list]++] = c;
          for (int32 i = 0; i < kBlock * kBlock / 32; ++i)
            bits_.push_back(static_cast<kernels::uint32>(random()));
        }
      }
    }
  }

  bool listed(int32 head, int32 row, int32 key) const {
    const int32 list = head * row_blocks + row / kBlock, c = key / kBlock;
    for (int32 i = 0; i < full_count_[list]; ++i)
      if (full_indices_[list * key_blocks + i] == c) return true;
    for (int32 i = 0; i < partial_count_[list]; ++i)
      if (partial_indices_[list * key_blocks + i] == c) {
        const int32 line = (bits_begin_[list] + i) * kBlock + row % kBlock;
        return (bits_[line * (kBlock / 32) + key % kBlock / 32] >> key % 32 & 1) != 0;
      }
    return false;
  }

  // As the kernels read them; points into this.
  kernels::BlockLists lists() const {
    kernels::BlockLists lists = {};
    lists.partial_count = partial_count_.data();
    lists.partial_indices = partial_indices_.data();
    lists.full_count = full_count_.data();
    lists.full_indices = full_indices_.data();
    lists.bits_begin = bits_begin_.data();
    lists.bits = bits_.data();
    lists.partial_stride_head = lists.full_stride_head = row_blocks;
    lists.partial_stride_row = lists.full_stride_row = 1;
    lists.partial_indices_stride_head = lists.full_indices_stride_head = int64{row_blocks} * key_blocks;
    lists.partial_indices_stride_row = lists.full_indices_stride_row = key_blocks;
    lists.block_rows = lists.block_keys = kBlock;
    return lists;
  }

  const int32 row_blocks, key_blocks;

 private:
  std::vector<int32> partial_count_, full_count_, partial_indices_, full_indices_, bits_begin_;
  std::vector<kernels::uint32> bits_;
};

}  // namespace fsa::test
