// SPDX-License-Identifier: Apache-2.0
// The reference's forward: cases that can be worked out by hand, and properties that must hold for any input.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "backend/registry.h"
#include "test_util.h"

namespace fsa::test {
namespace {

// Queries of 0: every logit is 0, so that out is the mean of the visible values and lse the logarithm of
// their number. Values are one-hot per key: out[i, j] > 0 exactly where row i attends to key j.
Attention uniform(AttentionSetup setup) {
  setup.head_dim_v = setup.seqlen_k;
  setup.options.backend = "reference";
  Attention a = Attention::prefill(setup);
  a.query.fill(0);
  a.value.fill(0);
  for (std::int64_t b = 0; b < setup.batch; ++b)
    for (std::int64_t j = 0; j < setup.seqlen_k; ++j)
      for (std::int64_t h = 0; h < setup.num_kv_heads; ++h) a.value.set(1, b, j, h, j);
  return a;
}

std::string attended(const Attention& a, std::int64_t row, std::int64_t head = 0, std::int64_t batch = 0) {
  std::string keys;
  for (std::int64_t j = 0; j < a.setup.seqlen_k; ++j) keys += a.out.at(batch, row, head, j) > 0 ? 'x' : '.';
  return keys;
}

TEST(ReferenceBackend, DescribesItself) {
  const Backend& backend = reference_backend();
  EXPECT_EQ(backend.name(), "reference");
  EXPECT_TRUE(backend.availability().available);
  Problem problem;
  problem.dtype = DType::bfloat16;
  EXPECT_EQ(backend.reject(problem), "");
  EXPECT_EQ(backend.workspace_bytes(problem), 0u);
  problem.device.kind = DeviceKind::cuda;
  EXPECT_NE(backend.reject(problem), "");
  problem.device.kind = DeviceKind::cpu;
  problem.operation = Operation::backward;
  problem.paged = true;
  EXPECT_NE(backend.reject(problem).find("paged"), std::string::npos);
}

TEST(ReferenceForward, TwoKeysByHand) {
  AttentionSetup setup{.seqlen_k = 2, .head_dim = 1, .head_dim_v = 1, .options = {.backend = "reference"}};
  setup.options.softmax_scale = 0.5;
  Attention a = Attention::prefill(setup);
  a.query.fill(2);
  a.key.set(3, 0, 0, 0, 0);
  a.key.set(1, 0, 1, 0, 0);
  a.value.set(10, 0, 0, 0, 0);
  a.value.set(20, 0, 1, 0, 0);
  a.forward();
  const double e3 = std::exp(3.0), e1 = std::exp(1.0);
  EXPECT_NEAR(a.out.at(0, 0, 0, 0), (10 * e3 + 20 * e1) / (e3 + e1), 1e-14);
  EXPECT_NEAR(a.lse.at(0, 0, 0), std::log(e3 + e1), 1e-14);
}

TEST(ReferenceForward, DefaultScaleIsOneOverRootHeadDim) {
  AttentionSetup setup{.seqlen_k = 1, .head_dim = 4, .options = {.backend = "reference"}};
  Attention a = Attention::prefill(setup);
  a.query.fill(1);
  a.key.fill(3);
  a.forward();
  EXPECT_NEAR(a.lse.at(0, 0, 0), 4 * 3 / 2.0, 1e-14);
}

TEST(ReferenceForward, SoftcapAlibiAndGateByHand) {
  // One row at position 2, three keys: S_j = 5 tanh(0.5 (q k_j + log sigmoid(alpha delta_j)) / 5) - 0.25 |2 -
  // j|.
  AttentionSetup setup{.seqlen_k = 3,
                       .head_dim = 1,
                       .head_dim_v = 1,
                       .options = {.backend = "reference"},
                       .gate = true,
                       .alibi = true};
  setup.options.softmax_scale = 0.5;
  setup.options.softcap = 5;
  setup.options.gate_threshold = 0;
  Attention a = Attention::prefill(setup);
  const double key[] = {4, -2, 9}, delta[] = {1.5, -3, 0}, value[] = {1, 2, 4};
  a.query.fill(1.5);
  a.alpha.fill(2);
  for (int j = 0; j < 3; ++j) {
    a.key.set(key[j], 0, j, 0, 0);
    a.delta.set(delta[j], 0, j, 0);
    a.value.set(value[j], 0, j, 0, 0);
  }
  for (bool log_sigmoid : {true, false}) {
    a.setup.options.log_sigmoid_gate = log_sigmoid;
    a.forward();
    double sum = 0, weighted = 0;
    for (int j = 0; j < 3; ++j) {
      const double product = 2 * delta[j];
      const double gate = log_sigmoid ? -std::log(1 + std::exp(-product)) : product;
      const double s = 5 * std::tanh(0.5 * (1.5 * key[j] + gate) / 5) - 0.25 * (2 - j);
      sum += std::exp(s);
      weighted += std::exp(s) * value[j];
    }
    EXPECT_NEAR(a.lse.at(0, 0, 0), std::log(sum), 1e-14);
    EXPECT_NEAR(a.out.at(0, 0, 0, 0), weighted / sum, 1e-14);
  }
}

TEST(ReferenceForward, AlibiCountsDistanceOnBothSides) {
  AttentionSetup setup{.seqlen_q = 2, .seqlen_k = 3, .options = {.backend = "reference"}, .alibi = true};
  Attention a = uniform(setup);
  a.forward();
  // Row 0 stands at position 1 of the keys: distances 1, 0, 1.
  EXPECT_NEAR(a.lse.at(0, 0, 0), std::log(1 + 2 * std::exp(-0.25)), 1e-14);
  EXPECT_NEAR(a.lse.at(0, 0, 1), std::log(1 + std::exp(-0.25) + std::exp(-0.5)), 1e-14);
}

TEST(ReferenceForward, AlibiSlopesPerSequence) {
  AttentionSetup setup{
      .batch = 2, .seqlen_q = 1, .seqlen_k = 2, .options = {.backend = "reference"}, .alibi = true};
  Attention a = uniform(setup);
  a.alibi_slopes = Buffer(DType::float64, {2, 1});
  a.alibi_slopes.set(1, 0, 0);
  a.alibi_slopes.set(3, 1, 0);
  a.forward();
  EXPECT_NEAR(a.lse.at(0, 0, 0), std::log(1 + std::exp(-1.0)), 1e-14);
  EXPECT_NEAR(a.lse.at(1, 0, 0), std::log(1 + std::exp(-3.0)), 1e-14);
}

TEST(ReferenceForward, SinkJoinsTheDenominator) {
  AttentionSetup setup{.seqlen_q = 3, .seqlen_k = 2, .options = {.backend = "reference"}, .sink = true};
  setup.options.causal = true;
  Attention a = uniform(setup);
  a.sink.fill(1.25);
  a.forward();
  EXPECT_EQ(attended(a, 0), "..");  // no key: lse = sink, out 0
  EXPECT_DOUBLE_EQ(a.lse.at(0, 0, 0), 1.25);
  EXPECT_NEAR(a.lse.at(0, 0, 2), std::log(2 + std::exp(1.25)), 1e-14);
  EXPECT_NEAR(a.out.at(0, 2, 0, 1), 1 / (2 + std::exp(1.25)), 1e-14);
}

TEST(ReferenceForward, CausalIsAlignedBottomRight) {
  AttentionSetup setup{.seqlen_q = 2, .seqlen_k = 4, .options = {.backend = "reference"}};
  setup.options.causal = true;
  Attention wide = uniform(setup);
  wide.forward();
  EXPECT_EQ(attended(wide, 0), "xxx.");
  EXPECT_EQ(attended(wide, 1), "xxxx");
  EXPECT_NEAR(wide.lse.at(0, 0, 0), std::log(3.0), 1e-14);

  setup.seqlen_q = 4;
  setup.seqlen_k = 2;
  Attention tall = uniform(setup);
  tall.forward();
  EXPECT_EQ(attended(tall, 0), "..");
  EXPECT_EQ(attended(tall, 1), "..");
  EXPECT_EQ(attended(tall, 2), "x.");
  EXPECT_EQ(attended(tall, 3), "xx");
  EXPECT_EQ(tall.lse.at(0, 0, 1), -kInf);
}

TEST(ReferenceForward, WindowIsInclusive) {
  AttentionSetup setup{.seqlen_q = 6, .seqlen_k = 6, .options = {.backend = "reference"}};
  setup.options.window_left = 2;
  setup.options.window_right = 1;
  Attention a = uniform(setup);
  a.forward();
  EXPECT_EQ(attended(a, 0), "xx....");
  EXPECT_EQ(attended(a, 3), ".xxxx.");
  EXPECT_EQ(attended(a, 5), "...xxx");

  a.setup.options.causal = true;
  a.forward();
  EXPECT_EQ(attended(a, 3), ".xxx..");

  a.setup.options.causal = false;
  a.setup.options.window_left = -1;
  a.setup.options.window_right = 0;
  a.forward();
  EXPECT_EQ(attended(a, 3), "xxxx..");
}

TEST(ReferenceForward, WindowSizesPerKeyHead) {
  AttentionSetup setup{.seqlen_q = 10,
                       .seqlen_k = 10,
                       .num_heads = 4,
                       .num_kv_heads = 2,
                       .options = {.backend = "reference"},
                       .window_sizes = {{1, 2, 3, 2}, {0, 0, 0, 3}}};
  Attention a = uniform(setup);
  a.forward();
  // Near band of 2 keys, a gap of 3, a distant band of 2, and key 0; distances 0 1 | 5 6 | key 0.
  EXPECT_EQ(attended(a, 9, 0), "x..xx...xx");
  EXPECT_EQ(attended(a, 9, 1), "x..xx...xx");
  EXPECT_EQ(attended(a, 5, 0), "x...xx....");
  EXPECT_EQ(attended(a, 9, 2), ".......xxx");
  EXPECT_EQ(attended(a, 0, 3), "x.........");
}

TEST(ReferenceForward, GroupsShareAKeyHead) {
  AttentionSetup setup{
      .seqlen_q = 2, .seqlen_k = 3, .num_heads = 6, .num_kv_heads = 2, .options = {.backend = "reference"}};
  Attention a = Attention::prefill(setup);
  for (std::int64_t i = 0; i < 2; ++i)
    for (std::int64_t h = 1; h < 6; ++h)
      for (std::int64_t d = 0; d < 2; ++d) a.query.set(a.query.at(0, i, 0, d), 0, i, h, d);
  a.forward();
  for (std::int64_t h = 1; h < 3; ++h) EXPECT_EQ(a.lse.at(0, h, 1), a.lse.at(0, 0, 1));
  for (std::int64_t h = 4; h < 6; ++h) EXPECT_EQ(a.lse.at(0, h, 1), a.lse.at(0, 3, 1));
  EXPECT_NE(a.lse.at(0, 3, 1), a.lse.at(0, 0, 1));
}

TEST(ReferenceForward, NothingBeyondTheUsedLengthsMatters) {
  AttentionSetup setup{.batch = 3,
                       .seqlen_q = 5,
                       .seqlen_k = 7,
                       .num_heads = 2,
                       .options = {.backend = "reference"},
                       .gate = true,
                       .sink = true,
                       .seqused_q = {5, 2, 0},
                       .seqused_k = {3, 7, 4}};
  setup.options.causal = true;
  Attention a = Attention::prefill(setup);
  a.forward();
  Attention poisoned = a;
  for (std::int64_t b = 0; b < 3; ++b) {
    for (std::int64_t i = a.used_q(b); i < 5; ++i)
      for (std::int64_t h = 0; h < 2; ++h) {
        poisoned.alpha.set(kNan, b, i, h);
        for (std::int64_t d = 0; d < 2; ++d) poisoned.query.set(kNan, b, i, h, d);
      }
    for (std::int64_t j = a.used_k(b); j < 7; ++j) {
      poisoned.delta.set(kNan, b, j, 0);
      for (std::int64_t d = 0; d < 2; ++d) {
        poisoned.key.set(kNan, b, j, 0, d);
        poisoned.value.set(kNan, b, j, 0, d);
      }
    }
  }
  poisoned.forward();
  EXPECT_TRUE(same_bytes(a.out, poisoned.out));
  EXPECT_TRUE(same_bytes(a.lse, poisoned.lse));
  EXPECT_TRUE(same_bytes(a.skip_map, poisoned.skip_map));
  for (std::int64_t i = 2; i < 5; ++i) {
    EXPECT_EQ(a.lse.at(1, 0, i), -kInf);  // despite the sink: not a row of the sequence
    EXPECT_EQ(a.out.at(1, i, 0, 0), 0);
  }
  EXPECT_EQ(a.lse.at(2, 1, 0), -kInf);
  EXPECT_TRUE(
      std::isfinite(a.lse.at(0, 0, 0)));  // rows 0 and 1 see no key (5 rows, 3 keys) but have the sink
  EXPECT_EQ(a.lse.at(0, 0, 0), a.sink.at(0));
}

TEST(ReferenceForward, PackedEqualsOneCallPerSequence) {
  const std::vector<std::int32_t> cu_q = {0, 3, 3, 73, 74}, cu_k = {0, 5, 9, 159, 159};
  AttentionSetup setup{.batch = 4,
                       .num_heads = 2,
                       .num_kv_heads = 1,
                       .head_dim = 4,
                       .head_dim_v = 3,
                       .options = {.backend = "reference"},
                       .gate = true,
                       .sink = true,
                       .alibi = true,
                       .cu_seqlens_q = cu_q,
                       .cu_seqlens_k = cu_k,
                       .spare = 6};
  setup.options.causal = true;
  setup.options.threshold = 0.5;
  Attention packed = Attention::prefill(setup);
  packed.forward();
  for (std::int64_t b = 0; b < 4; ++b) {
    AttentionSetup one = setup;
    one.batch = 1;
    one.cu_seqlens_q = one.cu_seqlens_k = {};
    one.seqlen_q = cu_q[b + 1] - cu_q[b];
    one.seqlen_k = cu_k[b + 1] - cu_k[b];
    Attention single = Attention::prefill(one);
    single.sink = packed.sink;
    for (std::int64_t h = 0; h < 2; ++h)
      for (std::int64_t i = 0; i < one.seqlen_q; ++i) {
        single.alpha.set(packed.alpha.at(cu_q[b] + i, h), 0, i, h);
        for (std::int64_t d = 0; d < 4; ++d) single.query.set(packed.query.at(cu_q[b] + i, h, d), 0, i, h, d);
      }
    for (std::int64_t j = 0; j < one.seqlen_k; ++j) {
      single.delta.set(packed.delta.at(cu_k[b] + j, 0), 0, j, 0);
      for (std::int64_t d = 0; d < 4; ++d) single.key.set(packed.key.at(cu_k[b] + j, 0, d), 0, j, 0, d);
      for (std::int64_t d = 0; d < 3; ++d) single.value.set(packed.value.at(cu_k[b] + j, 0, d), 0, j, 0, d);
    }
    single.forward();
    for (std::int64_t h = 0; h < 2; ++h)
      for (std::int64_t i = 0; i < one.seqlen_q; ++i) {
        EXPECT_EQ(packed.lse.at(h, cu_q[b] + i), single.lse.at(0, h, i)) << b << " " << i;
        for (std::int64_t d = 0; d < 3; ++d)
          EXPECT_EQ(packed.out.at(cu_q[b] + i, h, d), single.out.at(0, i, h, d));
        for (std::int64_t n = 0; n < (one.seqlen_k + 127) / 128; ++n)
          EXPECT_EQ(packed.kept(b, h, i / 64, n), single.kept(0, h, i / 64, n));
      }
  }
  for (std::int64_t token = 74; token < 80; ++token) {  // tokens beyond the last sequence
    EXPECT_EQ(packed.lse.at(0, token), -kInf);
    EXPECT_EQ(packed.out.at(token, 1, 2), 0);
  }
}

TEST(ReferenceForward, EmptyTensors) {
  for (auto [seqlen_q, seqlen_k, batch] : {std::array{0, 4, 2}, std::array{3, 0, 2}, std::array{3, 3, 0}}) {
    AttentionSetup setup{
        .batch = batch, .seqlen_q = seqlen_q, .seqlen_k = seqlen_k, .options = {.backend = "reference"}};
    Attention a = Attention::prefill(setup);
    a.forward();
    for (std::int64_t i = 0; i < a.out.numel(); ++i) EXPECT_EQ(a.out.get(i), 0);
    for (std::int64_t i = 0; i < a.lse.numel(); ++i) EXPECT_EQ(a.lse.get(i), -kInf);
  }
}

TEST(ReferenceForward, StridesAreHonoured) {
  AttentionSetup setup{.batch = 2,
                       .seqlen_q = 3,
                       .seqlen_k = 4,
                       .num_heads = 2,
                       .num_kv_heads = 1,
                       .head_dim = 3,
                       .options = {.backend = "reference"},
                       .gate = true};
  Attention a = Attention::prefill(setup);
  a.forward();
  Attention strided = a;
  auto restride = [](Buffer& tensor, std::vector<std::int64_t> strides) {
    Buffer copy(tensor.dtype(), Attention::shape_of(tensor), strides);
    for (std::int64_t i = 0; i < tensor.numel(); ++i) copy.put(i, tensor.get(i));
    tensor = copy;
  };
  restride(strided.query, {4, 8, 200, 1});       // heads outermost
  restride(strided.value, {50, 5, 7777777, 1});  // the stride of a dimension of size 1 means nothing
  restride(strided.out, {2, 40, 10, 1});
  restride(strided.lse, {3, 9, 1});
  strided.forward();
  EXPECT_EQ(max_difference(a.out, strided.out), 0);
  EXPECT_EQ(max_difference(a.lse, strided.lse), 0);
}

TEST(ReferenceForward, GateLayouts) {
  AttentionSetup setup{.batch = 2,
                       .seqlen_q = 3,
                       .seqlen_k = 4,
                       .num_heads = 2,
                       .num_kv_heads = 2,
                       .options = {.backend = "reference"},
                       .gate = true};
  Attention a = Attention::prefill(setup);
  a.forward();
  Attention b = a;
  b.setup.options.gate_layout = GateLayout::bhs;
  b.alpha = Buffer(DType::float64, {2, 2, 3});
  b.delta = Buffer(DType::float64, {2, 2, 4});
  for (std::int64_t n = 0; n < 2; ++n)
    for (std::int64_t h = 0; h < 2; ++h) {
      for (std::int64_t i = 0; i < 3; ++i) b.alpha.set(a.alpha.at(n, i, h), n, h, i);
      for (std::int64_t j = 0; j < 4; ++j) b.delta.set(a.delta.at(n, j, h), n, h, j);
    }
  b.forward();
  EXPECT_TRUE(same_bytes(a.out, b.out));
}

TEST(ReferenceForward, PagedEqualsContiguous) {
  for (std::int64_t page_size : {1, 3, 16, 200}) {
    AttentionSetup setup{.batch = 3,
                         .seqlen_q = 70,
                         .seqlen_k = 150,
                         .num_heads = 2,
                         .num_kv_heads = 1,
                         .head_dim = 4,
                         .options = {.backend = "reference"},
                         .gate = true,
                         .seqused_k = {150, 70, 0}};
    setup.options.causal = true;
    setup.options.threshold = 1.0;
    Attention a = Attention::prefill(setup);
    a.forward();
    Random random(page_size);
    Attention paged = a.paged(page_size, random);
    paged.forward();
    EXPECT_TRUE(same_bytes(a.out, paged.out)) << page_size;
    EXPECT_TRUE(same_bytes(a.lse, paged.lse)) << page_size;
    for (std::int64_t b = 0; b < 3; ++b)
      for (std::int64_t n = 0; n < 2; ++n) EXPECT_EQ(a.kept(b, 1, 1, n), paged.kept(b, 1, 1, n));
  }
}

TEST(ReferenceForward, LowPrecisionIsTheFloat64ResultRoundedOnce) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    AttentionSetup setup{.seqlen_q = 5,
                         .seqlen_k = 9,
                         .head_dim = 8,
                         .head_dim_v = 4,
                         .dtype = dtype,
                         .options = {.backend = "reference"}};
    Attention low = Attention::prefill(setup);
    low.forward();
    setup.dtype = DType::float64;
    Attention high = Attention::prefill(setup);
    for (auto [to, from] :
         {std::pair{&high.query, &low.query}, {&high.key, &low.key}, {&high.value, &low.value}})
      for (std::int64_t i = 0; i < to->numel(); ++i) to->put(i, from->get(i));
    high.forward();
    EXPECT_EQ(low.lse.dtype(), DType::float32);
    for (std::int64_t i = 0; i < high.out.numel(); ++i) {
      Buffer rounded(dtype, {1});
      rounded.put(0, high.out.get(i));
      EXPECT_EQ(low.out.get(i), rounded.get(0));
    }
    for (std::int64_t i = 0; i < high.lse.numel(); ++i)
      EXPECT_EQ(low.lse.get(i), static_cast<float>(high.lse.get(i)));
  }
}

// ---- Scalars ----

TEST(ReferenceScalar, EveryHalfSurvivesARoundTrip) {
  for (int bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    if (const double value = bfloat16_to_double(half); !std::isnan(value))
      EXPECT_EQ(double_to_bfloat16(value), half);
    else
      EXPECT_TRUE(std::isnan(bfloat16_to_double(double_to_bfloat16(value))));
    if (const double value = float16_to_double(half); !std::isnan(value))
      EXPECT_EQ(double_to_float16(value), half);
    else
      EXPECT_TRUE(std::isnan(float16_to_double(double_to_float16(value))));
  }
}

TEST(ReferenceScalar, RoundsToNearestEvenOnce) {
  EXPECT_EQ(double_to_bfloat16(1 + 0x1p-8), double_to_bfloat16(1.0));
  EXPECT_EQ(double_to_bfloat16(1 + 0x3p-8), double_to_bfloat16(1 + 0x1p-6));
  EXPECT_EQ(double_to_bfloat16(1 + 0x1p-8 + 0x1p-40),
            double_to_bfloat16(1 + 0x1p-7));  // not twice, via float32
  EXPECT_EQ(double_to_float16(1 + 0x1p-11), double_to_float16(1.0));
  EXPECT_EQ(double_to_float16(65519.999), 0x7bff);
  EXPECT_EQ(double_to_float16(65520.0), 0x7c00);
  EXPECT_EQ(double_to_float16(-0x1p-25), 0x8000);
  EXPECT_EQ(double_to_float16(0x1.8p-25), 0x0001);
  EXPECT_EQ(double_to_bfloat16(1e39), 0x7f80);
}

}  // namespace
}  // namespace fsa::test
