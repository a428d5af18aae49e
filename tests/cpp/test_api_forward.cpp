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
  return {.batch = 2, .seqlen_q = 5, .seqlen_k = 7, .num_heads = 4, .num_kv_heads = 2, .head_dim = 8,
          .head_dim_v = 6, .dtype = DType::float32};
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

TEST(ForwardRefuses, MissingTensors) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>({
      {"query", kInvalid, {"query: missing"}, [](F& f) { f.args.inputs.query = {}; }},
      {"key", kInvalid, {"key: missing"}, [](F& f) { f.args.inputs.key = {}; }},
      {"value", kInvalid, {"value: missing"}, [](F& f) { f.args.inputs.value = {}; }},
      {"out", kInvalid, {"out: missing"}, [](F& f) { f.args.out = {}; },
       [](F& f) { f.args.lse = f.args.skip_map = {}; }, false},
      {"query data", kInvalid, {"query: data is null", "[2, 5, 4, 8]"}, [](F& f) { f.args.inputs.query.data = nullptr; }},
      {"out data", kInvalid, {"out: data is null"}, [](F& f) { f.args.out.data = nullptr; }},
  }, a.forward_args());
}

TEST(ForwardRefuses, RanksAndExtents) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>({
      {"query rank 3", kInvalid, {"query: rank 3", "rank 4", "cu_seqlens_q"}, [](F& f) { f.args.inputs.query.rank = 3; }},
      {"query rank 0", kInvalid, {"query: rank 0"}, [](F& f) { f.args.inputs.query.rank = 0; }},
      {"query rank -1", kInvalid, {"query: rank -1"}, [](F& f) { f.args.inputs.query.rank = -1; }},
      {"query rank 7", kInvalid, {"query: rank 7", "limit is 6"}, [](F& f) { f.args.inputs.query.rank = 7; }},
      {"key rank 3", kInvalid, {"key: rank 3", "rank 4"}, [](F& f) { f.args.inputs.key.rank = 3; }},
      {"value rank 5", kInvalid, {"value: rank 5"}, [](F& f) { f.args.inputs.value.rank = 5; }},
      {"key batch", kInvalid, {"key: batch 3, but query has batch 2"}, [](F& f) { f.args.inputs.key.shape[0] = 3; }},
      {"value batch", kInvalid, {"value: batch 1, but key has batch 2"}, [](F& f) { f.args.inputs.value.shape[0] = 1; }},
      {"value length", kInvalid, {"value: seqlen_k 6, but key has seqlen_k 7"},
       [](F& f) { f.args.inputs.value.shape[1] = 6; },
       [](F& f) { f.args.inputs.value.shape[1] = f.args.inputs.key.shape[1] = 6; }},
      {"key head_dim", kInvalid, {"key: head_dim 4, but query has head_dim 8"},
       [](F& f) { f.args.inputs.key.shape[3] = 4; },
       [](F& f) { f.args.inputs.key.shape[3] = f.args.inputs.query.shape[3] = 4; }},
      {"value heads", kInvalid, {"value: num_kv_heads 1, but key has num_kv_heads 2"},
       [](F& f) { f.args.inputs.value.shape[2] = 1; },
       [](F& f) { f.args.inputs.value.shape[2] = f.args.inputs.key.shape[2] = 1; }},
      {"heads not divisible", kInvalid, {"num_heads 3", "num_kv_heads 2"},
       [](F& f) { f.args.inputs.query.shape[2] = f.args.out.shape[2] = f.args.lse.shape[1] = 3; }},
      {"no heads", kInvalid, {"query: num_heads 0"}, [](F& f) { f.args.inputs.query.shape[2] = 0; }},
      {"no key heads", kInvalid, {"key: num_kv_heads 0"},
       [](F& f) { f.args.inputs.key.shape[2] = f.args.inputs.value.shape[2] = 0; }},
      {"head_dim 0", kInvalid, {"query: head_dim 0", "512"}, [](F& f) { f.args.inputs.query.shape[3] = 0; }},
      {"head_dim 513", kInvalid, {"query: head_dim 513", "512"},
       [](F& f) { f.args.inputs.query = TensorView::contiguous(f.args.inputs.query.data, DType::float32, {2, 5, 4, 513}); }},
      {"head_dim_v 513", kInvalid, {"value: head_dim_v 513", "512"},
       [](F& f) { f.args.inputs.value = TensorView::contiguous(f.args.inputs.value.data, DType::float32, {2, 7, 2, 513}); }},
      {"head_dim_v 0", kInvalid, {"value: head_dim_v 0"}, [](F& f) { f.args.inputs.value.shape[3] = 0; }},
      {"negative extent", kInvalid, {"query: shape [2, -5, 4, 8]", "negative"}, [](F& f) { f.args.inputs.query.shape[1] = -5; }},
      {"extent over int32", kInvalid, {"key: shape [2, 2147483648, 2, 8]", "2147483647"},
       [](F& f) { f.args.inputs.key.shape[1] = std::int64_t{1} << 31; }},
      {"too many elements", kInvalid, {"key: shape", "more elements"},
       [](F& f) {
         TensorView& key = f.args.inputs.key;
         key.shape[0] = key.shape[1] = key.shape[2] = 0x7fffffff;
         key.strides[0] = key.strides[1] = key.strides[2] = 0;
       }},
      {"strides out of reach", kInvalid, {"value: its strides reach"},
       [](F& f) { f.args.inputs.value.strides[0] = std::int64_t{1} << 62; }},
      {"misaligned data", kInvalid, {"key: data is not aligned", "4-byte"},
       [](F& f) { f.args.inputs.key.data = static_cast<char*>(f.args.inputs.key.data) + 2; }},
  }, a.forward_args());
}

TEST(ForwardRefuses, DtypesAndDevices) {
  const Attention a = make(batched_setup());
  const Device gpu{DeviceKind::cuda, 1};
  check_table<ForwardArgs>({
      {"query int32", kType, {"query: dtype int32", "float64, float32, bfloat16 or float16"},
       [](F& f) { f.args.inputs.query.dtype = DType::int32; }},
      {"query other", kType, {"query: its dtype"}, [](F& f) { f.args.inputs.query.dtype = DType::other; }},
      {"key float64", kType, {"key: dtype float64", "float32"}, [](F& f) { f.args.inputs.key.dtype = DType::float64; }},
      {"value bfloat16", kType, {"value: dtype bfloat16", "float32"},
       [](F& f) { f.args.inputs.value.dtype = DType::bfloat16; }},
      {"key on a GPU", kType, {"key: on cuda:1, but query is on cpu"},
       [gpu](F& f) { f.args.inputs.key.device = gpu; }},
      {"seqused on a GPU", kType, {"seqused_k: on cuda:1"},
       [gpu](F& f) {
         f.args.inputs.seqused_k = f.ints({7, 7});
         f.args.inputs.seqused_k.device = gpu;
       },
       [](F& f) { f.args.inputs.seqused_k = f.ints({7, 7}); }},
      {"out on a GPU", kType, {"out: on cuda:1, but query is on cpu"}, [gpu](F& f) { f.args.out.device = gpu; }},
      {"unknown device", kType, {"query: on unknown device 3"},
       [](F& f) { f.args.inputs.query.device = {DeviceKind::other, 3}; }},
  }, a.forward_args());
}

void move_to_gpu(ForwardArgs& args, std::int32_t index) {
  for (TensorView* view : large_tensors(args)) view->device = {DeviceKind::cuda, index};
}

TEST(ForwardRefuses, CudaTensors) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>({
      {"no backend", kUnsupported, {"cuda:2", "reference computes on the CPU"}, [](F& f) { move_to_gpu(f.args, 2); }},
      {"cpu backend", kType, {"backend: \"cpu\"", "cuda:2"},
       [](F& f) {
         move_to_gpu(f.args, 2);
         f.args.options.backend = "cpu";
       },
       [](F& f) { f.args.options.backend = "cpu"; }},
      {"reference backend", kType, {"backend: \"reference\"", "cuda:0"},
       [](F& f) {
         move_to_gpu(f.args, 0);
         f.args.options.backend = "reference";
       },
       [](F& f) { f.args.options.backend = "reference"; }},
      {"two GPUs", kType, {"value: on cuda:1, but query is on cuda:0"},
       [](F& f) {
         move_to_gpu(f.args, 0);
         f.args.inputs.value.device.index = 1;
       }},
  }, a.forward_args());
}

TEST(ForwardRefuses, StridesAndLayoutOfMemory) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>({
      {"query", kInvalid, {"query: stride 2 of the last dimension, must be 1"},
       [](F& f) { f.args.inputs.query.strides[3] = 2; }},
      {"key", kInvalid, {"key: stride 0 of the last dimension"}, [](F& f) { f.args.inputs.key.strides[3] = 0; },
       [](F& f) { f.args.inputs.key.strides[0] = f.args.inputs.key.strides[2] = 0; }},
      {"value", kInvalid, {"value: stride -1 of the last dimension"}, [](F& f) { f.args.inputs.value.strides[3] = -1; }},
      {"out", kInvalid, {"out: stride 3 of the last dimension"}, [](F& f) { f.args.out.strides[3] = 3; }},
      {"lse", kInvalid, {"lse: stride 5 of the last dimension"}, [](F& f) { f.args.lse.strides[2] = 5; }},
      {"expanded out", kInvalid, {"out: expanded", "dimension 0"}, [](F& f) { f.args.out.strides[0] = 0; }},
      {"out with shared elements", kInvalid, {"out: stride", "share memory"}, [](F& f) { f.args.out.strides[1] = 4; }},
      {"expanded lse", kInvalid, {"lse: expanded", "dimension 1"}, [](F& f) { f.args.lse.strides[1] = 0; }},
      {"out is query", kInvalid, {"out: shares memory with query"},
       [](F& f) { f.args.out.data = f.args.inputs.query.data; }},
      {"out within value", kInvalid, {"out: shares memory with value"},
       [](F& f) { f.args.out.data = static_cast<float*>(f.args.inputs.value.data) + 50; }},
      {"lse within out", kInvalid, {"lse: shares memory with out"},
       [](F& f) { f.args.lse.data = static_cast<float*>(f.args.out.data) + 100; }},
      {"out over seqused_k", kInvalid, {"out: shares memory with seqused_k"},
       [](F& f) {
         f.args.inputs.seqused_k = f.ints({7, 7});
         f.args.out.data = f.args.inputs.seqused_k.data;
       },
       [](F& f) { f.args.inputs.seqused_k = f.ints({7, 7}); }},
      {"skip_map is lse", kInvalid, {"skip_map: shares memory with lse"},
       [](F& f) { f.args.skip_map.data = f.args.lse.data; }},
  }, a.forward_args());
}

TEST(ForwardRefuses, Numbers) {
  const Attention a = make(gated_setup());
  check_table<ForwardArgs>({
      {"scale NaN", kInvalid, {"softmax_scale: nan", "finite"}, [](F& f) { f.args.options.softmax_scale = kNan; }},
      {"scale inf", kInvalid, {"softmax_scale: inf", "finite"}, [](F& f) { f.args.options.softmax_scale = kInf; }},
      {"scale 0", kInvalid, {"softmax_scale: 0", "above 0"}, [](F& f) { f.args.options.softmax_scale = 0; },
       [](F& f) { f.args.options.softmax_scale = 1e-6; }},
      {"scale below 0", kInvalid, {"softmax_scale: -0.5"}, [](F& f) { f.args.options.softmax_scale = -0.5; },
       [](F& f) { f.args.options.softmax_scale = 0.5; }},
      {"softcap NaN", kInvalid, {"softcap: nan"}, [](F& f) { f.args.options.softcap = kNan; }},
      {"softcap inf", kInvalid, {"softcap: inf"}, [](F& f) { f.args.options.softcap = kInf; }},
      {"softcap below 0", kInvalid, {"softcap: -30", "negative"}, [](F& f) { f.args.options.softcap = -30; },
       [](F& f) { f.args.options.softcap = 30; }},
      {"threshold NaN", kInvalid, {"threshold: nan"}, [](F& f) { f.args.options.threshold = kNan; },
       [](F& f) { f.args.options.threshold = 1e30; }},
      {"threshold -inf", kInvalid, {"threshold: -inf"}, [](F& f) { f.args.options.threshold = -kInf; },
       [](F& f) { f.args.options.threshold = -128; }},
      {"gate_threshold NaN", kInvalid, {"gate_threshold: nan"}, [](F& f) { f.args.options.gate_threshold = kNan; },
       [](F& f) { f.args.options.gate_threshold = -1; }},
      {"gate_threshold inf", kInvalid, {"gate_threshold: inf"}, [](F& f) { f.args.options.gate_threshold = kInf; },
       [](F& f) { f.args.options.gate_threshold = 2; }},
      {"window_left", kInvalid, {"window_left: -2", "-1"}, [](F& f) { f.args.options.window_left = -2; },
       [](F& f) { f.args.options.window_left = 0; }},
      {"window_right", kInvalid, {"window_right: -5", "-1"}, [](F& f) { f.args.options.window_right = -5; },
       [](F& f) { f.args.options.window_right = std::numeric_limits<std::int64_t>::max(); }},
      {"max_seqlen_q", kInvalid, {"max_seqlen_q: 4", "5"}, [](F& f) { f.args.options.max_seqlen_q = 4; },
       [](F& f) { f.args.options.max_seqlen_q = 5; }},
      {"max_seqlen_k", kInvalid, {"max_seqlen_k: 6", "7"}, [](F& f) { f.args.options.max_seqlen_k = 6; },
       [](F& f) { f.args.options.max_seqlen_k = 100; }},
      {"max_seqlen_k over int32", kInvalid, {"max_seqlen_k: 4294967296", "2147483647"},
       [](F& f) { f.args.options.max_seqlen_k = std::int64_t{1} << 32; }},
      {"unknown backend", kInvalid, {"backend: \"avx2\"", "cpu, reference"}, [](F& f) { f.args.options.backend = "avx2"; },
       [](F& f) { f.args.options.backend = "reference"; }},
      {"backend without CPU tensors", kUnsupported, {"backend: \"cuda\"", "CPU"},
       [](F& f) { f.args.options.backend = "cuda"; }},
  }, a.forward_args());
}

TEST(ForwardRefuses, Windows) {
  const Attention a = make(batched_setup());
  const auto sizes = [](F& f) { f.args.inputs.window_sizes = f.ints({1, 2, 1, 2, 0, 0, 0, 3}, {2, 4}); };
  check_table<ForwardArgs>({
      {"both forms", kInvalid, {"window_sizes", "window_left 2", "window_right 0"},
       [&](F& f) {
         sizes(f);
         f.args.options.window_left = 2;
         f.args.options.window_right = 0;
       }, sizes},
      {"rows", kInvalid, {"window_sizes: shape [4, 4]", "[2, 4]"},
       [](F& f) { f.args.inputs.window_sizes = f.ints(std::vector<std::int32_t>(16, 1), {4, 4}); }, sizes},
      {"columns", kInvalid, {"window_sizes: shape [2, 3]"},
       [](F& f) { f.args.inputs.window_sizes = f.ints(std::vector<std::int32_t>(6, 1), {2, 3}); }, sizes},
      {"rank", kInvalid, {"window_sizes: shape [8]"},
       [](F& f) { f.args.inputs.window_sizes = f.ints(std::vector<std::int32_t>(8, 1)); }, sizes},
      {"dtype", kType, {"window_sizes: dtype float32, must be int32"},
       [](F& f) { f.args.inputs.window_sizes = f.tensor(DType::float32, {2, 4}); }, sizes},
      {"negative", kInvalid, {"window_sizes[1, 2]: -3", "negative"},
       [](F& f) { f.args.inputs.window_sizes = f.ints({1, 2, 1, 2, 0, 0, -3, 3}, {2, 4}); },
       [&](F& f) {
         sizes(f);
         f.args.options.causal = true;
       }},
      {"null", kInvalid, {"window_sizes: data is null"},
       [&](F& f) {
         sizes(f);
         f.args.inputs.window_sizes.data = nullptr;
       }, sizes},
  }, a.forward_args());
}

TEST(ForwardRefuses, UsedLengths) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>({
      {"negative", kInvalid, {"seqused_k[1]: -1", "negative"}, [](F& f) { f.args.inputs.seqused_k = f.ints({7, -1}); },
       [](F& f) { f.args.inputs.seqused_k = f.ints({7, 0}); }},
      {"too many keys", kInvalid, {"seqused_k[0]: 8", "7 keys"}, [](F& f) { f.args.inputs.seqused_k = f.ints({8, 1}); },
       [](F& f) { f.args.inputs.seqused_k = f.ints({7, 1}); }},
      {"too many rows", kInvalid, {"seqused_q[1]: 6", "5 rows"}, [](F& f) { f.args.inputs.seqused_q = f.ints({5, 6}); },
       [](F& f) { f.args.inputs.seqused_q = f.ints({5, 5}); }},
      {"of another batch", kInvalid, {"seqused_q: shape [3]", "[2]"},
       [](F& f) { f.args.inputs.seqused_q = f.ints({1, 1, 1}); }, [](F& f) { f.args.inputs.seqused_q = f.ints({1, 1}); }},
      {"rank 2", kInvalid, {"seqused_k: shape [2, 1]"}, [](F& f) { f.args.inputs.seqused_k = f.ints({1, 1}, {2, 1}); }},
      {"int64", kType, {"seqused_k: dtype int64, must be int32"},
       [](F& f) { (f.args.inputs.seqused_k = f.ints({7, 7, 7, 7}, {2})).dtype = DType::int64; },
       [](F& f) { f.args.inputs.seqused_k = f.ints({7, 7}); }},
      {"max_seqlen_k below the longest in use", kInvalid, {"max_seqlen_k: 3", "4"},
       [](F& f) {
         f.args.inputs.seqused_k = f.ints({4, 2});
         f.args.options.max_seqlen_k = 3;
       },
       [](F& f) {
         f.args.inputs.seqused_k = f.ints({4, 2});
         f.args.options.max_seqlen_k = 4;
       }},
  }, a.forward_args());
}

TEST(ForwardRefuses, PackedSequences) {
  const Attention a = make(packed_setup());  // 7 rows and 11 keys, 5 and 9 of them in sequences
  check_table<ForwardArgs>({
      {"not from 0", kInvalid, {"cu_seqlens_q[0]: 1, must be 0"},
       [](F& f) { f.args.inputs.cu_seqlens_q = f.ints({1, 3, 5}); }},
      {"decreasing", kInvalid, {"cu_seqlens_k[2]: 3", "cu_seqlens_k[1] = 4"},
       [](F& f) { f.args.inputs.cu_seqlens_k = f.ints({0, 4, 3}); },
       [](F& f) { f.args.inputs.cu_seqlens_k = f.ints({0, 4, 4}); }},
      {"beyond the tensor", kInvalid, {"cu_seqlens_q[2]: 8", "query has only 7"},
       [](F& f) { f.args.inputs.cu_seqlens_q = f.ints({0, 3, 8}); },
       [](F& f) { f.args.inputs.cu_seqlens_q = f.ints({0, 3, 7}); }},
      {"keys beyond the tensor", kInvalid, {"cu_seqlens_k[2]: 12", "key has only 11"},
       [](F& f) { f.args.inputs.cu_seqlens_k = f.ints({0, 4, 12}); },
       [](F& f) { f.args.inputs.cu_seqlens_k = f.ints({0, 4, 11}); }},
      {"of another batch", kInvalid, {"cu_seqlens_k: batch 3, but cu_seqlens_q has batch 2"},
       [](F& f) { f.args.inputs.cu_seqlens_k = f.ints({0, 4, 6, 9}); }},
      {"int64", kType, {"cu_seqlens_q: dtype int64, must be int32"},
       [](F& f) { f.args.inputs.cu_seqlens_q.dtype = DType::int64; }},
      {"rank 2", kInvalid, {"cu_seqlens_q: rank 2"}, [](F& f) { f.args.inputs.cu_seqlens_q = f.ints({0, 3, 5}, {1, 3}); }},
      {"empty", kInvalid, {"cu_seqlens_q: shape [0]"},
       [](F& f) { (f.args.inputs.cu_seqlens_q = f.ints({0})).shape[0] = 0; }},
      {"null", kInvalid, {"cu_seqlens_q: data is null"}, [](F& f) { f.args.inputs.cu_seqlens_q.data = nullptr; }},
      {"packed query alone", kInvalid, {"cu_seqlens_k: missing"}, [](F& f) { f.args.inputs.cu_seqlens_k = {}; }},
      {"packed keys alone", kInvalid, {"cu_seqlens_q: missing"}, [](F& f) { f.args.inputs.cu_seqlens_q = {}; }},
      {"batched query", kInvalid, {"query: rank 4", "rank 3"},
       [](F& f) { f.args.inputs.query = TensorView::contiguous(f.args.inputs.query.data, DType::float32, {1, 7, 4, 8}); }},
      {"value rows", kInvalid, {"value: total_k 10, but key has total_k 11"},
       [](F& f) { f.args.inputs.value.shape[0] = 10; }},
      {"max_seqlen_q", kInvalid, {"max_seqlen_q: 2", "3"}, [](F& f) { f.args.options.max_seqlen_q = 2; },
       [](F& f) { f.args.options.max_seqlen_q = 3; }},
      {"max_seqlen_k", kInvalid, {"max_seqlen_k: 4", "5"}, [](F& f) { f.args.options.max_seqlen_k = 4; },
       [](F& f) { f.args.options.max_seqlen_k = 5; }},
      {"seqused beyond its sequence", kInvalid, {"seqused_k[0]: 5", "4 keys"},
       [](F& f) { f.args.inputs.seqused_k = f.ints({5, 5}); }, [](F& f) { f.args.inputs.seqused_k = f.ints({4, 5}); }},
      {"out of batched shape", kInvalid, {"out: shape [7, 4, 8], must be [7, 4, 6]"},
       [](F& f) { f.args.out = TensorView::contiguous(f.args.out.data, DType::float32, {7, 4, 8}); }},
      {"lse transposed", kInvalid, {"lse: shape [7, 4], must be [4, 7] = [num_heads, total_q]"},
       [](F& f) { f.args.lse = TensorView::contiguous(f.args.lse.data, DType::float32, {7, 4}); }},
      {"skip_map", kInvalid, {"skip_map: shape [4, 1, 1], must be [4, 2, 1]"}, [](F& f) { f.args.skip_map.shape[1] = 1; }},
      {"alpha", kInvalid, {"alpha: shape [4, 7], must be [7, 4]", "gate_layout bhs"},
       [](F& f) { f.args.inputs.alpha = TensorView::contiguous(f.args.inputs.alpha.data, DType::float32, {4, 7}); }},
  }, a.forward_args());
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
      f.args.inputs.page_table = f.ints(changed, {2, 3});
    };
  };
  check_table<ForwardArgs>({
      {"page too high", kInvalid, {"page_table[1, 0]: 9", "0 to 8"}, with_table(3, 9), with_table(3, 8)},
      {"page below 0", kInvalid, {"page_table[0, 1]: -1", "0 to 8"}, with_table(1, -1), with_table(2, -1)},
      {"no lengths", kInvalid, {"seqused_k: missing", "page_table"}, [](F& f) { f.args.inputs.seqused_k = {}; }},
      {"longer than its pages", kInvalid, {"seqused_k[0]: 13", "12 keys"},
       [](F& f) { f.args.inputs.seqused_k = f.ints({13, 1}); },
       [](F& f) {
         f.args.inputs.seqused_k = f.ints({12, 1});
         f.args.inputs.page_table = f.ints({0, 1, 2, 3, -7, -7}, {2, 3});
       }},
      {"with packed keys", kInvalid, {"page_table", "cu_seqlens_k"},
       [](F& f) { f.args.inputs.cu_seqlens_q = f.args.inputs.cu_seqlens_k = f.ints({0, 1, 2}); }},
      {"of another batch", kInvalid, {"page_table: batch 1, but query has batch 2"},
       [](F& f) { f.args.inputs.page_table.shape[0] = 1; }},
      {"rank 1", kInvalid, {"page_table: rank 1", "[batch, max_pages]"},
       [](F& f) { f.args.inputs.page_table = f.ints({1, 2}); }},
      {"int64", kType, {"page_table: dtype int64"}, [](F& f) { f.args.inputs.page_table.dtype = DType::int64; }},
      {"value pages", kInvalid, {"value: num_pages 8, but key has num_pages 9"},
       [](F& f) { f.args.inputs.value.shape[0] = 8; }},
      {"value page size", kInvalid, {"value: page_size 3, but key has page_size 4"},
       [](F& f) { f.args.inputs.value.shape[1] = 3; }},
      {"page size 0", kInvalid, {"key: page_size 0"},
       [](F& f) { f.args.inputs.key.shape[1] = f.args.inputs.value.shape[1] = 0; }},
      {"max_seqlen_k", kInvalid, {"max_seqlen_k: 6", "7"}, [](F& f) { f.args.options.max_seqlen_k = 6; },
       [](F& f) { f.args.options.max_seqlen_k = 7; }},
      {"gather", kInvalid, {"gather_kv_indices", "decode"}, [](F& f) { f.args.inputs.gather_kv_indices = f.ints({0, 0}, {2, 1}); }},
  }, a.forward_args());
}

TEST(ForwardRefuses, Gates) {
  const Attention a = make(gated_setup());
  check_table<ForwardArgs>({
      {"alpha alone", kInvalid, {"delta: missing"}, [](F& f) { f.args.inputs.delta = {}; },
       [](F& f) { f.args.inputs.alpha = f.args.inputs.delta = {}; }},
      {"delta alone", kInvalid, {"alpha: missing"}, [](F& f) { f.args.inputs.alpha = {}; }},
      {"gate_threshold alone", kInvalid, {"gate_threshold: 0.5", "alpha and delta"},
       [](F& f) {
         f.args.inputs.alpha = f.args.inputs.delta = {};
         f.args.options.gate_threshold = 0.5;
       },
       [](F& f) { f.args.options.gate_threshold = 0.5; }},
      {"alpha in the other layout", kInvalid, {"alpha: shape [2, 4, 5], must be [2, 5, 4]", "gate_layout bhs"},
       [](F& f) { f.args.inputs.alpha = TensorView::contiguous(f.args.inputs.alpha.data, DType::float32, {2, 4, 5}); },
       [](F& f) {
         f.args.inputs.alpha = f.tensor(DType::float32, {2, 4, 5});
         f.args.inputs.delta = f.tensor(DType::float32, {2, 2, 7});
         f.args.options.gate_layout = GateLayout::bhs;
       }},
      {"delta in the other layout", kInvalid, {"delta: shape [2, 7, 2], must be [2, 2, 7]", "gate_layout bsh"},
       [](F& f) {
         f.args.inputs.alpha = TensorView::contiguous(f.args.inputs.alpha.data, DType::float32, {2, 4, 5});
         f.args.options.gate_layout = GateLayout::bhs;
       }},
      {"alpha heads", kInvalid, {"alpha: shape [2, 5, 2]", "[batch, seqlen_q, num_heads]"},
       [](F& f) { f.args.inputs.alpha.shape[2] = 2; }},
      {"delta heads", kInvalid, {"delta: shape [2, 7, 1]", "[batch, seqlen_k, num_kv_heads]"},
       [](F& f) { f.args.inputs.delta.shape[2] = 1; }},
      {"delta rank", kInvalid, {"delta: shape [2, 7]"}, [](F& f) { f.args.inputs.delta.rank = 2; }},
      {"alpha dtype", kType, {"alpha: dtype bfloat16", "float32 or float64"},
       [](F& f) { f.args.inputs.alpha.dtype = DType::bfloat16; },
       [](F& f) { f.args.inputs.alpha = f.tensor(DType::float64, {2, 5, 4}); }},
      {"delta dtype", kType, {"delta: dtype int32"}, [](F& f) { f.args.inputs.delta.dtype = DType::int32; }},
      {"sink length", kInvalid, {"sink: shape [2], must be [4] = [num_heads]"},
       [](F& f) { f.args.inputs.sink.shape[0] = 2; }},
      {"sink rank", kInvalid, {"sink: shape [4, 1]"},
       [](F& f) { f.args.inputs.sink = TensorView::contiguous(f.args.inputs.sink.data, DType::float32, {4, 1}); }},
      {"sink dtype", kType, {"sink: dtype float16", "float32 or float64"},
       [](F& f) { f.args.inputs.sink.dtype = DType::float16; },
       [](F& f) { f.args.inputs.sink = f.tensor(DType::float64, {4}); }},
      {"slopes length", kInvalid, {"alibi_slopes: shape [3]", "[4]"}, [](F& f) { f.args.inputs.alibi_slopes.shape[0] = 3; },
       [](F& f) { f.args.inputs.alibi_slopes = f.tensor(DType::float32, {2, 4}); }},
      {"slopes batch", kInvalid, {"alibi_slopes: shape [3, 4]", "[2, 4]"},
       [](F& f) { f.args.inputs.alibi_slopes = f.tensor(DType::float32, {3, 4}); }},
      {"slopes dtype", kType, {"alibi_slopes: dtype int64"},
       [](F& f) { f.args.inputs.alibi_slopes.dtype = DType::int64; }},
  }, a.forward_args());
}

TEST(ForwardRefuses, Outputs) {
  const Attention a = make(batched_setup());
  check_table<ForwardArgs>({
      {"out shape", kInvalid, {"out: shape [2, 5, 4, 8], must be [2, 5, 4, 6]", "head_dim_v"},
       [](F& f) { f.args.out = TensorView::contiguous(f.args.out.data, DType::float32, {2, 5, 4, 8}); }},
      {"out dtype", kType, {"out: dtype bfloat16, must be float32"}, [](F& f) { f.args.out.dtype = DType::bfloat16; }},
      {"lse shape", kInvalid, {"lse: shape [2, 5, 4], must be [2, 4, 5]"},
       [](F& f) { f.args.lse = TensorView::contiguous(f.args.lse.data, DType::float32, {2, 5, 4}); },
       [](F& f) { f.args.lse = {}; }},
      {"lse dtype", kType, {"lse: dtype float64, must be float32"}, [](F& f) { f.args.lse.dtype = DType::float64; }},
      {"skip_map shape", kInvalid, {"skip_map: shape [2, 2, 1, 1], must be [2, 4, 1, 1]"},
       [](F& f) { f.args.skip_map.shape[1] = 2; }},
      {"skip_map dtype", kType, {"skip_map: dtype int64, must be int32"},
       [](F& f) { f.args.skip_map.dtype = DType::int64; }, [](F& f) { f.args.skip_map = {}; }},
  }, a.forward_args());
}

}  // namespace
}  // namespace fsa::test
