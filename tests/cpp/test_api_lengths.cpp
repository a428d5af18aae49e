// SPDX-License-Identifier: Apache-2.0
// What forward refuses of lengths, windows, pages and gates, one case per entry, each with its valid twin (the call as it was, where none is given).
#include "test_api_util.h"

namespace fsa::test {
namespace {

using F = Trial<ForwardArgs>;
constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr ErrorCode kType = ErrorCode::type_mismatch;

Attention make(AttentionSetup setup) {
  Attention a = Attention::prefill(setup);
  a.skip_map = Buffer(DType::int32, skip_map_shape(a.forward_args()));
  return a;
}

AttentionSetup batched_setup() {
  return {.batch = 2,
          .seqlen_q = 5,
          .seqlen_k = 7,
          .num_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 8,
          .head_dim_v = 6,
          .dtype = DType::float32};
}

AttentionSetup gated_setup() {
  AttentionSetup setup = batched_setup();
  setup.gate = setup.sink = setup.alibi = true;
  return setup;
}

AttentionSetup packed_setup() {
  AttentionSetup setup = gated_setup();
  setup.cu_seqlens_q = {0, 3, 5};
  setup.cu_seqlens_k = {0, 4, 9};
  setup.spare = 2;
  return setup;
}

TEST(ForwardRefuses, Windows) {
  const Attention a = make(batched_setup());
  const auto sizes = [](F& f) { f.in.window_sizes = f.ints({1, 2, 1, 2, 0, 0, 0, 3}, {2, 4}); };
  check_table<ForwardArgs>(
      {
          {"both forms",
           kInvalid,
           {"window_sizes", "window_left 2", "window_right 0"},
           [&](F& f) {
             sizes(f);
             f.args.options.window_left = 2;
             f.args.options.window_right = 0;
           },
           sizes},
          {"rows",
           kInvalid,
           {"window_sizes: shape [4, 4]", "[2, 4]"},
           [](F& f) { f.in.window_sizes = f.ints(std::vector<std::int32_t>(16, 1), {4, 4}); },
           sizes},
          {"columns",
           kInvalid,
           {"window_sizes: shape [2, 3]"},
           [](F& f) { f.in.window_sizes = f.ints(std::vector<std::int32_t>(6, 1), {2, 3}); },
           sizes},
          {"rank",
           kInvalid,
           {"window_sizes: shape [8]"},
           [](F& f) { f.in.window_sizes = f.ints(std::vector<std::int32_t>(8, 1)); },
           sizes},
          {"dtype",
           kType,
           {"window_sizes: dtype float32, must be int32"},
           [](F& f) { f.in.window_sizes = f.tensor(DType::float32, {2, 4}); },
           sizes},
          {"negative",
           kInvalid,
           {"window_sizes[1, 2]: -3", "negative"},
           [](F& f) { f.in.window_sizes = f.ints({1, 2, 1, 2, 0, 0, -3, 3}, {2, 4}); },
           [&](F& f) {
             sizes(f);
             f.args.options.causal = true;
           }},
          {"null",
           kInvalid,
           {"window_sizes: data is null"},
           [&](F& f) {
             sizes(f);
             f.in.window_sizes.data = nullptr;
           },
           sizes},
      },
      a.forward_args());
}

TEST(ForwardRefuses, UsedLengths) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>(
      {
          {"negative",
           kInvalid,
           {"seqused_k[1]: -1", "negative"},
           [](F& f) { f.in.seqused_k = f.ints({7, -1}); },
           [](F& f) { f.in.seqused_k = f.ints({7, 0}); }},
          {"too many keys",
           kInvalid,
           {"seqused_k[0]: 8", "7 keys"},
           [](F& f) { f.in.seqused_k = f.ints({8, 1}); },
           [](F& f) { f.in.seqused_k = f.ints({7, 1}); }},
          {"too many rows",
           kInvalid,
           {"seqused_q[1]: 6", "5 rows"},
           [](F& f) { f.in.seqused_q = f.ints({5, 6}); },
           [](F& f) { f.in.seqused_q = f.ints({5, 5}); }},
          {"of another batch",
           kInvalid,
           {"seqused_q: shape [3]", "[2]"},
           [](F& f) { f.in.seqused_q = f.ints({1, 1, 1}); },
           [](F& f) { f.in.seqused_q = f.ints({1, 1}); }},
          {"rank 2",
           kInvalid,
           {"seqused_k: shape [2, 1]"},
           [](F& f) { f.in.seqused_k = f.ints({1, 1}, {2, 1}); }},
          {"int64",
           kType,
           {"seqused_k: dtype int64, must be int32"},
           [](F& f) { (f.in.seqused_k = f.ints({7, 7, 7, 7}, {2})).dtype = DType::int64; },
           [](F& f) { f.in.seqused_k = f.ints({7, 7}); }},
          {"max_seqlen_k below the longest in use",
           kInvalid,
           {"max_seqlen_k: 3", "4"},
           [](F& f) {
             f.in.seqused_k = f.ints({4, 2});
             f.args.options.max_seqlen_k = 3;
           },
           [](F& f) {
             f.in.seqused_k = f.ints({4, 2});
             f.args.options.max_seqlen_k = 4;
           }},
      },
      a.forward_args());
}

TEST(ForwardRefuses, PackedSequences) {
  const Attention a = make(packed_setup());  // 7 rows and 11 keys, 5 and 9 of them in sequences
  check_table<ForwardArgs>(
      {
          {"not from 0",
           kInvalid,
           {"cu_seqlens_q[0]: 1, must be 0"},
           [](F& f) { f.in.cu_seqlens_q = f.ints({1, 3, 5}); }},
          {"decreasing",
           kInvalid,
           {"cu_seqlens_k[2]: 3", "cu_seqlens_k[1] = 4"},
           [](F& f) { f.in.cu_seqlens_k = f.ints({0, 4, 3}); },
           [](F& f) { f.in.cu_seqlens_k = f.ints({0, 4, 4}); }},
          {"beyond the tensor",
           kInvalid,
           {"cu_seqlens_q[2]: 8", "query has only 7"},
           [](F& f) { f.in.cu_seqlens_q = f.ints({0, 3, 8}); },
           [](F& f) { f.in.cu_seqlens_q = f.ints({0, 3, 7}); }},
          {"keys beyond the tensor",
           kInvalid,
           {"cu_seqlens_k[2]: 12", "key has only 11"},
           [](F& f) { f.in.cu_seqlens_k = f.ints({0, 4, 12}); },
           [](F& f) { f.in.cu_seqlens_k = f.ints({0, 4, 11}); }},
          {"of another batch",
           kInvalid,
           {"cu_seqlens_k: batch 3, but cu_seqlens_q has batch 2"},
           [](F& f) { f.in.cu_seqlens_k = f.ints({0, 4, 6, 9}); }},
          {"int64",
           kType,
           {"cu_seqlens_q: dtype int64, must be int32"},
           [](F& f) { f.in.cu_seqlens_q.dtype = DType::int64; }},
          {"rank 2",
           kInvalid,
           {"cu_seqlens_q: rank 2"},
           [](F& f) { f.in.cu_seqlens_q = f.ints({0, 3, 5}, {1, 3}); }},
          {"empty",
           kInvalid,
           {"cu_seqlens_q: shape [0]"},
           [](F& f) { (f.in.cu_seqlens_q = f.ints({0})).shape[0] = 0; }},
          {"null", kInvalid, {"cu_seqlens_q: data is null"}, [](F& f) { f.in.cu_seqlens_q.data = nullptr; }},
          {"packed query alone", kInvalid, {"cu_seqlens_k: missing"}, [](F& f) { f.in.cu_seqlens_k = {}; }},
          {"packed keys alone", kInvalid, {"cu_seqlens_q: missing"}, [](F& f) { f.in.cu_seqlens_q = {}; }},
          {"batched query",
           kInvalid,
           {"query: rank 4", "rank 3"},
           [](F& f) { f.in.query = reshaped(f.in.query, {1, 7, 4, 8}); }},
          {"value rows",
           kInvalid,
           {"value: total_k 10, but key has total_k 11"},
           [](F& f) { f.in.value.shape[0] = 10; }},
          {"max_seqlen_q",
           kInvalid,
           {"max_seqlen_q: 2", "3"},
           [](F& f) { f.args.options.max_seqlen_q = 2; },
           [](F& f) { f.args.options.max_seqlen_q = 3; }},
          {"max_seqlen_k",
           kInvalid,
           {"max_seqlen_k: 4", "5"},
           [](F& f) { f.args.options.max_seqlen_k = 4; },
           [](F& f) { f.args.options.max_seqlen_k = 5; }},
          {"seqused beyond its sequence",
           kInvalid,
           {"seqused_k[0]: 5", "4 keys"},
           [](F& f) { f.in.seqused_k = f.ints({5, 5}); },
           [](F& f) { f.in.seqused_k = f.ints({4, 5}); }},
          {"out of batched shape",
           kInvalid,
           {"out: shape [7, 4, 8], must be [7, 4, 6]"},
           [](F& f) { f.args.out = reshaped(f.args.out, {7, 4, 8}); }},
          {"lse transposed",
           kInvalid,
           {"lse: shape [7, 4], must be [4, 7] = [num_heads, total_q]"},
           [](F& f) { f.args.lse = reshaped(f.args.lse, {7, 4}); }},
          {"skip_map",
           kInvalid,
           {"skip_map: shape [4, 1, 1], must be [4, 2, 1]"},
           [](F& f) { f.args.skip_map.shape[1] = 1; }},
          {"alpha",
           kInvalid,
           {"alpha: shape [4, 7], must be [7, 4]", "gate_layout bhs"},
           [](F& f) { f.in.alpha = reshaped(f.in.alpha, {4, 7}); }},
      },
      a.forward_args());
}

TEST(ForwardRefuses, Pages) {
  Random random(3);
  Attention contiguous = Attention::prefill(batched_setup());
  Attention a = contiguous.paged(4, random);  // 9 pages of 4 keys, 3 per sequence, 2 of them used
  a.skip_map = Buffer(DType::int32, skip_map_shape(a.forward_args()));
  const std::vector<std::int32_t> table = {2, 0, -7, 8, 5, 99};
  const auto with_table = [&](std::size_t at, std::int32_t page) {
    return [table, at, page](F& f) {
      std::vector<std::int32_t> changed = table;
      changed[at] = page;
      f.in.page_table = f.ints(changed, {2, 3});
    };
  };
  check_table<ForwardArgs>(
      {
          {"page too high", kInvalid, {"page_table[1, 0]: 9", "0 to 8"}, with_table(3, 9), with_table(3, 8)},
          {"page below 0",
           kInvalid,
           {"page_table[0, 1]: -1", "0 to 8"},
           with_table(1, -1),
           with_table(2, -1)},
          {"no lengths", kInvalid, {"seqused_k: missing", "page_table"}, [](F& f) { f.in.seqused_k = {}; }},
          {"longer than its pages",
           kInvalid,
           {"seqused_k[0]: 13", "12 keys"},
           [](F& f) { f.in.seqused_k = f.ints({13, 1}); },
           [](F& f) {
             f.in.seqused_k = f.ints({12, 1});
             f.in.page_table = f.ints({0, 1, 2, 3, -7, -7}, {2, 3});
           }},
          {"with packed keys",
           kInvalid,
           {"page_table", "cu_seqlens_k"},
           [](F& f) { f.in.cu_seqlens_q = f.in.cu_seqlens_k = f.ints({0, 1, 2}); }},
          {"of another batch",
           kInvalid,
           {"page_table: batch 1, but query has batch 2"},
           [](F& f) { f.in.page_table.shape[0] = 1; }},
          {"rank 1",
           kInvalid,
           {"page_table: rank 1", "[batch, max_pages]"},
           [](F& f) { f.in.page_table = f.ints({1, 2}); }},
          {"int64", kType, {"page_table: dtype int64"}, [](F& f) { f.in.page_table.dtype = DType::int64; }},
          {"value pages",
           kInvalid,
           {"value: num_pages 8, but key has num_pages 9"},
           [](F& f) { f.in.value.shape[0] = 8; }},
          {"value page size",
           kInvalid,
           {"value: page_size 3, but key has page_size 4"},
           [](F& f) { f.in.value.shape[1] = 3; }},
          {"page size 0",
           kInvalid,
           {"key: page_size 0"},
           [](F& f) { f.in.key.shape[1] = f.in.value.shape[1] = 0; }},
          {"max_seqlen_k",
           kInvalid,
           {"max_seqlen_k: 6", "7"},
           [](F& f) { f.args.options.max_seqlen_k = 6; },
           [](F& f) { f.args.options.max_seqlen_k = 7; }},
          {"gather",
           kInvalid,
           {"gather_kv_indices", "decode"},
           [](F& f) { f.in.gather_kv_indices = f.ints({0, 0}, {2, 1}); }},
      },
      a.forward_args());
}

TEST(ForwardRefuses, Gates) {
  const Attention a = make(gated_setup());
  check_table<ForwardArgs>(
      {
          {"alpha alone",
           kInvalid,
           {"delta: missing"},
           [](F& f) { f.in.delta = {}; },
           [](F& f) { f.in.alpha = f.in.delta = {}; }},
          {"delta alone", kInvalid, {"alpha: missing"}, [](F& f) { f.in.alpha = {}; }},
          {"gate_threshold alone",
           kInvalid,
           {"gate_threshold: 0.5", "alpha and delta"},
           [](F& f) {
             f.in.alpha = f.in.delta = {};
             f.args.options.gate_threshold = 0.5;
           },
           [](F& f) { f.args.options.gate_threshold = 0.5; }},
          {"alpha in the other layout",
           kInvalid,
           {"alpha: shape [2, 4, 5], must be [2, 5, 4]", "gate_layout bhs"},
           [](F& f) { f.in.alpha = reshaped(f.in.alpha, {2, 4, 5}); },
           [](F& f) {
             f.in.alpha = f.tensor(DType::float32, {2, 4, 5});
             f.in.delta = f.tensor(DType::float32, {2, 2, 7});
             f.args.options.gate_layout = GateLayout::bhs;
           }},
          {"delta in the other layout",
           kInvalid,
           {"delta: shape [2, 7, 2], must be [2, 2, 7]", "gate_layout bsh"},
           [](F& f) {
             f.in.alpha = reshaped(f.in.alpha, {2, 4, 5});
             f.args.options.gate_layout = GateLayout::bhs;
           }},
          {"alpha heads",
           kInvalid,
           {"alpha: shape [2, 5, 2]", "[batch, seqlen_q, num_heads]"},
           [](F& f) { f.in.alpha.shape[2] = 2; }},
          {"delta heads",
           kInvalid,
           {"delta: shape [2, 7, 1]", "[batch, seqlen_k, num_kv_heads]"},
           [](F& f) { f.in.delta.shape[2] = 1; }},
          {"delta rank", kInvalid, {"delta: shape [2, 7]"}, [](F& f) { f.in.delta.rank = 2; }},
          {"alpha dtype",
           kType,
           {"alpha: dtype bfloat16", "float32 or float64"},
           [](F& f) { f.in.alpha.dtype = DType::bfloat16; },
           [](F& f) { f.in.alpha = f.tensor(DType::float64, {2, 5, 4}); }},
          {"delta dtype", kType, {"delta: dtype int32"}, [](F& f) { f.in.delta.dtype = DType::int32; }},
          {"sink length",
           kInvalid,
           {"sink: shape [2], must be [4] = [num_heads]"},
           [](F& f) { f.in.sink.shape[0] = 2; }},
          {"sink rank",
           kInvalid,
           {"sink: shape [4, 1]"},
           [](F& f) { f.in.sink = reshaped(f.in.sink, {4, 1}); }},
          {"sink dtype",
           kType,
           {"sink: dtype float16", "float32 or float64"},
           [](F& f) { f.in.sink.dtype = DType::float16; },
           [](F& f) { f.in.sink = f.tensor(DType::float64, {4}); }},
          {"slopes length",
           kInvalid,
           {"alibi_slopes: shape [3]", "[4]"},
           [](F& f) { f.in.alibi_slopes.shape[0] = 3; },
           [](F& f) { f.in.alibi_slopes = f.tensor(DType::float32, {2, 4}); }},
          {"slopes batch",
           kInvalid,
           {"alibi_slopes: shape [3, 4]", "[2, 4]"},
           [](F& f) { f.in.alibi_slopes = f.tensor(DType::float32, {3, 4}); }},
          {"slopes dtype",
           kType,
           {"alibi_slopes: dtype int64"},
           [](F& f) { f.in.alibi_slopes.dtype = DType::int64; }},
      },
      a.forward_args());
}

}  // namespace
}  // namespace fsa::test
