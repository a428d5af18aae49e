// SPDX-License-Identifier: Apache-2.0
// One query per sequence over its keys. The rows of a tile are the query heads of one key head; with
// gather_kv_indices, key n is the n-th gathered one, and only masks and ALiBi ask for its original position.
#include <algorithm>
#include <vector>

#include "backend/cpu/reference.h"
#include "backend/cpu/reference_tensors.h"

namespace fsa::reference {
namespace {

struct Group {  // the query heads of one key head
  Mask mask;
  std::vector<std::int64_t> positions;  // of the keys; -1 = none
  Matrix key;                           // [keys, head_dim]
  Matrix value;                         // [keys, head_dim_v]
  std::vector<double> delta;            // [keys]
  Matrix query;                         // [group_size, head_dim]
  std::vector<double> alpha;            // [group_size]
  std::vector<LogitRule> rule;          // [group_size]
  std::vector<double> sink;             // [group_size]

  std::int64_t rows() const { return query.rows; }
  std::int64_t keys() const { return static_cast<std::int64_t>(positions.size()); }
  bool is_key(std::int64_t n) const { return positions[n] >= 0 && positions[n] < mask.seqlen_k; }
  bool is_visible(std::int64_t n) const { return reference::is_visible(mask, 0, positions[n]); }
  double logit(std::int64_t row, std::int64_t n) const {
    return reference::logit(rule[row], dot(query[row], key[n]), alpha[row] * delta[n],
                            mask.seqlen_k - 1 - positions[n]);
  }
};

std::vector<std::int64_t> positions_of_keys(const Problem& problem, const Arguments& args,
                                            const Sequence& s) {
  if (!problem.gathered) return all_keys(s);
  std::vector<std::int64_t> positions(problem.gather_size);
  for (std::int64_t n = 0; n < problem.gather_size; ++n) positions[n] = args.gather_kv_indices.at(s.batch, n);
  return positions;
}

Group load_group(const Problem& problem, const Arguments& args, const Sequence& s, std::int64_t kv_head) {
  Group group;
  group.mask = mask_of(problem, args, s, kv_head);
  group.positions = positions_of_keys(problem, args, s);
  group.key = load_keys(problem, args, args.key, s, group.positions, kv_head, problem.head_dim);
  group.value = load_keys(problem, args, args.value, s, group.positions, kv_head, problem.head_dim_v);
  group.delta.resize(group.positions.size());
  if (problem.has_gate)
    group.delta = load_keys(problem, args, args.delta, s, group.positions, kv_head, 1).values;
  group.query = Matrix(problem.group_size, problem.head_dim);
  for (std::int64_t row = 0; row < problem.group_size; ++row) {
    const std::int64_t head = kv_head * problem.group_size + row;
    for (std::int64_t d = 0; d < problem.head_dim; ++d)
      group.query[row][d] = load(args.query, s.batch, 0, head, d);
    group.alpha.push_back(problem.has_gate ? load(args.alpha, s.batch, 0, head) : 0);
    group.rule.push_back(logit_rule_of(problem, args, s, head));
    group.sink.push_back(sink_of(problem, args, head));
  }
  return group;
}

std::vector<double> visible_logits(const Group& group, std::int64_t row, std::int64_t begin,
                                   std::int64_t end) {
  std::vector<double> logits;
  for (std::int64_t n = begin; n < end; ++n)
    if (group.is_visible(n)) logits.push_back(group.logit(row, n));
  return logits;
}

double gate_bound(const Group& group, std::int64_t begin, std::int64_t end) {
  Extremes alpha, delta;
  for (double value : group.alpha) alpha.include(value);
  for (std::int64_t n = begin; n < end; ++n)
    if (group.is_key(n)) delta.include(group.delta[n]);
  return reference::gate_bound(alpha, delta, group.rule[0].log_sigmoid_gate);
}

struct KeyTile {
  std::int64_t begin = 0, end = 0;
};

// Tiles in which some row sees a key and which the gate leaves open, in key order.
std::vector<KeyTile> candidate_tiles(const Problem& problem, const Sequence& s, const Group& group) {
  const std::int64_t tile_keys = skip_tile_keys(problem.head_dim);
  GateTest gate_test(gate_threshold_of(problem, s), problem.softmax_scale);
  std::vector<KeyTile> candidates;
  for (std::int64_t t = ceil_div(group.keys(), tile_keys) - 1; t >= 0; --t) {
    const KeyTile tile{t * tile_keys, std::min((t + 1) * tile_keys, group.keys())};
    bool any_visible = false;
    for (std::int64_t n = tile.begin; n < tile.end; ++n) any_visible = any_visible || group.is_visible(n);
    if (!any_visible) continue;
    if (problem.gate_test && !gate_test.opens(gate_bound(group, tile.begin, tile.end))) continue;
    candidates.push_back(tile);
  }
  std::reverse(candidates.begin(), candidates.end());
  return candidates;
}

// Drops the candidates in which no row can hold a probability of its threshold.
std::vector<KeyTile> kept_tiles(const Problem& problem, const Group& group,
                                const std::vector<KeyTile>& candidates) {
  if (!(problem.threshold > 0)) return candidates;
  const double threshold = row_threshold(problem.threshold, group.mask.seqlen_k);
  const std::int64_t count = static_cast<std::int64_t>(candidates.size());
  std::vector<double> probe_lse(group.rows(), -kInfinity);
  for (std::int64_t row = 0; row < group.rows(); ++row)
    for (std::int64_t c = 0; c < count; ++c)
      if (is_probe(c, count)) {
        const auto logits = visible_logits(group, row, candidates[c].begin, candidates[c].end);
        probe_lse[row] = log_add_exp(probe_lse[row], log_sum_exp(logits));
      }
  std::vector<KeyTile> kept;
  for (std::int64_t c = 0; c < count; ++c) {
    bool keep = is_probe(c, count);
    for (std::int64_t row = 0; row < group.rows() && !keep; ++row)
      keep = reaches_cut(visible_logits(group, row, candidates[c].begin, candidates[c].end), probe_lse[row],
                         threshold);
    if (keep) kept.push_back(candidates[c]);
  }
  return kept;
}

void decode_row(const Problem& problem, const Arguments& args, const Sequence& s, const Group& group,
                std::int64_t kv_head, std::int64_t row, const std::vector<KeyTile>& kept) {
  std::vector<std::int64_t> columns;
  std::vector<double> logits;
  for (const KeyTile& tile : kept)
    for (std::int64_t n = tile.begin; n < tile.end; ++n)
      if (group.is_visible(n)) {
        columns.push_back(n);
        logits.push_back(group.logit(row, n));
      }
  const double lse = log_add_exp(log_sum_exp(logits), group.sink[row]);
  std::vector<double> out(problem.head_dim_v);
  if (lse != -kInfinity)
    for (std::size_t i = 0; i < columns.size(); ++i)
      add_scaled(out, std::exp(logits[i] - lse), group.value[columns[i]]);
  const std::int64_t head = kv_head * problem.group_size + row;
  for (std::int64_t d = 0; d < problem.head_dim_v; ++d) store(args.out, out[d], s.batch, 0, head, d);
  if (args.lse.present()) store(args.lse, lse, s.batch, 0, head);
}

}  // namespace

void decode(const Problem& problem, const Arguments& args) {
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    Sequence s = sequence(problem, args, b);
    s.rows = s.seqlen_q = 1;
    for (std::int64_t kv_head = 0; kv_head < problem.num_kv_heads; ++kv_head) {
      const Group group = load_group(problem, args, s, kv_head);
      const std::vector<KeyTile> kept = kept_tiles(problem, group, candidate_tiles(problem, s, group));
      for (std::int64_t row = 0; row < group.rows(); ++row)
        decode_row(problem, args, s, group, kv_head, row, kept);
    }
  }
}

}  // namespace fsa::reference
