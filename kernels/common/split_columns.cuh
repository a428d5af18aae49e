// SPDX-License-Identifier: Apache-2.0
// Which columns are too long for one CTA, and into how many parts they are cut. A mask with columns that every row
// sees, such as attention sinks, would otherwise keep a few CTAs busy long after the others.
//
// One block of kSplitThreads threads where the length of a column can be read (block masks: beside backward_prepare, which
// keeps memory busy, every read that waits for another takes 5 us). Else one warp per key tile, grid ceil(key tiles /
// (kSplitThreads / 32)), and the block that is the last to have counted its columns lays out the parts of all. With a
// length L, the larger of least_part and the mean length of most_slots parts, a column of c >= 2 L row tiles gets
// floor(c / L) parts: no part is longer than 2 L, and all parts of cut columns are most_slots at most.
#pragma once

#include "policy/row_tiles.cuh"
#include "ptx/reduce.cuh"
#include "ptx/sync.cuh"

namespace fsa::kernels {

inline constexpr int32 kSplitThreads = 512;
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

// By one warp, which finds out here what needs no column to have been made; false where there is no key tile.
template <class Types>
FSA_DEVICE bool describe_column(const BackwardParams& params, int32 key_tile, KeyWork& work) {
  int32 exists = 0;
  if (lane_id() == 0 && key_tile < Types::Schedule::key_tiles(params)) {
    exists = Types::Schedule::describe(params, key_tile, work) ? 1 : 0;
    if (exists != 0) Types::Rows::describe(params, work);
  }
  return __shfl_sync(0xffffffffu, exists, 0) != 0;
}

FSA_DEVICE int32 parts_of(int32 length, int32 part) {
  return length < 0 ? 0 : length >= 2 * static_cast<int64>(part) ? length / part : 1;
}

// Long units of work come first, the longer the sooner, or a CTA that ends with one works alone. The others come as their
// columns lie, so that those that run together read the same rows, but for the last: these, too, the longer the sooner
// (blocks of density 0.05 to 0.25: the last CTA ends 1 to 2 % after their mean, instead of 4). Turns want the order of the
// columns, for all.
inline constexpr int32 kLongClasses = 6;   // half of L to 2 L, by quarters of L
inline constexpr int32 kSortedLast = 512;  // units: four for each processor
inline constexpr int32 kLastClasses = 64;  // of their lengths
inline constexpr int32 kLongestTold = 1 << 24;  // row tiles: 32 bits hold a class

// 0 is the longest; kLongClasses: not long.
template <class Types>
FSA_DEVICE int32 long_class(int32 length, int32 part) {
  if constexpr (Types::kDeterministic) return kLongClasses;
  int32 quarters = 1;  // of L. By comparisons: a division of 64 bits takes 400 ns
#pragma unroll
  for (int32 more = 2; more < 2 + kLongClasses; ++more)
    quarters += static_cast<int64>(length) * 4 >= static_cast<int64>(part) * more ? 1 : 0;
  return kLongClasses + 1 - quarters;
}

// A read of global memory takes 600 ns, of which a thread would wait for 24 one after the other.
inline constexpr int32 kKeptLengths = 4096;
// Units of whole columns are put in order in shared memory: written to their places by each thread, they took 28 us beside
// backward_prepare; side by side in the end they take 2 to 15.
inline constexpr int32 kKeptUnits = 4096;
inline constexpr int32 kCut = -1;

struct LastUnit {
  int32 key_tile;
  int32 of_class;
};

// What the last block of split_columns keeps.
struct SplitStorage {
  int64 row_tiles[kSplitWarps];
  int32 slots;                     // of parts of cut columns
  int32 long_units[kLongClasses];  // how many; then where the next of each class goes
  int32 last_units[kLastClasses];
  LastUnit last[kSortedLast];
  int32 lengths[kKeptLengths];
  int32 units[kKeptUnits];  // key tiles, or kCut
};

// Counts become the places where each class begins. By one warp.
template <int32 kCount>
FSA_DEVICE void place_classes(int32 (&counts)[kCount], int32 begin) {
  constexpr int32 kPerLane = ceil_div(kCount, kWarpThreads);
  const int32 lane = lane_id();
  int32 own[kPerLane], sum = 0;
#pragma unroll
  for (int32 i = 0; i < kPerLane; ++i) {
    const int32 at = lane * kPerLane + i;
    own[i] = at < kCount ? counts[at] : 0;
    sum += own[i];
  }
  int32 before = sum;
#pragma unroll
  for (int32 distance = 1; distance < kWarpThreads; distance *= 2) {
    const int32 other = __shfl_sync(0xffffffffu, before, max_of(lane - distance, 0));
    if (lane >= distance) before += other;
  }
  before += begin - sum;
#pragma unroll
  for (int32 i = 0; i < kPerLane; ++i) {
    const int32 at = lane * kPerLane + i;
    if (at < kCount) counts[at] = before;
    before += own[i];
  }
}

// By one block. length_of(i) is the length of column i, -1 where there is none.
template <class Types, class LengthOf>
FSA_DEVICE void lay_out_parts(const BackwardParams& params, LengthOf length_of) {
  __shared__ SplitStorage storage;
  const int32 thread = thread_id(), warp = thread / kWarpThreads;
  const int32 key_tiles = Types::Schedule::key_tiles(params);
  for (int32 i = thread; i < params.forward.batch * params.forward.num_heads; i += kSplitThreads)
    params.sums_done[i] = 0;
  if (thread == 0) storage.slots = 0;
  for (int32 i = thread; i < kLongClasses; i += kSplitThreads) storage.long_units[i] = 0;
  for (int32 i = thread; i < kLastClasses; i += kSplitThreads) storage.last_units[i] = 0;

  int64 row_tiles = 0;
#pragma unroll 4
  for (int32 i = thread; i < key_tiles; i += kSplitThreads) {
    const int32 length = length_of(i);
    if (i < kKeptLengths)
      storage.lengths[i] = length;
    else
      params.column_lengths[i] = length;
    row_tiles += max_of(length, 0);
  }
  row_tiles = sum_of_warp(row_tiles);
  if (lane_id() == 0) storage.row_tiles[warp] = row_tiles;
  __syncthreads();
  row_tiles = 0;
  for (int32 i = 0; i < kSplitWarps; ++i) row_tiles += storage.row_tiles[i];
  const int64 mean = (row_tiles + params.most_slots - 1) / params.most_slots;
  const int32 part = static_cast<int32>(mean > params.least_part ? mean : params.least_part);

  const auto parts_of_column = [&](int32 index, int32& length, int32& of_class) {
    length = index < kKeptLengths ? storage.lengths[index] : params.column_lengths[index];
    const int32 parts = parts_of(length, part);
    of_class = long_class<Types>(parts > 1 ? length / parts : length, part);
    return parts;
  };
  const auto write_column = [&](int32 at, int32 index) {
    params.column_parts[at] = {index, 0, kRestOfColumn, -1};
  };
  const auto write_unit = [&](int32 at, int32 index) {
    if (at < kKeptUnits)
      storage.units[at] = index;
    else if (index != kCut)
      write_column(at, index);
  };
  const auto write_parts = [&](int32 at, int32 index, int32 length, int32 parts) {
    if (parts == 1) return write_unit(at, index);
    const int32 slot = atomicAdd(&storage.slots, parts);
    const int32 least = length / parts, longer = length - least * parts;
    for (int32 i = 0; i < parts; ++i) {
      const int32 begin = least * i + min_of(i, longer), end = begin + least + (i < longer ? 1 : 0);
      write_unit(at + i, kCut);
      params.column_parts[at + i] = {index, begin, i + 1 < parts ? end - begin : kRestOfColumn, slot + i};
      params.split_columns[slot + i] = {index, i == 0 ? parts : 0};
    }
    atomicAdd(  // so that it counts as one key tile
        params.sums_done + Types::Schedule::place_of(params, index).batch_head * params.forward.group_size,
        (1 - parts) * kBackwardConsumers);
  };

  // Of those that are not long each thread has a range.
  const int32 range = ceil_div(key_tiles, kSplitThreads);
  const int32 first = thread * range, last = min_of(key_tiles, first + range);
  int32 length, of_class, own_short = 0, all_short, all_long = 0;
  for (int32 index = first; index < last; ++index) {
    const int32 parts = parts_of_column(index, length, of_class);
    if (of_class == kLongClasses)
      own_short += parts;
    else
      atomicAdd(&storage.long_units[of_class], parts);
  }
  int32 at = sum_before(own_short, all_short);
  for (int32 i = 0; i < kLongClasses; ++i) all_long += storage.long_units[i];
  __syncthreads();
  if (warp == 0) place_classes(storage.long_units, 0);
  __syncthreads();
  const int32 units = all_long + all_short;
  const int32 sorted = Types::kDeterministic ? 0 : min_of(all_short, kSortedLast),
              sorted_from = units - sorted;
  at += all_long;
  for (int32 index = first; index < last; ++index) {
    const int32 parts = parts_of_column(index, length, of_class);
    if (of_class != kLongClasses || parts == 0) continue;
    if (at < sorted_from) {
      write_parts(at, index, length, parts);
    } else {
      const uint32 shorter = static_cast<uint32>(min_of(length, kLongestTold)) * (2 * kLastClasses) /
                             static_cast<uint32>(part);
      const int32 of_last = max_of(kLastClasses - 1 - static_cast<int32>(shorter), 0);
      storage.last[at - sorted_from] = {index, of_last};
      atomicAdd(&storage.last_units[of_last], 1);
    }
    at += parts;
  }
  // The others side by side, so that they stay about as they lie.
  for (int32 index = thread; index < key_tiles; index += kSplitThreads) {
    const int32 parts = parts_of_column(index, length, of_class);
    if (of_class != kLongClasses)
      write_parts(atomicAdd(&storage.long_units[of_class], parts), index, length, parts);
  }
  __syncthreads();
  if (warp == 0) place_classes(storage.last_units, sorted_from);
  __syncthreads();
  for (int32 i = thread; i < sorted; i += kSplitThreads) {
    const LastUnit unit = storage.last[i];
    write_unit(atomicAdd(&storage.last_units[unit.of_class], 1), unit.key_tile);
  }
  __syncthreads();
  for (int32 at = thread; at < min_of(units, kKeptUnits); at += kSplitThreads)
    if (storage.units[at] != kCut) write_column(at, storage.units[at]);
  if (thread == 0) {
    params.part_counts->parts = units;
    params.part_counts->slots = storage.slots;
  }
}

template <class Types>
FSA_DEVICE void split_by_lengths(const BackwardParams& params) {
  ptx::wait_for_kernel_before();
  lay_out_parts<Types>(params, [&](int32 key_tile) {
    KeyWork work;
    return Types::Schedule::describe(params, key_tile, work) ? Types::Rows::length(params, work) : -1;
  });
}

template <class Types>
FSA_DEVICE void split_by_counting(const BackwardParams& params) {
  __shared__ KeyWork works[kSplitWarps];
  __shared__ int32 arrived;
  const int32 thread = thread_id(), warp = thread / kWarpThreads;
  const int32 own = static_cast<int32>(blockIdx.x) * kSplitWarps + warp;
  const bool exists = describe_column<Types>(params, own, works[warp]);
  ptx::wait_for_kernel_before();
  __syncwarp();
  if (own < Types::Schedule::key_tiles(params)) {
    const int32 length = exists ? sum_of_warp(Types::Rows::count(params, works[warp], lane_id())) : -1;
    if (lane_id() == 0) params.column_lengths[own] = length;
  }
  ptx::fence_global();
  __syncthreads();
  if (thread == 0) arrived = atomicAdd(&params.part_counts->blocks, 1);
  __syncthreads();
  if (arrived != static_cast<int32>(gridDim.x) - 1) return;
  ptx::fence_global();
  lay_out_parts<Types>(params, [&](int32 key_tile) { return params.column_lengths[key_tile]; });
}

template <class Types>
FSA_DEVICE void split_columns(const BackwardParams& params) {
  ptx::admit_next_kernel();  // whatever comes next runs beside this
  if constexpr (Types::Rows::kReadsLengths)
    split_by_lengths<Types>(params);
  else
    split_by_counting<Types>(params);
}

}  // namespace fsa::kernels
