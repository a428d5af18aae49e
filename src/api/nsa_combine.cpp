// SPDX-License-Identifier: Apache-2.0
#include "api/nsa_call.h"

namespace fsa {
namespace {

constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr const char* kBranchNames[3] = {"compressed", "selected", "sliding"};
constexpr const char* kGradNames[3] = {"grad_compressed", "grad_selected", "grad_sliding"};

// Packed tensors are one sequence: which rows belong together plays no part here.
void read_sizes(NsaCall& call, const TensorView& branch) {
  NsaProblem& p = call.problem;
  if (branch.rank != 3 && branch.rank != 4)
    fail(kInvalid, "compressed: rank ", branch.rank, " with shape ", to_string(shape_of(branch)),
         ", must be [batch, seqlen, num_heads, head_dim_v] or packed [total, num_heads, head_dim_v]");
  p.dtype = branch.dtype;
  p.device = call.device;
  p.packed = branch.rank == 3;
  call.axes = p.packed ? kPackedAxes : kBatchedAxes;
  p.batch = p.packed ? 1 : branch.shape[0];
  p.max_seqlen_q = p.max_seqlen_k = branch.shape[call.axes.row];
  p.total_q = p.total_k = p.batch * p.max_seqlen_q;
  p.num_heads = p.num_kv_heads = branch.shape[call.axes.head];
  p.head_dim = p.head_dim_v = branch.shape[call.axes.dim];
  if (p.num_heads < 1) fail(kInvalid, "compressed: num_heads 0, must be at least 1");
  check_head_dim("compressed", "head_dim_v", p.head_dim_v);
}

Axes axes_of_gates(const NsaCall& call) {
  Axes axes = call.axes;
  if (call.problem.gates_per_head) return axes;
  axes.dim = axes.head;
  axes.head = -1;
  return axes;
}

void read_gates(NsaCall& call, const TensorView& gates) {
  NsaProblem& p = call.problem;
  if (gates.dtype != p.dtype && gates.dtype != DType::float32)
    fail(ErrorCode::type_mismatch, "gates: dtype ", name_of(gates.dtype), ", must be ", name_of(p.dtype),
         " as compressed, or float32");
  const int per_token_rank = p.packed ? 2 : 3;
  const char* layout = p.packed ? "[total, 3] or [total, num_heads, 3]"
                                : "[batch, seqlen, 3] or [batch, seqlen, num_heads, 3]";
  if (gates.rank != per_token_rank && gates.rank != per_token_rank + 1)
    fail(kInvalid, "gates: rank ", gates.rank, " with shape ", to_string(shape_of(gates)), ", must be ",
         layout);
  p.gates_per_head = gates.rank == per_token_rank + 1;
  Shape shape = p.packed ? Shape{p.total_q} : Shape{p.batch, p.max_seqlen_q};
  if (p.gates_per_head) shape.extent[shape.rank++] = p.num_heads;
  shape.extent[shape.rank++] = 3;
  check_shape("gates", gates, shape, layout);
}

NsaCall prepare_inputs(NsaOperation operation, const TensorView* const (&branches)[3],
                       const TensorView& gates) {
  NsaCall call;
  call.problem.operation = operation;
  for (int i = 0; i < 3; ++i) require(kBranchNames[i], *branches[i]);
  require("gates", gates);
  take_inputs(call,
              {{kBranchNames[0], branches[0]},
               {kBranchNames[1], branches[1]},
               {kBranchNames[2], branches[2]},
               {"gates", &gates}},
              {}, Purpose::run);
  check_float_dtype("compressed", *branches[0]);
  read_sizes(call, *branches[0]);
  for (int i = 0; i < 3; ++i) {
    check_dtype(kBranchNames[i], *branches[i], call.problem.dtype, " as compressed");
    check_shape(kBranchNames[i], *branches[i], shape_of(*branches[0]), "the shape of compressed");
    check_unit_last_stride(kBranchNames[i], *branches[i]);
    call.arguments.branches[i] = make_operand(*branches[i], call.axes);
  }
  read_gates(call, gates);
  call.arguments.gates = make_operand(gates, axes_of_gates(call));
  return call;
}

}  // namespace

NsaCall prepare(const nsa::CombineArgs& args) {
  NsaCall call =
      prepare_inputs(NsaOperation::combine, {&args.compressed, &args.selected, &args.sliding}, args.gates);
  const Expected out{shape_of(args.compressed), call.problem.dtype, "the shape of compressed"};
  accept(call, "out", args.out, Role::writes, true, out, Purpose::run);
  check_no_overlap(call.inputs, call.outputs);
  call.arguments.out = make_operand(args.out, call.axes);
  return call;
}

NsaCall prepare(const nsa::CombineBackwardArgs& args) {
  const TensorView* const branches[3] = {&args.compressed, &args.selected, &args.sliding};
  const TensorView* const grads[3] = {&args.grad_compressed, &args.grad_selected, &args.grad_sliding};
  NsaCall call = prepare_inputs(NsaOperation::combine_backward, branches, args.gates);
  const Expected out{shape_of(args.compressed), call.problem.dtype, "the shape of compressed"};
  accept(call, "grad_out", args.grad_out, Role::reads_any_strides, true, out, Purpose::run);
  for (int i = 0; i < 3; ++i)
    accept_gradient(call, kGradNames[i], *grads[i], *branches[i], true, "the shape of compressed",
                    Purpose::run);
  accept_gradient(call, "grad_gates", args.grad_gates, args.gates, true, "the shape of gates", Purpose::run);
  check_no_overlap(call.inputs, call.outputs);
  NsaArguments& a = call.arguments;
  a.grad_out = make_operand(args.grad_out, call.axes);
  for (int i = 0; i < 3; ++i) a.grad_branches[i] = make_operand(*grads[i], call.axes);
  a.grad_gates = make_operand(args.grad_gates, axes_of_gates(call));
  return call;
}

void nsa::combine(const CombineArgs& args) {
  NsaCall call = prepare(args);
  run(call, args.backend, {}, args.stream);
}

void nsa::combine_backward(const CombineBackwardArgs& args) {
  NsaCall call = prepare(args);
  run(call, args.backend, {}, args.stream);
}

}  // namespace fsa
