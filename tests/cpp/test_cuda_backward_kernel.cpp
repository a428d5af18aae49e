// SPDX-License-Identifier: Apache-2.0
// The GPU backward, all its kernels, run on the CPU by tests/emulator against gradients in float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "common/backward_finish.cuh"
#include "common/backward_prepare.cuh"
#include "common/block_columns.cuh"
#include "common/split_columns.cuh"
#include "common/sum_parts.cuh"
#include "common/transpose_bits.cuh"
#include "policy/row_tiles.cuh"
#include "sm90/backward.cuh"
#include "test_emulator.h"

namespace fsa::test {
namespace {

using namespace fsa::kernels;
using kernels::ptx::float_of_bf16;

using Causal = WindowMask<false, true>;
using Full = WindowMask<false, false>;

// Tiles as tools/gpu/backward.py and docs/kernels/backward_sm90.md have them.
constexpr BackwardTile kTile64 = {64, 64, 128, 128, 2, 2, 2, 1, kFoldedVectors, 0};
constexpr BackwardTile kTile64Sparse = {64, 64, 64, 128, 4, 2, 4, 1, kFoldedVectors, 0};
constexpr BackwardTile kTile128 = {128, 128, 64, 128, 2, 2, 3, 1, kFoldedVectors, 0};
constexpr BackwardTile kTile128Logit = {128, 128, 64, 128, 2, 2, 3, 1, 2, 0};
constexpr BackwardTile kTile128Gate = {128, 128, 64, 128, 2, 2, 3, 1, 3, 0};
constexpr BackwardTile kTile128FoldedGate = {128, 128, 64, 128, 2, 2, 3, 1, kFoldedVectors + 1, 1};
constexpr BackwardTile kTile128GateAlibi = {128, 128, 64, 128, 2, 2, 3, 1, 3, 1};
constexpr BackwardTile kTile256 = {256, 256, 64, 64, 2, 2, 2, 0, kFoldedVectors, 0};
constexpr BackwardTile kTile256x128 = {256, 128, 64, 64, 2, 2, 2, 0, kFoldedVectors, 0};

template <BackwardTile kShape, class MaskType, class Rows, class Chain, bool kInTurn, bool kWithSink = false>
struct Config {
  static constexpr ElementType kElement = ElementType::bf16;
  static constexpr BackwardTile kTile = kShape;
  static constexpr bool kDeterministic = kInTurn;
  static constexpr bool kSink = kWithSink;
  using Mask = MaskType;
  using RowIterator = Rows;
  using LogitChain = Chain;
};

struct Problem {
  int32 batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v;
  int32 used_q, used_k;  // of the last batch entry
  bool causal = false;
  bool skip_map = false;
  bool block_mask = false;
  float gate_factor = 1, gate_shift = 0;  // of alpha and delta; a mean of delta, with alpha near 1
  bool linear_gate = false;               // without log sigmoid
  bool gate = false, alibi = false, sink = false;
  float softcap = 0;
  int32 least_part = 0;  // row tiles; 0: columns are not cut
  int32 left = -1;       // keys before the diagonal; -1: all
  int32 ascending = 0;   // of the last heads, how many go from the first key tile to the last; deterministic
};

// Everything that a call reads and writes, and its gradients in float64.
class Call {
 public:
  Call(const Problem& problem, int32 block_n)
      : p(problem),
        n(block_n),
        row_tiles((p.seqlen_q + 63) / 64),
        key_tiles((p.seqlen_k + n - 1) / n),
        row_words((row_tiles + 31) / 32),
        key_words((key_tiles + 31) / 32),
        query(p.batch, p.seqlen_q, p.heads, p.head_dim),
        key(p.batch, p.seqlen_k, p.kv_heads, p.head_dim),
        value(p.batch, p.seqlen_k, p.kv_heads, p.head_dim_v),
        grad_out(p.batch, p.seqlen_q, p.heads, p.head_dim_v),
        out(p.batch, p.seqlen_q, p.heads, p.head_dim_v),
        alpha(p.batch, p.seqlen_q, p.heads, 1),
        delta(p.batch, p.seqlen_k, p.kv_heads, 1),
        grad_lse(p.batch, p.heads, p.seqlen_q, 1),
        lse(p.batch, p.heads, p.seqlen_q, 1, -kInfinity),
        slopes(p.heads),
        sinks(p.heads),
        row_bits(static_cast<std::size_t>(p.batch) * p.heads * row_tiles * key_words),
        column_bits(static_cast<std::size_t>(p.batch) * p.heads * key_tiles * row_words, -1),
        blocks(random, p.heads, p.seqlen_q, p.seqlen_k),
        want_query(p.batch, p.seqlen_q, p.heads, p.head_dim),
        want_key(p.batch, p.seqlen_k, p.kv_heads, p.head_dim),
        want_value(p.batch, p.seqlen_k, p.kv_heads, p.head_dim_v),
        want_alpha(p.batch, p.seqlen_q, p.heads, 1),
        want_delta(p.batch, p.seqlen_k, p.kv_heads, 1),
        want_sink(1, 1, p.heads, 1) {
    std::normal_distribution<float> normal;
    for (auto* tensor : {&query, &key, &value, &grad_out})
      for (uint16& x : tensor->values) x = static_cast<uint16>(kernels::ptx::bf16_bits(normal(random)));
    for (auto* tensor : {&alpha, &delta, &grad_lse})
      for (float& x : tensor->values) x = normal(random);
    for (float& x : alpha.values) x = p.gate_shift != 0 ? 1 + 0.1f * x : p.gate_factor * x;
    for (float& x : delta.values) x = p.gate_shift != 0 ? p.gate_shift + 0.5f * x : p.gate_factor * x;
    for (float& x : slopes) x = 0.1f * std::abs(normal(random));
    for (float& x : sinks) x = normal(random);
    fill_map();
    for (int32 b = 0; b < p.batch; ++b) differentiate(b);
  }

  int32 used_q(int32 b) const { return b == p.batch - 1 ? p.used_q : p.seqlen_q; }
  int32 used_k(int32 b) const { return b == p.batch - 1 ? p.used_k : p.seqlen_k; }

  const Problem p;
  std::mt19937 random{1};
  const int32 n, row_tiles, key_tiles, row_words, key_words;
  Tensor<uint16> query, key, value, grad_out, out;
  Tensor<float> alpha, delta, grad_lse, lse;
  std::vector<float> slopes, sinks;
  std::vector<int32> row_bits, column_bits;
  RandomBlocks blocks;  // where the problem has a block mask
  Tensor<double> want_query, want_key, want_value, want_alpha, want_delta, want_sink;

 private:
  bool visible(int32 b, int32 row, int32 key_) const {
    const int32 diagonal = row + used_k(b) - used_q(b);
    return !p.causal || (key_ <= diagonal && (p.left < 0 || key_ >= diagonal - p.left));
  }

  void fill_map() {
    for (int32 b = 0; b < p.batch; ++b)
      for (int32 h = 0; h < p.heads; ++h)
        for (int32 m = 0; m * 64 < used_q(b); ++m)
          for (int32 t = 0; t * n < used_k(b); ++t)
            if (visible(b, std::min(m * 64 + 63, used_q(b) - 1), t * n) && random() % 2 == 0)
              row_bits[((b * p.heads + h) * row_tiles + m) * key_words + t / 32] |=
                  static_cast<int32>(1u << t % 32);
  }
  bool kept(int32 b, int32 h, int32 row, int32 key_) const {
    const int32 t = key_ / n;
    return (row_bits[((b * p.heads + h) * row_tiles + row / 64) * key_words + t / 32] >> t % 32 & 1) != 0;
  }

  void differentiate(int32 b) {
    const int32 group = p.heads / p.kv_heads, rows = used_q(b), keys = used_k(b);
    const double scale = 1 / std::sqrt(static_cast<double>(p.head_dim));
    const auto read = [](uint16 bits) { return static_cast<double>(float_of_bf16(bits)); };
    std::vector<double> s(keys), t(keys), o(p.head_dim_v);
    for (int32 h = 0; h < p.heads; ++h)
      for (int32 i = 0; i < rows; ++i) {
        const int32 kv = h / group;
        const double a = alpha.at(b, i, h, 0);
        double sum = p.sink ? std::exp(sinks[h]) : 0;
        for (int32 j = 0; j < keys; ++j) {
          const bool seen = visible(b, i, j) && (!p.skip_map || kept(b, h, i, j)) &&
                            (!p.block_mask || blocks.listed(h, i, j));
          double x = 0;
          for (int32 e = 0; e < p.head_dim; ++e) x += read(query.at(b, i, h, e)) * read(key.at(b, j, kv, e));
          if (p.gate) {
            const double z = a * delta.at(b, j, kv, 0);
            x += p.linear_gate ? z : std::min(z, 0.0) - std::log1p(std::exp(-std::abs(z)));
          }
          x *= scale;
          t[j] = p.softcap > 0 ? std::tanh(x / p.softcap) : 0;
          if (p.softcap > 0) x = p.softcap * t[j];
          if (p.alibi) x -= slopes[h] * std::abs(i + keys - rows - j);
          s[j] = seen ? std::exp(x) : 0;
          sum += s[j];
        }
        if (sum == 0) continue;
        std::fill(o.begin(), o.end(), 0.0);
        double mean = -grad_lse.at(b, h, i, 0);
        for (int32 j = 0; j < keys; ++j) s[j] /= sum;
        for (int32 e = 0; e < p.head_dim_v; ++e) {
          for (int32 j = 0; j < keys; ++j) o[e] += s[j] * read(value.at(b, j, kv, e));
          mean += o[e] * read(grad_out.at(b, i, h, e));
          out.at(b, i, h, e) = static_cast<uint16>(kernels::ptx::bf16_bits(static_cast<float>(o[e])));
        }
        lse.at(b, h, i, 0) = static_cast<float>(std::log(sum));
        if (p.sink) want_sink.at(0, 0, h, 0) -= std::exp(sinks[h]) / sum * mean;
        for (int32 j = 0; j < keys; ++j) {
          if (s[j] == 0) continue;
          double product = 0;
          for (int32 e = 0; e < p.head_dim_v; ++e) {
            product += read(grad_out.at(b, i, h, e)) * read(value.at(b, j, kv, e));
            want_value.at(b, j, kv, e) += s[j] * read(grad_out.at(b, i, h, e));
          }
          const double ds = s[j] * (product - mean) * scale * (1 - t[j] * t[j]);
          for (int32 e = 0; e < p.head_dim; ++e) {
            want_query.at(b, i, h, e) += ds * read(key.at(b, j, kv, e));
            want_key.at(b, j, kv, e) += ds * read(query.at(b, i, h, e));
          }
          if (!p.gate) continue;
          const double d = delta.at(b, j, kv, 0), slope = p.linear_gate ? 1 : 1 / (1 + std::exp(a * d));
          want_alpha.at(b, i, h, 0) += ds * slope * d;
          want_delta.at(b, j, kv, 0) += ds * slope * a;
        }
      }
  }
};

template <class T>
void expect_near(const char* name, Tensor<double>& want, Tensor<T>& got) {
  double error = 0, largest = 0;
  for (std::size_t i = 0; i < want.values.size(); ++i) {
    double x = 0;
    if constexpr (sizeof(T) == 2)
      x = float_of_bf16(got.values[i]);
    else
      x = got.values[i];
    ASSERT_TRUE(std::isfinite(x)) << name << ", element " << i;
    if (want.values[i] == 0) continue;
    error = std::max(error, std::abs(x - want.values[i]));
    largest = std::max(largest, std::abs(want.values[i]));
  }
  // bf16 operands of the products: about three times what correct kernels show.
  EXPECT_LE(error, 0.02 * largest + 1e-3) << name;
}

// Rows of [batch, rows, ..] from `used` on, in the last batch entry.
template <class T>
void expect_zero_rows(const char* name, Tensor<T>& tensor, int32 batch, int32 used) {
  for (int32 row = used; row < tensor.rows; ++row)
    for (int32 head = 0; head < tensor.heads; ++head)
      for (int32 column = 0; column < tensor.columns; ++column)
        ASSERT_EQ(tensor.at(batch - 1, row, head, column), T()) << name << ", row " << row;
}

// Columns among those that begin at the first slots.
int32 count_cut(const std::vector<SplitColumn>& columns, int32 slots) {
  int32 count = 0;
  for (int32 slot = 0; slot < slots; ++slot) count += columns[slot].parts > 0 ? 1 : 0;
  return count;
}

template <class C>
void check(const Problem& problem) {
  using Types = sm90::BackwardTypes<C>;
  constexpr int32 kM = Types::kBlockM, kN = Types::kBlockN;
  Call c(problem, kN);
  const Problem& p = c.p;
  const float nan = std::nanf("");
  for (int32 row = p.used_q; row < p.seqlen_q; ++row)
    for (auto* tensor : {&c.query, &c.grad_out})
      std::fill_n(&tensor->at(p.batch - 1, row, 0, 0), tensor->stride_row(), kNan);
  for (int32 row = p.used_k; row < p.seqlen_k; ++row)
    for (auto* tensor : {&c.key, &c.value})
      std::fill_n(&tensor->at(p.batch - 1, row, 0, 0), tensor->stride_row(), kNan);

  Tensor<uint16> grad_query(p.batch, p.seqlen_q, p.heads, p.head_dim, kNan);
  Tensor<uint16> grad_key(p.batch, p.seqlen_k, p.kv_heads, p.head_dim, kNan);
  Tensor<uint16> grad_value(p.batch, p.seqlen_k, p.kv_heads, p.head_dim_v, kNan);
  Tensor<float> grad_alpha(p.batch, p.seqlen_q, p.heads, 1, nan),
      grad_delta(p.batch, p.seqlen_k, p.kv_heads, 1, nan);
  Tensor<float> grad_sink(1, 1, p.heads, 1, nan);
  const int32 row_tiles = ceil_div(p.seqlen_q, kM);
  const std::size_t tiles = static_cast<std::size_t>(p.batch) * p.heads * row_tiles;
  std::vector<float4> vectors(tiles * Types::kTile.row_vectors * kM / 4, float4{nan, nan, nan, nan});
  std::vector<float4> sums(tiles * kM * Types::kDim / 4, float4{nan, nan, nan, nan});
  std::vector<float> alpha_sums(tiles * kM, nan), sink_sums(tiles, nan);
  std::vector<int32> turns(tiles * kBackwardWarps, 1 << 20), used_q(p.batch), used_k(p.batch);
  for (int32 b = 0; b < p.batch; ++b) {
    used_q[b] = c.used_q(b);
    used_k[b] = c.used_k(b);
  }
  int32 counter[kWorkCounters] = {1 << 20, -7};  // what an earlier user of the workspace left
  std::vector<int32> list_count(std::max(1, p.heads * c.blocks.key_blocks), -1);
  std::vector<ColumnEntry> list_entries(std::max(1, p.heads * c.blocks.key_blocks * c.blocks.row_blocks));

  BackwardParams params = {};
  ForwardParams& f = params.forward;
  f.query_map = c.query.map(p.batch);
  f.key_map = c.key.map(p.batch);
  f.value_map = c.value.map(p.batch);
  params.grad_out_map = c.grad_out.map(p.batch);
  params.grad_key_map = grad_key.map(p.batch);
  params.grad_value_map = grad_value.map(p.batch);
  const auto pass = [](auto& pointer, int64& batch, int64& row, int64& head, auto& tensor) {
    pointer = tensor.values.data();
    batch = tensor.stride_batch();
    row = tensor.stride_row();
    head = tensor.stride_head();
  };
  pass(f.out, f.out_stride_batch, f.out_stride_row, f.out_stride_head, c.out);
  pass(params.grad_out, params.grad_out_stride_batch, params.grad_out_stride_row, params.grad_out_stride_head,
       c.grad_out);
  pass(params.grad_query, params.grad_query_stride_batch, params.grad_query_stride_row,
       params.grad_query_stride_head, grad_query);
  pass(params.grad_key, params.grad_key_stride_batch, params.grad_key_stride_row, params.grad_key_stride_head,
       grad_key);
  pass(params.grad_value, params.grad_value_stride_batch, params.grad_value_stride_row,
       params.grad_value_stride_head, grad_value);
  pass(params.grad_lse, params.grad_lse_stride_batch, params.grad_lse_stride_head, params.grad_lse_stride_row,
       c.grad_lse);  // [batch, heads, rows]
  f.lse = c.lse.values.data();
  f.lse_stride_batch = c.lse.stride_batch();
  f.lse_stride_head = c.lse.stride_row();
  f.seqused_q = used_q.data();
  f.seqused_k = used_k.data();
  f.work_counter = counter;
  f.batch = p.batch;
  f.num_heads = p.heads;
  f.group_size = p.heads / p.kv_heads;
  f.head_dim_v = p.head_dim_v;
  f.max_seqlen_q = p.seqlen_q;
  f.max_seqlen_k = p.seqlen_k;
  f.window_left = p.left < 0 ? kOpenWindow : p.left;
  f.window_right = p.causal ? 0 : kOpenWindow;
  params.softmax_scale = 1 / std::sqrt(static_cast<float>(p.head_dim));
  f.softmax_scale_log2 = params.softmax_scale * kLog2e;
  f.softcap = p.softcap;
  f.alibi = {c.slopes.data(), 0, 0, 1, ScalarType::float32, 0};
  f.sink = {c.sinks.data(), 0, 0, 1, ScalarType::float32, 0};
  f.alpha = c.alpha.operand();
  f.delta = c.delta.operand();
  params.grad_alpha = grad_alpha.operand();
  params.grad_delta = grad_delta.operand();
  params.grad_sink = grad_sink.operand();
  f.gate_bits = {c.row_bits.data(), int64{p.heads} * c.row_tiles * c.key_words,
                 int64{c.row_tiles} * c.key_words, c.key_words};
  params.column_bits = {c.column_bits.data(), int64{p.heads} * c.key_tiles * c.row_words,
                        int64{c.key_tiles} * c.row_words, c.row_words};
  if (p.block_mask) {
    f.blocks = c.blocks.lists();
    params.list_count = list_count.data();
    params.list_entries = list_entries.data();
    params.list_stride_head = c.blocks.key_blocks;
    params.list_capacity = c.blocks.row_blocks;
  }
  constexpr int32 kSlots = 16;
  const int32 units = ceil_div(p.seqlen_k, kN) * p.batch * p.kv_heads;
  std::vector<ColumnPart> column_parts(units + kSlots, ColumnPart{-1, -1, -1, -1});
  std::vector<SplitColumn> split(kSlots, SplitColumn{-1, -1});
  std::vector<int32> column_lengths(units, -1);
  std::vector<float4> partial_sums(kSlots * backward_slot_floats(Types::kTile) / 4,
                                   float4{nan, nan, nan, nan});
  PartCounts part_counts = {-1, -1, -1, -1};
  if (p.least_part > 0) {
    params.column_parts = column_parts.data();
    params.split_columns = split.data();
    params.column_lengths = column_lengths.data();
    params.part_counts = &part_counts;
    params.partial_sums = &partial_sums.data()->x;
    params.most_slots = kSlots;
    params.least_part = p.least_part;
  }
  params.row_vectors = &vectors.data()->x;
  params.grad_query_sum = &sums.data()->x;
  params.grad_alpha_sum = alpha_sums.data();
  std::vector<GateTermTile<Types::kBlockM>> row_terms(Types::kGateTerms ? alpha_sums.size() / Types::kBlockM
                                                                        : 0);
  std::memset(static_cast<void*>(row_terms.data()), 0xff, row_terms.size() * sizeof(row_terms[0]));
  if (Types::kGateTerms) params.gate_row_terms = row_terms.data()->terms;
  params.grad_sink_sum = sink_sums.data();
  if (Types::kFirstStores) params.turns = turns.data();
  std::vector<int32> sums_done(p.batch * p.heads, -1);
  params.sums_done = sums_done.data();
  std::vector<int32> clears(1 + p.batch * p.heads, -1);
  params.clears_of_wave = f.group_size * row_tiles;
  params.clears_in_all = p.batch * p.heads * row_tiles - params.clears_of_wave;
  const bool clears_sums = Types::kClearsSums && params.clears_in_all > 0;
  if (clears_sums) params.clears = clears.data();
  params.row_tiles = row_tiles;
  params.head_dim = p.head_dim;
  params.key_heads_per_wave = 1;
  params.ascending_from = (p.batch * p.kv_heads - p.ascending) * c.key_tiles;

  const auto grid = [](int32 x, int32 y, int32 z) {
    return Dim3{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
  };
  const Dim3 by_row_tile = grid(row_tiles, p.heads, p.batch);
  const bool columns_first = p.skip_map || p.block_mask;
  const auto prepare = [&] {
    emulator::launch(by_row_tile, kPrepareThreads, [&] { backward_prepare<Types>(params); });
  };
  if (!columns_first) prepare();
  if (p.skip_map)
    emulator::launch(grid(ceil_div(c.row_words * c.key_words, kTransposeWarps), p.heads, p.batch),
                     kTransposeWarps * kWarpThreads, [&] { transpose_bits<kN>(params); });
  if (p.block_mask)
    emulator::launch(grid(ceil_div(c.blocks.key_blocks, kColumnBlocks), p.heads, 1), kListThreads,
                     [&] { block_columns<kN>(params); });
  if constexpr (Types::kSplits)
    if (p.least_part > 0)
      emulator::launch(grid(Types::Rows::kReadsLengths ? 1 : ceil_div(units, kSplitWarps), 1, 1),
                       kSplitThreads, [&] { split_columns<Types>(params); });
  if (columns_first) prepare();
  emulator::launch(grid(1, 1, 1), kBackwardThreads, [&] { sm90::backward<C>(params); });
  for (int32 i = 0; i < p.batch * p.heads; i += f.group_size) {
    if (Types::kStagedGradQuery)
      EXPECT_EQ(sums_done[i], kBackwardConsumers * ceil_div(p.seqlen_k, kN)) << "head " << i;
    else
      EXPECT_LE(sums_done[i], 0) << "head " << i;
  }
  if (clears_sums) {
    const int32 clear = std::accumulate(clears.begin() + 2, clears.begin() + 1 + p.batch * p.kv_heads, 0);
    EXPECT_EQ(clear, params.clears_in_all);
  }
  emulator::launch(by_row_tile, 2 * kM, [&] { backward_finish<Types>(params); });
  if (p.least_part > 0) {
    EXPECT_GT(part_counts.slots, 1) << "nothing was cut";
    EXPECT_EQ(part_counts.parts, units + part_counts.slots - count_cut(split, part_counts.slots));
    emulator::launch(grid(kSlots, kN / kSumRows, 1), kSumThreads, [&] { sum_parts<Types>(params); });
  }
  if (p.sink) emulator::launch(grid(p.heads, 1, 1), kSumSinkThreads, [&] { sum_sink<Types>(params); });

  EXPECT_EQ(counter[0], 0) << "the work counter must be left at zero";
  EXPECT_EQ(counter[1], 0);
  expect_near("grad_query", c.want_query, grad_query);
  expect_near("grad_key", c.want_key, grad_key);
  expect_near("grad_value", c.want_value, grad_value);
  expect_zero_rows("grad_query", grad_query, p.batch, p.used_q);
  expect_zero_rows("grad_key", grad_key, p.batch, p.used_k);
  expect_zero_rows("grad_value", grad_value, p.batch, p.used_k);
  if (p.gate) {
    expect_near("grad_alpha", c.want_alpha, grad_alpha);
    expect_near("grad_delta", c.want_delta, grad_delta);
  }
  if (p.sink) expect_near("grad_sink", c.want_sink, grad_sink);
}

TEST(BackwardKernel, CausalGroupedHeads) {
  check<Config<kTile128, Causal, RangeRows<Causal, 64, 128>, Logit<>, false>>(
      {1, 200, 330, 2, 1, 128, 128, 150, 300, true});
}

// dQ by one warpgroup or the other: row tiles odd and even in number, key tiles with one row tile.
TEST(BackwardKernel, FullAlternating) {
  check<Config<kTile128, Full, RangeRows<Full, 64, 128>, Logit<>, false>>(
      {2, 320, 300, 1, 1, 128, 128, 330 - 64, 300});
  check<Config<kTile128, Full, RangeRows<Full, 64, 128>, Logit<>, false>>(
      {2, 40, 400, 1, 1, 128, 128, 40, 300});
}
TEST(BackwardKernel, CausalAlternating) {
  check<Config<kTile128, Causal, RangeRows<Causal, 64, 128>, Logit<>, false>>(
      {2, 450, 450, 1, 1, 128, 128, 450, 390, true});
}

// Warpgroups pass over the row tiles at the ends of a window that their keys do not see: one that begins or ends with a
// row tile of odd number, of two row tiles, none (which ends within a row tile), and rows moved by half a key tile.
TEST(BackwardKernel, WindowsPassOverHalfTiles) {
  using Window = WindowMask<true, true>;
  using Default = Config<kTile128, Window, RangeRows<Window, 64, 128>, Logit<>, false>;
  static_assert(sm90::BackwardTypes<Default>::kPassesOver);
  Problem problem = {1, 384, 384, 1, 1, 128, 128, 384, 384, true};
  for (const int32 left : {0, 127, 150}) {
    problem.left = left;
    check<Default>(problem);
  }
  problem = {1, 320, 320, 2, 1, 128, 128, 320, 320, true};
  problem.left = 191;
  check<Default>(problem);
  check<Config<kTile128, Window, RangeRows<Window, 64, 128>, Logit<>, true>>(problem);
  problem = {1, 320, 384, 1, 1, 128, 128, 320, 384, true};
  problem.left = 128;
  check<Default>(problem);
}

TEST(BackwardKernel, Deterministic64) {
  check<Config<kTile64, Causal, RangeRows<Causal, 128, 128>, Logit<>, true>>(
      {2, 300, 300, 2, 2, 64, 64, 77, 140, true});
}

TEST(BackwardKernel, Deterministic128) {
  check<Config<kTile128, Full, RangeRows<Full, 64, 128>, Logit<>, true>>(
      {1, 330, 300, 1, 1, 128, 128, 330, 300});
}

// In the second sequence no key tile comes to the first row tile, which sees no key, or to the last, which is not used.
TEST(BackwardKernel, Deterministic256) {
  check<Config<kTile256, Causal, RangeRows<Causal, 64, 64>, Logit<>, true>>(
      {2, 200, 150, 1, 1, 256, 256, 150, 40, true});
}

// Two waves from the last key tile to the first, then one of two heads the other way.
TEST(BackwardKernel, DeterministicWaveFromTheFirstKeyTile) {
  Problem problem = {2, 300, 300, 2, 2, 64, 64, 277, 240, true};
  problem.ascending = 2;
  check<Config<kTile64, Causal, RangeRows<Causal, 128, 128>, Logit<>, true>>(problem);
  using Window = WindowMask<true, true>;  // whose row tiles do not begin with the first key tile
  problem = {1, 330, 300, 2, 1, 128, 128, 330, 300, true};
  problem.ascending = 1;
  problem.left = 70;
  check<Config<kTile128, Window, RangeRows<Window, 64, 128>, Logit<>, true>>(problem);
  problem = {3, 200, 150, 1, 1, 256, 256, 150, 40, true};
  problem.ascending = 2;
  check<Config<kTile256, Causal, RangeRows<Causal, 64, 64>, Logit<>, true>>(problem);
}

TEST(BackwardKernel, SkipMapAndPairGate) {
  Problem problem = {1, 100, 200, 1, 1, 128, 128, 90, 190, true, true};
  problem.gate = true;
  check<
      Config<kTile128Gate, Causal, BitmapRows<RangeRows<Causal, 64, 128>, 128>, Logit<PairGate<true>>, true>>(
      problem);
}

// Terms hold where |alpha delta| <= 4 in the whole tile; shifts are for tiles all alike: near 1 and 3, far below 0.
TEST(BackwardKernel, FoldedPairGate) {
  using MapConfig = Config<kTile128FoldedGate, Causal, BitmapRows<RangeRows<Causal, 64, 128>, 128>,
                           Logit<FoldedPairGate<true>>, false>;
  Problem problem = {1, 100, 200, 1, 1, 128, 128, 90, 190, true, true};
  problem.gate = true;
  for (const float factor : {0.3f, 0.8f, 2.0f}) {
    problem.gate_factor = factor;
    check<MapConfig>(problem);
  }
  for (const float shift : {-40.0f, 1.0f, 3.0f}) {
    problem.gate_shift = shift;
    check<MapConfig>(problem);
  }
  problem.gate_shift = 0;
  problem.linear_gate = true;
  check<Config<kTile128FoldedGate, Causal, BitmapRows<RangeRows<Causal, 64, 128>, 128>,
               Logit<FoldedPairGate<false>>, false>>(problem);
  problem = {1, 100, 200, 2, 1, 128, 128, 100, 200, true};
  problem.gate = problem.alibi = true;
  problem.gate_factor = 0.6f;
  check<Config<kTile128GateAlibi, Causal, RangeRows<Causal, 64, 128>, Logit<FoldedPairGate<true>, Alibi>,
               true>>(problem);
}

TEST(BackwardKernel, SoftcapAlibiSink) {
  Problem problem = {1, 100, 200, 2, 1, 128, 128, 100, 200, true};
  problem.alibi = problem.sink = true;
  problem.softcap = 5;
  check<Config<kTile128Logit, Causal, RangeRows<Causal, 64, 128>, Logit<Softcap, Alibi>, false, true>>(
      problem);
}

TEST(BackwardKernel, LongColumnsInParts) {
  Problem problem = {1, 330, 200, 2, 1, 128, 128, 300, 190, true, true};
  problem.gate = true;
  problem.least_part = 1;
  check<Config<kTile128Gate, Causal, BitmapRows<RangeRows<Causal, 64, 128>, 128>, Logit<PairGate<true>>,
               false>>(problem);
  problem = {1, 300, 300, 2, 1, 64, 64, 300, 300};
  problem.block_mask = true;
  problem.least_part = 1;
  check<Config<kTile64Sparse, ListMask, ListRows<64, 128>, Logit<>, true>>(problem);
  problem = {1, 300, 130, 1, 1, 256, 256, 300, 130, true, true};
  problem.least_part = 1;
  check<Config<kTile256, Causal, BitmapRows<RangeRows<Causal, 64, 64>, 64>, Logit<>, true>>(problem);
}

TEST(BackwardKernel, BlockMasks) {
  Problem problem = {1, 200, 300, 2, 1, 64, 64, 200, 300};
  problem.block_mask = true;
  check<Config<kTile64Sparse, ListMask, ListRows<64, 128>, Logit<>, true>>(problem);
  problem = {1, 150, 150, 1, 1, 256, 128, 150, 150};
  problem.block_mask = true;
  check<Config<kTile256x128, ListMask, ListRows<64, 64>, Logit<>, false>>(problem);
}

}  // namespace
}  // namespace fsa::test
