// SPDX-License-Identifier: Apache-2.0
// Gradients of keys and values: 64 rows of accumulators by some columns, through shared memory that held the
// keys or values themselves.
#pragma once

#include "policy/key_work.cuh"
#include "ptx/math.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "tile/swizzle.cuh"

namespace fsa::kernels {

// A gradient tensor and where the copy engine finds it.
struct GradientRows {
  const TensorMap& map;
  void* data;
  int64 stride_batch, stride_row, stride_head;  // elements
  int32 columns;                                // real ones

  FSA_DEVICE uint16* row(const KeyWork& work, int32 key) const {
    return static_cast<uint16*>(data) + work.k_map_batch * stride_batch +
           (static_cast<int64>(work.k_begin) + key) * stride_row + work.kv_head * stride_head;
  }
};

FSA_DEVICE GradientRows grad_key_rows(const BackwardParams& p) {
  return {p.grad_key_map,         p.grad_key, p.grad_key_stride_batch, p.grad_key_stride_row,
          p.grad_key_stride_head, p.head_dim};
}
FSA_DEVICE GradientRows grad_value_rows(const BackwardParams& p) {
  return {p.grad_value_map,         p.grad_value,        p.grad_value_stride_batch, p.grad_value_stride_row,
          p.grad_value_stride_head, p.forward.head_dim_v};
}

// Packs the warpgroup's accumulators into `shared`, the first of its rows and columns in a tile of kTileRows
// rows. No multiply may still read that tile.
template <ElementType kElement, int32 kTileRows, int32 kColumns>
FSA_DEVICE void stage_gradient(uint8* shared, const float (&r)[kColumns / 2], float factor) {
  using Tile = SwizzledTile<kTileRows, kColumns>;
  const int32 thread = own_thread();
  const int32 lane = thread % kWarpThreads, row = thread / kWarpThreads * 16 + lane % 16;
  const uint32 base = shared_address(shared);
#pragma unroll
  for (int32 i = 0; i < kColumns / 2; i += 8)
    ptx::store_matrices(base + Tile::unit_offset(row, i / 4 + lane / 16),
                        ptx::pack<kElement>(r[i] * factor, r[i + 1] * factor),
                        ptx::pack<kElement>(r[i + 2] * factor, r[i + 3] * factor),
                        ptx::pack<kElement>(r[i + 4] * factor, r[i + 5] * factor),
                        ptx::pack<kElement>(r[i + 6] * factor, r[i + 7] * factor));
}

// Writes 64 staged rows from key `key` and column `column` on; by one warpgroup, whose thread 0 must commit.
template <int32 kTileRows, int32 kColumns>
FSA_DEVICE void store_gradient(const GradientRows& to, const KeyWork& work, int32 key, int32 column,
                               const uint8* shared) {
  using Tile = SwizzledTile<kTileRows, kColumns>;
  const int32 rows = work.keys - key;
  if (rows >= kRowsPerWarpgroup) {
    if (own_thread() == 0) {
#pragma unroll
      for (int32 chunk = 0; chunk < Tile::kChunks; ++chunk)
        ptx::store_box(to.map,
                       {column + chunk * kChunkColumns, work.k_begin + key, work.kv_head, work.k_map_batch},
                       shared + chunk * Tile::kChunkBytes);
    }
    return;
  }
  // A box would overrun into the next sequence.
  constexpr int32 kUnits = kColumns / 8;
  for (int32 item = own_thread(); item < rows * kUnits; item += kWarpgroupThreads) {
    const int32 first = column + item % kUnits * 8;
    if (first >= to.columns) continue;
    *reinterpret_cast<uint4*>(to.row(work, key + item / kUnits) + first) =
        *reinterpret_cast<const uint4*>(shared + Tile::unit_offset(item / kUnits, item % kUnits));
  }
}

// Writes 16 rows of accumulators, a warp's, from key `key` on; `rows` of them are there. 64 columns at a time go through 2 KB
// of shared memory. It waits neither for other warps nor for what it has written, and multiplies may be in flight.
template <ElementType kElement, int32 kColumns>
FSA_DEVICE void store_warp_gradient(const GradientRows& to, const KeyWork& work, int32 key, int32 rows,
                                    const float (&r)[kColumns / 2], float factor, uint8* shared) {
  constexpr int32 kRows = 16, kUnits = kChunkColumns / 8, kRowsAtOnce = kWarpThreads / kUnits;
  using Chunk = SwizzledTile<kRows, kChunkColumns>;
  const int32 lane = own_lane(), row = lane / kUnits, unit = lane % kUnits;
  uint16* const first = to.row(work, key + row) + unit * 8;
#pragma unroll
  for (int32 column = 0; column < kColumns; column += kChunkColumns) {
    __syncwarp();  // all lanes have read what was there
#pragma unroll
    for (int32 i = 0; i < kChunkColumns / 2; i += 8) {
      const float* const from = r + column / 2 + i;
      ptx::store_matrices(shared_address(shared) + Chunk::unit_offset(lane % 16, i / 4 + lane / 16),
                          ptx::pack<kElement>(from[0] * factor, from[1] * factor),
                          ptx::pack<kElement>(from[2] * factor, from[3] * factor),
                          ptx::pack<kElement>(from[4] * factor, from[5] * factor),
                          ptx::pack<kElement>(from[6] * factor, from[7] * factor));
    }
    __syncwarp();
#pragma unroll
    for (int32 i = 0; i < kRows; i += kRowsAtOnce) {
      const uint4 values = *reinterpret_cast<const uint4*>(shared + Chunk::unit_offset(row + i, unit));
      if (row + i < rows && column + unit * 8 < to.columns)
        *reinterpret_cast<uint4*>(first + i * to.stride_row + column) = values;
    }
  }
}

// Keys that no row sees. kThreads threads, of which this is `thread`.
template <int32 kThreads>
FSA_DEVICE void clear_gradient(const GradientRows& to, const KeyWork& work, int32 count, int32 thread) {
  const int32 units = to.columns / 8;
  for (int32 item = thread; item < count * units; item += kThreads)
    *reinterpret_cast<uint4*>(to.row(work, work.n_begin + item / units) + item % units * 8) =
        make_uint4(0, 0, 0, 0);
}

// Rows of a packed tensor behind its last sequence. One warp of each CTA.
FSA_DEVICE void clear_gradient_tail(const BackwardParams& params, const GradientRows& to) {
  const ForwardParams& p = params.forward;
  if (p.cu_seqlens_k == nullptr) return;
  const int32 units = to.columns / 8;
  for (int32 row = p.cu_seqlens_k[p.batch] + static_cast<int32>(blockIdx.x); row < params.total_rows_k;
       row += static_cast<int32>(gridDim.x))
    for (int32 head = 0; head < p.num_heads / p.group_size; ++head)
      for (int32 unit = own_lane(); unit < units; unit += kWarpThreads)
        *reinterpret_cast<uint4*>(static_cast<uint16*>(to.data) + row * to.stride_row +
                                  head * to.stride_head + unit * 8) = make_uint4(0, 0, 0, 0);
}

FSA_DEVICE void clear_grad_delta_tail(const BackwardParams& params) {
  const ForwardParams& p = params.forward;
  if (p.cu_seqlens_k == nullptr) return;
  for (int32 row = p.cu_seqlens_k[p.batch] + static_cast<int32>(blockIdx.x); row < params.total_rows_k;
       row += static_cast<int32>(gridDim.x))
    for (int32 head = own_lane(); head < p.num_heads / p.group_size; head += kWarpThreads)
      store_scalar(params.grad_delta, 0, row, head, 0.0f);
}

}  // namespace fsa::kernels
