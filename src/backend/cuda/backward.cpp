// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/backward.h"

#include <algorithm>
#include <cstdint>

#include "backend/cuda/backward_dispatch.h"
#include "backend/cuda/driver.h"
#include "backend/cuda/kernel_call.h"
#include "backend/cuda/tensor_map.h"
#include "core/skip_tile.h"
#include "fsa/error.h"

namespace fsa::cuda {
namespace {

unsigned extent(std::int64_t value) { return static_cast<unsigned>(value); }

class BackwardCall : KernelCall {
 public:
  BackwardCall(const Problem& problem, const Arguments& args, Workspace workspace)
      : KernelCall(problem, args, workspace),
        parts_(backward_workspace(problem)),
        config_(backward_kernel(problem)) {}

  void run() {
    if (args_.skip_map.present && !is_dense(p_, args_.skip_map))
      throw Error(ErrorCode::unsupported, "skip_map: backend \"cuda\" needs it contiguous");
    fill_problem(params_.forward, parts_);
    params_.forward.softmax_scale_log2 =
        std::max(params_.forward.softmax_scale_log2, kernels::kLeastFoldedScale);
    fill_inputs();
    fill_gradients();
    fill_workspace();
    const Grid row_tiles{
        extent(std::max<std::int64_t>(1, ceil_div(p_.max_seqlen_q, config_.backward.block_m))),
        extent(p_.num_heads), extent(p_.batch)};
    // The prepare kernel clears the counters, but without a sequence it has no blocks.
    if (p_.batch == 0) clear(params_.forward.work_counter, kernels::kWorkCounters * sizeof(std::int32_t));
    // Columns before what they need nothing of, so that they are made meanwhile.
    const bool columns = config_.gate_bits || p_.has_block_mask;
    if (!columns) launch(loaded(backward_prepare_kernel(p_)), row_tiles, &params_);
    if (config_.gate_bits) prepare_bits();
    if (p_.has_block_mask) prepare_lists();
    const bool splits = parts_.column_parts != kAbsent;
    if (splits) {
      const LoadedKernel& kernel = loaded(split_columns_kernel(p_));
      // Of block masks one block reads the lengths; else a warp counts one.
      const Grid grid{p_.has_block_mask ? 1 : extent(ceil_div(key_tiles(), kernel.threads / 32))};
      if (columns)
        launch_early(kernel, grid, &params_);
      else
        launch(kernel, grid, &params_);
    }
    if (columns) launch_early(loaded(backward_prepare_kernel(p_)), row_tiles, &params_);
    const std::int64_t units = key_tiles() + params_.most_slots;
    // One at least, for rows of a packed tensor that no sequence holds.
    launch_early(loaded(config_), {extent(std::clamp<std::int64_t>(units, 1, processors()))}, &params_);
    launch_early(loaded(backward_finish_kernel(p_)), row_tiles, &params_);
    if (splits)
      launch_early(loaded(sum_parts_kernel(p_)),
                   {extent(params_.most_slots), extent(config_.backward.block_n / kernels::kSumRows)},
                   &params_);
    if (args_.grad_sink.present()) launch(loaded(sum_sink_kernel(p_)), {extent(p_.num_heads)}, &params_);
    copy_back(parts_.grad_query, grad_query_, args_.grad_query, q_rows(), p_.num_heads, p_.head_dim);
    copy_back(parts_.grad_key, grad_key_, args_.grad_key, k_rows(), p_.num_kv_heads, p_.head_dim);
    copy_back(parts_.grad_value, grad_value_, args_.grad_value, k_rows(), p_.num_kv_heads, p_.head_dim_v);
  }

  void prefill() const {
    loaded(config_);
    loaded(backward_prepare_kernel(p_));
    loaded(backward_finish_kernel(p_));
    if (p_.has_sink) loaded(sum_sink_kernel(p_));
    if (config_.gate_bits) loaded(transpose_bits_kernel(p_));
    if (parts_.visible_bits != kAbsent) loaded(gate_bitmap_kernel(p_));
    if (p_.has_block_mask) loaded(block_columns_kernel(p_));
    if (parts_.column_parts != kAbsent) {
      loaded(split_columns_kernel(p_));
      loaded(sum_parts_kernel(p_));
    }
    for (const std::size_t part : {parts_.query, parts_.key, parts_.value, parts_.out, parts_.grad_out,
                                   parts_.grad_query, parts_.grad_key, parts_.grad_value, parts_.seqused_q})
      if (part != kAbsent) loaded(copy_rows_kernel());
  }

 private:
  std::int64_t key_tiles_of_head() const { return ceil_div(p_.max_seqlen_k, config_.backward.block_n); }
  std::int64_t key_tiles() const { return key_tiles_of_head() * p_.batch * p_.num_kv_heads; }

  void copy_back(std::size_t part, const Operand& from, const Operand& to, Rows rows, std::int64_t heads,
                 std::int64_t dim) const {
    if (part != kAbsent) copy(from, to, rows, heads, dim, dim);
  }

  Operand target(const Operand& gradient, std::size_t part, Rows rows, std::int64_t heads,
                 std::int64_t dim) const {
    return part == kAbsent ? gradient : copy_of(part, rows, heads, dim);
  }

  void fill_inputs() {
    const Rows q = q_rows(), k = k_rows();
    const Operand query = aligned(args_.query, parts_.query, q, p_.num_heads, p_.head_dim);
    const Operand key = aligned(args_.key, parts_.key, k, p_.num_kv_heads, p_.head_dim);
    const Operand value = aligned(args_.value, parts_.value, k, p_.num_kv_heads, p_.head_dim_v);
    const Operand out = aligned(args_.out, parts_.out, q, p_.num_heads, p_.head_dim_v);
    const Operand grad_out = aligned(args_.grad_out, parts_.grad_out, q, p_.num_heads, p_.head_dim_v);
    kernels::ForwardParams& forward = params_.forward;
    forward.query_map = map("query", query, {p_.head_dim, q.rows, p_.num_heads, q.batch});
    forward.key_map = map("key", key, {p_.head_dim, k.rows, p_.num_kv_heads, k.batch});
    forward.value_map = map("value", value, {p_.head_dim_v, k.rows, p_.num_kv_heads, k.batch});
    params_.grad_out_map = map("grad_out", grad_out, {p_.head_dim_v, q.rows, p_.num_heads, q.batch});
    forward.out = out.data;
    forward.out_stride_batch = p_.packed_q ? 0 : out.stride_batch;
    forward.out_stride_row = out.stride_row;
    forward.out_stride_head = out.stride_head;
    forward.head_dim_v = padded(p_.head_dim_v);
    forward.lse = static_cast<float*>(args_.lse.data);
    forward.lse_stride_batch = args_.lse.stride_batch;
    forward.lse_stride_head = args_.lse.stride_head;
    params_.grad_out = grad_out.data;
    params_.grad_out_stride_batch = p_.packed_q ? 0 : grad_out.stride_batch;
    params_.grad_out_stride_row = grad_out.stride_row;
    params_.grad_out_stride_head = grad_out.stride_head;
    params_.grad_lse = static_cast<const float*>(args_.grad_lse.data);
    params_.grad_lse_stride_batch = args_.grad_lse.stride_batch;
    params_.grad_lse_stride_head = args_.grad_lse.stride_head;
    params_.grad_lse_stride_row = args_.grad_lse.stride_row;
    params_.head_dim = padded(p_.head_dim);
    params_.total_rows_k = static_cast<std::int32_t>(p_.packed_k ? p_.total_k : 0);
    params_.softmax_scale = static_cast<float>(p_.softmax_scale);
  }

  void fill_gradients() {
    const Rows q = q_rows(), k = k_rows();
    grad_query_ = target(args_.grad_query, parts_.grad_query, q, p_.num_heads, p_.head_dim);
    grad_key_ = target(args_.grad_key, parts_.grad_key, k, p_.num_kv_heads, p_.head_dim);
    grad_value_ = target(args_.grad_value, parts_.grad_value, k, p_.num_kv_heads, p_.head_dim_v);
    params_.grad_key_map = map("grad_key", grad_key_, {params_.head_dim, k.rows, p_.num_kv_heads, k.batch});
    params_.grad_value_map =
        map("grad_value", grad_value_, {params_.forward.head_dim_v, k.rows, p_.num_kv_heads, k.batch});
    params_.grad_query = grad_query_.data;
    params_.grad_query_stride_batch = p_.packed_q ? 0 : grad_query_.stride_batch;
    params_.grad_query_stride_row = grad_query_.stride_row;
    params_.grad_query_stride_head = grad_query_.stride_head;
    params_.grad_key = grad_key_.data;
    params_.grad_key_stride_batch = p_.packed_k ? 0 : grad_key_.stride_batch;
    params_.grad_key_stride_row = grad_key_.stride_row;
    params_.grad_key_stride_head = grad_key_.stride_head;
    params_.grad_value = grad_value_.data;
    params_.grad_value_stride_batch = p_.packed_k ? 0 : grad_value_.stride_batch;
    params_.grad_value_stride_row = grad_value_.stride_row;
    params_.grad_value_stride_head = grad_value_.stride_head;
    params_.grad_alpha = scalar_operand(args_.grad_alpha);
    params_.grad_delta = scalar_operand(args_.grad_delta);
    params_.grad_sink = scalar_operand(args_.grad_sink);
  }

  void fill_workspace() {
    params_.row_vectors = part<float>(parts_.row_vectors);
    params_.grad_query_sum = part<float>(parts_.grad_query_sum);
    params_.grad_alpha_sum = part<float>(parts_.grad_alpha_sum);
    params_.gate_row_terms = part<std::uint8_t>(parts_.gate_row_terms);
    params_.grad_sink_sum = part<float>(parts_.grad_sink_sum);
    params_.turns = part<std::int32_t>(parts_.turns);
    params_.sums_done = part<std::int32_t>(parts_.sums_done);
    params_.row_tiles = backward_row_tiles(p_);
    if (parts_.column_parts != kAbsent) {
      params_.column_parts = part<kernels::ColumnPart>(parts_.column_parts);
      params_.split_columns = part<kernels::SplitColumn>(parts_.split_columns);
      params_.column_lengths = part<std::int32_t>(parts_.column_lengths);
      params_.part_counts = part<kernels::PartCounts>(parts_.part_counts);
      params_.partial_sums = part<float>(parts_.partial_sums);
      params_.most_slots = static_cast<std::int32_t>(most_slots(p_));
      params_.least_part = kernels::kLeastPart;
    }
    params_.key_heads_per_wave = static_cast<std::int32_t>(key_heads_per_wave(p_));
    params_.ascending_from =
        static_cast<std::int32_t>(key_tiles() - ascending_key_heads(p_) * key_tiles_of_head());
    if (parts_.clears != kAbsent) {
      params_.clears = part<std::int32_t>(parts_.clears);
      const std::int64_t of_wave = key_heads_per_wave(p_) * p_.group_size * params_.row_tiles;
      const std::int64_t all = p_.batch * p_.num_heads * params_.row_tiles;
      params_.clears_of_wave = static_cast<std::int32_t>(of_wave);
      params_.clears_in_all = static_cast<std::int32_t>(all - of_wave);
    }
  }

  // The map by rows, which may have to be made, and by columns.
  void prepare_bits() {
    void* const words =
        parts_.visible_bits == kAbsent ? args_.skip_map.data : part<void>(parts_.visible_bits);
    params_.forward.gate_bits = tile_bits(words);
    if (parts_.visible_bits != kAbsent) {
      const LoadedKernel& kernel = loaded(gate_bitmap_kernel(p_));
      launch(kernel,
             {extent(ceil_div(ceil_div(p_.max_seqlen_q, kSkipTileRows), kernel.threads / 32)),
              extent(p_.num_heads), extent(p_.batch)},
             &params_.forward);
    }
    const std::int64_t width = column_words(p_), tiles = gate_tiles(p_);
    params_.column_bits = {part<std::int32_t>(parts_.column_bits),
                           p_.packed_k ? 0 : p_.num_heads * tiles * width, tiles * width, width};
    const LoadedKernel& kernel = loaded(transpose_bits_kernel(p_));
    launch(kernel,
           {extent(ceil_div(width * params_.forward.gate_bits.stride_tile, kernel.threads / 32)),
            extent(p_.num_heads), extent(p_.batch)},
           &params_);
  }

  // The lists of the block mask, and for each key block the row blocks that list it.
  void prepare_lists() {
    fill_blocks(params_.forward, parts_.no_blocks);
    const std::int64_t key_blocks = p_.key_blocks(), batch = column_batch(p_);
    params_.list_count = part<std::int32_t>(parts_.list_count);
    params_.list_entries = part<kernels::ColumnEntry>(parts_.list_entries);
    params_.list_stride_head = p_.mask_heads > 1 ? key_blocks : 0;
    params_.list_stride_batch = batch > 1 ? key_blocks * p_.mask_heads : 0;
    params_.list_capacity = static_cast<std::int32_t>(p_.row_blocks());
    launch(loaded(block_columns_kernel(p_)),
           {extent(ceil_div(key_blocks, kernels::kColumnBlocks)), extent(p_.mask_heads), extent(batch)},
           &params_);
  }

  static std::int32_t padded(std::int64_t dim) { return static_cast<std::int32_t>(ceil_div(dim, 8) * 8); }

  // A tensor without an element may have no address, but the encoder wants one; nothing is read there.
  kernels::TensorMap map(const char* name, Operand operand, const MapExtents& extents) const {
    if (operand.data == nullptr) operand.data = workspace_;
    return encode_tensor_map(name, operand, extents, kernels::kRowsPerWarpgroup);
  }

  const BackwardWorkspace parts_;
  const KernelConfig config_;
  Operand grad_query_, grad_key_, grad_value_;
  kernels::BackwardParams params_ = {};
};

}  // namespace

void run_backward(const Problem& problem, const Arguments& args, Workspace workspace) {
  const DeviceGuard guard(problem.device.index);
  BackwardCall(problem, args, workspace).run();
}

void prefill_backward(const Problem& problem, const Arguments& args) {
  const DeviceGuard guard(problem.device.index);
  BackwardCall(problem, args, {}).prefill();
}

}  // namespace fsa::cuda
