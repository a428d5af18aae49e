// SPDX-License-Identifier: Apache-2.0
// Native sparse attention (NSA, arXiv 2502.11089): its parts, forward and backward.
//
//   compress           y_i = sum over the l tokens of window i: (x + pe) W,  window i = [i s, i s + l)
//   compressed branch  fsa::forward / fsa::backward with AttentionOptions::compress_block and compress_stride
//   select_blocks      score of block j of B tokens: the probability of each window, summed over the query heads
//                      of a key head, times the number of its s-token strides inside the block; the top_k best
//   selected branch    attention over the tokens of the selected blocks, one softmax over all of them
//   sliding branch     fsa::forward with window_left
//   combine            out = g0 compressed + g1 selected + g2 sliding
//
// l = compress_block, s = compress_stride, B = block_size; s divides l and B. The rules are in
// docs/native_sparse.md. Sequences are packed ([total, heads, dim] with cu_seqlens) or batched
// ([batch, seqlen, heads, dim]). Every lse is a natural logarithm, float32 (float64 for float64 inputs).
// No gradient flows through the selection. All functions are thread-safe, re-entrant and bitwise repeatable,
// whatever the number of threads.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "fsa/attention.h"

namespace fsa::nsa {

// ------------------------------------------------------------------------------------------------ compression

/// linear: weight [num_kv_heads, l * head_dim, head_dim], row kappa * head_dim + d_in.
/// weighted: weight [num_kv_heads, l], one factor per position of the window.
/// mean: no weight.
enum class CompressKind : std::uint8_t { linear, mean, weighted };

/// Compressed tokens of a sequence: 0 when tokens < compress_block, else floor((tokens - l) / s) + 1.
[[nodiscard]] FSA_API std::int64_t compressed_length(std::int64_t tokens, std::int64_t compress_block,
                                                     std::int64_t compress_stride);

struct CompressInputs {
  TensorView x = {};               ///< [batch, seqlen, num_kv_heads, head_dim] or packed [total, ...].
  TensorView weight = {};          ///< See CompressKind; dtype of x.
  TensorView intra_block_pe = {};  ///< Optional [num_kv_heads, l, head_dim]: added to each window's rows.
  TensorView cu_seqlens = {};      ///< int32 [batch + 1] with packed x.
  TensorView cu_seqlens_compressed = {};  ///< int32 [batch + 1] with packed x: sums of compressed_length.
};

struct CompressOptions {
  CompressKind kind = CompressKind::linear;
  std::int64_t compress_block = 32;   ///< l
  std::int64_t compress_stride = 16;  ///< s
  std::string backend = {};
};

struct CompressArgs {
  CompressInputs inputs = {};
  CompressOptions options = {};
  TensorView out = {};  ///< [batch, compressed, num_kv_heads, head_dim] or packed [total_compressed, ...].
  Workspace workspace = {};
  void* stream = nullptr;
};

struct CompressBackwardArgs {
  CompressInputs inputs = {};
  CompressOptions options = {};
  TensorView grad_out = {};             ///< As out; any strides.
  TensorView grad_x = {};               ///< As x. Required.
  TensorView grad_weight = {};          ///< As weight; required unless the kind is mean.
  TensorView grad_intra_block_pe = {};  ///< As intra_block_pe; required with it.
  Workspace workspace = {};
  void* stream = nullptr;
};

FSA_API void compress(const CompressArgs& args);
FSA_API void compress_backward(const CompressBackwardArgs& args);

// ------------------------------------------------------------------------------------------------ selection

/// Rows are the last rows of each sequence: row i is token i + tokens - rows, where tokens is seqused_k or,
/// without it, the number of rows.
struct SelectBlocksArgs {
  TensorView query = {};           ///< [batch, seqlen_q, num_heads, head_dim] or packed [total_q, ...].
  TensorView compressed_key = {};  ///< [batch, compressed, num_kv_heads, head_dim] or packed.
  TensorView lse = {};  ///< Of the compressed branch: [batch, num_heads, seqlen_q], [num_heads, total_q].
  TensorView cu_seqlens_q = {};  ///< int32 [batch + 1] when packed, with the next one.
  TensorView cu_seqlens_compressed = {};
  TensorView seqused_k = {};  ///< Optional int32 [batch], batched only: tokens of each sequence.
  std::int64_t compress_block = 32;
  std::int64_t compress_stride = 16;
  std::int64_t block_size = 64;
  std::int64_t top_k = 16;        ///< At least init_blocks + local_blocks; at most 1024.
  std::int64_t init_blocks = 1;   ///< The first blocks, always selected.
  std::int64_t local_blocks = 2;  ///< The last blocks up to the row's own, always selected.
  std::optional<double> softmax_scale = {};
  /// Out: int32 [batch, num_kv_heads, seqlen_q, top_k], packed [num_kv_heads, total_q, top_k]: numbers of blocks
  /// inside the sequence, ascending, min(top_k, own block + 1) of them, then -1. The lowest index wins ties.
  TensorView selected_blocks = {};
  std::string backend = {};
  Workspace workspace = {};
  void* stream = nullptr;
};

FSA_API void select_blocks(const SelectBlocksArgs& args);

/// The compressed branch and then the selection from its lse: fsa::forward(attention) and select_blocks(selection), in one
/// pass over the scores where a backend can. attention: causal, with lse; selection: the same query, keys, lse and
/// lengths. Without the lse in between, scores within rounding of each other may be ranked differently.
FSA_API void attend_and_select(const ForwardArgs& attention, const SelectBlocksArgs& selection);

// ------------------------------------------------------------------------------------------- selected branch

/// kv_outer: lists of rows per block, K and V of a block loaded once for a chunk of tokens. query_outer: one token
/// at a time with the heads of its group. Results agree to rounding.
enum class Algorithm : std::uint8_t { automatic, kv_outer, query_outer };

struct SelectedInputs {
  TensorView query = {};  ///< [batch, seqlen_q, num_heads, head_dim] or packed [total, num_heads, head_dim].
  TensorView key = {};    ///< [batch, seqlen_k, num_kv_heads, head_dim] or packed; head_dim <= 256.
  TensorView value = {};  ///< As key with head_dim_v.
  TensorView selected_blocks =
      {};  ///< int32, as select_blocks writes it, any order inside a row. A row is a set:
           ///< -1 anywhere is ignored, a duplicate counts once, a block after the
           ///< row's own contributes nothing. < -1 or >= ceil(tokens / block_size): error.
  TensorView cu_seqlens = {};  ///< int32 [batch + 1] when packed: of query and key alike.
  TensorView seqused_k =
      {};  ///< Optional int32 [batch], batched only: tokens of each sequence; rows are the last.
};

struct SelectedOptions {
  std::int64_t block_size = 64;  ///< 16 to 256.
  std::optional<double> softmax_scale = {};
  Algorithm algorithm = Algorithm::automatic;
  std::int64_t chunk_tokens = 0;  ///< kv_outer: tokens per chunk; 0 chooses by head_dim and group.
  std::string backend = {};
};

/// Key u is visible to token t when floor(u / B) is selected and u <= t. A row without a key: out 0, lse -inf.
struct SelectedForwardArgs {
  SelectedInputs inputs = {};
  SelectedOptions options = {};
  TensorView out = {};  ///< As query with head_dim_v.
  TensorView lse = {};  ///< Optional; [batch, num_heads, seqlen_q] or packed [num_heads, total].
  Workspace workspace = {};
  void* stream = nullptr;
};

/// The lse is not differentiated.
struct SelectedBackwardArgs {
  SelectedInputs inputs = {};
  SelectedOptions options = {};
  TensorView out = {};  ///< Of the forward, with lse. Required.
  TensorView lse = {};
  TensorView grad_out = {};  ///< Any strides.
  TensorView grad_query = {};
  TensorView grad_key = {};
  TensorView grad_value = {};
  Workspace workspace = {};
  void* stream = nullptr;
};

FSA_API void selected_forward(const SelectedForwardArgs& args);
FSA_API void selected_backward(const SelectedBackwardArgs& args);

// -------------------------------------------------------------------------------------------------- combine

/// Branch order: 0 compressed, 1 selected, 2 sliding. gates [batch, seqlen, 3] or [batch, seqlen, num_heads, 3],
/// packed [total, 3] or [total, num_heads, 3]; after the sigmoid; dtype of the branches or float32.
struct CombineArgs {
  TensorView compressed =
      {};  ///< [batch, seqlen, num_heads, head_dim_v] or packed [total, ...]; the others alike.
  TensorView selected = {};
  TensorView sliding = {};
  TensorView gates = {};
  TensorView out = {};
  std::string backend = {};
  void* stream = nullptr;
};

struct CombineBackwardArgs {
  TensorView compressed = {};
  TensorView selected = {};
  TensorView sliding = {};
  TensorView gates = {};
  TensorView grad_out = {};  ///< Any strides.
  TensorView grad_compressed = {};
  TensorView grad_selected = {};
  TensorView grad_sliding = {};
  TensorView grad_gates = {};
  std::string backend = {};
  void* stream = nullptr;
};

FSA_API void combine(const CombineArgs& args);
FSA_API void combine_backward(const CombineBackwardArgs& args);

// ------------------------------------------------------------------------------------------------ questions

/// Bytes of workspace; outputs may be absent. docs/native_sparse.md gives the formulas.
[[nodiscard]] FSA_API std::size_t workspace_size(const CompressArgs& args);
[[nodiscard]] FSA_API std::size_t workspace_size(const CompressBackwardArgs& args);
[[nodiscard]] FSA_API std::size_t workspace_size(const SelectBlocksArgs& args);
[[nodiscard]] FSA_API std::size_t workspace_size(const SelectedForwardArgs& args);
[[nodiscard]] FSA_API std::size_t workspace_size(const SelectedBackwardArgs& args);

struct Choice {
  std::string backend;
  std::string kernel;  ///< With the instruction set and, for the selected branch, algorithm and chunk.
  std::vector<BackendChoice> reasons;
  std::size_t workspace_bytes = 0;
};

[[nodiscard]] FSA_API Choice explain(const CompressArgs& args);
[[nodiscard]] FSA_API Choice explain(const SelectBlocksArgs& args);
[[nodiscard]] FSA_API Choice explain(const SelectedForwardArgs& args);
[[nodiscard]] FSA_API Choice explain(const SelectedBackwardArgs& args);

}  // namespace fsa::nsa
