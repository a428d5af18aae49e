// SPDX-License-Identifier: Apache-2.0
// The vector kernels against the reference, on random problems: every dtype, mask, logit policy, skip rule, layout.
// One seed is one problem; a failure names it: fsa_tests --gtest_filter='Cpu.*' with FSA_TEST_SEED=<seed> runs it alone.
#include <chrono>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <thread>

#include "backend/cpu/thread_pool.h"
#include "core/skip_tile.h"
#include "test_random.h"

namespace fsa::test {
namespace {

AttentionSetup random_setup(Random& random, bool is_decode) {
  AttentionSetup s;
  s.dtype = any_dtype(random);
  s.batch = 1 + random.below(3);
  s.num_kv_heads = 1 + random.below(3);
  s.num_heads = s.num_kv_heads * any_of(random, {1, 1, 2, 3, 7});
  s.head_dim = any_of(random, {1, 3, 8, 16, 31, 64, 80, 128, 130, 200});
  s.head_dim_v = random.below(3) == 0 ? any_of(random, {1, 5, 17, 64, 136}) : s.head_dim;
  s.seqlen_q = any_of(random, {1, 2, 17, 63, 64, 65, 100, 200, 300});
  s.seqlen_k = any_of(random, {1, 15, 64, 128, 129, 200, 391, 700, 700});
  s.options.causal = random.below(2) == 0;
  if (random.below(4) == 0) {
    s.options.window_left = random.below(150) - 1;
    s.options.window_right = random.below(150) - 1;
  } else if (random.below(5) == 0) {
    s.window_sizes.clear();
    for (std::int64_t h = 0; h < s.num_kv_heads; ++h)
      s.window_sizes.push_back(
          {static_cast<std::int32_t>(random.below(20)), static_cast<std::int32_t>(random.below(90)),
           static_cast<std::int32_t>(random.below(90)), static_cast<std::int32_t>(random.below(90))});
  }
  if (random.below(4) == 0) s.options.softcap = 2 + random.uniform() * 20;
  s.alibi = random.below(4) == 0;
  s.sink = random.below(4) == 0;
  s.gate = random.below(3) == 0;
  if (s.gate) {
    s.options.log_sigmoid_gate = random.below(2) == 0;
    s.options.adaptive_gate = random.below(2) == 0;
    if (random.below(3) != 0) s.options.gate_threshold = random.uniform();
  }
  if (random.below(5) < 3) s.options.threshold = random.uniform() * 3;
  if (s.options.threshold && random.below(2) == 0) s.seqlen_k = 700;  // tiles enough to skip some
  if (!is_decode && s.seqlen_k < 700 && random.below(3) == 0) {
    for (std::vector<std::int32_t>* cu : {&s.cu_seqlens_q, &s.cu_seqlens_k}) {
      cu->push_back(0);
      const std::int64_t limit = cu == &s.cu_seqlens_q ? s.seqlen_q : s.seqlen_k;
      for (std::int64_t b = 0; b < s.batch; ++b)
        cu->push_back(cu->back() + static_cast<std::int32_t>(random.below(limit + 1)));
    }
    s.spare = random.below(4);
  }
  if (random.below(3) == 0) {
    for (std::int64_t b = 0; b < s.batch; ++b) {
      const auto extent = [&](const std::vector<std::int32_t>& cu, std::int64_t seqlen) {
        return cu.empty() ? seqlen : cu[b + 1] - cu[b];
      };
      if (!is_decode)
        s.seqused_q.push_back(
            static_cast<std::int32_t>(random.below(extent(s.cu_seqlens_q, s.seqlen_q) + 1)));
      s.seqused_k.push_back(static_cast<std::int32_t>(random.below(extent(s.cu_seqlens_k, s.seqlen_k) + 1)));
    }
  }
  s.seed = random.bits();
  return s;
}

// Logits that differ by about 30 nats between stretches of keys, so that the vote has something to skip: all keys of
// a stretch point along one direction or against it, and so do the rows of a stretch.
void give_topics(Attention& a, Random& random) {
  const std::int64_t dim = a.setup.head_dim;
  std::vector<double> direction(static_cast<std::size_t>(dim));
  for (double& x : direction)
    x = 4 * (random.below(2) == 0 ? 1 : -1) / std::pow(static_cast<double>(dim), 0.25);
  const std::uint64_t signs = random.bits();
  const auto shift = [&](Buffer& buffer, std::int64_t stretch) {
    const std::int64_t per_row = dim * buffer.shape(buffer.view().rank - 2);
    for (std::int64_t i = 0; i < buffer.numel(); ++i) {
      const double sign = (signs >> (i / per_row / stretch % 64) & 1) != 0 ? 1 : -1;
      buffer.put(i, 0.3 * buffer.get(i) + sign * direction[static_cast<std::size_t>(i % dim)]);
    }
  };
  shift(a.key, 128);
  shift(a.query, 64);
}

// Gates that shut two of three key tiles for good: alpha near 1, delta 0 or far below.
void shut_tiles(Attention& a, Random& random) {
  for (std::int64_t i = 0; i < a.alpha.numel(); ++i) a.alpha.put(i, 1 + 0.1 * random.normal());
  const std::int64_t per_row = a.delta.shape(a.delta.view().rank - 1);
  for (std::int64_t i = 0; i < a.delta.numel(); ++i)
    a.delta.put(i, i / per_row / 64 % 3 == 0 ? 0.1 * random.normal() : -40.0);
}

Attention with_backend(Attention a, const char* backend) {
  a.setup.options.backend = backend;
  return a;
}

TEST(Cpu, ForwardAndBackwardMatchReference) {
  const std::vector<std::uint64_t> drawn = seeds(1000, 160);
  std::size_t skipping = 0, compared = 0;
  for (const std::uint64_t seed : drawn) {
    Random random(seed);
    Attention cpu = Attention::prefill(random_setup(random, false));
    if (cpu.setup.options.threshold && random.below(4) != 0) give_topics(cpu, random);
    if (cpu.setup.gate && random.below(2) == 0) shut_tiles(cpu, random);
    if (random.below(4) == 0 && !cpu.packed_k()) {
      // Paged keys: forward only.
      Attention paged = with_backend(cpu.paged(any_of(random, {1, 5, 16, 128, 256}), random), "cpu");
      Attention reference = with_backend(paged, "reference");
      paged.forward();
      reference.forward();
      if (!same_bytes(paged.skip_map, reference.skip_map)) continue;
      expect_close(paged.out, reference.out, tolerance(paged.setup.dtype), "paged out", seed);
      continue;
    }
    cpu.setup.options.backend = "cpu";
    Attention reference = with_backend(cpu, "reference");
    cpu.forward();
    reference.forward();
    if (!same_bytes(cpu.skip_map, reference.skip_map)) continue;  // a decision on the edge; counted below
    ++compared;
    expect_close(cpu.out, reference.out, tolerance(cpu.setup.dtype), "out", seed);
    expect_close(cpu.lse, reference.lse, 1e-5, "lse", seed);
    TileCounts tiles = count_tiles(cpu.forward_args());
    skipping += tiles.kept < tiles.visible ? 1 : 0;

    cpu.make_gradients(random, random.below(2) == 0);
    reference.grad_out = cpu.grad_out;
    reference.grad_lse = cpu.grad_lse;
    reference.out = cpu.out;
    reference.lse = cpu.lse;
    cpu.backward();
    reference.backward();
    const double limit = 4 * tolerance(cpu.setup.dtype);
    expect_close(cpu.grad_query, reference.grad_query, limit, "grad_query", seed);
    expect_close(cpu.grad_key, reference.grad_key, limit, "grad_key", seed);
    expect_close(cpu.grad_value, reference.grad_value, limit, "grad_value", seed);
    if (cpu.setup.gate) {
      expect_close(cpu.grad_alpha, reference.grad_alpha, limit, "grad_alpha", seed);
      expect_close(cpu.grad_delta, reference.grad_delta, limit, "grad_delta", seed);
    }
    if (cpu.setup.sink) expect_close(cpu.grad_sink, reference.grad_sink, limit, "grad_sink", seed);
  }
  if (std::getenv("FSA_TEST_SEED") != nullptr) return;
  EXPECT_GE(8 * compared, 5 * drawn.size()) << "too many maps differ from the reference's";
  EXPECT_GE(11 * skipping, drawn.size()) << "the sparse cases skip nothing";
}

TEST(Cpu, DecodeMatchesReference) {
  for (const std::uint64_t seed : seeds(5000, 100)) {
    Random random(seed);
    AttentionSetup setup = random_setup(random, true);
    setup.seqlen_k = any_of(random, {1, 128, 391, 700, 1500});
    for (std::int32_t& used : setup.seqused_k)
      used = static_cast<std::int32_t>(random.below(setup.seqlen_k + 1));
    const bool gather = setup.window_sizes.empty() && setup.options.window_left < 0 &&
                        setup.options.window_right < 0 && random.below(4) == 0;
    if (gather) {
      const std::int64_t top_k = 1 + random.below(400);
      for (std::int64_t b = 0; b < setup.batch; ++b)
        for (std::int64_t i = 0; i < top_k; ++i) {
          const std::int64_t used = setup.seqused_k.empty() ? setup.seqlen_k : setup.seqused_k[b];
          setup.gather_kv_indices.push_back(
              used == 0 || random.below(5) == 0 ? -1 : static_cast<std::int32_t>(random.below(used)));
        }
    }
    Attention cpu = Attention::for_decode(setup);
    if (random.below(2) == 0) give_topics(cpu, random);
    if (!gather && random.below(3) == 0) cpu = cpu.paged(any_of(random, {1, 7, 16, 256}), random);
    cpu.setup.options.backend = "cpu";
    Attention reference = with_backend(cpu, "reference");
    cpu.decode();
    reference.decode();
    expect_close(cpu.out, reference.out, tolerance(setup.dtype), "out", seed);
    expect_close(cpu.lse, reference.lse, 2e-5, "lse", seed);
  }
}

TEST(Cpu, ResultsDoNotDependOnThreads) {
  const int before = num_threads();
  for (const std::uint64_t seed : seeds(9000, 12)) {
    Random random(seed);
    Attention one = with_backend(Attention::prefill(random_setup(random, false)), "cpu");
    give_topics(one, random);
    one.make_gradients(random, true);
    Attention many = one;
    set_num_threads(1);
    one.forward();
    one.backward();
    set_num_threads(5);
    many.forward();
    many.backward();
    for (Buffer Attention::* buffer : {&Attention::out, &Attention::lse, &Attention::skip_map,
                                       &Attention::grad_query, &Attention::grad_key, &Attention::grad_value,
                                       &Attention::grad_alpha, &Attention::grad_delta, &Attention::grad_sink})
      EXPECT_TRUE(same_bytes(one.*buffer, many.*buffer)) << "seed " << seed;
  }
  set_num_threads(before);
}

// Rows without any other logit: lse is log(keys) + softmax_scale log(sigmoid(alpha delta)). On tiles the log-sigmoid has
// one form for 16 rows whose products are all near 0 and one for the others; half of these products lie within 9.3.
TEST(Cpu, PairGateNearAndFarFromZero) {
  for (const double delta : {-20.0, -9.25, -3.0, -0.5, 0.25, 1.0, 4.0, 9.25, 12.0, 60.0}) {
    AttentionSetup setup{.seqlen_q = 64, .seqlen_k = 128, .head_dim = 64, .head_dim_v = 64, .gate = true};
    setup.dtype = DType::bfloat16;
    setup.options.backend = "cpu";
    Attention a = Attention::prefill(setup);
    for (std::int64_t i = 0; i < a.query.numel(); ++i) a.query.put(i, 0.0);
    for (std::int64_t i = 0; i < a.alpha.numel(); ++i)
      a.alpha.put(i, static_cast<double>(i % 2 == 0 ? i : -i) / 64);
    for (std::int64_t j = 0; j < a.delta.numel(); ++j) a.delta.put(j, delta);
    a.forward();
    for (std::int64_t i = 0; i < 64; ++i) {
      const double x = a.alpha.at(0, i, 0) * delta;
      const double gate = std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x)));
      EXPECT_NEAR(a.lse.at(0, 0, i), std::log(128.0) + gate / 8, 6e-6) << "alpha * delta = " << x;
    }
  }
}

// The gradients of a backward that adds to what `a` holds.
void backward_onto(Attention& a, bool query, bool key_value) {
  BackwardArgs args = a.backward_args();
  args.add_to_grad_query = query;
  args.add_to_grad_key_value = key_value;
  const std::size_t bytes = workspace_size(args);
  std::vector<unsigned char> memory(bytes + 64);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  args.workspace = {memory.data() + (64 - address % 64) % 64, bytes};
  backward(args);
}

TEST(Cpu, GradientsJoinWhatTheirTensorsHold) {
  for (const std::uint64_t seed : seeds(9200, 24)) {
    Random random(seed);
    Attention alone = with_backend(Attention::prefill(random_setup(random, false)), "cpu");
    if (seed % 4 == 0) alone.setup.options.backend = "reference";
    alone.make_gradients(random, false);
    alone.forward();
    alone.backward();
    const bool query = seed % 3 != 0, key_value = seed % 3 != 1;
    Attention joined = alone, sums = alone;
    const auto prepare = [&](Buffer Attention::* member, bool adds) {
      Buffer &held = joined.*member, &sum = sums.*member;
      for (std::int64_t i = 0; i < held.numel(); ++i) {
        held.put(i, random.normal());
        sum.put(i, (alone.*member).get(i) + (adds ? held.get(i) : 0));
      }
    };
    prepare(&Attention::grad_query, query);
    prepare(&Attention::grad_key, key_value);
    prepare(&Attention::grad_value, key_value);
    backward_onto(joined, query, key_value);
    const double limit = tolerance(alone.setup.dtype);
    expect_close(joined.grad_query, sums.grad_query, limit, "grad_query", seed);
    expect_close(joined.grad_key, sums.grad_key, limit, "grad_key", seed);
    expect_close(joined.grad_value, sums.grad_value, limit, "grad_value", seed);
    EXPECT_TRUE(same_bytes(joined.grad_alpha, alone.grad_alpha)) << "seed " << seed;
  }
}

TEST(Cpu, ThresholdOffIsDenseBitForBit) {
  for (const std::uint64_t seed : seeds(9100, 10)) {
    Random random(seed);
    AttentionSetup setup = random_setup(random, false);
    setup.options.threshold.reset();
    Attention dense = with_backend(Attention::prefill(setup), "cpu");
    Attention off = dense;
    off.setup.options.threshold = -1.0;
    dense.forward();
    off.forward();
    EXPECT_TRUE(same_bytes(dense.out, off.out)) << "seed " << seed;
    EXPECT_TRUE(same_bytes(dense.lse, off.lse)) << "seed " << seed;
  }
}

TEST(ThreadPool, RunsEveryItemOnceAndNests) {
  const int before = num_threads();
  set_num_threads(4);
  std::vector<int> runs(1000, 0);
  cpu::parallel_for(1000, [&](std::int64_t i) {
    cpu::parallel_for(1, [&](std::int64_t) { ++runs[static_cast<std::size_t>(i)]; });
  });
  EXPECT_EQ(std::count(runs.begin(), runs.end(), 1), 1000);
  EXPECT_THROW(cpu::parallel_for(10,
                                 [](std::int64_t i) {
                                   if (i == 7) throw Error(ErrorCode::internal, "item 7");
                                 }),
               Error);
  set_num_threads(before);
}

TEST(ThreadPool, StepsOfAChainRunInOrder) {
  const int before = num_threads();
  const std::vector<std::int64_t> lengths = {3, 0, 40, 1, 17};
  for (const int threads : {1, 2, 8}) {
    set_num_threads(threads);
    std::vector<std::vector<std::int64_t>> seen(lengths.size());
    cpu::parallel_chains(lengths, [&](std::size_t chain, std::int64_t step) {
      std::this_thread::sleep_for(std::chrono::microseconds(chain == 2 ? 50 : 5));
      seen[chain].push_back(step);
    });
    for (std::size_t chain = 0; chain < lengths.size(); ++chain) {
      std::vector<std::int64_t> steps(static_cast<std::size_t>(lengths[chain]));
      std::iota(steps.begin(), steps.end(), 0);
      EXPECT_EQ(seen[chain], steps) << "chain " << chain << ", " << threads << " threads";
    }
    EXPECT_THROW(cpu::parallel_chains(lengths,
                                      [](std::size_t chain, std::int64_t step) {
                                        if (chain == 2 && step == 5)
                                          throw Error(ErrorCode::internal, "step 5");
                                      }),
                 Error);
  }
  set_num_threads(before);
}

TEST(ThreadPool, DenormalsAreZeroInItemsAloneAndTheCallersSettingReturns) {
  volatile float smallest = std::numeric_limits<float>::min();
  const auto halved = [&] { return smallest * 0.5f; };
  ASSERT_GT(halved(), 0.0f);
  const int before = num_threads();
  for (const int threads : {1, 4}) {
    set_num_threads(threads);
    std::vector<float> inside(64, -1.0f);
    cpu::parallel_for(64, [&](std::int64_t i) {
      inside[static_cast<std::size_t>(i)] = halved();
      std::this_thread::sleep_for(std::chrono::microseconds(50));  // so that every thread gets some
    });
    EXPECT_EQ(std::count(inside.begin(), inside.end(), 0.0f), 64) << threads << " threads";
    EXPECT_GT(halved(), 0.0f) << threads << " threads";
    EXPECT_THROW(cpu::parallel_for(2, [](std::int64_t) { throw Error(ErrorCode::internal, "item"); }), Error);
    EXPECT_GT(halved(), 0.0f) << "after an exception, " << threads << " threads";
  }
  set_num_threads(before);
}

}  // namespace
}  // namespace fsa::test
