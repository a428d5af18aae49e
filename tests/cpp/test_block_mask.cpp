// SPDX-License-Identifier: Apache-2.0
// Block masks: what they show, what they refuse, and the vector kernels against the reference.
#include "test_block_mask.h"

#include <cmath>

#include "core/skip_tile.h"
#include "core/visibility.h"
#include "test_api_util.h"
#include "test_random.h"

namespace fsa::test {
namespace {

constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr ErrorCode kType = ErrorCode::type_mismatch;
constexpr ErrorCode kUnsupported = ErrorCode::unsupported;

AttentionSetup small_setup() {
  return {.batch = 2,
          .seqlen_q = 150,
          .seqlen_k = 270,
          .num_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 3,
          .head_dim_v = 3};
}

// Queries of 0 and one-hot values: out is above 0 exactly where a row sees a key.
TEST(BlockMask, ReferenceShowsExactlyTheElementsOfTheMask) {
  Random random(3);
  for (int variant = 0; variant < 16; ++variant) {
    AttentionSetup setup = small_setup();
    setup.head_dim_v = setup.seqlen_k;
    setup.options.backend = "reference";
    setup.options.causal = variant >= 8;
    Attention a = Attention::prefill(setup);
    a.query.fill(0);
    a.value.fill(0);
    for (std::int64_t b = 0; b < setup.batch; ++b)
      for (std::int64_t j = 0; j < setup.seqlen_k; ++j)
        for (std::int64_t h = 0; h < setup.num_kv_heads; ++h) a.value.set(1, b, j, h, j);
    const MaskShape shape{.block_rows = variant % 2 == 0 ? 64 : 128,
                          .per_batch = (variant & 2) != 0,
                          .per_head = (variant & 4) != 0,
                          .full = variant != 3,
                          .partial = variant != 5};
    ElementMask mask = give_block_mask(a, shape, random);
    a.forward();
    for (std::int64_t b = 0; b < setup.batch; ++b)
      for (std::int64_t h = 0; h < setup.num_heads; ++h)
        for (std::int64_t i = 0; i < setup.seqlen_q; ++i) {
          int count = 0;
          for (std::int64_t j = 0; j < setup.seqlen_k; ++j) {
            const bool seen = mask.at(b, h, i, j) != 0 &&
                              (!setup.options.causal || j <= i + setup.seqlen_k - setup.seqlen_q);
            ASSERT_EQ(a.out.at(b, i, h, j) > 0, seen)
                << variant << ": " << b << " " << h << " " << i << " " << j;
            count += seen;
          }
          if (count == 0) {
            ASSERT_EQ(a.lse.at(b, h, i), -kInf);
          } else {
            ASSERT_NEAR(a.lse.at(b, h, i), std::log(count), 1e-12);
          }
        }
  }
}

// Brute force: the formulas over the element mask.
TEST(BlockMask, ReferenceGradientsByHand) {
  Random random(4);
  AttentionSetup setup = small_setup();
  setup.batch = 1;
  setup.seqlen_q = 70;
  setup.seqlen_k = 140;
  setup.num_heads = 2;
  setup.num_kv_heads = 1;
  setup.options.backend = "reference";
  Attention a = Attention::prefill(setup);
  ElementMask mask = give_block_mask(a, {.block_rows = 64, .block_keys = 128}, random);
  a.forward();
  a.make_gradients(random, false);
  a.backward();
  const double scale = 1 / std::sqrt(3.0);
  std::vector<double> grad_key(140 * 3), grad_value(140 * 3);
  for (std::int64_t h = 0; h < 2; ++h)
    for (std::int64_t i = 0; i < 70; ++i) {
      std::vector<double> p(140), dp(140);
      double sum = 0, mean = 0, grad_query[3] = {};
      for (std::int64_t j = 0; j < 140; ++j) {
        double s = 0;
        for (std::int64_t d = 0; d < 3; ++d) s += a.query.at(0, i, h, d) * a.key.at(0, j, 0, d);
        for (std::int64_t d = 0; d < 3; ++d) dp[j] += a.grad_out.at(0, i, h, d) * a.value.at(0, j, 0, d);
        p[j] = mask.at(0, h, i, j) != 0 ? std::exp(scale * s) : 0;
        sum += p[j];
      }
      for (std::int64_t j = 0; j < 140; ++j) {
        p[j] = sum > 0 ? p[j] / sum : 0;
        mean += p[j] * dp[j];
      }
      for (std::int64_t j = 0; j < 140; ++j)
        for (std::int64_t d = 0; d < 3; ++d) {
          grad_query[d] += scale * p[j] * (dp[j] - mean) * a.key.at(0, j, 0, d);
          grad_key[j * 3 + d] += scale * p[j] * (dp[j] - mean) * a.query.at(0, i, h, d);
          grad_value[j * 3 + d] += p[j] * a.grad_out.at(0, i, h, d);
        }
      for (std::int64_t d = 0; d < 3; ++d) ASSERT_NEAR(a.grad_query.at(0, i, h, d), grad_query[d], 1e-12);
    }
  for (std::int64_t j = 0; j < 140; ++j)
    for (std::int64_t d = 0; d < 3; ++d) {
      ASSERT_NEAR(a.grad_key.at(0, j, 0, d), grad_key[j * 3 + d], 1e-11);
      ASSERT_NEAR(a.grad_value.at(0, j, 0, d), grad_value[j * 3 + d], 1e-11);
    }
}

AttentionSetup random_setup(Random& random) {
  AttentionSetup s;
  s.dtype = any_dtype(random);
  s.batch = 1 + random.below(2);
  s.num_kv_heads = 1 + random.below(2);
  s.num_heads = s.num_kv_heads * any_of(random, {1, 2, 3});
  s.head_dim = any_of(random, {3, 16, 64, 128, 130});
  s.head_dim_v = random.below(3) == 0 ? any_of(random, {5, 64, 136}) : s.head_dim;
  s.seqlen_q = any_of(random, {1, 63, 64, 65, 200, 300});
  s.seqlen_k = any_of(random, {1, 128, 129, 391, 700});
  s.options.causal = random.below(3) == 0;
  if (random.below(4) == 0) {
    s.options.window_left = random.below(300) - 1;
    s.options.window_right = random.below(300) - 1;
  } else if (random.below(5) == 0) {
    for (std::int64_t h = 0; h < s.num_kv_heads; ++h) s.window_sizes.push_back({10, 90, 90, 150});
  }
  if (random.below(4) == 0) s.options.softcap = 5;
  s.alibi = random.below(4) == 0;
  s.sink = random.below(4) == 0;
  s.gate = random.below(4) == 0;
  if (random.below(3) == 0) s.options.threshold = 1 + random.uniform();
  if (random.below(4) == 0)
    for (std::int64_t b = 0; b < s.batch; ++b) {
      s.seqused_q.push_back(static_cast<std::int32_t>(random.below(s.seqlen_q + 1)));
      s.seqused_k.push_back(static_cast<std::int32_t>(random.below(s.seqlen_k + 1)));
    }
  s.seed = random.bits();
  return s;
}

MaskShape random_shape(Random& random, std::int64_t head_dim) {
  const std::int64_t keys = skip_tile_keys(head_dim);
  const std::int64_t lists = random.below(4);  // 0: full ones alone, 1: partial ones alone
  return {.block_rows = any_of(random, {64, 64, 128, 192}),
          .block_keys = any_of(random, {keys, keys, 2 * keys}),
          .per_batch = random.below(2) == 0,
          .per_head = random.below(2) == 0,
          .full = lists != 1,
          .partial = lists != 0};
}

TEST(BlockMask, CpuMatchesReference) {
  const std::vector<std::uint64_t> drawn = seeds(20000, 120);
  std::size_t compared = 0;
  for (const std::uint64_t seed : drawn) {
    Random random(seed);
    AttentionSetup setup = random_setup(random);
    setup.options.backend = "cpu";
    Attention cpu = Attention::prefill(setup);
    if (setup.options.threshold) fill_topics(cpu, random, 64);
    give_block_mask(cpu, random_shape(random, setup.head_dim), random);
    Attention reference = cpu;
    reference.setup.options.backend = "reference";
    cpu.forward();
    reference.forward();
    const bool votes = setup.options.threshold || setup.gate;
    if (votes && !same_bytes(cpu.skip_map, reference.skip_map)) continue;  // on the edge; counted below
    ++compared;
    EXPECT_TRUE(same_bytes(cpu.skip_map, reference.skip_map)) << "seed " << seed;
    expect_close(cpu.out, reference.out, tolerance(setup.dtype), "out", seed);
    expect_close(cpu.lse, reference.lse, 1e-5, "lse", seed);
    const TileCounts tiles = count_tiles(cpu.forward_args());
    if (!votes) {
      EXPECT_EQ(tiles.kept, tiles.visible) << "seed " << seed;
    }
    cpu.make_gradients(random, random.below(2) == 0);
    reference.grad_out = cpu.grad_out;
    reference.grad_lse = cpu.grad_lse;
    reference.out = cpu.out;
    reference.lse = cpu.lse;
    cpu.backward();
    reference.backward();
    const double limit = 4 * tolerance(setup.dtype);
    expect_close(cpu.grad_query, reference.grad_query, limit, "grad_query", seed);
    expect_close(cpu.grad_key, reference.grad_key, limit, "grad_key", seed);
    expect_close(cpu.grad_value, reference.grad_value, limit, "grad_value", seed);
    if (setup.gate) expect_close(cpu.grad_alpha, reference.grad_alpha, limit, "grad_alpha", seed);
    if (setup.gate) expect_close(cpu.grad_delta, reference.grad_delta, limit, "grad_delta", seed);
    if (setup.sink) expect_close(cpu.grad_sink, reference.grad_sink, limit, "grad_sink", seed);
  }
  if (std::getenv("FSA_TEST_SEED") == nullptr) {
    EXPECT_GE(6 * compared, 5 * drawn.size()) << "too many maps differ from the reference's";
  }
}

TEST(BlockMask, EveryBlockListedIsDenseBitForBit) {
  Random random(5);
  AttentionSetup setup = small_setup();
  setup.dtype = DType::float32;
  setup.head_dim = setup.head_dim_v = 64;
  setup.options.backend = "cpu";
  Attention dense = Attention::prefill(setup);
  Attention listed = dense;
  listed.full_kv_num_blocks = Buffer::ints({3, 3}, {1, 1, 2});
  listed.full_kv_indices = Buffer::ints({2, 0, 1, 0, 1, 2}, {1, 1, 2, 3});
  dense.make_gradients(random, true);
  listed.grad_out = dense.grad_out;
  listed.grad_lse = dense.grad_lse;
  for (Attention* a : {&dense, &listed}) {
    a->forward();
    a->backward();
  }
  for (Buffer Attention::* buffer : {&Attention::out, &Attention::lse, &Attention::skip_map,
                                     &Attention::grad_query, &Attention::grad_key, &Attention::grad_value})
    EXPECT_TRUE(same_bytes(dense.*buffer, listed.*buffer));
  EXPECT_EQ(workspace_size(listed.forward_args()), 64u) << "2 by 3 codes";
}

TEST(BlockMask, QuestionsCountWhatIsVisible) {
  Random random(6);
  for (const bool causal : {false, true}) {
    AttentionSetup setup = small_setup();
    setup.options.causal = causal;
    Attention a = Attention::prefill(setup);
    ElementMask mask = give_block_mask(a, {.per_batch = false}, random);
    double pairs = 0;
    std::int64_t tiles = 0;
    for (std::int64_t b = 0; b < setup.batch; ++b)
      for (std::int64_t h = 0; h < setup.num_heads; ++h)
        for (std::int64_t row = 0; row < setup.seqlen_q; row += 64)
          for (std::int64_t key = 0; key < setup.seqlen_k; key += 128) {
            std::int64_t seen = 0;
            for (std::int64_t i = row; i < std::min(row + 64, setup.seqlen_q); ++i)
              for (std::int64_t j = key; j < std::min(key + 128, setup.seqlen_k); ++j)
                seen += mask.at(b, h, i, j) != 0 && (!causal || j <= i + setup.seqlen_k - setup.seqlen_q);
            pairs += static_cast<double>(seen);
            tiles += seen > 0;
          }
    EXPECT_EQ(explain(a.forward_args()).flops, pairs * 2 * (3 + 3));
    a.forward();
    const TileCounts counts = count_tiles(a.forward_args());
    EXPECT_EQ(counts.visible, tiles);
    EXPECT_EQ(counts.kept, tiles) << "a dense map marks every visible tile";
  }
}

using F = Trial<ForwardArgs>;

TEST(BlockMask, RefusesWrongTensors) {
  Random random(7);
  Attention a = Attention::prefill(small_setup());
  give_block_mask(a, {.block_rows = 64}, random);
  a.skip_map = Buffer(DType::int32, skip_map_shape(a.forward_args()));
  const auto mask = [](F& f) -> BlockMask& { return f.in.block_mask; };
  check_table<ForwardArgs>(
      {
          {"no indices",
           kInvalid,
           {"block_mask.kv_indices: missing", "kv_num_blocks"},
           [mask](F& f) { mask(f).kv_indices = {}; },
           [mask](F& f) {
             mask(f).kv_indices = mask(f).kv_num_blocks = mask(f).partial_begin = mask(f).partial_bits = {};
           }},
          {"no counts",
           kInvalid,
           {"block_mask.full_kv_num_blocks: missing", "full_kv_indices"},
           [mask](F& f) { mask(f).full_kv_num_blocks = {}; },
           [mask](F& f) { mask(f).full_kv_num_blocks = mask(f).full_kv_indices = {}; }},
          {"no bits",
           kInvalid,
           {"block_mask.partial_bits: missing", "full_kv_indices"},
           [mask](F& f) { mask(f).partial_bits = {}; }},
          {"no begin",
           kInvalid,
           {"block_mask.partial_begin: missing"},
           [mask](F& f) { mask(f).partial_begin = {}; }},
          {"bits alone",
           kInvalid,
           {"block_mask.kv_num_blocks: missing", "partial_begin"},
           [mask](F& f) { mask(f).kv_num_blocks = mask(f).kv_indices = {}; }},
          {"rank",
           kInvalid,
           {"block_mask.kv_num_blocks: rank 2", "row_blocks"},
           [mask](F& f) { mask(f).kv_num_blocks = reshaped(mask(f).kv_num_blocks, {2, 12}); }},
          {"heads",
           kInvalid,
           {"block_mask.kv_num_blocks: shape [2, 2, 3]", "[2, 4, 3]"},
           [mask](F& f) { mask(f).kv_num_blocks.shape[1] = 2; }},
          {"row blocks",
           kInvalid,
           {"block_mask.full_kv_num_blocks: shape [2, 4, 2]", "[2, 4, 3]", "block_rows"},
           [mask](F& f) { mask(f).full_kv_num_blocks.shape[2] = 2; }},
          {"indices and counts",
           kInvalid,
           {"block_mask.full_kv_indices: shape [1, 4, 3, 5]", "[2, 4, 3, 5]"},
           [mask](F& f) { mask(f).full_kv_indices.shape[0] = 1; }},
          {"dtype",
           kType,
           {"block_mask.kv_num_blocks: dtype int64", "int32"},
           [mask](F& f) { mask(f).kv_num_blocks.dtype = DType::int64; }},
          {"bits shape",
           kInvalid,
           {"block_mask.partial_bits: shape", "block_keys / 32"},
           [mask](F& f) { mask(f).partial_bits.shape[2] = 2; }},
          {"bits strides",
           kInvalid,
           {"block_mask.partial_bits: strides", "contiguous"},
           [mask](F& f) { mask(f).partial_bits.strides[1] = 8; }},
          {"rows",
           kInvalid,
           {"block_mask.block_rows: 96", "multiple of 64"},
           [mask](F& f) { mask(f).block_rows = 96; }},
          {"keys",
           kInvalid,
           {"block_mask.block_keys: 64", "multiple of 128", "head_dim 3"},
           [mask](F& f) { mask(f).block_keys = 64; }},
          {"no rows", kInvalid, {"block_mask.block_rows: 0"}, [mask](F& f) { mask(f).block_rows = 0; }},
          {"size too large",
           kInvalid,
           {"block_mask.block_keys: 1099511627776"},
           [mask](F& f) { mask(f).block_keys = std::int64_t{1} << 40; }},
      },
      a.forward_args());
}

TEST(BlockMask, RefusesWrongEntries) {
  Attention a = Attention::prefill(small_setup());
  a.block_rows = 128;
  a.full_kv_num_blocks = Buffer::ints({2, 0}, {1, 1, 2});
  a.full_kv_indices = Buffer::ints({2, 0, 9, 9}, {1, 1, 2, 2});
  a.kv_num_blocks = Buffer::ints({1, 2}, {1, 1, 2});
  a.kv_indices = Buffer::ints({1, 9, 1, 0}, {1, 1, 2, 2});
  a.partial_begin = Buffer::ints({1, 0}, {1, 1, 2});
  a.partial_bits = Buffer::ints(std::vector<std::int32_t>(2 * 128 * 4, -1), {2, 128, 4});
  a.skip_map = Buffer(DType::int32, skip_map_shape(a.forward_args()));
  const auto mask = [](F& f) -> BlockMask& { return f.in.block_mask; };
  check_table<ForwardArgs>(
      {
          {"count below 0",
           kInvalid,
           {"block_mask.kv_num_blocks[0, 0, 1]: -1", "from 0 to 2"},
           [mask](F& f) { mask(f).kv_num_blocks = f.ints({1, -1}, {1, 1, 2}); },
           [mask](F& f) { mask(f).kv_num_blocks = f.ints({1, 0}, {1, 1, 2}); }},
          {"count above the columns",
           kInvalid,
           {"block_mask.full_kv_num_blocks[0, 0, 0]: 3", "from 0 to 2", "full_kv_indices"},
           [mask](F& f) { mask(f).full_kv_num_blocks = f.ints({3, 0}, {1, 1, 2}); }},
          {"index above",
           kInvalid,
           {"block_mask.full_kv_indices[0, 0, 0, 0]: 3", "from 0 to 2"},
           [mask](F& f) { mask(f).full_kv_indices = f.ints({3, 0, 9, 9}, {1, 1, 2, 2}); }},
          {"index below",
           kInvalid,
           {"block_mask.kv_indices[0, 0, 1, 1]: -1", "from 0 to 2"},
           [mask](F& f) { mask(f).kv_indices = f.ints({1, 9, 1, -1}, {1, 1, 2, 2}); }},
          {"twice in a list",
           kInvalid,
           {"block_mask.kv_indices[0, 0, 1, 1]: 1", "once"},
           [mask](F& f) { mask(f).kv_indices = f.ints({1, 9, 1, 1}, {1, 1, 2, 2}); }},
          {"in both lists",
           kInvalid,
           {"block_mask.full_kv_indices[0, 0, 0, 1]: 1", "once"},
           [mask](F& f) { mask(f).full_kv_indices = f.ints({2, 1, 9, 9}, {1, 1, 2, 2}); }},
          {"begin above",
           kInvalid,
           {"block_mask.partial_begin[0, 0, 1]: 1", "2 blocks", "partial_bits has 2"},
           [mask](F& f) { mask(f).partial_begin = f.ints({1, 1}, {1, 1, 2}); }},
          {"begin below",
           kInvalid,
           {"block_mask.partial_begin[0, 0, 0]: -1"},
           [mask](F& f) { mask(f).partial_begin = f.ints({-1, 0}, {1, 1, 2}); }},
      },
      a.forward_args());
}

TEST(BlockMask, RefusesWhatItDoesNotJoin) {
  Random random(8);
  Attention a = Attention::prefill(small_setup());
  give_block_mask(a, {}, random);
  const AttentionInputs valid = a.inputs();
  const auto refused = [&](auto change, const char* words) {
    ForwardArgs args = a.forward_args();
    change(args);
    try {
      forward(args);
      ADD_FAILURE() << words << ": accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), kUnsupported) << error.what();
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
  };
  Attention packed =
      Attention::prefill({.num_heads = 4, .num_kv_heads = 2, .cu_seqlens_q = {0, 5}, .cu_seqlens_k = {0, 9}});
  refused(
      [&](ForwardArgs& args) {
        args = packed.forward_args();
        args.inputs.block_mask = valid.block_mask;
      },
      "block_mask: not supported together with cu_seqlens_q");
  Attention paged = a.paged(16, random);
  refused([&](ForwardArgs& args) { args = paged.forward_args(); },
          "block_mask: not supported together with page_table");
  Attention decode = Attention::for_decode(small_setup());
  DecodeArgs decode_args = decode.decode_args();
  decode_args.inputs.block_mask = valid.block_mask;
  const Status status = supports(decode_args);
  EXPECT_FALSE(status.ok);
  EXPECT_NE(status.reason.find("block_mask: not supported by decode"), std::string::npos) << status.reason;
}

}  // namespace
}  // namespace fsa::test
