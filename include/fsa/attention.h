// SPDX-License-Identifier: Apache-2.0
// Attention: forward, backward, decode, merge, and questions about them.
//
// For query row i and key j of one head (off = seqlen_k - seqlen_q, lengths of the sequence):
//
//   S[i,j] = softcap(softmax_scale * (q_i . k_j + g(alpha_i * delta_j))) - slope * |i + off - j|
//   out_i  = sum_j exp(S[i,j] - lse_i) v_j,     lse_i = log(sum_j exp(S[i,j]) + exp(sink))
//
// with the sums over the keys that the masks leave visible and, where `threshold` or `gate_threshold`
// is on, over the tiles that were kept. The rules are in docs/semantics.md; they restate FlashAttention's
// conventions (causal masks aligned bottom-right, natural-log lse, head h reads key head
// h / (num_heads / num_kv_heads)). A row without a visible key: out 0, lse -inf, zero gradients.
//
// All functions are thread-safe and re-entrant. Tensors are written only when every argument is valid.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fsa/block_mask.h"
#include "fsa/error.h"
#include "fsa/export.h"
#include "fsa/tensor.h"

namespace fsa {

/// Layout of alpha and delta. bsh: [batch, seqlen, heads] (packed [total, heads]);
/// bhs: [batch, heads, seqlen] (packed [heads, total]).
enum class GateLayout : std::uint8_t { bsh, bhs };

/// The tensors that attention reads. Batched: query [batch, seqlen_q, num_heads, head_dim],
/// key [batch, seqlen_k, num_kv_heads, head_dim], value [batch, seqlen_k, num_kv_heads, head_dim_v].
/// Packed (varlen), chosen by cu_seqlens_q: query [total_q, num_heads, head_dim], key and value
/// [total_k, num_kv_heads, ...]. Paged, chosen by page_table: key and value
/// [num_pages, page_size, num_kv_heads, ...]. Decode: query [batch, num_heads, head_dim].
/// dtype float64, float32, bfloat16 or float16, the same for all three; last stride 1.
/// num_heads is a multiple of num_kv_heads; 1 <= head_dim, head_dim_v <= 512.
struct AttentionInputs {
  TensorView query = {};
  TensorView key = {};
  TensorView value = {};
  TensorView cu_seqlens_q = {};  ///< int32 [batch + 1], starts at 0, does not decrease.
  TensorView cu_seqlens_k = {};  ///< int32 [batch + 1]; with packed keys.
  TensorView seqused_q = {};   ///< int32 [batch]: rows of each sequence in use; the rest get out 0, lse -inf.
  TensorView seqused_k = {};   ///< int32 [batch]: keys of each sequence in use.
  TensorView page_table = {};  ///< int32 [batch, max_pages]; needs seqused_k. (vLLM calls it block table.)
  TensorView window_sizes = {};  ///< int32 [num_kv_heads, 4] = sink, left, right, near; implies causal.
  TensorView alibi_slopes = {};  ///< [num_heads] or [batch, num_heads]; no gradient.
  TensorView sink = {};          ///< [num_heads]: a learnable extra term of the denominator.
  TensorView alpha = {};         ///< query side of the pair gate, one scalar per query row and query head.
  TensorView delta = {};         ///< key side of the pair gate, one scalar per key and key head.
                                 ///< With paged keys: [num_pages, page_size, num_kv_heads].
  TensorView gather_kv_indices = {};  ///< Decode only. int32 [batch, top_k]: the keys to use, -1 = none.
  BlockMask block_mask = {};          ///< Batched forward and backward only. Joins the other masks by "and".
};

struct AttentionOptions {
  bool causal = false;            ///< Bottom-right aligned: key j is visible when j <= i + off.
  std::int64_t window_left = -1;  ///< Keys in [i + off - left, i + off + right] are visible; -1 = open.
  std::int64_t window_right = -1;
  /// Above 0, keys are compressed (fsa/nsa.h): key j stands for the tokens [j * compress_stride,
  /// j * compress_stride + compress_block) and is visible to rows at its last token and after. Needs causal.
  /// Lengths of keys then count tokens: seqused_k, and without it the rows of the sequence; key holds
  /// nsa::compressed_length of them. Not with decode, pages, windows, threshold, pair gate or alibi_slopes.
  std::int64_t compress_block = 0;
  std::int64_t compress_stride = 1;
  std::optional<double> softmax_scale = {};  ///< Default 1 / sqrt(head_dim).
  double softcap = 0;                        ///< 0 = off; else softcap * tanh(logit / softcap).
  /// Threshold tau: a tile in which no row can hold a probability >= tau / visible_len is skipped.
  /// None or <= 0: nothing is skipped, bit for bit the dense result.
  std::optional<double> threshold = {};
  /// Gate threshold gamma, with alpha and delta only: a tile whose best gate is below gamma times the best
  /// gate so far is skipped. None: 1 / seqlen_k of each sequence; <= 0: off.
  std::optional<double> gate_threshold = {};
  bool log_sigmoid_gate = true;  ///< g(x) = log(sigmoid(x)); false: g(x) = x.
  bool adaptive_gate = true;     ///< With a causal mask gamma shrinks with the visible share of the row.
  GateLayout gate_layout = GateLayout::bsh;
  /// Upper bounds for packed sequences; an error when smaller than the actual maximum, which is the default.
  std::optional<std::int64_t> max_seqlen_q = {};
  std::optional<std::int64_t> max_seqlen_k = {};
  bool deterministic = false;  ///< Bitwise repeatable gradients. Always so on the CPU.
  std::string backend = {};    ///< "" chooses; else one of the names of backends().
};

struct ForwardArgs {
  AttentionInputs inputs = {};
  AttentionOptions options = {};
  TensorView out = {};       ///< As query, with head_dim_v. Required.
  TensorView lse = {};       ///< Optional. float32 (float64 for float64 inputs), natural logarithm;
                             ///< [batch, num_heads, seqlen_q] or packed [num_heads, total_q].
  TensorView skip_map = {};  ///< Optional. int32, shape skip_map_shape(args): bit n & 31 of word n >> 5 is 1
                             ///< where key tile n of the row tile was kept.
  Workspace workspace = {};  ///< At least workspace_size(args) bytes.
  void* stream = nullptr;    ///< CUDA stream; unused on the CPU, where calls return when done.
};

struct BackwardArgs {
  AttentionInputs inputs = {};
  AttentionOptions options = {};
  TensorView out = {};         ///< Of the forward.
  TensorView lse = {};         ///< Of the forward. Required.
  TensorView skip_map = {};    ///< Of the forward. Required when threshold > 0 or a gate threshold is on.
  TensorView grad_out = {};    ///< As out; any strides.
  TensorView grad_lse = {};    ///< Optional; as lse; any strides.
  TensorView grad_query = {};  ///< As query. The next two as key and value. All three required.
  TensorView grad_key = {};
  TensorView grad_value = {};
  TensorView grad_alpha = {};  ///< Optional; as alpha. Each gradient has its tensor's dtype.
  TensorView grad_delta = {};  ///< Optional; as delta.
  TensorView grad_sink = {};   ///< Optional; as sink.
  /// The gradient is added to what grad_query, or grad_key and grad_value, hold, in place of being written. On the CPU
  /// alone: `unsupported` elsewhere.
  bool add_to_grad_query = false;
  bool add_to_grad_key_value = false;
  Workspace workspace = {};
  void* stream = nullptr;
};

/// One query per sequence over a cache that already holds the newest token. The mask is that of the last
/// row; `threshold` follows the order-free rule of docs/semantics.md ("Decode").
struct DecodeArgs {
  AttentionInputs inputs = {};
  AttentionOptions options = {};
  TensorView out = {};                          ///< [batch, num_heads, head_dim_v]. Required.
  TensorView lse = {};                          ///< Optional. float32 [batch, num_heads].
  std::optional<std::int64_t> num_splits = {};  ///< Parts of the key range computed in parallel.
  bool batch_invariant = false;  ///< Parts of fixed size for every shape. Always so on the CPU unless
                                 ///< num_splits is given.
  Workspace workspace = {};
  void* stream = nullptr;
};

/// Outputs of attention over disjoint sets of keys, joined. outs [parts, batch, seqlen, num_heads, head_dim_v]
/// with lses [parts, batch, num_heads, seqlen], or packed [parts, total, num_heads, head_dim_v] with
/// [parts, num_heads, total].
struct MergeArgs {
  TensorView outs = {};
  TensorView lses = {};
  TensorView out = {};  ///< As one part of outs.
  TensorView lse = {};  ///< As one part of lses.
  void* stream = nullptr;
};

FSA_API void forward(const ForwardArgs& args);
FSA_API void backward(const BackwardArgs& args);
FSA_API void decode(const DecodeArgs& args);
FSA_API void merge(const MergeArgs& args);

/// Bytes of workspace that the call needs; 0 is possible. docs/semantics.md gives the formulas. Tensors that are
/// left out count as contiguous: a call with others may need more.
[[nodiscard]] FSA_API std::size_t workspace_size(const ForwardArgs& args);
[[nodiscard]] FSA_API std::size_t workspace_size(const BackwardArgs& args);
[[nodiscard]] FSA_API std::size_t workspace_size(const DecodeArgs& args);

struct Status {
  bool ok = false;
  std::string reason;  ///< Why not; empty when ok.
};

/// Whether the call would run. Never throws for a bad argument: the reason is the error's message.
[[nodiscard]] FSA_API Status supports(const ForwardArgs& args);
[[nodiscard]] FSA_API Status supports(const BackwardArgs& args);
[[nodiscard]] FSA_API Status supports(const DecodeArgs& args);

/// Gets the kernels of the call ready without running it, so that the call need not wait for the compiler and
/// may be the first inside the capture of a CUDA graph. Outputs may be absent; one that will be there should
/// be, as it may need a kernel of its own. Nothing to do on the CPU.
FSA_API void prefill(const ForwardArgs& args);

struct BackendChoice {
  std::string name;
  bool chosen = false;
  std::string reason;  ///< Why it was passed over; empty for the chosen one and those behind it.
};

struct Explanation {
  std::string backend;                 ///< Name of the chosen backend.
  std::string kernel;                  ///< What it runs, with the instruction set.
  std::vector<BackendChoice> reasons;  ///< In the order in which backends are asked.
  std::int64_t tile_rows = 0;          ///< The skip tile.
  std::int64_t tile_keys = 0;
  double flops = 0;  ///< Over visible (row, key) pairs, skipping aside: forward 2 (head_dim + head_dim_v)
                     ///< per pair and query head, backward 2.5 times that. A block mask in device memory is
                     ///< not read and counts as none.
  double bytes = 0;  ///< Each input read once, each output written once.
  std::size_t workspace_bytes = 0;
  int threads = 1;
};

[[nodiscard]] FSA_API Explanation explain(const ForwardArgs& args);
[[nodiscard]] FSA_API Explanation explain(const BackwardArgs& args);
[[nodiscard]] FSA_API Explanation explain(const DecodeArgs& args);

struct BackendInfo {
  std::string name;
  bool available = false;
  std::string reason;  ///< What it is, or why it is not available.
};

/// Every backend of this build in the order in which they are asked.
[[nodiscard]] FSA_API std::vector<BackendInfo> backends();

/// The unit of every skip decision: 64 rows of one head by 128 keys (64 keys when head_dim > 128).
struct SkipTile {
  std::int64_t rows;
  std::int64_t keys;
};
[[nodiscard]] FSA_API SkipTile skip_tile(std::int64_t head_dim);

/// Shape of the skip map that forward writes: [batch, num_heads, ceil(seqlen_q / 64), words], packed
/// [num_heads, total_q / 64 + batch, words], words = ceil(key_tiles / 32). `out` need not be set.
[[nodiscard]] FSA_API std::vector<std::int64_t> skip_map_shape(const ForwardArgs& args);

/// Kept and visible tiles of a skip map. Of args, only the shapes of the inputs, the masks' options and
/// tensors, the lengths and skip_map are read.
struct TileCounts {
  std::int64_t kept = 0;
  std::int64_t visible = 0;
};
[[nodiscard]] FSA_API TileCounts count_tiles(const ForwardArgs& args);

/// Threads that CPU calls use: FSA_NUM_THREADS, else the processors that this process may run on.
[[nodiscard]] FSA_API int num_threads();
/// Sets it for the process; 1 <= threads <= 1024. Results do not depend on it.
FSA_API void set_num_threads(int threads);

}  // namespace fsa
