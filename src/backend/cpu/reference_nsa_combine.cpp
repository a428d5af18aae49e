// SPDX-License-Identifier: Apache-2.0
// out = sum over the branches c of gate_c branch_c; the gates are of a token, or of a token and head.
#include "backend/cpu/reference_nsa.h"

namespace fsa::reference {
namespace {

constexpr int kBranches = 3;

// Calls visit(batch, row, head) for every row of every head; packed tensors are one sequence.
template <class Visit>
void for_each_row(const NsaProblem& problem, const Visit& visit) {
  for (std::int64_t b = 0; b < problem.batch; ++b)
    for (std::int64_t row = 0; row < problem.max_seqlen_q; ++row)
      for (std::int64_t head = 0; head < problem.num_heads; ++head) visit(b, row, head);
}

}  // namespace

void combine(const NsaProblem& problem, const NsaArguments& args) {
  for_each_row(problem, [&](std::int64_t b, std::int64_t row, std::int64_t head) {
    for (std::int64_t d = 0; d < problem.head_dim_v; ++d) {
      double sum = 0;
      for (int c = 0; c < kBranches; ++c)
        sum += load(args.gates, b, row, head, c) * load(args.branches[c], b, row, head, d);
      store(args.out, sum, b, row, head, d);
    }
  });
}

void combine_backward(const NsaProblem& problem, const NsaArguments& args) {
  std::vector<double> grad_gates(kBranches);
  for_each_row(problem, [&](std::int64_t b, std::int64_t row, std::int64_t head) {
    if (problem.gates_per_head || head == 0) grad_gates.assign(kBranches, 0);  // else summed over the heads
    for (int c = 0; c < kBranches; ++c) {
      const double gate = load(args.gates, b, row, head, c);
      for (std::int64_t d = 0; d < problem.head_dim_v; ++d) {
        const double grad_out = load(args.grad_out, b, row, head, d);
        grad_gates[c] += grad_out * load(args.branches[c], b, row, head, d);
        store(args.grad_branches[c], gate * grad_out, b, row, head, d);
      }
      if (problem.gates_per_head || head == problem.num_heads - 1)
        store(args.grad_gates, grad_gates[c], b, row, head, c);
    }
  });
}

}  // namespace fsa::reference
