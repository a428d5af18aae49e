// SPDX-License-Identifier: Apache-2.0
// The vector kernels of native sparse attention against the reference, on random problems: every dtype, group, block
// size, algorithm, layout. One seed is one problem; a failure names it: fsa_tests --gtest_filter='NsaCpu.*' with
// FSA_TEST_SEED=<seed> runs it alone.
#include <limits>

#include "backend/cpu/thread_pool.h"
#include "test_nsa_util.h"

namespace fsa::test {
namespace {

// cu_seqlens of up to four sequences of up to `longest` tokens, some empty.
void make_packed(NsaSetup& s, Random& random, std::int64_t longest) {
  s.cu_seqlens = {0};
  for (std::int64_t b = 1 + random.below(4); b > 0; --b)
    s.cu_seqlens.push_back(s.cu_seqlens.back() + static_cast<std::int32_t>(random.below(longest + 1)));
  s.spare = random.below(4);
}

// Keys with room for more tokens than are in use, and rows that are the last of them.
void make_last_rows(NsaSetup& s, Random& random, std::int64_t longest) {
  s.seqlen = 1 + random.below(3);
  s.room = s.seqlen + random.below(longest);
  for (std::int64_t b = 0; b < s.batch; ++b)
    s.seqused_k.push_back(static_cast<std::int32_t>(s.seqlen + random.below(s.room - s.seqlen + 1)));
}

NsaSetup random_setup(Random& random, std::int64_t longest) {
  NsaSetup s;
  s.backend = "cpu";
  s.dtype = any_dtype(random);
  s.batch = 1 + random.below(3);
  s.seqlen = any_of(random, {1, 15, 16, 17, 63, 64, 65, 100, 200, 333});
  s.seqlen = std::min(s.seqlen, longest);
  const std::int64_t group = any_of(random, {1, 1, 2, 3, 4, 5, 7, 8, 16});
  s.num_kv_heads = 1 + random.below(group > 4 ? 1 : 3);  // the reference is slow
  s.num_heads = s.num_kv_heads * group;
  s.head_dim = any_of(random, {1, 3, 8, 16, 31, 64, 80, 128, 130, 192, 256});
  s.head_dim_v = random.below(2) == 0 ? any_of(random, {1, 5, 17, 64, 136, 256}) : s.head_dim;
  s.block_size = any_of(random, {16, 32, 48, 64, 128, 256});
  s.top_k = 1 + random.below(8);
  if (random.below(4) == 0) s.softmax_scale = 0.1 + random.uniform();
  s.seed = random.bits();
  return s;
}

// Group 64 and long rows are dear in the reference: they come with small heads.
void make_large_group(NsaSetup& s) {
  s.num_kv_heads = 1;
  s.num_heads = 64;
  s.head_dim = std::min<std::int64_t>(s.head_dim, 32);
  s.head_dim_v = std::min<std::int64_t>(s.head_dim_v, 32);
}

NsaSetup random_compression(Random& random) {
  NsaSetup s = random_setup(random, 333);
  const std::int64_t kind = random.below(4);
  s.kind = kind < 2    ? nsa::CompressKind::linear
           : kind == 2 ? nsa::CompressKind::mean
                       : nsa::CompressKind::weighted;
  s.pe = random.below(2) == 0;
  s.compress_stride = any_of(random, {1, 3, 8, 16, 16, 32});
  s.compress_block = s.compress_stride * any_of(random, {1, 2, 2, 4});
  if (s.compress_stride < 8) s.seqlen = std::min<std::int64_t>(s.seqlen, 65);
  if (s.kind == nsa::CompressKind::linear && s.head_dim > 64) s.num_kv_heads = 1;
  if (s.head_dim >= 192) s.seqlen = std::min<std::int64_t>(s.seqlen, 100);
  if (random.below(2) == 0) make_packed(s, random, s.seqlen);
  return s;
}

NsaSetup random_selected(Random& random) {
  NsaSetup s = random_setup(random, 333);
  s.algorithm = std::array{nsa::Algorithm::automatic, nsa::Algorithm::kv_outer,
                           nsa::Algorithm::query_outer}[static_cast<std::size_t>(random.below(3))];
  if (random.below(3) == 0) s.chunk_tokens = any_of(random, {1, 16, 50, 64, 500});
  if (random.below(10) == 0) make_large_group(s);
  const std::int64_t layout = random.below(5);
  if (layout < 2) make_packed(s, random, s.seqlen);
  if (layout == 2) make_last_rows(s, random, 400);
  return s;
}

NsaSetup random_selection(Random& random) {
  NsaSetup s = random_setup(random, 333);
  s.seqlen = any_of(random, {1, 31, 64, 100, 333, 700});
  s.compress_stride = any_of(random, {8, 16, 16, 32});
  s.compress_block = s.compress_stride * any_of(random, {1, 2, 2, 4});
  s.block_size = s.compress_stride * any_of(random, {1, 2, 4, 8});
  s.block_size = std::clamp<std::int64_t>(s.block_size, 16, 256);
  s.init_blocks = random.below(3);
  s.local_blocks = random.below(4);
  s.top_k = std::max<std::int64_t>(1, s.init_blocks + s.local_blocks + random.below(12));
  if (random.below(10) == 0) make_large_group(s);
  const std::int64_t layout = random.below(5);
  if (layout < 2) make_packed(s, random, s.seqlen);
  if (layout == 2) make_last_rows(s, random, 900);
  return s;
}

NsaSetup random_combination(Random& random) {
  NsaSetup s = random_setup(random, 20);
  s.gates_per_head = random.below(2) == 0;
  if (random.below(2) == 0) s.gate_dtype = DType::float32;
  if (random.below(2) == 0) make_packed(s, random, 20);
  return s;
}

// The same problem in float64, computed by the reference: the truth.
template <class Part>
Part truth_of(const Part& part) {
  NsaSetup setup = part.setup;
  setup.dtype = DType::float64;
  setup.backend = "reference";
  Part truth(setup);
  const auto copy = [](const Buffer& from, Buffer& to) {
    for (std::int64_t i = 0; i < from.numel(); ++i) to.put(i, from.get(i));
  };
  for (const auto& [name, input, grad] : Part::gradients())
    if ((part.*input).present()) copy(part.*input, truth.*input);
  copy(part.grad_out, truth.grad_out);
  if constexpr (requires { truth.selected_blocks; }) truth.selected_blocks = part.selected_blocks;
  truth.forward();
  truth.backward();
  return truth;
}

// In 16 bits: the error is at most twice that of float64 arithmetic on the same rounded tensors, plus float32's.
void expect_twice_the_rounding(const Buffer& cpu, const Buffer& rounded, const Buffer& truth,
                               const char* name) {
  double largest = 0;
  for (std::int64_t i = 0; i < truth.numel(); ++i)
    if (std::isfinite(truth.get(i))) largest = std::max(largest, std::abs(truth.get(i)));
  EXPECT_LE(max_difference(cpu, truth),
            2 * max_difference(rounded, truth) + tolerance(DType::float32) * (1 + largest))
      << name;
}

template <class Part>
void expect_twice_the_rounding(const Part& cpu) {
  Part rounded = with_backend(cpu, "reference");
  rounded.forward();
  rounded.backward();
  const Part truth = truth_of(cpu);
  for (const auto& [name, tensor] : Part::outputs())
    expect_twice_the_rounding(cpu.*tensor, rounded.*tensor, truth.*tensor, name);
  for (const auto& [name, input, grad] : Part::gradients())
    if ((cpu.*input).present()) expect_twice_the_rounding(cpu.*grad, rounded.*grad, truth.*grad, name);
}

TEST(NsaCpu, ErrorIsAtMostTwiceTheRounding) {
  for (const std::uint64_t seed : seeds(25000, 40)) {
    SCOPED_TRACE(testing::Message() << "FSA_TEST_SEED=" << seed);
    Random random(seed);
    NsaSetup setup = random_compression(random);
    if (setup.dtype == DType::float32) setup.dtype = DType::bfloat16;
    Compression compression(setup);
    compression.forward();
    compression.backward();
    expect_twice_the_rounding(compression);

    setup = random_selected(random);
    if (setup.dtype == DType::float32) setup.dtype = DType::float16;
    setup.seqlen = std::min<std::int64_t>(setup.seqlen, 100);
    SelectedAttention selected(setup);
    selected.random_blocks(random);
    selected.forward();
    selected.backward();
    expect_twice_the_rounding(selected);

    setup = random_combination(random);
    if (setup.dtype == DType::float32) setup.dtype = DType::bfloat16;
    setup.gate_dtype = DType::float32;
    Combination combination(setup);
    combination.forward();
    combination.backward();
    expect_twice_the_rounding(combination);
  }
}

TEST(NsaCpu, CompressMatchesReference) {
  for (const std::uint64_t seed : seeds(20000, 60)) {
    SCOPED_TRACE(testing::Message() << "FSA_TEST_SEED=" << seed);
    Random random(seed);
    Compression cpu(random_compression(random));
    cpu.forward();
    Compression reference = with_backend(cpu, "reference");
    reference.forward();
    expect_same_outputs(cpu, reference, tolerance(cpu.setup.dtype));
    cpu.backward();
    reference.backward();
    expect_same_gradients(cpu, reference, tolerance(cpu.setup.dtype));
  }
}

TEST(NsaCpu, SelectedAttentionMatchesReference) {
  for (const std::uint64_t seed : seeds(21000, 60)) {
    SCOPED_TRACE(testing::Message() << "FSA_TEST_SEED=" << seed);
    Random random(seed);
    SelectedAttention cpu(random_selected(random));
    cpu.random_blocks(random);
    cpu.forward();
    SelectedAttention reference = with_backend(cpu, "reference");
    reference.forward();
    expect_close(cpu.out, reference.out, tolerance(cpu.setup.dtype), "out", seed);
    expect_close(cpu.lse, reference.lse, 1e-5, "lse", seed);
    reference.out = cpu.out;
    reference.lse = cpu.lse;
    cpu.backward();
    reference.backward();
    expect_same_gradients(cpu, reference, 4 * tolerance(cpu.setup.dtype));
  }
}

struct ThreadsAsBefore {
  int threads = num_threads();
  ~ThreadsAsBefore() { set_num_threads(threads); }
};

// The indices are those of float64 except where scores are equal to 1e-5.
TEST(NsaCpu, SelectionIsTheBest) {
  for (const std::uint64_t seed : seeds(22000, 60)) {
    SCOPED_TRACE(testing::Message() << "FSA_TEST_SEED=" << seed);
    Random random(seed);
    Selection cpu(random_selection(random));
    cpu.run();
    expect_best_blocks(cpu, 1e-5);
    Selection reference = with_backend(cpu, "reference");
    reference.run();
    expect_best_blocks(reference, 1e-12);
  }
}

// out and lse are those of the forward bit by bit, the blocks are the best as above, whatever the number of threads.
void expect_both_in_one_call(Selection selection) {
  const ThreadsAsBefore restore;
  Buffer out = selection.out(), out_of_both = out;
  forward(selection.attention(out, "cpu"));
  const Buffer lse = selection.lse;
  Buffer blocks;
  for (const int threads : {1, 5}) {
    set_num_threads(threads);
    for (Buffer* output : {&out_of_both, &selection.lse, &selection.selected_blocks}) output->poison();
    nsa::attend_and_select(selection.attention(out_of_both, "cpu"), selection.args());
    EXPECT_TRUE(same_bytes(out_of_both, out)) << threads << " threads";
    EXPECT_TRUE(same_bytes(selection.lse, lse)) << threads << " threads";
    expect_best_blocks(selection, 1e-5);
    if (threads == 1) blocks = selection.selected_blocks;
    EXPECT_TRUE(same_bytes(selection.selected_blocks, blocks)) << threads << " threads";
  }
}

TEST(NsaCpu, AttentionAndSelectionInOneCall) {
  for (const std::uint64_t seed : seeds(26000, 60)) {
    SCOPED_TRACE(testing::Message() << "FSA_TEST_SEED=" << seed);
    Random random(seed);
    expect_both_in_one_call(Selection(random_selection(random)));
  }
}

// Several tiles of windows, blocks that lie in two of them, blocks as long as two of them, windows over many blocks.
TEST(NsaCpu, AttentionAndSelectionOverManyTiles) {
  struct Sizes {
    std::int64_t seqlen, compress_block, compress_stride, block_size, group, head_dim;
  };
  for (const Sizes& sizes :
       {Sizes{1700, 8, 4, 16, 1, 16}, Sizes{1300, 16, 4, 16, 2, 8}, Sizes{700, 2, 1, 256, 1, 8},
        Sizes{900, 64, 2, 16, 8, 8}, Sizes{900, 12, 3, 48, 3, 130}, Sizes{600, 4, 2, 64, 9, 8}}) {
    NsaSetup setup{.batch = 1,
                   .seqlen = sizes.seqlen,
                   .num_heads = 2 * sizes.group,
                   .num_kv_heads = 2,
                   .head_dim = sizes.head_dim,
                   .dtype = DType::float32,
                   .compress_block = sizes.compress_block,
                   .compress_stride = sizes.compress_stride,
                   .block_size = sizes.block_size,
                   .top_k = 4,
                   .init_blocks = 1,
                   .local_blocks = 1,
                   .backend = "cpu"};
    SCOPED_TRACE(testing::Message() << "group " << sizes.group << " windows " << sizes.compress_block
                                    << " every " << sizes.compress_stride << " blocks of "
                                    << sizes.block_size);
    Selection selection(setup);
    selection.run();
    expect_best_blocks(selection, 1e-5);
    expect_both_in_one_call(selection);
  }
}

// Lanes without a token have ranks from memory that other calls left behind, NaN among it.
TEST(NsaCpu, SelectionDoesNotDependOnWhatMemoryHolds) {
  const ThreadsAsBefore restore;
  set_num_threads(1);
  const NsaSetup setup{.batch = 1,
                       .seqlen = 2 * 64 + 5,
                       .dtype = DType::float32,
                       .compress_block = 8,
                       .compress_stride = 4,
                       .block_size = 16,
                       .top_k = 3,
                       .init_blocks = 1,
                       .local_blocks = 1,
                       .backend = "cpu"};
  Selection selection(setup);
  const auto leave_nan = [] {
    constexpr std::size_t kFloats = std::size_t{1} << 21;
    std::fill_n(static_cast<float*>(cpu::thread_scratch(kFloats * sizeof(float))), kFloats,
                std::numeric_limits<float>::quiet_NaN());
  };
  leave_nan();
  selection.run();
  expect_best_blocks(selection, 1e-5);
  Buffer out = selection.out();
  leave_nan();
  nsa::attend_and_select(selection.attention(out, "cpu"), selection.args());
  expect_best_blocks(selection, 1e-5);
}

TEST(NsaCpu, AttentionAndSelectionRefuseOthersTensors) {
  const NsaSetup setup{.batch = 1, .seqlen = 100, .block_size = 32, .top_k = 3, .backend = "cpu"};
  const Selection selection(setup), other(setup);
  const Buffer out = selection.out();
  const auto refused = [&](const ForwardArgs& attention, const nsa::SelectBlocksArgs& args,
                           const char* text) {
    try {
      nsa::attend_and_select(attention, args);
      ADD_FAILURE() << "not refused: " << text;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  };
  refused(other.attention(out, "cpu"), selection.args(), "query: not the tensor of the attention");
  ForwardArgs without_lse = selection.attention(out, "cpu");
  without_lse.lse = {};
  refused(without_lse, selection.args(), "lse: not the tensor of the attention");
  ForwardArgs scaled = selection.attention(out, "cpu");
  scaled.options.softmax_scale = 0.5;
  refused(scaled, selection.args(), "softmax_scale must be those of the attention");
}

TEST(NsaCpu, CombineMatchesReference) {
  for (const std::uint64_t seed : seeds(23000, 40)) {
    SCOPED_TRACE(testing::Message() << "FSA_TEST_SEED=" << seed);
    Random random(seed);
    Combination cpu(random_combination(random));
    cpu.forward();
    Combination reference = with_backend(cpu, "reference");
    reference.forward();
    expect_same_outputs(cpu, reference, tolerance(cpu.setup.dtype));
    cpu.backward();
    reference.backward();
    expect_same_gradients(cpu, reference, tolerance(cpu.setup.dtype));
  }
}

// ---- Bit for bit ----

template <class Part>
void expect_independent_of_threads(Part one) {
  Part many = one;
  set_num_threads(1);
  one.forward();
  one.backward();
  set_num_threads(5);
  many.forward();
  many.backward();
  expect_same_bits(one, many);
}

TEST(NsaCpu, ResultsDoNotDependOnThreads) {
  const ThreadsAsBefore restore;
  for (const std::uint64_t seed : seeds(24000, 12)) {
    SCOPED_TRACE(testing::Message() << "FSA_TEST_SEED=" << seed);
    Random random(seed);
    Compression compression(random_compression(random));
    compression.forward();
    expect_independent_of_threads(compression);
    SelectedAttention selected(random_selected(random));
    selected.random_blocks(random);
    expect_independent_of_threads(selected);
    expect_independent_of_threads(Combination(random_combination(random)));
    Selection one(random_selection(random)), many = one;
    set_num_threads(1);
    one.run();
    set_num_threads(5);
    many.run();
    EXPECT_TRUE(same_bytes(one.selected_blocks, many.selected_blocks));
  }
}

template <class Part>
void expect_repeatable(Part part) {
  part.forward();
  part.backward();
  const Part first = part;
  for (int repeat = 0; repeat < 100; ++repeat) {
    part.forward();
    part.backward();
    expect_same_bits(part, first);
    if (testing::Test::HasFailure()) return;
  }
}

TEST(NsaCpu, HundredRepeatsAreEqual) {
  const ThreadsAsBefore restore;
  set_num_threads(4);
  NsaSetup setup{.batch = 2,
                 .seqlen = 300,
                 .num_heads = 4,
                 .num_kv_heads = 2,
                 .head_dim = 16,
                 .head_dim_v = 16,
                 .dtype = DType::float32,
                 .pe = true,
                 .block_size = 32,
                 .backend = "cpu"};
  Compression compression(setup);
  compression.forward();
  expect_repeatable(compression);
  for (const nsa::Algorithm algorithm : {nsa::Algorithm::kv_outer, nsa::Algorithm::query_outer}) {
    setup.algorithm = algorithm;
    Random random(1);
    SelectedAttention selected(setup);
    selected.random_blocks(random);
    expect_repeatable(selected);
  }
  expect_repeatable(Combination(setup));
  Selection selection(setup);
  selection.run();
  const Buffer first = selection.selected_blocks;
  for (int repeat = 0; repeat < 100; ++repeat) {
    selection.run();
    ASSERT_TRUE(same_bytes(selection.selected_blocks, first));
  }
}

}  // namespace
}  // namespace fsa::test
