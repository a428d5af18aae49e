// SPDX-License-Identifier: Apache-2.0
#include "api/choice.h"
#include "api/index_checks.h"
#include "api/nsa_call.h"
#include "api/prepare.h"

namespace fsa {
namespace {

constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr std::int64_t kMaxTopK = 1024;

void check_tensors(NsaCall& call, const nsa::SelectBlocksArgs& args, Purpose purpose) {
  require("query", args.query);
  require("compressed_key", args.compressed_key);
  if (args.cu_seqlens_q.present() != args.cu_seqlens_compressed.present())
    fail(kInvalid,
         args.cu_seqlens_q.present() ? "cu_seqlens_compressed: missing, but cu_seqlens_q is given"
                                     : "cu_seqlens_q: missing, but cu_seqlens_compressed is given",
         "; packed sequences need both, batched ones neither");
  take_inputs(call, {{"query", &args.query}, {"compressed_key", &args.compressed_key}},
              {{"cu_seqlens_q", &args.cu_seqlens_q},
               {"cu_seqlens_compressed", &args.cu_seqlens_compressed},
               {"seqused_k", &args.seqused_k}},
              purpose);
  check_float_dtype("query", args.query);
  check_dtype("compressed_key", args.compressed_key, args.query.dtype, " as query");
  call.problem.dtype = args.query.dtype;
  call.problem.device = call.device;
}

void read_options(NsaProblem& p, const nsa::SelectBlocksArgs& args) {
  check_windows_of_tokens(args.compress_block, args.compress_stride);
  check_block_size(args.block_size);
  if (args.block_size % args.compress_stride != 0)
    fail(kInvalid, "block_size: ", args.block_size, ", must be a multiple of compress_stride ",
         args.compress_stride);
  if (args.init_blocks < 0) fail(kInvalid, "init_blocks: ", args.init_blocks, ", must not be negative");
  if (args.local_blocks < 0) fail(kInvalid, "local_blocks: ", args.local_blocks, ", must not be negative");
  if (args.top_k < 1 || args.top_k > kMaxTopK)
    fail(kInvalid, "top_k: ", args.top_k, ", must be from 1 to ", kMaxTopK);
  if (args.init_blocks > args.top_k || args.local_blocks > args.top_k - args.init_blocks)
    fail(kInvalid, "top_k: ", args.top_k, ", must be at least init_blocks ", args.init_blocks,
         " + local_blocks ", args.local_blocks, "; these blocks are always selected");
  p.compress_block = args.compress_block;
  p.compress_stride = args.compress_stride;
  p.block_size = args.block_size;
  p.top_k = args.top_k;
  p.init_blocks = args.init_blocks;
  p.local_blocks = args.local_blocks;
}

void read_keys(NsaCall& call, const nsa::SelectBlocksArgs& args) {
  NsaProblem& p = call.problem;
  const TensorView& key = args.compressed_key;
  check_keys_layout(call, "compressed_key", key, "compressed");
  read_heads(call, args.query, "compressed_key", key, args.softmax_scale);
  p.head_dim_v = p.head_dim;
  p.max_seqlen_k = key.shape[call.axes.row];
  p.total_k = p.packed ? p.max_seqlen_k : p.batch * p.max_seqlen_k;
  if (p.packed)
    check_shape("cu_seqlens_compressed", args.cu_seqlens_compressed, {p.batch + 1}, "[batch + 1]");
  check_seqused_k(call, args.seqused_k);
  check_unit_last_stride("query", args.query);
  check_unit_last_stride("compressed_key", key);
}

void read_lengths(NsaCall& call, const nsa::SelectBlocksArgs& args) {
  const NsaProblem& p = call.problem;
  NsaArguments& a = call.arguments;
  a.cu_seqlens_q = make_table(args.cu_seqlens_q);
  a.cu_seqlens_k = make_table(args.cu_seqlens_compressed);
  a.seqused_k = make_table(args.seqused_k);
  if (!is_readable(call)) return;
  if (p.packed) {
    check_cu_seqlens("cu_seqlens_q", a.cu_seqlens_q, p.batch, "query", p.total_q);
    check_cu_seqlens("cu_seqlens_compressed", a.cu_seqlens_k, p.batch, "compressed_key", p.total_k);
  }
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const NsaSequence s = nsa_sequence(p, a, b);
    check_tokens(b, s.tokens, s.rows, "; seqused_k counts the new tokens too");
    check_compressed_keys(p.packed ? "cu_seqlens_compressed" : "compressed_key", b, s.keys,
                          a.seqused_k.present, s.tokens, p.compress_block, p.compress_stride);
  }
  read_longest(call);
}

Expected expected_blocks(const NsaProblem& p) {
  if (p.packed) return {{p.num_kv_heads, p.total_q, p.top_k}, DType::int32, "[num_kv_heads, total_q, top_k]"};
  return {{p.batch, p.num_kv_heads, p.max_seqlen_q, p.top_k},
          DType::int32,
          "[batch, num_kv_heads, seqlen_q, top_k]"};
}

}  // namespace

NsaCall prepare(const nsa::SelectBlocksArgs& args, Purpose purpose) {
  NsaCall call;
  call.problem.operation = NsaOperation::select_blocks;
  check_tensors(call, args, purpose);
  read_options(call.problem, args);
  read_rows(call, "query", args.query, "num_heads", "cu_seqlens_q", args.cu_seqlens_q);
  read_keys(call, args);
  const Expected blocks = expected_blocks(call.problem);  // of the extents, before lengths are looked at
  accept(call, "lse", args.lse, Role::reads, true, expected_lse(call), purpose);
  accept(call, "selected_blocks", args.selected_blocks, Role::writes, true, blocks, purpose);
  check_no_overlap(call.inputs, call.outputs);
  read_lengths(call, args);
  NsaArguments& a = call.arguments;
  a.query = make_operand(args.query, call.axes);
  a.key = make_operand(args.compressed_key, call.axes);
  a.lse = make_operand(args.lse, call.lse_axes);
  a.selected_blocks = make_block_table(call, args.selected_blocks);
  return call;
}

void nsa::select_blocks(const SelectBlocksArgs& args) {
  NsaCall call = prepare(args, Purpose::run);
  run(call, args.backend, args.workspace, args.stream);
}

void nsa::attend_and_select(const ForwardArgs& attention, const SelectBlocksArgs& selection) {
  const auto same = [](const char* name, const TensorView& a, const TensorView& b) {
    if (a.data != b.data)
      fail(kInvalid, name, ": not the tensor of the attention; the selection is made of its scores");
  };
  same("query", selection.query, attention.inputs.query);
  same("compressed_key", selection.compressed_key, attention.inputs.key);
  same("lse", selection.lse, attention.lse);
  same("cu_seqlens_q", selection.cu_seqlens_q, attention.inputs.cu_seqlens_q);
  same("cu_seqlens_compressed", selection.cu_seqlens_compressed, attention.inputs.cu_seqlens_k);
  same("seqused_k", selection.seqused_k, attention.inputs.seqused_k);
  Call first = prepare(attention, Purpose::run);
  NsaCall second = prepare(selection, Purpose::run);
  const Problem& p = first.problem;
  const NsaProblem& s = second.problem;
  if (p.compress_block != s.compress_block || p.compress_stride != s.compress_stride ||
      p.softmax_scale != s.softmax_scale || !p.causal)
    fail(kInvalid,
         "selection: compress_block, compress_stride and softmax_scale must be those of the attention, "
         "which must be causal");
  const Backend& backend = choose_backend(p, attention.options.backend);
  if (&backend == &choose_backend(s, selection.backend) &&
      backend.run_with_selection(p, first.arguments, s, second.arguments)) {
    if (logs_dispatch()) {
      log_choice(p, backend);
      log_choice(s, backend);
    }
    return;
  }
  run(first, attention.options.backend, attention.workspace, attention.stream);
  run(second, selection.backend, selection.workspace, selection.stream);
}

}  // namespace fsa
