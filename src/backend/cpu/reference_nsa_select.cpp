// SPDX-License-Identifier: Apache-2.0
// Which blocks of tokens a row attends to, from the probabilities of the compressed branch:
//   P_i = sum over the query heads of the group of exp(softmax_scale * (q . k_i) - lse),   window i visible
//   score of block j = sum_i common_strides(i, j) P_i
#include "backend/cpu/reference_nsa.h"
#include "backend/cpu/reference_nsa_policies.h"

namespace fsa::reference {
namespace {

struct Group {  // the query heads of one key head, in one sequence
  std::vector<Matrix> query;
  Matrix key;                            // [compressed, head_dim]
  std::vector<std::vector<double>> lse;  // [heads][rows]
};

Group load_group(const NsaProblem& problem, const NsaArguments& args, const NsaSequence& s,
                 std::int64_t kv_head) {
  Group group;
  group.key = load_rows(args.key, s.batch, s.k_begin, s.compressed, kv_head, problem.head_dim);
  for (std::int64_t i = 0; i < problem.group_size; ++i) {
    const std::int64_t head = kv_head * problem.group_size + i;
    group.query.push_back(load_rows(args.query, s.batch, s.q_begin, s.rows, head, problem.head_dim));
    group.lse.push_back(load_rows(args.lse, s.batch, s.q_begin, s.rows, head, 1).values);
  }
  return group;
}

// P of the windows that the row sees, which are the first ones.
std::vector<double> window_probabilities(const NsaProblem& problem, const NsaSequence& s, const Group& group,
                                         const Windows& windows, std::int64_t row) {
  std::vector<double> probabilities;
  for (std::int64_t i = 0; i < s.compressed && is_window_visible(windows, s.offset() + row, i); ++i) {
    double sum = 0;
    for (std::size_t head = 0; head < group.query.size(); ++head)
      sum +=
          std::exp(problem.softmax_scale * dot(group.query[head][row], group.key[i]) - group.lse[head][row]);
    probabilities.push_back(sum);
  }
  return probabilities;
}

std::vector<double> block_scores(const std::vector<double>& probabilities, const Windows& windows,
                                 std::int64_t blocks, std::int64_t block_size) {
  std::vector<double> scores(blocks);
  for (std::int64_t j = 0; j < blocks; ++j)
    for (std::size_t i = 0; i < probabilities.size(); ++i) {
      const std::int64_t strides = common_strides(windows, static_cast<std::int64_t>(i), j, block_size);
      if (strides > 0) scores[j] += static_cast<double>(strides) * probabilities[i];
    }
  return scores;
}

void write_none(const NsaProblem& problem, const BlockTable& table) {
  const std::int64_t batch = problem.packed ? 1 : problem.batch;
  const std::int64_t rows = problem.packed ? problem.total_q : problem.max_seqlen_q;
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t head = 0; head < problem.num_kv_heads; ++head)
      for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t slot = 0; slot < problem.top_k; ++slot) table.at(b, head, row, slot) = -1;
}

}  // namespace

void select_blocks(const NsaProblem& problem, const NsaArguments& args) {
  const Windows windows{problem.compress_block, problem.compress_stride};
  const SelectionRule rule{problem.top_k, problem.init_blocks, problem.local_blocks};
  write_none(problem, args.selected_blocks);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const NsaSequence s = nsa_sequence(problem, args, b);
    for (std::int64_t kv_head = 0; kv_head < problem.num_kv_heads; ++kv_head) {
      const Group group = load_group(problem, args, s, kv_head);
      for (std::int64_t row = 0; row < s.rows; ++row) {
        const std::int64_t blocks = block_of(s.offset() + row, problem.block_size) + 1;
        const std::vector<double> scores = block_scores(window_probabilities(problem, s, group, windows, row),
                                                        windows, blocks, problem.block_size);
        std::int64_t slot = 0;
        for (std::int64_t block : best_blocks(rule, scores))
          args.selected_blocks.at(b, kv_head, s.q_begin + row, slot++) = static_cast<std::int32_t>(block);
      }
    }
  }
}

}  // namespace fsa::reference
