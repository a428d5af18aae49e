// SPDX-License-Identifier: Apache-2.0
// The GPU forward and the kernels of its gate, run on the CPU by tests/emulator against attention in float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "common/clear_counters.cuh"
#include "common/gate_bitmap.cuh"
#include "common/gate_prepare.cuh"
#include "policy/bitmap_tiles.cuh"
#include "policy/contiguous_tma.cuh"
#include "policy/list_schedule.cuh"
#include "policy/list_tiles.cuh"
#include "policy/logit.cuh"
#include "policy/mask.cuh"
#include "policy/range_tiles.cuh"
#include "policy/schedule.cuh"
#include "policy/skip.cuh"
#include "policy/store_output.cuh"
#include "sm90/forward.cuh"
#include "test_emulator.h"

namespace fsa::test {
namespace {

using namespace fsa::kernels;
using kernels::ptx::float_of_bf16;

// Tiles as tools/gpu/features.py and docs/kernels/forward_sm90.md have them; the last three: private values, key
// scalars, rounded sums.
constexpr ForwardTile kDense64 = {64, 64, 192, 128, 2, 4, 4, 0, 0, 0, 0};
constexpr ForwardTile kDense128 = {128, 128, 128, 128, 2, 2, 2, 0, 0, 0, 0};
constexpr ForwardTile kDense256 = {256, 256, 128, 80, 1, 2, 2, 0, 0, 0, 0};
constexpr ForwardTile kGate128 = {128, 128, 128, 128, 2, 2, 2, 0, 1, 0, 0};
constexpr ForwardTile kFoldedGate128 = {128, 128, 128, 128, 2, 2, 2, 0, 1, 1, 0};
constexpr ForwardTile kVote64 = {64, 64, 192, 128, 2, 4, 6, 1, 0, 0, 0};
constexpr ForwardTile kVote128 = {128, 128, 128, 128, 1, 2, 4, 1, 0, 0, 0};
constexpr ForwardTile kVote256 = {256, 256, 128, 64, 1, 2, 2, 0, 0, 0, 0};
constexpr ForwardTile kBounded128 = {128, 128, 192, 80, 2, 2, 4, 0, 0, 0, 1};

using Causal = WindowMask<false, true>;
using Full = WindowMask<false, false>;
using Window = WindowMask<true, true>;

template <ForwardTile kShape, class MaskType, class Chain = Logit<>, class SkipType = Never,
          class Sink = NoSink, bool kBits = false>
struct Ranges {
  static constexpr ElementType kElement = ElementType::bf16;
  static constexpr ForwardTile kTile = kShape;
  using KvSource = ContiguousTma;
  using Mask = MaskType;
  using Visible = RangeTiles<Mask, kShape.block_m, kShape.block_n>;
  using TileIterator = std::conditional_t<kBits, BitmapTiles<Visible, kShape.block_m>, Visible>;
  using Schedule = LongestFirst<kShape.block_m>;
  using LogitChain = Chain;
  using Skip = SkipType;
  using Epilogue = StoreOutput<Sink>;
};

template <ForwardTile kShape>
struct Lists {
  static constexpr ElementType kElement = ElementType::bf16;
  static constexpr ForwardTile kTile = kShape;
  using KvSource = ContiguousTma;
  using Mask = ListMask;
  using TileIterator = ListTiles<kShape.block_m, kShape.block_n>;
  using Schedule = LongestListFirst<TileIterator, kShape.block_m>;
  using LogitChain = Logit<>;
  using Skip = Never;
  using Epilogue = StoreOutput<NoSink>;
};

struct Problem {
  int32 batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim;
  int32 used_q, used_k;         // of the last batch entry
  int32 left = -1, right = -1;  // -1: open
  double shift = 0;             // added to every logit, by a column of query and key
  float softcap = 0, threshold = 0;
  double apart = 20;         // with a threshold: nats between directions
  float gate_factor = 3;     // of alpha and delta
  bool linear_gate = false;  // without log sigmoid
  bool gate = false, gate_test = false, alibi = false, sink = false, block_mask = false;
};

class Call {
 public:
  explicit Call(const Problem& problem)
      : p(problem),
        query(p.batch, p.seqlen_q, p.heads, p.head_dim),
        key(p.batch, p.seqlen_k, p.kv_heads, p.head_dim),
        value(p.batch, p.seqlen_k, p.kv_heads, p.head_dim),
        alpha(p.batch, p.seqlen_q, p.heads, 1),
        delta(p.batch, p.seqlen_k, p.kv_heads, 1),
        slopes(p.heads),
        sinks(p.heads),
        blocks(random, p.heads, p.seqlen_q, p.seqlen_k) {
    std::normal_distribution<float> normal;
    for (auto* tensor : {&query, &key, &value})
      for (uint16& x : tensor->values) x = static_cast<uint16>(ptx::bf16_bits(normal(random)));
    for (auto* tensor : {&alpha, &delta})
      for (float& x : tensor->values) x = p.gate_factor * normal(random);
    for (float& x : slopes) x = 0.1f * std::abs(normal(random));
    for (float& x : sinks) x = normal(random);
    if (p.shift != 0) set_column(query, 0, std::sqrt(std::abs(p.shift) / scale()));
    if (p.shift != 0) set_column(key, 0, std::copysign(std::sqrt(std::abs(p.shift) / scale()), p.shift));
    if (p.threshold > 0) separate();
    if (p.gate_test) close_gates();
  }

  double scale() const { return 1 / std::sqrt(static_cast<double>(p.head_dim)); }
  int32 used_q(int32 b) const { return b == p.batch - 1 ? p.used_q : p.seqlen_q; }
  int32 used_k(int32 b) const { return b == p.batch - 1 ? p.used_k : p.seqlen_k; }

  bool visible(int32 b, int32 h, int32 row, int32 k) const {
    const int32 diagonal = row + used_k(b) - used_q(b);
    return (p.left < 0 || k >= diagonal - p.left) && (p.right < 0 || k <= diagonal + p.right) &&
           (!p.block_mask || blocks.listed(h, row, k));
  }

  double logit(int32 b, int32 h, int32 row, int32 k) {
    const int32 kv = h / (p.heads / p.kv_heads);
    double x = 0;
    for (int32 e = 0; e < p.head_dim; ++e)
      x += static_cast<double>(float_of_bf16(query.at(b, row, h, e))) * float_of_bf16(key.at(b, k, kv, e));
    if (p.gate) {
      const double z = static_cast<double>(alpha.at(b, row, h, 0)) * delta.at(b, k, kv, 0);
      x += p.linear_gate ? z : std::min(z, 0.0) - std::log1p(std::exp(-std::abs(z)));
    }
    x *= scale();
    if (p.softcap > 0) x = p.softcap * std::tanh(x / p.softcap);
    if (p.alibi) x -= static_cast<double>(slopes[h]) * std::abs(row + used_k(b) - used_q(b) - k);
    return x;
  }

  const Problem p;
  std::mt19937 random{1};
  Tensor<uint16> query, key, value;
  Tensor<float> alpha, delta;
  std::vector<float> slopes, sinks;
  RandomBlocks blocks;  // where the problem has a block mask

 private:
  static void set_column(Tensor<uint16>& tensor, int32 column, double to) {
    for (std::size_t i = static_cast<std::size_t>(column); i < tensor.values.size(); i += tensor.columns)
      tensor.values[i] = static_cast<uint16>(ptx::bf16_bits(static_cast<float>(to)));
  }

  // Runs of 64 rows and of 128 keys have one of three directions in turn, and unlike ones lie so much lower.
  void separate() {
    const auto turn = [&](Tensor<uint16>& tensor, int32 length) {
      for (int32 b = 0; b < p.batch; ++b)
        for (int32 row = 0; row < tensor.rows; ++row)
          for (int32 h = 0; h < tensor.heads; ++h)
            for (int32 t = 0; t < 3; ++t)
              tensor.at(b, row, h, 1 + t) = static_cast<uint16>(ptx::bf16_bits(
                  row / length % 3 == t ? static_cast<float>(std::sqrt(p.apart / scale())) : 0.0f));
    };
    turn(query, 64);
    turn(key, 128);
  }

  // Two of three key tiles are shut for all rows.
  void close_gates() {
    for (float& x : alpha.values) x = 1 + 0.1f * std::abs(x);
    for (int32 b = 0; b < p.batch; ++b)
      for (int32 k = 0; k < p.seqlen_k; ++k)
        for (int32 h = 0; h < p.kv_heads; ++h)
          if (k / 128 % 3 != 0) delta.at(b, k, h, 0) = -300 + delta.at(b, k, h, 0);
  }
};

// What the kernels wrote.
struct Result {
  Tensor<uint16> out;
  Tensor<float> lse;        // [batch, heads, rows]
  std::vector<int32> kept;  // [batch, heads, row tiles of 64, words]: tiles that count, by vote or gate
  int32 row_tiles, words;

  bool keeps(int32 heads, int32 b, int32 h, int32 row, int32 tile) const {
    return (kept[((b * heads + h) * row_tiles + row / 64) * words + tile / 32] >> tile % 32 & 1) != 0;
  }
};

template <class C>
Result run(Call& c) {
  constexpr int32 kN = C::kTile.block_n;
  const Problem& p = c.p;
  for (int32 row = p.used_q; row < p.seqlen_q; ++row)
    std::fill_n(&c.query.at(p.batch - 1, row, 0, 0), c.query.stride_row(), kNan);
  for (int32 row = p.used_k; row < p.seqlen_k; ++row)
    for (auto* tensor : {&c.key, &c.value})
      std::fill_n(&tensor->at(p.batch - 1, row, 0, 0), tensor->stride_row(), kNan);

  const int32 row_tiles = ceil_div(p.seqlen_q, 64), key_tiles = ceil_div(p.seqlen_k, kN);
  const int32 words = ceil_div(key_tiles, 32);
  const std::size_t map_words = static_cast<std::size_t>(p.batch) * p.heads * row_tiles * words;
  Result result = {Tensor<uint16>(p.batch, p.seqlen_q, p.heads, p.head_dim, kNan),
                   Tensor<float>(p.batch, p.heads, p.seqlen_q, 1, std::nanf("")),
                   std::vector<int32>(map_words, p.threshold > 0 ? 0 : -1), row_tiles, words};
  std::vector<int32> used_q(p.batch), used_k(p.batch);
  for (int32 b = 0; b < p.batch; ++b) {
    used_q[b] = c.used_q(b);
    used_k[b] = c.used_k(b);
  }
  const float nan = std::nanf("");
  const std::size_t all_tiles = static_cast<std::size_t>(p.batch) * p.kv_heads * key_tiles;
  std::vector<float4> gate_delta(all_tiles * kN / 4, float4{nan, nan, nan, nan});
  std::vector<float> gate_extremes(all_tiles * 2, nan);
  std::vector<GateTermTile<kN>> gate_terms(all_tiles);
  std::memset(static_cast<void*>(gate_terms.data()), 0xff, all_tiles * sizeof(gate_terms[0]));
  int32 counter[kWorkCounters] = {1 << 20, -7};  // what an earlier user of the workspace left

  ForwardParams f = {};
  f.query_map = c.query.map(p.batch);
  f.key_map = c.key.map(p.batch, kN);
  f.value_map = c.value.map(p.batch, kN);
  f.out_map = result.out.map(p.batch);
  f.out = result.out.values.data();
  f.out_stride_batch = result.out.stride_batch();
  f.out_stride_row = result.out.stride_row();
  f.out_stride_head = result.out.stride_head();
  f.lse = result.lse.values.data();
  f.lse_stride_batch = result.lse.stride_batch();
  f.lse_stride_head = result.lse.stride_row();
  f.seqused_q = used_q.data();
  f.seqused_k = used_k.data();
  f.work_counter = counter;
  f.batch = p.batch;
  f.num_heads = p.heads;
  f.group_size = p.heads / p.kv_heads;
  f.head_dim_v = p.head_dim;
  f.max_seqlen_q = p.seqlen_q;
  f.max_seqlen_k = p.seqlen_k;
  f.window_left = p.left < 0 ? kOpenWindow : p.left;
  f.window_right = p.right < 0 ? kOpenWindow : p.right;
  f.heads_per_wave = 2;
  f.softmax_scale_log2 = static_cast<float>(c.scale()) * kLog2e;
  f.threshold = p.threshold;
  const TileBits map = {result.kept.data(), int64{p.heads} * row_tiles * words, int64{row_tiles} * words,
                        words};
  if (p.threshold > 0) {
    f.skip_map = map.words;
    f.skip_map_stride_batch = map.stride_batch;
    f.skip_map_stride_head = map.stride_head;
    f.skip_map_stride_tile = map.stride_tile;
  }
  f.softcap = p.softcap;
  f.alibi = {c.slopes.data(), 0, 0, 1, ScalarType::float32, 0};
  f.sink = {c.sinks.data(), 0, 0, 1, ScalarType::float32, 0};
  f.alpha = c.alpha.operand();
  f.delta = c.delta.operand();
  f.gate_delta = &gate_delta.data()->x;
  f.gate_extremes = gate_extremes.data();
  if (C::LogitChain::kGateTerms) f.gate_terms = gate_terms.data()->terms;
  f.gate_delta_stride_batch = int64{p.kv_heads} * key_tiles * kN;
  f.gate_delta_stride_head = int64{key_tiles} * kN;
  f.gate_bits = map;
  f.gate_test = p.gate_test;
  f.log_sigmoid_gate = !p.linear_gate;
  if (p.block_mask) f.blocks = c.blocks.lists();

  const auto grid = [](int32 x, int32 y, int32 z) {
    return Dim3{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
  };
  if (p.gate) {
    emulator::launch(grid(key_tiles, p.kv_heads, p.batch), kN, [&] { gate_prepare<kN>(f); });
    if constexpr (C::TileIterator::kListed && !std::is_same_v<typename C::Mask, ListMask>)
      emulator::launch(grid(ceil_div(p.seqlen_q, 64 * kBitmapWarps), p.heads, p.batch),
                       kBitmapWarps * kWarpThreads,
                       [&] { gate_bitmap<RangeTiles<typename C::Mask, 64, kN>, kN>(f); });
  }
  const int32 ctas = std::min(2, ceil_div(p.seqlen_q, C::kTile.block_m) * p.heads * p.batch);
  emulator::KernelBefore clear = {kClearThreads, [&] { clear_counters(counter); }, {}};
  emulator::launch_early(grid(ctas, 1, 1), forward_threads(C::kTile), [&] { sm90::forward<C>(f); }, clear);
  EXPECT_EQ(clear.waited.size(), static_cast<std::size_t>(ctas)) << "each CTA takes its second tile after it";
  EXPECT_EQ(counter[0], 0) << "the work counter must be left at zero";
  EXPECT_EQ(counter[1], 0);
  return result;
}

// Votes as taken from right to left, by what is known then; where that is near, either is right.
void check_votes(Call& c, const Result& result, int32 b, int32 h, int32 m, int32 block_n, int* kept,
                 int* skipped) {
  const Problem& p = c.p;
  constexpr double kNear = 0.01;
  const int32 rows = std::min(64, c.used_q(b) - m);
  std::vector<double> sum(static_cast<std::size_t>(rows), 0);
  for (int32 tile = (c.used_k(b) - 1) / block_n; tile >= 0; --tile) {
    double reach = -INFINITY;  // of the row that wants it most, above what it asks for
    bool seen = false;
    std::vector<std::vector<double>> s(static_cast<std::size_t>(rows));
    for (int32 i = 0; i < rows; ++i) {
      double top = -INFINITY;
      for (int32 k = tile * block_n; k < std::min((tile + 1) * block_n, c.used_k(b)); ++k)
        if (c.visible(b, h, m + i, k)) top = std::max(top, s[i].emplace_back(c.logit(b, h, m + i, k)));
      if (s[i].empty()) continue;
      seen = true;
      const double share = std::min(1.0, static_cast<double>(p.threshold) / c.used_k(b));
      reach = std::max(reach, sum[i] == 0 ? INFINITY : top - std::log(sum[i]) - std::log(share));
    }
    if (!seen) continue;
    const bool mine = result.keeps(p.heads, b, h, m, tile);
    if (std::abs(reach) > kNear) {
      EXPECT_EQ(mine, reach > 0) << "row tile " << m / 64 << ", key tile " << tile;
    }
    ++*(mine ? kept : skipped);
    for (int32 i = 0; i < rows && mine; ++i)
      for (const double x : s[i]) sum[i] += std::exp(x);
  }
}

template <class C>
void check(const Problem& problem) {
  constexpr int32 kN = C::kTile.block_n;
  Call c(problem);
  const Problem& p = c.p;
  Result result = run<C>(c);
  double error = 0, largest = 0, lse_error = 0;
  int kept = 0, skipped = 0;
  for (int32 b = 0; b < p.batch; ++b)
    for (int32 h = 0; h < p.heads; ++h) {
      const int32 kv = h / (p.heads / p.kv_heads);
      if (p.threshold > 0)
        for (int32 m = 0; m < c.used_q(b); m += 64) check_votes(c, result, b, h, m, kN, &kept, &skipped);
      for (int32 i = 0; i < p.seqlen_q; ++i) {
        const float lse = result.lse.at(b, h, i, 0);
        std::vector<double> o(static_cast<std::size_t>(p.head_dim), 0);
        double sum = p.sink ? std::exp(static_cast<double>(c.sinks[h])) : 0;
        int32 keys = 0, only = 0;
        for (int32 k = 0; k < c.used_k(b) && i < c.used_q(b); ++k) {
          if (!c.visible(b, h, i, k) || !result.keeps(p.heads, b, h, i, k / kN)) continue;
          const double e = std::exp(c.logit(b, h, i, k) - p.shift);
          sum += p.sink ? e * std::exp(p.shift) : e;
          ++keys;
          only = k;
          for (int32 d = 0; d < p.head_dim; ++d) o[d] += e * float_of_bf16(c.value.at(b, k, kv, d));
        }
        for (int32 d = 0; d < p.head_dim; ++d) {
          const double got = float_of_bf16(result.out.at(b, i, h, d));
          ASSERT_TRUE(std::isfinite(got)) << "out, row " << i << ", column " << d;
          const double want = keys == 0 ? 0 : o[d] / sum;
          if (keys == 0 || (keys == 1 && !p.sink)) {
            ASSERT_EQ(got, keys == 0 ? 0 : float_of_bf16(c.value.at(b, only, kv, d)))
                << "row " << i << " with " << keys << " keys";
          }
          error = std::max(error, std::abs(got - want));
          largest = std::max(largest, std::abs(want));
        }
        if (i >= c.used_q(b) || (keys == 0 && !p.sink)) {
          ASSERT_EQ(lse, -INFINITY) << "row " << i;
        } else {
          ASSERT_TRUE(std::isfinite(lse)) << "row " << i;
          const double want = std::log(sum) + (p.sink ? 0 : p.shift);
          lse_error = std::max(lse_error, std::abs(lse - want) / std::max(1.0, std::abs(want)));
        }
      }
    }
  EXPECT_GT(largest, 0.1) << "nothing was compared";
  EXPECT_LE(error, 0.01 * largest);  // P is rounded to bf16, twice what correct kernels show
  EXPECT_LE(lse_error, 2e-5);
  if (p.threshold > 0) {
    EXPECT_GT(kept, 4);
    EXPECT_GT(skipped, 4);
  }
}

TEST(ForwardKernel, CausalGroupedHeads) {
  check<Ranges<kDense128, Causal>>({1, 200, 330, 2, 1, 128, 150, 300, -1, 0});
  check<Ranges<kDense64, Causal>>({2, 250, 250, 2, 2, 64, 77, 140, -1, 0});
  check<Ranges<kDense256, Full>>({1, 130, 170, 1, 1, 256, 130, 170});
}

// Row maxima are found in two ways, by their sign.
TEST(ForwardKernel, LogitsOfEitherSign) {
  Problem problem = {1, 140, 400, 1, 1, 128, 140, 400, -1, 0};
  for (const double shift : {-200.0, -3.0, 30.0}) {  // 2^-200 is no float
    problem.shift = shift;
    check<Ranges<kDense128, Causal>>(problem);
  }
}

TEST(ForwardKernel, Windows) {
  check<Ranges<kDense128, Window>>({1, 400, 400, 1, 1, 128, 390, 380, 150, 0});
  check<Ranges<kDense64, Window>>({1, 300, 500, 1, 1, 64, 300, 500, 100, 30});
}

TEST(ForwardKernel, Votes) {
  Problem problem = {1, 130, 600, 1, 1, 128, 120, 590, -1, 0};
  problem.threshold = 1;
  for (const double shift : {-200.0, 0.0, 30.0}) {
    problem.shift = shift;
    check<Ranges<kVote128, Causal, Logit<>, ThresholdSkip>>(problem);
  }
  problem.head_dim = 64;
  check<Ranges<kVote64, Causal, Logit<>, ThresholdSkip>>(problem);
  problem = {1, 100, 400, 1, 1, 256, 100, 400};
  problem.threshold = 1;
  check<Ranges<kVote256, Full, Logit<>, ThresholdSkip>>(problem);
}

// A work tile's way through its tiles follows from what has been kept before; a low threshold begins with the one that
// expects to keep most.
TEST(ForwardKernel, VotesWhereMostIsKept) {
  Problem problem = {1, 380, 500, 2, 1, 128, 370, 490, -1, 0};
  const auto ways = [&](float threshold, double apart) {
    problem.threshold = threshold;
    problem.apart = apart;
    emulator::barrier_votes = emulator::bytes_stored = 0;
    check<Ranges<kVote128, Causal, Logit<>, ThresholdSkip>>(problem);
    EXPECT_GT(emulator::bytes_stored, 0) << "all with barriers";
    EXPECT_GT(emulator::barrier_votes, 0) << "none with a barrier";
  };
  ways(2e-5f, 20);
  ways(1, 9);
}

TEST(ForwardKernel, Gates) {
  Problem problem = {1, 100, 450, 2, 1, 128, 90, 440, -1, 0};
  problem.gate = true;
  check<Ranges<kGate128, Causal, Logit<PairGate<true>>>>(problem);
  problem.gate_test = true;
  check<Ranges<kGate128, Causal, Logit<PairGate<true>>, Never, NoSink, true>>(problem);
}

// Terms hold where |alpha delta| <= 4 in the whole tile. With a test, the tiles that are not open lie far below 0, and
// the right-most of them is kept.
TEST(ForwardKernel, FoldedGates) {
  Problem problem = {1, 100, 450, 2, 1, 128, 90, 440, -1, 0};
  problem.gate = true;
  for (const float factor : {0.3f, 0.9f, 3.0f, 1000.0f}) {
    problem.gate_factor = factor;
    check<Ranges<kFoldedGate128, Causal, Logit<FoldedPairGate<true>>>>(problem);
  }
  problem.linear_gate = true;
  problem.gate_factor = 3;
  check<Ranges<kFoldedGate128, Causal, Logit<FoldedPairGate<false>>>>(problem);
  problem.linear_gate = false;
  Problem window = {1, 300, 300, 1, 1, 128, 290, 280, 150, 0};
  window.gate = window.alibi = true;
  window.gate_factor = problem.gate_factor = 0.5f;
  check<Ranges<kFoldedGate128, Window, Logit<FoldedPairGate<true>, Alibi>>>(window);
  problem.gate_test = true;
  for (const int32 used : {440, 330}) {
    problem.used_k = used;
    check<Ranges<kFoldedGate128, Causal, Logit<FoldedPairGate<true>>, Never, NoSink, true>>(problem);
  }
}

TEST(ForwardKernel, SoftcapAlibiSink) {
  Problem problem = {1, 200, 200, 1, 1, 128, 195, 195, -1, 0};
  problem.softcap = 30;  // a row with one key gets that key's value to the bit
  check<Ranges<kBounded128, Causal, Logit<SoftcapBounded>>>(problem);
  problem.softcap = 5;
  problem.sink = true;
  check<Ranges<kBounded128, Causal, Logit<SoftcapBounded>, Never, LearnableSink>>(problem);
  problem.alibi = true;
  check<Ranges<kDense128, Causal, Logit<Softcap, Alibi>, Never, LearnableSink>>(problem);
}

TEST(ForwardKernel, BlockMasks) {
  Problem problem = {1, 300, 400, 2, 1, 128, 280, 370};
  problem.block_mask = true;
  check<Lists<kDense128>>(problem);
}

}  // namespace
}  // namespace fsa::test
