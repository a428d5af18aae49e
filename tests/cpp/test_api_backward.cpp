// SPDX-License-Identifier: Apache-2.0
// What backward refuses, one case per entry, each with its valid twin (the call as it was, where none is given).
#include "test_api_util.h"

namespace fsa::test {
namespace {

using B = Trial<BackwardArgs>;
constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr ErrorCode kType = ErrorCode::type_mismatch;
constexpr ErrorCode kUnsupported = ErrorCode::unsupported;

// After its forward, with gradients of out and lse. Logits, gate, sink and slopes are all on.
Attention make(bool gate, std::optional<double> threshold = {}) {
  AttentionSetup setup{.batch = 2,
                       .seqlen_q = 5,
                       .seqlen_k = 7,
                       .num_heads = 4,
                       .num_kv_heads = 2,
                       .head_dim = 8,
                       .head_dim_v = 6,
                       .dtype = DType::float32};
  setup.gate = gate;
  setup.sink = gate;
  setup.options.threshold = threshold;
  Attention a = Attention::prefill(setup);
  a.forward();
  Random random(5);
  a.make_gradients(random, true);
  return a;
}

TEST(BackwardRefuses, MissingTensors) {
  const Attention a = make(true);
  check_table<BackwardArgs>(
      {
          {"out", kInvalid, {"out: missing"}, [](B& b) { b.args.out = {}; }, nullptr, false},
          {"lse", kInvalid, {"lse: missing"}, [](B& b) { b.args.lse = {}; }, nullptr, false},
          {"grad_out",
           kInvalid,
           {"grad_out: missing"},
           [](B& b) { b.args.grad_out = {}; },
           [](B& b) { b.args.grad_lse = {}; },
           false},
          {"grad_query",
           kInvalid,
           {"grad_query: missing"},
           [](B& b) { b.args.grad_query = {}; },
           nullptr,
           false},
          {"grad_key", kInvalid, {"grad_key: missing"}, [](B& b) { b.args.grad_key = {}; }, nullptr, false},
          {"grad_value",
           kInvalid,
           {"grad_value: missing"},
           [](B& b) { b.args.grad_value = {}; },
           [](B& b) { b.args.grad_alpha = b.args.grad_delta = b.args.grad_sink = {}; },
           false},
          {"skip_map with a gate",
           kInvalid,
           {"skip_map: missing", "forward"},
           [](B& b) { b.args.skip_map = {}; },
           [](B& b) {
             b.args.skip_map = {};
             b.args.options.gate_threshold = 0;
           },
           false},
      },
      a.backward_args());
}

TEST(BackwardRefuses, MissingSkipMapOfAThreshold) {
  const Attention a = make(false, 1.0);
  check_table<BackwardArgs>(
      {
          {"threshold",
           kInvalid,
           {"skip_map: missing", "threshold"},
           [](B& b) { b.args.skip_map = {}; },
           [](B& b) {
             b.args.skip_map = {};
             b.args.options.threshold = 0;
           },
           false},
      },
      a.backward_args());
}

TEST(BackwardRefuses, TensorsOfForward) {
  const Attention a = make(true);
  check_table<BackwardArgs>(
      {
          {"out shape",
           kInvalid,
           {"out: shape [2, 5, 4, 8], must be [2, 5, 4, 6]"},
           [](B& b) { b.args.out = reshaped(b.args.out, {2, 5, 4, 8}); }},
          {"out stride", kInvalid, {"out: stride 2"}, [](B& b) { b.args.out.strides[3] = 2; }},
          {"lse shape",
           kInvalid,
           {"lse: shape [2, 5, 4], must be [2, 4, 5]"},
           [](B& b) { b.args.lse = reshaped(b.args.lse, {2, 5, 4}); }},
          {"lse dtype",
           kType,
           {"lse: dtype float64, must be float32"},
           [](B& b) { b.args.lse.dtype = DType::float64; }},
          {"skip_map shape",
           kInvalid,
           {"skip_map: shape [2, 4, 1], must be [2, 4, 1, 1]"},
           [](B& b) { b.args.skip_map.rank = 3; }},
          {"skip_map dtype",
           kType,
           {"skip_map: dtype float32"},
           [](B& b) { b.args.skip_map.dtype = DType::float32; }},
          {"grad_out shape",
           kInvalid,
           {"grad_out: shape [2, 4, 5, 6], must be [2, 5, 4, 6]"},
           [](B& b) { b.args.grad_out = reshaped(b.args.grad_out, {2, 4, 5, 6}); },
           [](B& b) {  // any strides: that tensor, transposed back
             b.args.grad_out = b.tensor(DType::float32, {2, 4, 5, 6});
             std::swap(b.args.grad_out.shape[1], b.args.grad_out.shape[2]);
             std::swap(b.args.grad_out.strides[1], b.args.grad_out.strides[2]);
           }},
          {"grad_out dtype",
           kType,
           {"grad_out: dtype float16"},
           [](B& b) { b.args.grad_out.dtype = DType::float16; },
           [](B& b) {  // out.sum(): one number for all
             for (std::int64_t& stride : b.args.grad_out.strides) stride = 0;
             for (std::int64_t& stride : b.args.grad_lse.strides) stride = 0;
           }},
          {"grad_lse shape",
           kInvalid,
           {"grad_lse: shape [2, 4], must be [2, 4, 5]"},
           [](B& b) { b.args.grad_lse.rank = 2; }},
          {"grad_lse dtype",
           kType,
           {"grad_lse: dtype bfloat16"},
           [](B& b) { b.args.grad_lse.dtype = DType::bfloat16; }},
          {"grad_out null",
           kInvalid,
           {"grad_out: data is null"},
           [](B& b) { b.args.grad_out.data = nullptr; }},
          {"gather",
           kInvalid,
           {"gather_kv_indices", "decode"},
           [](B& b) { b.in.gather_kv_indices = b.ints({0, 0}, {2, 1}); }},
          {"pages",
           kUnsupported,
           {"page_table", "backward"},
           [](B& b) {
             b.in.page_table = b.ints({0, 1}, {2, 1});
             b.in.seqused_k = b.ints({7, 7});
           },
           [](B& b) { b.in.seqused_k = b.ints({7, 7}); }},
      },
      a.backward_args());
}

TEST(BackwardRefuses, Gradients) {
  const Attention a = make(true);
  const auto without_gate = [](B& b) {
    b.in.alpha = b.in.delta = b.args.grad_alpha = b.args.grad_delta = {};
  };
  check_table<BackwardArgs>(
      {
          {"grad_query shape",
           kInvalid,
           {"grad_query: shape [2, 5, 2, 8], must be [2, 5, 4, 8]"},
           [](B& b) { b.args.grad_query.shape[2] = 2; }},
          {"grad_key shape",
           kInvalid,
           {"grad_key: shape [2, 7, 4, 8], must be [2, 7, 2, 8]", "key"},
           [](B& b) { b.args.grad_key = reshaped(b.args.grad_key, {2, 7, 4, 8}); }},
          {"grad_value dtype",
           kType,
           {"grad_value: dtype bfloat16, must be float32"},
           [](B& b) { b.args.grad_value.dtype = DType::bfloat16; }},
          {"grad_value device",
           kType,
           {"grad_value: on cuda:0"},
           [](B& b) { b.args.grad_value.device.kind = DeviceKind::cuda; }},
          {"grad_query stride",
           kInvalid,
           {"grad_query: stride 4"},
           [](B& b) { b.args.grad_query.strides[3] = 4; }},
          {"grad_key expanded",
           kInvalid,
           {"grad_key: expanded", "dimension 2"},
           [](B& b) { b.args.grad_key.strides[2] = 0; }},
          {"grad_query is query",
           kInvalid,
           {"grad_query: shares memory with query"},
           [](B& b) { b.args.grad_query.data = b.in.query.data; }},
          {"grad_value is grad_key",
           kInvalid,
           {"grad_value: shares memory with grad_key"},
           [](B& b) { b.args.grad_value.data = b.args.grad_key.data; }},
          {"grad_key over grad_out",
           kInvalid,
           {"grad_key: shares memory with grad_out"},
           [](B& b) { b.args.grad_key.data = b.args.grad_out.data; }},
          {"grad_alpha shape",
           kInvalid,
           {"grad_alpha: shape [2, 4, 5], must be [2, 5, 4]"},
           [](B& b) { b.args.grad_alpha = reshaped(b.args.grad_alpha, {2, 4, 5}); }},
          {"grad_delta dtype",
           kType,
           {"grad_delta: dtype float64, must be float32"},
           [](B& b) { b.args.grad_delta.dtype = DType::float64; },
           [](B& b) {
             b.in.delta = b.tensor(DType::float64, {2, 7, 2});
             b.args.grad_delta = b.tensor(DType::float64, {2, 7, 2});
           }},
          {"grad_alpha without alpha",
           kInvalid,
           {"grad_alpha: given, but there is no alpha"},
           [](B& b) {
             b.in.alpha = b.in.delta = {};
             b.args.grad_delta = {};
           },
           without_gate},
          {"grad_delta without delta",
           kInvalid,
           {"grad_delta: given, but there is no delta"},
           [](B& b) {
             b.in.alpha = b.in.delta = {};
             b.args.grad_alpha = {};
           },
           without_gate},
          {"grad_sink without sink",
           kInvalid,
           {"grad_sink: given, but there is no sink"},
           [](B& b) { b.in.sink = {}; },
           [](B& b) { b.in.sink = b.args.grad_sink = {}; }},
          {"grad_sink shape",
           kInvalid,
           {"grad_sink: shape [2], must be [4]"},
           [](B& b) { b.args.grad_sink.shape[0] = 2; }},
          {"joining other gradients on a GPU",
           kUnsupported,
           {"add_to_grad_key_value: true", "cuda:0"},
           [](B& b) {
             b.args.add_to_grad_key_value = true;
             for (TensorView* view :
                  {&b.in.query, &b.in.key, &b.in.value, &b.in.alpha, &b.in.delta, &b.in.sink,
                   &b.in.alibi_slopes, &b.args.out, &b.args.lse, &b.args.skip_map, &b.args.grad_out,
                   &b.args.grad_lse, &b.args.grad_query, &b.args.grad_key, &b.args.grad_value,
                   &b.args.grad_alpha, &b.args.grad_delta, &b.args.grad_sink})
               view->device.kind = DeviceKind::cuda;
           },
           [](B& b) { b.args.add_to_grad_query = b.args.add_to_grad_key_value = true; }},
      },
      a.backward_args());
}

TEST(BackwardRefuses, Workspace) {
  const Attention a = make(false);
  BackwardArgs args = a.backward_args();
  args.options.backend = "cpu";
  const std::size_t needed = workspace_size(args);
  ASSERT_GT(needed, 64u) << "the CPU backend keeps partial gradients here";
  const std::string count = std::to_string(needed);
  check_table<BackwardArgs>(
      {
          {"none",
           kInvalid,
           {"workspace: 0 bytes", count.c_str(), "workspace_size"},
           [](B&) {},
           nullptr,
           false},
          {"too small",
           kInvalid,
           {"workspace: ", count.c_str()},
           [=](B& b) { b.args.workspace = b.workspace(needed - 1); },
           [=](B& b) { b.args.workspace = b.workspace(needed); }},
          {"null", kInvalid, {"workspace: 0 bytes"}, [=](B& b) { b.args.workspace = {nullptr, needed}; }},
          {"misaligned",
           kInvalid,
           {"workspace: address", "64 bytes"},
           [=](B& b) {
             b.args.workspace = b.workspace(needed + 32);
             b.args.workspace.data = static_cast<char*>(b.args.workspace.data) + 32;
           },
           [=](B& b) { b.args.workspace = b.workspace(needed + 32); }},
          {"over an output",
           kInvalid,
           {"workspace: shares memory with grad_key"},
           [=](B& b) {
             b.args.workspace = b.workspace(needed);
             b.args.grad_key.data = b.args.workspace.data;
           }},
      },
      args);
}

}  // namespace
}  // namespace fsa::test
