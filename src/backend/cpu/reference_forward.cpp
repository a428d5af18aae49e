// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "backend/cpu/reference.h"
#include "backend/cpu/reference_tensors.h"

namespace fsa::reference {
namespace {

struct Tile {  // of one head's logits: rows by keys, ends exclusive
  std::int64_t row_begin = 0, row_end = 0;
  std::int64_t key_begin = 0, key_end = 0;
};

std::vector<double> visible_logits(const Head& head, std::int64_t row, std::int64_t key_begin,
                                   std::int64_t key_end) {
  std::vector<double> logits;
  for (std::int64_t col = key_begin; col < key_end; ++col)
    if (is_visible(head.mask, row, col)) logits.push_back(head.logit(row, col));
  return logits;
}

bool is_visible(const Mask& mask, const Tile& tile) {
  for (std::int64_t row = tile.row_begin; row < tile.row_end; ++row)
    for (std::int64_t col = tile.key_begin; col < tile.key_end; ++col)
      if (reference::is_visible(mask, row, col)) return true;
  return false;
}

double gate_bound(const Head& head, const Tile& tile) {
  Extremes alpha, delta;
  for (std::int64_t row = tile.row_begin; row < tile.row_end; ++row) alpha.include(head.alpha[row]);
  for (std::int64_t col = tile.key_begin; col < tile.key_end; ++col) delta.include(head.delta[col]);
  return reference::gate_bound(alpha, delta, head.rule.log_sigmoid_gate);
}

// Which key tiles of the rows [row_begin, row_end) are kept. The walk from right to left is part of the rule.
std::vector<bool> decide(const Problem& problem, const Sequence& sequence, const Head& head,
                         std::int64_t row_begin, std::int64_t row_end) {
  const std::int64_t tile_keys = skip_tile_keys(problem.head_dim);
  const std::int64_t key_tiles = ceil_div(sequence.seqlen_k, tile_keys);
  double gate_threshold = gate_threshold_of(problem, sequence);
  if (problem.adaptive_gate && problem.causal_lengths())
    gate_threshold = adapted_gate_threshold(gate_threshold, head.mask, row_begin, row_end);
  GateTest gate_test(gate_threshold, head.rule.softmax_scale);
  std::vector<double> running_lse(row_end - row_begin, -kInfinity);

  std::vector<bool> kept(key_tiles, false);
  for (std::int64_t n = key_tiles - 1; n >= 0; --n) {
    const Tile tile{row_begin, row_end, n * tile_keys, std::min((n + 1) * tile_keys, sequence.seqlen_k)};
    if (!is_visible(head.mask, tile)) continue;
    if (problem.gate_test && !gate_test.opens(gate_bound(head, tile))) continue;
    if (!(problem.threshold > 0)) {
      kept[n] = true;
      continue;
    }
    std::vector<std::vector<double>> logits;
    for (std::int64_t row = row_begin; row < row_end; ++row) {
      logits.push_back(visible_logits(head, row, tile.key_begin, tile.key_end));
      const double threshold = row_threshold(problem.threshold, visible_len(head.mask, row));
      kept[n] = kept[n] || votes_keep(logits.back(), running_lse[row - row_begin], threshold);
    }
    if (kept[n])
      for (std::size_t i = 0; i < logits.size(); ++i)
        running_lse[i] = log_add_exp(running_lse[i], log_sum_exp(logits[i]));
  }
  return kept;
}

void forward_row(const Problem& problem, const Arguments& args, const Sequence& sequence, const Head& head,
                 std::int64_t head_index, std::int64_t row, const std::vector<bool>& kept) {
  const std::int64_t tile_keys = skip_tile_keys(problem.head_dim);
  std::vector<std::int64_t> cols;
  std::vector<double> logits;
  for (std::int64_t col = 0; col < sequence.seqlen_k; ++col) {
    if (!kept[col / tile_keys] || !reference::is_visible(head.mask, row, col)) continue;
    cols.push_back(col);
    logits.push_back(head.logit(row, col));
  }
  const double lse = log_add_exp(log_sum_exp(logits), head.sink);
  std::vector<double> out(problem.head_dim_v, 0.0);
  if (lse != -kInfinity)
    for (std::size_t i = 0; i < cols.size(); ++i)
      add_scaled(out, std::exp(logits[i] - lse), head.value[cols[i]]);
  const std::int64_t out_row = sequence.q_begin + row;
  for (std::int64_t d = 0; d < problem.head_dim_v; ++d)
    store(args.out, out[d], sequence.batch, out_row, head_index, d);
  if (args.lse.present()) store(args.lse, lse, sequence.batch, out_row, head_index);
}

// Rows beyond the used lengths and tokens beyond the last sequence keep this.
void write_empty_rows(const Problem& problem, const Arguments& args) {
  const std::int64_t batch = problem.packed_q ? 1 : problem.batch;
  const std::int64_t rows = problem.packed_q ? problem.total_q : problem.max_seqlen_q;
  fill(args.out, 0, batch, rows, problem.num_heads, problem.head_dim_v);
  if (args.lse.present()) fill(args.lse, -kInfinity, batch, rows, problem.num_heads);
  if (args.skip_map.present) clear(args.skip_map, batch, problem.num_heads);
}

}  // namespace

void forward(const Problem& problem, const Arguments& args) {
  write_empty_rows(problem, args);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const Sequence s = sequence(problem, args, b);
    for (std::int64_t h = 0; h < problem.num_heads; ++h) {
      const Head head = load_head(problem, args, s, h);
      for (std::int64_t row_begin = 0; row_begin < s.seqlen_q; row_begin += kSkipTileRows) {
        const std::int64_t row_end = std::min(row_begin + kSkipTileRows, s.seqlen_q);
        const std::vector<bool> kept = decide(problem, s, head, row_begin, row_end);
        if (args.skip_map.present)
          for (std::size_t n = 0; n < kept.size(); ++n)
            if (kept[n]) set_kept(args.skip_map, s, h, row_begin / kSkipTileRows, n);
        for (std::int64_t row = row_begin; row < row_end; ++row)
          forward_row(problem, args, s, head, h, row, kept);
      }
    }
  }
}

}  // namespace fsa::reference
