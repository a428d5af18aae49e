// SPDX-License-Identifier: Apache-2.0
// AttentionOptions::compress_block: attention over compressed keys, each visible from the last token of its window on.
#include "test_api_util.h"
#include "test_random.h"

namespace fsa::test {
namespace {

std::int64_t windows(const AttentionOptions& options, std::int64_t tokens) {
  return nsa::compressed_length(tokens, options.compress_block, options.compress_stride);
}

// Batched: `tokens` rows per sequence and their compressed keys.
AttentionSetup batched_setup(std::int64_t tokens, std::int64_t block, std::int64_t stride) {
  AttentionSetup setup;
  setup.batch = 2;
  setup.num_heads = 4;
  setup.num_kv_heads = 2;
  setup.head_dim = 5;
  setup.head_dim_v = 3;
  setup.options.causal = true;
  setup.options.compress_block = block;
  setup.options.compress_stride = stride;
  setup.options.backend = "reference";
  setup.seqlen_q = tokens;
  setup.seqlen_k = windows(setup.options, tokens);
  return setup;
}

void make_packed(AttentionSetup& setup, const std::vector<std::int32_t>& lengths) {
  setup.cu_seqlens_q = setup.cu_seqlens_k = {0};
  for (std::int32_t length : lengths) {
    setup.cu_seqlens_q.push_back(setup.cu_seqlens_q.back() + length);
    setup.cu_seqlens_k.push_back(setup.cu_seqlens_k.back() +
                                 static_cast<std::int32_t>(windows(setup.options, length)));
  }
  setup.batch = static_cast<std::int64_t>(lengths.size());
}

// Equal logits: out is the mean of the values of the windows that end at or before the row.
TEST(CompressedBranch, RowsSeeWindowsThatEnded) {
  AttentionSetup setup = batched_setup(50, 8, 4);
  setup.dtype = DType::float64;
  Attention a = Attention::prefill(setup);
  a.key.fill(0);
  a.forward();
  for (std::int64_t row = 0; row < 50; ++row) {
    std::int64_t seen = 0;
    double sum = 0;
    for (std::int64_t i = 0; i < setup.seqlen_k; ++i)
      if (row >= i * 4 + 7) {
        ++seen;
        sum += a.value.at(1, i, 1, 2);
      }
    EXPECT_NEAR(a.out.at(1, row, 3, 2), seen == 0 ? 0 : sum / static_cast<double>(seen), 1e-12) << row;
    if (seen == 0)
      EXPECT_EQ(a.lse.at(1, 3, row), -kInf) << row;
    else
      EXPECT_NEAR(a.lse.at(1, 3, row), std::log(static_cast<double>(seen)), 1e-12) << row;
  }
}

TEST(CompressedBranch, GradientsOfReference) {
  for (int layout = 0; layout < 3; ++layout) {
    AttentionSetup setup = batched_setup(33, 8, 4);
    setup.dtype = DType::float64;
    setup.sink = layout == 1;
    setup.options.softcap = layout == 1 ? 3 : 0;
    if (layout == 1) make_packed(setup, {12, 0, 3, 8, 29});
    if (layout == 2) {  // the last rows of sequences in a cache
      setup.seqlen_q = 3;
      setup.seqused_k = {17, 33};
    }
    Attention a = Attention::prefill(setup);
    Random random(9);
    a.make_gradients(random, false);
    a.forward();
    a.backward();
    const auto loss = [](const Attention& at) {
      double sum = 0;
      for (std::int64_t i = 0; i < at.out.numel(); ++i) sum += at.out.get(i) * at.grad_out.get(i);
      return sum;
    };
    for (const auto& [input, grad] : {std::pair{&Attention::query, &Attention::grad_query},
                                      {&Attention::key, &Attention::grad_key},
                                      {&Attention::value, &Attention::grad_value}}) {
      Attention up = a, down = a;
      double analytic = 0;
      for (std::int64_t i = 0; i < (a.*input).numel(); ++i) {
        const double step = random.normal();
        (up.*input).put(i, (a.*input).get(i) + 1e-5 * step);
        (down.*input).put(i, (a.*input).get(i) - 1e-5 * step);
        analytic += (a.*grad).get(i) * step;
      }
      up.forward();
      down.forward();
      EXPECT_NEAR((loss(up) - loss(down)) / 2e-5, analytic, 1e-7 * (1 + std::abs(analytic))) << layout;
    }
  }
}

TEST(CompressedBranch, LastRowsAreThoseOfPrefill) {
  for (const char* backend : {"reference", "cpu"}) {
    AttentionSetup setup = batched_setup(300, 32, 16);
    setup.dtype = DType::float32;
    setup.options.backend = backend;
    setup.batch = 1;
    Attention prefill = Attention::prefill(setup);
    prefill.forward();
    for (const std::int64_t tokens : {2, 31, 32, 33, 47, 48, 300}) {
      setup.seqlen_q = 2;
      setup.seqused_k = {static_cast<std::int32_t>(tokens)};
      Attention last = Attention::prefill(setup);
      last.key = prefill.key;
      last.value = prefill.value;
      for (std::int64_t row = 0; row < 2; ++row)
        for (std::int64_t head = 0; head < 4; ++head)
          for (std::int64_t d = 0; d < 5; ++d)
            last.query.set(prefill.query.at(0, tokens - 2 + row, head, d), 0, row, head, d);
      last.forward();
      for (std::int64_t row = 0; row < 2; ++row)
        for (std::int64_t head = 0; head < 4; ++head) {
          const double lse = prefill.lse.at(0, head, tokens - 2 + row);
          if (lse == -kInf)
            EXPECT_EQ(last.lse.at(0, head, row), -kInf) << tokens;
          else
            EXPECT_NEAR(last.lse.at(0, head, row), lse, 1e-5) << tokens;
          for (std::int64_t d = 0; d < 3; ++d)
            EXPECT_NEAR(last.out.at(0, row, head, d), prefill.out.at(0, tokens - 2 + row, head, d), 1e-5)
                << backend << " " << tokens;
        }
    }
  }
}

AttentionSetup random_setup(Random& random) {
  AttentionSetup s;
  s.dtype = any_dtype(random);
  s.batch = 1 + random.below(3);
  s.num_kv_heads = 1 + random.below(3);
  s.num_heads = s.num_kv_heads * any_of(random, {1, 1, 2, 4, 7});
  s.head_dim = any_of(random, {1, 3, 16, 31, 64, 80, 128, 130});
  s.head_dim_v = random.below(3) == 0 ? any_of(random, {1, 5, 17, 64, 136}) : s.head_dim;
  s.options.causal = true;
  s.options.compress_stride = any_of(random, {1, 3, 4, 16, 16, 32});
  s.options.compress_block = s.options.compress_stride * any_of(random, {1, 2, 2, 4});
  if (random.below(4) == 0) s.options.softcap = 2 + random.uniform() * 20;
  s.sink = random.below(4) == 0;
  s.seqlen_q = any_of(random, {1, 15, 17, 64, 65, 200, 500, 1300});
  if (s.options.compress_stride == 1) s.seqlen_q = std::min<std::int64_t>(s.seqlen_q, 300);
  s.seqlen_k = windows(s.options, s.seqlen_q);
  const std::int64_t layout = random.below(4);
  if (layout == 0) {
    std::vector<std::int32_t> lengths;
    for (std::int64_t b = 0; b < s.batch; ++b)
      lengths.push_back(static_cast<std::int32_t>(random.below(s.seqlen_q + 1)));
    make_packed(s, lengths);
    s.spare = random.below(4);
  } else if (layout == 1) {
    const std::int64_t room = s.seqlen_q;
    s.seqlen_q = std::min<std::int64_t>(room, 1 + random.below(70));
    for (std::int64_t b = 0; b < s.batch; ++b)
      s.seqused_k.push_back(static_cast<std::int32_t>(s.seqlen_q + random.below(room - s.seqlen_q + 1)));
  }
  s.seed = random.bits();
  return s;
}

TEST(CompressedBranch, CpuMatchesReference) {
  for (const std::uint64_t seed : seeds(30000, 80)) {
    SCOPED_TRACE(testing::Message() << "FSA_TEST_SEED=" << seed);
    Random random(seed);
    Attention cpu = Attention::prefill(random_setup(random));
    cpu.setup.options.backend = "cpu";
    Attention reference = cpu;
    reference.setup.options.backend = "reference";
    cpu.forward();
    reference.forward();
    EXPECT_TRUE(same_bytes(cpu.skip_map, reference.skip_map)) << "visible tiles differ";
    expect_close(cpu.out, reference.out, tolerance(cpu.setup.dtype), "out", seed);
    expect_close(cpu.lse, reference.lse, 1e-5, "lse", seed);
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
    if (cpu.setup.sink) expect_close(cpu.grad_sink, reference.grad_sink, limit, "grad_sink", seed);
  }
}

TEST(CompressedBranch, ResultsDoNotDependOnThreads) {
  const int before = num_threads();
  AttentionSetup setup = batched_setup(700, 32, 16);
  setup.dtype = DType::float32;
  setup.options.backend = "cpu";
  Attention one = Attention::prefill(setup);
  Random random(1);
  one.make_gradients(random, false);
  Attention many = one;
  set_num_threads(1);
  one.forward();
  one.backward();
  set_num_threads(5);
  many.forward();
  many.backward();
  set_num_threads(before);
  for (Buffer Attention::* buffer : {&Attention::out, &Attention::lse, &Attention::grad_query,
                                     &Attention::grad_key, &Attention::grad_value})
    EXPECT_TRUE(same_bytes(one.*buffer, many.*buffer));
}

TEST(CompressedBranch, Refuses) {
  using F = Trial<ForwardArgs>;
  constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
  constexpr ErrorCode kUnsupported = ErrorCode::unsupported;
  AttentionSetup setup = batched_setup(40, 16, 8);  // 4 windows
  setup.dtype = DType::float32;
  const Attention a = Attention::prefill(setup);
  check_table<ForwardArgs>(
      {
          {"not causal",
           kInvalid,
           {"causal: false", "compress_block is 16", "set causal"},
           [](F& f) { f.args.options.causal = false; }},
          {"stride alone",
           kInvalid,
           {"compress_stride: 8", "compress_block is 0"},
           [](F& f) { f.args.options.compress_block = 0; },
           [](F& f) {
             f.args.options.compress_block = 0;
             f.args.options.compress_stride = 1;
           }},
          {"stride 5",
           kInvalid,
           {"compress_stride: 5", "divide compress_block 16"},
           [](F& f) { f.args.options.compress_stride = 5; }},
          {"block -16", kInvalid, {"compress_block: -16"}, [](F& f) { f.args.options.compress_block = -16; }},
          {"window",
           kUnsupported,
           {"window_left: not supported together with compress_block"},
           [](F& f) { f.args.options.window_left = 3; }},
          {"threshold",
           kUnsupported,
           {"threshold: not supported together with compress_block"},
           [](F& f) { f.args.options.threshold = 0.5; },
           [](F& f) { f.args.options.threshold = 0; }},
          {"gate",
           kUnsupported,
           {"alpha and delta: not supported together with compress_block"},
           [](F& f) {
             f.in.alpha = f.tensor(DType::float32, {2, 40, 4});
             f.in.delta = f.tensor(DType::float32, {2, 4, 2});
           }},
          {"alibi",
           kUnsupported,
           {"alibi_slopes: not supported together with compress_block"},
           [](F& f) { f.in.alibi_slopes = f.tensor(DType::float32, {4}); },
           [](F& f) { f.in.sink = f.tensor(DType::float32, {4}); }},
          {"window_sizes",
           kUnsupported,
           {"window_sizes: not supported together with compress_block"},
           [](F& f) { f.in.window_sizes = f.ints({1, 1, 1, 1, 1, 1, 1, 1}, {2, 4}); }},
          {"too few keys",
           kInvalid,
           {"key: sequence 0 has 3 compressed keys, but its 40 tokens make 4"},
           [](F& f) { f.in.key.shape[1] = f.in.value.shape[1] = 3; }},
          {"seqused_k below the rows",
           kInvalid,
           {"seqused_k[1]: 39 tokens, but the sequence has 40 rows", "counts tokens"},
           [](F& f) { f.in.seqused_k = f.ints({40, 39}); },
           [](F& f) { f.in.seqused_k = f.ints({40, 47}); }},
          {"seqused_k beyond the keys",
           kInvalid,
           {"key: sequence 1 has 4 compressed keys, but its 48 tokens make 5"},
           [](F& f) { f.in.seqused_k = f.ints({40, 48}); }},
      },
      a.forward_args());
}

TEST(CompressedBranch, DecodeAndPagesAreRefused) {
  AttentionSetup setup = batched_setup(40, 16, 8);
  setup.dtype = DType::float32;
  const Attention decode = Attention::for_decode(setup);
  const Status status = supports(decode.decode_args());
  EXPECT_FALSE(status.ok);
  EXPECT_NE(status.reason.find("decode: not supported together with compress_block"), std::string::npos)
      << status.reason;
  Random random(1);
  const Attention paged = Attention::prefill(setup).paged(16, random);
  EXPECT_NE(supports(paged.forward_args()).reason.find("page_table: not supported together"),
            std::string::npos);
}

}  // namespace
}  // namespace fsa::test
