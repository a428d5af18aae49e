// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/cpu/reference_scalar.h"
#include "backend/cpu/thread_pool.h"

namespace fsa {
namespace {

std::int64_t index_of(const Operand& tensor, std::int64_t batch, std::int64_t row, std::int64_t head) {
  return batch * tensor.stride_batch + row * tensor.stride_row + head * tensor.stride_head;
}

// The weights of the parts, which sum to 1 (or are all 0), from their lse. Returns the joint lse.
template <class Real>
Real weigh_parts(const std::vector<Real>& lses, std::vector<Real>& weights) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  Real best = -kInfinity;
  for (Real lse : lses) best = std::isnan(lse) || lse > best ? lse : best;
  weights.assign(lses.size(), Real{0});
  if (best == -kInfinity) return best;
  Real sum = 0;
  for (std::size_t p = 0; p < lses.size(); ++p) {
    weights[p] = lses[p] == best ? Real{1} : std::exp(lses[p] - best);  // "equal" covers +inf
    sum += weights[p];
  }
  for (Real& weight : weights) weight /= sum;
  return best + std::log(sum);
}

// All heads of rows [begin, end) of one batch entry.
template <class Real>
void merge_rows(const MergeProblem& problem, std::int64_t b, std::int64_t row_begin, std::int64_t row_end) {
  const Operand& outs = problem.outs;
  const Operand& lses = problem.lses;
  std::vector<Real> part_lses(problem.parts), weights, out;
  for (std::int64_t row = row_begin; row < row_end; ++row)
    for (std::int64_t head = 0; head < problem.num_heads; ++head) {
      const std::int64_t lse_index = index_of(lses, b, row, head);
      for (std::int64_t p = 0; p < problem.parts; ++p)
        part_lses[p] =
            static_cast<Real>(load_scalar(lses.dtype, lses.data, p * problem.stride_lses_part + lse_index));
      const Real lse = weigh_parts(part_lses, weights);

      out.assign(problem.head_dim_v, Real{0});
      for (std::int64_t p = 0; p < problem.parts; ++p) {
        if (part_lses[p] == -std::numeric_limits<Real>::infinity()) continue;  // its out may hold anything
        const std::int64_t begin = p * problem.stride_outs_part + index_of(outs, b, row, head);
        for (std::int64_t d = 0; d < problem.head_dim_v; ++d)
          out[d] +=
              weights[p] * static_cast<Real>(load_scalar(outs.dtype, outs.data, begin + d * outs.stride_dim));
      }
      const std::int64_t begin = index_of(problem.out, b, row, head);
      for (std::int64_t d = 0; d < problem.head_dim_v; ++d)
        store_scalar(problem.out.dtype, problem.out.data, begin + d * problem.out.stride_dim, out[d]);
      store_scalar(problem.lse.dtype, problem.lse.data, index_of(problem.lse, b, row, head), lse);
    }
}

constexpr std::int64_t kRowsPerItem = 32;

}  // namespace

void merge_states(const MergeProblem& problem) {
  const std::int64_t items = (problem.rows + kRowsPerItem - 1) / kRowsPerItem;
  cpu::parallel_for(problem.batch * items, [&](std::int64_t i) {
    const std::int64_t begin = i % items * kRowsPerItem, end = std::min(problem.rows, begin + kRowsPerItem);
    if (problem.out.dtype == DType::float64)
      merge_rows<double>(problem, i / items, begin, end);
    else
      merge_rows<float>(problem, i / items, begin, end);
  });
}

}  // namespace fsa
