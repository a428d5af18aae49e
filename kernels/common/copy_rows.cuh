// SPDX-License-Identifier: Apache-2.0
// Copies a [batch, rows, heads, dim] tensor of 2-byte elements from any strides, one warp a row. The copy engine takes pitches that are multiples of 16 bytes; a tensor with others goes through a padded copy,
// whose columns beyond `dim` are zeroed so that 16-byte units hold no foreign data.
#pragma once

#include "core/base.cuh"
#include "core/params.h"

namespace fsa::kernels {

FSA_DEVICE void copy_rows(const CopyRowsParams& params) {
  const int64 lines = params.batch * params.rows * params.heads;
  const int64 warps = static_cast<int64>(gridDim.x) * blockDim.x / kWarpThreads;
  for (int64 line = (static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpThreads; line < lines;
       line += warps) {
    const int64 head = line % params.heads, row = line / params.heads % params.rows;
    const int64 batch = line / params.heads / params.rows;
    const uint16* const from = static_cast<const uint16*>(params.from) + batch * params.from_stride_batch +
                               row * params.from_stride_row + head * params.from_stride_head;
    uint16* const to = static_cast<uint16*>(params.to) + batch * params.to_stride_batch +
                       row * params.to_stride_row + head * params.to_stride_head;
    for (int32 column = lane_id(); column < params.to_columns; column += kWarpThreads)
      to[column] = column < params.dim ? from[column * params.from_stride_dim] : uint16{0};
  }
}

}  // namespace fsa::kernels
