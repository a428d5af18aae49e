// SPDX-License-Identifier: Apache-2.0
#include "api/prepare.h"
#include "api/problem_builder.h"

namespace fsa {

Call prepare(const ForwardArgs& args, Purpose purpose) {
  Call call = build_call(Operation::forward, args.inputs, args.options, purpose);
  accept(call, "out", args.out, Role::writes, true, expected_out(call, args.inputs), purpose);
  accept(call, "lse", args.lse, Role::writes, false, expected_lse(call), purpose);
  accept_skip_map(call, args.skip_map, Role::writes, purpose);
  check_no_overlap(call.inputs, call.outputs);
  call.arguments.out = make_operand(args.out, call.query_axes);
  call.arguments.lse = make_operand(args.lse, call.lse_axes);
  return call;
}

void forward(const ForwardArgs& args) {
  Call call = prepare(args, Purpose::run);
  run(call, args.options.backend, args.workspace, args.stream);
}

}  // namespace fsa
