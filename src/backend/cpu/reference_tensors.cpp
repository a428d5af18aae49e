// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/reference_tensors.h"

#include <numeric>

#include "backend/cpu/reference_scalar.h"

namespace fsa::reference {
namespace {

std::int64_t index_of(const Operand& tensor, std::int64_t batch, std::int64_t row, std::int64_t head,
                      std::int64_t dim) {
  return batch * tensor.stride_batch + row * tensor.stride_row + head * tensor.stride_head +
         dim * tensor.stride_dim;
}

std::int32_t* words_of(const SkipMap& map, std::int64_t batch, std::int64_t head, std::int64_t row_tile) {
  return map.data + batch * map.stride_batch + head * map.stride_head + row_tile * map.stride_tile;
}

// Packed skip maps count the row tiles over all sequences and have no batch dimension.
std::int32_t* word_of(const SkipMap& map, const Sequence& sequence, std::int64_t head, std::int64_t row_tile,
                      std::int64_t key_tile) {
  return words_of(map, sequence.batch, head, sequence.row_tile_begin + row_tile) + key_tile / 32;
}

std::uint32_t bit_of(std::int64_t key_tile) { return std::uint32_t{1} << (key_tile % 32); }

}  // namespace

double load(const Operand& tensor, std::int64_t batch, std::int64_t row, std::int64_t head,
            std::int64_t dim) {
  return load_scalar(tensor.dtype, tensor.data, index_of(tensor, batch, row, head, dim));
}

void store(const Operand& tensor, double value, std::int64_t batch, std::int64_t row, std::int64_t head,
           std::int64_t dim) {
  store_scalar(tensor.dtype, tensor.data, index_of(tensor, batch, row, head, dim), value);
}

void fill(const Operand& tensor, double value, std::int64_t batch, std::int64_t rows, std::int64_t heads,
          std::int64_t dims) {
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t head = 0; head < heads; ++head)
        for (std::int64_t dim = 0; dim < dims; ++dim) store(tensor, value, b, row, head, dim);
}

Matrix load_keys(const Problem& problem, const Arguments& args, const Operand& tensor,
                 const Sequence& sequence, std::span<const std::int64_t> keys, std::int64_t kv_head,
                 std::int64_t dims) {
  Matrix result(static_cast<std::int64_t>(keys.size()), dims);
  for (std::int64_t n = 0; n < result.rows; ++n) {
    const std::int64_t key = keys[n];
    if (key < 0 || key >= sequence.seqlen_k) continue;
    std::int64_t batch = sequence.batch, row = sequence.k_begin + key;
    if (problem.paged) {
      batch = args.page_table.at(sequence.batch, key / problem.page_size);
      row = key % problem.page_size;
    }
    for (std::int64_t dim = 0; dim < dims; ++dim) result[n][dim] = load(tensor, batch, row, kv_head, dim);
  }
  return result;
}

std::vector<std::int64_t> all_keys(const Sequence& sequence) {
  std::vector<std::int64_t> keys(sequence.seqlen_k);
  std::iota(keys.begin(), keys.end(), 0);
  return keys;
}

Mask mask_of(const Problem& problem, const Arguments& args, const Sequence& sequence, std::int64_t kv_head) {
  Mask mask;
  mask.seqlen_q = sequence.seqlen_q;
  mask.seqlen_k = sequence.seqlen_k;
  mask.causal = problem.causal;
  mask.window_left = problem.window_left;
  mask.window_right = problem.window_right;
  mask.has_window_sizes = problem.has_window_sizes;
  mask.compress_block = problem.compress_block;
  mask.compress_stride = problem.compress_stride;
  mask.offset = sequence.offset;
  if (problem.has_window_sizes)
    mask.window_sizes = {args.window_sizes.at(kv_head, 0), args.window_sizes.at(kv_head, 1),
                         args.window_sizes.at(kv_head, 2), args.window_sizes.at(kv_head, 3)};
  return mask;
}

LogitRule logit_rule_of(const Problem& problem, const Arguments& args, const Sequence& sequence,
                        std::int64_t head) {
  LogitRule rule;
  rule.softmax_scale = problem.softmax_scale;
  rule.softcap = problem.softcap;
  rule.has_gate = problem.has_gate;
  rule.log_sigmoid_gate = problem.log_sigmoid_gate;
  if (problem.has_alibi) rule.slope = load(args.alibi_slopes, sequence.batch, 0, head);
  return rule;
}

double sink_of(const Problem& problem, const Arguments& args, std::int64_t head) {
  return problem.has_sink ? load(args.sink, 0, 0, head) : -kInfinity;
}

double gate_threshold_of(const Problem& problem, const Sequence& sequence) {
  if (!problem.gate_test) return 0;
  return problem.gate_threshold_default ? default_gate_threshold(sequence.seqlen_k) : problem.gate_threshold;
}

Head load_head(const Problem& problem, const Arguments& args, const Sequence& sequence, std::int64_t head) {
  const std::int64_t kv_head = head / problem.group_size;
  const std::vector<std::int64_t> keys = all_keys(sequence);
  Head result;
  result.mask = mask_of(problem, args, sequence, kv_head);
  result.mask.blocks = HeadBlocks(problem, args, sequence.batch, head);
  result.rule = logit_rule_of(problem, args, sequence, head);
  result.sink = sink_of(problem, args, head);
  result.key = load_keys(problem, args, args.key, sequence, keys, kv_head, problem.head_dim);
  result.value = load_keys(problem, args, args.value, sequence, keys, kv_head, problem.head_dim_v);
  result.query = Matrix(sequence.seqlen_q, problem.head_dim);
  result.alpha.resize(sequence.seqlen_q);
  result.delta.resize(sequence.seqlen_k);
  if (problem.has_gate)
    result.delta = load_keys(problem, args, args.delta, sequence, keys, kv_head, 1).values;
  for (std::int64_t row = 0; row < sequence.seqlen_q; ++row) {
    for (std::int64_t d = 0; d < problem.head_dim; ++d)
      result.query[row][d] = load(args.query, sequence.batch, sequence.q_begin + row, head, d);
    if (problem.has_gate) result.alpha[row] = load(args.alpha, sequence.batch, sequence.q_begin + row, head);
  }
  return result;
}

void set_kept(const SkipMap& map, const Sequence& sequence, std::int64_t head, std::int64_t row_tile,
              std::int64_t key_tile) {
  std::int32_t* word = word_of(map, sequence, head, row_tile, key_tile);
  *word = static_cast<std::int32_t>(static_cast<std::uint32_t>(*word) | bit_of(key_tile));
}

bool is_kept(const SkipMap& map, const Sequence& sequence, std::int64_t head, std::int64_t row_tile,
             std::int64_t key_tile) {
  return (static_cast<std::uint32_t>(*word_of(map, sequence, head, row_tile, key_tile)) & bit_of(key_tile)) !=
         0;
}

void clear(const SkipMap& map, std::int64_t batch, std::int64_t heads) {
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t head = 0; head < heads; ++head)
      for (std::int64_t tile = 0; tile < map.tiles; ++tile)
        for (std::int64_t word = 0; word < map.words; ++word) words_of(map, b, head, tile)[word] = 0;
}

}  // namespace fsa::reference
