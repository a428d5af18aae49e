// SPDX-License-Identifier: Apache-2.0
// Which columns are too long for one CTA, and into how many parts they are cut. A mask with columns that every row
// sees, such as attention sinks, would otherwise keep a few CTAs busy long after the others.
//
// One warp per key tile: blocks of kSplitThreads threads, grid ceil(key tiles / (kSplitThreads / 32)). The block that is
// the last to have counted its columns lays out the parts of all. With a length L, the larger of least_part and the
// mean length of most_slots parts, a column of c >= 2 L row tiles gets floor(c / L) parts: no part is longer than
// 2 L, and all parts of cut columns are most_slots at most. Units of work are handed out the longest first.
#pragma once

#include "policy/row_tiles.cuh"
#include "ptx/reduce.cuh"
#include "ptx/sync.cuh"

namespace fsa::kernels {

inline constexpr int32 kSplitThreads = 256;
inline constexpr int32 kSplitWarps = kSplitThreads / kWarpThreads;

template <class T>
FSA_DEVICE T sum_of_warp(T value) {
#pragma unroll
  for (int32 distance = kWarpThreads / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Each thread's sum over the threads before it, in a block of kSplitThreads; `total` is that over all.
FSA_DEVICE int32 sum_before(int32 value, int32& total) {
  __shared__ int32 of_warp[kSplitWarps];
  const int32 lane = lane_id(), warp = thread_id() / kWarpThreads;
  int32 sum = value;
#pragma unroll
  for (int32 distance = 1; distance < kWarpThreads; distance *= 2) {
    const int32 other = __shfl_sync(0xffffffffu, sum, max_of(lane - distance, 0));
    if (lane >= distance) sum += other;
  }
  if (lane == kWarpThreads - 1) of_warp[warp] = sum;
  __syncthreads();
  total = 0;
  int32 before = sum - value;
  for (int32 i = 0; i < kSplitWarps; ++i) {
    if (i < warp) before += of_warp[i];
    total += of_warp[i];
  }
  __syncthreads();
  return before;
}

// By one warp: row tiles of a column, -1 where there is no key tile.
template <class Types>
FSA_DEVICE int32 column_length(const BackwardParams& params, int32 key_tile, KeyWork& work) {
  __syncwarp();
  int32 exists = 0;
  if (lane_id() == 0) {
    exists = Types::Schedule::describe(params, key_tile, work);
    if (exists != 0) Types::Rows::describe(params, work);
  }
  __syncwarp();
  if (__shfl_sync(0xffffffffu, exists, 0) == 0) return -1;
  return sum_of_warp(Types::Rows::count(params, work, lane_id()));
}

FSA_DEVICE int32 parts_of(int32 length, int32 part) {
  return length < 0 ? 0 : length >= 2 * static_cast<int64>(part) ? length / part : 1;
}

// Units of work come the longer the sooner, or CTAs that end with a long one work alone: by quarters of L, and as the
// columns lie within a class, so that neighbours read the same rows. Turns want the order of the columns.
inline constexpr int32 kLengths = 8;

template <class Types>
FSA_DEVICE int32 length_class(int32 length, int32 part) {
  if constexpr (Types::kDeterministic) return 0;
  return kLengths - 1 -
         min_of(kLengths - 1, static_cast<int32>(static_cast<int64>(max_of(length, 0)) * 4 / part));
}

template <class Types>
FSA_DEVICE void split_columns(const BackwardParams& params) {
  __shared__ KeyWork works[kSplitWarps];
  __shared__ int64 of_warp[kSplitWarps];
  __shared__ int32 arrived;
  ptx::admit_next_kernel();  // the main kernel sets up while the last block lays out the parts
  const int32 thread = thread_id(), warp = thread / kWarpThreads;
  const int32 key_tiles = Types::Schedule::key_tiles(params);
  const int32 own = static_cast<int32>(blockIdx.x) * kSplitWarps + warp;
  if (own < key_tiles) {
    const int32 length = column_length<Types>(params, own, works[warp]);
    if (lane_id() == 0) params.column_lengths[own] = length;
  }
  ptx::fence_global();
  __syncthreads();
  if (thread == 0) arrived = atomicAdd(&params.part_counts->blocks, 1);
  __syncthreads();
  if (arrived != static_cast<int32>(gridDim.x) - 1) return;
  ptx::fence_global();

  int64 row_tiles = 0;
  for (int32 i = thread; i < key_tiles; i += kSplitThreads) row_tiles += max_of(params.column_lengths[i], 0);
  row_tiles = sum_of_warp(row_tiles);
  if (lane_id() == 0) of_warp[warp] = row_tiles;
  __syncthreads();
  row_tiles = 0;
  for (int32 i = 0; i < kSplitWarps; ++i) row_tiles += of_warp[i];
  const int64 mean = (row_tiles + params.most_slots - 1) / params.most_slots;
  const int32 part = static_cast<int32>(mean > params.least_part ? mean : params.least_part);

  // Each thread lays out the columns of a range.
  const int32 range = ceil_div(key_tiles, kSplitThreads);
  const int32 first = thread * range, last = min_of(key_tiles, first + range);
  int32 slots = 0, counts[kLengths] = {};
  for (int32 index = first; index < last; ++index) {
    const int32 length = params.column_lengths[index], parts = parts_of(length, part);
    if (parts > 1) slots += parts;
#pragma unroll
    for (int32 i = 0; i < kLengths; ++i)
      if (i == length_class<Types>(length / max_of(parts, 1), part)) counts[i] += parts;
  }
  int32 all_slots, units = 0;
  int32 slot = sum_before(slots, all_slots);
#pragma unroll
  for (int32 i = 0; i < kLengths; ++i) {  // where the thread's own begin
    int32 all;
    counts[i] = units + sum_before(counts[i], all);
    units += all;
  }
  for (int32 index = first; index < last; ++index) {
    const int32 length = params.column_lengths[index], parts = parts_of(length, part);
    int32 at = 0;
#pragma unroll
    for (int32 i = 0; i < kLengths; ++i) {
      if (i != length_class<Types>(length / max_of(parts, 1), part)) continue;
      at = counts[i];
      counts[i] += parts;
    }
    for (int32 i = 0; i < parts; ++i) {
      const int32 begin = static_cast<int32>(static_cast<int64>(length) * i / parts);
      const int32 end = static_cast<int32>(static_cast<int64>(length) * (i + 1) / parts);
      params.column_parts[at + i] = {index, begin, i + 1 < parts ? end - begin : kRestOfColumn,
                                     parts > 1 ? slot + i : -1};
      if (parts > 1) params.split_columns[slot + i] = {index, i == 0 ? parts : 0};
    }
    if (parts > 1) {
      slot += parts;
      atomicAdd(  // so that it counts as one key tile
          params.sums_done + Types::Schedule::place_of(params, index).batch_head * params.forward.group_size,
          (1 - parts) * kBackwardConsumers);
    }
  }
  if (thread == 0) {
    params.part_counts->parts = units;
    params.part_counts->slots = all_slots;
  }
}

}  // namespace fsa::kernels
