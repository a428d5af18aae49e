// SPDX-License-Identifier: Apache-2.0
// Joining attention over disjoint key sets.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "test_util.h"

namespace fsa::test {
namespace {

struct Merge {
  Buffer outs, lses, out, lse;

  Merge(DType dtype, std::int64_t parts, std::int64_t batch, std::int64_t rows, std::int64_t heads,
        std::int64_t dims)
      : outs(dtype, {parts, batch, rows, heads, dims}),
        lses(dtype == DType::float64 ? DType::float64 : DType::float32, {parts, batch, heads, rows}),
        out(dtype, {batch, rows, heads, dims}),
        lse(lses.dtype(), {batch, heads, rows}) {}

  void run() {
    out.poison();
    lse.poison();
    merge({.outs = outs.view(), .lses = lses.view(), .out = out.view(), .lse = lse.view()});
    EXPECT_TRUE(out.guards_intact());
    EXPECT_TRUE(lse.guards_intact());
  }
};

TEST(Merge, DisjointKeysGiveTheWhole) {
  const std::int64_t cuts[] = {0, 60, 60, 200, 230};  // the second part is empty
  AttentionSetup setup{.batch = 2,
                       .seqlen_q = 5,
                       .seqlen_k = 230,
                       .num_heads = 4,
                       .num_kv_heads = 2,
                       .head_dim = 3,
                       .head_dim_v = 5};
  setup.options.backend = "reference";
  setup.options.softmax_scale = 2;
  Attention whole = Attention::prefill(setup);
  whole.forward();
  Merge merge(DType::float64, 4, 2, 5, 4, 5);
  for (std::int64_t p = 0; p < 4; ++p) {
    AttentionSetup part = setup;
    part.seqlen_k = cuts[p + 1] - cuts[p];
    Attention a = Attention::prefill(part);
    a.query = whole.query;
    for (std::int64_t b = 0; b < 2; ++b)
      for (std::int64_t j = 0; j < part.seqlen_k; ++j)
        for (std::int64_t h = 0; h < 2; ++h) {
          for (std::int64_t d = 0; d < 3; ++d) a.key.set(whole.key.at(b, cuts[p] + j, h, d), b, j, h, d);
          for (std::int64_t d = 0; d < 5; ++d) a.value.set(whole.value.at(b, cuts[p] + j, h, d), b, j, h, d);
        }
    a.forward();
    for (std::int64_t i = 0; i < a.out.numel(); ++i) merge.outs.put(p * a.out.numel() + i, a.out.get(i));
    for (std::int64_t i = 0; i < a.lse.numel(); ++i) merge.lses.put(p * a.lse.numel() + i, a.lse.get(i));
  }
  merge.run();
  EXPECT_LT(max_difference(merge.out, whole.out), 1e-13);
  EXPECT_LT(max_difference(merge.lse, whole.lse), 1e-13);
}

TEST(Merge, WeightsByHandInEveryDtype) {
  for (DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16}) {
    Merge merge(dtype, 2, 1, 1, 1, 2);
    merge.outs.set(4, 0, 0, 0, 0, 0);
    merge.outs.set(-8, 0, 0, 0, 0, 1);
    merge.outs.set(8, 1, 0, 0, 0, 0);
    merge.outs.set(0, 1, 0, 0, 0, 1);
    merge.lses.set(100 + std::log(3.0), 0, 0, 0, 0);
    merge.lses.set(100, 1, 0, 0, 0);
    merge.run();
    const double tolerance = dtype == DType::float64 ? 1e-13 : dtype == DType::float32 ? 2e-5 : 2e-2;
    EXPECT_NEAR(merge.out.at(0, 0, 0, 0), 5, tolerance);
    EXPECT_NEAR(merge.out.at(0, 0, 0, 1), -6, tolerance);
    EXPECT_NEAR(merge.lse.at(0, 0, 0), 100 + std::log(4.0), dtype == DType::float64 ? 1e-13 : 2e-5);
  }
}

TEST(Merge, EmptyPartsContributeNothing) {
  Merge merge(DType::float32, 3, 1, 1, 1, 1);
  merge.lses.set(-kInf, 0, 0, 0, 0);  // its out stays NaN
  merge.lses.set(-1.5, 1, 0, 0, 0);
  merge.outs.set(7, 1, 0, 0, 0, 0);
  merge.lses.set(-kInf, 2, 0, 0, 0);
  merge.run();
  EXPECT_EQ(merge.out.at(0, 0, 0, 0), 7);
  EXPECT_EQ(merge.lse.at(0, 0, 0), -1.5);
  merge.lses.fill(-kInf);
  merge.run();
  EXPECT_EQ(merge.out.at(0, 0, 0, 0), 0);
  EXPECT_EQ(merge.lse.at(0, 0, 0), -kInf);
}

TEST(Merge, InfinityWinsAndNanSpreads) {
  Merge merge(DType::float64, 2, 1, 1, 1, 1);
  merge.outs.set(3, 0, 0, 0, 0, 0);
  merge.outs.set(5, 1, 0, 0, 0, 0);
  merge.lses.set(kInf, 0, 0, 0, 0);
  merge.lses.set(2, 1, 0, 0, 0);
  merge.run();
  EXPECT_EQ(merge.out.at(0, 0, 0, 0), 3);
  EXPECT_EQ(merge.lse.at(0, 0, 0), kInf);
  merge.lses.set(kNan, 1, 0, 0, 0);
  merge.run();
  EXPECT_TRUE(std::isnan(merge.out.at(0, 0, 0, 0)));
  EXPECT_TRUE(std::isnan(merge.lse.at(0, 0, 0)));
}

TEST(Merge, Packed) {
  Buffer outs(DType::float32, {2, 3, 2, 1}), lses(DType::float32, {2, 2, 3}), out(DType::float32, {3, 2, 1}),
      lse(DType::float32, {2, 3});
  for (std::int64_t i = 0; i < 12; ++i) outs.put(i, static_cast<double>(i));
  lses.fill(0);
  lses.set(-kInf, 1, 0, 2);
  merge({.outs = outs.view(), .lses = lses.view(), .out = out.view(), .lse = lse.view()});
  EXPECT_FLOAT_EQ(static_cast<float>(out.at(0, 0, 0)), 3);  // (0 + 6) / 2
  EXPECT_EQ(out.at(2, 0, 0), 4);                            // the other part has no key for head 0 of token 2
  EXPECT_FLOAT_EQ(static_cast<float>(lse.at(1, 2)), std::log(2.0f));
}

}  // namespace
}  // namespace fsa::test
