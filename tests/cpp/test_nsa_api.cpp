// SPDX-License-Identifier: Apache-2.0
// What the functions of native sparse attention refuse, one case per entry, each with its valid twin (the call as it
// was, where none is given); and what they answer about a call.
#include "test_api_util.h"
#include "test_nsa_util.h"

namespace fsa::test {
namespace {

constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr ErrorCode kType = ErrorCode::type_mismatch;
constexpr ErrorCode kUnsupported = ErrorCode::unsupported;
constexpr Device kGpu{DeviceKind::cuda, 1};

// 2 sequences of 70 tokens, 4 query heads on 2 key heads.
NsaSetup batched_setup() {
  return {.batch = 2,
          .seqlen = 70,
          .num_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 8,
          .head_dim_v = 6,
          .dtype = DType::float32,
          .pe = true,
          .compress_block = 16,
          .compress_stride = 8,
          .block_size = 16};
}

NsaSetup packed_setup() {
  NsaSetup setup = batched_setup();
  setup.cu_seqlens = {0, 20, 70};  // 1 and 5 windows
  return setup;
}

TEST(NsaRefuses, Compress) {
  using C = Trial<nsa::CompressArgs>;
  const Compression c(batched_setup());
  check_table<nsa::CompressArgs>(
      {
          {"x", kInvalid, {"x: missing"}, [](C& t) { t.in.x = {}; }},
          {"weight",
           kInvalid,
           {"weight: missing"},
           [](C& t) { t.in.weight = {}; },
           [](C& t) {
             t.in.weight = {};
             t.args.options.kind = nsa::CompressKind::mean;
           }},
          {"out", kInvalid, {"out: missing"}, [](C& t) { t.args.out = {}; }},
          {"x data", kInvalid, {"x: data is null"}, [](C& t) { t.in.x.data = nullptr; }},
          {"weight of mean",
           kInvalid,
           {"weight: given, but kind mean"},
           [](C& t) { t.args.options.kind = nsa::CompressKind::mean; },
           [](C& t) {
             t.args.options.kind = nsa::CompressKind::mean;
             t.in.weight = {};
           }},
          {"weight of weighted",
           kInvalid,
           {"weight: shape [2, 128, 8], must be [2, 16]", "kind weighted"},
           [](C& t) { t.args.options.kind = nsa::CompressKind::weighted; },
           [](C& t) {
             t.args.options.kind = nsa::CompressKind::weighted;
             t.in.weight = t.tensor(DType::float32, {2, 16});
           }},
          {"weight shape",
           kInvalid,
           {"weight: shape [2, 128, 4], must be [2, 128, 8]"},
           [](C& t) { t.in.weight = reshaped(t.in.weight, {2, 128, 4}); }},
          {"weight dtype",
           kType,
           {"weight: dtype float16, must be float32 as x"},
           [](C& t) { t.in.weight.dtype = DType::float16; }},
          {"weight device",
           kType,
           {"weight: on cuda:1, but x is on cpu"},
           [](C& t) { t.in.weight.device = kGpu; }},
          {"weight stride",
           kInvalid,
           {"weight: stride 8 of the last dimension"},
           [](C& t) { t.in.weight.strides[2] = 8; }},
          {"pe shape",
           kInvalid,
           {"intra_block_pe: shape [2, 8, 8], must be [2, 16, 8]"},
           [](C& t) { t.in.intra_block_pe.shape[1] = 8; },
           [](C& t) { t.in.intra_block_pe = {}; }},
          {"pe dtype",
           kType,
           {"intra_block_pe: dtype float64"},
           [](C& t) { t.in.intra_block_pe.dtype = DType::float64; }},
          {"x rank", kInvalid, {"x: rank 3", "cu_seqlens"}, [](C& t) { t.in.x.rank = 3; }},
          {"x dtype",
           kType,
           {"x: dtype int32", "float64, float32, bfloat16 or float16"},
           [](C& t) { t.in.x.dtype = DType::int32; }},
          {"x stride", kInvalid, {"x: stride 2 of the last"}, [](C& t) { t.in.x.strides[3] = 2; }},
          {"no heads", kInvalid, {"x: num_kv_heads 0"}, [](C& t) { t.in.x.shape[2] = 0; }},
          {"head_dim 513",
           kInvalid,
           {"x: head_dim 513", "512"},
           [](C& t) { t.in.x = reshaped(t.in.x, {2, 70, 2, 513}); }},
          {"compress_block 0",
           kInvalid,
           {"compress_block: 0"},
           [](C& t) { t.args.options.compress_block = 0; }},
          {"compress_block huge",
           kInvalid,
           {"compress_block: 1073741824", "head_dim 8"},
           [](C& t) { t.args.options.compress_block = 1 << 30; }},
          {"compress_stride 0",
           kInvalid,
           {"compress_stride: 0"},
           [](C& t) { t.args.options.compress_stride = 0; }},
          {"compress_stride 6",
           kInvalid,
           {"compress_stride: 6", "divide compress_block 16"},
           [](C& t) { t.args.options.compress_stride = 6; }},
          {"out shape",
           kInvalid,
           {"out: shape [2, 8, 2, 8], must be [2, 7, 2, 8]"},
           [](C& t) { t.args.out = reshaped(t.args.out, {2, 8, 2, 8}); }},
          {"out dtype", kType, {"out: dtype float64"}, [](C& t) { t.args.out.dtype = DType::float64; }},
          {"out is x", kInvalid, {"out: shares memory with x"}, [](C& t) { t.args.out.data = t.in.x.data; }},
          {"expanded out", kInvalid, {"out: expanded"}, [](C& t) { t.args.out.strides[0] = 0; }},
          {"cu_seqlens alone",
           kInvalid,
           {"cu_seqlens_compressed: missing"},
           [](C& t) { t.in.cu_seqlens = t.ints({0, 70}); }},
          {"cu_seqlens_compressed alone",
           kInvalid,
           {"cu_seqlens: missing"},
           [](C& t) { t.in.cu_seqlens_compressed = t.ints({0, 7}); }},
          {"backend",
           kInvalid,
           {"backend: \"fast\" is not a backend"},
           [](C& t) { t.args.options.backend = "fast"; },
           [](C& t) { t.args.options.backend = ""; }},
          {"on a GPU",
           kType,
           {"backend: \"reference\" computes on the CPU"},
           [](C& t) {
             for (TensorView* view : large_tensors(t.args)) view->device = kGpu;
           }},
      },
      c.args());
}

TEST(NsaRefuses, PackedCompress) {
  using C = Trial<nsa::CompressArgs>;
  const Compression c(packed_setup());
  check_table<nsa::CompressArgs>(
      {
          {"start",
           kInvalid,
           {"cu_seqlens[0]: 1, must be 0"},
           [](C& t) { t.in.cu_seqlens = t.ints({1, 20, 70}); }},
          {"decrease",
           kInvalid,
           {"cu_seqlens[2]: 60 is below cu_seqlens[1] = 65"},
           [](C& t) { t.in.cu_seqlens = t.ints({0, 65, 60}); }},
          {"too long",
           kInvalid,
           {"cu_seqlens[2]: 71, but x has only 70 rows"},
           [](C& t) { t.in.cu_seqlens = t.ints({0, 20, 71}); },
           [](C& t) { t.in.cu_seqlens = t.ints({0, 20, 69}); }},
          {"not the sums",
           kInvalid,
           {"cu_seqlens_compressed: sequence 0 has 2 compressed keys, but its 20 tokens make 1"},
           [](C& t) { t.in.cu_seqlens_compressed = t.ints({0, 2, 6}); }},
          {"compressed beyond out",
           kInvalid,
           {"cu_seqlens_compressed[2]: 7, but out has only 6 rows"},
           [](C& t) { t.in.cu_seqlens_compressed = t.ints({0, 1, 7}); }},
          {"compressed batch",
           kInvalid,
           {"cu_seqlens_compressed: shape [2], must be [3]"},
           [](C& t) { t.in.cu_seqlens_compressed = t.ints({0, 6}); }},
          {"out heads",
           kInvalid,
           {"out: shape [6, 1, 8], must be [6, 2, 8]"},
           [](C& t) { t.args.out = reshaped(t.args.out, {6, 1, 8}); }},
          {"int64",
           kType,
           {"cu_seqlens: dtype int64, must be int32"},
           [](C& t) { t.in.cu_seqlens.dtype = DType::int64; }},
          {"cu_seqlens rank",
           kInvalid,
           {"cu_seqlens: rank 2"},
           [](C& t) { t.in.cu_seqlens = t.ints({0, 20, 70}, {1, 3}); }},
          {"cu_seqlens empty",
           kInvalid,
           {"cu_seqlens: shape [0]"},
           [](C& t) { t.in.cu_seqlens = t.ints({}); }},
          {"x rank", kInvalid, {"x: rank 2", "[total, num_kv_heads"}, [](C& t) { t.in.x.rank = 2; }},
      },
      c.args());
}

TEST(NsaRefuses, CompressBackward) {
  using C = Trial<nsa::CompressBackwardArgs>;
  const Compression c(batched_setup());
  check_table<nsa::CompressBackwardArgs>(
      {
          {"grad_out", kInvalid, {"grad_out: missing"}, [](C& t) { t.args.grad_out = {}; }},
          {"grad_x", kInvalid, {"grad_x: missing"}, [](C& t) { t.args.grad_x = {}; }},
          {"grad_weight", kInvalid, {"grad_weight: missing"}, [](C& t) { t.args.grad_weight = {}; }},
          {"grad_weight of mean",
           kInvalid,
           {"grad_weight: given, but there is no weight"},
           [](C& t) {
             t.args.options.kind = nsa::CompressKind::mean;
             t.in.weight = {};
           },
           [](C& t) {
             t.args.options.kind = nsa::CompressKind::mean;
             t.in.weight = t.args.grad_weight = {};
           }},
          {"grad_pe",
           kInvalid,
           {"grad_intra_block_pe: missing"},
           [](C& t) { t.args.grad_intra_block_pe = {}; }},
          {"grad_pe without pe",
           kInvalid,
           {"grad_intra_block_pe: given, but there is no intra_block_pe"},
           [](C& t) { t.in.intra_block_pe = {}; },
           [](C& t) { t.in.intra_block_pe = t.args.grad_intra_block_pe = {}; }},
          {"grad_x shape",
           kInvalid,
           {"grad_x: shape [2, 70, 1, 8], must be [2, 70, 2, 8]"},
           [](C& t) { t.args.grad_x.shape[2] = 1; }},
          {"grad_out shape",
           kInvalid,
           {"grad_out: shape [2, 6, 2, 8], must be [2, 7, 2, 8]"},
           [](C& t) { t.args.grad_out.shape[1] = 6; },
           [](C& t) {
             for (std::int64_t& stride : t.args.grad_out.strides) stride = 0;
           }},
          {"grad_weight dtype",
           kType,
           {"grad_weight: dtype float64, must be float32"},
           [](C& t) { t.args.grad_weight.dtype = DType::float64; }},
          {"grad_x is grad_out",
           kInvalid,
           {"grad_x: shares memory with grad_out"},
           [](C& t) { t.args.grad_x.data = t.args.grad_out.data; }},
      },
      c.backward_args());
}

TEST(NsaRefuses, SelectBlocks) {
  using S = Trial<nsa::SelectBlocksArgs>;
  const Selection s(batched_setup());
  check_table<nsa::SelectBlocksArgs>(
      {
          {"query", kInvalid, {"query: missing"}, [](S& t) { t.args.query = {}; }},
          {"key", kInvalid, {"compressed_key: missing"}, [](S& t) { t.args.compressed_key = {}; }},
          {"lse", kInvalid, {"lse: missing"}, [](S& t) { t.args.lse = {}; }},
          {"selected_blocks",
           kInvalid,
           {"selected_blocks: missing"},
           [](S& t) { t.args.selected_blocks = {}; }},
          {"top_k 0",
           kInvalid,
           {"top_k: 0, must be from 1 to 1024"},
           [](S& t) {
             t.args.top_k = t.args.init_blocks = t.args.local_blocks = 0;
             t.args.selected_blocks.shape[3] = 0;
           }},
          {"top_k 1025",
           kInvalid,
           {"top_k: 1025", "1024"},
           [](S& t) { t.args.top_k = 1025; },
           [](S& t) {
             t.args.top_k = 1024;
             t.args.selected_blocks = t.ints(std::vector<std::int32_t>(4 * 70 * 1024), {2, 2, 70, 1024});
           }},
          {"top_k below the forced",
           kInvalid,
           {"top_k: 4, must be at least init_blocks 2 + local_blocks 3"},
           [](S& t) {
             t.args.init_blocks = 2;
             t.args.local_blocks = 3;
           },
           [](S& t) { t.args.init_blocks = t.args.local_blocks = 2; }},
          {"huge init_blocks",
           kInvalid,
           {"top_k: 4", "init_blocks 9223372036854775807"},
           [](S& t) { t.args.init_blocks = std::numeric_limits<std::int64_t>::max(); }},
          {"init_blocks -1",
           kInvalid,
           {"init_blocks: -1"},
           [](S& t) { t.args.init_blocks = -1; },
           [](S& t) { t.args.init_blocks = 0; }},
          {"local_blocks -1",
           kInvalid,
           {"local_blocks: -1"},
           [](S& t) { t.args.local_blocks = -1; },
           [](S& t) { t.args.local_blocks = 0; }},
          {"block_size 15",
           kInvalid,
           {"block_size: 15, must be from 16 to 256"},
           [](S& t) { t.args.block_size = 15; }},
          {"block_size 264",
           kInvalid,
           {"block_size: 264, must be from 16 to 256"},
           [](S& t) { t.args.block_size = 264; },
           [](S& t) { t.args.block_size = 256; }},
          {"block_size 20",
           kInvalid,
           {"block_size: 20", "multiple of compress_stride 8"},
           [](S& t) { t.args.block_size = 20; },
           [](S& t) { t.args.block_size = 24; }},
          {"compress_stride",
           kInvalid,
           {"compress_stride: 5", "divide compress_block 16"},
           [](S& t) { t.args.compress_stride = 5; }},
          {"scale", kInvalid, {"softmax_scale: nan"}, [](S& t) { t.args.softmax_scale = kNan; }},
          {"key dtype",
           kType,
           {"compressed_key: dtype float64, must be float32 as query"},
           [](S& t) { t.args.compressed_key.dtype = DType::float64; }},
          {"key rank",
           kInvalid,
           {"compressed_key: rank 3", "[batch, compressed, num_kv_heads, head_dim]"},
           [](S& t) { t.args.compressed_key.rank = 3; }},
          {"key batch",
           kInvalid,
           {"compressed_key: batch 1, but query has batch 2"},
           [](S& t) { t.args.compressed_key.shape[0] = 1; }},
          {"key head_dim",
           kInvalid,
           {"compressed_key: head_dim 4, but query has head_dim 8"},
           [](S& t) { t.args.compressed_key.shape[3] = 4; }},
          {"heads",
           kInvalid,
           {"num_heads 4 is not a multiple of num_kv_heads 3 of compressed_key"},
           [](S& t) { t.args.compressed_key = reshaped(t.args.compressed_key, {2, 7, 3, 8}); }},
          {"key length",
           kInvalid,
           {"compressed_key: sequence 0 has 6 compressed keys, but its 70 tokens make 7"},
           [](S& t) { t.args.compressed_key.shape[1] = 6; }},
          {"lse shape",
           kInvalid,
           {"lse: shape [2, 70, 4], must be [2, 4, 70]"},
           [](S& t) { t.args.lse = reshaped(t.args.lse, {2, 70, 4}); }},
          {"lse dtype", kType, {"lse: dtype float64"}, [](S& t) { t.args.lse.dtype = DType::float64; }},
          {"blocks shape",
           kInvalid,
           {"selected_blocks: shape [2, 2, 70, 3], must be [2, 2, 70, 4]"},
           [](S& t) { t.args.selected_blocks.shape[3] = 3; }},
          {"blocks dtype",
           kType,
           {"selected_blocks: dtype float32, must be int32"},
           [](S& t) { t.args.selected_blocks.dtype = DType::float32; }},
          {"blocks over lse",
           kInvalid,
           {"selected_blocks: shares memory with lse"},
           [](S& t) { t.args.selected_blocks.data = t.args.lse.data; }},
          {"cu_seqlens_q alone",
           kInvalid,
           {"cu_seqlens_compressed: missing"},
           [](S& t) { t.args.cu_seqlens_q = t.ints({0, 70}); }},
          {"seqused_k below the rows",
           kInvalid,
           {"seqused_k[1]: 69 tokens, but the sequence has 70 rows"},
           [](S& t) { t.args.seqused_k = t.ints({70, 69}); },
           [](S& t) { t.args.seqused_k = t.ints({70, 70}); }},
          {"seqused_k beyond the keys",
           kInvalid,
           {"compressed_key: sequence 0 has 7 compressed keys, but its 72 tokens make 8"},
           [](S& t) { t.args.seqused_k = t.ints({72, 70}); },
           [](S& t) { t.args.seqused_k = t.ints({71, 70}); }},
          {"seqused_k shape",
           kInvalid,
           {"seqused_k: shape [1], must be [2]"},
           [](S& t) { t.args.seqused_k = t.ints({70}); }},
      },
      s.args());
}

TEST(NsaRefuses, PackedSelectBlocks) {
  using S = Trial<nsa::SelectBlocksArgs>;
  const Selection s(packed_setup());
  check_table<nsa::SelectBlocksArgs>(
      {
          {"seqused_k",
           kUnsupported,
           {"seqused_k: given together with cu_seqlens"},
           [](S& t) { t.args.seqused_k = t.ints({20, 50}); }},
          {"not the sums",
           kInvalid,
           {"cu_seqlens_compressed: sequence 1 has 4 compressed keys, but its 50 tokens make 5"},
           [](S& t) { t.args.cu_seqlens_compressed = t.ints({0, 1, 5}); }},
          {"beyond the keys",
           kInvalid,
           {"cu_seqlens_compressed[2]: 9, but compressed_key has only 6 rows"},
           [](S& t) { t.args.cu_seqlens_compressed = t.ints({0, 1, 9}); }},
          {"beyond the rows",
           kInvalid,
           {"cu_seqlens_q[2]: 71, but query has only 70 rows"},
           [](S& t) { t.args.cu_seqlens_q = t.ints({0, 20, 71}); }},
          {"blocks shape",
           kInvalid,
           {"selected_blocks: shape [2, 35, 8], must be [2, 70, 4] = [num_kv_heads, total_q, top_k]"},
           [](S& t) { t.args.selected_blocks = reshaped(t.args.selected_blocks, {2, 35, 8}); }},
          {"cu_seqlens_q missing",
           kInvalid,
           {"cu_seqlens_q: missing"},
           [](S& t) { t.args.cu_seqlens_q = {}; }},
      },
      s.args());
}

SelectedAttention selected_with_blocks(const NsaSetup& setup) {
  SelectedAttention a(setup);
  Random random(1);
  a.random_blocks(random);
  return a;
}

TEST(NsaRefuses, SelectedForward) {
  using S = Trial<nsa::SelectedForwardArgs>;
  const SelectedAttention a = selected_with_blocks(batched_setup());
  const auto spoil_entry = [](S& t, std::int32_t value) {
    std::vector<std::int32_t> entries(2 * 2 * 70 * 4, -1);
    entries[((1 * 2 + 0) * 70 + 33) * 4 + 2] = value;
    t.in.selected_blocks = t.ints(entries, {2, 2, 70, 4});
  };
  check_table<nsa::SelectedForwardArgs>(
      {
          {"query", kInvalid, {"query: missing"}, [](S& t) { t.in.query = {}; }},
          {"key", kInvalid, {"key: missing"}, [](S& t) { t.in.key = {}; }},
          {"value", kInvalid, {"value: missing"}, [](S& t) { t.in.value = {}; }},
          {"blocks", kInvalid, {"selected_blocks: missing"}, [](S& t) { t.in.selected_blocks = {}; }},
          {"out", kInvalid, {"out: missing"}, [](S& t) { t.args.out = {}; }, [](S& t) { t.args.lse = {}; }},
          {"block -2",
           kInvalid,
           {"selected_blocks[1, 0, 33, 2]: -2, must be -1 (none) or a block of sequence 1, which has 5"},
           [&](S& t) { spoil_entry(t, -2); },
           [&](S& t) { spoil_entry(t, -1); }},
          {"block 5",
           kInvalid,
           {"selected_blocks[1, 0, 33, 2]: 5", "which has 5 of block_size 16"},
           [&](S& t) { spoil_entry(t, 5); },
           [&](S& t) { spoil_entry(t, 4); }},
          {"blocks dtype",
           kType,
           {"selected_blocks: dtype int64, must be int32"},
           [](S& t) { t.in.selected_blocks.dtype = DType::int64; }},
          {"blocks heads",
           kInvalid,
           {"selected_blocks: shape [2, 1, 70, 4], must be [2, 2, 70, 4]"},
           [](S& t) { t.in.selected_blocks.shape[1] = 1; }},
          {"blocks rank",
           kInvalid,
           {"selected_blocks: rank 3", "[batch, num_kv_heads, seqlen_q, top_k]"},
           [](S& t) { t.in.selected_blocks.rank = 3; }},
          {"no blocks",
           kInvalid,
           {"selected_blocks: top_k 0"},
           [](S& t) { t.in.selected_blocks.shape[3] = 0; },
           [](S& t) { t.in.selected_blocks.shape[3] = 1; }},
          {"too many blocks",
           kInvalid,
           {"selected_blocks: top_k 1025", "1024"},
           [](S& t) {
             t.in.selected_blocks = t.ints(std::vector<std::int32_t>(280 * 1025, -1), {2, 2, 70, 1025});
           }},
          {"block_size 8",
           kInvalid,
           {"block_size: 8, must be from 16 to 256"},
           [](S& t) { t.args.options.block_size = 8; },
           [](S& t) { t.args.options.block_size = 17; },
           true},
          {"block_size 257",
           kInvalid,
           {"block_size: 257"},
           [](S& t) { t.args.options.block_size = 257; },
           [](S& t) {
             t.args.options.block_size = 256;
             t.in.selected_blocks = t.ints(std::vector<std::int32_t>(280, 0), {2, 2, 70, 1});
           }},
          {"chunk_tokens",
           kInvalid,
           {"chunk_tokens: -1"},
           [](S& t) { t.args.options.chunk_tokens = -1; },
           [](S& t) { t.args.options.chunk_tokens = 1; }},
          {"scale",
           kInvalid,
           {"softmax_scale: 0, must be above 0"},
           [](S& t) { t.args.options.softmax_scale = 0; }},
          {"head_dim 257",
           kInvalid,
           {"query: head_dim 257, must be from 1 to 256"},
           [](S& t) {
             t.in.query = reshaped(t.in.query, {2, 70, 4, 257});
             t.in.key = reshaped(t.in.key, {2, 70, 2, 257});
           }},
          {"head_dim_v 257",
           kInvalid,
           {"value: head_dim_v 257, must be from 1 to 256"},
           [](S& t) { t.in.value = reshaped(t.in.value, {2, 70, 2, 257}); }},
          {"key dtype",
           kType,
           {"key: dtype bfloat16, must be float32 as query"},
           [](S& t) { t.in.key.dtype = DType::bfloat16; }},
          {"value device",
           kType,
           {"value: on cuda:1, but query is on cpu"},
           [](S& t) { t.in.value.device = kGpu; }},
          {"key rank",
           kInvalid,
           {"key: rank 3", "[batch, seqlen_k, num_kv_heads, head_dim]"},
           [](S& t) { t.in.key.rank = 3; }},
          {"value length",
           kInvalid,
           {"value: seqlen_k 69, but key has seqlen_k 70"},
           [](S& t) { t.in.value.shape[1] = 69; }},
          {"value heads",
           kInvalid,
           {"value: num_kv_heads 1, but key has num_kv_heads 2"},
           [](S& t) { t.in.value.shape[2] = 1; }},
          {"key length",
           kInvalid,
           {"key: seqlen_k 69, but query has seqlen_q 70", "seqused_k"},
           [](S& t) { t.in.key.shape[1] = t.in.value.shape[1] = 69; }},
          {"seqused_k beyond the keys",
           kInvalid,
           {"seqused_k[1]: 71, but sequence 1 has room for 70 keys"},
           [](S& t) { t.in.seqused_k = t.ints({70, 71}); },
           [](S& t) { t.in.seqused_k = t.ints({70, 70}); }},
          {"seqused_k below the rows",
           kInvalid,
           {"seqused_k[0]: -4 tokens, but the sequence has 70 rows"},
           [](S& t) { t.in.seqused_k = t.ints({-4, 70}); }},
          {"query stride",
           kInvalid,
           {"query: stride 3 of the last dimension"},
           [](S& t) { t.in.query.strides[3] = 3; }},
          {"out shape",
           kInvalid,
           {"out: shape [2, 70, 4, 8], must be [2, 70, 4, 6]"},
           [](S& t) { t.args.out = reshaped(t.args.out, {2, 70, 4, 8}); }},
          {"lse shape",
           kInvalid,
           {"lse: shape [2, 70, 4], must be [2, 4, 70]"},
           [](S& t) { t.args.lse = reshaped(t.args.lse, {2, 70, 4}); }},
          {"out is query",
           kInvalid,
           {"out: shares memory with query"},
           [](S& t) { t.args.out.data = t.in.query.data; }},
          {"lse over blocks",
           kInvalid,
           {"lse: shares memory with selected_blocks"},
           [](S& t) { t.args.lse.data = t.in.selected_blocks.data; }},
      },
      a.args());
}

TEST(NsaRefuses, PackedSelectedForward) {
  using S = Trial<nsa::SelectedForwardArgs>;
  const SelectedAttention a = selected_with_blocks(packed_setup());
  check_table<nsa::SelectedForwardArgs>(
      {
          {"key total",
           kInvalid,
           {"key: total 69, but query has total 70"},
           [](S& t) { t.in.key.shape[0] = t.in.value.shape[0] = 69; }},
          {"block of another sequence",
           kInvalid,
           {"selected_blocks[1, 19, 0]: 3", "block of sequence 0, which has 2"},
           [](S& t) {
             std::vector<std::int32_t> entries(2 * 70 * 4, 0);
             entries[(70 + 19) * 4] = 3;
             t.in.selected_blocks = t.ints(entries, {2, 70, 4});
           },
           [](S& t) {
             std::vector<std::int32_t> entries(2 * 70 * 4, 0);
             entries[(70 + 20) * 4] = 3;
             t.in.selected_blocks = t.ints(entries, {2, 70, 4});
           }},
          {"seqused_k",
           kUnsupported,
           {"seqused_k: given together with cu_seqlens"},
           [](S& t) { t.in.seqused_k = t.ints({20, 50}); }},
          {"cu_seqlens",
           kInvalid,
           {"cu_seqlens[1]: -1 is below"},
           [](S& t) { t.in.cu_seqlens = t.ints({0, -1, 70}); }},
          {"query rank", kInvalid, {"query: rank 2"}, [](S& t) { t.in.query.rank = 2; }},
      },
      a.args());
}

TEST(NsaRefuses, SelectedBackward) {
  using S = Trial<nsa::SelectedBackwardArgs>;
  SelectedAttention a = selected_with_blocks(batched_setup());
  a.forward();
  check_table<nsa::SelectedBackwardArgs>(
      {
          {"out", kInvalid, {"out: missing"}, [](S& t) { t.args.out = {}; }},
          {"lse", kInvalid, {"lse: missing"}, [](S& t) { t.args.lse = {}; }},
          {"grad_out", kInvalid, {"grad_out: missing"}, [](S& t) { t.args.grad_out = {}; }},
          {"grad_query", kInvalid, {"grad_query: missing"}, [](S& t) { t.args.grad_query = {}; }},
          {"grad_key", kInvalid, {"grad_key: missing"}, [](S& t) { t.args.grad_key = {}; }},
          {"grad_value", kInvalid, {"grad_value: missing"}, [](S& t) { t.args.grad_value = {}; }},
          {"grad_value shape",
           kInvalid,
           {"grad_value: shape [2, 70, 2, 8], must be [2, 70, 2, 6]"},
           [](S& t) { t.args.grad_value = reshaped(t.args.grad_value, {2, 70, 2, 8}); }},
          {"grad_out dtype",
           kType,
           {"grad_out: dtype float16, must be float32"},
           [](S& t) { t.args.grad_out.dtype = DType::float16; }},
          {"out stride",
           kInvalid,
           {"out: stride 0 of the last"},
           [](S& t) { t.args.out.strides[3] = 0; },
           [](S& t) { t.args.grad_out.strides[3] = 0; }},
          {"grad_key is grad_value",
           kInvalid,
           {"grad_value: shares memory with grad_key"},
           [](S& t) { t.args.grad_value.data = t.args.grad_key.data; }},
          {"grad_query is query",
           kInvalid,
           {"grad_query: shares memory with query"},
           [](S& t) { t.args.grad_query.data = t.in.query.data; }},
      },
      a.backward_args());
}

TEST(NsaRefuses, Combine) {
  using C = Trial<nsa::CombineArgs>;
  const Combination c(batched_setup());
  check_table<nsa::CombineArgs>(
      {
          {"compressed", kInvalid, {"compressed: missing"}, [](C& t) { t.args.compressed = {}; }},
          {"sliding", kInvalid, {"sliding: missing"}, [](C& t) { t.args.sliding = {}; }},
          {"gates", kInvalid, {"gates: missing"}, [](C& t) { t.args.gates = {}; }},
          {"out", kInvalid, {"out: missing"}, [](C& t) { t.args.out = {}; }},
          {"rank",
           kInvalid,
           {"compressed: rank 2", "packed [total, num_heads, head_dim_v]"},
           [](C& t) { t.args.compressed.rank = 2; }},
          {"selected shape",
           kInvalid,
           {"selected: shape [2, 70, 2, 6], must be [2, 70, 4, 6]"},
           [](C& t) { t.args.selected.shape[2] = 2; }},
          {"selected dtype",
           kType,
           {"selected: dtype float64, must be float32 as compressed"},
           [](C& t) { t.args.selected.dtype = DType::float64; }},
          {"two gates",
           kInvalid,
           {"gates: shape [2, 70, 2], must be [2, 70, 3]", "[batch, seqlen, num_heads, 3]"},
           [](C& t) { t.args.gates.shape[2] = 2; }},
          {"gates of other heads",
           kInvalid,
           {"gates: shape [2, 70, 2, 3], must be [2, 70, 4, 3]"},
           [](C& t) { t.args.gates = reshaped(t.args.gates, {2, 70, 2, 3}); },
           [](C& t) { t.args.gates = t.tensor(DType::float32, {2, 70, 4, 3}); }},
          {"gates rank",
           kInvalid,
           {"gates: rank 2 with shape [140, 3]"},
           [](C& t) { t.args.gates = reshaped(t.args.gates, {140, 3}); }},
          {"gates dtype",
           kType,
           {"gates: dtype bfloat16, must be float32 as compressed, or float32"},
           [](C& t) { t.args.gates.dtype = DType::bfloat16; }},
          {"out is sliding",
           kInvalid,
           {"out: shares memory with sliding"},
           [](C& t) { t.args.out.data = t.args.sliding.data; }},
          {"sliding device", kType, {"sliding: on cuda:1"}, [](C& t) { t.args.sliding.device = kGpu; }},
          {"backend",
           kInvalid,
           {"backend: \"slow\""},
           [](C& t) { t.args.backend = "slow"; },
           [](C& t) { t.args.backend = ""; }},
      },
      c.args());
}

TEST(NsaRefuses, CombineBackward) {
  using C = Trial<nsa::CombineBackwardArgs>;
  const Combination c(packed_setup());
  check_table<nsa::CombineBackwardArgs>(
      {
          {"grad_out", kInvalid, {"grad_out: missing"}, [](C& t) { t.args.grad_out = {}; }},
          {"grad_selected", kInvalid, {"grad_selected: missing"}, [](C& t) { t.args.grad_selected = {}; }},
          {"grad_gates", kInvalid, {"grad_gates: missing"}, [](C& t) { t.args.grad_gates = {}; }},
          {"grad_gates shape",
           kInvalid,
           {"grad_gates: shape [70, 4, 3], must be [70, 3]"},
           [](C& t) { t.args.grad_gates = reshaped(t.args.grad_gates, {70, 4, 3}); }},
          {"grad_sliding dtype",
           kType,
           {"grad_sliding: dtype float16"},
           [](C& t) { t.args.grad_sliding.dtype = DType::float16; }},
          {"grads share memory",
           kInvalid,
           {"grad_sliding: shares memory with grad_compressed"},
           [](C& t) { t.args.grad_sliding.data = t.args.grad_compressed.data; }},
          {"gates rank",
           kInvalid,
           {"gates: rank 4", "[total, 3] or [total, num_heads, 3]"},
           [](C& t) { t.args.gates = reshaped(t.args.gates, {1, 70, 1, 3}); }},
      },
      c.backward_args());
}

// ---- Questions ----

TEST(NsaQuestions, NeedNoOutputsAndNoData) {
  const NsaSetup setup = packed_setup();
  const Compression compression(setup);
  nsa::CompressArgs compress = compression.args();
  compress.out = {};
  compress.inputs.x.data = compress.inputs.weight.data = nullptr;
  EXPECT_EQ(nsa::explain(compress).backend, "reference");
  EXPECT_EQ(nsa::workspace_size(compress), 0u);
  EXPECT_THROW(nsa::compress(compress), Error);

  const Selection selection(setup);
  nsa::SelectBlocksArgs select = selection.args();
  select.selected_blocks = select.lse = {};
  select.query.data = select.compressed_key.data = nullptr;
  EXPECT_EQ(nsa::explain(select).backend, "reference");

  const SelectedAttention selected(setup);
  nsa::SelectedForwardArgs forward = selected.args();
  forward.out = forward.lse = {};
  forward.inputs.selected_blocks.data = nullptr;
  EXPECT_EQ(nsa::explain(forward).backend, "reference");
  nsa::SelectedBackwardArgs backward = selected.backward_args();
  backward.grad_key = backward.out = {};
  const nsa::Choice choice = nsa::explain(backward);
  EXPECT_EQ(choice.kernel, "float64 loops");
  EXPECT_EQ(choice.workspace_bytes, nsa::workspace_size(backward));
  ASSERT_FALSE(choice.reasons.empty());
  EXPECT_TRUE(choice.reasons.back().chosen);
  EXPECT_FALSE(choice.reasons.front().reason.empty());
}

TEST(NsaQuestions, RefuseWhatIsWrong) {
  const SelectedAttention selected(batched_setup());
  nsa::SelectedForwardArgs args = selected.args();
  args.options.block_size = 1000;
  EXPECT_THROW((void)nsa::explain(args), Error);
  EXPECT_THROW((void)nsa::workspace_size(args), Error);
}

// The size of the workspace is known before the outputs are.
TEST(NsaQuestions, WorkspaceDoesNotDependOnOutputs) {
  for (NsaSetup setup : {batched_setup(), packed_setup()}) {
    setup.backend = "";
    const Compression compression(setup);
    nsa::CompressArgs compress = compression.args();
    const std::size_t forward_bytes = nsa::workspace_size(compress);
    compress.out = {};
    EXPECT_EQ(nsa::workspace_size(compress), forward_bytes);
    nsa::CompressBackwardArgs backward = compression.backward_args();
    const std::size_t backward_bytes = nsa::workspace_size(backward);
    backward.grad_out = backward.grad_x = backward.grad_weight = backward.grad_intra_block_pe = {};
    EXPECT_EQ(nsa::workspace_size(backward), backward_bytes);
  }
}

TEST(NsaDeathTest, DispatchIsLogged) {
  const auto child = [] {
    SelectedAttention a(batched_setup());
    a.setup.backend = "";
    a.forward();
    return 0;
  };
  EXPECT_EXIT(
      {
        setenv("FSA_LOG", "dispatch", 1);
        setenv("FSA_BACKEND", "reference", 1);
        std::exit(child());
      },
      testing::ExitedWithCode(0),
      "fsa: nsa selected_forward float32 batch 2 heads 4/2 seqlen 70x70 head_dim 8/6 block_size 16 top_k 4 "
      "-> "
      "reference, float64 loops");
}

}  // namespace
}  // namespace fsa::test
