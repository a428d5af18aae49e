// SPDX-License-Identifier: Apache-2.0
// What the tests that run device code on the CPU have in common.
#pragma once

#include <cstddef>
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

}  // namespace fsa::test
