// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "api/index_checks.h"
#include "api/nsa_call.h"
#include "core/skip_tile.h"

namespace fsa {
namespace {

constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr std::int64_t kMaxSelectedHeadDim = 256;
constexpr std::int64_t kMaxTopK = 1024;

void check_tensors(NsaCall& call, const nsa::SelectedInputs& in, Purpose purpose) {
  require("query", in.query);
  require("key", in.key);
  require("value", in.value);
  require("selected_blocks", in.selected_blocks);
  take_inputs(call,
              {{"query", &in.query},
               {"key", &in.key},
               {"value", &in.value},
               {"selected_blocks", &in.selected_blocks}},
              {{"cu_seqlens", &in.cu_seqlens}, {"seqused_k", &in.seqused_k}}, purpose);
  check_float_dtype("query", in.query);
  check_dtype("key", in.key, in.query.dtype, " as query");
  check_dtype("value", in.value, in.query.dtype, " as query");
  check_index_dtype("selected_blocks", in.selected_blocks);
  call.problem.dtype = in.query.dtype;
  call.problem.device = call.device;
}

void read_options(NsaProblem& p, const nsa::SelectedOptions& options) {
  check_block_size(options.block_size);
  if (options.chunk_tokens < 0 || options.chunk_tokens > kMaxLength)
    fail(kInvalid, "chunk_tokens: ", options.chunk_tokens, ", must be from 1 to ", kMaxLength,
         "; 0 lets the library choose");
  p.block_size = options.block_size;
  p.algorithm = options.algorithm;
  p.chunk_tokens = options.chunk_tokens;
}

void read_keys(NsaCall& call, const nsa::SelectedInputs& in, const nsa::SelectedOptions& options) {
  NsaProblem& p = call.problem;
  const TensorView &key = in.key, &value = in.value;
  const char* rows = p.packed ? "total" : "seqlen_k";
  check_keys_layout(call, "key", key, "seqlen_k");
  check_keys_layout(call, "value", value, "seqlen_k");
  read_heads(call, in.query, "key", key, options.softmax_scale);
  check_equal("value", rows, value.shape[call.axes.row], "key", key.shape[call.axes.row]);
  check_equal("value", "num_kv_heads", value.shape[call.axes.head], "key", p.num_kv_heads);
  p.head_dim_v = value.shape[call.axes.dim];
  check_head_dim("query", "head_dim", p.head_dim, kMaxSelectedHeadDim);
  check_head_dim("value", "head_dim_v", p.head_dim_v, kMaxSelectedHeadDim);
  check_seqused_k(call, in.seqused_k);
  p.max_seqlen_k = key.shape[call.axes.row];
  p.total_k = p.packed ? p.max_seqlen_k : p.batch * p.max_seqlen_k;
  if (p.packed)
    check_equal("key", "total", p.total_k, "query", p.total_q);
  else if (!in.seqused_k.present() && p.max_seqlen_k != p.max_seqlen_q)
    fail(kInvalid, "key: seqlen_k ", p.max_seqlen_k, ", but query has seqlen_q ", p.max_seqlen_q,
         "; where query holds only the last rows, seqused_k must say how many tokens each sequence has");
  for (const auto& [name, view] : {TensorList::Item{"query", &in.query}, {"key", &key}, {"value", &value}})
    check_unit_last_stride(name, *view);
}

// The shape of selected_blocks, whose width is top_k.
void read_blocks(NsaCall& call, const TensorView& blocks) {
  NsaProblem& p = call.problem;
  const char* layout = p.packed ? "[num_kv_heads, total, top_k]" : "[batch, num_kv_heads, seqlen_q, top_k]";
  check_rank("selected_blocks", blocks, p.packed ? 3 : 4, layout);
  p.top_k = blocks.shape[blocks.rank - 1];
  if (p.packed)
    check_shape("selected_blocks", blocks, {p.num_kv_heads, p.total_q, p.top_k}, layout);
  else
    check_shape("selected_blocks", blocks, {p.batch, p.num_kv_heads, p.max_seqlen_q, p.top_k}, layout);
  if (p.top_k < 1 || p.top_k > kMaxTopK)
    fail(kInvalid, "selected_blocks: top_k ", p.top_k, " (its last extent), must be from 1 to ", kMaxTopK);
}

// The smallest and the largest entry of a row: without a branch per entry, 2 million of which took 3 ms at 32k tokens.
struct Ends {
  std::int32_t low, high;
};
Ends ends_of(const std::int32_t* row, std::int64_t stride, std::int64_t count) {
  Ends ends{row[0], row[0]};
  const auto join = [&](std::int64_t step) {
    for (std::int64_t slot = 1; slot < count; ++slot) {
      ends.low = std::min(ends.low, row[slot * step]);
      ends.high = std::max(ends.high, row[slot * step]);
    }
  };
  if (stride == 1)
    join(1);
  else
    join(stride);
  return ends;
}

// Reads every entry in use: a bad one would reach beyond the keys.
void check_blocks(const NsaProblem& p, const NsaArguments& a) {
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const NsaSequence s = nsa_sequence(p, a, b);
    const std::int64_t blocks = ceil_div(s.tokens, p.block_size);
    for (std::int64_t head = 0; head < p.num_kv_heads; ++head)
      for (std::int64_t row = 0; row < s.rows; ++row) {
        const Ends ends = ends_of(&a.selected_blocks.at(b, head, s.q_begin + row, 0),
                                  a.selected_blocks.stride_slot, p.top_k);
        if (ends.low >= -1 && ends.high < blocks) continue;
        for (std::int64_t slot = 0; slot < p.top_k; ++slot) {
          const std::int64_t block = a.selected_blocks.at(b, head, s.q_begin + row, slot);
          if (block >= -1 && block < blocks) continue;
          const std::string place = p.packed ? text_of(head, ", ", s.q_begin + row, ", ", slot)
                                             : text_of(b, ", ", head, ", ", row, ", ", slot);
          fail(kInvalid, "selected_blocks[", place, "]: ", block,
               ", must be -1 (none) or a block of sequence ", b, ", which has ", blocks, " of block_size ",
               p.block_size);
        }
      }
  }
}

void read_index_values(NsaCall& call, const nsa::SelectedInputs& in, Purpose purpose) {
  const NsaProblem& p = call.problem;
  NsaArguments& a = call.arguments;
  a.cu_seqlens_q = a.cu_seqlens_k = make_table(in.cu_seqlens);
  a.seqused_k = make_table(in.seqused_k);
  a.selected_blocks = make_block_table(call, in.selected_blocks);
  if (!is_readable(call)) return;
  if (p.packed) check_cu_seqlens("cu_seqlens", a.cu_seqlens_q, p.batch, "query", p.total_q);
  for (std::int64_t b = 0; b < p.batch && a.seqused_k.present; ++b) {
    const NsaSequence s = nsa_sequence(p, a, b);
    check_tokens(b, s.tokens, s.rows, "; seqused_k counts the new tokens too");
    if (s.tokens > s.keys)
      fail(kInvalid, "seqused_k[", b, "]: ", s.tokens, ", but sequence ", b, " has room for ", s.keys,
           " keys");
  }
  if (purpose == Purpose::run) check_blocks(p, a);
  read_longest(call);
}

NsaCall prepare_inputs(NsaOperation operation, const nsa::SelectedInputs& in,
                       const nsa::SelectedOptions& options, Purpose purpose) {
  NsaCall call;
  call.problem.operation = operation;
  check_tensors(call, in, purpose);
  read_options(call.problem, options);
  read_rows(call, "query", in.query, "num_heads", "cu_seqlens", in.cu_seqlens);
  read_keys(call, in, options);
  read_blocks(call, in.selected_blocks);
  return call;
}

Expected expected_out(const NsaCall& call, const TensorView& query) {
  Shape shape = shape_of(query);
  shape.extent[shape.rank - 1] = call.problem.head_dim_v;
  return {
      shape, call.problem.dtype,
      call.problem.packed ? "[total, num_heads, head_dim_v]" : "[batch, seqlen_q, num_heads, head_dim_v]"};
}

void fill_operands(NsaCall& call, const nsa::SelectedInputs& in, const TensorView& out,
                   const TensorView& lse) {
  NsaArguments& a = call.arguments;
  a.query = make_operand(in.query, call.axes);
  a.key = make_operand(in.key, call.axes);
  a.value = make_operand(in.value, call.axes);
  a.out = make_operand(out, call.axes);
  a.lse = make_operand(lse, call.lse_axes);
}

}  // namespace

NsaCall prepare(const nsa::SelectedForwardArgs& args, Purpose purpose) {
  const nsa::SelectedInputs& in = args.inputs;
  NsaCall call = prepare_inputs(NsaOperation::selected_forward, in, args.options, purpose);
  accept(call, "out", args.out, Role::writes, true, expected_out(call, in.query), purpose);
  accept(call, "lse", args.lse, Role::writes, false, expected_lse(call), purpose);
  check_no_overlap(call.inputs, call.outputs);
  read_index_values(call, in, purpose);
  fill_operands(call, in, args.out, args.lse);
  return call;
}

NsaCall prepare(const nsa::SelectedBackwardArgs& args, Purpose purpose) {
  const nsa::SelectedInputs& in = args.inputs;
  NsaCall call = prepare_inputs(NsaOperation::selected_backward, in, args.options, purpose);
  const Expected out = expected_out(call, in.query);
  accept(call, "out", args.out, Role::reads, true, out, purpose);
  accept(call, "lse", args.lse, Role::reads, true, expected_lse(call), purpose);
  accept(call, "grad_out", args.grad_out, Role::reads_any_strides, true, out, purpose);
  accept_gradient(call, "grad_query", args.grad_query, in.query, true, "the shape of query", purpose);
  accept_gradient(call, "grad_key", args.grad_key, in.key, true, "the shape of key", purpose);
  accept_gradient(call, "grad_value", args.grad_value, in.value, true, "the shape of value", purpose);
  check_no_overlap(call.inputs, call.outputs);
  read_index_values(call, in, purpose);
  fill_operands(call, in, args.out, args.lse);
  NsaArguments& a = call.arguments;
  a.grad_out = make_operand(args.grad_out, call.axes);
  a.grad_query = make_operand(args.grad_query, call.axes);
  a.grad_key = make_operand(args.grad_key, call.axes);
  a.grad_value = make_operand(args.grad_value, call.axes);
  return call;
}

void nsa::selected_forward(const SelectedForwardArgs& args) {
  NsaCall call = prepare(args, Purpose::run);
  run(call, args.options.backend, args.workspace, args.stream);
}

void nsa::selected_backward(const SelectedBackwardArgs& args) {
  NsaCall call = prepare(args, Purpose::run);
  run(call, args.options.backend, args.workspace, args.stream);
}

}  // namespace fsa
