// SPDX-License-Identifier: Apache-2.0
#include "api/index_checks.h"
#include "api/nsa_call.h"

namespace fsa {

namespace nsa {

std::int64_t compressed_length(std::int64_t tokens, std::int64_t compress_block,
                               std::int64_t compress_stride) {
  if (tokens < 0 || tokens > kMaxLength)
    fail(ErrorCode::invalid_argument, "tokens: ", tokens, ", must be from 0 to ", kMaxLength);
  check_windows_of_tokens(compress_block, compress_stride);
  return fsa::compressed_length(tokens, compress_block, compress_stride);
}

}  // namespace nsa

namespace {

constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr const char* kPackedOut = "[total_compressed, num_kv_heads, head_dim]";
constexpr const char* kBatchedOut =
    "[batch, compressed_length(seqlen, compress_block, compress_stride), num_kv_heads, head_dim]";

void check_tensors(NsaCall& call, const nsa::CompressInputs& in, nsa::CompressKind kind, Purpose purpose) {
  const bool mean = kind == nsa::CompressKind::mean;
  require("x", in.x);
  if (!mean) require("weight", in.weight);
  if (mean && in.weight.present())
    fail(kInvalid, "weight: given, but kind mean has none; leave it out or choose linear or weighted");
  if (in.cu_seqlens.present() && !in.cu_seqlens_compressed.present())
    fail(kInvalid,
         "cu_seqlens_compressed: missing, but cu_seqlens is given; it holds the sums of compressed_length");
  if (!in.cu_seqlens.present() && in.cu_seqlens_compressed.present())
    fail(kInvalid,
         "cu_seqlens: missing, but cu_seqlens_compressed is given; packed sequences need both, batched ones "
         "neither");
  take_inputs(call, {{"x", &in.x}, {"weight", &in.weight}, {"intra_block_pe", &in.intra_block_pe}},
              {{"cu_seqlens", &in.cu_seqlens}, {"cu_seqlens_compressed", &in.cu_seqlens_compressed}},
              purpose);
  check_float_dtype("x", in.x);
  for (const auto& [name, view] :
       {TensorList::Item{"weight", &in.weight}, {"intra_block_pe", &in.intra_block_pe}})
    if (view->present()) check_dtype(name, *view, in.x.dtype, " as x");
}

void check_parameters(const NsaProblem& p, const nsa::CompressInputs& in) {
  const std::int64_t block = p.compress_block;
  if (p.kind == nsa::CompressKind::linear) {
    if (block > kMaxLength / p.head_dim)
      fail(kInvalid, "compress_block: ", block, ", must be at most ", kMaxLength / p.head_dim,
           " with head_dim ", p.head_dim);
    check_shape("weight", in.weight, {p.num_kv_heads, block * p.head_dim, p.head_dim},
                "[num_kv_heads, compress_block * head_dim, head_dim] of kind linear");
  } else if (p.kind == nsa::CompressKind::weighted) {
    check_shape("weight", in.weight, {p.num_kv_heads, block},
                "[num_kv_heads, compress_block] of kind weighted");
  }
  if (p.has_pe)
    check_shape("intra_block_pe", in.intra_block_pe, {p.num_kv_heads, block, p.head_dim},
                "[num_kv_heads, compress_block, head_dim]");
  for (const auto& [name, view] :
       {TensorList::Item{"x", &in.x}, {"weight", &in.weight}, {"intra_block_pe", &in.intra_block_pe}})
    if (view->present()) check_unit_last_stride(name, *view);
}

void read_sizes(NsaCall& call, const nsa::CompressInputs& in, const nsa::CompressOptions& options) {
  NsaProblem& p = call.problem;
  p.dtype = in.x.dtype;
  p.device = call.device;
  p.kind = options.kind;
  p.has_pe = in.intra_block_pe.present();
  check_windows_of_tokens(options.compress_block, options.compress_stride);
  p.compress_block = options.compress_block;
  p.compress_stride = options.compress_stride;
  read_rows(call, "x", in.x, "num_kv_heads", "cu_seqlens", in.cu_seqlens);
  p.num_heads = p.num_kv_heads = in.x.shape[call.axes.head];
  p.head_dim = p.head_dim_v = in.x.shape[call.axes.dim];
  check_head_dim("x", "head_dim", p.head_dim);
  if (p.num_kv_heads < 1) fail(kInvalid, "x: num_kv_heads 0, must be at least 1");
  if (p.packed) check_shape("cu_seqlens_compressed", in.cu_seqlens_compressed, {p.batch + 1}, "[batch + 1]");
  check_parameters(p, in);
}

// `rows_of_out` is out or its gradient, if there is one: how many rows packed results have.
Expected read_compressed(NsaCall& call, const nsa::CompressInputs& in, const char* name,
                         const TensorView& rows_of_out) {
  NsaProblem& p = call.problem;
  NsaArguments& a = call.arguments;
  a.cu_seqlens_q = make_table(in.cu_seqlens);
  a.cu_seqlens_k = make_table(in.cu_seqlens_compressed);
  if (!p.packed) {
    p.max_seqlen_k = fsa::compressed_length(p.max_seqlen_q, p.compress_block, p.compress_stride);
    p.total_k = p.batch * p.max_seqlen_k;
    return {{p.batch, p.max_seqlen_k, p.num_kv_heads, p.head_dim}, p.dtype, kBatchedOut};
  }
  // Every window starts at a multiple of the stride of its own.
  p.total_k = rows_of_out.rank == 3 ? rows_of_out.shape[0] : p.total_q / p.compress_stride;
  p.max_seqlen_k = p.total_k;
  if (is_readable(call)) {
    check_cu_seqlens("cu_seqlens", a.cu_seqlens_q, p.batch, "x", p.total_q);
    check_cu_seqlens("cu_seqlens_compressed", a.cu_seqlens_k, p.batch, name,
                     rows_of_out.rank == 3 ? p.total_k : kMaxLength);
    for (std::int64_t b = 0; b < p.batch; ++b) {
      const NsaSequence s = nsa_sequence(p, a, b);
      check_compressed_keys("cu_seqlens_compressed", b, s.keys, false, s.tokens, p.compress_block,
                            p.compress_stride);
    }
    read_longest(call);
  }
  return {{p.total_k, p.num_kv_heads, p.head_dim}, p.dtype, kPackedOut};
}

void fill_operands(NsaCall& call, const nsa::CompressInputs& in) {
  NsaArguments& a = call.arguments;
  a.key = make_operand(in.x, call.axes);
  const bool weighted = call.problem.kind == nsa::CompressKind::weighted;
  a.weight = make_operand(in.weight, {.row = 1, .head = 0, .dim = weighted ? -1 : 2});
  a.pe = make_operand(in.intra_block_pe, {.row = 1, .head = 0, .dim = 2});
}

}  // namespace

NsaCall prepare(const nsa::CompressArgs& args, Purpose purpose) {
  NsaCall call;
  call.problem.operation = NsaOperation::compress;
  check_tensors(call, args.inputs, args.options.kind, purpose);
  read_sizes(call, args.inputs, args.options);
  const Expected out = read_compressed(call, args.inputs, "out", args.out);
  accept(call, "out", args.out, Role::writes, true, out, purpose);
  check_no_overlap(call.inputs, call.outputs);
  fill_operands(call, args.inputs);
  call.arguments.out = make_operand(args.out, call.axes);
  return call;
}

NsaCall prepare(const nsa::CompressBackwardArgs& args, Purpose purpose) {
  const nsa::CompressInputs& in = args.inputs;
  NsaCall call;
  call.problem.operation = NsaOperation::compress_backward;
  check_tensors(call, in, args.options.kind, purpose);
  read_sizes(call, in, args.options);
  const Expected out = read_compressed(call, in, "grad_out", args.grad_out);
  accept(call, "grad_out", args.grad_out, Role::reads_any_strides, true, out, purpose);
  accept_gradient(call, "grad_x", args.grad_x, in.x, true, "the shape of x", purpose);
  accept_gradient(call, "grad_weight", args.grad_weight, in.weight, in.weight.present(),
                  "the shape of weight", purpose);
  accept_gradient(call, "grad_intra_block_pe", args.grad_intra_block_pe, in.intra_block_pe,
                  in.intra_block_pe.present(), "the shape of intra_block_pe", purpose);
  check_no_overlap(call.inputs, call.outputs);
  fill_operands(call, in);
  NsaArguments& a = call.arguments;
  const bool weighted = call.problem.kind == nsa::CompressKind::weighted;
  a.grad_out = make_operand(args.grad_out, call.axes);
  a.grad_key = make_operand(args.grad_x, call.axes);
  a.grad_weight = make_operand(args.grad_weight, {.row = 1, .head = 0, .dim = weighted ? -1 : 2});
  a.grad_pe = make_operand(args.grad_intra_block_pe, {.row = 1, .head = 0, .dim = 2});
  return call;
}

void nsa::compress(const CompressArgs& args) {
  NsaCall call = prepare(args, Purpose::run);
  run(call, args.options.backend, args.workspace, args.stream);
}

void nsa::compress_backward(const CompressBackwardArgs& args) {
  NsaCall call = prepare(args, Purpose::run);
  run(call, args.options.backend, args.workspace, args.stream);
}

}  // namespace fsa
