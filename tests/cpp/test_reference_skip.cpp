// SPDX-License-Identifier: Apache-2.0
// Which tiles the reference's forward skips: thresholds, the gate test and the skip map, worked out by hand.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "backend/cpu/reference_policies.h"
#include "test_util.h"

namespace fsa::test {
namespace {

// ---- Threshold ----

// `key_tiles` tiles of 128 keys seen by one row; the logit of every key of tile n is logits[n].
Attention one_row(const std::vector<double>& logits, double threshold) {
  const auto tiles = static_cast<std::int64_t>(logits.size());
  AttentionSetup setup{
      .seqlen_k = 128 * tiles, .head_dim = 1, .head_dim_v = 1, .options = {.backend = "reference"}};
  setup.options.softmax_scale = 1;
  setup.options.threshold = threshold;
  Attention a = Attention::prefill(setup);
  a.query.fill(1);
  for (std::int64_t j = 0; j < setup.seqlen_k; ++j) a.key.set(logits[j / 128], 0, j, 0, 0);
  return a;
}

std::string kept_tiles(const Attention& a, std::int64_t row_tile = 0, std::int64_t head = 0) {
  const std::int64_t width = a.setup.head_dim <= 128 ? 128 : 64;
  std::string tiles;
  for (std::int64_t n = 0; n < (a.setup.seqlen_k + width - 1) / width; ++n)
    tiles += a.kept(0, head, row_tile, n) ? 'x' : '.';
  return tiles;
}

TEST(ReferenceThreshold, TheVoteComparesWithWhatWasKept) {
  // After the right tile l = 128; the left tile is kept iff exp(c) / 128 >= tau / 256, that is c >= log(tau /
  // 2).
  const double cut = std::log(0.25);
  Attention above = one_row({cut + 1e-9, 0}, 0.5);
  above.forward();
  EXPECT_EQ(kept_tiles(above), "xx");
  Attention below = one_row({cut - 1e-9, 0}, 0.5);
  below.forward();
  EXPECT_EQ(kept_tiles(below), ".x");
  EXPECT_NEAR(below.lse.at(0, 0, 0), std::log(128.0), 1e-13);  // the dropped tile is not in lse
}

TEST(ReferenceThreshold, TilesGoFromRightToLeft) {
  Attention a = one_row({0, -20, 20, -20}, 1.0);
  a.forward();
  EXPECT_EQ(kept_tiles(a), "..xx");  // the first tile is kept although its keys are weak
}

TEST(ReferenceThreshold, TheThresholdIsClampedToOne) {
  // thr = 1: a tile survives only when one of its keys outweighs all that was kept, here 128 keys of logit 0.
  Attention a = one_row({std::log(128.0) + 0.5, 0, 0}, 1e9);
  a.forward();
  EXPECT_EQ(kept_tiles(a), "x.x");
}

TEST(ReferenceThreshold, EachRowVotesAndOneIsEnough) {
  Attention a = one_row({0, 0}, 1.0);
  AttentionSetup setup = a.setup;
  setup.seqlen_q = 65;
  Attention b = Attention::prefill(setup);
  b.key.fill(0);
  for (std::int64_t j = 0; j < 128; ++j) b.key.set(1, 0, j, 0, 0);
  b.query.fill(-40);
  b.query.set(40, 0, 63, 0, 0);
  b.forward();
  EXPECT_EQ(kept_tiles(b, 0), "xx");
  EXPECT_EQ(kept_tiles(b, 1), ".x");
}

TEST(ReferenceThreshold, ARowWithoutKeysSoFarKeeps) {
  // Window of one key: row 0 stands at key 127, row 1 at key 128; only row 1 sees tile 1.
  AttentionSetup setup{
      .seqlen_q = 2, .seqlen_k = 129, .head_dim = 1, .head_dim_v = 1, .options = {.backend = "reference"}};
  setup.options.causal = true;
  setup.options.window_left = 0;
  setup.options.threshold = 1.0;
  Attention a = Attention::prefill(setup);
  a.key.fill(-50);
  a.query.fill(1);
  a.forward();
  EXPECT_EQ(kept_tiles(a), "xx");
  EXPECT_NEAR(a.lse.at(0, 0, 0), -50, 1e-12);
}

TEST(ReferenceThreshold, NanIsNeverHidden) {
  Attention a = one_row({-30, 0}, 1.0);
  a.key.set(kNan, 0, 5, 0, 0);
  a.forward();
  EXPECT_EQ(kept_tiles(a), "xx");
  EXPECT_TRUE(std::isnan(a.out.at(0, 0, 0, 0)));
}

TEST(ReferenceThreshold, VisibleLenIgnoresWindowsButNotCausal) {
  reference::Mask mask{.seqlen_q = 10, .seqlen_k = 100, .window_left = 3, .window_right = 0, .offset = 90};
  EXPECT_EQ(reference::visible_len(mask, 2), 100);
  mask.causal = true;
  EXPECT_EQ(reference::visible_len(mask, 2), 93);
  mask.causal = false;
  mask.has_window_sizes = true;
  EXPECT_EQ(reference::visible_len(mask, 2), 93);
}

TEST(ReferenceThreshold, TheSinkDoesNotVote) {
  AttentionSetup setup = one_row({0, 0}, 0.5).setup;
  setup.sink = true;
  Attention a = Attention::prefill(setup);
  a.query.fill(1);
  a.key.fill(0);
  a.sink.fill(100);  // as a part of the denominator it would push every tile below the threshold
  a.forward();
  EXPECT_EQ(kept_tiles(a), "xx");
}

TEST(ReferenceThreshold, OffIsBitForBitDense) {
  AttentionSetup setup{.batch = 2,
                       .seqlen_q = 130,
                       .seqlen_k = 300,
                       .num_heads = 2,
                       .num_kv_heads = 1,
                       .head_dim = 8,
                       .options = {.backend = "reference"}};
  setup.options.causal = true;
  Attention dense = Attention::prefill(setup);
  Random random(3);
  fill_topics(dense, random);
  Attention off = dense;
  dense.forward();
  for (double threshold : {0.0, -1.0, -128.0}) {
    off.setup.options.threshold = threshold;
    off.forward();
    EXPECT_TRUE(same_bytes(dense.out, off.out));
    EXPECT_TRUE(same_bytes(dense.lse, off.lse));
    EXPECT_TRUE(same_bytes(dense.skip_map, off.skip_map));
  }
}

TEST(ReferenceThreshold, NoProbabilityAboveTheThresholdIsDropped) {
  std::int64_t dropped = 0;
  for (int seed = 0; seed < 6; ++seed) {
    AttentionSetup setup{.batch = 1,
                         .seqlen_q = 200,
                         .seqlen_k = 500,
                         .num_heads = 2,
                         .num_kv_heads = 1,
                         .head_dim = seed % 2 == 0 ? 8 : 130,
                         .options = {.backend = "reference"},
                         .seed = 40u + seed};
    setup.options.causal = seed % 3 != 0;
    Attention dense = Attention::prefill(setup);
    Random random(setup.seed);
    fill_topics(dense, random, 64, 3 + 3.0 * seed);
    setup.options.threshold = dense.setup.options.threshold = 0;
    dense.forward();
    Attention sparse = dense;
    const double tau = sparse.setup.options.threshold.emplace(seed % 2 == 0 ? 1.0 : 0.1);
    sparse.forward();
    const std::int64_t width = setup.head_dim <= 128 ? 128 : 64;
    for (std::int64_t h = 0; h < 2; ++h)
      for (std::int64_t i = 0; i < 200; ++i) {
        const std::int64_t visible = setup.options.causal ? i + 301 : 500;
        for (std::int64_t j = 0; j < visible; ++j) {
          if (sparse.kept(0, h, i / 64, j / width)) continue;
          ++dropped;
          double logit = 0;
          for (std::int64_t d = 0; d < setup.head_dim; ++d)
            logit += sparse.query.at(0, i, h, d) * sparse.key.at(0, j, 0, d);
          logit /= std::sqrt(static_cast<double>(setup.head_dim));
          EXPECT_LT(std::exp(logit - dense.lse.at(0, h, i)), tau / static_cast<double>(visible) * (1 + 1e-9));
        }
      }
  }
  EXPECT_GT(dropped, 100000);  // the inputs do exercise the rule
}

TEST(ReferenceThreshold, OutIsTheSoftmaxOverKeptTiles) {
  AttentionSetup setup{.seqlen_q = 130,
                       .seqlen_k = 400,
                       .head_dim = 8,
                       .head_dim_v = 2,
                       .options = {.backend = "reference"},
                       .gate = true};
  setup.options.threshold = 1.0;
  setup.options.gate_threshold = 0.01;
  Attention a = Attention::prefill(setup);
  Random random(8);
  fill_topics(a, random);
  for (std::int64_t j = 0; j < 400; ++j) a.delta.set(j < 128 ? -9 : 1, 0, j, 0);
  a.alpha.fill(1);
  a.forward();
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < 130; ++i) {
    double sum = 0, weighted = 0;
    for (std::int64_t j = 0; j < 400; ++j) {
      if (!a.kept(0, 0, i / 64, j / 128)) continue;
      ++kept;
      double logit = -std::log1p(std::exp(-a.alpha.at(0, i, 0) * a.delta.at(0, j, 0)));
      for (std::int64_t d = 0; d < 8; ++d) logit += a.query.at(0, i, 0, d) * a.key.at(0, j, 0, d);
      const double p = std::exp(logit / std::sqrt(8.0));
      sum += p;
      weighted += p * a.value.at(0, j, 0, 1);
    }
    EXPECT_NEAR(a.out.at(0, i, 0, 1), weighted / sum, 1e-12);
    EXPECT_NEAR(a.lse.at(0, 0, i), std::log(sum), 1e-12);
  }
  EXPECT_LT(kept, 130 * 400 * 3 / 4);
}

// ---- Gate test ----

// A linear gate, scale 1.
AttentionSetup linear_gate(std::int64_t seqlen_q, std::int64_t seqlen_k, double gate_threshold) {
  AttentionSetup setup{
      .seqlen_q = seqlen_q, .seqlen_k = seqlen_k, .options = {.backend = "reference"}, .gate = true};
  setup.options.softmax_scale = 1;
  setup.options.log_sigmoid_gate = false;
  setup.options.gate_threshold = gate_threshold;
  return setup;
}

// One tile of rows with alpha 1; tile n has gates of deltas[n]. q = 0.
Attention gated(const std::vector<double>& deltas, double gate_threshold) {
  const auto tiles = static_cast<std::int64_t>(deltas.size());
  Attention a = Attention::prefill(linear_gate(4, 128 * tiles, gate_threshold));
  a.query.fill(0);
  a.alpha.fill(1);
  for (std::int64_t j = 0; j < 128 * tiles; ++j) a.delta.set(deltas[j / 128], 0, j, 0);
  return a;
}

TEST(ReferenceGate, ClosesBelowGammaTimesTheBest) {
  const double cut = std::log(0.01);
  Attention a = gated({1 + cut + 1e-9, 1 + cut - 1e-9, 1, -3}, 0.01);
  a.forward();
  EXPECT_EQ(kept_tiles(a), "x.xx");  // the first tile sets the best gate, the second raises it
}

TEST(ReferenceGate, OffWhenNotPositive) {
  for (double gamma : {0.0, -128.0}) {
    Attention a = gated({-1000, 0}, gamma);
    a.forward();
    EXPECT_EQ(kept_tiles(a), "xx");
  }
}

TEST(ReferenceGate, DefaultIsOneOverTheUsedLength) {
  // gamma = 1 / 256 of the 384 keys that the tensor holds.
  const double cut = std::log(1.0 / 256);
  for (double side : {1e-9, -1e-9}) {
    Attention a = gated({cut + side, 0, 50}, 0);
    a.setup.options.gate_threshold = std::nullopt;
    a.setup.seqused_k = {256};
    a.seqused_k = Buffer::ints(a.setup.seqused_k);
    a.forward();
    EXPECT_EQ(kept_tiles(a), side > 0 ? "xx." : ".x.");
  }
}

TEST(ReferenceGate, BoundsAreTheCornersOfTheExtremes) {
  using reference::Extremes;
  const Extremes alpha{-2, 1}, delta{-3, 5};
  EXPECT_EQ(reference::gate_bound(alpha, delta, false), 6);
  EXPECT_DOUBLE_EQ(reference::gate_bound(alpha, delta, true), -std::log1p(std::exp(-6.0)));
  EXPECT_EQ(reference::gate_bound({-2, -1}, {3, 5}, false), -3);
  EXPECT_TRUE(std::isnan(reference::gate_bound({kNan, kNan}, delta, false)));
}

TEST(ReferenceGate, MaskedKeysCountForTheBound) {
  // Key 255 lies in the future of every row of the first row tile, yet its delta holds tile 1 open.
  AttentionSetup setup = linear_gate(128, 256, 0.5);
  setup.options.causal = true;
  setup.options.adaptive_gate = false;
  Attention a = Attention::prefill(setup);
  a.alpha.fill(1);
  a.delta.fill(0);
  a.delta.set(10, 0, 255, 0);
  a.forward();
  EXPECT_EQ(kept_tiles(a, 0), ".x");  // the bound 10 of tile 1 closes tile 0
}

TEST(ReferenceGate, TilesWithoutAVisibleKeySetNoBest) {
  AttentionSetup setup = linear_gate(192, 256, 0.5);
  setup.options.window_right = 0;
  Attention a = Attention::prefill(setup);
  a.alpha.fill(1);
  a.delta.fill(0);
  for (std::int64_t j = 128; j < 256; ++j) a.delta.set(10, 0, j, 0);
  a.forward();  // row tile 0 = positions 64..127 sees tile 0 only
  EXPECT_EQ(kept_tiles(a, 0), "x.");
  EXPECT_EQ(kept_tiles(a, 1), ".x");
}

TEST(ReferenceGate, ATileThatTheVoteDropsStillSetsTheBest) {
  // Tile 1 has the best gate and is dropped by the vote; tile 0 is closed because of tile 1.
  Attention a = gated({0, 6, 5}, 0.5);
  a.setup.options.threshold = 1.0;
  a.query.fill(1);
  a.key.fill(0);
  for (std::int64_t j = 128; j < 256; ++j) a.key.set(-100, 0, j, 0, 0);
  for (std::int64_t j = 0; j < 128; ++j) a.key.set(100, 0, j, 0, 0);
  a.forward();
  EXPECT_EQ(kept_tiles(a), "..x");
  a.setup.options.gate_threshold = 0;
  a.forward();
  EXPECT_EQ(kept_tiles(a), "x.x");
}

TEST(ReferenceGate, AdaptiveGammaFollowsTheShareThatRowsSee) {
  // Causal, 256 keys, row tile at positions 128..191: gamma_eff = gamma * 129 / 256, of its first row.
  for (double side : {1e-9, -1e-9})
    for (bool adaptive : {true, false}) {
      AttentionSetup setup = linear_gate(128, 256, 0.1);
      setup.options.causal = true;
      setup.options.adaptive_gate = adaptive;
      Attention a = Attention::prefill(setup);
      a.alpha.fill(1);
      a.delta.fill(0);
      const double cut = std::log(0.1 * (adaptive ? 129.0 / 256 : 1.0)) + side;
      for (std::int64_t j = 0; j < 128; ++j) a.delta.set(cut, 0, j, 0);
      a.forward();
      EXPECT_EQ(kept_tiles(a, 0), side > 0 ? "xx" : ".x");
    }
}

TEST(ReferenceGate, NanLeavesTilesOpen) {
  Attention a = gated({-1000, -1000, 0}, 0.5);
  a.delta.set(kNan, 0, 130, 0);
  a.forward();
  EXPECT_EQ(kept_tiles(a), ".xx");
  EXPECT_TRUE(std::isnan(a.out.at(0, 0, 0, 0)));
}

// ---- Skip map ----

TEST(ReferenceSkipMap, DenseMarksEveryVisibleTileAndNothingElse) {
  AttentionSetup setup{.batch = 2,
                       .seqlen_q = 150,
                       .seqlen_k = 128 * 33 + 1,
                       .head_dim = 1,
                       .head_dim_v = 1,
                       .options = {.backend = "reference"},
                       .seqused_q = {150, 64},
                       .seqused_k = {4225, 130}};
  setup.options.causal = true;
  Attention a = Attention::prefill(setup);
  a.forward();
  EXPECT_EQ(Attention::shape_of(a.skip_map), (std::vector<std::int64_t>{2, 1, 3, 2}));
  for (std::int64_t t = 0; t < 3; ++t) {
    EXPECT_EQ(static_cast<std::uint32_t>(static_cast<std::int32_t>(a.skip_map.at(0, 0, t, 0))), 0xffffffffu);
    EXPECT_EQ(a.skip_map.at(0, 0, t, 1), t == 2 ? 3 : 1);  // key 4224 is seen by the last row alone
  }
  EXPECT_EQ(a.skip_map.at(1, 0, 0, 0), 3);
  for (std::int64_t t = 1; t < 3; ++t) EXPECT_EQ(a.skip_map.at(1, 0, t, 0), 0);
  for (std::int64_t t = 0; t < 3; ++t) EXPECT_EQ(a.skip_map.at(1, 0, t, 1), 0);
}

TEST(ReferenceSkipMap, PackedRowTilesStartPerSequence) {
  AttentionSetup setup{.batch = 3,
                       .options = {.backend = "reference"},
                       .cu_seqlens_q = {0, 65, 66, 130},
                       .cu_seqlens_k = {0, 10, 310, 320}};
  Attention a = Attention::prefill(setup);
  a.forward();
  EXPECT_EQ(Attention::shape_of(a.skip_map), (std::vector<std::int64_t>{1, 130 / 64 + 3, 1}));
  // Sequences begin at row tiles 0, 65 / 64 + 1 = 2 and 66 / 64 + 2 = 3 and have 2, 1 and 1 of them.
  const double expected[] = {1, 1, 7, 1, 0};
  for (std::int64_t t = 0; t < 5; ++t) EXPECT_EQ(a.skip_map.at(0, t, 0), expected[t]) << t;
}

TEST(ReferenceSkipMap, TilesAreNarrowerForWideHeads) {
  AttentionSetup setup{.seqlen_k = 65, .head_dim = 129, .options = {.backend = "reference"}};
  Attention a = Attention::prefill(setup);
  a.forward();
  EXPECT_EQ(a.skip_map.at(0, 0, 0, 0), 3);
}

}  // namespace
}  // namespace fsa::test
