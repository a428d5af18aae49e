// SPDX-License-Identifier: Apache-2.0
// The reference of native sparse attention: its rules, cases computed by hand, and its gradients against finite
// differences of its forward.
#include "backend/cpu/reference_nsa_policies.h"
#include "test_nsa_util.h"

namespace fsa::test {
namespace {

using reference::Windows;

// ---- Rules ----

TEST(NsaRules, CompressedLength) {
  EXPECT_EQ(nsa::compressed_length(0, 32, 16), 0);
  EXPECT_EQ(nsa::compressed_length(31, 32, 16), 0);
  EXPECT_EQ(nsa::compressed_length(32, 32, 16), 1);
  EXPECT_EQ(nsa::compressed_length(47, 32, 16), 1);
  EXPECT_EQ(nsa::compressed_length(48, 32, 16), 2);
  EXPECT_EQ(nsa::compressed_length(65536, 32, 16), 4095);
  EXPECT_EQ(nsa::compressed_length(7, 1, 1), 7);
  EXPECT_THROW((void)nsa::compressed_length(-1, 32, 16), Error);
  EXPECT_THROW((void)nsa::compressed_length(100, 32, 12), Error);
  EXPECT_THROW((void)nsa::compressed_length(100, 0, 1), Error);
}

TEST(NsaRules, WindowIsVisibleFromItsLastTokenOn) {
  const Windows windows{32, 16};
  EXPECT_FALSE(is_window_visible(windows, 30, 0));
  EXPECT_TRUE(is_window_visible(windows, 31, 0));
  EXPECT_FALSE(is_window_visible(windows, 46, 1));
  EXPECT_TRUE(is_window_visible(windows, 47, 1));
}

TEST(NsaRules, WeightsOfTheUsualShapeAre12221) {
  const Windows windows{32, 16};
  const std::int64_t expected[] = {0, 0, 0, 1, 2, 2, 2, 1, 0};
  for (std::int64_t i = 0; i < 9; ++i)
    EXPECT_EQ(reference::common_strides(windows, i, 1, 64), expected[i]) << i;
}

TEST(NsaRules, WeightsAreThoseOfThePaper) {
  for (const auto& [block, stride, size] : {std::array<std::int64_t, 3>{32, 16, 64},
                                            {16, 16, 16},
                                            {64, 16, 32},
                                            {128, 16, 64},
                                            {32, 32, 64},
                                            {24, 8, 16},
                                            {7, 1, 16}}) {
    const std::int64_t a = size / stride, c = block / stride;
    for (std::int64_t j = 0; j < 4; ++j)
      for (std::int64_t i = 0; i < 40; ++i) {
        std::int64_t count = 0;
        for (std::int64_t m = 0; m < a; ++m)
          for (std::int64_t r = 0; r < c; ++r) count += i == j * a - (c - 1) + m + r;
        EXPECT_EQ(reference::common_strides({block, stride}, i, j, size), count)
            << block << " " << stride << " " << i;
      }
  }
}

TEST(NsaRules, BestBlocks) {
  using Blocks = std::vector<std::int64_t>;
  const auto best = [](std::int64_t top_k, std::int64_t init, std::int64_t local,
                       std::vector<double> scores) {
    return reference::best_blocks({top_k, init, local}, scores);
  };
  EXPECT_EQ(best(3, 1, 1, {0, 5, 9, 7, 0}), (Blocks{0, 2, 4})) << "first, last and the best between";
  EXPECT_EQ(best(4, 1, 1, {0, 5, 9, 7, 0}), (Blocks{0, 2, 3, 4}));
  EXPECT_EQ(best(9, 1, 2, {0, 5, 9}), (Blocks{0, 1, 2})) << "never more than there are";
  EXPECT_EQ(best(3, 1, 2, {0, 9, 9, 0, 0}), (Blocks{0, 3, 4})) << "forced ones go before better ones";
  EXPECT_EQ(best(3, 0, 0, {1, 2, 2, 2, 2}), (Blocks{1, 2, 3})) << "lowest index among equals";
  EXPECT_EQ(best(2, 0, 0, {0, 0, 0}), (Blocks{0, 1})) << "underflowed scores still fill the row";
  EXPECT_EQ(best(2, 0, 0, {kNan, -1, kNan, 0}), (Blocks{1, 3})) << "NaN goes behind everything";
  EXPECT_EQ(best(3, 0, 0, {kNan, -1, kNan, 0}), (Blocks{0, 1, 3})) << "and in order";
  EXPECT_EQ(best(2, 1, 1, {kNan, 3, kNan}), (Blocks{0, 2})) << "forced whatever the score";
  EXPECT_EQ(best(1, 0, 0, {2, kInf, kInf}), (Blocks{1}));
  EXPECT_EQ(best(5, 4, 1, {0, 0}), (Blocks{0, 1})) << "more forced than there are";
}

TEST(NsaRules, SetOfBlocks) {
  using Blocks = std::vector<std::int64_t>;
  EXPECT_EQ(reference::set_of_blocks(Blocks{3, -1, 0, 3, 5, 4}, 4), (Blocks{0, 3, 4}));
  EXPECT_EQ(reference::set_of_blocks(Blocks{-1, 7}, 4), Blocks{});
  EXPECT_EQ(reference::keys_of_blocks(Blocks{0, 2}, 2, 4), (Blocks{0, 1, 4}));
}

// ---- Cases computed by hand ----

TEST(NsaByHand, MeanOfWindows) {
  Compression c(NsaSetup{.seqlen = 7,
                         .head_dim = 1,
                         .kind = nsa::CompressKind::mean,
                         .compress_block = 4,
                         .compress_stride = 2});
  for (std::int64_t t = 0; t < 7; ++t) c.x.put(t, static_cast<double>(t * t));
  c.forward();
  EXPECT_DOUBLE_EQ(c.out.get(0), (0 + 1 + 4 + 9) / 4.0);
  EXPECT_DOUBLE_EQ(c.out.get(1), (4 + 9 + 16 + 25) / 4.0);
  EXPECT_EQ(c.out.numel(), 2);
  c.grad_out.put(0, 4);
  c.grad_out.put(1, 40);
  c.backward();
  for (std::int64_t t = 0; t < 7; ++t)
    EXPECT_DOUBLE_EQ(c.grad_x.get(t), t < 2 ? 1 : t < 4 ? 11 : t < 6 ? 10 : 0) << t;
}

TEST(NsaByHand, WeightedWithPositions) {
  Compression c(NsaSetup{.seqlen = 4,
                         .head_dim = 1,
                         .kind = nsa::CompressKind::weighted,
                         .pe = true,
                         .compress_block = 2,
                         .compress_stride = 2});
  for (std::int64_t t = 0; t < 4; ++t) c.x.put(t, static_cast<double>(t + 1));
  c.weight.put(0, 10);
  c.weight.put(1, 100);
  c.pe.put(0, 0.5);
  c.pe.put(1, 0.25);
  c.forward();
  EXPECT_DOUBLE_EQ(c.out.get(0), 1.5 * 10 + 2.25 * 100);
  EXPECT_DOUBLE_EQ(c.out.get(1), 3.5 * 10 + 4.25 * 100);
  c.grad_out.put(0, 1);
  c.grad_out.put(1, 2);
  c.backward();
  EXPECT_DOUBLE_EQ(c.grad_weight.get(0), 1.5 + 2 * 3.5);
  EXPECT_DOUBLE_EQ(c.grad_weight.get(1), 2.25 + 2 * 4.25);
  EXPECT_DOUBLE_EQ(c.grad_pe.get(0), 30);
  EXPECT_DOUBLE_EQ(c.grad_pe.get(1), 300);
  EXPECT_DOUBLE_EQ(c.grad_x.get(3), 200);
}

TEST(NsaByHand, LinearMixesDimensions) {
  Compression c(NsaSetup{.seqlen = 2, .head_dim = 2, .compress_block = 2, .compress_stride = 1});
  c.weight.fill(0);
  c.weight.set(1, 0, 0 * 2 + 1, 0);  // dimension 1 of the first token to dimension 0
  c.weight.set(3, 0, 1 * 2 + 0, 1);  // dimension 0 of the second token to dimension 1, three times
  c.forward();
  EXPECT_DOUBLE_EQ(c.out.at(0, 0, 0, 0), c.x.at(0, 0, 0, 1));
  EXPECT_DOUBLE_EQ(c.out.at(0, 0, 0, 1), 3 * c.x.at(0, 1, 0, 0));
}

// Keys log(p) and lse 0 make the probabilities p.
TEST(NsaByHand, ScoresSumTheGroupAndCountStrides) {
  NsaSetup setup{.seqlen = 80,
                 .num_heads = 2,
                 .head_dim = 1,
                 .compress_block = 32,
                 .compress_stride = 16,
                 .block_size = 16,
                 .top_k = 2,
                 .init_blocks = 0,
                 .local_blocks = 0,
                 .softmax_scale = 1};
  Selection s(setup);
  s.query.fill(1);
  s.lse.fill(0);
  const double p[] = {0.1, 0.2, 0.3, 0.15};  // windows of tokens 0-31, 16-47, 32-63, 48-79
  for (std::int64_t i = 0; i < 4; ++i) s.key.put(i, std::log(p[i]));
  s.run();
  // Row 79 sees all; blocks get p0, p0 + p1, p1 + p2, p2 + p3, p3 from each of two heads.
  EXPECT_EQ(s.block(0, 0, 79, 0), 2);
  EXPECT_EQ(s.block(0, 0, 79, 1), 3);
  // Row 78 does not see the last window: 0.1, 0.3, 0.5, 0.3, 0; the lower one of the equal blocks 1 and 3.
  EXPECT_EQ(s.block(0, 0, 78, 0), 1);
  EXPECT_EQ(s.block(0, 0, 78, 1), 2);
  // Row 30 sees nothing; its own block is 1.
  EXPECT_EQ(s.block(0, 0, 30, 0), 0);
  EXPECT_EQ(s.block(0, 0, 30, 1), 1);
  EXPECT_EQ(s.block(0, 0, 15, 0), 0);
  EXPECT_EQ(s.block(0, 0, 15, 1), -1);
}

TEST(NsaByHand, SelectedKeysShareOneSoftmax) {
  NsaSetup setup{
      .seqlen = 34, .head_dim = 1, .head_dim_v = 1, .block_size = 16, .top_k = 3, .softmax_scale = 1};
  SelectedAttention a(setup);
  a.query.fill(1);
  a.key.fill(0);
  a.key.put(0, std::log(3.0));
  for (std::int64_t t = 0; t < 34; ++t) a.value.put(t, static_cast<double>(t));
  a.set_blocks(0, 0, 33, {0, 2});
  a.set_blocks(0, 0, 20, {1});
  a.forward();
  // Row 33: keys 0-15, 32, 33 with weights 3, 1, ...
  EXPECT_NEAR(a.out.get(33), (0 * 3 + 120 + 32 + 33) / 20.0, 1e-12);
  EXPECT_NEAR(a.lse.get(33), std::log(20.0), 1e-12);
  // Row 20: keys 16-20.
  EXPECT_NEAR(a.out.get(20), 18, 1e-12);
  EXPECT_NEAR(a.lse.get(20), std::log(5.0), 1e-12);
  EXPECT_EQ(a.out.get(7), 0);
  EXPECT_EQ(a.lse.get(7), -kInf);
}

TEST(NsaByHand, GatesWeighBranches) {
  Combination c(NsaSetup{.seqlen = 1, .num_heads = 2, .head_dim_v = 1});
  for (std::int64_t head = 0; head < 2; ++head) {
    c.compressed.put(head, static_cast<double>(1 + head));
    c.selected.put(head, 10);
    c.sliding.put(head, 100);
  }
  c.gates.put(0, 0.5);
  c.gates.put(1, 0.25);
  c.gates.put(2, 2);
  c.forward();
  EXPECT_DOUBLE_EQ(c.out.get(0), 0.5 + 2.5 + 200);
  EXPECT_DOUBLE_EQ(c.out.get(1), 1 + 2.5 + 200);
  c.grad_out.put(0, 1);
  c.grad_out.put(1, -3);
  c.backward();
  EXPECT_DOUBLE_EQ(c.grad_gates.get(0), 1 - 3 * 2);
  EXPECT_DOUBLE_EQ(c.grad_gates.get(1), -20);
  EXPECT_DOUBLE_EQ(c.grad_gates.get(2), -200);
  EXPECT_DOUBLE_EQ(c.grad_compressed.get(1), -1.5);
  EXPECT_DOUBLE_EQ(c.grad_sliding.get(0), 2);
}

// ---- Gradients ----

template <class Part>
double loss(const Part& part) {
  double sum = 0;
  for (std::int64_t i = 0; i < part.out.numel(); ++i)
    if (!std::isnan(part.grad_out.get(i))) sum += part.out.get(i) * part.grad_out.get(i);
  return sum;
}

// Central difference of the loss along a random direction in one input.
template <class Part>
void expect_gradients(Part part) {
  constexpr double kStep = 1e-5;
  part.forward();
  part.backward();
  Random random(77);
  for (const auto& [name, input, grad] : Part::gradients()) {
    if (!(part.*input).present()) continue;
    for (int direction = 0; direction < 3; ++direction) {
      Part up = part, down = part;
      double analytic = 0, size = 0;
      for (std::int64_t i = 0; i < (part.*input).numel(); ++i) {
        const double value = (part.*input).get(i), step = random.normal();
        if (std::isnan(value)) {  // beyond the sequences
          EXPECT_EQ((part.*grad).get(i), 0) << name << " " << i;
          continue;
        }
        (up.*input).put(i, value + kStep * step);
        (down.*input).put(i, value - kStep * step);
        analytic += (part.*grad).get(i) * step;
        size += std::abs((part.*grad).get(i) * step);
      }
      up.forward();
      down.forward();
      EXPECT_NEAR((loss(up) - loss(down)) / (2 * kStep), analytic, 1e-7 * (1 + size))
          << name << ", seed " << part.setup.seed;
    }
  }
}

TEST(NsaGradients, Compress) {
  for (const nsa::CompressKind kind :
       {nsa::CompressKind::linear, nsa::CompressKind::mean, nsa::CompressKind::weighted})
    for (const bool pe : {false, true}) {
      NsaSetup setup{.batch = 2,
                     .seqlen = 21,
                     .num_kv_heads = 2,
                     .head_dim = 3,
                     .kind = kind,
                     .pe = pe,
                     .compress_block = 8,
                     .compress_stride = 4};
      expect_gradients(Compression(setup));
      setup.cu_seqlens = {0, 13, 13, 16, 40};
      setup.spare = 3;
      expect_gradients(Compression(setup));
      setup.compress_block = setup.compress_stride = 5;
      expect_gradients(Compression(setup));
      setup.compress_stride = 1;
      expect_gradients(Compression(setup));
    }
}

TEST(NsaGradients, Selected) {
  for (const std::int64_t group : {1, 3}) {
    Random random(5);
    NsaSetup setup{.batch = 2,
                   .seqlen = 70,
                   .num_heads = 2 * group,
                   .num_kv_heads = 2,
                   .head_dim = 3,
                   .head_dim_v = 5,
                   .block_size = 16,
                   .top_k = 4};
    SelectedAttention batched(setup);
    batched.random_blocks(random);
    batched.set_blocks(1, 1, 40, {});  // a row without a key
    expect_gradients(batched);

    setup.cu_seqlens = {0, 33, 33, 34, 90};
    setup.spare = 2;
    SelectedAttention packed(setup);
    packed.random_blocks(random);
    expect_gradients(packed);

    setup.cu_seqlens = {};
    setup.seqlen = 3;
    setup.seqused_k = {3, 50};
    setup.room = 55;
    SelectedAttention last_rows(setup);
    last_rows.random_blocks(random);
    expect_gradients(last_rows);
  }
}

TEST(NsaGradients, Combine) {
  for (const bool per_head : {false, true}) {
    NsaSetup setup{.batch = 2, .seqlen = 5, .num_heads = 3, .head_dim_v = 4, .gates_per_head = per_head};
    expect_gradients(Combination(setup));
    setup.cu_seqlens = {0, 7};
    expect_gradients(Combination(setup));
  }
}

}  // namespace
}  // namespace fsa::test
