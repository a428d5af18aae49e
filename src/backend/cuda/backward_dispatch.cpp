// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/backward_dispatch.h"

#include <algorithm>
#include <array>

#include "backend/cuda/dispatch_parts.h"

namespace fsa::cuda {
namespace {

using kernels::BackwardTile;
using kernels::ElementType;
using kernels::kFoldedVectors;

// As in dispatch.cpp: padded head dimensions, by cost; docs/kernels/backward_sm90.md says why these. The second
// table is for kernels with more to hold in registers: bits, lists, logit policies.
constexpr std::array<BackwardTile, 4> kDense = {{
    {64, 64, 128, 128, 2, 2, 2, 1, kFoldedVectors, 0},
    {128, 128, 64, 128, 2, 2, 3, 1, kFoldedVectors, 0},
    {256, 128, 64, 64, 2, 2, 2, 0, kFoldedVectors, 0},
    {256, 256, 64, 64, 2, 2, 2, 0, kFoldedVectors, 0},
}};
constexpr std::array<BackwardTile, 4> kTiled = {{
    {64, 64, 64, 128, 4, 2, 4, 1, kFoldedVectors, 0},
    {128, 128, 64, 128, 2, 2, 3, 1, kFoldedVectors, 0},
    {256, 128, 64, 64, 2, 2, 2, 0, kFoldedVectors, 0},
    {256, 256, 64, 64, 2, 2, 2, 0, kFoldedVectors, 0},
}};

int logits(const KernelConfig& config) {
  return (config.softcap != SoftcapKind::none) + (config.gate != GateKind::none) + config.alibi;
}

BackwardTile tile_of(const KernelConfig& config, std::size_t row) {
  const bool tiled = config.gate_bits || config.mask == MaskKind::blocks || logits(config) > 0;
  BackwardTile tile = (tiled ? kTiled : kDense)[row];
  if (logits(config) > 0) tile.row_vectors = 2;
  if (config.gate != GateKind::none) {
    tile.row_vectors = 3;
    if (tile.head_dim == 128) tile.score_stages = 3;  // where shared memory is full
    if (tile.head_dim_v == 256) tile.grad_out_stages = 1;
    tile.gate_terms = tile.head_dim <= 128;  // above, registers are full
    if (tile.gate_terms && logits(config) == 1) tile.row_vectors = kFoldedVectors + 1;
  }
  return tile;
}

std::size_t row_of(const Problem& problem) {
  std::size_t row = 0;
  while (problem.head_dim > kDense[row].head_dim || problem.head_dim_v > kDense[row].head_dim_v) ++row;
  return row;
}

// A kernel around the main one without any feature.
bool plain_around(const KernelConfig& config) {
  return config.element == ElementType::bf16 && config.gate == GateKind::none && !config.sink &&
         !config.deterministic;
}

// What the kernels around the main one share with it.
KernelConfig around(const Problem& problem, KernelKind kind) {
  const KernelConfig main = backward_kernel(problem);
  KernelConfig config;
  config.kind = kind;
  config.element = main.element;
  config.backward = main.backward;
  config.backward.query_stages = config.backward.grad_out_stages = 1;  // stages are the main kernel's
  config.backward.score_stages = 1;
  config.backward.gate_terms = 0;
  if (main.gate != GateKind::none) {
    config.gate = GateKind::linear;  // of either kind they need alpha alone
    config.backward.row_vectors = 3;
  }
  return config;
}

// Of the upper half of what fits, the largest wave that leaves the fewest heads out of the last one: where that has two
// heads, most processors wait for its longest column.
std::int64_t even_wave(std::int64_t heads, std::int64_t fit) {
  fit = std::clamp<std::int64_t>(fit, 1, heads);
  const auto left_out = [&](std::int64_t wave) { return (wave - heads % wave) % wave; };
  std::int64_t best = fit;
  for (std::int64_t wave = fit; wave > fit / 2 && left_out(best) > 0; --wave)
    if (left_out(wave) < left_out(best)) best = wave;
  return best;
}

}  // namespace

std::string reject_backward(const Problem& problem) {
  if (std::string reason = reject_forward(problem); !reason.empty()) return reason;
  if (problem.deterministic && problem.has_window_sizes && problem.head_dim <= 128 &&
      problem.head_dim_v > 128)
    return "has no deterministic gradients with window_sizes for head_dim up to 128 with head_dim_v above "
           "128 (" +
           std::to_string(problem.head_dim) + " and " + std::to_string(problem.head_dim_v) + "); split value";
  return "";
}

bool walks_bits(const Problem& problem) {
  return problem.skips_tiles() || (problem.deterministic && problem.has_window_sizes);
}

KernelConfig backward_kernel(const Problem& problem) {
  KernelConfig config;
  config.kind = KernelKind::backward;
  config.element = problem.dtype == DType::bfloat16 ? ElementType::bf16 : ElementType::fp16;
  set_mask(problem, config);
  // As the forward computed it, or p would not be 2^(s - lse).
  config.softcap = forward_kernel(problem).softcap;
  if (config.softcap == SoftcapKind::bounded) config.softcap = SoftcapKind::fast;  // the same function
  if (problem.has_gate) config.gate = problem.log_sigmoid_gate ? GateKind::log_sigmoid : GateKind::linear;
  config.gate_bits = walks_bits(problem);
  config.alibi = problem.has_alibi;
  config.deterministic = problem.deterministic;
  config.backward = tile_of(config, row_of(problem));
  return config;
}

KernelConfig backward_prepare_kernel(const Problem& problem) {
  KernelConfig config = around(problem, KernelKind::backward_prepare);
  const BackwardTile tile = backward_kernel(problem).backward;
  config.backward.row_vectors = tile.row_vectors;
  config.backward.gate_terms = tile.gate_terms;
  if (tile.gate_terms) config.gate = backward_kernel(problem).gate;
  config.sink = problem.has_sink;
  return config;
}

KernelConfig backward_finish_kernel(const Problem& problem) {
  return around(problem, KernelKind::backward_finish);
}

KernelConfig sum_sink_kernel(const Problem& problem) {
  KernelConfig config = around(problem, KernelKind::sum_sink);
  config.gate = GateKind::none;  // it sums what the rows left, whatever they were
  config.backward.row_vectors = 2;
  config.sink = true;
  return config;
}

KernelConfig split_columns_kernel(const Problem& problem) {
  KernelConfig config = around(problem, KernelKind::split_columns);
  set_mask(problem, config);
  config.gate_bits = walks_bits(problem);
  config.deterministic = problem.deterministic;
  config.gate = GateKind::none;  // it looks at the mask alone
  config.element = ElementType::bf16;
  config.backward.row_vectors = kFoldedVectors;
  return config;
}

KernelConfig sum_parts_kernel(const Problem& problem) {
  KernelConfig config = around(problem, KernelKind::sum_parts);
  config.deterministic = problem.deterministic;
  return config;
}

KernelConfig block_columns_kernel(const Problem& problem) {
  KernelConfig config;
  config.kind = KernelKind::block_columns;
  config.tile.block_n = backward_kernel(problem).backward.block_n;
  return config;
}

KernelConfig transpose_bits_kernel(const Problem& problem) {
  KernelConfig config;
  config.kind = KernelKind::transpose_bits;
  config.tile.block_n = static_cast<int>(skip_tile_keys(problem.head_dim));
  return config;
}

std::int64_t backward_row_tiles(const Problem& p) {
  const std::int64_t block_m = backward_kernel(p).backward.block_m;
  return p.packed_q ? p.total_q / block_m + p.batch : ceil_div(p.max_seqlen_q, block_m);
}

bool splits_columns(const Problem& p) {
  const KernelConfig main = backward_kernel(p);
  return (main.gate_bits || main.mask != MaskKind::window) &&
         p.group_size * ceil_div(p.max_seqlen_q, main.backward.block_m) >= 2 * kernels::kLeastPart;
}

std::int64_t most_slots(const Problem& p) {
  const BackwardTile tile = backward_kernel(p).backward;
  const std::int64_t tiles =
      p.batch * p.num_heads * ceil_div(p.max_seqlen_q, tile.block_m) * ceil_div(p.max_seqlen_k, tile.block_n);
  return std::min<std::int64_t>(tiles / kernels::kLeastPart, kernels::kMostSlots);
}

std::int64_t key_heads_per_wave(const Problem& p) {
  // Queries, gradients and float32 sums of the heads that run at one time; K and V stay with their processors, each of
  // which wants a key tile.
  constexpr std::int64_t kL2Bytes = std::int64_t{40} << 20;
  // Of a head: Q, dO, and what is added to dQ.
  const std::int64_t row_bytes = kernels::kElementBytes * (p.head_dim + p.head_dim_v) + 4 * p.head_dim;
  const std::int64_t bytes = std::max<std::int64_t>(p.max_seqlen_q, 1) * p.group_size * row_bytes;
  constexpr std::int64_t kBusy = 128;  // key tiles, for 132 processors
  const std::int64_t key_tiles =
      std::max<std::int64_t>(1, ceil_div(p.max_seqlen_k, backward_kernel(p).backward.block_n));
  return even_wave(std::max<std::int64_t>(1, p.batch * p.num_kv_heads),
                   std::max(kL2Bytes / bytes, ceil_div(kBusy, key_tiles)));
}

std::int64_t ascending_key_heads(const Problem& p) {
  const KernelConfig main = backward_kernel(p);
  const bool causal = main.mask == MaskKind::window && main.window_right && !main.window_left;
  // Where sums are added from registers consumers wait for their turns, not adders: 3 to 19 % slower that way round.
  if (!main.deterministic || main.gate_bits || !causal || main.backward.stage_grad_query == 0) return 0;
  constexpr std::int64_t kLeast =
      4;  // of fewer heads too many key tiles run together and wait for each other
  const std::int64_t heads = p.batch * p.num_kv_heads;
  return heads < kLeast ? 0 : std::min(heads / 2, std::max(key_heads_per_wave(p), kLeast));
}

bool first_stores(const Problem& p) {
  const KernelConfig main = backward_kernel(p);
  const bool short_columns = main.gate_bits || main.mask != MaskKind::window || main.window_left;
  return main.deterministic || (short_columns && kernels::backward_first_stores(main.backward));
}

// Where columns may be cut, units come in another order than waves; rows of packed sequences lie in another order.
bool clears_ahead(const Problem& p) {
  const KernelConfig main = backward_kernel(p);
  return main.backward.stage_grad_query != 0 && !first_stores(p) && !main.gate_bits &&
         main.mask == MaskKind::window && !p.packed_q && !p.packed_k && p.max_seqlen_k > 0 &&
         key_heads_per_wave(p) < p.batch * p.num_kv_heads;
}

BackwardWorkspace backward_workspace(const Problem& p) {
  BackwardWorkspace parts;
  Carver carver;
  const BackwardTile tile = backward_kernel(p).backward;
  parts.counters = carver.take(kCounterBytes);
  take_inputs(p, carver, parts);
  const bool whole = p.head_dim % 8 == 0, whole_v = p.head_dim_v % 8 == 0;
  if (!p.aligned_out || !whole_v) parts.out = carver.take_copy(p.total_q, p.num_heads, p.head_dim_v);
  if (!p.aligned_grad_out || !whole_v)
    parts.grad_out = carver.take_copy(p.total_q, p.num_heads, p.head_dim_v);
  if (!p.aligned_grad_query || !whole)
    parts.grad_query = carver.take_copy(p.total_q, p.num_heads, p.head_dim);
  if (!p.aligned_grad_key || !whole) parts.grad_key = carver.take_copy(p.total_k, p.num_kv_heads, p.head_dim);
  if (!p.aligned_grad_value || !whole_v)
    parts.grad_value = carver.take_copy(p.total_k, p.num_kv_heads, p.head_dim_v);
  const std::int64_t row_tiles = backward_row_tiles(p) * p.num_heads * (p.packed_q ? 1 : p.batch);
  const std::int64_t rows = row_tiles * tile.block_m;
  parts.row_vectors = carver.take(rows * tile.row_vectors * 4);
  parts.grad_query_sum = carver.take(rows * tile.head_dim * 4);
  if (p.has_gate) parts.grad_alpha_sum = carver.take(rows * 4);
  if (tile.gate_terms) parts.gate_row_terms = carver.take(row_tiles * kernels::gate_term_bytes(tile.block_m));
  if (p.has_sink) parts.grad_sink_sum = carver.take(row_tiles * 4);
  if (first_stores(p)) parts.turns = carver.take(row_tiles * kernels::kBackwardWarps * 4);
  parts.sums_done = carver.take(p.batch * p.num_heads * 4);
  if (clears_ahead(p)) parts.clears = carver.take((1 + p.batch * p.num_heads) * 4);
  if (walks_bits(p)) {
    if (!p.skips_tiles()) parts.visible_bits = carver.take(map_words(p) * 4);
    parts.column_bits =
        carver.take(gate_tiles(p) * p.num_heads * (p.packed_k ? 1 : p.batch) * column_words(p) * 4);
  }
  if (p.has_block_mask) {
    if (!p.has_partial_blocks) parts.no_blocks = carver.take(4);
    const std::int64_t columns = column_batch(p) * p.mask_heads * p.key_blocks();
    parts.list_count = carver.take(columns * 4);
    parts.list_entries = carver.take(columns * p.row_blocks() * std::int64_t{sizeof(kernels::ColumnEntry)});
  }
  if (splits_columns(p)) {
    const std::int64_t slots = most_slots(p);
    const std::int64_t key_tiles = ceil_div(p.max_seqlen_k, tile.block_n) * p.batch * p.num_kv_heads;
    parts.column_parts = carver.take((key_tiles + slots) * std::int64_t{sizeof(kernels::ColumnPart)});
    parts.split_columns = carver.take(slots * std::int64_t{sizeof(kernels::SplitColumn)});
    parts.column_lengths = carver.take(key_tiles * 4);
    parts.part_counts = carver.take(sizeof(kernels::PartCounts));
    parts.partial_sums = carver.take(slots * kernels::backward_slot_floats(tile) * std::int64_t{4});
  }
  parts.bytes = carver.used();
  return parts;
}

// The turns of deterministic sums count keys in use, of which each sequence may have its own number.
std::int64_t column_batch(const Problem& p) { return p.deterministic ? p.batch : p.mask_batch; }

std::int64_t column_words(const Problem& p) { return ceil_div(ceil_div(p.max_seqlen_q, kSkipTileRows), 32); }

std::vector<KernelConfig> reachable_backward_kernels() {
  std::vector<KernelConfig> found;
  const auto add = [&](const KernelConfig& config) {  // many problems share a kernel
    if (std::find(found.begin(), found.end(), config) == found.end()) found.push_back(config);
  };
  Problem p;
  p.operation = Operation::backward;
  const auto each = [](bool& flag, auto next) {
    for (const bool value : {false, true}) {
      flag = value;
      next();
    }
    flag = false;
  };
  const auto each_size = [&](auto next) {
    for (const BackwardTile& row : kDense) {
      p.head_dim = row.head_dim;
      p.head_dim_v = row.head_dim_v;
      next();
    }
  };
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    p.dtype = dtype;
    each_size([&] {
      each(p.deterministic, [&] {
        for (const int mask : {0, 1, 2, 3}) {
          p.causal = mask == 1;
          p.window_left = mask == 2 ? 1 : -1;
          p.has_window_sizes = mask == 3;
          for (const double threshold : {0.0, 1.0})
            for (const double softcap : {0.0, 1.0}) {
              p.threshold = threshold;
              p.softcap = softcap;
              each(p.has_alibi, [&] {
                p.has_gate = false;
                add(backward_kernel(p));
                if (walks_bits(p) || p.has_window_sizes) add(split_columns_kernel(p));
                p.has_gate = true;
                each(p.gate_test, [&] { each(p.log_sigmoid_gate, [&] { add(backward_kernel(p)); }); });
                p.has_gate = false;
              });
            }
        }
        p.has_window_sizes = p.causal = false;
        p.window_left = -1;
        p.threshold = 0;
        p.has_block_mask = true;
        for (const double softcap : {0.0, 1.0}) {
          p.softcap = softcap;
          each(p.has_alibi, [&] {
            add(backward_kernel(p));
            add(split_columns_kernel(p));
          });
        }
        if (!p.deterministic) add(block_columns_kernel(p));
        p.has_block_mask = false;
        p.softcap = 0;
        for (const double threshold : {0.0, 1.0}) {  // with bits the tile may be another
          p.threshold = threshold;
          each(p.has_gate, [&] {
            each(p.log_sigmoid_gate, [&] {
              each(p.has_sink, [&] { add(backward_prepare_kernel(p)); });
              add(backward_finish_kernel(p));
              add(sum_sink_kernel(p));
              add(sum_parts_kernel(p));
            });
          });
        }
      });
    });
  }
  p.head_dim = 128;
  found.push_back(transpose_bits_kernel(p));
  p.head_dim = 256;
  found.push_back(transpose_bits_kernel(p));
  return found;
}

std::vector<KernelConfig> shipped_backward_kernels() {
  std::vector<KernelConfig> shipped;
  for (const KernelConfig& c : reachable_backward_kernels()) {
    const int features = logits(c) + (c.mask != MaskKind::window) + c.gate_bits + c.deterministic;
    const bool causal = c.window_right && !c.window_left;
    const bool small = c.kind == KernelKind::split_columns;  // one for each kind of column
    // As of the forward: each feature once, on the commonest head_dim.
    const bool sample = c.element == ElementType::bf16 && c.backward.head_dim == 128 &&
                        (c.mask != MaskKind::window || causal);
    const bool plain = !small && features == 0 && (c.element == ElementType::bf16 || causal);
    if (c.kind == KernelKind::transpose_bits || c.kind == KernelKind::block_columns ||
        (c.kind == KernelKind::backward || small
             ? plain || (features == 1 && sample)
             : plain_around(c) ||
                   (c.element == ElementType::bf16 && c.backward.head_dim == 128 && features + c.sink == 1)))
      shipped.push_back(c);
  }
  return shipped;
}

}  // namespace fsa::cuda
