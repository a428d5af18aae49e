// SPDX-License-Identifier: Apache-2.0
#include "api/prepare.h"
#include "api/problem_builder.h"

namespace fsa {
namespace {

void accept_gradients(Call& call, const BackwardArgs& args, Purpose purpose) {
  const AttentionInputs& in = args.inputs;
  accept_gradient(call, "grad_query", args.grad_query, in.query, true, "the shape of query", purpose);
  accept_gradient(call, "grad_key", args.grad_key, in.key, true, "the shape of key", purpose);
  accept_gradient(call, "grad_value", args.grad_value, in.value, true, "the shape of value", purpose);
  accept_gradient(call, "grad_alpha", args.grad_alpha, in.alpha, false, "the shape of alpha", purpose);
  accept_gradient(call, "grad_delta", args.grad_delta, in.delta, false, "the shape of delta", purpose);
  accept_gradient(call, "grad_sink", args.grad_sink, in.sink, false, "the shape of sink", purpose);
}

void fill_operands(Call& call, const BackwardArgs& args) {
  Arguments& a = call.arguments;
  a.out = make_operand(args.out, call.query_axes);
  a.lse = make_operand(args.lse, call.lse_axes);
  a.grad_out = make_operand(args.grad_out, call.query_axes);
  a.grad_lse = make_operand(args.grad_lse, call.lse_axes);
  a.grad_query = make_operand(args.grad_query, call.query_axes);
  a.grad_key = make_operand(args.grad_key, call.key_axes);
  a.grad_value = make_operand(args.grad_value, call.key_axes);
  a.grad_alpha = make_operand(args.grad_alpha, call.alpha_axes);
  a.grad_delta = make_operand(args.grad_delta, call.delta_axes);
  a.grad_sink = make_operand(args.grad_sink, {.head = 0});
  Problem& p = call.problem;
  p.aligned_out = is_aligned(a.out);
  p.aligned_grad_out = is_aligned(a.grad_out);
  p.aligned_grad_query = is_aligned(a.grad_query);
  p.aligned_grad_key = is_aligned(a.grad_key);
  p.aligned_grad_value = is_aligned(a.grad_value);
  p.adds_grad_query = args.add_to_grad_query;
  p.adds_grad_key_value = args.add_to_grad_key_value;
}

}  // namespace

Call prepare(const BackwardArgs& args, Purpose purpose) {
  Call call = build_call(Operation::backward, args.inputs, args.options, purpose);
  const Expected out = expected_out(call, args.inputs), lse = expected_lse(call);
  accept(call, "out", args.out, Role::reads, true, out, purpose);
  accept(call, "lse", args.lse, Role::reads, true, lse, purpose);
  accept(call, "grad_out", args.grad_out, Role::reads_any_strides, true, out, purpose);
  call.problem.has_grad_lse =
      accept(call, "grad_lse", args.grad_lse, Role::reads_any_strides, false, lse, purpose);
  accept_skip_map(call, args.skip_map, Role::reads, purpose);
  const bool needs_map = call.problem.skips_tiles();
  if (needs_map && !args.skip_map.present() && purpose == Purpose::run)
    fail(ErrorCode::invalid_argument,
         "skip_map: missing, but a threshold or gate threshold is on, so backward needs "
         "to know which tiles forward kept; pass the skip_map of that forward");
  if (!needs_map) {  // the dense backward has no use for it
    call.arguments.skip_map = {};
    call.problem.has_skip_map = false;
  }
  accept_gradients(call, args, purpose);
  if ((args.add_to_grad_query || args.add_to_grad_key_value) && call.device.kind != DeviceKind::cpu)
    fail(ErrorCode::unsupported, args.add_to_grad_query ? "add_to_grad_query" : "add_to_grad_key_value",
         ": true, but query is on ", to_string(call.device),
         " and gradients join others on the CPU alone; leave it false and add the results");
  check_no_overlap(call.inputs, call.outputs);
  fill_operands(call, args);
  return call;
}

void backward(const BackwardArgs& args) {
  Call call = prepare(args, Purpose::run);
  run(call, args.options.backend, args.workspace, args.stream);
}

}  // namespace fsa
