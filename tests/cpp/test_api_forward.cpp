// SPDX-License-Identifier: Apache-2.0
// What forward refuses, one case per entry, each with its valid twin (the call as it was, where none is given).
#include "test_api_util.h"

namespace fsa::test {
namespace {

using F = Trial<ForwardArgs>;
constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr ErrorCode kType = ErrorCode::type_mismatch;
constexpr ErrorCode kUnsupported = ErrorCode::unsupported;

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

TEST(ForwardRefuses, MissingTensors) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>(
      {
          {"query", kInvalid, {"query: missing"}, [](F& f) { f.in.query = {}; }},
          {"key", kInvalid, {"key: missing"}, [](F& f) { f.in.key = {}; }},
          {"value", kInvalid, {"value: missing"}, [](F& f) { f.in.value = {}; }},
          {"out",
           kInvalid,
           {"out: missing"},
           [](F& f) { f.args.out = {}; },
           [](F& f) { f.args.lse = f.args.skip_map = {}; },
           false},
          {"query data",
           kInvalid,
           {"query: data is null", "[2, 5, 4, 8]"},
           [](F& f) { f.in.query.data = nullptr; }},
          {"out data", kInvalid, {"out: data is null"}, [](F& f) { f.args.out.data = nullptr; }},
      },
      a.forward_args());
}

TEST(ForwardRefuses, RanksAndExtents) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>(
      {
          {"query rank 3",
           kInvalid,
           {"query: rank 3", "rank 4", "cu_seqlens_q"},
           [](F& f) { f.in.query.rank = 3; }},
          {"query rank 0", kInvalid, {"query: rank 0"}, [](F& f) { f.in.query.rank = 0; }},
          {"query rank -1", kInvalid, {"query: rank -1"}, [](F& f) { f.in.query.rank = -1; }},
          {"query rank 7", kInvalid, {"query: rank 7", "limit is 6"}, [](F& f) { f.in.query.rank = 7; }},
          {"key rank 3", kInvalid, {"key: rank 3", "rank 4"}, [](F& f) { f.in.key.rank = 3; }},
          {"value rank 5", kInvalid, {"value: rank 5"}, [](F& f) { f.in.value.rank = 5; }},
          {"key batch",
           kInvalid,
           {"key: batch 3, but query has batch 2"},
           [](F& f) { f.in.key.shape[0] = 3; }},
          {"value batch",
           kInvalid,
           {"value: batch 1, but key has batch 2"},
           [](F& f) { f.in.value.shape[0] = 1; }},
          {"value length",
           kInvalid,
           {"value: seqlen_k 6, but key has seqlen_k 7"},
           [](F& f) { f.in.value.shape[1] = 6; },
           [](F& f) { f.in.value.shape[1] = f.in.key.shape[1] = 6; }},
          {"key head_dim",
           kInvalid,
           {"key: head_dim 4, but query has head_dim 8"},
           [](F& f) { f.in.key.shape[3] = 4; },
           [](F& f) { f.in.key.shape[3] = f.in.query.shape[3] = 4; }},
          {"value heads",
           kInvalid,
           {"value: num_kv_heads 1, but key has num_kv_heads 2"},
           [](F& f) { f.in.value.shape[2] = 1; },
           [](F& f) { f.in.value.shape[2] = f.in.key.shape[2] = 1; }},
          {"heads not divisible",
           kInvalid,
           {"num_heads 3", "num_kv_heads 2"},
           [](F& f) { f.in.query.shape[2] = f.args.out.shape[2] = f.args.lse.shape[1] = 3; }},
          {"no heads", kInvalid, {"query: num_heads 0"}, [](F& f) { f.in.query.shape[2] = 0; }},
          {"no key heads",
           kInvalid,
           {"key: num_kv_heads 0"},
           [](F& f) { f.in.key.shape[2] = f.in.value.shape[2] = 0; }},
          {"head_dim 0", kInvalid, {"query: head_dim 0", "512"}, [](F& f) { f.in.query.shape[3] = 0; }},
          {"head_dim 513",
           kInvalid,
           {"query: head_dim 513", "512"},
           [](F& f) { f.in.query = reshaped(f.in.query, {2, 5, 4, 513}); }},
          {"head_dim_v 513",
           kInvalid,
           {"value: head_dim_v 513", "512"},
           [](F& f) { f.in.value = reshaped(f.in.value, {2, 7, 2, 513}); }},
          {"head_dim_v 0", kInvalid, {"value: head_dim_v 0"}, [](F& f) { f.in.value.shape[3] = 0; }},
          {"negative extent",
           kInvalid,
           {"query: shape [2, -5, 4, 8]", "negative"},
           [](F& f) { f.in.query.shape[1] = -5; }},
          {"extent over int32",
           kInvalid,
           {"key: shape [2, 2147483648, 2, 8]", "2147483647"},
           [](F& f) { f.in.key.shape[1] = std::int64_t{1} << 31; }},
          {"too many elements",
           kInvalid,
           {"key: shape", "more elements"},
           [](F& f) {
             TensorView& key = f.in.key;
             key.shape[0] = key.shape[1] = key.shape[2] = 0x7fffffff;
             key.strides[0] = key.strides[1] = key.strides[2] = 0;
           }},
          {"strides out of reach",
           kInvalid,
           {"value: its strides reach"},
           [](F& f) { f.in.value.strides[0] = std::int64_t{1} << 62; }},
          {"misaligned data",
           kInvalid,
           {"key: data is not aligned", "4-byte"},
           [](F& f) { f.in.key.data = static_cast<char*>(f.in.key.data) + 2; }},
      },
      a.forward_args());
}

TEST(ForwardRefuses, DtypesAndDevices) {
  const Attention a = make(batched_setup());
  const Device gpu{DeviceKind::cuda, 1};
  check_table<ForwardArgs>(
      {
          {"query int32",
           kType,
           {"query: dtype int32", "float64, float32, bfloat16 or float16"},
           [](F& f) { f.in.query.dtype = DType::int32; }},
          {"query other", kType, {"query: its dtype"}, [](F& f) { f.in.query.dtype = DType::other; }},
          {"key float64",
           kType,
           {"key: dtype float64", "float32"},
           [](F& f) { f.in.key.dtype = DType::float64; }},
          {"value bfloat16",
           kType,
           {"value: dtype bfloat16", "float32"},
           [](F& f) { f.in.value.dtype = DType::bfloat16; }},
          {"key on a GPU",
           kType,
           {"key: on cuda:1, but query is on cpu"},
           [gpu](F& f) { f.in.key.device = gpu; }},
          {"seqused on a GPU",
           kType,
           {"seqused_k: on cuda:1"},
           [gpu](F& f) {
             f.in.seqused_k = f.ints({7, 7});
             f.in.seqused_k.device = gpu;
           },
           [](F& f) { f.in.seqused_k = f.ints({7, 7}); }},
          {"out on a GPU",
           kType,
           {"out: on cuda:1, but query is on cpu"},
           [gpu](F& f) { f.args.out.device = gpu; }},
          {"unknown device",
           kType,
           {"query: on unknown device 3"},
           [](F& f) { f.in.query.device = {DeviceKind::other, 3}; }},
      },
      a.forward_args());
}

void move_to_gpu(ForwardArgs& args, std::int32_t index) {
  for (TensorView* view : large_tensors(args)) view->device = {DeviceKind::cuda, index};
}

TEST(ForwardRefuses, CudaTensors) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>(
      {
          {"no backend",
           kUnsupported,
           {"cuda:2", "reference: computes on the CPU"},
           [](F& f) { move_to_gpu(f.args, 2); }},
          {"cpu backend",
           kType,
           {"backend: \"cpu\"", "cuda:2"},
           [](F& f) {
             move_to_gpu(f.args, 2);
             f.args.options.backend = "cpu";
           },
           [](F& f) { f.args.options.backend = "cpu"; }},
          {"reference backend",
           kType,
           {"backend: \"reference\"", "cuda:0"},
           [](F& f) {
             move_to_gpu(f.args, 0);
             f.args.options.backend = "reference";
           },
           [](F& f) { f.args.options.backend = "reference"; }},
          {"two GPUs",
           kType,
           {"value: on cuda:1, but query is on cuda:0"},
           [](F& f) {
             move_to_gpu(f.args, 0);
             f.in.value.device.index = 1;
           }},
      },
      a.forward_args());
}

TEST(ForwardRefuses, StridesAndLayoutOfMemory) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>(
      {
          {"query",
           kInvalid,
           {"query: stride 2 of the last dimension, must be 1"},
           [](F& f) { f.in.query.strides[3] = 2; }},
          {"key",
           kInvalid,
           {"key: stride 0 of the last dimension"},
           [](F& f) { f.in.key.strides[3] = 0; },
           [](F& f) { f.in.key.strides[0] = f.in.key.strides[2] = 0; }},
          {"value",
           kInvalid,
           {"value: stride -1 of the last dimension"},
           [](F& f) { f.in.value.strides[3] = -1; }},
          {"out", kInvalid, {"out: stride 3 of the last dimension"}, [](F& f) { f.args.out.strides[3] = 3; }},
          {"lse", kInvalid, {"lse: stride 5 of the last dimension"}, [](F& f) { f.args.lse.strides[2] = 5; }},
          {"expanded out",
           kInvalid,
           {"out: expanded", "dimension 0"},
           [](F& f) { f.args.out.strides[0] = 0; }},
          {"out with shared elements",
           kInvalid,
           {"out: stride", "share memory"},
           [](F& f) { f.args.out.strides[1] = 4; }},
          {"expanded lse",
           kInvalid,
           {"lse: expanded", "dimension 1"},
           [](F& f) { f.args.lse.strides[1] = 0; }},
          {"out is query",
           kInvalid,
           {"out: shares memory with query"},
           [](F& f) { f.args.out.data = f.in.query.data; }},
          {"out within value",
           kInvalid,
           {"out: shares memory with value"},
           [](F& f) { f.args.out.data = static_cast<float*>(f.in.value.data) + 50; }},
          {"lse within out",
           kInvalid,
           {"lse: shares memory with out"},
           [](F& f) { f.args.lse.data = static_cast<float*>(f.args.out.data) + 100; }},
          {"out over seqused_k",
           kInvalid,
           {"out: shares memory with seqused_k"},
           [](F& f) {
             f.in.seqused_k = f.ints({7, 7});
             f.args.out.data = f.in.seqused_k.data;
           },
           [](F& f) { f.in.seqused_k = f.ints({7, 7}); }},
          {"skip_map is lse",
           kInvalid,
           {"skip_map: shares memory with lse"},
           [](F& f) { f.args.skip_map.data = f.args.lse.data; }},
      },
      a.forward_args());
}

TEST(ForwardRefuses, Numbers) {
  const Attention a = make(gated_setup());
  check_table<ForwardArgs>(
      {
          {"scale NaN",
           kInvalid,
           {"softmax_scale: nan", "finite"},
           [](F& f) { f.args.options.softmax_scale = kNan; }},
          {"scale inf",
           kInvalid,
           {"softmax_scale: inf", "finite"},
           [](F& f) { f.args.options.softmax_scale = kInf; }},
          {"scale 0",
           kInvalid,
           {"softmax_scale: 0", "above 0"},
           [](F& f) { f.args.options.softmax_scale = 0; },
           [](F& f) { f.args.options.softmax_scale = 1e-6; }},
          {"scale below 0",
           kInvalid,
           {"softmax_scale: -0.5"},
           [](F& f) { f.args.options.softmax_scale = -0.5; },
           [](F& f) { f.args.options.softmax_scale = 0.5; }},
          {"softcap NaN", kInvalid, {"softcap: nan"}, [](F& f) { f.args.options.softcap = kNan; }},
          {"softcap inf", kInvalid, {"softcap: inf"}, [](F& f) { f.args.options.softcap = kInf; }},
          {"softcap below 0",
           kInvalid,
           {"softcap: -30", "negative"},
           [](F& f) { f.args.options.softcap = -30; },
           [](F& f) { f.args.options.softcap = 30; }},
          {"threshold NaN",
           kInvalid,
           {"threshold: nan"},
           [](F& f) { f.args.options.threshold = kNan; },
           [](F& f) { f.args.options.threshold = 1e30; }},
          {"threshold -inf",
           kInvalid,
           {"threshold: -inf"},
           [](F& f) { f.args.options.threshold = -kInf; },
           [](F& f) { f.args.options.threshold = -128; }},
          {"gate_threshold NaN",
           kInvalid,
           {"gate_threshold: nan"},
           [](F& f) { f.args.options.gate_threshold = kNan; },
           [](F& f) { f.args.options.gate_threshold = -1; }},
          {"gate_threshold inf",
           kInvalid,
           {"gate_threshold: inf"},
           [](F& f) { f.args.options.gate_threshold = kInf; },
           [](F& f) { f.args.options.gate_threshold = 2; }},
          {"window_left",
           kInvalid,
           {"window_left: -2", "-1"},
           [](F& f) { f.args.options.window_left = -2; },
           [](F& f) { f.args.options.window_left = 0; }},
          {"window_right",
           kInvalid,
           {"window_right: -5", "-1"},
           [](F& f) { f.args.options.window_right = -5; },
           [](F& f) { f.args.options.window_right = std::numeric_limits<std::int64_t>::max(); }},
          {"max_seqlen_q",
           kInvalid,
           {"max_seqlen_q: 4", "5"},
           [](F& f) { f.args.options.max_seqlen_q = 4; },
           [](F& f) { f.args.options.max_seqlen_q = 5; }},
          {"max_seqlen_k",
           kInvalid,
           {"max_seqlen_k: 6", "7"},
           [](F& f) { f.args.options.max_seqlen_k = 6; },
           [](F& f) { f.args.options.max_seqlen_k = 100; }},
          {"max_seqlen_k over int32",
           kInvalid,
           {"max_seqlen_k: 4294967296", "2147483647"},
           [](F& f) { f.args.options.max_seqlen_k = std::int64_t{1} << 32; }},
          {"unknown backend",
           kInvalid,
           {"backend: \"avx2\"", "cpu, reference"},
           [](F& f) { f.args.options.backend = "avx2"; },
           [](F& f) { f.args.options.backend = "reference"; }},
          {"backend without CPU tensors",
           kUnsupported,
           {"backend: \"cuda\"", "CPU"},
           [](F& f) { f.args.options.backend = "cuda"; }},
      },
      a.forward_args());
}

TEST(ForwardRefuses, Outputs) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>(
      {
          {"out shape",
           kInvalid,
           {"out: shape [2, 5, 4, 8], must be [2, 5, 4, 6]", "head_dim_v"},
           [](F& f) { f.args.out = reshaped(f.args.out, {2, 5, 4, 8}); }},
          {"out dtype",
           kType,
           {"out: dtype bfloat16, must be float32"},
           [](F& f) { f.args.out.dtype = DType::bfloat16; }},
          {"lse shape",
           kInvalid,
           {"lse: shape [2, 5, 4], must be [2, 4, 5]"},
           [](F& f) { f.args.lse = reshaped(f.args.lse, {2, 5, 4}); },
           [](F& f) { f.args.lse = {}; }},
          {"lse dtype",
           kType,
           {"lse: dtype float64, must be float32"},
           [](F& f) { f.args.lse.dtype = DType::float64; }},
          {"skip_map shape",
           kInvalid,
           {"skip_map: shape [2, 2, 1, 1], must be [2, 4, 1, 1]"},
           [](F& f) { f.args.skip_map.shape[1] = 2; }},
          {"skip_map dtype",
           kType,
           {"skip_map: dtype int64, must be int32"},
           [](F& f) { f.args.skip_map.dtype = DType::int64; },
           [](F& f) { f.args.skip_map = {}; }},
      },
      a.forward_args());
}

}  // namespace
}  // namespace fsa::test
