// SPDX-License-Identifier: Apache-2.0
// Reading and writing tensors for the reference: one element at a time, as float64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/cpu/reference_policies.h"
#include "core/problem.h"
#include "core/skip_tile.h"

namespace fsa::reference {

struct Matrix {  // row-major, zeroed
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::vector<double> values;

  Matrix() = default;
  Matrix(std::int64_t rows, std::int64_t columns)
      : rows(rows), columns(columns), values(static_cast<std::size_t>(rows * columns)) {}

  std::span<double> operator[](std::int64_t row) {
    return {values.data() + row * columns, static_cast<std::size_t>(columns)};
  }
  std::span<const double> operator[](std::int64_t row) const {
    return {values.data() + row * columns, static_cast<std::size_t>(columns)};
  }
};

inline double dot(std::span<const double> a, std::span<const double> b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

inline void add_scaled(std::span<double> sum, double factor, std::span<const double> a) {
  for (std::size_t i = 0; i < a.size(); ++i) sum[i] += factor * a[i];
}

double load(const Operand& tensor, std::int64_t batch, std::int64_t row, std::int64_t head,
            std::int64_t dim = 0);
void store(const Operand& tensor, double value, std::int64_t batch, std::int64_t row, std::int64_t head,
           std::int64_t dim = 0);

// Writes `value` to every element; packed tensors are filled with batch 1 and rows total.
void fill(const Operand& tensor, double value, std::int64_t batch, std::int64_t rows, std::int64_t heads,
          std::int64_t dims = 1);

// Keys of one head in the given order: row n holds key keys[n], zeros where that is none of the
// sequence (-1).
Matrix load_keys(const Problem& problem, const Arguments& args, const Operand& tensor,
                 const Sequence& sequence, std::span<const std::int64_t> keys, std::int64_t kv_head,
                 std::int64_t dims);
std::vector<std::int64_t> all_keys(const Sequence& sequence);  // 0, 1, ..., seqlen_k - 1

// What the policies need to know of a head.
Mask mask_of(const Problem& problem, const Arguments& args, const Sequence& sequence, std::int64_t kv_head);
LogitRule logit_rule_of(const Problem& problem, const Arguments& args, const Sequence& sequence,
                        std::int64_t head);
double sink_of(const Problem& problem, const Arguments& args, std::int64_t head);  // -inf without one
double gate_threshold_of(const Problem& problem, const Sequence& sequence);  // before it is adapted; 0 = off

// All that one query head reads of one sequence, inside the used lengths.
struct Head {
  Mask mask;
  LogitRule rule;
  double sink = -kInfinity;
  Matrix query;               // [seqlen_q, head_dim]
  Matrix key;                 // [seqlen_k, head_dim]
  Matrix value;               // [seqlen_k, head_dim_v]
  std::vector<double> alpha;  // [seqlen_q], zeros without a gate
  std::vector<double> delta;  // [seqlen_k]

  double product(std::int64_t row, std::int64_t col) const { return alpha[row] * delta[col]; }
  double logit(std::int64_t row, std::int64_t col) const {
    return reference::logit(rule, dot(query[row], key[col]), product(row, col), mask.distance(row, col));
  }
};
Head load_head(const Problem& problem, const Arguments& args, const Sequence& sequence, std::int64_t head);

// The bit of a row tile and a key tile of one sequence in the skip map.
void set_kept(const SkipMap& map, const Sequence& sequence, std::int64_t head, std::int64_t row_tile,
              std::int64_t key_tile);
bool is_kept(const SkipMap& map, const Sequence& sequence, std::int64_t head, std::int64_t row_tile,
             std::int64_t key_tile);
void clear(const SkipMap& map, std::int64_t batch, std::int64_t heads);  // batch 1 when packed

}  // namespace fsa::reference
