// SPDX-License-Identifier: Apache-2.0
// What host and device must agree on before a kernel is compiled. Read by both compilers: constexpr PODs
// only.
#pragma once

#include "core/types.h"

namespace fsa::kernels {

enum class ElementType : uint8 { bf16, fp16 };

inline constexpr int32 kElementBytes = 2;
inline constexpr int32 kRowsPerWarpgroup = 64;  // rows of one WGMMA, and of one skip tile
constexpr int32 skip_tile_keys(int32 head_dim) { return head_dim <= 128 ? 128 : 64; }
inline constexpr int32 kChunkColumns = 64;       // 128 bytes: the widest swizzled TMA box
inline constexpr int32 kMaxSegments = 8;         // runs of key tiles that one work tile may visit
inline constexpr int32 kWorkSlots = 2;           // work tiles announced ahead of the consumers
inline constexpr float kLargestBoundedCap = 38;  // of SoftcapBounded: 2^55 and 2^-55 at the ends
inline constexpr int32 kSharedAlignment = 1024;  // of a 128-byte swizzled tile

// The shape of one forward kernel. Padded head dimensions: the tensor maps fill the columns beyond the real
// ones with zeros, so one kernel serves every head_dim up to its own.
struct ForwardTile {
  int32 head_dim;      // of query and key, multiple of 32
  int32 head_dim_v;    // of value and out, multiple of 32, not above head_dim (pad that instead)
  int32 block_m;       // query rows, 64 per consumer warpgroup
  int32 block_n;       // keys, multiple of 16
  int32 query_stages;  // 2: the next query tile loads under the current one
  int32 key_stages;
  int32 value_stages;  // with private_values: divided among the consumer warpgroups
  // 1: each consumer warpgroup can fetch the values that it wants into stages of its own, which pays when most
  // tiles are skipped by a vote; 0: the producer always loads every V once for all.
  int32 private_values;
  int32 key_scalars;  // 1: one float per key travels with K (delta of the pair gate)
  int32 gate_terms;   // 1: so do the terms of the pair gate, inner values of one more multiply
  int32
      rounded_sums;  // 1: O is divided by sums of P as rounded for the multiply, by a line of ones; bounded softcap
};

constexpr int32 round_up(int32 value, int32 multiple) { return (value + multiple - 1) / multiple * multiple; }

// Shared memory holds whole chunks of columns.
constexpr int32 forward_row_bytes(int32 head_dim) {
  return round_up(head_dim, kChunkColumns) * kElementBytes;
}
constexpr int32 forward_query_bytes(const ForwardTile& t) {
  return t.block_m * forward_row_bytes(t.head_dim);
}
constexpr int32 forward_key_bytes(const ForwardTile& t) { return t.block_n * forward_row_bytes(t.head_dim); }
constexpr int32 forward_value_bytes(const ForwardTile& t) {
  return t.block_n * forward_row_bytes(t.head_dim_v);
}

// The pair gate as inner values of Q K^T: how many, and the bytes of a tile of them with its extremes.
inline constexpr int32 kGateTerms = 32;
constexpr int32 gate_term_bytes(int32 keys) { return keys * kGateTerms * kElementBytes + 128; }
inline constexpr int32 kZeroTermBytes = 128;
inline constexpr int32 kGateRowBytes = gate_term_bytes(kRowsPerWarpgroup);  // of a warpgroup's rows

inline constexpr int32 kOnesBytes = 128;  // eight rows of eight elements, read as B of a multiply
inline constexpr int32 kWorkTileBytes = 144;
inline constexpr int32 kListedTileBytes = 12;
inline constexpr int32 kBallotRounds = 8;                    // that are kept
inline constexpr int32 kVoteBytes = kBallotRounds * 4 + 32;  // of a consumer

// Dynamic shared memory of the forward kernel; the kernel asserts that its SharedStorage has this size.
constexpr int32 forward_shared_bytes(const ForwardTile& t) {
  const int32 tiles = t.query_stages * forward_query_bytes(t) + t.key_stages * forward_key_bytes(t) +
                      t.value_stages * forward_value_bytes(t);
  const int32 barriers = 8 * (2 * (t.query_stages + t.key_stages + t.value_stages + kWorkSlots) +
                              t.private_values * t.value_stages);
  const int32 votes = t.private_values * (t.block_m / kRowsPerWarpgroup * kVoteBytes + kWorkSlots * 4);
  const int32 scalars = t.key_scalars * t.key_stages * t.block_n * 4;
  const int32 infos = kWorkSlots * (kWorkTileBytes + kListedTileBytes) + t.key_stages * kListedTileBytes;
  const int32 terms = t.gate_terms * (t.key_stages * gate_term_bytes(t.block_n) + kZeroTermBytes +
                                      t.block_m / kRowsPerWarpgroup * kGateRowBytes);
  const int32 ones = t.rounded_sums * kOnesBytes;
  return round_up(tiles + terms + scalars + ones + infos + votes + barriers, kSharedAlignment);
}

// One producer warpgroup beside the consumers.
constexpr int32 forward_threads(const ForwardTile& t) { return 128 * (t.block_m / kRowsPerWarpgroup + 1); }

}  // namespace fsa::kernels
