// SPDX-License-Identifier: Apache-2.0
// How a tile of 2-byte elements lies in shared memory, and how WGMMA is told.
//
// A tile of kRows rows is stored in chunks of 64 columns. A chunk has one 128-byte line per row; the eight
// 16-byte units of line r are permuted by XOR with r % 8, which is what the copy engine's 128-byte swizzle
// does, so eight rows of one column unit touch all 32 banks. Chunks must start at multiples of 1024 bytes.
#pragma once

#include "core/base.cuh"
#include "core/config.h"

namespace fsa::kernels {

inline constexpr int32 kLineBytes = kChunkColumns * kElementBytes;
inline constexpr int32 kUnitBytes = 16;
inline constexpr int32 kSwizzleRows = 8;

template <int32 kRows, int32 kColumns>
struct SwizzledTile {
  static_assert(kColumns % kChunkColumns == 0, "a tile is made of whole 64-column chunks");
  static_assert(kRows % kSwizzleRows == 0, "chunks must start on a swizzle period");

  static constexpr int32 kChunks = kColumns / kChunkColumns;
  static constexpr int32 kChunkBytes = kRows * kLineBytes;
  static constexpr int32 kBytes = kChunks * kChunkBytes;

  // Of unit `unit` (eight columns) of row `row`.
  static constexpr int32 unit_offset(int32 row, int32 unit) {
    const int32 chunk = unit / (kLineBytes / kUnitBytes);
    const int32 permuted = unit % (kLineBytes / kUnitBytes) ^ row % kSwizzleRows;
    return chunk * kChunkBytes + row * kLineBytes + permuted * kUnitBytes;
  }

  // Sixteen columns are the inner dimension of one multiply: as A, or as B of Q K^T.
  static constexpr int32 inner_columns_offset(int32 step) {
    return step / 4 * kChunkBytes + step % 4 * (16 * kElementBytes);
  }
  FSA_DEVICE static uint64 inner_columns(uint32 address) { return descriptor(address, kUnitBytes); }

  // Sixteen rows are the inner dimension: B of P V.
  static constexpr int32 inner_rows_offset(int32 step) { return step * (16 * kLineBytes); }
  FSA_DEVICE static uint64 inner_rows(uint32 address) { return descriptor(address, kChunkBytes); }

  // Descriptors count in 16-byte units.
  FSA_DEVICE static uint64 advance(uint64 descriptor, int32 bytes) {
    return descriptor + static_cast<uint32>(bytes >> 4);
  }
  // The same in 32 bits: nothing carries into the upper half.
  FSA_DEVICE static uint64 advance_low(uint64 descriptor, int32 bytes) {
    return (descriptor & 0xffffffff00000000u) |
           (static_cast<uint32>(descriptor) + static_cast<uint32>(bytes >> 4));
  }

 private:
  // `chunk_stride` leads from one group of 64 columns to the next; the hardware ignores it for inner columns.
  FSA_DEVICE static uint64 descriptor(uint32 address, int32 chunk_stride) {
    constexpr uint64 kSwizzle128 = uint64{1} << 62;
    constexpr uint64 kRowGroupStride = uint64{kSwizzleRows * kLineBytes >> 4} << 32;
    return kSwizzle128 | kRowGroupStride | static_cast<uint64>(chunk_stride >> 4) << 16 |
           static_cast<uint64>((address & 0x3ffff) >> 4);
  }
};

// Rows of eight 2-byte elements one behind the other, as B: both halves of the sixteen inner values are the same
// eight.
FSA_DEVICE uint64 repeated_rows(uint32 address) {
  constexpr uint64 kRowGroupStride = uint64{kSwizzleRows * kUnitBytes >> 4} << 32;
  return kRowGroupStride | static_cast<uint64>((address & 0x3ffff) >> 4);
}

}  // namespace fsa::kernels
