// SPDX-License-Identifier: Apache-2.0
#include "api/call.h"
#include "backend/backend.h"
#include "core/env.h"

namespace fsa {
namespace {

// One part of a stacked tensor: the view without its first axis.
TensorView first_part(const TensorView& stacked) {
  TensorView part = stacked;
  part.rank = stacked.rank - 1;
  for (int axis = 0; axis < part.rank; ++axis) {
    part.shape[axis] = stacked.shape[axis + 1];
    part.strides[axis] = stacked.strides[axis + 1];
  }
  return part;
}

void check_inputs(const TensorView& outs, const TensorView& lses) {
  for (const auto& [name, view] : {TensorList::Item{"outs", &outs}, {"lses", &lses}}) {
    require(name, *view);
    check_view(name, *view);
    check_data(name, *view);
    check_device(name, *view, "outs", outs.device);
  }
  check_float_dtype("outs", outs);
  if (outs.rank != 4 && outs.rank != 5)
    fail(ErrorCode::invalid_argument, "outs: rank ", outs.rank, " with shape ", to_string(shape_of(outs)),
         ", must be [parts, batch, seqlen, num_heads, head_dim_v] or packed [parts, total, num_heads, "
         "head_dim_v]");
  if (outs.shape[0] < 1) fail(ErrorCode::invalid_argument, "outs: 0 parts, must be at least 1");
  check_head_dim("outs", "head_dim_v", outs.shape[outs.rank - 1]);
}

// Sizes and strides; outs is checked.
MergeProblem read_sizes(const TensorView& outs) {
  const bool packed = outs.rank == 4;
  const int row_axis = packed ? 1 : 2;
  MergeProblem problem;
  problem.device = outs.device;
  problem.parts = outs.shape[0];
  problem.batch = packed ? 1 : outs.shape[1];
  problem.rows = outs.shape[row_axis];
  problem.num_heads = outs.shape[row_axis + 1];
  problem.head_dim_v = outs.shape[row_axis + 2];
  return problem;
}

void run_merge(const MergeProblem& problem) {
  const std::string_view wanted = env::backend();
  for (const Backend* backend : registry()) {
    if (!wanted.empty() && backend->name() != wanted) continue;
    if (backend->merge(problem)) return;
  }
  if (!wanted.empty())
    fail(ErrorCode::unsupported, "FSA_BACKEND: \"", wanted, "\" cannot merge tensors on ",
         to_string(problem.device));
  fail(ErrorCode::unsupported, "outs: on ", to_string(problem.device),
       ", where this version has no merge; move the parts to the CPU");
}

}  // namespace

void merge(const MergeArgs& args) {
  const TensorView &outs = args.outs, &lses = args.lses;
  check_inputs(outs, lses);
  MergeProblem problem = read_sizes(outs);
  const bool packed = outs.rank == 4;
  const DType lse_dtype = outs.dtype == DType::float64 ? DType::float64 : DType::float32;
  check_dtype("lses", lses, lse_dtype, "");
  if (packed)
    check_shape("lses", lses, {problem.parts, problem.num_heads, problem.rows},
                "[parts, num_heads, total] of outs");
  else
    check_shape("lses", lses, {problem.parts, problem.batch, problem.num_heads, problem.rows},
                "[parts, batch, num_heads, seqlen] of outs");

  check_unit_last_stride("outs", outs);
  check_unit_last_stride("lses", lses);

  CallTensors call;
  call.device = outs.device;
  call.inputs.add("outs", outs);
  call.inputs.add("lses", lses);
  const TensorView out_part = first_part(outs), lse_part = first_part(lses);
  accept(call, "out", args.out, Role::writes, true, {shape_of(out_part), outs.dtype, "one part of outs"},
         Purpose::run);
  accept(call, "lse", args.lse, Role::writes, true, {shape_of(lse_part), lse_dtype, "one part of lses"},
         Purpose::run);
  check_no_overlap(call.inputs, call.outputs);

  const Axes out_axes = packed ? kPackedAxes : kBatchedAxes;
  const Axes lse_axes = packed ? Axes{.row = 1, .head = 0} : Axes{.batch = 0, .row = 2, .head = 1};
  problem.outs = make_operand(out_part, out_axes);
  problem.lses = make_operand(lse_part, lse_axes);
  problem.out = make_operand(args.out, out_axes);
  problem.lse = make_operand(args.lse, lse_axes);
  problem.stride_outs_part = effective_stride(outs, 0);
  problem.stride_lses_part = effective_stride(lses, 0);
  problem.stream = args.stream;
  run_merge(problem);
}

}  // namespace fsa
