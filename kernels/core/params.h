// SPDX-License-Identifier: Apache-2.0
// Run-time arguments of the kernels: PODs shared by host and device.
#pragma once

#include "core/types.h"

namespace fsa::kernels {

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

  float* lse;              // natural log; rows contiguous
  int64 lse_stride_batch;  // 0 when packed
  int64 lse_stride_head;

  const int32* cu_seqlens_q;  // [batch + 1] or null: batched
  const int32* cu_seqlens_k;  // [batch + 1] or null
  const int32* seqused_q;     // [batch] or null: all rows
  const int32* seqused_k;     // [batch] or null
  int32* work_counter;        // two zeros; left as two zeros

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
};

inline constexpr int32 kOpenWindow = 1 << 30;

static_assert(sizeof(ForwardParams) == 704 && alignof(ForwardParams) == 64,
              "ForwardParams must have the same layout on both compilers");

}  // namespace fsa::kernels
