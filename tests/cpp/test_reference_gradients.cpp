// SPDX-License-Identifier: Apache-2.0
// The reference's backward against finite differences of the reference's forward. The loss is
// sum(out * grad_out) + sum(lse * grad_lse); a step must not change a skip decision, which is checked.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "test_util.h"

namespace fsa::test {
namespace {

double loss(const Attention& a) {
  double sum = 0;
  for (std::int64_t i = 0; i < a.out.numel(); ++i) {
    const double grad = a.grad_out.get(i);
    if (!std::isnan(grad)) sum += a.out.get(i) * grad;
  }
  for (std::int64_t i = 0; a.grad_lse.present() && i < a.lse.numel(); ++i) {
    const double grad = a.grad_lse.get(i);
    if (!std::isnan(grad) && a.lse.get(i) != -kInf) sum += a.lse.get(i) * grad;
  }
  return sum;
}

// Central difference of the loss when `input` moves along `direction`.
double difference(const Attention& a, Buffer Attention::* input, const Buffer& direction) {
  constexpr double kStep = 1e-5;
  double losses[2];
  for (int side = 0; side < 2; ++side) {
    Attention moved = a;
    for (std::int64_t i = 0; i < direction.numel(); ++i)
      (moved.*input).put(i, (a.*input).get(i) + (side == 0 ? kStep : -kStep) * direction.get(i));
    moved.forward();
    EXPECT_TRUE(same_bytes(moved.skip_map, a.skip_map))
        << "the step crossed a skip decision: choose another seed";
    losses[side] = loss(moved);
  }
  return (losses[0] - losses[1]) / (2 * kStep);
}

struct Pair {
  const char* name;
  Buffer Attention::* input;
  Buffer Attention::* grad;
};
const Pair kPairs[] = {{"query", &Attention::query, &Attention::grad_query},
                       {"key", &Attention::key, &Attention::grad_key},
                       {"value", &Attention::value, &Attention::grad_value},
                       {"alpha", &Attention::alpha, &Attention::grad_alpha},
                       {"delta", &Attention::delta, &Attention::grad_delta},
                       {"sink", &Attention::sink, &Attention::grad_sink}};

void expect_gradients(Attention& a, int directions) {
  a.forward();
  a.backward();
  Random random(99);
  for (const Pair& pair : kPairs) {
    if (!(a.*pair.input).present()) continue;
    for (int n = 0; n < directions; ++n) {
      Buffer direction = a.*pair.input;
      direction.fill_normal(random);
      double analytic = 0, size = 0;
      for (std::int64_t i = 0; i < direction.numel(); ++i) {
        const double term = (a.*pair.grad).get(i) * direction.get(i);
        analytic += term;
        size += std::abs(term);
      }
      EXPECT_NEAR(difference(a, pair.input, direction), analytic, 1e-7 * (1 + size)) << pair.name;
    }
  }
}

void expect_every_gradient(Attention& a) {
  a.forward();
  a.backward();
  for (const Pair& pair : kPairs) {
    if (!(a.*pair.input).present()) continue;
    for (std::int64_t i = 0; i < (a.*pair.input).numel(); ++i) {
      Buffer direction = a.*pair.input;
      direction.fill(0);
      direction.put(i, 1);
      EXPECT_NEAR(difference(a, pair.input, direction), (a.*pair.grad).get(i), 1e-7) << pair.name << " " << i;
    }
  }
}

enum class Gate { none, log_sigmoid, linear };
enum class Masking { full, causal, window, window_sizes };

struct Policies {
  Masking masking;
  Gate gate;
  bool softcap, alibi, sink, grad_lse;
};

std::string name_of_policies(const testing::TestParamInfo<Policies>& info) {
  const Policies& p = info.param;
  const char* masks[] = {"Full", "Causal", "Window", "WindowSizes"};
  const char* gates[] = {"", "LogSigmoidGate", "LinearGate"};
  return std::string(masks[static_cast<int>(p.masking)]) + gates[static_cast<int>(p.gate)] +
         (p.softcap ? "Softcap" : "") + (p.alibi ? "Alibi" : "") + (p.sink ? "Sink" : "") +
         (p.grad_lse ? "GradLse" : "");
}

std::vector<Policies> every_combination() {
  std::vector<Policies> result;
  for (Masking masking : {Masking::full, Masking::causal, Masking::window, Masking::window_sizes})
    for (Gate gate : {Gate::none, Gate::log_sigmoid, Gate::linear})
      for (int bits = 0; bits < 16; ++bits)
        result.push_back({masking, gate, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0});
  return result;
}

AttentionSetup setup_of(const Policies& p) {
  AttentionSetup setup;
  setup.options.backend = "reference";
  setup.num_heads = 4;
  setup.num_kv_heads = 2;
  setup.gate = p.gate != Gate::none;
  setup.options.log_sigmoid_gate = p.gate == Gate::log_sigmoid;
  if (setup.gate) setup.options.gate_threshold = 0;
  setup.alibi = p.alibi;
  setup.sink = p.sink;
  setup.options.softcap = p.softcap ? 1.5 : 0;
  setup.options.causal = p.masking == Masking::causal;
  if (p.masking == Masking::window) {
    setup.options.window_left = 2;
    setup.options.window_right = 1;
  }
  if (p.masking == Masking::window_sizes) setup.window_sizes = {{1, 2, 1, 2}, {0, 0, 0, 3}};
  return setup;
}

class ReferenceGradients : public testing::TestWithParam<Policies> {};

TEST_P(ReferenceGradients, MatchFiniteDifferences) {
  AttentionSetup setup = setup_of(GetParam());
  setup.batch = 2;
  setup.seqlen_q = 6;  // longer than one of the key lengths: rows without a key
  setup.seqlen_k = 7;
  setup.head_dim = 3;
  setup.head_dim_v = 2;
  setup.seqused_q = {6, 4};
  setup.seqused_k = {4, 7};
  Attention a = Attention::prefill(setup);
  Random random(5);
  a.make_gradients(random, GetParam().grad_lse);
  for (std::int64_t h = 0; h < 4; ++h)  // unused rows of the second sequence
    for (std::int64_t i = 4; i < 6; ++i) {
      for (std::int64_t d = 0; d < 2; ++d) a.grad_out.set(kNan, 1, i, h, d);
      if (a.grad_lse.present()) a.grad_lse.set(kNan, 1, h, i);
    }
  expect_gradients(a, 3);
}

INSTANTIATE_TEST_SUITE_P(Policies, ReferenceGradients, testing::ValuesIn(every_combination()),
                         name_of_policies);

// Three key tiles, each with a topic of its own; row tile 0 (positions 70 to 133) asks for the topic of tile
// 1, row tile 1 (134 to 139) for that of tile 2. The vote drops tile 0 for row tile 0 and tile 1 for row tile
// 1; with a gate, tile 1 is shut for both, which leaves rows without a key where a window is narrow.
class ReferenceSkippingGradients : public testing::TestWithParam<Policies> {};

TEST_P(ReferenceSkippingGradients, MatchFiniteDifferences) {
  AttentionSetup setup = setup_of(GetParam());
  setup.num_heads = 2;
  setup.num_kv_heads = 1;
  setup.seqlen_q = 70;
  setup.seqlen_k = 140;
  setup.head_dim = 130;  // tiles of 64 keys
  setup.options.threshold = 1.0;
  setup.options.softmax_scale = 1;
  setup.options.softcap *= 20;
  if (setup.gate) setup.options.gate_threshold = 0.3;
  if (GetParam().masking == Masking::window) setup.options.window_left = 20;
  if (GetParam().masking == Masking::window_sizes) setup.window_sizes = {{1, 20, 40, 12}};
  Attention a = Attention::prefill(setup);
  Random random(6);
  for (std::int64_t d = 0; d < 130; ++d) {
    for (std::int64_t j = 0; j < 140; ++j)
      a.key.set(0.1 * random.normal() + (d == j / 64 ? 5 : 0), 0, j, 0, d);
    for (std::int64_t i = 0; i < 70; ++i)
      for (std::int64_t h = 0; h < 2; ++h)
        a.query.set(0.1 * random.normal() + (d == 1 + i / 64 ? 5 : 0), 0, i, h, d);
  }
  if (setup.gate) {
    for (std::int64_t i = 0; i < a.alpha.numel(); ++i) a.alpha.put(i, 1 + 0.05 * random.normal());
    for (std::int64_t j = 0; j < 140; ++j)
      a.delta.set((j / 64 == 1 ? -4 : 1) + 0.05 * random.normal(), 0, j, 0);
  }
  a.make_gradients(random, GetParam().grad_lse);
  expect_gradients(a, 1);
  EXPECT_FALSE(a.kept(0, 0, 1, 1));
  EXPECT_TRUE(a.kept(0, 0, 1, 2));
  EXPECT_EQ(a.kept(0, 1, 0, 1), !setup.gate);
}

std::vector<Policies> all_or_nothing() {
  std::vector<Policies> result;
  for (const Policies& p : every_combination())
    if (p.softcap == p.alibi && p.alibi == p.sink && p.sink == p.grad_lse) result.push_back(p);
  return result;
}

INSTANTIATE_TEST_SUITE_P(Policies, ReferenceSkippingGradients, testing::ValuesIn(all_or_nothing()),
                         name_of_policies);

TEST(ReferenceBackward, EveryElementOfATinyProblem) {
  AttentionSetup setup{.seqlen_q = 3,
                       .seqlen_k = 4,
                       .num_heads = 2,
                       .num_kv_heads = 1,
                       .head_dim = 2,
                       .head_dim_v = 3,
                       .gate = true,
                       .sink = true,
                       .alibi = true};
  setup.options.backend = "reference";
  setup.options.causal = true;
  setup.options.softcap = 2;
  Attention a = Attention::prefill(setup);
  Random random(11);
  a.make_gradients(random, true);
  expect_every_gradient(a);
}

TEST(ReferenceBackward, PackedWithSpareTokens) {
  AttentionSetup setup{.batch = 4,
                       .num_heads = 2,
                       .num_kv_heads = 1,
                       .head_dim = 3,
                       .gate = true,
                       .sink = true,
                       .cu_seqlens_q = {0, 3, 3, 8, 9},
                       .cu_seqlens_k = {0, 2, 6, 12, 12},
                       .spare = 3};
  setup.options.backend = "reference";
  setup.options.causal = true;
  Attention a = Attention::prefill(setup);
  Random random(12);
  a.make_gradients(random, true);
  expect_gradients(a, 3);
  for (std::int64_t token = 9; token < 12; ++token) EXPECT_EQ(a.grad_query.at(token, 1, 2), 0);
  for (std::int64_t token = 12; token < 15; ++token) EXPECT_EQ(a.grad_delta.at(token, 0), 0);
}

TEST(ReferenceBackward, ValueGradientIsTheSumOfProbabilities) {
  AttentionSetup setup{.seqlen_q = 3, .seqlen_k = 3, .head_dim_v = 1};
  setup.options.backend = "reference";
  setup.options.causal = true;
  Attention a = Attention::prefill(setup);
  a.query.fill(0);
  Random random(1);
  a.make_gradients(random, false);
  a.grad_out.fill(1);
  a.forward();
  a.backward();
  EXPECT_NEAR(a.grad_value.at(0, 0, 0, 0), 1 + 1.0 / 2 + 1.0 / 3, 1e-14);
  EXPECT_NEAR(a.grad_value.at(0, 2, 0, 0), 1.0 / 3, 1e-14);
}

TEST(ReferenceBackward, NothingBeyondTheUsedLengthsMatters) {
  AttentionSetup setup{.batch = 2,
                       .seqlen_q = 4,
                       .seqlen_k = 5,
                       .num_heads = 2,
                       .gate = true,
                       .sink = true,
                       .seqused_q = {4, 2},
                       .seqused_k = {2, 5}};
  setup.options.backend = "reference";
  setup.options.causal = true;
  Attention a = Attention::prefill(setup);
  Random random(2);
  a.make_gradients(random, true);
  a.forward();
  a.backward();
  Attention b = a;
  for (std::int64_t h = 0; h < 2; ++h)
    for (std::int64_t i = 2; i < 4; ++i) {
      b.alpha.set(kNan, 1, i, h);
      b.grad_lse.set(kNan, 1, h, i);
      for (std::int64_t d = 0; d < 2; ++d) {
        b.query.set(kNan, 1, i, h, d);
        b.grad_out.set(kNan, 1, i, h, d);
      }
    }
  for (std::int64_t j = 2; j < 5; ++j) {
    b.delta.set(kNan, 0, j, 0);
    for (std::int64_t d = 0; d < 2; ++d) {
      b.key.set(kNan, 0, j, 0, d);
      b.value.set(kNan, 0, j, 0, d);
    }
  }
  b.forward();
  b.backward();
  for (const Pair& pair : kPairs) EXPECT_TRUE(same_bytes(a.*pair.grad, b.*pair.grad)) << pair.name;
  EXPECT_EQ(a.grad_query.at(1, 3, 1, 0), 0);
  EXPECT_EQ(a.grad_key.at(0, 4, 0, 1), 0);
}

TEST(ReferenceBackward, RowsWithoutAKeyHaveNoGradient) {
  AttentionSetup setup{.seqlen_q = 4, .seqlen_k = 2};
  setup.options.backend = "reference";
  setup.options.causal = true;
  Attention a = Attention::prefill(setup);
  Random random(4);
  a.make_gradients(random, true);
  a.grad_lse.set(kNan, 0, 0, 1);  // what comes back through the lse of an empty row is dropped
  a.forward();
  a.backward();
  for (std::int64_t d = 0; d < 2; ++d) EXPECT_EQ(a.grad_query.at(0, 1, 0, d), 0);
  for (std::int64_t i = 0; i < a.grad_key.numel(); ++i) EXPECT_TRUE(std::isfinite(a.grad_key.get(i)));
}

TEST(ReferenceBackward, ASinkOfMinusInfinityIsNoSink) {
  AttentionSetup setup{.seqlen_q = 3, .seqlen_k = 2, .sink = true};
  setup.options.backend = "reference";
  setup.options.causal = true;
  Attention a = Attention::prefill(setup);
  a.sink.fill(-kInf);
  Random random(4);
  a.make_gradients(random, true);
  a.forward();
  EXPECT_EQ(a.lse.at(0, 0, 0), -kInf);
  a.backward();
  EXPECT_EQ(a.grad_sink.at(0), 0);
}

TEST(ReferenceBackward, OnlyTheSinkLearnsFromRowsWithoutAKey) {
  AttentionSetup setup{.seqlen_q = 2, .seqlen_k = 0, .sink = true};
  setup.options.backend = "reference";
  Attention a = Attention::prefill(setup);
  Random random(4);
  a.make_gradients(random, true);
  a.forward();
  a.backward();  // lse = sink in both rows
  EXPECT_NEAR(a.grad_sink.at(0), a.grad_lse.at(0, 0, 0) + a.grad_lse.at(0, 0, 1), 1e-14);
}

TEST(ReferenceBackward, AnyStridesOfTheIncomingGradients) {
  AttentionSetup setup{.batch = 2, .seqlen_q = 3, .seqlen_k = 4, .num_heads = 2};
  setup.options.backend = "reference";
  Attention a = Attention::prefill(setup);
  Random random(7);
  a.make_gradients(random, true);
  a.grad_out.fill(0.75);
  a.grad_lse.fill(-0.5);
  a.forward();
  a.backward();
  Attention b = a;
  b.grad_out = Buffer(DType::float64, {2, 3, 2, 2}, {0, 0, 0, 0});  // as out.sum().backward() passes it
  b.grad_out.fill(0.75);
  b.grad_lse = Buffer(DType::float64, {2, 2, 3}, {0, 0, 0});
  b.grad_lse.fill(-0.5);
  b.backward();
  Attention c = a;
  c.grad_out = Buffer(DType::float64, {2, 3, 2, 2}, {1, 2, 6, 12});  // transposed
  c.grad_out.fill(0.75);
  c.backward();
  for (const Pair& pair : kPairs) {
    if (!(a.*pair.input).present()) continue;
    EXPECT_TRUE(same_bytes(a.*pair.grad, b.*pair.grad)) << pair.name;
    EXPECT_TRUE(same_bytes(a.*pair.grad, c.*pair.grad)) << pair.name;
  }
}

TEST(ReferenceBackward, UsesTheMapThatItIsGiven) {
  // With tile 0 cleared by hand the gradient is that of attention over tile 1 alone.
  AttentionSetup setup{.seqlen_q = 2, .seqlen_k = 200, .head_dim = 3};
  setup.options.backend = "reference";
  setup.options.threshold = 1e-30;  // on, but dropping nothing by itself
  Attention whole = Attention::prefill(setup);
  Random random(9);
  whole.make_gradients(random, true);
  whole.forward();
  EXPECT_EQ(whole.skip_map.at(0, 0, 0, 0), 3);

  AttentionSetup half = setup;
  half.seqlen_k = 72;
  half.options.threshold = std::nullopt;
  Attention right = Attention::prefill(half);
  right.query = whole.query;
  right.grad_out = whole.grad_out;
  right.grad_lse = whole.grad_lse;
  for (std::int64_t j = 0; j < 72; ++j)
    for (std::int64_t d = 0; d < 3; ++d) {
      right.key.set(whole.key.at(0, 128 + j, 0, d), 0, j, 0, d);
      if (d < 2) right.value.set(whole.value.at(0, 128 + j, 0, d), 0, j, 0, d);
    }
  right.forward();
  right.backward();
  whole.out = right.out;
  whole.lse = right.lse;
  whole.skip_map.set(2, 0, 0, 0, 0);
  whole.backward();
  EXPECT_LT(max_difference(whole.grad_query, right.grad_query), 1e-14);
  for (std::int64_t j = 0; j < 200; ++j)
    for (std::int64_t d = 0; d < 3; ++d)
      EXPECT_NEAR(whole.grad_key.at(0, j, 0, d), j < 128 ? 0 : right.grad_key.at(0, j - 128, 0, d), 1e-14);
}

}  // namespace
}  // namespace fsa::test
