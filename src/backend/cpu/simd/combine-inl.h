// SPDX-License-Identifier: Apache-2.0
// NSA combination of the three branches by their gates. An item is up to kCombineRows tokens, one head after the other.
#pragma once

#include "backend/cpu/simd/compress-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

inline constexpr int kBranches = 3;

HWY_INLINE std::int64_t combine_pitch(const NsaProblem& p) { return round_up(p.head_dim_v, 16); }
// Two sets of the rows of an item, of one head: 32 KB at head_dim 64.
HWY_INLINE std::size_t combine_scratch(const NsaProblem& p) {
  return static_cast<std::size_t>(2 * kCombineRows * combine_pitch(p)) * sizeof(float);
}

HWY_INLINE std::int64_t gate_index(const Operand& gates, std::int64_t batch, std::int64_t row,
                                   std::int64_t head, int branch) {
  return batch * gates.stride_batch + row * gates.stride_row + head * gates.stride_head +
         branch * gates.stride_dim;
}

HWY_INLINE float load_gate(const NsaArguments& args, std::int64_t batch, std::int64_t row, std::int64_t head,
                           int branch) {
  return load_scalar(args.gates.data, args.gates.dtype, gate_index(args.gates, batch, row, head, branch));
}

HWY_INLINE void combine(const NsaProblem& p, const NsaArguments& args, const RowsItem& item, void* memory) {
  const std::int64_t pitch = combine_pitch(p), batch = item.sequence.batch, rows = item.end - item.begin;
  float* branch_rows = static_cast<float*>(memory);
  float* sums = branch_rows + kCombineRows * pitch;
  for (std::int64_t head = 0; head < p.num_heads; ++head) {
    clear_floats(sums, rows * pitch);
    for (int c = 0; c < kBranches; ++c) {
      load_rows(args.branches[c], batch, 0, head, item.begin, rows, p.head_dim_v, branch_rows, pitch);
      for (std::int64_t r = 0; r < rows; ++r)
        add_row(branch_rows + r * pitch, load_gate(args, batch, item.begin + r, head, c), p.head_dim_v,
                sums + r * pitch);
    }
    store_rows(args.out, batch, 0, head, item.begin, rows, p.head_dim_v, sums, pitch);
  }
}

// target = factor * source; returns the dot product of source and what was in target.
HWY_INLINE float dot_and_scale(const float* source, float factor, std::int64_t dims, float* target) {
  const Float f = hn::Set(kFloat, factor);
  Float sum = hn::Zero(kFloat);
  for (std::int64_t d = 0; d < dims; d += kLanes) {
    const Float x = hn::Load(kFloat, source + d);
    sum = hn::MulAdd(hn::Load(kFloat, target + d), x, sum);
    hn::Store(hn::Mul(f, x), kFloat, target + d);
  }
  return hn::GetLane(hn::SumOfLanes(kFloat, sum));
}

HWY_INLINE void combine_backward(const NsaProblem& p, const NsaArguments& args, const RowsItem& item,
                                 void* memory) {
  const std::int64_t pitch = combine_pitch(p), batch = item.sequence.batch, rows = item.end - item.begin;
  float* branch_rows = static_cast<float*>(memory);
  float* grads = branch_rows + kCombineRows * pitch;
  float token_grads[kCombineRows][kBranches] = {};
  for (std::int64_t head = 0; head < p.num_heads; ++head) {
    load_rows(args.grad_out, batch, 0, head, item.begin, rows, p.head_dim_v, grads, pitch);
    for (int c = 0; c < kBranches; ++c) {
      load_rows(args.branches[c], batch, 0, head, item.begin, rows, p.head_dim_v, branch_rows, pitch);
      for (std::int64_t r = 0; r < rows; ++r) {
        const float grad = dot_and_scale(grads + r * pitch, load_gate(args, batch, item.begin + r, head, c),
                                         p.head_dim_v, branch_rows + r * pitch);
        if (p.gates_per_head)
          store_scalar(grad, args.grad_gates.data, args.grad_gates.dtype,
                       gate_index(args.grad_gates, batch, item.begin + r, head, c));
        else
          token_grads[r][c] += grad;
      }
      store_rows(args.grad_branches[c], batch, 0, head, item.begin, rows, p.head_dim_v, branch_rows, pitch);
    }
  }
  if (p.gates_per_head) return;
  for (std::int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < kBranches; ++c)
      store_scalar(token_grads[r][c], args.grad_gates.data, args.grad_gates.dtype,
                   gate_index(args.grad_gates, batch, item.begin + r, 0, c));
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
