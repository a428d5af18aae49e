// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/dispatch.h"

#include <algorithm>
#include <limits>

#include "backend/cuda/backward_dispatch.h"
#include "backend/cuda/dispatch_parts.h"
#include "core/skip_tile.h"
#include "kernels/core/params.h"

namespace fsa::cuda {
namespace {

using kernels::ElementType;
using kernels::ForwardTile;

// The tile of a pair of head dimensions, to which smaller ones are padded: the tensor maps fill the columns
// beyond the real ones with zeros. Measured on an H200: docs/kernels/forward_sm90.md.
struct TileRow {
  int head_dim, head_dim_v;
  int block_m, block_n;
  int query_stages, key_stages, value_stages;
  bool private_values;
};

// By cost. The second table is for kernels in which a tile is a skip tile, the third for those that vote.
constexpr TileRow kDense[] = {
    {64, 64, 192, 128, 2, 4, 4, false},   {96, 96, 128, 128, 2, 2, 2, false},
    {128, 128, 128, 128, 2, 2, 2, false}, {192, 128, 128, 128, 1, 2, 2, false},
    {192, 192, 128, 112, 1, 2, 2, false}, {256, 256, 128, 80, 1, 2, 2, false},
};
constexpr TileRow kTiled[] = {
    {64, 64, 128, 128, 2, 4, 4, false},   {96, 96, 128, 128, 2, 2, 2, false},
    {128, 128, 128, 128, 2, 2, 2, false}, {192, 128, 128, 64, 1, 4, 4, false},
    {192, 192, 128, 64, 1, 2, 4, false},  {256, 256, 128, 64, 1, 2, 2, false},
};
constexpr TileRow kVoting[] = {
    {64, 64, 192, 128, 2, 4, 6, true},   {96, 96, 128, 128, 1, 2, 4, true},
    {128, 128, 128, 128, 1, 2, 4, true}, {192, 128, 128, 64, 1, 4, 4, true},
    {192, 192, 128, 64, 1, 2, 4, true},  {256, 256, 128, 64, 1, 2, 2, false},
};
constexpr int kRows = static_cast<int>(std::size(kDense));

// Dense with the fast softcap, whose second special function makes a step longer than its multiplies: a third warpgroup
// fills them. 12 % less time at 16k, 1 % more at 2k than 128x128 (H200, 2026-11).
constexpr TileRow kSoftcap = {128, 128, 192, 80, 2, 2, 4, false};

// The kernels count rows, keys and their sums with a window in 32 bits.
constexpr std::int64_t kLongest = kernels::kOpenWindow - 1024;
constexpr std::int64_t kMostWorkTiles = std::int64_t{1} << 30;
constexpr std::int64_t kMostBlocksYz = 65535;  // of a grid's second and third extent

// Up to so many, one for each processor, there is nothing to balance: the call then needs no counters, and the
// host saves clearing them and, mostly, a workspace.
constexpr std::int64_t kFewWorkTiles = 132;

ForwardTile tile_of(const KernelConfig& config, int row) {
  const bool gated = config.gate != GateKind::none;
  const bool tiled = gated || config.mask == MaskKind::blocks;
  const TileRow& plain = (config.threshold ? kVoting : tiled ? kTiled : kDense)[row];
  const bool bounded = config.softcap == SoftcapKind::bounded;
  const bool softcap = (config.softcap == SoftcapKind::fast || bounded) && !config.threshold && !tiled &&
                       plain.head_dim == kSoftcap.head_dim && plain.head_dim_v == kSoftcap.head_dim_v;
  const TileRow& r = softcap ? kSoftcap : plain;
  ForwardTile tile = {};
  tile.head_dim = r.head_dim;
  tile.head_dim_v = r.head_dim_v;
  tile.block_m = r.block_m;
  tile.block_n = r.block_n;
  tile.query_stages = r.query_stages;
  tile.key_stages = r.key_stages;
  tile.value_stages = r.value_stages;
  tile.private_values = r.private_values;
  tile.key_scalars = gated;
  // Where a vote leaves no room for them, and at head_dim 256, whose registers are full, the gate is computed.
  tile.gate_terms = gated && !config.threshold && r.head_dim <= 128;
  tile.rounded_sums = bounded;
  if (config.threshold && gated && r.block_m == 192) {  // three warpgroups have too few registers for both
    tile.block_m = 128;
    tile.value_stages = 4;
  }
  return tile;
}

int row_of(const Problem& problem) {
  int row = 0;
  while (problem.head_dim > kDense[row].head_dim || problem.head_dim_v > kDense[row].head_dim_v) ++row;
  return row;
}

std::string reject_sizes(const Problem& p) {
  if (p.head_dim > 256) return "computes head_dim up to 256, not " + std::to_string(p.head_dim);
  if (p.head_dim_v > 256) return "computes head_dim_v up to 256, not " + std::to_string(p.head_dim_v);
  for (const auto& [name, length] : {std::pair{"query", p.packed_q ? p.total_q : p.max_seqlen_q},
                                     {"key", p.packed_k ? p.total_k : p.max_seqlen_k},
                                     {"max_seqlen_q", p.max_seqlen_q},
                                     {"max_seqlen_k", p.max_seqlen_k}})
    if (length > kLongest)
      return "computes lengths up to " + std::to_string(kLongest) + ", not " + std::to_string(length) + " (" +
             name + ")";
  const std::int64_t blocks = ceil_div(p.max_seqlen_q, 128);  // block_m is at least 128
  if (p.batch > 0 && blocks > kMostWorkTiles / p.batch / p.num_heads)
    return "computes up to 2^30 tiles of 128 rows in one call; split the batch";
  if (p.batch > kMostBlocksYz || p.num_heads > kMostBlocksYz)
    return "computes up to 65535 sequences and heads in one call; split the batch";
  return "";
}

bool is_normal_float(double value) { return value >= std::numeric_limits<float>::min() && value <= 1e30; }

std::string reject_features(const Problem& p) {
  if (p.paged) return "has no paged keys (page_table) in this version";
  if (p.compress_block > 0) return "has no compressed keys in this version";
  if (p.has_block_mask) {
    if (p.causal || p.window_left >= 0 || p.window_right >= 0 || p.has_window_sizes)
      return "has no causal mask and no window beside a block mask; put them into the block mask";
    if (p.threshold > 0) return "has no threshold beside a block mask";
    if (p.has_gate) return "has no pair gate beside a block mask";
    if (p.has_skip_map) return "writes no skip map beside a block mask, whose lists say it all; leave it out";
  }
  if ((p.threshold > 0 || p.has_gate) && p.head_dim <= 128 && p.head_dim_v > 128)
    return "has no threshold and no gate for head_dim up to 128 with head_dim_v above 128 (" +
           std::to_string(p.head_dim) + " and " + std::to_string(p.head_dim_v) + "); split value";
  if (!is_normal_float(p.softmax_scale)) return "computes with a softmax_scale from 1e-37 to 1e30";
  if (p.softcap > 0 && !is_normal_float(p.softcap)) return "computes with a softcap from 1e-37 to 1e30";
  if (!p.contiguous_lists)
    return "needs the lists of block_mask with stride 1, and its partial_begin strided as its kv_num_blocks; "
           "call "
           "contiguous() on them";
  return "";
}

}  // namespace

void set_mask(const Problem& problem, KernelConfig& config) {
  if (problem.has_block_mask) {
    config.mask = MaskKind::blocks;
    return;
  }
  if (problem.has_window_sizes) {
    config.mask = MaskKind::bands;
    return;
  }
  config.window_left = problem.window_left >= 0;
  // A left edge alone runs on the kernel with two: a third kind of mask would gain little and compile as long.
  config.window_right = config.window_left || problem.causal || problem.window_right >= 0;
}

void take_inputs(const Problem& p, Carver& carver, InputCopies& copies) {
  if (!p.aligned_query) copies.query = carver.take_copy(p.total_q, p.num_heads, p.head_dim);
  if (!p.aligned_key) copies.key = carver.take_copy(p.total_k, p.num_kv_heads, p.head_dim);
  if (!p.aligned_value) copies.value = carver.take_copy(p.total_k, p.num_kv_heads, p.head_dim_v);
  if (p.contiguous_tables) return;
  constexpr std::int64_t kEntry = sizeof(std::int32_t);
  if (p.packed_q) copies.cu_seqlens_q = carver.take((p.batch + 1) * kEntry);
  if (p.packed_k) copies.cu_seqlens_k = carver.take((p.batch + 1) * kEntry);
  copies.seqused_q = carver.take(p.batch * kEntry);
  copies.seqused_k = carver.take(p.batch * kEntry);
  if (p.has_window_sizes) copies.window_sizes = carver.take(p.num_kv_heads * 4 * kEntry);
}

std::int64_t map_words(const Problem& p) {
  const std::int64_t words = ceil_div(ceil_div(p.max_seqlen_k, skip_tile_keys(p.head_dim)), 32);
  const std::int64_t row_tiles =
      p.packed_q ? p.total_q / kSkipTileRows + p.batch : p.batch * ceil_div(p.max_seqlen_q, kSkipTileRows);
  return p.num_heads * row_tiles * words;
}

std::string reject_forward(const Problem& problem) {
  if (problem.dtype != DType::bfloat16 && problem.dtype != DType::float16)
    return std::string("computes bfloat16 and float16, not ") + fsa::name_of(problem.dtype) +
           "; convert query, key and value";
  if (std::string reason = reject_sizes(problem); !reason.empty()) return reason;
  return reject_features(problem);
}

namespace {

SoftcapKind softcap_kind(const Problem& problem) {
  if (!(problem.softcap > 0)) return SoftcapKind::none;
  // Where tiles are voted on, the error of the fast one would be felt.
  if (problem.threshold > 0) return SoftcapKind::exact;
  // ALiBi has no bound; fp16 holds too few powers of two.
  const bool bounded = problem.softcap <= kernels::kLargestBoundedCap && !problem.has_alibi &&
                       problem.dtype == DType::bfloat16;
  return bounded ? SoftcapKind::bounded : SoftcapKind::fast;
}

}  // namespace

KernelConfig forward_kernel(const Problem& problem) {
  KernelConfig config;
  config.element = problem.dtype == DType::bfloat16 ? ElementType::bf16 : ElementType::fp16;
  set_mask(problem, config);
  config.threshold = problem.threshold > 0;
  config.softcap = softcap_kind(problem);
  if (problem.has_gate) config.gate = problem.log_sigmoid_gate ? GateKind::log_sigmoid : GateKind::linear;
  config.gate_bits = problem.gate_test;
  config.alibi = problem.has_alibi;
  config.sink = problem.has_sink;
  config.tile = tile_of(config, row_of(problem));
  return config;
}

KernelConfig gate_prepare_kernel(const Problem& problem) {
  KernelConfig config;
  config.kind = KernelKind::gate_prepare;
  config.tile.block_n = static_cast<int>(skip_tile_keys(problem.head_dim));
  return config;
}

KernelConfig gate_bitmap_kernel(const Problem& problem) {
  KernelConfig config;
  config.kind = KernelKind::gate_bitmap;
  config.tile.block_n = static_cast<int>(skip_tile_keys(problem.head_dim));
  set_mask(problem, config);
  return config;
}

KernelConfig copy_rows_kernel() {
  KernelConfig config;
  config.kind = KernelKind::copy_rows;
  return config;
}

KernelConfig clear_counters_kernel() {
  KernelConfig config;
  config.kind = KernelKind::clear_counters;
  return config;
}

std::int64_t gate_tiles(const Problem& problem) {
  const std::int64_t keys = skip_tile_keys(problem.head_dim);
  return problem.packed_k ? problem.total_k / keys + problem.batch : ceil_div(problem.max_seqlen_k, keys);
}

ForwardWorkspace forward_workspace(const Problem& p) {
  ForwardWorkspace parts;
  Carver carver;
  const ForwardTile tile = forward_kernel(p).tile;
  const std::int64_t work_tiles = ceil_div(p.max_seqlen_q, tile.block_m) * p.batch * p.num_heads;
  if (work_tiles > kFewWorkTiles) parts.counters = carver.take(kCounterBytes);
  take_inputs(p, carver, parts);
  if (p.head_dim_v % 8 != 0) parts.out = carver.take_copy(p.total_q, p.num_heads, p.head_dim_v);
  if (p.has_block_mask && !p.has_partial_blocks) parts.no_blocks = carver.take(sizeof(std::int32_t));
  if (p.has_gate) {
    const std::int64_t tiles = gate_tiles(p) * p.num_kv_heads * (p.packed_k ? 1 : p.batch);
    parts.gate_delta = carver.take(tiles * skip_tile_keys(p.head_dim) * 4);
    parts.gate_extremes = carver.take(tiles * 2 * 4);
    if (tile.gate_terms)
      parts.gate_terms =
          carver.take(tiles * kernels::gate_term_bytes(static_cast<int>(skip_tile_keys(p.head_dim))));
  }
  if (p.gate_test) parts.gate_bits = carver.take(map_words(p) * 4);
  parts.bytes = carver.used();
  return parts;
}

namespace {

std::vector<KernelConfig> reachable_forward_kernels() {
  std::vector<KernelConfig> found;
  Problem p;
  const auto add_forward = [&] {
    KernelConfig config = forward_kernel(p);
    // Of the two softcaps one leads to a kernel that any leads to.
    if (p.softcap > 0 && (config.softcap == SoftcapKind::fast) != (p.softcap > kernels::kLargestBoundedCap))
      return;
    for (int row = 0; row < kRows; ++row) {
      config.tile = tile_of(config, row);
      found.push_back(config);
    }
  };
  const auto each = [](bool& flag, auto next) {
    for (const bool value : {false, true}) {
      flag = value;
      next();
    }
    flag = false;
  };
  const auto each_mask = [&](auto next) {
    for (const int mask : {0, 1, 2, 3}) {  // those that a gate and a vote go with
      p.causal = mask == 1;
      p.window_left = mask == 2 ? 1 : -1;
      p.has_window_sizes = mask == 3;
      next();
    }
    p.has_window_sizes = false;
  };
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    p.dtype = dtype;
    each_mask([&] {
      for (const double threshold : {0.0, 1.0})
        for (const double softcap : {0.0, 1.0, 2.0 * kernels::kLargestBoundedCap}) {
          p.threshold = threshold;
          p.softcap = softcap;
          each(p.has_alibi, [&] {
            each(p.has_sink, [&] {
              each(p.has_gate, [&] {
                if (!p.has_gate) return add_forward();
                each(p.gate_test, [&] { each(p.log_sigmoid_gate, add_forward); });
              });
            });
          });
        }
    });
    p.has_block_mask = true;
    p.threshold = 0;
    for (const double softcap : {0.0, 1.0, 2.0 * kernels::kLargestBoundedCap}) {
      p.softcap = softcap;
      each(p.has_alibi, [&] { each(p.has_sink, add_forward); });
    }
    p.has_block_mask = false;
  }
  for (const int head_dim : {128, 256}) {
    p.head_dim = head_dim;
    found.push_back(gate_prepare_kernel(p));
    each_mask([&] { found.push_back(gate_bitmap_kernel(p)); });
  }
  found.push_back(copy_rows_kernel());
  found.push_back(clear_counters_kernel());
  return found;
}

void append(std::vector<KernelConfig>& to, const std::vector<KernelConfig>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

}  // namespace

std::vector<KernelConfig> reachable_kernels() {
  std::vector<KernelConfig> found = reachable_forward_kernels();
  append(found, reachable_backward_kernels());
  return found;
}

std::vector<KernelConfig> shipped_kernels() {
  std::vector<KernelConfig> shipped;
  for (const KernelConfig& c : reachable_forward_kernels()) {
    const int features = (c.softcap != SoftcapKind::none) + (c.gate != GateKind::none) + c.alibi + c.sink +
                         (c.mask == MaskKind::bands);
    // Each feature once: on the commonest head_dim, causal unless it is a mask; and the gate beside a vote, which
    // has a tile of its own, on the smallest.
    const bool gate_and_vote = c.threshold && c.gate_bits && c.tile.head_dim == 64;
    const bool sample = c.element == ElementType::bf16 && (c.tile.head_dim == 128 || gate_and_vote) &&
                        (c.mask == MaskKind::bands || (c.window_right && !c.window_left));
    const bool plain = features == 0 &&
                       (c.element == ElementType::bf16 || c.tile.head_dim == c.tile.head_dim_v) &&
                       !(c.element == ElementType::fp16 && (c.window_left || !c.window_right)) &&
                       !(c.threshold && c.window_left);
    if (c.kind != KernelKind::forward || plain || (features == 1 && sample)) shipped.push_back(c);
  }
  append(shipped, shipped_backward_kernels());
  return shipped;
}

}  // namespace fsa::cuda
