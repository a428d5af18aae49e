// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/forward.h"

#include <algorithm>
#include <cstdint>

#include "backend/cuda/dispatch.h"
#include "backend/cuda/driver.h"
#include "backend/cuda/kernel_call.h"
#include "backend/cuda/tensor_map.h"
#include "core/skip_tile.h"
#include "fsa/error.h"

namespace fsa::cuda {
namespace {

class ForwardCall : KernelCall {
 public:
  ForwardCall(const Problem& problem, const Arguments& args, Workspace workspace)
      : KernelCall(problem, args, workspace),
        parts_(forward_workspace(problem)),
        config_(forward_kernel(problem)) {}

  void run() {
    check_outputs();
    const LoadedKernel& kernel = loaded(config_);
    const Operand out =
        parts_.out == kAbsent ? args_.out : copy_of(parts_.out, q_rows(), p_.num_heads, p_.head_dim_v);
    const Operand query = aligned(args_.query, parts_.query, q_rows(), p_.num_heads, p_.head_dim);
    const Operand key = aligned(args_.key, parts_.key, k_rows(), p_.num_kv_heads, p_.head_dim);
    const Operand value = aligned(args_.value, parts_.value, k_rows(), p_.num_kv_heads, p_.head_dim_v);
    fill_problem(params_, parts_);
    fill_wave();
    fill_maps(query, key, value, out);
    fill_outputs(out);
    if (p_.has_block_mask) fill_blocks(params_, parts_.no_blocks);
    if (args_.skip_map.present) clear(args_.skip_map.data, map_bytes());
    prepare_gate();
    launch_attention(kernel);
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

  void fill_wave() {
    const std::int64_t head_bytes =
        std::max<std::int64_t>(p_.max_seqlen_k, 1) * kernels::kElementBytes * (p_.head_dim + p_.head_dim_v);
    const std::int64_t wave_bytes = p_.has_block_mask ? kListedWaveBytes : kWaveBytes;
    params_.heads_per_wave = static_cast<std::int32_t>(std::clamp<std::int64_t>(
        wave_bytes / head_bytes * p_.group_size, 1, std::max<std::int64_t>(1, p_.batch * p_.num_heads)));
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

  // Without a vote the skip map is the map of open tiles, or of visible ones.
  bool writes_map() const { return args_.skip_map.present && !config_.threshold; }

  void prepare_gate() {
    if (!p_.has_gate && !writes_map()) return;
    const auto blocks = [](std::int64_t count) { return static_cast<unsigned>(count); };
    params_.gate_bits =
        tile_bits(writes_map() ? static_cast<void*>(args_.skip_map.data) : workspace_ + parts_.gate_bits);
    if (p_.has_gate) prepare_delta();
    if (p_.gate_test || writes_map()) {
      const LoadedKernel& kernel = loaded(gate_bitmap_kernel(p_));
      const std::int64_t row_tiles = ceil_div(p_.max_seqlen_q, kSkipTileRows);
      launch(kernel,
             {blocks(ceil_div(row_tiles, kernel.threads / 32)), blocks(p_.num_heads), blocks(p_.batch)},
             &params_);
    }
  }

  // delta in whole key tiles, on its way into the workspace.
  void prepare_delta() {
    const std::int64_t keys = skip_tile_keys(p_.head_dim);
    params_.gate_delta = part<float>(parts_.gate_delta);
    params_.gate_extremes = part<float>(parts_.gate_extremes);
    params_.gate_terms = part<std::uint8_t>(parts_.gate_terms);
    params_.gate_delta_stride_head = gate_tiles(p_) * keys;
    params_.gate_delta_stride_batch = p_.packed_k ? 0 : p_.num_kv_heads * params_.gate_delta_stride_head;
    launch(loaded(gate_prepare_kernel(p_)),
           {static_cast<unsigned>(ceil_div(p_.max_seqlen_k, keys)), static_cast<unsigned>(p_.num_kv_heads),
            static_cast<unsigned>(p_.batch)},
           &params_);
  }

  // The kernel that clears the counters waits for all before it, and the attention kernel for it alone, and only before
  // its second work tiles: nothing else may come between the two.
  void launch_attention(const LoadedKernel& kernel) {
    const std::int64_t tiles = ceil_div(p_.max_seqlen_q, config_.tile.block_m) * p_.batch * p_.num_heads;
    // One at least, for rows of a packed tensor that no sequence holds.
    const Grid grid = {static_cast<unsigned>(std::clamp<std::int64_t>(tiles, 1, processors())), 1, 1};
    if (params_.work_counter == nullptr) return launch(kernel, grid, &params_);
    launch(loaded(clear_counters_kernel()), {}, &params_.work_counter);
    launch_early(kernel, grid, &params_);
  }

  const ForwardWorkspace parts_;
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
