// SPDX-License-Identifier: Apache-2.0
// Attention over the keys of the selected blocks, one softmax over all of them, and its gradient. With
// P = exp(S - lse):
//   dV_j = sum_i P_ij dO_i,   dS_ij = P_ij (dO_i . V_j - dO_i . O_i),   dQ and dK from dS times softmax_scale
#include "backend/cpu/reference_nsa.h"
#include "backend/cpu/reference_nsa_policies.h"

namespace fsa::reference {
namespace {

// What the query heads of one key head share, in one sequence.
struct Group {
  Matrix key, value;
  std::vector<std::vector<std::int64_t>> visible;  // keys of each row
};

Group load_group(const NsaProblem& problem, const NsaArguments& args, const NsaSequence& s,
                 std::int64_t kv_head) {
  Group group;
  group.key = load_rows(args.key, s.batch, s.k_begin, s.tokens, kv_head, problem.head_dim);
  group.value = load_rows(args.value, s.batch, s.k_begin, s.tokens, kv_head, problem.head_dim_v);
  for (std::int64_t row = 0; row < s.rows; ++row) {
    std::vector<std::int64_t> entries;
    for (std::int64_t slot = 0; slot < problem.top_k; ++slot)
      entries.push_back(args.selected_blocks.at(s.batch, kv_head, s.q_begin + row, slot));
    const std::int64_t token = s.offset() + row;
    const auto blocks = set_of_blocks(entries, block_of(token, problem.block_size));
    group.visible.push_back(keys_of_blocks(blocks, problem.block_size, token));
  }
  return group;
}

void forward_head(const NsaProblem& problem, const NsaArguments& args, const NsaSequence& s,
                  const Group& group, std::int64_t head) {
  const Matrix query = load_rows(args.query, s.batch, s.q_begin, s.rows, head, problem.head_dim);
  for (std::int64_t row = 0; row < s.rows; ++row) {
    std::vector<double> logits;
    for (std::int64_t key : group.visible[row])
      logits.push_back(problem.softmax_scale * dot(query[row], group.key[key]));
    const double lse = log_sum_exp(logits);
    Matrix out(1, problem.head_dim_v);
    if (lse != -kInfinity)
      for (std::size_t i = 0; i < logits.size(); ++i)
        add_scaled(out[0], std::exp(logits[i] - lse), group.value[group.visible[row][i]]);
    store_rows(args.out, out, s.batch, s.q_begin + row, head);
    if (args.lse.present()) store(args.lse, lse, s.batch, s.q_begin + row, head);
  }
}

// Writes the gradients of the rows of one head, adds to those of the keys.
void backward_head(const NsaProblem& problem, const NsaArguments& args, const NsaSequence& s,
                   const Group& group, std::int64_t head, Matrix& grad_key, Matrix& grad_value) {
  const Matrix query = load_rows(args.query, s.batch, s.q_begin, s.rows, head, problem.head_dim);
  const Matrix out = load_rows(args.out, s.batch, s.q_begin, s.rows, head, problem.head_dim_v);
  const Matrix grad_out = load_rows(args.grad_out, s.batch, s.q_begin, s.rows, head, problem.head_dim_v);
  Matrix grad_query(s.rows, problem.head_dim);
  for (std::int64_t row = 0; row < s.rows; ++row) {
    const double lse = load(args.lse, s.batch, s.q_begin + row, head);
    if (lse == -kInfinity) continue;  // no key
    const double out_dot_grad = dot(grad_out[row], out[row]);
    for (std::int64_t key : group.visible[row]) {
      const double logit = problem.softmax_scale * dot(query[row], group.key[key]);
      const double probability = std::exp(logit - lse);
      const double grad_dot =
          problem.softmax_scale * probability * (dot(grad_out[row], group.value[key]) - out_dot_grad);
      add_scaled(grad_value[key], probability, grad_out[row]);
      add_scaled(grad_query[row], grad_dot, group.key[key]);
      add_scaled(grad_key[key], grad_dot, query[row]);
    }
  }
  store_rows(args.grad_query, grad_query, s.batch, s.q_begin, head);
}

}  // namespace

void selected_forward(const NsaProblem& problem, const NsaArguments& args) {
  fill_rows(problem, args.out, 0, problem.head_dim_v);
  if (args.lse.present()) fill_rows(problem, args.lse, -kInfinity, 1);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const NsaSequence s = nsa_sequence(problem, args, b);
    for (std::int64_t kv_head = 0; kv_head < problem.num_kv_heads; ++kv_head) {
      const Group group = load_group(problem, args, s, kv_head);
      for (std::int64_t i = 0; i < problem.group_size; ++i)
        forward_head(problem, args, s, group, kv_head * problem.group_size + i);
    }
  }
}

void selected_backward(const NsaProblem& problem, const NsaArguments& args) {
  fill_rows(problem, args.grad_query, 0, problem.head_dim);
  fill_keys(problem, args.grad_key, 0, problem.head_dim);
  fill_keys(problem, args.grad_value, 0, problem.head_dim_v);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const NsaSequence s = nsa_sequence(problem, args, b);
    for (std::int64_t kv_head = 0; kv_head < problem.num_kv_heads; ++kv_head) {
      const Group group = load_group(problem, args, s, kv_head);
      Matrix grad_key(s.tokens, problem.head_dim), grad_value(s.tokens, problem.head_dim_v);
      for (std::int64_t i = 0; i < problem.group_size; ++i)
        backward_head(problem, args, s, group, kv_head * problem.group_size + i, grad_key, grad_value);
      store_rows(args.grad_key, grad_key, s.batch, s.k_begin, kv_head);
      store_rows(args.grad_value, grad_value, s.batch, s.k_begin, kv_head);
    }
  }
}

}  // namespace fsa::reference
