// SPDX-License-Identifier: Apache-2.0
// What the library answers about calls: explain, supports, workspace_size, backends, tiles, and the environment.
#include <cstdlib>

#include "api/problem_builder.h"
#include "core/visibility.h"
#include "test_util.h"

namespace fsa::test {
namespace {

AttentionSetup setup() {
  return {.batch = 2,
          .seqlen_q = 70,
          .seqlen_k = 150,
          .num_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 8,
          .head_dim_v = 6,
          .dtype = DType::float32};
}

// Visible pairs of one head, element by element, with the masks as docs/semantics.md writes them.
double visible_pairs(const AttentionSetup& s, std::int64_t seqlen_q, std::int64_t seqlen_k,
                     std::int64_t kv_head) {
  double pairs = 0;
  for (std::int64_t i = 0; i < seqlen_q; ++i)
    for (std::int64_t j = 0; j < seqlen_k; ++j) {
      const std::int64_t d = i + seqlen_k - seqlen_q - j;
      bool visible = true;
      if (s.options.causal) visible = d >= 0;
      if (s.options.window_left >= 0) visible = visible && d <= s.options.window_left;
      if (s.options.window_right >= 0) visible = visible && -d <= s.options.window_right;
      if (!s.window_sizes.empty()) {
        const auto [sink, left, right, near] = s.window_sizes[kv_head];
        visible = d >= 0 && (d < near || (d >= near + right && d < near + right + left) || j < sink);
      }
      pairs += visible;
    }
  return pairs;
}

TEST(Explain, CountsVisiblePairsExactly) {
  std::vector<AttentionSetup> setups(5, setup());
  setups[1].options.causal = true;
  setups[2].options.window_left = 20;
  setups[2].options.window_right = 3;
  setups[3].window_sizes = {{3, 10, 5, 20}, {0, 30, 0, 7}};
  setups[4].options.causal = true;
  setups[4].seqused_q = {70, 33};
  setups[4].seqused_k = {20, 150};
  for (const AttentionSetup& s : setups) {
    const Attention a = Attention::prefill(s);
    double pairs = 0;
    for (std::int64_t b = 0; b < s.batch; ++b)
      for (std::int64_t head = 0; head < s.num_heads; ++head)
        pairs += visible_pairs(s, a.used_q(b), a.used_k(b), head / 2);
    EXPECT_EQ(explain(a.forward_args()).flops, pairs * 2 * (8 + 6));
    EXPECT_EQ(explain(a.backward_args()).flops, pairs * 5 * (8 + 6));
  }
}

TEST(Explain, CountsPackedSequences) {
  AttentionSetup s = setup();
  s.cu_seqlens_q = {0, 3, 3, 10};
  s.cu_seqlens_k = {0, 5, 9, 10};
  s.batch = 3;
  s.options.causal = true;
  // 3 rows see 3 + 4 + 5 keys; none; 7 rows of which the last sees its one key.
  EXPECT_EQ(explain(Attention::prefill(s).forward_args()).flops, (12 + 0 + 1) * 4 * 2 * 14.0);
}

TEST(Explain, CountsBytesOfEachTensorOnce) {
  const Attention a = Attention::prefill(setup());
  const double query = 2 * 70 * 4 * 8 * 4, key = 2 * 150 * 2 * 8 * 4, value = 2 * 150 * 2 * 6 * 4;
  const double out = 2 * 70 * 4 * 6 * 4, lse = 2 * 4 * 70 * 4;
  EXPECT_EQ(explain(a.forward_args()).bytes, query + key + value + out + lse);
  EXPECT_EQ(explain(a.backward_args()).bytes, 2 * (query + key + value) + 2 * out + lse);
}

TEST(Explain, CountsDecode) {
  AttentionSetup s = setup();
  s.seqused_k = {100, 37};
  EXPECT_EQ(explain(Attention::for_decode(s).decode_args()).flops, 137 * 4 * 2 * 14.0);
  s.options.window_left = 9;
  EXPECT_EQ(explain(Attention::for_decode(s).decode_args()).flops, 20 * 4 * 2 * 14.0);
  s.options.window_left = -1;
  s.gather_kv_indices = {4, -1, 0, 36, 36, -1, -1, 2};
  const Explanation gathered = explain(Attention::for_decode(s).decode_args());
  EXPECT_EQ(gathered.flops, 5 * 4 * 2 * 14.0);
  EXPECT_EQ(gathered.bytes, 4.0 * (2 * 4 * 8 + 5 * 2 * 14 + 2 * 4 * 6 + 2 * 4));
}

TEST(Explain, NamesTheBackendAndWhyNotTheOthers) {
  const Attention a = Attention::prefill(setup());
  ForwardArgs args = a.forward_args();
  const std::vector<BackendInfo> all = backends();
  for (const std::string name : {"", "cpu", "reference"}) {
    args.options.backend = name;
    const Explanation explanation = explain(args);
    EXPECT_EQ(explanation.backend, name == "reference" ? "reference" : "cpu");
    EXPECT_FALSE(explanation.kernel.empty());
    EXPECT_EQ(explanation.threads, num_threads());
    EXPECT_EQ(explanation.workspace_bytes, workspace_size(args));
    EXPECT_EQ(explanation.tile_rows, 64);
    EXPECT_EQ(explanation.tile_keys, 128);
    ASSERT_EQ(explanation.reasons.size(), all.size());
    bool before = true;  // a backend before the chosen one has a reason, those behind it need none
    for (std::size_t i = 0; i < all.size(); ++i) {
      const BackendChoice& choice = explanation.reasons[i];
      EXPECT_EQ(choice.name, all[i].name);
      EXPECT_EQ(choice.chosen, choice.name == explanation.backend);
      before = before && !choice.chosen;
      EXPECT_EQ(choice.reason.empty(), !before) << choice.name << ": " << choice.reason;
    }
  }
}

TEST(Explain, Float64GoesToTheReference) {
  AttentionSetup s = setup();
  s.dtype = DType::float64;
  const Explanation explanation = explain(Attention::prefill(s).forward_args());
  EXPECT_EQ(explanation.backend, "reference");
  for (const BackendChoice& choice : explanation.reasons)
    if (choice.name == "cpu") {
      EXPECT_NE(choice.reason.find("float64"), std::string::npos) << choice.reason;
    }
}

TEST(Backends, AreListedWithTheReferenceLast) {
  const std::vector<BackendInfo> all = backends();
  ASSERT_GE(all.size(), 2u);
  EXPECT_EQ(all[all.size() - 2].name, "cpu");
  EXPECT_EQ(all.back().name, "reference");
  EXPECT_TRUE(all.back().available);
  for (const BackendInfo& backend : all) EXPECT_FALSE(backend.reason.empty()) << backend.name;
  if (all.front().name == "cuda") {
    EXPECT_FALSE(all.front().available);
    const std::string& reason = all.front().reason;
    EXPECT_TRUE(reason.find("libcuda") != std::string::npos || reason.find("cuInit") != std::string::npos ||
                reason.find("no device") != std::string::npos ||
                reason.find("no CUDA kernels") != std::string::npos)
        << reason;
  }
}

TEST(Questions, NeedNoOutputsAndNoData) {
  const Attention a = Attention::prefill(setup());
  ForwardArgs args{.inputs = a.inputs()};
  EXPECT_TRUE(supports(args).ok) << supports(args).reason;
  EXPECT_EQ(workspace_size(args), workspace_size(a.forward_args()));
  BackwardArgs backward_args{.inputs = a.inputs()};
  backward_args.options.threshold = 1;
  EXPECT_TRUE(supports(backward_args).ok);
  EXPECT_EQ(workspace_size(backward_args), explain(backward_args).workspace_bytes);
  for (TensorView* view : {&args.inputs.query, &args.inputs.key, &args.inputs.value}) view->data = nullptr;
  EXPECT_EQ(workspace_size(args), workspace_size(a.forward_args()));
  EXPECT_EQ(skip_map_shape(args), (std::vector<std::int64_t>{2, 4, 2, 1}));
  EXPECT_EQ(explain(args).flops, explain(a.forward_args()).flops);
  EXPECT_NO_THROW(prefill(args));
  EXPECT_FALSE(supports(args).ok);
  EXPECT_NE(supports(args).reason.find("query: data is null"), std::string::npos);
}

TEST(Questions, ShapesOfSkipMaps) {
  using Shape = std::vector<std::int64_t>;
  const auto batched = [](std::int64_t seqlen_k, std::int64_t head_dim) {
    return skip_map_shape(
        {.inputs = {.query = TensorView::contiguous(nullptr, DType::float32, {2, 70, 4, head_dim}),
                    .key = TensorView::contiguous(nullptr, DType::float32, {2, seqlen_k, 2, head_dim}),
                    .value = TensorView::contiguous(nullptr, DType::float32, {2, seqlen_k, 2, 8})}});
  };
  EXPECT_EQ(batched(128 * 32, 128), (Shape{2, 4, 2, 1}));
  EXPECT_EQ(batched(128 * 32 + 1, 128), (Shape{2, 4, 2, 2}));
  EXPECT_EQ(batched(64 * 32, 129), (Shape{2, 4, 2, 1}));
  EXPECT_EQ(batched(64 * 32 + 1, 129), (Shape{2, 4, 2, 2}));
  EXPECT_EQ(batched(0, 64), (Shape{2, 4, 2, 0}));

  AttentionSetup s = setup();
  s.head_dim = 129;
  s.cu_seqlens_q = {0, 100, 130};
  s.cu_seqlens_k = {0, 0, 5};
  EXPECT_EQ(skip_map_shape(Attention::prefill(s).forward_args()), (Shape{4, 2 + 2, 1}));
  s.options.max_seqlen_k = 64 * 32 + 1;
  EXPECT_EQ(skip_map_shape(Attention::prefill(s).forward_args()), (Shape{4, 2 + 2, 2}));
  EXPECT_EQ(skip_tile(128).keys, 128);
  EXPECT_EQ(skip_tile(129).keys, 64);
  EXPECT_EQ(skip_tile(1).rows, 64);
  EXPECT_THROW((void)skip_tile(0), Error);
  EXPECT_THROW((void)skip_tile(513), Error);
}

// Visible tiles element by element; the map's bits are random over them and 0 elsewhere.
void check_counts(const AttentionSetup& s) {
  Attention a = Attention::prefill(s);
  ForwardArgs args = a.forward_args();
  Buffer map(DType::int32, skip_map_shape(args));
  map.fill(0);
  Random random(31);
  TileCounts expected;
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t head = 0; head < s.num_heads; ++head)
      for (std::int64_t row = 0; row < a.used_q(b); row += 64)
        for (std::int64_t key = 0; key < a.used_k(b); key += 128) {
          bool visible = false;
          const std::int64_t row_end = std::min(row + 64, a.used_q(b)),
                             key_end = std::min(key + 128, a.used_k(b));
          const std::int64_t offset = a.used_k(b) - a.used_q(b);
          for (std::int64_t i = row; i < row_end; ++i)
            for (std::int64_t j = key; j < key_end; ++j) {
              const std::int64_t d = i + offset - j;
              if (s.window_sizes.empty()) {
                visible = visible || ((!s.options.causal || d >= 0) &&
                                      (s.options.window_left < 0 || d <= s.options.window_left));
              } else {
                const auto [sink, left, right, near] = s.window_sizes[head / a.group_size()];
                visible =
                    visible ||
                    (d >= 0 && (d < near || (d >= near + right && d < near + right + left) || j < sink));
              }
            }
          if (!visible) continue;
          ++expected.visible;
          if (random.below(2) == 0) continue;
          ++expected.kept;
          const std::int64_t tile = key / 128;
          const std::int64_t word = tile / 32, bit = tile % 32;
          const std::int64_t row_tile = row / 64 + (a.packed_q() ? s.cu_seqlens_q[b] / 64 + b : 0);
          const double old = a.packed_q() ? map.at(head, row_tile, word) : map.at(b, head, row_tile, word);
          const auto bits = static_cast<std::int32_t>(
              static_cast<std::uint32_t>(static_cast<std::int32_t>(old)) | (1u << bit));
          if (a.packed_q())
            map.set(bits, head, row_tile, word);
          else
            map.set(bits, b, head, row_tile, word);
        }
  args.skip_map = map.view();
  for (TensorView* view : {&args.inputs.query, &args.inputs.key, &args.inputs.value, &args.out, &args.lse})
    view->data = nullptr;
  const TileCounts counts = count_tiles(args);
  EXPECT_EQ(counts.visible, expected.visible);
  EXPECT_EQ(counts.kept, expected.kept);
  EXPECT_GT(counts.kept, 0);
  EXPECT_LT(counts.kept, counts.visible);
}

TEST(CountTiles, AgreesWithEnumeration) {
  AttentionSetup s = setup();
  s.seqlen_q = 300;
  s.seqlen_k = 500;
  check_counts(s);
  s.options.causal = true;
  check_counts(s);
  s.options.window_left = 100;
  check_counts(s);
  s.options.window_left = -1;
  s.window_sizes = {{4, 100, 200, 30}, {0, 0, 0, 129}};
  check_counts(s);
  s.seqused_q = {100, 0};
  s.seqused_k = {499, 200};
  check_counts(s);
}

TEST(CountTiles, AgreesWithEnumerationOfPackedSequences) {
  AttentionSetup s = setup();
  s.batch = 3;
  s.num_kv_heads = 1;
  s.cu_seqlens_q = {0, 130, 130, 400};
  s.cu_seqlens_k = {0, 300, 310, 700};
  s.options.causal = true;
  check_counts(s);
}

TEST(CountTiles, NeedsAMapOnTheCpu) {
  const Attention a = Attention::prefill(setup());
  ForwardArgs args = a.forward_args();
  EXPECT_THROW((void)count_tiles(args), Error);
  Buffer map(DType::int32, {2, 4, 2, 1});
  args.skip_map = map.view();
  EXPECT_NO_THROW((void)count_tiles(args));
  args.skip_map.data = nullptr;
  EXPECT_THROW((void)count_tiles(args), Error);
}

TEST(ForwardMap, DenseKeepsEveryVisibleTile) {
  AttentionSetup s = setup();
  s.options.causal = true;
  s.options.backend = "reference";
  Attention a = Attention::prefill(s);
  a.forward();
  const TileCounts counts = count_tiles(a.forward_args());
  EXPECT_EQ(counts.kept, counts.visible);
  EXPECT_EQ(counts.visible,
            2 * 4 * (1 + 2 + 1));  // rows end at key 144 of 150, then at 150: both see two tiles
}

// What a backend gets.

TEST(BuiltProblem, HasSizesDefaultsAndNormalisedStrides) {
  AttentionSetup s = setup();
  s.batch = 1;
  s.gate = s.sink = s.alibi = true;
  s.options.threshold = -3;
  s.options.window_left = std::numeric_limits<std::int64_t>::max();
  const Attention a = Attention::prefill(s);
  const AttentionInputs inputs = a.inputs();
  const Call call = build_call(Operation::forward, inputs, s.options, Purpose::run);
  const Problem& p = call.problem;
  EXPECT_EQ(p.batch, 1);
  EXPECT_EQ(p.group_size, 2);
  EXPECT_EQ(p.max_seqlen_q, 70);
  EXPECT_EQ(p.max_seqlen_k, 150);
  EXPECT_EQ(p.threshold, 0);
  EXPECT_EQ(p.window_left, -1);
  EXPECT_DOUBLE_EQ(p.softmax_scale, 1 / std::sqrt(8.0));
  EXPECT_TRUE(p.has_gate && p.gate_test && p.gate_threshold_default && p.has_sink && p.has_alibi);
  EXPECT_EQ(call.arguments.query.stride_batch, 0) << "a size-1 dimension";
  EXPECT_EQ(call.arguments.query.stride_row, 4 * 8);
  EXPECT_EQ(call.arguments.query.stride_head, 8);
  EXPECT_EQ(call.arguments.query.stride_dim, 1);
  EXPECT_EQ(call.arguments.alpha.stride_row, 4);
  EXPECT_EQ(call.arguments.delta.stride_head, 1);
}

TEST(BuiltProblem, GateTestFollowsTheGateThreshold) {
  AttentionSetup s = setup();
  s.gate = true;
  const Attention a = Attention::prefill(s);
  const AttentionInputs inputs = a.inputs();
  for (const auto& [threshold, test] : {std::pair{0.0, false}, {-2.0, false}, {0.25, true}}) {
    s.options.gate_threshold = threshold;
    const Problem p = build_call(Operation::forward, inputs, s.options, Purpose::run).problem;
    EXPECT_EQ(p.gate_test, test);
    EXPECT_EQ(p.skips_tiles(), test);
    EXPECT_FALSE(p.gate_threshold_default);
  }
}

TEST(BuiltProblem, LongestSequences) {
  AttentionSetup s = setup();
  s.cu_seqlens_q = {0, 3, 40};
  s.cu_seqlens_k = {0, 100, 101};
  s.spare = 5;
  const Attention a = Attention::prefill(s);
  AttentionInputs inputs = a.inputs();
  Problem p = build_call(Operation::forward, inputs, s.options, Purpose::run).problem;
  EXPECT_EQ(p.max_seqlen_q, 37);
  EXPECT_EQ(p.max_seqlen_k, 100);
  EXPECT_EQ(p.total_q, 45);
  EXPECT_EQ(p.total_k, 106);
  s.options.max_seqlen_k = 4000;
  p = build_call(Operation::forward, inputs, s.options, Purpose::run).problem;
  EXPECT_EQ(p.max_seqlen_k, 4000);
  // A bound on the lengths in use is enough; backends still get one on what the tensors hold.
  const Buffer used = Buffer::ints({10, 1});
  inputs.seqused_k = used.view();
  s.options.max_seqlen_k = 10;
  p = build_call(Operation::forward, inputs, s.options, Purpose::run).problem;
  EXPECT_EQ(p.max_seqlen_k, 100);
}

TEST(BuiltProblem, PagesBoundTheKeys) {
  AttentionSetup s = setup();
  Random random(2);
  const Attention a = Attention::prefill(s).paged(16, random);  // 11 pages per sequence
  const AttentionInputs inputs = a.inputs();
  Problem p = build_call(Operation::forward, inputs, s.options, Purpose::run).problem;
  EXPECT_TRUE(p.paged);
  EXPECT_EQ(p.max_seqlen_k, 11 * 16);
  EXPECT_EQ(p.page_size, 16);
  EXPECT_EQ(p.max_pages, 11);
  s.options.max_seqlen_k = 150;
  p = build_call(Operation::forward, inputs, s.options, Purpose::run).problem;
  EXPECT_EQ(p.max_seqlen_k, 150);
}

// The environment is read once, so each value needs a process of its own.

int forward_on_stderr() {
  Attention a = Attention::prefill(setup());
  try {
    a.forward();
  } catch (const Error& error) {
    std::fprintf(stderr, "error %d: %s\n", static_cast<int>(error.code()), error.what());
  }
  return 0;
}

class EnvironmentDeathTest : public testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(EnvironmentDeathTest, BackendIsHonoured) {
  EXPECT_EXIT(
      {
        setenv("FSA_BACKEND", "reference", 1);
        std::fprintf(stderr, "chose %s", explain(Attention::prefill(setup()).forward_args()).backend.c_str());
        std::exit(0);
      },
      testing::ExitedWithCode(0), "chose reference");
  EXPECT_EXIT(
      {
        setenv("FSA_BACKEND", "tpu", 1);
        std::exit(forward_on_stderr());
      },
      testing::ExitedWithCode(0),
      "error 0: FSA_BACKEND: \"tpu\" is not a backend of this build; known: .*cpu, reference");
  EXPECT_EXIT(
      {
        setenv("FSA_BACKEND", "tpu", 1);
        const Attention a = Attention::prefill(setup());
        ForwardArgs args = a.forward_args();
        args.options.backend = "reference";
        std::fprintf(stderr, "chose %s", explain(args).backend.c_str());
        std::exit(0);
      },
      testing::ExitedWithCode(0), "chose reference");
}

TEST_F(EnvironmentDeathTest, DispatchIsLogged) {
  EXPECT_EXIT(
      {
        setenv("FSA_LOG", "dispatch", 1);
        setenv("FSA_BACKEND", "reference", 1);
        std::exit(forward_on_stderr());
      },
      testing::ExitedWithCode(0),
      "fsa: forward float32 batch 2 heads 4/2 seqlen 70x150 head_dim 8/6 -> reference, .*"
      "; cpu: could compute this, but another backend was asked for");
  EXPECT_EXIT(
      {
        setenv("FSA_LOG", "everything", 1);
        std::exit(forward_on_stderr());
      },
      testing::ExitedWithCode(0), "fsa: FSA_LOG: \"everything\" is not known");
}

TEST_F(EnvironmentDeathTest, ThreadsMustBeANumber) {
  EXPECT_EXIT(
      {
        setenv("FSA_NUM_THREADS", "3", 1);
        std::fprintf(stderr, "threads %d", num_threads());
        std::exit(0);
      },
      testing::ExitedWithCode(0), "threads 3");
  for (const char* bad : {"0", "1025", "four", "4x", "-1"})
    EXPECT_EXIT(
        {
          setenv("FSA_NUM_THREADS", bad, 1);
          try {
            std::fprintf(stderr, "threads %d", num_threads());
          } catch (const Error& error) {
            std::fprintf(stderr, "%s", error.what());
          }
          std::exit(0);
        },
        testing::ExitedWithCode(0), "FSA_NUM_THREADS: .* is not a whole number from 1 to 1024");
}

}  // namespace
}  // namespace fsa::test
