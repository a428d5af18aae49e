// SPDX-License-Identifier: Apache-2.0
// What one instruction set's copy of the kernels offers: work items that any thread may compute in any order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/block_codes.h"
#include "core/problem.h"
#include "core/skip_tile.h"

namespace fsa::cpu {

// A unit is one row tile of one query head; units of a (sequence, key head) pair are numbered row tiles descending,
// then heads of the group: neighbours see nearly the same keys, and the longest causal rows come first.
struct ForwardItem {
  Sequence sequence;
  std::int64_t kv_head = 0;
  std::int64_t unit_begin = 0;
  std::int64_t unit_end = 0;
  const BlockCodes* blocks = nullptr;  // of the block mask; null: none
};

inline constexpr std::int64_t kMostSegments = 8;     // of the keys, in a backward
inline constexpr std::int64_t kMaxUnitsPerItem = 8;  // row tiles that share one packing of a key tile

// Row tiles of one sequence that may see the keys of a segment, for every head of the group: part number
// begin + g * tiles + (tile - first_tile). Sums that a segment leaves for its rows have one place for each part.
struct RowParts {
  std::int64_t begin = 0;
  std::int64_t first_tile = 0;
  std::int64_t tiles = 0;
};

// Row tiles of all (sequence, head) pairs, numbered for the per-row buffers of backward: tile t of head h of the
// sequence is (head_stride * h + tile_begin + t).
struct BackwardBuffers {
  std::int64_t tiles_per_head = 0;  // row tiles of all sequences of one query head
  std::int64_t segments = 1;
  float* out_dot_grad = nullptr;  // [num_heads, tiles_per_head, 64]: rowsum(out * grad_out) - grad_lse
  // The base-2 lse in two floats: one alone would be off by 2^-20 at 32, as much as all other rounding of P together.
  // [num_heads, tiles_per_head, 64] each; +inf and 0 for rows without a key.
  float* lse_log2 = nullptr;
  float* lse_log2_low = nullptr;
  double* sink_partial = nullptr;  // [num_heads, tiles_per_head]
  char* packed_rows = nullptr;     // [num_heads, tiles_per_head, packed_row_bytes]
  std::int64_t packed_row_bytes = 0;
  const RowParts* row_parts = nullptr;  // [batch, num_kv_heads, segments]
  float* grad_query = nullptr;          // [parts, grad_query_floats], unscaled
  float* grad_alpha = nullptr;          // [parts, 64], unscaled
  std::uint8_t* touched = nullptr;      // [parts]: the two above were written
  const BlockCodes* blocks = nullptr;   // of the block mask; null: none
};

// dQ of a row tile: [head_dim, 64], head_dim in whole tiles of 16.
inline constexpr std::int64_t grad_query_floats(const Problem& p) { return (p.head_dim + 15) / 16 * 16 * 64; }

struct RowTileItem {
  Sequence sequence;
  std::int64_t tile_begin = 0;  // of the sequence in the buffers
  std::int64_t head = 0;
  std::int64_t tile = 0;
};

struct BackwardItem {
  Sequence sequence;
  std::int64_t tile_begin = 0;
  std::int64_t kv_head = 0;
  std::int64_t key_begin = 0;  // keys of the tensors, the unused ones at the end included
  std::int64_t key_end = 0;
  RowParts rows;
};

// Partial results of decode, one per (sequence, query head, split).
struct DecodeBuffers {
  std::int64_t splits = 1;
  std::int64_t keys_per_split = 0;
  std::int64_t words = 0;        // per (sequence, key head)
  float* partial_out = nullptr;  // [batch, num_heads, splits, pitch], unnormalised
  std::int64_t pitch = 0;        // head_dim_v in whole vectors
  float* row_max = nullptr;      // [batch, num_heads, splits], log2 units
  float* row_sum = nullptr;      // [batch, num_heads, splits]
  std::uint32_t* open =
      nullptr;           // [batch, num_kv_heads, words]: candidate tiles; only with a threshold or a gate
  float* cut = nullptr;  // [batch, num_heads]: R + log2 thr; only with a threshold
};

// Neighbouring heads lie side by side in memory, a row of one head 2 KB from its next: an item walks the tiles of
// several heads together, so that memory is read in its order. As many as 1 MB of K and V: with the tiles that are fetched
// meanwhile a second-level cache of 2 MB. One where each head has tiles of its own.
inline constexpr std::int64_t kMostDecodeHeads = 16;
inline std::int64_t decode_heads(const Problem& p) {
  if (p.skips_tiles()) return 1;
  const std::int64_t row_bytes = (p.head_dim + p.head_dim_v) * static_cast<std::int64_t>(size_of(p.dtype));
  const std::int64_t fit = (std::int64_t{1} << 20) / (skip_tile_keys(p.head_dim) * row_bytes);
  return std::max<std::int64_t>(1, std::min({fit, kMostDecodeHeads, p.num_kv_heads}));
}

struct DecodeItem {
  Sequence sequence;
  std::int64_t kv_head = 0;
  std::int64_t heads = 1;  // from kv_head on, decode_heads() at most
  std::int64_t split = 0;
  std::int64_t splits = 1;  // from split on
};

struct KernelTable {
  const char* target;
  std::int64_t lanes;

  std::size_t (*forward_scratch)(const Problem&);
  void (*forward)(const Problem&, const Arguments&, const ForwardItem&, void* scratch);

  std::size_t (*backward_scratch)(const Problem&);
  std::size_t (*packed_row_bytes)(const Problem&);  // of Q and dO of a row tile, packed with its statistics
  std::int64_t (*backward_block_keys)(const Problem&);  // keys that share one packing of a row tile
  void (*row_statistics)(const Problem&, const Arguments&, const BackwardBuffers&, const RowTileItem&,
                         void* scratch);
  void (*backward)(const Problem&, const Arguments&, const BackwardBuffers&, const BackwardItem&,
                   void* scratch);
  void (*finish_rows)(const Problem&, const Arguments&, const BackwardBuffers&, const RowTileItem&,
                      void* scratch);

  std::size_t (*decode_scratch)(const Problem&);
  void (*decode_plan)(const Problem&, const Arguments&, const DecodeBuffers&, const DecodeItem&,
                      void* scratch);
  void (*decode)(const Problem&, const Arguments&, const DecodeBuffers&, const DecodeItem&, void* scratch);
  void (*decode_combine)(const Problem&, const Arguments&, const DecodeBuffers&, const DecodeItem&,
                         void* scratch);
};

const KernelTable& sse4_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_amx_kernels();
const KernelTable& neon_kernels();
const KernelTable& generic_kernels();

}  // namespace fsa::cpu
