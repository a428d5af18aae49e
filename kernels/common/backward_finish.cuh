// SPDX-License-Identifier: Apache-2.0
// After the backward kernel: float32 sums become gradients of query, alpha and sink.
#pragma once

#include "policy/key_work.cuh"
#include "policy/scalar.cuh"
#include "ptx/math.cuh"
#include "ptx/reduce.cuh"
#include "ptx/sync.cuh"
#include "tile/fragment.cuh"
#include "tile/swizzle.cuh"

namespace fsa::kernels {

// Nothing is added to the sums of this head any more. `work` is of one of its row tiles.
template <class Types>
FSA_DEVICE bool sums_complete(const BackwardParams& params, const WorkTile& work) {
  const ForwardParams& p = params.forward;
  const int32 keys = p.cu_seqlens_k ? p.cu_seqlens_k[work.sequence + 1] - work.k_begin : p.max_seqlen_k;
  const int32 of_group = work.sequence * p.num_heads + work.head / p.group_size * p.group_size;
  return ptx::load_acquire(params.sums_done + of_group) ==
         ceil_div(keys, Types::kBlockN) * kBackwardConsumers;
}

// Launched without waiting for the backward kernel: where sums are complete, blocks run beside its last key tiles, on
// processors that have none. The last block waits whatever happens, so that who comes after this kernel comes after both.
//
// One block of 2 block_m threads per (row tile, head, sequence): grid (largest number of row tiles, heads,
// batch). A warpgroup takes 64 rows, in the order in which the accumulators held them. Rows beyond the used
// length, and those behind the last packed sequence, become zero.
template <class Types>
FSA_DEVICE void backward_finish(const BackwardParams& params) {
  constexpr int32 kBlockM = Types::kBlockM, kUnits = Types::kDim / 8;
  using Tile = SwizzledTile<kRowsPerWarpgroup, Types::kDim>;
  const ForwardParams& p = params.forward;
  alignas(kSharedAlignment) __shared__ uint8 staged[kBlockM / kRowsPerWarpgroup][Tile::kBytes];
  const int32 tile = static_cast<int32>(blockIdx.x), head = static_cast<int32>(blockIdx.y);
  const int32 part = thread_id() / kWarpgroupThreads, thread = warpgroup_thread();
  const int32 warp = thread / kWarpThreads, lane = lane_id();
  WorkTile work;
  describe_sequence(p, static_cast<int32>(blockIdx.z), head, work);
  ptx::admit_next_kernel();
  if (blockIdx.x + 1 == gridDim.x && blockIdx.y + 1 == gridDim.y && blockIdx.z + 1 == gridDim.z)
    ptx::wait_for_kernel_before();

  if (blockIdx.z == 0 && p.cu_seqlens_q != nullptr) {
    const int32 begin = p.cu_seqlens_q[p.batch] + tile;
    for (int32 row = begin; row < p.total_rows_q; row += static_cast<int32>(gridDim.x)) {
      for (int32 unit = thread_id(); unit < params.head_dim / 8; unit += 2 * kBlockM)
        *reinterpret_cast<uint4*>(static_cast<uint16*>(params.grad_query) +
                                  row * params.grad_query_stride_row + head * params.grad_query_stride_head +
                                  unit * 8) = make_uint4(0, 0, 0, 0);
      if constexpr (Types::kPairGate)
        if (thread_id() == 0) store_scalar(params.grad_alpha, 0, row, head, 0.0f);
    }
  }
  if (tile * kBlockM >= work.rows) return;
  if (!sums_complete<Types>(params, work)) ptx::wait_for_kernel_before();
  const int64 number = row_tile_number<kBlockM>(params, work, head, tile);

  // Warps of the backward kernel: [2 halves, of rows or of columns][4][units of eight columns].
  constexpr int32 kHalfUnits = Types::kQueryColumns / 8;
  const float4* const sums =
      reinterpret_cast<const float4*>(params.grad_query_sum) + number * (kBlockM * Types::kDim / 4) + lane;
  // Nobody has stored anything. The sums are read without waiting for that.
  const bool empty = params.turns != nullptr && params.turns[number * kBackwardWarps] == 0;
  const auto sum_of = [&](int32 unit) {
    const int32 half = kBlockM == kRowsPerWarpgroup ? unit / kHalfUnits : part;
    const float4 sum = sums[((half * 4 + warp) * kHalfUnits + unit % kHalfUnits) * kWarpThreads];
    return empty ? make_float4(0, 0, 0, 0) : sum;
  };
  const uint32 base = shared_address(staged[part]);
  const float scale = params.softmax_scale;
  constexpr int32 kUnitsAtOnce = 8;  // asked for before the first is used
#pragma unroll
  for (int32 first = 0; first < kUnits; first += kUnitsAtOnce) {
    float4 read[kUnitsAtOnce];
#pragma unroll
    for (int32 i = 0; i < kUnitsAtOnce; ++i) read[i] = sum_of(first + i);
#pragma unroll
    for (int32 i = 0; i < kUnitsAtOnce; i += 2) {
      const float4 a = read[i], b = read[i + 1];
      ptx::store_matrices(base + Tile::unit_offset(warp * 16 + lane % 16, first + i + lane / 16),
                          ptx::pack<Types::kElement>(a.x * scale, a.y * scale),
                          ptx::pack<Types::kElement>(a.z * scale, a.w * scale),
                          ptx::pack<Types::kElement>(b.x * scale, b.y * scale),
                          ptx::pack<Types::kElement>(b.z * scale, b.w * scale));
    }
  }
  __syncwarp();
  const int32 units = params.head_dim / 8;
  for (int32 item = lane; item < 16 * kUnits; item += kWarpThreads) {
    const int32 unit = item % kUnits, row = warp * 16 + item / kUnits;
    const int32 position = tile * kBlockM + part * kRowsPerWarpgroup + row;
    if (unit >= units || position >= work.rows) continue;
    uint4 value = *reinterpret_cast<const uint4*>(staged[part] + Tile::unit_offset(row, unit));
    if (position >= work.seqlen_q) value = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(static_cast<uint16*>(params.grad_query) +
                              work.q_map_batch * params.grad_query_stride_batch +
                              (static_cast<int64>(work.q_begin) + position) * params.grad_query_stride_row +
                              head * params.grad_query_stride_head + unit * 8) = value;
  }

  if constexpr (Types::kPairGate) {
    const int32 position = tile * kBlockM + thread_id();
    if (thread_id() < kBlockM && position < work.rows)
      store_scalar(params.grad_alpha, work.q_map_batch, static_cast<int64>(work.q_begin) + position, head,
                   position < work.seqlen_q
                       ? params.grad_alpha_sum[number * kBlockM + row_vector_position(thread_id())] * scale
                       : 0.0f);
  }
}

inline constexpr int32 kSumSinkThreads = 256;

// One block of so many threads per head.
template <class Types>
FSA_DEVICE void sum_sink(const BackwardParams& params) {
  __shared__ float of_thread[kSumSinkThreads];
  const int32 head = static_cast<int32>(blockIdx.x), thread = thread_id();
  float sum = 0;
  for (int32 sequence = 0; sequence < params.forward.batch; ++sequence) {
    WorkTile work;
    describe_sequence(params.forward, sequence, head, work);
    const int64 first = row_tile_number<Types::kBlockM>(params, work, head, 0);
    for (int32 tile = thread; tile < ceil_div(work.rows, Types::kBlockM); tile += kSumSinkThreads)
      sum += params.grad_sink_sum[first + tile];
  }
  of_thread[thread] = sum;
  for (int32 half = kSumSinkThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) of_thread[thread] += of_thread[thread + half];
  }
  if (thread == 0) store_scalar(params.grad_sink, 0, 0, head, of_thread[0]);
}

}  // namespace fsa::kernels
