// SPDX-License-Identifier: Apache-2.0
// Compression of windows of tokens. With u = i * stride + kappa the token at position kappa of window i:
//   y_i = sum_kappa (x_u + pe_kappa) W_kappa
// where W_kappa is a matrix (linear), a factor (weighted) or 1 / l (mean).
#include "backend/cpu/reference_nsa.h"
#include "backend/cpu/reference_nsa_policies.h"

namespace fsa::reference {
namespace {

// W of one head: what happens to the row at position kappa of a window.
class Weight {
 public:
  Weight(const NsaProblem& problem, const NsaArguments& args, std::int64_t head)
      : kind_(problem.kind), block_(problem.compress_block), dim_(problem.head_dim) {
    if (kind_ == nsa::CompressKind::linear) values_ = load_rows(args.weight, 0, 0, block_ * dim_, head, dim_);
    if (kind_ == nsa::CompressKind::weighted) values_ = load_rows(args.weight, 0, 0, block_, head, 1);
  }

  // out += row W_kappa
  void apply(std::int64_t kappa, std::span<const double> row, std::span<double> out) const {
    if (kind_ == nsa::CompressKind::linear)
      for (std::int64_t d = 0; d < dim_; ++d) add_scaled(out, row[d], values_[kappa * dim_ + d]);
    else
      add_scaled(out, factor(kappa), row);
  }

  // grad_row += grad_out W_kappa^T
  void apply_transposed(std::int64_t kappa, std::span<const double> grad_out,
                        std::span<double> grad_row) const {
    if (kind_ == nsa::CompressKind::linear)
      for (std::int64_t d = 0; d < dim_; ++d) grad_row[d] += dot(values_[kappa * dim_ + d], grad_out);
    else
      add_scaled(grad_row, factor(kappa), grad_out);
  }

  // grad += row^T grad_out, in the shape of W
  void add_gradient(std::int64_t kappa, std::span<const double> row, std::span<const double> grad_out,
                    Matrix& grad) const {
    if (kind_ == nsa::CompressKind::linear)
      for (std::int64_t d = 0; d < dim_; ++d) add_scaled(grad[kappa * dim_ + d], row[d], grad_out);
    if (kind_ == nsa::CompressKind::weighted) grad[kappa][0] += dot(row, grad_out);
  }

  const Matrix& values() const { return values_; }  // empty for mean

 private:
  double factor(std::int64_t kappa) const {
    return kind_ == nsa::CompressKind::mean ? 1 / static_cast<double>(block_) : values_[kappa][0];
  }

  nsa::CompressKind kind_;
  std::int64_t block_, dim_;
  Matrix values_;
};

Matrix load_pe(const NsaProblem& problem, const NsaArguments& args, std::int64_t head) {
  if (!problem.has_pe) return Matrix(problem.compress_block, problem.head_dim);
  return load_rows(args.pe, 0, 0, problem.compress_block, head, problem.head_dim);
}

std::vector<double> sum_of(std::span<const double> a, std::span<const double> b) {
  std::vector<double> sum(a.begin(), a.end());
  add_scaled(sum, 1, b);
  return sum;
}

void compress_head(const NsaProblem& problem, const NsaArguments& args, const NsaSequence& s,
                   std::int64_t head, const Weight& weight, const Matrix& pe) {
  const Windows windows{problem.compress_block, problem.compress_stride};
  const Matrix x = load_rows(args.key, s.batch, s.q_begin, s.rows, head, problem.head_dim);
  Matrix out(s.compressed, problem.head_dim);
  for (std::int64_t i = 0; i < s.compressed; ++i)
    for (std::int64_t kappa = 0; kappa < windows.block; ++kappa)
      weight.apply(kappa, sum_of(x[windows.begin(i) + kappa], pe[kappa]), out[i]);
  store_rows(args.out, out, s.batch, s.k_begin, head);
}

// Writes the gradient of x, adds to those of the parameters.
void compress_head_backward(const NsaProblem& problem, const NsaArguments& args, const NsaSequence& s,
                            std::int64_t head, const Weight& weight, const Matrix& pe, Matrix& grad_weight,
                            Matrix& grad_pe) {
  const Windows windows{problem.compress_block, problem.compress_stride};
  const Matrix x = load_rows(args.key, s.batch, s.q_begin, s.rows, head, problem.head_dim);
  const Matrix grad_out = load_rows(args.grad_out, s.batch, s.k_begin, s.compressed, head, problem.head_dim);
  Matrix grad_x(s.rows, problem.head_dim);
  for (std::int64_t i = 0; i < s.compressed; ++i)
    for (std::int64_t kappa = 0; kappa < windows.block; ++kappa) {
      const std::int64_t token = windows.begin(i) + kappa;
      weight.apply_transposed(kappa, grad_out[i], grad_x[token]);
      weight.apply_transposed(kappa, grad_out[i], grad_pe[kappa]);
      weight.add_gradient(kappa, sum_of(x[token], pe[kappa]), grad_out[i], grad_weight);
    }
  store_rows(args.grad_key, grad_x, s.batch, s.q_begin, head);
}

}  // namespace

void compress(const NsaProblem& problem, const NsaArguments& args) {
  fill_keys(problem, args.out, 0, problem.head_dim);
  for (std::int64_t head = 0; head < problem.num_kv_heads; ++head) {
    const Weight weight(problem, args, head);
    const Matrix pe = load_pe(problem, args, head);
    for (std::int64_t b = 0; b < problem.batch; ++b)
      compress_head(problem, args, nsa_sequence(problem, args, b), head, weight, pe);
  }
}

void compress_backward(const NsaProblem& problem, const NsaArguments& args) {
  fill_rows(problem, args.grad_key, 0, problem.head_dim);
  for (std::int64_t head = 0; head < problem.num_kv_heads; ++head) {
    const Weight weight(problem, args, head);
    const Matrix pe = load_pe(problem, args, head);
    Matrix grad_weight(weight.values().rows, weight.values().columns), grad_pe(pe.rows, pe.columns);
    for (std::int64_t b = 0; b < problem.batch; ++b)
      compress_head_backward(problem, args, nsa_sequence(problem, args, b), head, weight, pe, grad_weight,
                             grad_pe);
    store_rows(args.grad_weight, grad_weight, 0, 0, head);
    if (problem.has_pe) store_rows(args.grad_pe, grad_pe, 0, 0, head);
  }
}

}  // namespace fsa::reference
