// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/kernel_call.h"

#include <algorithm>

#include "backend/cuda/driver.h"
#include "core/skip_tile.h"

namespace fsa::cuda {
namespace {

// CUlaunchAttributeID of the driver API.
constexpr int kProgrammaticStreamSerialization = 6;
constexpr double kLog2E = 1.4426950408889634;

kernels::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return kernels::ScalarType::bf16;
    case DType::float16:
      return kernels::ScalarType::fp16;
    case DType::float64:
      return kernels::ScalarType::float64;
    default:
      return kernels::ScalarType::float32;
  }
}

std::int32_t window(std::int64_t size) {
  return static_cast<std::int32_t>(size < 0 ? kernels::kOpenWindow
                                            : std::min<std::int64_t>(size, kernels::kOpenWindow));
}

void fill_policies(const Problem& p, const Arguments& args, kernels::ForwardParams& params) {
  params.softmax_scale_log2 = static_cast<float>(p.softmax_scale * kLog2E);
  params.softcap = static_cast<float>(p.softcap);
  params.threshold = static_cast<float>(p.threshold);
  params.causal_lengths = p.causal_lengths();
  params.alibi = scalar_operand(args.alibi_slopes);
  params.sink = scalar_operand(args.sink);
  params.alpha = scalar_operand(args.alpha);
  params.delta = scalar_operand(args.delta);
  params.gate_test = p.gate_test;
  params.gate_threshold = p.gate_threshold_default ? 0 : static_cast<float>(p.gate_threshold);
  params.adaptive_gate = p.adaptive_gate;
  params.log_sigmoid_gate = p.log_sigmoid_gate;
}

}  // namespace

kernels::ScalarOperand scalar_operand(const Operand& operand) {
  if (!operand.present()) return {};
  return {operand.data,        operand.stride_batch,       operand.stride_row,
          operand.stride_head, scalar_type(operand.dtype), 0};
}

bool is_dense(const Problem& p, const SkipMap& map) {
  const std::int64_t batch = p.packed_q ? 1 : p.batch;
  if (batch == 0 || map.tiles == 0 || map.words == 0) return true;
  return (map.tiles <= 1 || map.stride_tile == map.words) &&
         (p.num_heads == 1 || map.stride_head == map.tiles * map.words) &&
         (batch <= 1 || map.stride_batch == p.num_heads * map.tiles * map.words);
}

int KernelCall::processors() const {
  return driver().devices[static_cast<std::size_t>(p_.device.index)].processors;
}

void KernelCall::launch(const LoadedKernel& kernel, Grid grid, void* params) const {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  void* parameters[] = {params};
  require_success(driver().call.launch(kernel.kernel, grid.x, grid.y, grid.z, kernel.threads, 1, 1,
                                       kernel.shared_bytes, args_.stream, parameters, nullptr),
                  "cuLaunchKernel");
}

void KernelCall::launch_early(const LoadedKernel& kernel, Grid grid, void* params) const {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  LaunchAttribute early = {kProgrammaticStreamSerialization, 0, {1}};
  const LaunchConfig config = {
      {grid.x, grid.y, grid.z}, {kernel.threads, 1, 1}, kernel.shared_bytes, args_.stream, &early, 1};
  void* parameters[] = {params};
  require_success(driver().call.launch_with(&config, kernel.kernel, parameters, nullptr), "cuLaunchKernelEx");
}

void KernelCall::clear(void* data, std::size_t bytes) const {
  if (bytes > 0)
    require_success(driver().call.fill_bytes(reinterpret_cast<Address>(data), 0, bytes, args_.stream),
                    "cuMemsetD8Async");
}

Operand KernelCall::copy_of(std::size_t part, Rows rows, std::int64_t heads, std::int64_t dim) const {
  Operand copy;
  copy.data = workspace_ + part;
  copy.dtype = p_.dtype;
  copy.stride_head = ceil_div(dim, 8) * 8;
  copy.stride_row = heads * copy.stride_head;
  copy.stride_batch = rows.rows * copy.stride_row;
  return copy;
}

Operand KernelCall::aligned(const Operand& operand, std::size_t part, Rows rows, std::int64_t heads,
                            std::int64_t dim) const {
  if (part == kAbsent) return operand;
  const Operand to = copy_of(part, rows, heads, dim);
  copy(operand, to, rows, heads, dim, ceil_div(dim, 8) * 8);
  return to;
}

const std::int32_t* KernelCall::table(const IndexTable& given, std::size_t part, std::int64_t rows,
                                      std::int64_t columns) const {
  const std::int64_t last_stride = columns > 1 ? given.stride_column : given.stride_row;
  if (part == kAbsent || !given.present || last_stride == 1) return given.data;
  // Two elements of two bytes to an entry.
  Operand from, to;
  from.data = const_cast<std::int32_t*>(given.data);
  from.stride_row = 2 * given.stride_row;
  from.stride_head = 2 * given.stride_column;
  to.data = workspace_ + part;
  to.stride_row = 2 * columns;
  to.stride_head = 2;
  copy(from, to, {1, rows}, columns, 2, 2);
  return reinterpret_cast<const std::int32_t*>(workspace_ + part);
}

void KernelCall::copy(const Operand& from, const Operand& to, Rows rows, std::int64_t heads, std::int64_t dim,
                      std::int64_t columns) const {
  kernels::CopyRowsParams params = {};
  params.from = from.data;
  params.to = to.data;
  params.from_stride_batch = from.stride_batch;
  params.from_stride_row = from.stride_row;
  params.from_stride_head = from.stride_head;
  params.from_stride_dim = from.stride_dim;
  params.to_stride_batch = to.stride_batch;
  params.to_stride_row = to.stride_row;
  params.to_stride_head = to.stride_head;
  params.batch = rows.batch;
  params.rows = rows.rows;
  params.heads = heads;
  params.dim = static_cast<std::int32_t>(dim);
  params.to_columns = static_cast<std::int32_t>(columns);
  const LoadedKernel& kernel = loaded(copy_rows_kernel());
  const std::int64_t lines = rows.batch * rows.rows * heads;
  if (lines == 0) return;
  const std::int64_t blocks = ceil_div(lines, kernel.threads / 32);
  launch(kernel, {static_cast<unsigned>(std::min<std::int64_t>(blocks, processors() * 8)), 1, 1}, &params);
}

void KernelCall::fill_problem(kernels::ForwardParams& params, const InputCopies& copies) const {
  params.cu_seqlens_q = table(args_.cu_seqlens_q, copies.cu_seqlens_q, p_.batch + 1);
  params.cu_seqlens_k = table(args_.cu_seqlens_k, copies.cu_seqlens_k, p_.batch + 1);
  params.seqused_q = table(args_.seqused_q, copies.seqused_q, p_.batch);
  params.seqused_k = table(args_.seqused_k, copies.seqused_k, p_.batch);
  params.work_counter = part<std::int32_t>(copies.counters);
  params.batch = static_cast<std::int32_t>(p_.batch);
  params.num_heads = static_cast<std::int32_t>(p_.num_heads);
  params.group_size = static_cast<std::int32_t>(p_.group_size);
  params.max_seqlen_q = static_cast<std::int32_t>(p_.max_seqlen_q);
  params.max_seqlen_k = static_cast<std::int32_t>(p_.max_seqlen_k);
  params.total_rows_q = static_cast<std::int32_t>(p_.packed_q ? p_.total_q : 0);
  params.window_left = window(p_.window_left);
  params.window_right = p_.causal ? 0 : window(p_.window_right);
  params.window_sizes = table(args_.window_sizes, copies.window_sizes, p_.num_kv_heads, 4);
  params.window_sizes_stride =
      params.window_sizes == args_.window_sizes.data ? args_.window_sizes.stride_row : 4;
  fill_policies(p_, args_, params);
}

void KernelCall::fill_blocks(kernels::ForwardParams& params, std::size_t no_blocks) const {
  const BlockLists& mask = args_.block_mask;
  kernels::BlockLists& lists = params.blocks;
  lists.block_rows = static_cast<std::int32_t>(p_.block_rows);
  lists.block_keys = static_cast<std::int32_t>(p_.block_keys);
  if (mask.full.present) {
    lists.full_count = mask.full.counts;
    lists.full_indices = mask.full.indices;
    lists.full_stride_batch = mask.full.stride_batch;
    lists.full_stride_head = mask.full.stride_head;
    lists.full_stride_row = mask.full.stride_row;
    lists.full_indices_stride_batch = mask.full.indices_stride_batch;
    lists.full_indices_stride_head = mask.full.indices_stride_head;
    lists.full_indices_stride_row = mask.full.indices_stride_row;
  }
  if (!mask.partial.present) {  // the kernel reads the length of a list before the list
    lists.partial_count = reinterpret_cast<const std::int32_t*>(workspace_ + no_blocks);
    clear(workspace_ + no_blocks, sizeof(std::int32_t));
    return;
  }
  lists.partial_count = mask.partial.counts;
  lists.partial_indices = mask.partial.indices;
  lists.partial_stride_batch = mask.partial.stride_batch;
  lists.partial_stride_head = mask.partial.stride_head;
  lists.partial_stride_row = mask.partial.stride_row;
  lists.partial_indices_stride_batch = mask.partial.indices_stride_batch;
  lists.partial_indices_stride_head = mask.partial.indices_stride_head;
  lists.partial_indices_stride_row = mask.partial.indices_stride_row;
  lists.bits_begin = mask.begin;
  lists.bits = mask.bits;
}

kernels::TileBits KernelCall::tile_bits(void* words) const {
  const std::int64_t width = ceil_div(ceil_div(p_.max_seqlen_k, skip_tile_keys(p_.head_dim)), 32);
  const std::int64_t tiles =
      p_.packed_q ? p_.total_q / kSkipTileRows + p_.batch : ceil_div(p_.max_seqlen_q, kSkipTileRows);
  return {static_cast<std::int32_t*>(words), p_.packed_q ? 0 : p_.num_heads * tiles * width, tiles * width,
          width};
}

}  // namespace fsa::cuda
