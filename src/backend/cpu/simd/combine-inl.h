// SPDX-License-Identifier: Apache-2.0
// NSA combination of the three branches by their gates, row by row.
#pragma once

#include "backend/cpu/simd/compress-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

inline constexpr int kBranches = 3;

HWY_INLINE std::int64_t combine_pitch(const NsaProblem& p) { return round_up(p.head_dim_v, 16); }
HWY_INLINE std::size_t combine_scratch(const NsaProblem& p) {
  return static_cast<std::size_t>(3 * combine_pitch(p)) * sizeof(float);
}

HWY_INLINE std::int64_t gate_index(const Operand& gates, std::int64_t batch, std::int64_t row,
                                   std::int64_t head, int branch) {
  return batch * gates.stride_batch + row * gates.stride_row + head * gates.stride_head +
         branch * gates.stride_dim;
}

HWY_INLINE void combine(const NsaProblem& p, const NsaArguments& args, const RowsItem& item, void* memory) {
  const std::int64_t pitch = combine_pitch(p), batch = item.sequence.batch;
  float* branch_row = static_cast<float*>(memory);
  float* sum = branch_row + pitch;
  for (std::int64_t row = item.begin; row < item.end; ++row)
    for (std::int64_t head = 0; head < p.num_heads; ++head) {
      clear_floats(sum, pitch);
      for (int c = 0; c < kBranches; ++c) {
        load_rows(args.branches[c], batch, 0, head, row, 1, p.head_dim_v, branch_row, 0);
        add_row(branch_row,
                load_scalar(args.gates.data, args.gates.dtype, gate_index(args.gates, batch, row, head, c)),
                p.head_dim_v, sum);
      }
      store_rows(args.out, batch, 0, head, row, 1, p.head_dim_v, sum, pitch);
    }
}

HWY_INLINE void combine_backward(const NsaProblem& p, const NsaArguments& args, const RowsItem& item,
                                 void* memory) {
  const std::int64_t pitch = combine_pitch(p), batch = item.sequence.batch;
  float* branch_row = static_cast<float*>(memory);
  float* grad_row = branch_row + pitch;
  float* scaled = grad_row + pitch;
  for (std::int64_t row = item.begin; row < item.end; ++row) {
    float token_grads[kBranches] = {};
    for (std::int64_t head = 0; head < p.num_heads; ++head) {
      load_rows(args.grad_out, batch, 0, head, row, 1, p.head_dim_v, grad_row, 0);
      for (int c = 0; c < kBranches; ++c) {
        load_rows(args.branches[c], batch, 0, head, row, 1, p.head_dim_v, branch_row, 0);
        const float gate =
            load_scalar(args.gates.data, args.gates.dtype, gate_index(args.gates, batch, row, head, c));
        clear_floats(scaled, pitch);
        add_row(grad_row, gate, p.head_dim_v, scaled);
        store_rows(args.grad_branches[c], batch, 0, head, row, 1, p.head_dim_v, scaled, pitch);
        const float grad = dot_row(branch_row, grad_row, p.head_dim_v);
        if (p.gates_per_head)
          store_scalar(grad, args.grad_gates.data, args.grad_gates.dtype,
                       gate_index(args.grad_gates, batch, row, head, c));
        else
          token_grads[c] += grad;
      }
    }
    if (p.gates_per_head) continue;
    for (int c = 0; c < kBranches; ++c)
      store_scalar(token_grads[c], args.grad_gates.data, args.grad_gates.dtype,
                   gate_index(args.grad_gates, batch, row, 0, c));
  }
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
