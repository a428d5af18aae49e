// SPDX-License-Identifier: Apache-2.0
// The columns of a block mask from its rows: for each key block the row blocks that list it, from top to
// bottom. The order of the row lists does not matter.
//
// One block of kListThreads threads per kColumnBlocks key blocks: grid (ceil(key blocks / kColumnBlocks), heads
// or 1 where the mask is shared, batch likewise). Every list is read twice: for bits of rows by key blocks,
// whose transpose says where in its column an entry stands, and for the entries. Ranks count keys in use: where
// seqused_k is given each batch entry needs columns of its own.
#pragma once

#include "policy/column_parts.cuh"
#include "policy/key_work.cuh"
#include "policy/list_tiles.cuh"

namespace fsa::kernels {

inline constexpr int32 kListThreads = 512;
inline constexpr int32 kListRows = 1024;  // row blocks at a time

// Key tiles of the key blocks from `first` on.
template <int32 kBlockN>
class BlockTiles {
 public:
  FSA_DEVICE BlockTiles(const ForwardParams& p, const WorkTile& work, int32 first)
      : keys_(p.blocks.block_keys), seqlen_(work.seqlen_k), first_(first) {
    const int32 whole = min_of(max_of(seqlen_ / keys_ - first, 0), kColumnBlocks);
    whole_ = whole == kColumnBlocks ? 0xffffffffu : (1u << whole) - 1;
    next_ = whole;
  }

  FSA_DEVICE int32 of_block(int32 block) const {
    return max_of(0, ceil_div(min_of(keys_, seqlen_ - block * keys_), kBlockN));
  }
  // Of a set of key blocks, a bit each.
  FSA_DEVICE int32 of_bits(uint32 bits) const {
    int32 count = __popc(bits & whole_) * ceil_div(keys_, kBlockN);
    if (next_ < kColumnBlocks && (bits >> next_ & 1) != 0) count += of_block(first_ + next_);
    return count;
  }

 private:
  int32 keys_, seqlen_, first_;
  uint32 whole_;  // blocks without an unused key
  int32 next_;    // the block behind them
};

// The lists of every kWarps-th row block from `row` on, for one warp: counts and first entries of all are asked for before
// any is used (16 rows one after the other took 19 us).
inline constexpr int32 kRowsAtOnce = 4;

template <int32 kCount>
class RowsOfWarp {
 public:
  FSA_DEVICE RowsOfWarp(const ForwardParams& p, const WorkTile& work, int32 top, int32 row, int32 step,
                        int32 rows) {
#pragma unroll
    for (int32 i = 0; i < kCount; ++i) {
      const int32 own = row + i * step;
      const BlockList none = {own, nullptr, 0};
      lists_[i][0] = own < rows ? partial_list(p, work, top + own) : none;
      lists_[i][1] = own < rows ? full_list(p, work, top + own) : none;
    }
#pragma unroll
    for (int32 i = 0; i < kCount; ++i)
#pragma unroll
      for (int32 which = 0; which < 2; ++which)
        if (lane_id() < lists_[i][which].count) first_[i][which] = lists_[i][which].indices[lane_id()];
  }

  // f(0 partial or 1 full, entry, its place in the list) for this lane's entries of row number `i`.
  template <class Function>
  FSA_DEVICE void for_each(int32 i, Function f) const {
#pragma unroll
    for (int32 which = 0; which < 2; ++which) {
      const BlockList& list = lists_[i][which];
      for (int32 at = lane_id(); at < list.count; at += kWarpThreads)
        f(which, at < kWarpThreads ? first_[i][which] : list.indices[at], at);
    }
  }

 private:
  BlockList lists_[kCount][2];
  int32 first_[kCount][2];
};

template <int32 kBlockN>
FSA_DEVICE void block_columns(const BackwardParams& params) {
  constexpr int32 kWarps = kListThreads / kWarpThreads;
  __shared__ uint32 row_bits[kListRows];     // a word per row block: which of the key blocks it lists
  __shared__ uint32 column_bits[kListRows];  // the transpose of 32 words at a time
  __shared__ int32 before[kListRows];    // as column_bits: entries of the column above those 32 row blocks
  __shared__ int32 to_right[kListRows];  // key tiles in the row block's lists right of the key blocks
  const ForwardParams& p = params.forward;
  clear_part_counts(params);
  const int32 warp = thread_id() / kWarpThreads, lane = lane_id();
  const int32 key_blocks = ceil_div(p.max_seqlen_k, p.blocks.block_keys);
  const int32 first = static_cast<int32>(blockIdx.x) * kColumnBlocks;
  WorkTile work;
  describe_sequence(p, static_cast<int32>(blockIdx.z), static_cast<int32>(blockIdx.y), work);
  const BlockTiles<kBlockN> tiles(p, work, first);
  const int64 list = work.sequence * params.list_stride_batch + work.head * params.list_stride_head + first;
  int32 count = 0;  // of this lane's column, in the first warp

  for (int32 top = 0; top < params.list_capacity; top += kListRows) {
    const int32 rows = min_of(kListRows, params.list_capacity - top);
    const int32 words = ceil_div(rows, kWarpThreads) * kWarpThreads;
    for (int32 row = warp; row < words; row += kWarps * kRowsAtOnce) {
      RowsOfWarp<kRowsAtOnce> of(p, work, top, row, kWarps, rows);
#pragma unroll
      for (int32 i = 0; i < kRowsAtOnce; ++i) {
        if (row + i * kWarps >= words) break;
        uint32 bits = 0;
        int32 right = 0;
        of.for_each(i, [&](int32, int32 entry, int32) {
          const int32 block = entry - first;
          if (block >= 0 && block < kColumnBlocks) bits |= 1u << block;
          if (block >= kColumnBlocks) right += tiles.of_block(first + block);
        });
#pragma unroll
        for (int32 distance = kWarpThreads / 2; distance > 0; distance /= 2) {
          bits |= __shfl_xor_sync(0xffffffffu, bits, distance);
          right += __shfl_xor_sync(0xffffffffu, right, distance);
        }
        if (lane == 0) {
          row_bits[row + i * kWarps] = bits;
          to_right[row + i * kWarps] = right;
        }
      }
    }
    __syncthreads();

    for (int32 group = warp; group < words / kWarpThreads; group += kWarps) {
      const uint32 bits = row_bits[group * kWarpThreads + lane];
      uint32 own = 0;
#pragma unroll
      for (int32 bit = 0; bit < kColumnBlocks; ++bit) {
        const uint32 column = __ballot_sync(0xffffffffu, (bits >> bit & 1) != 0);
        if (lane == bit) own = column;
      }
      column_bits[group * kWarpThreads + lane] = own;
    }
    __syncthreads();
    if (warp == 0) {
      for (int32 at = lane; at < words; at += kWarpThreads) {
        before[at] = count;
        count += __popc(column_bits[at]);
      }
    }
    __syncthreads();

    for (int32 row = warp; row < rows; row += kWarps * kRowsAtOnce) {
      RowsOfWarp<kRowsAtOnce> of(p, work, top, row, kWarps, rows);
#pragma unroll
      for (int32 i = 0; i < kRowsAtOnce; ++i) {
        const int32 own = row + i * kWarps;
        const uint32 above = (1u << own % kWarpThreads) - 1;
        of.for_each(i, [&](int32 which, int32 entry, int32 at) {
          const int32 block = entry - first;
          if (block < 0 || block >= kColumnBlocks) return;
          const int32 column = own / kWarpThreads * kWarpThreads + block;
          const int32 place = before[column] + __popc(column_bits[column] & above);
          params.list_entries[(list + block) * params.list_capacity + place] = {
              top + own, which == 0 ? p.blocks.bits_begin[partial_position(p, work, top + own)] + at : -1,
              to_right[own] + tiles.of_bits(row_bits[own] >> block >> 1 << block << 1), 0};
        });
      }
    }
    __syncthreads();
  }
  // Not sooner: backward_prepare keeps memory busy, and each read would then take 5 us (all 31 instead of 16).
  ptx::admit_next_kernel();
  if (warp == 0 && first + lane < key_blocks) params.list_count[list + lane] = count;
}

}  // namespace fsa::kernels
