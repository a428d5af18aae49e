// SPDX-License-Identifier: Apache-2.0
// Run-time arguments of the kernels: PODs shared by host and device.
#pragma once

#include "core/types.h"

namespace fsa::kernels {

inline constexpr int32 kOpenWindow = 1 << 30;
inline constexpr int32 kWorkCounters = 2;

// Of the small operands: alpha, delta, sink, ALiBi slopes.
enum class ScalarType : int32 { bf16, fp16, float32, float64 };

// One scalar per (batch, row, head) or fewer; strides in elements, 0 where it does not depend on an index.
struct ScalarOperand {
  const void* data;
  int64 stride_batch;  // 0 when packed
  int64 stride_row;
  int64 stride_head;
  ScalarType type;
  int32 reserved;
};

// A bit map over skip tiles: bit n & 31 of word n >> 5 is key tile n. Word 0 of the row tile t (64 rows) of a
// sequence is at batch * stride_batch + head * stride_head + t * stride_tile; packed sequence b starts at row
// tile cu_seqlens_q[b] / 64 + b.
struct TileBits {
  int32* words;
  int64 stride_batch;  // words; 0 when packed
  int64 stride_head;
  int64 stride_tile;
};

// Lists of key blocks per block of query rows, batch entry and head, as in PyTorch's BlockMask: `full` blocks
// are visible as a whole, `partial` ones by the bits of `bits`: word [n][row][key / 32], n = bits_begin of the
// list + position in it, row and key counted from the block's corner.
struct BlockLists {
  const int32* partial_count;    // [batch, heads, row blocks]
  const int32* partial_indices;  // [batch, heads, row blocks, columns]
  const int32* full_count;       // or null: none
  const int32* full_indices;
  const int32* bits_begin;  // [batch, heads, row blocks]; the strides of partial_count
  const uint32* bits;
  int64 partial_stride_batch, partial_stride_head, partial_stride_row;  // of the counts; 0 = broadcast
  int64 partial_indices_stride_batch, partial_indices_stride_head, partial_indices_stride_row;
  int64 full_stride_batch, full_stride_head, full_stride_row;
  int64 full_indices_stride_batch, full_indices_stride_head, full_indices_stride_row;
  int32 block_rows;  // a multiple of 64
  int32 block_keys;  // a multiple of block_n
};

// CUtensorMap, opaque.
struct alignas(64) TensorMap {
  uint8 bytes[128];
};

struct ForwardParams {
  // Each map has the dimensions (head_dim, row, head, batch); packed tensors have one batch entry of total
  // rows. Boxes: 64 columns by 64 rows (query, out) or block_n rows (key, value), 128-byte swizzle.
  TensorMap query_map;
  TensorMap key_map;
  TensorMap value_map;
  TensorMap out_map;

  void* out;               // for row tiles that end inside a sequence, which TMA would overrun
  int64 out_stride_batch;  // elements; 0 when packed
  int64 out_stride_row;
  int64 out_stride_head;

  float* lse;              // natural log; rows contiguous; null: not wanted
  int64 lse_stride_batch;  // 0 when packed
  int64 lse_stride_head;

  const int32* cu_seqlens_q;  // [batch + 1] or null: batched
  const int32* cu_seqlens_k;  // [batch + 1] or null
  const int32* seqused_q;     // [batch] or null: all rows
  const int32* seqused_k;     // [batch] or null
  // kWorkCounters zeros, which the kernel before may still be writing, left as zeros; null: tiles are dealt out in turn.
  int32* work_counter;

  int32 batch;
  int32 num_heads;
  int32 group_size;    // query heads per key-value head
  int32 head_dim_v;    // real columns of out
  int32 max_seqlen_q;  // rows of every sequence when batched, an upper bound when packed
  int32 max_seqlen_k;
  int32 window_left;         // keys before the diagonal, kOpenWindow when unlimited
  int32 window_right;        // keys after it; 0 is causal
  int32 heads_per_wave;      // (batch, head) pairs that walk their row tiles together: K and V share the L2
  float softmax_scale_log2;  // softmax_scale * log2(e), positive

  // Threshold skipping only.
  float threshold;       // of the softmax, > 0
  int32 causal_lengths;  // the threshold of a row is divided by its own visible length, not by seqlen_k
  int32* skip_map;       // zeroed; one bit per key tile, 1 = kept; null: not wanted
  int64 skip_map_stride_batch;  // words; 0 when packed
  int64 skip_map_stride_head;
  int64 skip_map_stride_tile;  // from one tile of 64 rows to the next

  // ---- Since version 2; read by the policies named. ----
  float softcap;        // Softcap, SoftcapExact: > 0
  int32 total_rows_q;   // packed: rows of query, out and lse; those behind the last sequence are cleared
  ScalarOperand alibi;  // Alibi: slopes [heads] or [batch, heads]
  ScalarOperand sink;   // StoreOutput<LearnableSink>: [heads]
  ScalarOperand alpha;  // PairGate and gate_bitmap
  ScalarOperand delta;  // gate_prepare; by key and key-value head
  const int32* window_sizes;  // BandMask: [kv_heads, 4] = sink, left, right, near
  int64 window_sizes_stride;  // from one head to the next

  // Made by gate_prepare, read by gate_bitmap and PairGate: delta as float32 in whole key tiles of N = the
  // skip tile's keys, and {smallest, largest} of each tile. Tile n of batched sequence b: b * stride_batch +
  // kv_head * stride_head + n * N; packed: tile cu_seqlens_k[b] / N + b + n, stride_batch 0. Aligned to 16
  // bytes.
  float* gate_delta;
  float* gate_extremes;           // [.., tiles, 2]; the same strides, divided by N and times 2
  int64 gate_delta_stride_batch;  // elements, multiples of N
  int64 gate_delta_stride_head;
  TileBits gate_bits;      // gate_bitmap writes, BitmapTiles reads: 1 = open (and visible)
  float gate_threshold;    // gamma; 0: 1 / seqlen_k of each sequence
  int32 gate_test;         // 0: every visible tile is open
  int32 adaptive_gate;     // gamma shrinks with the visible share; only where causal_lengths
  int32 log_sigmoid_gate;  // gate_bitmap: g is log(sigmoid(x)), else x. PairGate has it as a parameter
  BlockLists blocks;       // ListTiles
  // Made by gate_prepare where not null, read by FoldedPairGate: gate_term_bytes(N) for each key tile, in the order of
  // gate_extremes. Aligned to 16 bytes.
  uint8* gate_terms;
};

static_assert(sizeof(ScalarOperand) == 40 && sizeof(TileBits) == 32 && sizeof(BlockLists) == 152,
              "sub-structures must have the same layout on both compilers");
static_assert(sizeof(ForwardParams) == 1152 && alignof(ForwardParams) == 64,
              "ForwardParams must have the same layout on both compilers");

// copy_rows: 2-byte elements; strides in elements.
struct CopyRowsParams {
  const void* from;
  void* to;
  int64 from_stride_batch, from_stride_row, from_stride_head, from_stride_dim;
  int64 to_stride_batch, to_stride_row, to_stride_head;
  int64 batch, rows, heads;
  int32 dim;         // columns copied
  int32 to_columns;  // written: those from `dim` on become zero
};

static_assert(sizeof(CopyRowsParams) == 104, "CopyRowsParams must have the same layout on both compilers");

}  // namespace fsa::kernels
