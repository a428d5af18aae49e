// SPDX-License-Identifier: Apache-2.0
// What the API layer hands to a backend for the parts of native sparse attention: as core/problem.h, for those
// operations that are not plain attention.
#pragma once

#include "core/problem.h"
#include "fsa/nsa.h"

namespace fsa {

enum class NsaOperation : std::uint8_t {
  compress,
  compress_backward,
  select_blocks,
  selected_forward,
  selected_backward,
  combine,
  combine_backward,
};

struct NsaProblem {
  NsaOperation operation = NsaOperation::compress;
  DType dtype = DType::none;
  Device device = {};

  bool packed = false;
  std::int64_t batch = 0;
  std::int64_t total_q = 0;       // rows of query (of x, of the branches) over all sequences
  std::int64_t total_k = 0;       // rows of key; compress: of out, or an upper bound while there is no out
  std::int64_t max_seqlen_q = 0;  // rows of the longest sequence
  std::int64_t max_seqlen_k = 0;  // keys (select_blocks: compressed keys) of the longest sequence
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t group_size = 1;
  std::int64_t head_dim = 0;
  std::int64_t head_dim_v = 0;

  nsa::CompressKind kind = nsa::CompressKind::linear;
  std::int64_t compress_block = 0;
  std::int64_t compress_stride = 0;
  bool has_pe = false;

  std::int64_t block_size = 0;
  std::int64_t top_k = 0;  // width of selected_blocks
  std::int64_t init_blocks = 0;
  std::int64_t local_blocks = 0;
  double softmax_scale = 1;
  nsa::Algorithm algorithm = nsa::Algorithm::automatic;
  std::int64_t chunk_tokens = 0;  // 0 = the backend's choice

  bool gates_per_head = false;
};

// selected_blocks, read or written: entry (batch, kv_head, row, slot) at data[batch * stride_batch +
// kv_head * stride_head + row * stride_row + slot * stride_slot]; packed: stride_batch 0, rows over all sequences.
struct BlockTable {
  std::int32_t* data = nullptr;
  std::int64_t stride_batch = 0;
  std::int64_t stride_head = 0;
  std::int64_t stride_row = 0;
  std::int64_t stride_slot = 1;

  std::int32_t& at(std::int64_t batch, std::int64_t kv_head, std::int64_t row, std::int64_t slot) const {
    return data[batch * stride_batch + kv_head * stride_head + row * stride_row + slot * stride_slot];
  }
};

struct NsaArguments {
  // compress: key = x, out; weight and pe: stride_head, stride_row, stride_dim (weighted: row = position in the
  // window, no dim). The backward adds their gradients.
  Operand query, key, value, out, lse;
  Operand weight, pe;
  Operand grad_out, grad_query, grad_key, grad_value, grad_weight, grad_pe;
  // combine: packed tensors are one sequence (batch 1, no cu_seqlens). Branches 0 compressed, 1 selected, 2 sliding;
  // gates: stride_dim between branches; stride_head 0 when per token (grad_gates too).
  Operand branches[3], grad_branches[3], gates, grad_gates;
  IndexTable cu_seqlens_q, cu_seqlens_k, seqused_k;  // compress: q = x, k = compressed
  BlockTable selected_blocks;
  void* stream = nullptr;
};

// One sequence of an NSA problem.
struct NsaSequence {
  std::int64_t batch = 0;       // index into batched tensors
  std::int64_t q_begin = 0;     // first row in packed tensors
  std::int64_t k_begin = 0;     // first key, or first compressed key
  std::int64_t rows = 0;        // compress: tokens of x
  std::int64_t keys = 0;        // that the tensors hold; compress and select_blocks: compressed keys
  std::int64_t tokens = 0;      // row i is token i + tokens - rows
  std::int64_t compressed = 0;  // complete windows among the tokens

  std::int64_t offset() const { return tokens - rows; }
};

// Reads cu_seqlens and seqused_k: their memory must be readable by the caller (CPU tensors).
inline NsaSequence nsa_sequence(const NsaProblem& problem, const NsaArguments& args, std::int64_t batch) {
  NsaSequence s;
  s.batch = batch;
  s.rows = problem.max_seqlen_q;
  s.keys = problem.max_seqlen_k;
  if (problem.packed) {
    s.q_begin = args.cu_seqlens_q.at(batch);
    s.rows = args.cu_seqlens_q.at(batch + 1) - s.q_begin;
    s.k_begin = args.cu_seqlens_k.at(batch);
    s.keys = args.cu_seqlens_k.at(batch + 1) - s.k_begin;
  }
  s.tokens = args.seqused_k.present ? args.seqused_k.at(batch) : s.rows;
  if (problem.compress_block > 0)
    s.compressed = compressed_length(s.tokens, problem.compress_block, problem.compress_stride);
  return s;
}

// Selection: blocks of the longest sequence, or more: tokens < windows * stride + compress_block.
inline std::int64_t most_blocks(const NsaProblem& p) {
  return (p.max_seqlen_k * p.compress_stride + p.compress_block - 1) / p.block_size + 1;
}

}  // namespace fsa
