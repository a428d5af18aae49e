// SPDX-License-Identifier: Apache-2.0
// Which kernel computes what, without a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "backend/cuda/backward_dispatch.h"
#include "backend/cuda/dispatch.h"

namespace fsa::cuda {
namespace {

constexpr unsigned kSharedBytesOfHopper = 227 * 1024;

Problem problem(std::int64_t head_dim = 128, std::int64_t head_dim_v = 128) {
  Problem p;
  p.dtype = DType::bfloat16;
  p.device = {DeviceKind::cuda, 0};
  p.batch = 2;
  p.num_heads = 4;
  p.num_kv_heads = 2;
  p.group_size = 2;
  p.head_dim = head_dim;
  p.head_dim_v = head_dim_v;
  p.max_seqlen_q = 1000;
  p.max_seqlen_k = 2000;
  p.total_q = 2000;
  p.total_k = 4000;
  p.softmax_scale = 0.1;
  return p;
}

// Each bit of `features` below 2048 is one that a call may have.
Problem problem_with(std::int64_t head_dim, std::int64_t head_dim_v, int features) {
  Problem p = problem(head_dim, head_dim_v);
  p.causal = features & 1;
  p.window_left = features & 2 ? 5 : -1;
  p.softcap = features & 4 ? 3 : 0;
  p.has_alibi = features & 8;
  p.has_sink = features & 16;
  p.threshold = features & 32 ? 1 : 0;
  p.has_gate = features & 64;
  p.gate_test = p.has_gate && features & 128;
  p.has_block_mask = features & 256;
  p.has_window_sizes = features & 512;
  p.deterministic = features & 1024;
  return p;
}

TEST(CudaDispatch, EveryKernelHasItsNameAndSource) {
  std::set<std::string> names;
  std::set<std::uint64_t> identities;
  for (const KernelConfig& config : reachable_kernels()) {
    EXPECT_TRUE(names.insert(name_of(config)).second) << name_of(config);
    const jit::KernelSource source = source_of(config);
    EXPECT_TRUE(identities.insert(source.identity()).second) << source.name;
    EXPECT_NE(source.text.find(source.entry + "("), std::string::npos) << source.name;
    EXPECT_LE(shared_bytes_of(config), kSharedBytesOfHopper) << source.name;
    EXPECT_LE(threads_of(config), 1024u) << source.name;
  }
  for (const KernelConfig& config : shipped_kernels()) EXPECT_TRUE(names.contains(name_of(config)));
  EXPECT_TRUE(names.contains(name_of(clear_counters_kernel())));
}

TEST(CudaDispatch, EveryChoiceIsReachable) {
  std::set<std::string> names;
  for (const KernelConfig& config : reachable_kernels()) names.insert(name_of(config));
  for (std::int64_t head_dim = 1; head_dim <= 256; head_dim += 17)
    for (std::int64_t head_dim_v = 1; head_dim_v <= 256; head_dim_v += 15)
      for (int features = 0; features < 1024; ++features) {
        const Problem p = problem_with(head_dim, head_dim_v, features);
        if (!reject_forward(p).empty()) continue;
        const KernelConfig config = forward_kernel(p);
        ASSERT_TRUE(names.contains(name_of(config))) << name_of(config);
        ASSERT_GE(config.tile.head_dim, head_dim);
        ASSERT_GE(config.tile.head_dim_v, head_dim_v);
        if (p.has_block_mask) {
          ASSERT_EQ((head_dim <= 128 ? 128 : 64) % config.tile.block_n, 0) << "a block is whole key tiles";
        } else if (p.threshold > 0 || p.has_gate) {
          ASSERT_EQ(config.tile.block_n, head_dim <= 128 ? 128 : 64) << "a key tile is a skip tile";
        }
      }
}

TEST(CudaDispatch, EveryBackwardChoiceIsReachable) {
  std::set<std::string> names;
  for (const KernelConfig& config : reachable_kernels()) names.insert(name_of(config));
  const auto expect_reachable = [&](const KernelConfig& config) {
    ASSERT_TRUE(names.contains(name_of(config))) << name_of(config);
  };
  for (std::int64_t head_dim = 1; head_dim <= 256; head_dim += 17)
    for (std::int64_t head_dim_v = 1; head_dim_v <= 256; head_dim_v += 15)
      for (int features = 0; features < 2048; ++features) {
        Problem p = problem_with(head_dim, head_dim_v, features);
        p.operation = Operation::backward;
        if (!reject_backward(p).empty()) continue;
        const KernelConfig config = backward_kernel(p);
        expect_reachable(config);
        expect_reachable(backward_prepare_kernel(p));
        expect_reachable(backward_finish_kernel(p));
        if (p.has_sink) expect_reachable(sum_sink_kernel(p));
        if (p.has_block_mask) expect_reachable(block_columns_kernel(p));
        expect_reachable(sum_parts_kernel(p));
        if (p.has_block_mask || p.has_window_sizes || config.gate_bits)
          expect_reachable(split_columns_kernel(p));
        ASSERT_GE(config.backward.head_dim, head_dim);
        ASSERT_GE(config.backward.head_dim_v, head_dim_v);
        if (!config.gate_bits) continue;
        expect_reachable(transpose_bits_kernel(p));
        ASSERT_EQ(config.backward.block_m, 64) << "a row tile is that of the skip map";
        ASSERT_EQ(config.backward.block_n, head_dim <= 128 ? 128 : 64) << "a key tile is a skip tile";
      }
}

TEST(CudaDispatch, SoftcapChoices) {
  Problem p = problem();
  p.softcap = 30;
  EXPECT_EQ(forward_kernel(p).softcap, SoftcapKind::bounded);
  EXPECT_EQ(name_of(forward_kernel(p)), "forward_sm90_bf16_d128_full_boundedcap_192x80");
  EXPECT_EQ(backward_kernel(p).softcap, SoftcapKind::fast) << "of the same function";
  p.softcap = 50;
  EXPECT_EQ(forward_kernel(p).softcap, SoftcapKind::fast) << "2^-72 to 2^72 would leave values too little";
  p.softcap = 30;
  p.has_alibi = true;
  EXPECT_EQ(forward_kernel(p).softcap, SoftcapKind::fast) << "ALiBi has no bound";
  p.has_alibi = false;
  p.dtype = DType::float16;
  EXPECT_EQ(forward_kernel(p).softcap, SoftcapKind::fast) << "p would leave the range of fp16";
  p.dtype = DType::bfloat16;
  p.threshold = 1;
  EXPECT_EQ(forward_kernel(p).softcap, SoftcapKind::exact);
}

TEST(CudaDispatch, BackwardChoices) {
  Problem p = problem();
  p.operation = Operation::backward;
  p.causal = true;
  EXPECT_EQ(name_of(backward_kernel(p)), "backward_sm90_bf16_d128_causal_64x128");
  p.threshold = 1;
  EXPECT_EQ(name_of(backward_kernel(p)), "backward_sm90_bf16_d128_causal_bits_64x128");
  p.softcap = 30;
  EXPECT_EQ(name_of(backward_kernel(p)), "backward_sm90_bf16_d128_causal_bits_exactcap_64x128")
      << "with a vote the forward computes the exact one";
  p = problem();
  p.operation = Operation::backward;
  p.has_window_sizes = true;
  EXPECT_FALSE(backward_kernel(p).gate_bits);
  EXPECT_EQ(backward_workspace(p).visible_bits, BackwardWorkspace::kAbsent);
  p.deterministic = true;
  EXPECT_TRUE(backward_kernel(p).gate_bits) << "the order of the sums comes from a map";
  EXPECT_NE(backward_workspace(p).visible_bits, BackwardWorkspace::kAbsent);
}

TEST(CudaDispatch, LongColumnsHaveSlots) {
  Problem p = problem();
  p.operation = Operation::backward;
  p.max_seqlen_q = p.max_seqlen_k = 4096;
  p.total_q = p.total_k = 2 * 4096;
  p.causal = true;
  EXPECT_FALSE(splits_columns(p)) << "all columns of a causal mask are alike";
  EXPECT_EQ(backward_workspace(p).partial_sums, BackwardWorkspace::kAbsent);
  p.threshold = 1;
  EXPECT_TRUE(splits_columns(p));
  EXPECT_EQ(name_of(split_columns_kernel(p)), "split_columns_sm90_bf16_d128_causal_bits_64x128");
  EXPECT_EQ(name_of(sum_parts_kernel(p)), "sum_parts_sm90_bf16_d128_64x128");
  EXPECT_EQ(most_slots(p), kernels::kMostSlots) << "2 x 4 heads x 64 x 32 tiles in parts of 32";
  const BackwardWorkspace parts = backward_workspace(p);
  EXPECT_EQ(parts.bytes - parts.partial_sums, static_cast<std::size_t>(512 * 128 * (256 + 1) * 4));
  p.max_seqlen_q = 64 * 2 * kernels::kLeastPart / p.group_size - 64;
  EXPECT_FALSE(splits_columns(p)) << "a column is shorter than two parts";
}

// The last wave of a deterministic causal call: half of the heads at most, as many as other waves, or four.
TEST(CudaDispatch, LastHeadsOfACausalCallGoFromTheFirstKeyTile) {
  Problem p = problem();
  p.operation = Operation::backward;
  p.deterministic = p.causal = true;
  p.group_size = 1;
  p.batch = 8;
  p.num_heads = p.num_kv_heads = 16;
  p.max_seqlen_q = p.max_seqlen_k = 2048;
  EXPECT_EQ(key_heads_per_wave(p), 16) << "2 MB each: 20 would fit and leave 8 of 128 for the last wave";
  EXPECT_EQ(ascending_key_heads(p), 16);
  p.batch = 1;
  p.max_seqlen_q = p.max_seqlen_k = 16384;
  EXPECT_EQ(ascending_key_heads(p), 4);
  p.num_heads = p.num_kv_heads = 6;
  EXPECT_EQ(ascending_key_heads(p), 3);
  p.num_heads = p.num_kv_heads = 3;
  EXPECT_EQ(ascending_key_heads(p), 0);
  p.num_heads = p.num_kv_heads = 16;
  const auto none = [&](auto change) {
    Problem changed = p;
    change(changed);
    return ascending_key_heads(changed) == 0;
  };
  EXPECT_TRUE(none([](Problem& c) { c.deterministic = false; }));
  EXPECT_TRUE(none([](Problem& c) { c.threshold = 1; }))
      << "bits know the order from the last key tile alone";
  EXPECT_TRUE(none([](Problem& c) { c.has_block_mask = true; })) << "so do lists";
  EXPECT_TRUE(none([](Problem& c) { c.has_window_sizes = true; }));
  EXPECT_TRUE(none([](Problem& c) { c.head_dim = c.head_dim_v = 256; }))
      << "consumers would wait for their turns";
}

TEST(CudaDispatch, WavesOfTheBackwardAreEven) {
  Problem p = problem();
  p.operation = Operation::backward;
  p.group_size = 1;
  p.max_seqlen_q = p.max_seqlen_k = 8192;  // 8 MB a head: five fit
  const auto wave = [&](std::int64_t heads) {
    p.batch = 1;
    p.num_heads = p.num_kv_heads = heads;
    return key_heads_per_wave(p);
  };
  EXPECT_EQ(wave(32), 4);
  EXPECT_EQ(wave(10), 5);
  EXPECT_EQ(wave(7), 4) << "4 + 3";
  EXPECT_EQ(wave(9), 3);
  EXPECT_EQ(wave(11), 4) << "4 + 4 + 3";
  EXPECT_EQ(wave(4), 4);
  EXPECT_EQ(wave(1), 1);
  p.max_seqlen_q = p.max_seqlen_k = 16384;
  EXPECT_EQ(wave(4), 2);
  p.group_size = 4;
  EXPECT_EQ(wave(8), 1) << "64 MB of queries, but a key tile for each processor";
  p.max_seqlen_q = p.max_seqlen_k = 8192;
  EXPECT_EQ(wave(8), 2) << "one fits, whose 64 key tiles do not busy 132 processors";
}

// Who comes first to a row tile stores its sums where an adder has whole row tiles of short columns; elsewhere the main
// kernel clears them, where it has a warp to spare and waves in order.
TEST(CudaDispatch, SumsOfLaterWavesAreStoredFirstOrCleared) {
  Problem p = problem(64);
  p.operation = Operation::backward;
  EXPECT_FALSE(clears_ahead(p)) << "all heads are one wave";
  EXPECT_EQ(backward_workspace(p).clears, BackwardWorkspace::kAbsent);
  p.max_seqlen_q = p.max_seqlen_k = 32768;
  p.total_q = p.total_k = 2 * 32768;
  EXPECT_EQ(key_heads_per_wave(p), 1) << "two query heads of 16 MB";
  EXPECT_TRUE(clears_ahead(p));
  EXPECT_FALSE(first_stores(p)) << "each adder has half of a row tile";
  EXPECT_NE(backward_workspace(p).clears, BackwardWorkspace::kAbsent);
  EXPECT_EQ(backward_workspace(p).turns, BackwardWorkspace::kAbsent);

  const auto stored = [&](auto change) {
    Problem changed = p;
    change(changed);
    const BackwardWorkspace parts = backward_workspace(changed);
    EXPECT_EQ(first_stores(changed), parts.turns != BackwardWorkspace::kAbsent);
    EXPECT_EQ(clears_ahead(changed), parts.clears != BackwardWorkspace::kAbsent);
    EXPECT_FALSE(first_stores(changed) && clears_ahead(changed));
    return first_stores(changed);
  };
  const auto wide = [](Problem& c) { c.head_dim = c.head_dim_v = 128; };
  EXPECT_TRUE(stored([](Problem& c) { c.deterministic = true; }));
  EXPECT_FALSE(stored(wide)) << "columns are long";
  EXPECT_TRUE(stored([&](Problem& c) { wide(c), c.window_left = 511; }));
  EXPECT_TRUE(stored([&](Problem& c) { wide(c), c.window_left = 511, c.softcap = 9; }));
  EXPECT_TRUE(stored([&](Problem& c) { wide(c), c.threshold = 1; }));
  EXPECT_TRUE(stored([&](Problem& c) { wide(c), c.has_window_sizes = true; }));
  EXPECT_TRUE(stored([&](Problem& c) { wide(c), c.threshold = 1, c.has_gate = true; }));
  const auto narrow = [](Problem& c) { c.head_dim = c.head_dim_v = 64; };
  EXPECT_FALSE(stored([&](Problem& c) { narrow(c), c.threshold = 1; })) << "an adder has half of the time";

  const auto cleared_before = [&](auto change) {
    Problem changed = p;
    change(changed);
    return !clears_ahead(changed) && !first_stores(changed);
  };
  EXPECT_TRUE(cleared_before([&](Problem& c) { narrow(c), c.threshold = 1; })) << "columns may be cut";
  EXPECT_TRUE(cleared_before([](Problem& c) { c.packed_q = true; })) << "rows lie in another order";
  EXPECT_TRUE(cleared_before([](Problem& c) { c.packed_k = true; })) << "rows lie in another order";
  EXPECT_TRUE(cleared_before([](Problem& c) { c.head_dim = c.head_dim_v = 256; })) << "no adders";
}

// float32 dQ in whole row tiles, and what grows with seqlen * heads alone.
TEST(CudaDispatch, BackwardWorkspaceIsThatOfTheFormula) {
  Problem p = problem();
  p.operation = Operation::backward;
  const std::int64_t rows = 2 * 4 * 1024;  // 1000 rows in tiles of 64
  const std::int64_t counters = 64 + 64;   // of work, and for each head of key tiles whose sums are done
  EXPECT_EQ(backward_workspace(p).bytes, static_cast<std::size_t>(counters + rows * 4 * 4 + rows * 128 * 4));
  p.softcap = 30;  // whose row vectors are not folded
  EXPECT_EQ(backward_workspace(p).bytes, static_cast<std::size_t>(counters + rows * 2 * 4 + rows * 128 * 4));
  p.softcap = 0;
  p.threshold = 1;
  const std::int64_t columns = 2 * 4 * 16 * 1 * 4;  // a word per key tile of 128: 16 row tiles
  const std::int64_t turns = rows / 64 * 32;        // of row tiles, where who comes first stores their sums
  EXPECT_EQ(backward_workspace(p).bytes,
            static_cast<std::size_t>(counters + rows * 4 * 4 + rows * 128 * 4 + turns + columns));
  EXPECT_FALSE(splits_columns(p)) << "no column is long";
  p.aligned_grad_out = false;
  EXPECT_EQ(backward_workspace(p).bytes, static_cast<std::size_t>(counters + rows * 4 * 4 + rows * 128 * 4 +
                                                                  turns + columns + 2000 * 4 * 128 * 2));
}

TEST(CudaDispatch, Choices) {
  Problem p = problem();
  EXPECT_EQ(name_of(forward_kernel(p)), "forward_sm90_bf16_d128_full_128x128");
  p.causal = true;
  EXPECT_EQ(name_of(forward_kernel(p)), "forward_sm90_bf16_d128_causal_128x128");
  p.threshold = 1;
  EXPECT_EQ(name_of(forward_kernel(p)), "forward_sm90_bf16_d128_causal_threshold_128x128");
  p = problem(160, 128);
  p.window_left = 3;
  p.dtype = DType::float16;
  EXPECT_EQ(name_of(forward_kernel(p)), "forward_sm90_fp16_d192x128_window_128x128");
  p = problem(40, 100);
  p.window_right = 3;
  EXPECT_EQ(name_of(forward_kernel(p)), "forward_sm90_bf16_d128_causal_128x128")
      << "a right edge, whatever it is";
  p = problem(256, 256);
  p.has_block_mask = true;
  EXPECT_EQ(name_of(forward_kernel(p)), "forward_sm90_bf16_d256_blocks_128x64")
      << "a key tile is a skip tile";
}

TEST(CudaDispatch, RefusalsNameTheValue) {
  const auto reason = [](auto change) {
    Problem p = problem();
    change(p);
    return reject_forward(p);
  };
  EXPECT_EQ(reason([](Problem&) {}), "");
  EXPECT_NE(reason([](Problem& p) { p.dtype = DType::float32; }).find("not float32"), std::string::npos);
  EXPECT_NE(reason([](Problem& p) { p.head_dim = 257; }).find("not 257"), std::string::npos);
  EXPECT_NE(reason([](Problem& p) { p.head_dim_v = 300; }).find("not 300"), std::string::npos);
  EXPECT_NE(reason([](Problem& p) { p.paged = true; }).find("page_table"), std::string::npos);
  EXPECT_NE(reason([](Problem& p) { p.compress_block = 32; }).find("compressed"), std::string::npos);
  EXPECT_NE(reason([](Problem& p) { p.max_seqlen_k = std::int64_t{1} << 30; }).find("1073741824"),
            std::string::npos);
  EXPECT_NE(reason([](Problem& p) { p.batch = 70000; }).find("65535"), std::string::npos);
  EXPECT_NE(reason([](Problem& p) { p.softmax_scale = 1e-60; }).find("softmax_scale"), std::string::npos);
  EXPECT_NE(reason([](Problem& p) { p.contiguous_lists = false; }).find("contiguous()"), std::string::npos);
  const auto beside_blocks = [&](auto change) {
    return reason([&](Problem& p) {
      p.has_block_mask = true;
      change(p);
    });
  };
  EXPECT_EQ(beside_blocks([](Problem&) {}), "");
  EXPECT_EQ(beside_blocks([](Problem& p) { p.softcap = 5, p.has_alibi = p.has_sink = true; }), "");
  EXPECT_NE(beside_blocks([](Problem& p) { p.causal = true; }).find("causal"), std::string::npos);
  EXPECT_NE(beside_blocks([](Problem& p) { p.window_right = 3; }).find("window"), std::string::npos);
  EXPECT_NE(beside_blocks([](Problem& p) { p.has_window_sizes = true; }).find("window"), std::string::npos);
  EXPECT_NE(beside_blocks([](Problem& p) { p.threshold = 1; }).find("threshold"), std::string::npos);
  EXPECT_NE(beside_blocks([](Problem& p) { p.has_gate = true; }).find("gate"), std::string::npos);
  EXPECT_NE(beside_blocks([](Problem& p) { p.has_skip_map = true; }).find("skip map"), std::string::npos);
  EXPECT_NE(reason([](Problem& p) {
              p.head_dim = 64;
              p.head_dim_v = 192;
              p.threshold = 1;
            }).find("64 and 192"),
            std::string::npos);
}

// A field that the CUDA backend does not know is a wrong answer in the making. When this fails: serve the new field
// of Problem in dispatch.cpp or refuse it in reject_features, add it to the test above, then correct the size.
TEST(CudaDispatch, KnowsEveryFieldOfProblem) { EXPECT_EQ(sizeof(Problem), 296u); }

TEST(CudaDispatch, WorkspaceHoldsWhatTheProblemNeeds) {
  Problem p = problem();
  p.max_seqlen_q = 100;
  EXPECT_EQ(forward_workspace(p).bytes, 0u) << "few tiles: not even counters";
  p = problem();
  p.batch = 64;
  EXPECT_EQ(forward_workspace(p).bytes, 64u);
  p.max_seqlen_q = 100;
  p.batch = 2;
  p.has_block_mask = p.has_partial_blocks = true;
  EXPECT_EQ(forward_workspace(p).bytes, 0u);
  p.has_partial_blocks = false;
  EXPECT_EQ(forward_workspace(p).bytes, 64u) << "the length of the lists that are not there";
  p = problem();
  p.max_seqlen_q = 100;
  p.packed_q = p.packed_k = p.has_window_sizes = true;
  EXPECT_EQ(forward_workspace(p).bytes, 0u);
  p.contiguous_tables = false;
  EXPECT_EQ(forward_workspace(p).bytes, 5 * 64u) << "a copy of each table";
  p = problem(100, 33);
  p.aligned_query = p.aligned_key = p.aligned_value = false;
  p.has_gate = p.gate_test = true;
  const ForwardWorkspace parts = forward_workspace(p);
  std::size_t offsets[] = {parts.query,      parts.key,           parts.value,      parts.out,
                           parts.gate_delta, parts.gate_extremes, parts.gate_terms, parts.gate_bits};
  EXPECT_TRUE(std::is_sorted(std::begin(offsets), std::end(offsets)));
  for (const std::size_t offset : offsets) {
    EXPECT_EQ(offset % 64, 0u);
    EXPECT_LT(offset, parts.bytes);
  }
  EXPECT_GE(parts.key - parts.query, 2000u * 4 * 104 * 2) << "rows of head_dim 100 padded to 104";
}

}  // namespace
}  // namespace fsa::cuda
