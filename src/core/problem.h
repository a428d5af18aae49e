// SPDX-License-Identifier: Apache-2.0
// What the API layer hands to a backend: a Problem (sizes and options, no pointers, checked) and Arguments
// (pointers and strides). A backend decides from the Problem alone whether it can compute it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fsa/tensor.h"

namespace fsa {

enum class Operation : std::uint8_t { forward, backward, decode };

struct Problem {
  Operation operation = Operation::forward;
  DType dtype = DType::none;  // of query, key, value, out and their gradients
  Device device = {};

  std::int64_t batch = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t group_size = 0;  // num_heads / num_kv_heads
  std::int64_t head_dim = 0;
  std::int64_t head_dim_v = 0;

  // Extents of the tensors: packed sequences have total_q rows, batched ones seqlen_q rows each.
  // max_seqlen_* bound the lengths of all sequences; they size grids and the skip map, nothing else.
  bool packed_q = false;
  bool packed_k = false;
  bool paged = false;
  bool gathered = false;  // decode through gather_kv_indices; then gather_size indices per sequence
  // Address and strides in multiples of 16 bytes; the last stride of the tables of lengths and of
  // window_sizes is 1; so is that of the lists of a block mask, with partial_begin strided as kv_num_blocks.
  bool aligned_query = true;
  bool aligned_key = true;
  bool aligned_value = true;
  bool aligned_out = true;  // of backward; and of the gradients
  bool aligned_grad_out = true;
  bool aligned_grad_query = true;
  bool aligned_grad_key = true;
  bool aligned_grad_value = true;
  bool adds_grad_query = false;  // to what the tensor holds
  bool adds_grad_key_value = false;
  bool contiguous_tables = true;
  bool contiguous_lists = true;
  std::int64_t total_q = 0;
  std::int64_t total_k = 0;
  std::int64_t max_seqlen_q = 0;
  std::int64_t max_seqlen_k = 0;
  std::int64_t page_size = 0;
  std::int64_t num_pages = 0;
  std::int64_t max_pages = 0;
  std::int64_t gather_size = 0;

  bool causal = false;
  std::int64_t window_left = -1;
  std::int64_t window_right = -1;
  bool has_window_sizes = false;
  // Above 0: key j stands for the tokens [j * compress_stride, j * compress_stride + compress_block) of its
  // sequence, a row sees it from its last token on, and seqused_k counts tokens.
  std::int64_t compress_block = 0;
  std::int64_t compress_stride = 1;
  bool has_block_mask = false;
  bool has_partial_blocks = false;
  std::int64_t block_rows = 0;
  std::int64_t block_keys = 0;
  std::int64_t mask_batch = 0;  // distinct masks: 1 where all batch entries, or heads, share theirs
  std::int64_t mask_heads = 0;

  double softmax_scale = 1;
  double softcap = 0;                   // 0 = off
  double threshold = 0;                 // <= 0 = off
  bool has_gate = false;                // alpha and delta are present
  bool gate_test = false;               // the gate threshold is on (default 1 / seqlen_k or a positive value)
  double gate_threshold = 0;            // meaningful when gate_test and not gate_threshold_default
  bool gate_threshold_default = false;  // 1 / seqlen_k of each sequence
  bool log_sigmoid_gate = true;
  bool adaptive_gate = true;
  bool has_alibi = false;
  bool has_sink = false;
  bool has_grad_lse = false;
  bool has_skip_map = false;  // an output of forward, an input of backward
  bool deterministic = false;

  std::int64_t num_splits = 0;  // decode: 0 = the backend's fixed split size
  bool batch_invariant = false;

  // Both causal and window_sizes bound visible_len of the threshold rule and the adaptive gate by the row.
  bool causal_lengths() const { return causal || has_window_sizes; }
  // Tiles are dropped, so backward needs the skip map of the forward.
  bool skips_tiles() const { return threshold > 0 || gate_test; }
  // Of the block mask.
  std::int64_t row_blocks() const { return (max_seqlen_q + block_rows - 1) / block_rows; }
  std::int64_t key_blocks() const { return (max_seqlen_k + block_keys - 1) / block_keys; }
};

// A tensor of which one batch entry, row and head is addressed; `stride_*` in elements. Packed tensors have
// stride_batch 0 and rows counted over all sequences.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::none;
  std::int64_t stride_batch = 0;
  std::int64_t stride_row = 0;
  std::int64_t stride_head = 0;
  std::int64_t stride_dim = 1;  // other than 1 only for grad_out

  bool present() const { return dtype != DType::none; }
};

struct IndexTable {  // int32 [rows, columns]; absent when data is null and present is false
  const std::int32_t* data = nullptr;
  std::int64_t stride_row = 0;
  std::int64_t stride_column = 0;
  bool present = false;

  std::int32_t at(std::int64_t row, std::int64_t column = 0) const {
    return data[row * stride_row + column * stride_column];
  }
};

struct
    SkipMap {  // words of row tile t of head h: data + batch * stride_batch + h * stride_head + t * stride_tile
  std::int32_t* data = nullptr;
  std::int64_t stride_batch = 0;
  std::int64_t stride_head = 0;
  std::int64_t stride_tile = 0;
  std::int64_t tiles = 0;  // row tiles per head (of all sequences when packed)
  std::int64_t words = 0;  // contiguous words per row tile
  bool present = false;
};

// Key blocks per (batch entry, query head, row block); strides are 0 where a mask is shared.
struct BlockList {
  const std::int32_t* counts = nullptr;
  const std::int32_t* indices = nullptr;
  std::int64_t stride_batch = 0, stride_head = 0, stride_row = 0;  // of counts
  std::int64_t indices_stride_batch = 0, indices_stride_head = 0, indices_stride_row = 0;
  std::int64_t indices_stride_column = 0;
  std::int64_t columns = 0;  // room for entries
  bool present = false;

  std::int32_t count(std::int64_t batch, std::int64_t head, std::int64_t row_block) const {
    return counts[batch * stride_batch + head * stride_head + row_block * stride_row];
  }
  std::int32_t index(std::int64_t batch, std::int64_t head, std::int64_t row_block, std::int64_t i) const {
    return indices[batch * indices_stride_batch + head * indices_stride_head +
                   row_block * indices_stride_row + i * indices_stride_column];
  }
};

// A block mask as it was given (fsa/block_mask.h).
struct BlockLists {
  BlockList partial, full;
  const std::int32_t* begin = nullptr;  // of a partial list: where the bits of its first block are
  std::int64_t begin_stride_batch = 0, begin_stride_head = 0, begin_stride_row = 0;
  const std::uint32_t* bits = nullptr;
  std::int64_t bit_blocks = 0;
};

struct Arguments {
  Operand query, key, value, out, lse;  // lse: stride_dim unused
  Operand grad_out, grad_lse, grad_query, grad_key, grad_value;
  Operand alpha, delta, grad_alpha, grad_delta;                 // stride_dim unused
  Operand sink, grad_sink;                                      // stride_head only
  Operand alibi_slopes;                                         // stride_batch, stride_head
  IndexTable cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k;  // rows only
  IndexTable page_table, window_sizes, gather_kv_indices;
  BlockLists block_mask;
  SkipMap skip_map;
  void* stream = nullptr;
};

// Joining attention over disjoint key sets. Operands address part 0; part p lies `*_part` elements further.
struct MergeProblem {
  Device device = {};
  std::int64_t parts = 0;
  std::int64_t batch = 0;  // 1 when packed
  std::int64_t rows = 0;
  std::int64_t num_heads = 0;
  std::int64_t head_dim_v = 0;
  Operand outs, lses, out, lse;
  std::int64_t stride_outs_part = 0;
  std::int64_t stride_lses_part = 0;
  void* stream = nullptr;
};

// One sequence of the batch, lengths already reduced by seqused.
struct Sequence {
  std::int64_t batch = 0;    // index into batched tensors, alibi_slopes, page_table
  std::int64_t q_begin = 0;  // first row in packed tensors, 0 otherwise
  std::int64_t k_begin = 0;
  std::int64_t rows = 0;  // rows that the tensors hold for it
  std::int64_t keys = 0;
  std::int64_t seqlen_q = 0;  // rows in use: "the length"
  std::int64_t seqlen_k = 0;
  std::int64_t row_tile_begin = 0;  // first row tile in the skip map
  std::int64_t offset = 0;          // row i is at position i + offset among the keys (or tokens)
};

// Windows of `block` tokens at distance `stride` that fit into a sequence of `tokens`.
inline std::int64_t compressed_length(std::int64_t tokens, std::int64_t block, std::int64_t stride) {
  return tokens < block ? 0 : (tokens - block) / stride + 1;
}

// Reads cu_seqlens and seqused: their memory must be readable by the caller (CPU tensors).
inline Sequence sequence(const Problem& problem, const Arguments& args, std::int64_t batch) {
  Sequence s;
  s.batch = batch;
  s.rows = problem.max_seqlen_q;
  s.keys = problem.max_seqlen_k;
  if (problem.packed_q) {
    s.q_begin = args.cu_seqlens_q.at(batch);
    s.rows = args.cu_seqlens_q.at(batch + 1) - s.q_begin;
    s.row_tile_begin = s.q_begin / 64 + batch;
  }
  if (problem.packed_k) {
    s.k_begin = args.cu_seqlens_k.at(batch);
    s.keys = args.cu_seqlens_k.at(batch + 1) - s.k_begin;
  }
  s.seqlen_q = args.seqused_q.present ? args.seqused_q.at(batch) : s.rows;
  if (problem.compress_block > 0) {
    const std::int64_t tokens = args.seqused_k.present ? args.seqused_k.at(batch) : s.seqlen_q;
    s.seqlen_k = compressed_length(tokens, problem.compress_block, problem.compress_stride);
    s.offset = tokens - s.seqlen_q;
  } else {
    s.seqlen_k = args.seqused_k.present ? args.seqused_k.at(batch) : s.keys;
    s.offset = s.seqlen_k - s.seqlen_q;
  }
  return s;
}

}  // namespace fsa
