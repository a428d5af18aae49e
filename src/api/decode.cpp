// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "api/prepare.h"
#include "api/problem_builder.h"

namespace fsa {

Call prepare(const DecodeArgs& args, Purpose purpose) {
  Call call = build_call(Operation::decode, args.inputs, args.options, purpose);
  Problem& problem = call.problem;
  if (args.num_splits && *args.num_splits < 1)
    fail(ErrorCode::invalid_argument, "num_splits: ", *args.num_splits,
         ", must be at least 1; leave it unset to let the library choose");
  const std::int64_t keys = problem.gathered ? problem.gather_size : problem.max_seqlen_k;
  // More parts than keys would be empty ones.
  problem.num_splits = std::min(args.num_splits.value_or(0), std::max<std::int64_t>(keys, 1));
  problem.batch_invariant = args.batch_invariant;
  accept(call, "out", args.out, Role::writes, true, expected_out(call, args.inputs), purpose);
  accept(call, "lse", args.lse, Role::writes, false, expected_lse(call), purpose);
  check_no_overlap(call.inputs, call.outputs);
  call.arguments.out = make_operand(args.out, call.query_axes);
  call.arguments.lse = make_operand(args.lse, call.lse_axes);
  return call;
}

void decode(const DecodeArgs& args) {
  Call call = prepare(args, Purpose::run);
  run(call, args.options.backend, args.workspace, args.stream);
}

}  // namespace fsa
