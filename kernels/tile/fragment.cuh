// SPDX-License-Identifier: Apache-2.0
// Which element of a 64 x N accumulator a thread of the warpgroup holds in register i.
//
// Warp w holds rows 16 w to 16 w + 15. Registers come in fours: {row, row, row + 8, row + 8} by {column,
// column + 1}, and each four is eight columns further. The same order, packed in pairs, is the A operand of a
// following multiply: registers 8 k to 8 k + 7 are its inner columns 16 k to 16 k + 15.
#pragma once

#include "core/base.cuh"

namespace fsa::kernels {

inline constexpr int32 kRowsPerThread = 2;

// Which of the thread's two rows.
constexpr int32 fragment_slot(int32 i) { return i >> 1 & 1; }
constexpr int32 fragment_row(int32 thread, int32 slot) {
  return thread / 32 * 16 + thread % 32 / 4 + 8 * slot;
}
constexpr int32 fragment_column(int32 thread, int32 i) { return i / 4 * 8 + thread % 4 * 2 + (i & 1); }

// Over the four threads that share a row.
template <class Combine>
FSA_DEVICE float reduce_row(float value, Combine combine) {
  value = combine(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return combine(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

}  // namespace fsa::kernels
