// SPDX-License-Identifier: Apache-2.0
// The reference's decode: agreement with the forward of one row, and the rules that are its own.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "test_util.h"

namespace fsa::test {
namespace {

AttentionSetup decode_setup() {
  AttentionSetup setup;
  setup.options.backend = "reference";
  return setup;
}

// The same query, keys and options as a forward of one row per sequence.
Attention as_forward(const Attention& decode) {
  AttentionSetup setup = decode.setup;
  setup.seqlen_q = 1;
  if (decode.packed_k()) {
    setup.cu_seqlens_q.clear();
    for (std::int64_t b = 0; b <= setup.batch; ++b)
      setup.cu_seqlens_q.push_back(static_cast<std::int32_t>(b));
    setup.spare = 0;
  }
  Attention forward = Attention::prefill(setup);
  forward.key = decode.key;
  forward.value = decode.value;
  forward.delta = decode.delta;
  forward.sink = decode.sink;
  for (std::int64_t i = 0; i < decode.query.numel(); ++i) forward.query.put(i, decode.query.get(i));
  for (std::int64_t i = 0; decode.alpha.present() && i < decode.alpha.numel(); ++i)
    forward.alpha.put(i, decode.alpha.get(i));
  return forward;
}

void expect_equal_rows(const Attention& decode, const Attention& forward) {
  const std::int64_t heads = decode.setup.num_heads, dims = decode.setup.head_dim_v;
  for (std::int64_t b = 0; b < decode.setup.batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const double lse = forward.packed_q() ? forward.lse.at(h, b) : forward.lse.at(b, h, 0);
      if (std::isinf(lse))
        EXPECT_EQ(decode.lse.at(b, h), lse);
      else
        EXPECT_NEAR(decode.lse.at(b, h), lse, 1e-13);
      for (std::int64_t d = 0; d < dims; ++d)
        EXPECT_NEAR(decode.out.at(b, h, d), forward.out.get((b * heads + h) * dims + d), 1e-13);
    }
}

TEST(ReferenceDecode, DenseEqualsTheForwardOfOneRow) {
  for (int bits = 0; bits < 64; ++bits) {
    AttentionSetup setup = decode_setup();
    setup.batch = 3;
    setup.seqlen_k = 150;
    setup.num_heads = 6;
    setup.num_kv_heads = 2;
    setup.head_dim = 5;
    setup.head_dim_v = 3;
    setup.seqused_k = {150, 1, 0};
    setup.gate = (bits & 1) != 0;
    if (setup.gate) setup.options.gate_threshold = 0;
    setup.sink = (bits & 2) != 0;
    setup.alibi = (bits & 4) != 0;
    setup.options.softcap = (bits & 8) != 0 ? 2 : 0;
    setup.options.causal = (bits & 1) == 0;
    if ((bits & 48) == 16) setup.options.window_left = 40;
    if ((bits & 48) == 32) setup.window_sizes = {{3, 20, 60, 10}, {0, 0, 0, 7}};
    if ((bits & 48) == 48) setup.options.log_sigmoid_gate = false;
    Attention a = Attention::for_decode(setup);
    Attention f = as_forward(a);
    a.decode();
    f.forward();
    expect_equal_rows(a, f);
  }
}

TEST(ReferenceDecode, PackedCache) {
  AttentionSetup setup = decode_setup();
  setup.batch = 4;
  setup.num_heads = 2;
  setup.gate = true;
  setup.alibi = true;
  setup.options.gate_threshold = 0;
  setup.cu_seqlens_k = {0, 3, 3, 140, 141};
  Attention a = Attention::for_decode(setup);
  Attention f = as_forward(a);
  a.decode();
  f.forward();
  expect_equal_rows(a, f);
  EXPECT_EQ(a.lse.at(1, 0), -kInf);
  EXPECT_EQ(a.out.at(1, 0, 0), 0);
}

TEST(ReferenceDecode, PagedEqualsContiguous) {
  for (std::int64_t page_size : {1, 7, 64, 256}) {
    AttentionSetup setup = decode_setup();
    setup.batch = 3;
    setup.seqlen_k = 300;
    setup.num_heads = 4;
    setup.num_kv_heads = 2;
    setup.head_dim = 4;
    setup.gate = true;
    setup.seqused_k = {300, 130, 0};
    setup.options.threshold = 1.0;
    Attention a = Attention::for_decode(setup);
    a.decode();
    Random random(page_size);
    Attention paged = a.paged(page_size, random);
    paged.decode();
    EXPECT_TRUE(same_bytes(a.out, paged.out)) << page_size;
    EXPECT_TRUE(same_bytes(a.lse, paged.lse)) << page_size;
  }
}

TEST(ReferenceDecode, NothingBeyondTheUsedLengthMatters) {
  AttentionSetup setup = decode_setup();
  setup.seqlen_k = 200;
  setup.gate = true;
  setup.seqused_k = {130};
  Attention a = Attention::for_decode(setup);
  a.decode();
  Attention b = a;
  for (std::int64_t j = 130; j < 200; ++j) {
    b.delta.set(kNan, 0, j, 0);
    for (std::int64_t d = 0; d < 2; ++d) {
      b.key.set(kNan, 0, j, 0, d);
      b.value.set(kNan, 0, j, 0, d);
    }
  }
  b.decode();
  EXPECT_TRUE(same_bytes(a.out, b.out));
  EXPECT_TRUE(same_bytes(a.lse, b.lse));
}

// Scale 1 and one-dimensional keys: the logit of key j of tile n in row h is queries[h] * logits[n]. Values
// are one-hot per tile, so that `kept` can be read from out.
Attention tiles(const std::vector<double>& logits, const std::vector<double>& queries, double threshold) {
  const auto count = static_cast<std::int64_t>(logits.size());
  AttentionSetup setup = decode_setup();
  setup.seqlen_k = 128 * count;
  setup.num_heads = static_cast<std::int64_t>(queries.size());
  setup.head_dim = 1;
  setup.head_dim_v = count;
  setup.options.softmax_scale = 1;
  setup.options.threshold = threshold;
  Attention a = Attention::for_decode(setup);
  a.value.fill(0);
  for (std::int64_t j = 0; j < setup.seqlen_k; ++j) {
    a.key.set(logits[j / 128], 0, j, 0, 0);
    a.value.set(1, 0, j, 0, j / 128);
  }
  for (std::int64_t h = 0; h < setup.num_heads; ++h) a.query.set(queries[h], 0, h, 0);
  return a;
}

std::string kept(const Attention& a, std::int64_t head = 0) {
  std::string result;
  for (std::int64_t n = 0; n < a.setup.head_dim_v; ++n) result += a.out.at(0, head, n) > 0 ? 'x' : '.';
  return result;
}

TEST(ReferenceDecode, ProbesAreKeptAndOthersReachTheCut) {
  // Eight tiles, probes 0, 4, 5, 6, 7. R = log(5 * 128), thr = 0.5 / 1024: the cut is log(0.3125).
  const double cut = std::log(5.0 * 128) + std::log(0.5 / 1024);
  Attention a = tiles({0, cut + 1e-9, cut - 1e-9, cut - 50, 0, 0, 0, 0}, {1}, 0.5);
  a.decode();
  EXPECT_EQ(kept(a), "xx..xxxx");
  EXPECT_NEAR(a.lse.at(0, 0), std::log(5 * 128 + 128 * std::exp(cut + 1e-9)), 1e-12);
}

TEST(ReferenceDecode, FewTilesAreAllProbes) {
  Attention a = tiles({-20, -20, -20, -20, 0}, {1}, 1.0);
  a.decode();
  EXPECT_EQ(kept(a), "xxxxx");
  Attention b = tiles({0, -20, -20, -20, -20, 0}, {1}, 1.0);
  b.decode();
  EXPECT_EQ(kept(b), "x.xxxx");
}

TEST(ReferenceDecode, OneHeadOfTheGroupIsEnough) {
  Attention a = tiles({0, -20, 0, 0, 0, 0, 0}, {1, 0.5, 0}, 1.0);
  a.decode();
  for (std::int64_t h = 0; h < 3; ++h) EXPECT_EQ(kept(a, h), "xxxxxxx");  // head 2 has logits of 0 everywhere
  Attention b = tiles({0, -20, 0, 0, 0, 0, 0}, {1, 0.5}, 1.0);
  b.decode();
  for (std::int64_t h = 0; h < 2; ++h) EXPECT_EQ(kept(b, h), "x.xxxxx");
}

TEST(ReferenceDecode, TheSinkDoesNotRaiseTheCut) {
  Attention a = tiles({0, 0, 0, 0, 0, 0, 0, 0}, {1}, 1.0);
  AttentionSetup setup = a.setup;
  setup.sink = true;
  Attention b = Attention::for_decode(setup);
  b.key = a.key;
  b.value = a.value;
  b.query = a.query;
  b.sink.fill(30);
  b.decode();
  EXPECT_EQ(kept(b), "xxxxxxxx");
}

TEST(ReferenceDecode, NanIsNeverHidden) {
  Attention a = tiles({0, -20, -20, 0, 0, 0, 0}, {1}, 1.0);
  a.key.set(kNan, 0, 128, 0, 0);
  a.decode();
  EXPECT_TRUE(std::isnan(a.lse.at(0, 0)));
}

TEST(ReferenceDecode, WindowsChooseTheCandidatesButNotVisibleLen) {
  // The window hides tiles 0 and 1: tile 2 becomes the first probe. thr = 1 / 1280 for all 10 tiles.
  const double cut = std::log(5.0 * 128) - std::log(1280.0);
  Attention a = tiles({0, 0, 0, cut + 1e-9, cut - 1e-9, -20, 0, 0, 0, 0}, {1}, 1.0);
  a.setup.options.window_left = 8 * 128 - 1;
  a.decode();
  EXPECT_EQ(kept(a), "..xx..xxxx");
}

TEST(ReferenceDecode, GateUsesTheExtremesOfTheGroup) {
  Attention a = tiles({0, 0, 0}, {0, 0}, 0.0);
  AttentionSetup setup = a.setup;
  setup.gate = true;
  setup.options.log_sigmoid_gate = false;
  setup.options.gate_threshold = 0.05;
  Attention b = Attention::for_decode(setup);
  b.query.fill(0);
  b.value = a.value;
  const double deltas[] = {1, -5,
                           0};  // with alpha (1, 1): tile 1 is below log(0.05) of the best; with (1, -1) not
  for (std::int64_t j = 0; j < setup.seqlen_k; ++j) b.delta.set(deltas[j / 128], 0, j, 0);
  b.alpha.fill(1);
  b.decode();
  EXPECT_EQ(kept(b), "x.x");
  b.alpha.set(-1, 0, 1);
  b.decode();
  EXPECT_EQ(kept(b, 0),
            ".xx");  // bounds 1, 5, 0 from left to right: tile 1 becomes the best and closes tile 0
  EXPECT_EQ(kept(b, 1), ".xx");
}

TEST(ReferenceDecode, DefaultGateThresholdIsOneOverTheUsedLength) {
  for (double side : {1e-9, -1e-9}) {
    Attention a = tiles({0, 0, 0}, {0}, 0.0);
    AttentionSetup setup = a.setup;
    setup.gate = true;
    setup.options.log_sigmoid_gate = false;
    setup.seqused_k = {256};
    Attention b = Attention::for_decode(setup);
    b.query.fill(0);
    b.value = a.value;
    b.alpha.fill(1);
    for (std::int64_t j = 0; j < 384; ++j) b.delta.set(j < 128 ? -std::log(256.0) + side : 0, 0, j, 0);
    b.decode();
    EXPECT_EQ(kept(b), side > 0 ? "xx." : ".x.");
  }
}

TEST(ReferenceDecode, NoProbabilityAboveTheThresholdIsDropped) {
  std::int64_t dropped_tiles = 0;
  for (int seed = 0; seed < 12; ++seed) {
    AttentionSetup setup = decode_setup();
    setup.seqlen_k = 128 * 16 - 37;
    setup.num_heads = 2;
    setup.head_dim = 8;
    setup.head_dim_v = 16;
    setup.seed = 70 + seed;
    Attention dense = Attention::for_decode(setup);
    Random random(setup.seed);
    fill_topics(dense, random, 128, 2.0 * (1 + seed % 8));
    dense.value.fill(0);
    for (std::int64_t j = 0; j < setup.seqlen_k; ++j) dense.value.set(1, 0, j, 0, j / 128);
    dense.decode();
    Attention sparse = dense;
    sparse.setup.options.threshold = 1.0;
    sparse.decode();
    for (std::int64_t n = 0; n < 16; ++n) {
      if (sparse.out.at(0, 0, n) > 0) continue;
      ++dropped_tiles;
      EXPECT_EQ(sparse.out.at(0, 1, n), 0);  // one decision for the group
      for (std::int64_t h = 0; h < 2; ++h)
        for (std::int64_t j = 128 * n; j < std::min<std::int64_t>(128 * (n + 1), setup.seqlen_k); ++j) {
          double logit = 0;
          for (std::int64_t d = 0; d < 8; ++d) logit += dense.query.at(0, h, d) * dense.key.at(0, j, 0, d);
          EXPECT_LT(std::exp(logit / std::sqrt(8.0) - dense.lse.at(0, h)),
                    1.0 / static_cast<double>(setup.seqlen_k) * (1 + 1e-9));
        }
    }
  }
  EXPECT_GT(dropped_tiles, 20);
}

TEST(ReferenceDecode, ThresholdOffIsBitForBitDense) {
  Attention dense = tiles({0, -20, -20, 3, 0, 0, 0}, {1, 2}, 0.0);
  dense.setup.options.threshold = std::nullopt;
  dense.decode();
  for (double threshold : {0.0, -128.0}) {
    Attention off = dense;
    off.setup.options.threshold = threshold;
    off.decode();
    EXPECT_TRUE(same_bytes(dense.out, off.out));
    EXPECT_TRUE(same_bytes(dense.lse, off.lse));
  }
}

// ---- gather_kv_indices ----

Attention gathering(std::int64_t seqlen_k, std::vector<std::int32_t> indices, std::int64_t batch = 1) {
  AttentionSetup setup = decode_setup();
  setup.batch = batch;
  setup.seqlen_k = seqlen_k;
  setup.num_heads = 4;
  setup.num_kv_heads = 2;
  setup.head_dim = 4;
  setup.gate = true;
  setup.alibi = true;
  setup.sink = true;
  setup.options.gate_threshold = 0;
  setup.gather_kv_indices = std::move(indices);
  return Attention::for_decode(setup);
}

Attention without_gather(const Attention& a) {
  Attention plain = a;
  plain.setup.gather_kv_indices = {};
  plain.gather_kv_indices = Buffer();
  return plain;
}

TEST(ReferenceDecode, GatheringEveryKeyIsPlainDecode) {
  Attention a = gathering(5, {4, 2, 0, 1, 3, /**/ 0, 1, 2, 3, 4}, 2);
  a.decode();
  Attention plain = without_gather(a);
  plain.decode();
  EXPECT_LT(max_difference(a.out, plain.out), 1e-14);
  EXPECT_LT(max_difference(a.lse, plain.lse), 1e-14);
}

TEST(ReferenceDecode, MinusOneIsNoKey) {
  Attention some = gathering(6, {-1, 4, -1, 1, -1});
  some.decode();
  Attention same = gathering(6, {4, 1});
  same.decode();
  EXPECT_LT(max_difference(some.out, same.out), 1e-14);
  Attention none = gathering(6, {-1, -1});
  none.decode();
  EXPECT_EQ(none.out.at(0, 3, 1), 0);
  EXPECT_DOUBLE_EQ(none.lse.at(0, 3), none.sink.at(3));
}

TEST(ReferenceDecode, DuplicatesCountTwice) {
  Attention a = gathering(3, {2, 2});
  a.decode();
  Attention once = gathering(3, {2});
  once.decode();
  for (std::int64_t h = 0; h < 4; ++h) {
    const double sink = a.sink.at(h);
    EXPECT_NEAR(std::exp(a.lse.at(0, h)) - std::exp(sink), 2 * (std::exp(once.lse.at(0, h)) - std::exp(sink)),
                1e-12);
  }
}

TEST(ReferenceDecode, PositionsAreTheOriginalOnes) {
  AttentionSetup setup = decode_setup();
  setup.seqlen_k = 10;
  setup.alibi = true;
  setup.gather_kv_indices = {1, 7};
  Attention a = Attention::for_decode(setup);
  a.query.fill(0);
  a.decode();
  EXPECT_NEAR(a.lse.at(0, 0), std::log(std::exp(-0.25 * 8) + std::exp(-0.25 * 2)), 1e-14);
}

TEST(ReferenceDecode, TilesAreThoseOfTheGatheredOrder) {
  // 8 tiles of 128 keys, gathered in reverse: the first gathered tile holds the last keys.
  const double cut = std::log(5.0 * 128) + std::log(0.5 / 1024);
  Attention plain = tiles({0, 0, 0, 0, cut - 1e-9, cut + 1e-9, cut - 1e-9, 0}, {1}, 0.5);
  AttentionSetup setup = plain.setup;
  for (std::int32_t j = 1023; j >= 0; --j) setup.gather_kv_indices.push_back(j);
  Attention a = Attention::for_decode(setup);
  a.query = plain.query;
  a.key = plain.key;
  a.value = plain.value;
  a.decode();
  EXPECT_EQ(kept(a), "xxxx.x.x");  // gathered tiles 1 and 3 are dropped, 0 and 4..7 are probes
  plain.decode();
  EXPECT_EQ(kept(plain), "xxxxxxxx");  // in key order the weak tiles are probes
}

TEST(ReferenceDecode, VisibleLenIsTheCacheNotTheGatheredPart) {
  // 8 gathered tiles of a cache of 16: thr = 0.5 / 2048.
  const double cut = std::log(5.0 * 128) + std::log(0.5 / 2048);
  Attention plain = tiles({0, cut + 1e-9, cut - 1e-9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, {1}, 0.5);
  AttentionSetup setup = plain.setup;
  for (std::int32_t j = 0; j < 1024; ++j) setup.gather_kv_indices.push_back(j);
  Attention a = Attention::for_decode(setup);
  a.query = plain.query;
  a.key = plain.key;
  a.value = plain.value;
  a.decode();
  EXPECT_EQ(kept(a), "xx.xxxxx........");
}

TEST(ReferenceDecode, MissingKeysTakeNoPartInTheGate) {
  // Tile 0 of the gathered order holds one real key with a low gate; were -1 taken as delta 0 it would stay
  // open.
  AttentionSetup setup = decode_setup();
  setup.seqlen_k = 2;
  setup.gate = true;
  setup.options.log_sigmoid_gate = false;
  setup.options.softmax_scale = 1;
  setup.options.gate_threshold = 0.5;
  setup.gather_kv_indices.assign(129, -1);
  setup.gather_kv_indices[5] = 0;
  setup.gather_kv_indices[128] = 1;
  Attention a = Attention::for_decode(setup);
  a.query.fill(0);
  a.alpha.fill(1);
  a.delta.set(-3, 0, 0, 0);
  a.delta.set(0, 0, 1, 0);
  a.decode();
  EXPECT_NEAR(a.lse.at(0, 0), 0, 1e-14);
}

}  // namespace
}  // namespace fsa::test
