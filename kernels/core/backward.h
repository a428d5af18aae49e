// SPDX-License-Identifier: Apache-2.0
// Shape and run-time arguments of the backward kernels: constexpr PODs shared by host and device.
#pragma once

#include "core/config.h"
#include "core/params.h"

namespace fsa::kernels {

// The shape of one backward kernel: block_n keys stay, tiles of block_m query rows stream past them.
struct BackwardTile {
  int32 head_dim;    // of query and key, multiple of 64
  int32 head_dim_v;  // of value and out, multiple of 64
  int32 block_m;     // 64 or 128
  int32 block_n;     // 128: each of the two warpgroups has 64 keys; 64: each has half of the columns
  int32 query_stages;
  int32 grad_out_stages;
  int32 score_stages;      // of dS
  int32 stage_grad_query;  // 1: dQ is added by the copy engine, from shared memory of its own
  // Floats per query row that travel with Q. 2: lse, out_dot_grad, a vector each. kFoldedVectors: -lse / scale and
  // -out_dot_grad, which start the sums of S and dP. One more: alpha of the pair gate.
  int32 row_vectors;
  int32 gate_terms;  // 1: so do the terms of the pair gate
};

inline constexpr int32 kBackwardConsumers = 2;
inline constexpr int32 kBackwardWarps = 4 * kBackwardConsumers;  // of the consumers
inline constexpr int32 kBackwardThreads = 128 * (kBackwardConsumers + 1);
inline constexpr int32 kKeyWorkBytes = 176;
inline constexpr int32 kRowTileInfoBytes = 32;
inline constexpr int32 kStagedSumsBytes = 16;
inline constexpr int32 kProducerBytes = 192;  // what the producer keeps in shared memory

// Both as three bfloat16 whose sum is the float, to 2^-24, and two zeros: an operand of one more multiply.
inline constexpr int32 kFoldedVectors = 4;

// So softmax_scale_log2 of a call is at least this: the quotient stays finite. Logits are 0 in float32 either way.
inline constexpr float kLeastFoldedScale = 1e-30f;

constexpr bool backward_has_gate(const BackwardTile& t) {
  return t.row_vectors == 3 || t.row_vectors == kFoldedVectors + 1;
}

// Where P does not stay in registers it is in shared memory beside dS.
constexpr int32 backward_shared_operands(const BackwardTile& t) { return t.block_n == 64 ? 2 : 1; }

constexpr int32 backward_score_bytes(const BackwardTile& t) {
  return backward_shared_operands(t) * t.block_m * t.block_n * kElementBytes;
}

// Where keys are split, gradients of keys and values leave through the stages of dS, so that the next keys can
// be loaded meanwhile; the pair gate has no room for that at head_dim 128.
constexpr bool backward_stages_in_scores(const BackwardTile& t) {
  return t.block_n == 128 && (t.head_dim <= 64 || !backward_has_gate(t));
}
constexpr int32 backward_score_slots(const BackwardTile& t) {
  const int32 gradients = t.block_n * (t.head_dim + t.head_dim_v) * kElementBytes;
  const int32 slots = (gradients - 1) / backward_score_bytes(t) + 1;
  return backward_stages_in_scores(t) && slots > t.score_stages ? slots : t.score_stages;
}

// Whether dQ of a row tile is one warpgroup's, of the next the other's: where there is no logit chain.
constexpr bool backward_alternates(const BackwardTile& t) {
  return t.block_n == 128 && t.block_m == 64 && t.head_dim == 128 && t.head_dim_v == 128 &&
         t.stage_grad_query != 0 && t.row_vectors == kFoldedVectors;
}

// Whether who comes first to a row tile stores its dQ, where columns are short.
constexpr bool backward_first_stores(const BackwardTile& t) {
  return t.block_n == 128 && t.head_dim == 128 && t.stage_grad_query != 0;
}

// Who hands something over at each row tile: warpgroups their staged dQ, or warps their turn.
constexpr int32 backward_handovers(const BackwardTile& t) {
  return t.stage_grad_query ? kBackwardConsumers : kBackwardWarps;
}

// Dynamic shared memory; the kernel asserts that its SharedStorage has this size.
constexpr int32 backward_shared_bytes(const BackwardTile& t) {
  const int32 keys = t.block_n * (t.head_dim + t.head_dim_v) * kElementBytes;
  const int32 queries = t.query_stages * t.block_m * (t.head_dim * kElementBytes + t.row_vectors * 4);
  const int32 grad_out = t.grad_out_stages * t.block_m * t.head_dim_v * kElementBytes;
  const int32 grad_query = t.stage_grad_query * t.block_m * t.head_dim * 4;
  const int32 infos = kWorkSlots * kKeyWorkBytes + 2 * t.query_stages * kRowTileInfoBytes + kProducerBytes +
                      kBackwardConsumers * kStagedSumsBytes;
  const int32 barriers =
      8 *
      (4 + 2 * (t.score_stages + t.query_stages + t.grad_out_stages + kWorkSlots + backward_handovers(t)));
  const int32 terms = t.gate_terms * (t.query_stages * gate_term_bytes(t.block_m) + kZeroTermBytes);
  const int32 alpha = backward_has_gate(t) ? t.score_stages * (t.block_n / 16) * t.block_m * 4 : 0;
  return round_up(keys + queries + grad_out + grad_query + backward_score_slots(t) * backward_score_bytes(t) +
                      terms + alpha + infos + barriers,
                  kSharedAlignment);
}

// Position of query row `row` of a tile in its vectors: a thread finds the four values of its columns of 16
// query rows side by side, and the four threads of a quad read 64 bytes in a row.
constexpr int32 row_vector_position(int32 row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2;
}

// One block of a column of a block mask.
struct ColumnEntry {
  int32 row_block;
  int32 bits;  // block of the mask's bits, -1: full
  int32 rank;  // key tiles to the right of it in its row
  int32 reserved;
};

// A column is the row tiles that see one key tile. Long ones, which would keep a CTA busy when all others have
// finished, are cut in parts: `count` row tiles after the first `skip`, whose sums meet in `slot`.
struct ColumnPart {
  int32 key_tile;  // in the order of KeySchedule
  int32 skip;
  int32 count;
  int32 slot;  // -1: the only part
};
inline constexpr int32 kRestOfColumn = 0x7fffffff;

// Which column the parts that begin at a slot belong to.
struct SplitColumn {
  int32 key_tile;
  int32 parts;  // 0: begun at an earlier slot
};

// What split_columns counts: blocks that have counted their columns, parts of all columns, slots in use.
struct PartCounts {
  int32 blocks;
  int32 parts;
  int32 slots;
  int32 reserved;
};

// A column has a part for each `least` row tiles at most, and all columns together `kMostSlots` parts beside the
// whole columns.
inline constexpr int32 kLeastPart = 32;
inline constexpr int32 kMostSlots = 512;

inline constexpr int32 kSumRows = 8;  // keys of a block of sum_parts

// Key blocks of a block of block_columns: bits of a word.
inline constexpr int32 kColumnBlocks = 32;

// Floats of a slot: sums of key and value gradients, a line per key, then those of delta.
constexpr int32 backward_slot_floats(const BackwardTile& t) {
  return t.block_n * (t.head_dim + t.head_dim_v + 1);
}

struct BackwardParams {
  // The call whose gradient is wanted; `out` and `lse` are inputs here. Boxes of all maps: 64 columns by 64
  // rows; query_map and key_map, value_map as there, out_map unused. alibi, sink, alpha, delta, window_sizes,
  // gate_delta as there.
  ForwardParams forward;
  TensorMap grad_out_map;
  TensorMap grad_key_map;
  TensorMap grad_value_map;

  const void* grad_out;
  int64 grad_out_stride_batch, grad_out_stride_row, grad_out_stride_head;  // elements; batch 0 when packed
  void* grad_query;
  int64 grad_query_stride_batch, grad_query_stride_row, grad_query_stride_head;
  void* grad_key;
  int64 grad_key_stride_batch, grad_key_stride_row, grad_key_stride_head;
  void* grad_value;
  int64 grad_value_stride_batch, grad_value_stride_row, grad_value_stride_head;
  const float* grad_lse;  // or null
  int64 grad_lse_stride_batch, grad_lse_stride_head, grad_lse_stride_row;

  // Workspace. A row tile has block_m rows; row tile t of batched sequence b and head h is number (b * heads
  // + h) * row_tiles + t, of packed sequence b number h * row_tiles + cu_seqlens_q[b] / block_m + b + t.
  float* row_vectors;     // [row tiles, row_vectors, block_m] in the order of row_vector_position
  float* grad_query_sum;  // [row tiles, block_m * head_dim]: [8 warps, columns / 8, 32 lanes, 4], fragments
  float* grad_alpha_sum;  // [row tiles, block_m]; pair gate
  uint8* gate_row_terms;  // gate_term_bytes(block_m) for each row tile; FoldedPairGate
  float* grad_sink_sum;   // [row tiles]; learnable sink
  // [row tiles, 8 warps]; null where sums are cleared. Deterministic: how many key tiles have been added; otherwise
  // kSumsClaimed, kSumsStored. Staged sums use the first of each four, or of all eight.
  int32* turns;
  int64 row_tiles;

  TileBits column_bits;       // BitmapRows: [.., key tiles, words of row tiles]; made by transpose_bits
  int32* list_count;          // ListRows: [batch or 1, heads or 1, key blocks]; made by block_columns
  ColumnEntry* list_entries;  // [.., key blocks, list_capacity], aligned to 16 bytes
  int64 list_stride_batch, list_stride_head;  // of the counts
  int32 list_capacity;                        // row blocks
  int32 head_dim;                             // real columns of query and key
  int32 total_rows_k;  // packed: rows of key and value; those behind the last sequence get zero gradients
  int32 key_heads_per_wave;  // (batch, key head) pairs that walk their key tiles together
  float softmax_scale;       // natural
  int32 least_part;          // row tiles

  // Null: every column is one part. Otherwise made by split_columns.
  ColumnPart* column_parts;    // [key tiles + most_slots]
  SplitColumn* split_columns;  // [most_slots]
  int32* column_lengths;       // [key tiles]: row tiles
  PartCounts* part_counts;
  float* partial_sums;  // [most_slots, backward_slot_floats]
  int32 most_slots;
  int32 ascending_from;  // deterministic: see KeySchedule; a place in its order

  // [batch, heads], at the first head of each group: for every key tile, how many adders have added all that it adds to
  // dQ and grad_alpha, less what parts of columns count more than once. Not counted where sums come from registers.
  int32* sums_done;

  // [1 + waves]: of the row tiles of dQ sums behind the first wave's, how many somebody clears or has cleared; how many of
  // each wave are clear. Null: backward_prepare clears all.
  int32* clears;
  int32 clears_of_wave;  // row tiles of a wave
  int32 clears_in_all;   // row tiles behind the first wave

  ScalarOperand grad_alpha;  // written
  ScalarOperand grad_delta;
  ScalarOperand grad_sink;
};

static_assert(sizeof(BackwardParams) == 2048 && alignof(BackwardParams) == 64,
              "BackwardParams must have the same layout on both compilers");

}  // namespace fsa::kernels
