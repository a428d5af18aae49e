// SPDX-License-Identifier: Apache-2.0
// The gradient of the function that the forward computed, its skip decisions held constant.
// With P = exp(S - lse):
//   dV_j  = sum_i P_ij dO_i
//   dS_ij = P_ij (dO_i . V_j - (dO_i . O_i - dlse_i))
//   dsink = sum_i -exp(sink - lse_i) (dO_i . O_i - dlse_i)
// and from dS through the logit to q, k, alpha and delta.
#include <algorithm>
#include <vector>

#include "backend/cpu/reference.h"
#include "backend/cpu/reference_tensors.h"

namespace fsa::reference {
namespace {

struct KeyGradients {  // of one key head, summed over its group of query heads
  Matrix key, value;
  std::vector<double> delta;
};

void store_gradient(const Operand& target, bool adds, double value, std::int64_t batch, std::int64_t row,
                    std::int64_t head, std::int64_t dim) {
  store(target, adds ? load(target, batch, row, head, dim) + value : value, batch, row, head, dim);
}

// Adds what query head `head_index` contributes, stores the gradients of its rows, returns its dsink.
double backward_head(const Problem& problem, const Arguments& args, const Sequence& s,
                     std::int64_t head_index, KeyGradients& grad) {
  const Head head = load_head(problem, args, s, head_index);
  const std::int64_t tile_keys = skip_tile_keys(problem.head_dim);
  double grad_sink = 0;
  for (std::int64_t row = 0; row < s.seqlen_q; ++row) {
    const std::int64_t memory_row = s.q_begin + row;
    const double lse = load(args.lse, s.batch, memory_row, head_index);
    if (lse == -kInfinity) continue;  // no key, no sink: the gradients stay 0

    std::vector<double> grad_out(problem.head_dim_v);
    double out_dot_grad = 0;
    for (std::int64_t d = 0; d < problem.head_dim_v; ++d) {
      grad_out[d] = load(args.grad_out, s.batch, memory_row, head_index, d);
      out_dot_grad += grad_out[d] * load(args.out, s.batch, memory_row, head_index, d);
    }
    if (args.grad_lse.present()) out_dot_grad -= load(args.grad_lse, s.batch, memory_row, head_index);
    if (problem.has_sink) grad_sink -= std::exp(head.sink - lse) * out_dot_grad;

    std::vector<double> grad_query(problem.head_dim);
    double grad_alpha = 0;
    for (std::int64_t col = 0; col < s.seqlen_k; ++col) {
      if (!is_visible(head.mask, row, col)) continue;
      if (args.skip_map.present &&
          !is_kept(args.skip_map, s, head_index, row / kSkipTileRows, col / tile_keys))
        continue;
      const double product = head.product(row, col);
      const double probability = std::exp(head.logit(row, col) - lse);
      const double grad_logit = probability * (dot(grad_out, head.value[col]) - out_dot_grad);
      const double grad_dot =
          grad_logit * logit_derivative(head.rule, dot(head.query[row], head.key[col]), product);
      add_scaled(grad.value[col], probability, grad_out);
      add_scaled(grad_query, grad_dot, head.key[col]);
      add_scaled(grad.key[col], grad_dot, head.query[row]);
      if (problem.has_gate) {
        const double grad_product = grad_dot * pair_gate_derivative(product, head.rule.log_sigmoid_gate);
        grad_alpha += grad_product * head.delta[col];
        grad.delta[col] += grad_product * head.alpha[row];
      }
    }
    for (std::int64_t d = 0; d < problem.head_dim; ++d)
      store_gradient(args.grad_query, problem.adds_grad_query, grad_query[d], s.batch, memory_row, head_index,
                     d);
    if (args.grad_alpha.present()) store(args.grad_alpha, grad_alpha, s.batch, memory_row, head_index);
  }
  return grad_sink;
}

void store_key_gradients(const Problem& problem, const Arguments& args, const Sequence& s,
                         std::int64_t kv_head, const KeyGradients& grad) {
  const bool adds = problem.adds_grad_key_value;
  for (std::int64_t col = 0; col < s.seqlen_k; ++col) {
    const std::int64_t memory_row = s.k_begin + col;
    for (std::int64_t d = 0; d < problem.head_dim; ++d)
      store_gradient(args.grad_key, adds, grad.key[col][d], s.batch, memory_row, kv_head, d);
    for (std::int64_t d = 0; d < problem.head_dim_v; ++d)
      store_gradient(args.grad_value, adds, grad.value[col][d], s.batch, memory_row, kv_head, d);
    if (args.grad_delta.present()) store(args.grad_delta, grad.delta[col], s.batch, memory_row, kv_head);
  }
}

// What lies beyond the used lengths keeps this.
void write_zeros(const Problem& problem, const Arguments& args) {
  const std::int64_t batch_q = problem.packed_q ? 1 : problem.batch;
  const std::int64_t rows = problem.packed_q ? problem.total_q : problem.max_seqlen_q;
  const std::int64_t batch_k = problem.packed_k ? 1 : problem.batch;
  const std::int64_t keys = problem.packed_k ? problem.total_k : problem.max_seqlen_k;
  if (!problem.adds_grad_query) fill(args.grad_query, 0, batch_q, rows, problem.num_heads, problem.head_dim);
  if (!problem.adds_grad_key_value) {
    fill(args.grad_key, 0, batch_k, keys, problem.num_kv_heads, problem.head_dim);
    fill(args.grad_value, 0, batch_k, keys, problem.num_kv_heads, problem.head_dim_v);
  }
  if (args.grad_alpha.present()) fill(args.grad_alpha, 0, batch_q, rows, problem.num_heads);
  if (args.grad_delta.present()) fill(args.grad_delta, 0, batch_k, keys, problem.num_kv_heads);
}

}  // namespace

void backward(const Problem& problem, const Arguments& args) {
  write_zeros(problem, args);
  std::vector<double> grad_sink(problem.num_heads);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const Sequence s = sequence(problem, args, b);
    for (std::int64_t kv_head = 0; kv_head < problem.num_kv_heads; ++kv_head) {
      KeyGradients grad{Matrix(s.seqlen_k, problem.head_dim), Matrix(s.seqlen_k, problem.head_dim_v),
                        std::vector<double>(s.seqlen_k)};
      for (std::int64_t h = kv_head * problem.group_size; h < (kv_head + 1) * problem.group_size; ++h)
        grad_sink[h] += backward_head(problem, args, s, h, grad);
      store_key_gradients(problem, args, s, kv_head, grad);
    }
  }
  if (args.grad_sink.present())
    for (std::int64_t h = 0; h < problem.num_heads; ++h) store(args.grad_sink, grad_sink[h], 0, 0, h);
}

}  // namespace fsa::reference
