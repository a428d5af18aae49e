// SPDX-License-Identifier: Apache-2.0
// What a call of the CUDA backend asks of the driver, in which order, without a GPU.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <initializer_list>
#include <string>
#include <vector>

#include "backend/cuda/backward.h"
#include "backend/cuda/backward_dispatch.h"
#include "backend/cuda/dispatch.h"
#include "backend/cuda/forward.h"
#include "driver/fake_driver.h"
#include "fsa/error.h"
#include "jit/store.h"

namespace fsa::cuda {
namespace {

using test::DriverCall;
using test::fake_driver;

// Addresses that nobody reads.
char* address(std::uintptr_t block) { return reinterpret_cast<char*>(block << 32); }
char* const kWorkspace = address(99);

Operand tensor(std::uintptr_t block, DType dtype, std::int64_t rows, std::int64_t heads, std::int64_t dim) {
  Operand operand;
  operand.data = address(block);
  operand.dtype = dtype;
  operand.stride_head = dim;
  operand.stride_row = heads * dim;
  operand.stride_batch = rows * heads * dim;
  return operand;
}

struct Call {
  Problem problem;
  Arguments args;
};

Call call(std::int64_t batch, std::int64_t seqlen, std::int64_t head_dim = 128) {
  Problem p;
  p.dtype = DType::bfloat16;
  p.device = {DeviceKind::cuda, 0};
  p.batch = batch;
  p.num_heads = p.num_kv_heads = 4;
  p.group_size = 1;
  p.head_dim = p.head_dim_v = head_dim;
  p.max_seqlen_q = p.max_seqlen_k = seqlen;
  p.total_q = p.total_k = batch * seqlen;
  p.softmax_scale = 0.1;
  p.causal = true;
  Arguments a;
  std::uintptr_t block = 1;
  for (Operand* operand :
       {&a.query, &a.key, &a.value, &a.out, &a.grad_out, &a.grad_query, &a.grad_key, &a.grad_value})
    *operand = tensor(block++, DType::bfloat16, seqlen, 4, head_dim);
  a.lse = tensor(block++, DType::float32, 4, 1, seqlen);
  a.lse.stride_head = seqlen;
  return {p, a};
}

class CudaLaunches : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::string pattern = ::testing::TempDir() + "/fsa_launches_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    pack_ = pattern;
    setenv("FSA_KERNEL_PATH", pack_.c_str(), 1);
    setenv("FSA_JIT", "off", 1);
    provide({clear_counters_kernel(), copy_rows_kernel()});
  }
  static void TearDownTestSuite() { std::filesystem::remove_all(pack_); }
  void SetUp() override { fake_driver().calls.clear(); }
  void TearDown() override { fake_driver().capturing = false; }

  // Files of the pack whose machine code is the kernel's name.
  static void provide(std::initializer_list<KernelConfig> configs) {
    for (const KernelConfig& config : configs) {
      const jit::KernelSource source = source_of(config);
      const jit::CubinFile file{source.name + '\0', "", 13000, 0};
      ASSERT_EQ(jit::write_whole(jit::path_in(pack_, source), encode(file, source.identity())), "");
    }
  }

  static std::vector<DriverCall> forward(const Call& c) {
    provide({forward_kernel(c.problem)});
    fake_driver().calls.clear();
    run_forward(c.problem, c.args, {kWorkspace, forward_workspace(c.problem).bytes});
    return fake_driver().calls;
  }
  static std::vector<DriverCall> backward(Call c) {
    c.problem.operation = Operation::backward;
    provide(
        {backward_kernel(c.problem), backward_prepare_kernel(c.problem), backward_finish_kernel(c.problem)});
    fake_driver().calls.clear();
    run_backward(c.problem, c.args, {kWorkspace, backward_workspace(c.problem).bytes});
    return fake_driver().calls;
  }

  static DriverCall clearing(const char* counters) {
    return {"clear_counters_sm90", 1, 32, false, counters, 0};
  }
  static DriverCall attention(const Problem& p, unsigned blocks, bool early) {
    return {name_of(forward_kernel(p)), blocks, threads_of(forward_kernel(p)), early, nullptr, 0};
  }

  static inline std::string pack_;
};

TEST_F(CudaLaunches, ManyWorkTilesAreCountedFromACounterClearedBeside) {
  const Call c = call(8, 1000);
  const std::size_t counters = forward_workspace(c.problem).counters;
  EXPECT_EQ(forward(c),
            (std::vector<DriverCall>{clearing(kWorkspace + counters), attention(c.problem, 132, true)}));
}

TEST_F(CudaLaunches, FewWorkTilesAreOneOrdinaryLaunch) {
  const Call c = call(2, 1000);
  EXPECT_EQ(forward(c), (std::vector<DriverCall>{attention(c.problem, 64, false)}));
}

// What the attention kernel reads without a wait is complete when the clearing kernel begins.
TEST_F(CudaLaunches, NothingComesBetweenTheClearingAndTheAttention) {
  const auto expect_last_two = [](const Call& c, std::vector<std::string> before) {
    const std::vector<DriverCall> calls = forward(c);
    ASSERT_EQ(calls.size(), before.size() + 2);
    for (std::size_t i = 0; i < before.size(); ++i) {
      EXPECT_EQ(calls[i].kernel, before[i]);
      EXPECT_FALSE(calls[i].early) << before[i];
    }
    EXPECT_EQ(calls[before.size()], clearing(kWorkspace + forward_workspace(c.problem).counters));
    EXPECT_EQ(calls.back(), attention(c.problem, 132, true));
  };
  Call c = call(8, 1000);
  c.problem.aligned_query = c.problem.aligned_value = false;
  expect_last_two(c, {"copy_rows_sm90", "copy_rows_sm90"});

  c = call(8, 1000);
  c.problem.has_gate = c.problem.gate_test = true;
  c.args.alpha = c.args.delta = tensor(20, DType::float32, 1000, 4, 1);
  provide({gate_prepare_kernel(c.problem), gate_bitmap_kernel(c.problem)});
  expect_last_two(c, {"gate_prepare_sm90_128", "gate_bitmap_sm90_causal_128"});

  c = call(8, 1024);
  c.problem.causal = false;
  c.problem.has_block_mask = true;
  c.problem.block_rows = c.problem.block_keys = 128;
  const std::string fill;
  expect_last_two(c, {fill});
  EXPECT_EQ(fake_driver().calls[0].parameter, kWorkspace + forward_workspace(c.problem).no_blocks);
}

TEST_F(CudaLaunches, CopyOfTheOutputComesLast) {
  Call c = call(8, 1000, 100);
  const std::vector<DriverCall> calls = forward(c);
  ASSERT_EQ(calls.size(), 3u);
  EXPECT_TRUE(calls[1].early);
  EXPECT_EQ(calls[2].kernel, "copy_rows_sm90");
  EXPECT_FALSE(calls[2].early) << "it waits for the attention kernel";
}

TEST_F(CudaLaunches, ALargerCallMayBeTheCapturedOne) {
  Call c = call(2, 1000, 64);
  forward(c);
  fake_driver().capturing = true;
  c = call(16, 1000, 64);
  EXPECT_EQ(forward(c).size(), 2u);
  c = call(16, 1000, 256);
  EXPECT_THROW(forward(c), Error) << "a kernel that no call has used";
}

TEST_F(CudaLaunches, TheBackwardsCountersAreClearedByItsFirstKernel) {
  Call c = call(2, 1000);
  std::vector<DriverCall> calls = backward(c);
  ASSERT_EQ(calls.size(), 3u);
  EXPECT_TRUE(calls[0].kernel.starts_with("backward_prepare_")) << calls[0].kernel;
  EXPECT_FALSE(calls[0].early) << "it clears what the call before may still use";
  EXPECT_TRUE(calls[1].kernel.starts_with("backward_sm90_")) << calls[1].kernel;
  EXPECT_TRUE(calls[1].early);
  EXPECT_TRUE(calls[2].kernel.starts_with("backward_finish_")) << calls[2].kernel;
  EXPECT_TRUE(calls[2].early);

  // Rows that no sequence holds: there is no block of the prepare kernel.
  c.problem.batch = 0;
  c.problem.packed_q = c.problem.packed_k = true;
  calls = backward(c);
  Problem p = c.problem;
  p.operation = Operation::backward;
  ASSERT_EQ(calls.size(), 2u);
  const DriverCall fill = {"", 0, 0, false, kWorkspace + backward_workspace(p).counters, 8};
  EXPECT_EQ(calls[0], fill);
  EXPECT_TRUE(calls[1].kernel.starts_with("backward_sm90_")) << calls[1].kernel;
}

}  // namespace
}  // namespace fsa::cuda
