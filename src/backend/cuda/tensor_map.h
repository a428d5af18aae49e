// SPDX-License-Identifier: Apache-2.0
// How the copy engine sees a tensor.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "kernels/core/params.h"

namespace fsa::cuda {

struct MapExtents {
  std::int64_t columns, rows, heads, batch;
};

// Boxes of 64 columns by `box_rows` rows of one head; what lies beyond the extents reads as zero and is not
// written. The address and the strides are multiples of 16 bytes. `name` is for the error.
kernels::TensorMap encode_tensor_map(const char* name, const Operand& operand, const MapExtents& extents,
                                     int box_rows);

}  // namespace fsa::cuda
