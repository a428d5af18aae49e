// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/forward.h"

#include <algorithm>
#include <cstdint>

#include "backend/cuda/dispatch.h"
#include "backend/cuda/loaded_kernels.h"
#include "backend/cuda/tensor_map.h"
#include "core/skip_tile.h"
#include "fsa/error.h"

namespace fsa::cuda {
namespace {

constexpr std::size_t kAbsent = ForwardWorkspace::kAbsent;

// Keys and values of the heads that run at one time should fit here together: the L2 is 50 MB, less what
// queries and outputs pass through.
constexpr std::int64_t kL2Bytes = std::int64_t{32} << 20;

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

kernels::ScalarOperand scalar_operand(const Operand& operand) {
  if (!operand.present()) return {};
  return {operand.data,        operand.stride_batch,       operand.stride_row,
          operand.stride_head, scalar_type(operand.dtype), 0};
}

std::int32_t window(std::int64_t size) {
  return static_cast<std::int32_t>(size < 0 ? kernels::kOpenWindow
                                            : std::min<std::int64_t>(size, kernels::kOpenWindow));
}

// Whether the skip map is one block of memory, which is what the kernels write.
bool is_dense(const Problem& p, const SkipMap& map) {
  const std::int64_t batch = p.packed_q ? 1 : p.batch;
  if (batch == 0 || map.tiles == 0 || map.words == 0) return true;
  return (map.tiles <= 1 || map.stride_tile == map.words) &&
         (p.num_heads == 1 || map.stride_head == map.tiles * map.words) &&
         (batch <= 1 || map.stride_batch == p.num_heads * map.tiles * map.words);
}

class ForwardCall {
 public:
  ForwardCall(const Problem& problem, const Arguments& args, Workspace workspace)
      : p_(problem),
        args_(args),
        parts_(forward_workspace(problem)),
        workspace_(static_cast<char*>(workspace.data)),
        config_(forward_kernel(problem)) {}

  void run() {
    check_outputs();
    const LoadedKernel& kernel = loaded(config_);
    const Operand out =
        parts_.out == kAbsent ? args_.out : copy_of(parts_.out, q_rows(), p_.num_heads, p_.head_dim_v);
    const Operand query = aligned(args_.query, parts_.query, q_rows(), p_.num_heads, p_.head_dim);
    const Operand key = aligned(args_.key, parts_.key, k_rows(), p_.num_kv_heads, p_.head_dim);
    const Operand value = aligned(args_.value, parts_.value, k_rows(), p_.num_kv_heads, p_.head_dim_v);
    fill_sizes();
    fill_maps(query, key, value, out);
    fill_outputs(out);
    fill_policies();
    fill_blocks();
    if (parts_.counters != kAbsent) clear(params_.work_counter, 2 * sizeof(std::int32_t));
    if (args_.skip_map.present) clear(args_.skip_map.data, map_bytes());
    prepare_gate();
    const std::int64_t tiles = ceil_div(p_.max_seqlen_q, config_.tile.block_m) * p_.batch * p_.num_heads;
    // One at least, for rows of a packed tensor that no sequence holds.
    launch(kernel, {static_cast<unsigned>(std::clamp<std::int64_t>(tiles, 1, processors())), 1, 1}, &params_);
    if (parts_.out != kAbsent) copy(out, args_.out, q_rows(), p_.num_heads, p_.head_dim_v, p_.head_dim_v);
  }

  void prefill() const {
    loaded(config_);
    if (parts_.query != kAbsent || parts_.key != kAbsent || parts_.value != kAbsent ||
        parts_.out != kAbsent || parts_.seqused_q != kAbsent)
      loaded(copy_rows_kernel());
    if (p_.has_gate) loaded(gate_prepare_kernel(p_));
    if (p_.gate_test || writes_map()) loaded(gate_bitmap_kernel(p_));
  }

 private:
  struct Grid {
    unsigned x, y, z;
  };
  struct Rows {  // of a tensor: packed ones have one batch entry
    std::int64_t batch, rows;
  };

  Rows q_rows() const { return {p_.packed_q ? 1 : p_.batch, p_.packed_q ? p_.total_q : p_.max_seqlen_q}; }
  Rows k_rows() const { return {p_.packed_k ? 1 : p_.batch, p_.packed_k ? p_.total_k : p_.max_seqlen_k}; }

  const LoadedKernel& loaded(const KernelConfig& config) const {
    return loaded_kernel(config, p_.device.index, args_.stream);
  }
  int processors() const { return driver().devices[static_cast<std::size_t>(p_.device.index)].processors; }

  void launch(const LoadedKernel& kernel, Grid grid, void* params) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    void* parameters[] = {params};
    require_success(driver().call.launch(kernel.kernel, grid.x, grid.y, grid.z, kernel.threads, 1, 1,
                                         kernel.shared_bytes, args_.stream, parameters, nullptr),
                    "cuLaunchKernel");
  }

  void clear(void* data, std::size_t bytes) const {
    if (bytes > 0)
      require_success(driver().call.fill_bytes(reinterpret_cast<Address>(data), 0, bytes, args_.stream),
                      "cuMemsetD8Async");
  }

  std::size_t map_bytes() const {
    const SkipMap& map = args_.skip_map;
    return static_cast<std::size_t>((p_.packed_q ? 1 : p_.batch) * p_.num_heads * map.tiles * map.words) * 4;
  }

  void check_outputs() const {
    const Operand& out = args_.out;
    const auto multiple = [](std::int64_t stride) { return stride * kernels::kElementBytes % 16 == 0; };
    if (parts_.out == kAbsent &&
        (reinterpret_cast<std::uintptr_t>(out.data) % 16 != 0 || !multiple(out.stride_batch) ||
         !multiple(out.stride_row) || !multiple(out.stride_head)))
      throw Error(
          ErrorCode::unsupported,
          "out: backend \"cuda\" needs its address and strides in multiples of 16 bytes; pass contiguous "
          "memory");
    if (args_.skip_map.present && !is_dense(p_, args_.skip_map))
      throw Error(ErrorCode::unsupported, "skip_map: backend \"cuda\" needs it contiguous");
  }

  Operand copy_of(std::size_t part, Rows rows, std::int64_t heads, std::int64_t dim) const {
    Operand copy;
    copy.data = workspace_ + part;
    copy.dtype = p_.dtype;
    copy.stride_head = ceil_div(dim, 8) * 8;
    copy.stride_row = heads * copy.stride_head;
    copy.stride_batch = rows.rows * copy.stride_row;
    return copy;
  }

  // The operand itself, or its copy, which is then on its way.
  Operand aligned(const Operand& operand, std::size_t part, Rows rows, std::int64_t heads,
                  std::int64_t dim) const {
    if (part == kAbsent) return operand;
    const Operand to = copy_of(part, rows, heads, dim);
    copy(operand, to, rows, heads, dim, ceil_div(dim, 8) * 8);
    return to;
  }

  // The table itself, or a copy without gaps, which is then on its way.
  const std::int32_t* table(const IndexTable& given, std::size_t part, std::int64_t rows,
                            std::int64_t columns = 1) const {
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

  void copy(const Operand& from, const Operand& to, Rows rows, std::int64_t heads, std::int64_t dim,
            std::int64_t columns) const {
    kernels::CopyRowsParams params = {};
    params.from = from.data;
    params.to = to.data;
    params.from_stride_batch = from.stride_batch;
    params.from_stride_row = from.stride_row;
    params.from_stride_head = from.stride_head;
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

  void fill_sizes() {
    params_.cu_seqlens_q = table(args_.cu_seqlens_q, parts_.cu_seqlens_q, p_.batch + 1);
    params_.cu_seqlens_k = table(args_.cu_seqlens_k, parts_.cu_seqlens_k, p_.batch + 1);
    params_.seqused_q = table(args_.seqused_q, parts_.seqused_q, p_.batch);
    params_.seqused_k = table(args_.seqused_k, parts_.seqused_k, p_.batch);
    if (parts_.counters != kAbsent)
      params_.work_counter = reinterpret_cast<std::int32_t*>(workspace_ + parts_.counters);
    params_.batch = static_cast<std::int32_t>(p_.batch);
    params_.num_heads = static_cast<std::int32_t>(p_.num_heads);
    params_.group_size = static_cast<std::int32_t>(p_.group_size);
    params_.max_seqlen_q = static_cast<std::int32_t>(p_.max_seqlen_q);
    params_.max_seqlen_k = static_cast<std::int32_t>(p_.max_seqlen_k);
    params_.total_rows_q = static_cast<std::int32_t>(p_.packed_q ? p_.total_q : 0);
    params_.window_left = window(p_.window_left);
    params_.window_right = p_.causal ? 0 : window(p_.window_right);
    params_.window_sizes = table(args_.window_sizes, parts_.window_sizes, p_.num_kv_heads, 4);
    params_.window_sizes_stride =
        params_.window_sizes == args_.window_sizes.data ? args_.window_sizes.stride_row : 4;
    const std::int64_t head_bytes =
        std::max<std::int64_t>(p_.max_seqlen_k, 1) * kernels::kElementBytes * (p_.head_dim + p_.head_dim_v);
    params_.heads_per_wave = static_cast<std::int32_t>(std::clamp<std::int64_t>(
        kL2Bytes / head_bytes * p_.group_size, 1, std::max<std::int64_t>(1, p_.batch * p_.num_heads)));
  }

  void fill_maps(const Operand& query, const Operand& key, const Operand& value, const Operand& out) {
    // A tensor without an element may have no address, but the encoder wants one; nothing is read there.
    const auto addressed = [&](Operand operand) {
      if (operand.data == nullptr) operand.data = out.data;
      return operand;
    };
    const Rows q = q_rows(), k = k_rows();
    params_.query_map = encode_tensor_map(
        "query", addressed(query), {p_.head_dim, q.rows, p_.num_heads, q.batch}, kernels::kRowsPerWarpgroup);
    params_.key_map = encode_tensor_map(
        "key", addressed(key), {p_.head_dim, k.rows, p_.num_kv_heads, k.batch}, config_.tile.block_n);
    params_.value_map = encode_tensor_map(
        "value", addressed(value), {p_.head_dim_v, k.rows, p_.num_kv_heads, k.batch}, config_.tile.block_n);
    params_.out_map = encode_tensor_map("out", out, {p_.head_dim_v, q.rows, p_.num_heads, q.batch},
                                        kernels::kRowsPerWarpgroup);
  }

  void fill_outputs(const Operand& out) {
    params_.out = out.data;
    params_.out_stride_batch = p_.packed_q ? 0 : out.stride_batch;
    params_.out_stride_row = out.stride_row;
    params_.out_stride_head = out.stride_head;
    params_.head_dim_v =
        static_cast<std::int32_t>(parts_.out == kAbsent ? p_.head_dim_v : ceil_div(p_.head_dim_v, 8) * 8);
    params_.lse = static_cast<float*>(args_.lse.data);
    params_.lse_stride_batch = args_.lse.stride_batch;
    params_.lse_stride_head = args_.lse.stride_head;
    const kernels::TileBits map = tile_bits(args_.skip_map.data);
    params_.skip_map = map.words;
    params_.skip_map_stride_batch = map.stride_batch;
    params_.skip_map_stride_head = map.stride_head;
    params_.skip_map_stride_tile = map.stride_tile;
  }

  void fill_policies() {
    params_.softmax_scale_log2 = static_cast<float>(p_.softmax_scale * kLog2E);
    params_.softcap = static_cast<float>(p_.softcap);
    params_.threshold = static_cast<float>(p_.threshold);
    params_.causal_lengths = p_.causal_lengths();
    params_.alibi = scalar_operand(args_.alibi_slopes);
    params_.sink = scalar_operand(args_.sink);
    params_.alpha = scalar_operand(args_.alpha);
    params_.delta = scalar_operand(args_.delta);
    params_.gate_test = p_.gate_test;
    params_.gate_threshold = p_.gate_threshold_default ? 0 : static_cast<float>(p_.gate_threshold);
    params_.adaptive_gate = p_.adaptive_gate;
    params_.log_sigmoid_gate = p_.log_sigmoid_gate;
  }

  void fill_blocks() {
    if (!p_.has_block_mask) return;
    const BlockLists& mask = args_.block_mask;
    kernels::BlockLists& lists = params_.blocks;
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
      lists.partial_count = reinterpret_cast<const std::int32_t*>(workspace_ + parts_.no_blocks);
      clear(workspace_ + parts_.no_blocks, sizeof(std::int32_t));
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

  // A map over skip tiles as the kernels address it, in one block of memory.
  kernels::TileBits tile_bits(void* words) const {
    const std::int64_t width = ceil_div(ceil_div(p_.max_seqlen_k, skip_tile_keys(p_.head_dim)), 32);
    const std::int64_t tiles =
        p_.packed_q ? p_.total_q / kSkipTileRows + p_.batch : ceil_div(p_.max_seqlen_q, kSkipTileRows);
    return {static_cast<std::int32_t*>(words), p_.packed_q ? 0 : p_.num_heads * tiles * width, tiles * width,
            width};
  }

  // Without a vote the skip map is the map of open tiles, or of visible ones.
  bool writes_map() const { return args_.skip_map.present && !config_.threshold; }

  void prepare_gate() {
    if (!p_.has_gate && !writes_map()) return;
    const auto blocks = [](std::int64_t count) { return static_cast<unsigned>(count); };
    params_.gate_bits =
        tile_bits(writes_map() ? static_cast<void*>(args_.skip_map.data) : workspace_ + parts_.gate_bits);
    if (p_.has_gate) {
      const std::int64_t keys = skip_tile_keys(p_.head_dim);
      params_.gate_delta = reinterpret_cast<float*>(workspace_ + parts_.gate_delta);
      params_.gate_extremes = reinterpret_cast<float*>(workspace_ + parts_.gate_extremes);
      params_.gate_delta_stride_head = gate_tiles(p_) * keys;
      params_.gate_delta_stride_batch = p_.packed_k ? 0 : p_.num_kv_heads * params_.gate_delta_stride_head;
      const std::int64_t key_tiles = ceil_div(p_.max_seqlen_k, keys);
      launch(loaded(gate_prepare_kernel(p_)), {blocks(key_tiles), blocks(p_.num_kv_heads), blocks(p_.batch)},
             &params_);
    }
    if (p_.gate_test || writes_map()) {
      const LoadedKernel& kernel = loaded(gate_bitmap_kernel(p_));
      const std::int64_t row_tiles = ceil_div(p_.max_seqlen_q, kSkipTileRows);
      launch(kernel,
             {blocks(ceil_div(row_tiles, kernel.threads / 32)), blocks(p_.num_heads), blocks(p_.batch)},
             &params_);
    }
  }

  const Problem& p_;
  const Arguments& args_;
  const ForwardWorkspace parts_;
  char* const workspace_;
  const KernelConfig config_;
  kernels::ForwardParams params_ = {};
};

}  // namespace

void run_forward(const Problem& problem, const Arguments& args, Workspace workspace) {
  if (problem.total_q == 0) return;
  const DeviceGuard guard(problem.device.index);
  ForwardCall(problem, args, workspace).run();
}

void prefill_forward(const Problem& problem, const Arguments& args) {
  const DeviceGuard guard(problem.device.index);
  ForwardCall(problem, args, {}).prefill();
}

}  // namespace fsa::cuda
