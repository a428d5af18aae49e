// SPDX-License-Identifier: Apache-2.0
// What decode and merge refuse, one case per entry, each with its valid twin.
#include "test_api_util.h"

namespace fsa::test {
namespace {

using D = Trial<DecodeArgs>;
constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr ErrorCode kType = ErrorCode::type_mismatch;
constexpr ErrorCode kUnsupported = ErrorCode::unsupported;

AttentionSetup setup() {
  return {.batch = 2,
          .seqlen_k = 9,
          .num_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 8,
          .head_dim_v = 6,
          .dtype = DType::float32,
          .gate = true};
}

TEST(DecodeRefuses, Queries) {
  const Attention a = Attention::for_decode(setup());
  check_table<DecodeArgs>(
      {
          {"query rank",
           kInvalid,
           {"query: rank 4", "[batch, num_heads, head_dim]"},
           [](D& d) { d.in.query = reshaped(d.in.query, {2, 1, 4, 8}); }},
          {"cu_seqlens_q",
           kInvalid,
           {"cu_seqlens_q", "one query per sequence"},
           [](D& d) { d.in.cu_seqlens_q = d.ints({0, 1, 2}); },
           [](D& d) { d.args.options.causal = true; }},
          {"seqused_q",
           kInvalid,
           {"seqused_q", "one query per sequence"},
           [](D& d) { d.in.seqused_q = d.ints({1, 1}); }},
          {"key batch",
           kInvalid,
           {"key: batch 1, but query has batch 2"},
           [](D& d) { d.in.key.shape[0] = 1; }},
          {"alpha shape",
           kInvalid,
           {"alpha: shape [2, 1, 4], must be [2, 4] = [batch, num_heads]"},
           [](D& d) { d.in.alpha = reshaped(d.in.alpha, {2, 1, 4}); },
           [](D& d) {  // alpha has no row axis, so both layouts agree on it
             d.in.delta = d.tensor(DType::float32, {2, 2, 9});
             d.args.options.gate_layout = GateLayout::bhs;
           }},
          {"delta layout",
           kInvalid,
           {"delta: shape [2, 2, 9], must be [2, 9, 2]", "gate_layout bhs"},
           [](D& d) { d.in.delta = reshaped(d.in.delta, {2, 2, 9}); }},
          {"out shape",
           kInvalid,
           {"out: shape [2, 4, 8], must be [2, 4, 6]"},
           [](D& d) { d.args.out = reshaped(d.args.out, {2, 4, 8}); }},
          {"lse shape",
           kInvalid,
           {"lse: shape [2, 4, 1], must be [2, 4]"},
           [](D& d) { d.args.lse = reshaped(d.args.lse, {2, 4, 1}); },
           [](D& d) { d.args.lse = {}; }},
          {"lse dtype", kType, {"lse: dtype float16"}, [](D& d) { d.args.lse.dtype = DType::float16; }},
          {"num_splits 0",
           kInvalid,
           {"num_splits: 0", "at least 1"},
           [](D& d) { d.args.num_splits = 0; },
           [](D& d) { d.args.num_splits = 1; }},
          {"num_splits below 0",
           kInvalid,
           {"num_splits: -4"},
           [](D& d) { d.args.num_splits = -4; },
           [](D& d) { d.args.num_splits = std::int64_t{1} << 40; }},
          {"seqused_k",
           kInvalid,
           {"seqused_k[1]: 10", "9 keys"},
           [](D& d) { d.in.seqused_k = d.ints({9, 10}); },
           [](D& d) { d.in.seqused_k = d.ints({0, 9}); }},
          {"both window forms",
           kInvalid,
           {"window_sizes", "window_left 3"},
           [](D& d) {
             d.in.window_sizes = d.ints({1, 0, 0, 4, 1, 0, 0, 4}, {2, 4});
             d.args.options.window_left = 3;
           },
           [](D& d) { d.args.options.window_left = 3; }},
      },
      a.decode_args());
}

TEST(DecodeRefuses, PackedCaches) {
  AttentionSetup packed = setup();
  packed.cu_seqlens_k = {0, 4, 9};
  packed.spare = 1;
  const Attention a = Attention::for_decode(packed);
  check_table<DecodeArgs>(
      {
          {"of another batch",
           kInvalid,
           {"cu_seqlens_k: batch 1, but query has batch 2"},
           [](D& d) { d.in.cu_seqlens_k = d.ints({0, 9}); }},
          {"beyond the tensor",
           kInvalid,
           {"cu_seqlens_k[2]: 11", "key has only 10"},
           [](D& d) { d.in.cu_seqlens_k = d.ints({0, 4, 11}); },
           [](D& d) { d.in.cu_seqlens_k = d.ints({0, 4, 10}); }},
          {"delta",
           kInvalid,
           {"delta: shape [2, 10], must be [10, 2]", "gate_layout bhs"},
           [](D& d) { d.in.delta = reshaped(d.in.delta, {2, 10}); },
           [](D& d) {
             d.in.delta = d.tensor(DType::float32, {2, 10});
             d.args.options.gate_layout = GateLayout::bhs;
           }},
          {"max_seqlen_k",
           kInvalid,
           {"max_seqlen_k: 4", "5"},
           [](D& d) { d.args.options.max_seqlen_k = 4; },
           [](D& d) { d.args.options.max_seqlen_k = 5; }},
          {"gathered key beyond its sequence",
           kInvalid,
           {"gather_kv_indices[0, 1]: 4", "sequence 0"},
           [](D& d) { d.in.gather_kv_indices = d.ints({3, 4, 0, 1}, {2, 2}); },
           [](D& d) { d.in.gather_kv_indices = d.ints({3, -1, 4, 1}, {2, 2}); }},
      },
      a.decode_args());
}

TEST(DecodeRefuses, GatheredKeys) {
  const Attention a = Attention::for_decode(setup());
  const auto gather = [](D& d) { d.in.gather_kv_indices = d.ints({0, 8, -1, 5, 5, 2}, {2, 3}); };
  check_table<DecodeArgs>(
      {
          {"too high",
           kInvalid,
           {"gather_kv_indices[1, 0]: 9", "has 9"},
           [](D& d) { d.in.gather_kv_indices = d.ints({0, 8, -1, 9, 5, 2}, {2, 3}); },
           gather},
          {"below -1",
           kInvalid,
           {"gather_kv_indices[0, 2]: -2", "-1 (none)"},
           [](D& d) { d.in.gather_kv_indices = d.ints({0, 8, -2, 1, 5, 2}, {2, 3}); },
           gather},
          {"beyond the used length",
           kInvalid,
           {"gather_kv_indices[0, 1]: 8", "has 8"},
           [&](D& d) {
             gather(d);
             d.in.seqused_k = d.ints({8, 9});
           },
           [&](D& d) {
             gather(d);
             d.in.seqused_k = d.ints({9, 6});
           }},
          {"of another batch",
           kInvalid,
           {"gather_kv_indices: batch 3"},
           [](D& d) { d.in.gather_kv_indices = d.ints({0, 1, 2}, {3, 1}); },
           gather},
          {"rank",
           kInvalid,
           {"gather_kv_indices: rank 1", "[batch, top_k]"},
           [](D& d) { d.in.gather_kv_indices = d.ints({0, 1}); },
           gather},
          {"int64",
           kType,
           {"gather_kv_indices: dtype int64"},
           [&](D& d) {
             gather(d);
             d.in.gather_kv_indices.dtype = DType::int64;
           },
           gather},
          {"window",
           kUnsupported,
           {"gather_kv_indices", "window"},
           [&](D& d) {
             gather(d);
             d.args.options.window_left = 4;
           },
           [&](D& d) {
             gather(d);
             d.args.options.causal = true;
           }},
          {"window_sizes",
           kUnsupported,
           {"gather_kv_indices", "window"},
           [&](D& d) {
             gather(d);
             d.in.window_sizes = d.ints({1, 0, 0, 4, 1, 0, 0, 4}, {2, 4});
           },
           [](D& d) { d.in.window_sizes = d.ints({1, 0, 0, 4, 1, 0, 0, 4}, {2, 4}); }},
          {"page_table",
           kUnsupported,
           {"gather_kv_indices", "page_table"},
           [&](D& d) {
             gather(d);
             d.in.page_table = d.ints({0, 1}, {2, 1});
             d.in.seqused_k = d.ints({9, 9});
           },
           [](D& d) {  // each sequence of the cache as one page
             d.in.page_table = d.ints({0, 1}, {2, 1});
             d.in.seqused_k = d.ints({9, 9});
           }},
      },
      a.decode_args());
}

TEST(DecodeRefuses, Pages) {
  const Attention a = Attention::for_decode(setup());
  const auto pages = [](D& d) {
    d.in.page_table = d.ints({1, 0, 0, -9}, {2, 2});
    d.in.seqused_k = d.ints({18, 3});
  };
  check_table<DecodeArgs>(
      {
          {"entry",
           kInvalid,
           {"page_table[0, 1]: 2", "0 to 1"},
           [&](D& d) {
             pages(d);
             d.in.page_table = d.ints({1, 2, 0, -9}, {2, 2});
           },
           pages},
          {"too long",
           kInvalid,
           {"seqused_k[0]: 19", "18 keys"},
           [&](D& d) {
             pages(d);
             d.in.seqused_k = d.ints({19, 3});
           },
           pages},
          {"delta pages",
           kInvalid,
           {"delta: shape [2, 2, 9], must be [2, 9, 2] = [num_pages, page_size, num_kv_heads]"},
           [&](D& d) {
             pages(d);
             d.in.delta = reshaped(d.in.delta, {2, 2, 9});
           },
           [&](D& d) {
             pages(d);
             d.in.delta = d.tensor(DType::float32, {2, 2, 9});
             d.args.options.gate_layout = GateLayout::bhs;
           }},
          {"packed",
           kInvalid,
           {"page_table", "cu_seqlens_k"},
           [&](D& d) {
             pages(d);
             d.in.cu_seqlens_k = d.ints({0, 4, 9});
           },
           pages},
      },
      a.decode_args());
}

struct Parts {
  Buffer outs{DType::float32, {3, 2, 5, 4, 6}}, lses{DType::float32, {3, 2, 4, 5}};
  Buffer out{DType::float32, {2, 5, 4, 6}}, lse{DType::float32, {2, 4, 5}};

  MergeArgs args() const {
    return {.outs = outs.view(), .lses = lses.view(), .out = out.view(), .lse = lse.view()};
  }
};

struct BadMerge {
  const char* name;
  ErrorCode code;
  const char* words;
  std::function<void(MergeArgs&)> spoil;
};

TEST(MergeRefuses, BadArguments) {
  Parts parts;
  parts.outs.fill(1);
  parts.lses.fill(0);
  const std::vector<BadMerge> table = {
      {"outs", kInvalid, "outs: missing", [](MergeArgs& m) { m.outs = {}; }},
      {"lses", kInvalid, "lses: missing", [](MergeArgs& m) { m.lses = {}; }},
      {"out", kInvalid, "out: missing", [](MergeArgs& m) { m.out = {}; }},
      {"lse", kInvalid, "lse: missing", [](MergeArgs& m) { m.lse = {}; }},
      {"outs rank", kInvalid, "outs: rank 3", [](MergeArgs& m) { m.outs.rank = 3; }},
      {"outs dtype", kType, "outs: dtype int32", [](MergeArgs& m) { m.outs.dtype = DType::int32; }},
      {"no parts", kInvalid, "outs: 0 parts", [](MergeArgs& m) { m.outs.shape[0] = 0; }},
      {"lses parts", kInvalid, "lses: shape [2, 2, 4, 5], must be [3, 2, 4, 5]",
       [](MergeArgs& m) { m.lses.shape[0] = 2; }},
      {"lses transposed", kInvalid, "lses: shape [3, 2, 5, 4], must be [3, 2, 4, 5]",
       [](MergeArgs& m) { m.lses = reshaped(m.lses, {3, 2, 5, 4}); }},
      {"lses dtype", kType, "lses: dtype float64, must be float32",
       [](MergeArgs& m) { m.lses.dtype = DType::float64; }},
      {"lses device", kType, "lses: on cuda:0, but outs is on cpu",
       [](MergeArgs& m) { m.lses.device.kind = DeviceKind::cuda; }},
      {"out shape", kInvalid, "out: shape [3, 2, 5, 4, 6], must be [2, 5, 4, 6]",
       [](MergeArgs& m) { m.out = reshaped(m.out, {3, 2, 5, 4, 6}); }},
      {"out dtype", kType, "out: dtype bfloat16, must be float32",
       [](MergeArgs& m) { m.out.dtype = DType::bfloat16; }},
      {"lse shape", kInvalid, "lse: shape [2, 4], must be [2, 4, 5]", [](MergeArgs& m) { m.lse.rank = 2; }},
      {"outs stride", kInvalid, "outs: stride 2", [](MergeArgs& m) { m.outs.strides[4] = 2; }},
      {"out expanded", kInvalid, "out: expanded", [](MergeArgs& m) { m.out.strides[1] = 0; }},
      {"out is a part", kInvalid, "out: shares memory with outs",
       [](MergeArgs& m) { m.out.data = static_cast<float*>(m.outs.data) + 240; }},
      {"lse in out", kInvalid, "lse: shares memory with out", [](MergeArgs& m) { m.lse.data = m.out.data; }},
      {"on a GPU", kUnsupported, "cuda:0",
       [](MergeArgs& m) {
         for (TensorView* view : {&m.outs, &m.lses, &m.out, &m.lse}) view->device.kind = DeviceKind::cuda;
       }},
  };
  for (const BadMerge& bad : table) {
    ForbiddenMemory memory;
    MergeArgs args = parts.args();
    for (TensorView* view : {&args.outs, &args.lses, &args.out, &args.lse}) memory.hide(*view);
    bad.spoil(args);
    try {
      merge(args);
      ADD_FAILURE() << bad.name << ": accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), bad.code) << bad.name << ": " << error.what();
      EXPECT_NE(std::string(error.what()).find(bad.words), std::string::npos)
          << bad.name << ": " << error.what();
    }
  }
  merge(parts.args());
  EXPECT_EQ(parts.out.at(1, 4, 3, 5), 1);
  EXPECT_NEAR(parts.lse.at(1, 3, 4), std::log(3), 1e-6);
}

TEST(MergeRefuses, NothingOfPackedParts) {
  Buffer outs(DType::bfloat16, {2, 7, 3, 5}), lses(DType::float32, {2, 3, 7});
  Buffer out(DType::bfloat16, {7, 3, 5}), lse(DType::float32, {3, 7});
  outs.fill(2);
  lses.fill(-1);
  merge({.outs = outs.view(), .lses = lses.view(), .out = out.view(), .lse = lse.view()});
  EXPECT_EQ(out.at(6, 2, 4), 2);
  EXPECT_NEAR(lse.at(2, 6), std::log(2) - 1, 1e-6);
}

}  // namespace
}  // namespace fsa::test
