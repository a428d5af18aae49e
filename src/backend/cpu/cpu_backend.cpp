// SPDX-License-Identifier: Apache-2.0
// The CPU backend: chooses the instruction set once, cuts a call into work items, and fills what no item owns.
#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "backend/cpu/amx.h"
#include "backend/cpu/carver.h"
#include "backend/cpu/huge_pages.h"
#include "backend/cpu/merge.h"
#include "backend/cpu/nsa_backend.h"
#include "backend/cpu/reference_scalar.h"
#include "backend/cpu/simd/kernel_table.h"
#include "backend/cpu/simd/nsa_table.h"
#include "backend/cpu/thread_pool.h"
#include "backend/registry.h"
#include "core/block_mask.h"
#include "core/env.h"
#include "core/skip_tile.h"
#include "core/visibility.h"
#include "fsa/attention.h"
#include "fsa/error.h"

namespace fsa::cpu {
namespace {

// ---------------------------------------------------------------------------------------------- instruction sets

struct Target {
  const KernelTable* kernels;
  const NsaKernelTable* nsa_kernels;
  bool on_this_machine;
  bool needs_amx =
      false;  // the operating system grants tile registers, and is asked only for a set that fits
};

// Best first.
std::vector<Target> targets() {
  std::vector<Target> list;
#if defined(FSA_HAS_AVX512) || defined(FSA_HAS_AVX2) || defined(FSA_HAS_SSE4)
  __builtin_cpu_init();
  const bool sse4 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt") &&
                    __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
  const bool avx2 = sse4 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd");
#endif
#if defined(FSA_HAS_AVX512_AMX)
  list.push_back({&avx512_amx_kernels(), &avx512_nsa_kernels(), avx512, true});
#endif
#if defined(FSA_HAS_AVX512)
  list.push_back({&avx512_kernels(), &avx512_nsa_kernels(), avx512});
#endif
#if defined(FSA_HAS_AVX2)
  list.push_back({&avx2_kernels(), &avx2_nsa_kernels(), avx2});
#endif
#if defined(FSA_HAS_SSE4)
  list.push_back({&sse4_kernels(), &sse4_nsa_kernels(), sse4});
#endif
#if defined(FSA_HAS_NEON)
  list.push_back({&neon_kernels(), &neon_nsa_kernels(), true});
#endif
#if defined(FSA_HAS_GENERIC)
  list.push_back({&generic_kernels(), &generic_nsa_kernels(), true});
#endif
  return list;
}

// Without kernels, and with a reason, when FSA_CPU_TARGET names a set that this machine or build lacks, or none fits.
struct Choice {
  const KernelTable* kernels = nullptr;
  const NsaKernelTable* nsa_kernels = nullptr;
  bool tiles = false;  // bfloat16 is multiplied on AMX tiles
  std::string reason;
};

bool usable(const Target& target) { return target.on_this_machine && (!target.needs_amx || amx_granted()); }

Choice find_kernels() {
  const std::string wanted(env::cpu_target());
  for (const Target& target : targets())
    if ((wanted.empty() || wanted == target.kernels->target) && usable(target))
      return {target.kernels, target.nsa_kernels, target.needs_amx, ""};
  std::string have;
  for (const Target& target : targets())
    if (usable(target)) have += (have.empty() ? "" : ", ") + std::string(target.kernels->target);
  return {nullptr, nullptr, false,
          wanted.empty() ? "this processor has none of the instruction sets that the library was built for"
                         : "FSA_CPU_TARGET: " + wanted + ", but this machine offers " +
                               (have.empty() ? "none" : have) + "; unset it to take the best one"};
}

const Choice& choice() {
  static const Choice made = find_kernels();
  return made;
}

const KernelTable& kernels() {
  if (choice().kernels == nullptr) throw Error(ErrorCode::invalid_argument, choice().reason);
  return *choice().kernels;
}

// ---------------------------------------------------------------------------------------------- memory

// Row tiles of one query head over all sequences, or more.
std::int64_t row_tiles_bound(const Problem& p) {
  return p.packed_q ? p.total_q / kSkipTileRows + p.batch : p.batch * ceil_div(p.max_seqlen_q, kSkipTileRows);
}

// Parts of the key range whose dQ is kept apart. Fixed by the shape, never by the machine: 32 items feed 16 threads
// with two each, and more than 8 copies of dQ, or more than two beyond 128 MB, would cost more memory than they bring
// speed.
std::int64_t backward_segments(const Problem& p) {
  const std::int64_t copy_bytes = row_tiles_bound(p) * kSkipTileRows * p.num_heads * p.head_dim * 4;
  const std::int64_t most = std::clamp<std::int64_t>(
      (std::int64_t{1} << 27) / std::max<std::int64_t>(1, copy_bytes), 2, kMostSegments);
  const std::int64_t heads = std::max<std::int64_t>(1, p.batch * p.num_kv_heads);
  const std::int64_t keys = 2 * skip_tile_keys(p.head_dim);
  return std::clamp<std::int64_t>(ceil_div(32, heads), 1,
                                  std::clamp<std::int64_t>(ceil_div(p.max_seqlen_k, keys), 1, most));
}

// Keys of a sequence that one segment takes: whole key tiles.
std::int64_t keys_per_segment(const Problem& p, std::int64_t keys, std::int64_t segments) {
  const std::int64_t tile_keys = skip_tile_keys(p.head_dim);
  return ceil_div(ceil_div(keys, segments), tile_keys) * tile_keys;
}

// Parts of all segments, or more: with a causal mask or a window few rows see a segment, wherever the sequences end.
std::int64_t parts_bound(const Problem& p, std::int64_t segments) {
  const std::int64_t tiles = row_tiles_bound(p);
  if (p.packed_q || p.packed_k || p.has_window_sizes) return segments * p.num_heads * tiles;
  Sequence s;
  s.seqlen_q = p.max_seqlen_q;
  s.seqlen_k = p.max_seqlen_k;
  const Visibility v = make_visibility(p, s, nullptr);
  const Band band = v.bands[0];
  const std::int64_t per_segment = keys_per_segment(p, p.max_seqlen_k, segments);
  // Rows end where the keys end, and so no further from the first key than this.
  const std::int64_t end = v.key_base > 0 ? p.max_seqlen_k * v.key_stride + p.compress_block : p.max_seqlen_k;
  std::int64_t parts = 0;
  for (std::int64_t begin = 0; begin < p.max_seqlen_k; begin += per_segment) {
    const std::int64_t first = position_of_key(v, begin);
    const std::int64_t last = position_of_key(v, std::min(begin + per_segment, p.max_seqlen_k) - 1);
    const std::int64_t rows = std::min(end - first - band.low, last + band.high - first - band.low + 1);
    parts += std::clamp<std::int64_t>(ceil_div(std::max<std::int64_t>(rows, 0), kSkipTileRows) + 1, 0,
                                      tiles / std::max<std::int64_t>(1, p.batch));
  }
  return p.batch * p.num_heads * parts;
}

// The table of the block mask, in the workspace.
std::int32_t* take_block_codes(const Problem& p, Carver& memory) {
  return memory.take<std::int32_t>(
      p.has_block_mask ? p.mask_batch * p.mask_heads * p.row_blocks() * p.key_blocks() : 0);
}

BlockCodes make_block_codes(const Problem& p, const Arguments& args, std::int32_t* codes) {
  BlockCodes table;
  const std::int64_t size = p.row_blocks() * p.key_blocks();
  table.codes = codes;
  table.stride_batch = p.mask_batch > 1 ? p.mask_heads * size : 0;
  table.stride_head = p.mask_heads > 1 ? size : 0;
  table.key_blocks = p.key_blocks();
  table.block_rows = p.block_rows;
  table.block_keys = p.block_keys;
  table.bits = args.block_mask.bits;
  parallel_for(p.batch == 0 ? 0 : p.mask_batch * p.mask_heads, [&](std::int64_t i) {
    fill_block_codes(p, args.block_mask, i / p.mask_heads, i % p.mask_heads, codes + i * size);
  });
  return table;
}

BackwardBuffers backward_buffers(const Problem& p, Carver& memory) {
  BackwardBuffers b;
  b.tiles_per_head = row_tiles_bound(p);
  b.segments = backward_segments(p);
  const std::int64_t tiles = p.num_heads * b.tiles_per_head;
  b.out_dot_grad = memory.take<float>(tiles * kSkipTileRows);
  b.lse_log2 = memory.take<float>(tiles * kSkipTileRows);
  b.lse_log2_low = memory.take<float>(tiles * kSkipTileRows);
  b.sink_partial = memory.take<double>(p.has_sink ? tiles : 0);
  const std::int64_t parts = parts_bound(p, b.segments);
  b.grad_query = memory.take<float>(parts * grad_query_floats(p));
  b.grad_alpha = memory.take<float>(p.has_gate ? parts * kSkipTileRows : 0);
  b.touched = memory.take<std::uint8_t>(parts);
  b.packed_row_bytes = static_cast<std::int64_t>(kernels().packed_row_bytes(p));
  b.packed_rows = memory.take<char>(tiles * b.packed_row_bytes);
  return b;
}

// A split of decode covers this many keys whatever the shape, so a result never depends on its neighbours in the
// batch. 1024 keys are 0.25 to 1 MB of K and V: 30 microseconds and more of work, against 5 to wake a thread.
constexpr std::int64_t kKeysPerSplit = 1024;
constexpr std::int64_t kMostDecodeSplits = 8;  // of an item

DecodeBuffers decode_buffers(const Problem& p, Carver& memory) {
  DecodeBuffers b;
  const std::int64_t tile = skip_tile_keys(p.head_dim);
  const std::int64_t positions = std::max<std::int64_t>(1, p.gathered ? p.gather_size : p.max_seqlen_k);
  b.keys_per_split = kKeysPerSplit;
  if (p.num_splits > 0 && !p.batch_invariant)
    b.keys_per_split = ceil_div(ceil_div(positions, p.num_splits), tile) * tile;
  b.splits = ceil_div(positions, b.keys_per_split);
  b.words = ceil_div(ceil_div(positions, tile), 32);
  b.pitch = ceil_div(p.head_dim_v, 16) * 16;
  const std::int64_t rows = p.batch * p.num_heads;
  b.partial_out = memory.take<float>(rows * b.splits * b.pitch);
  b.row_max = memory.take<float>(rows * b.splits);
  b.row_sum = memory.take<float>(rows * b.splits);
  b.open = memory.take<std::uint32_t>(p.skips_tiles() ? p.batch * p.num_kv_heads * b.words : 0);
  b.cut = memory.take<float>(p.threshold > 0 ? rows : 0);
  return b;
}

char* element(const Operand& o, std::int64_t batch, std::int64_t row, std::int64_t head) {
  return static_cast<char*>(o.data) + (batch * o.stride_batch + row * o.stride_row + head * o.stride_head) *
                                          static_cast<std::int64_t>(size_of(o.dtype));
}

void zero_rows(const Operand& o, std::int64_t batch, std::int64_t begin, std::int64_t end, std::int64_t heads,
               std::int64_t dim) {
  if (!o.present()) return;
  const std::size_t bytes = static_cast<std::size_t>(dim) * size_of(o.dtype);
  for (std::int64_t row = begin; row < end; ++row)
    for (std::int64_t head = 0; head < heads; ++head) std::memset(element(o, batch, row, head), 0, bytes);
}

// Calls fill(batch, begin, end) for the rows (of queries, or of keys) that no sequence uses: after each used length,
// and after the last sequence of a packed tensor.
template <class Fill>
void for_unused(const Problem& p, const Arguments& args, bool keys, const Fill& fill) {
  std::int64_t end_of_last = 0;
  const bool packed = keys ? p.packed_k : p.packed_q;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(p, args, b);
    const std::int64_t begin = keys ? s.k_begin : s.q_begin, held = keys ? s.keys : s.rows;
    fill(b, begin + (keys ? s.seqlen_k : s.seqlen_q), begin + held);
    end_of_last = begin + held;
  }
  if (packed) fill(0, end_of_last, keys ? p.total_k : p.total_q);
}

// ---------------------------------------------------------------------------------------------- forward

void clear_skip_map(const Problem& p, const SkipMap& map) {
  if (!map.present) return;
  const std::int64_t batches = p.packed_q ? 1 : p.batch;
  for (std::int64_t b = 0; b < batches; ++b)
    for (std::int64_t h = 0; h < p.num_heads; ++h)
      for (std::int64_t t = 0; t < map.tiles; ++t)
        std::memset(map.data + b * map.stride_batch + h * map.stride_head + t * map.stride_tile, 0,
                    static_cast<std::size_t>(map.words) * sizeof(std::int32_t));
}

void fill_unused_outputs(const Problem& p, const Arguments& args) {
  for_unused(p, args, false, [&](std::int64_t batch, std::int64_t begin, std::int64_t end) {
    zero_rows(args.out, batch, begin, end, p.num_heads, p.head_dim_v);
    if (!args.lse.present()) return;
    for (std::int64_t row = begin; row < end; ++row)
      for (std::int64_t head = 0; head < p.num_heads; ++head)
        *reinterpret_cast<float*>(element(args.lse, batch, row, head)) =
            -std::numeric_limits<float>::infinity();
  });
}

// `most`: row tiles of an item; `whole`: they come in so many.
std::vector<ForwardItem> forward_items(const Problem& p, const Arguments& args, const BlockCodes* blocks,
                                       std::int64_t most = kMaxUnitsPerItem, std::int64_t whole = 1) {
  std::int64_t units = 0;
  for (std::int64_t b = 0; b < p.batch; ++b)
    units += ceil_div(sequence(p, args, b).seqlen_q, kSkipTileRows) * p.num_heads;
  // Eight row tiles share one packing of K and V; fewer when that would leave threads without work.
  const std::int64_t fair = std::clamp<std::int64_t>(units / (4 * num_threads()), 1, most);
  const std::int64_t per_item = std::max(whole, fair / whole * whole);
  std::vector<ForwardItem> items;
  items.reserve(static_cast<std::size_t>(units / per_item + p.batch * p.num_kv_heads));
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(p, args, b);
    const std::int64_t count = ceil_div(s.seqlen_q, kSkipTileRows) * p.group_size;
    for (std::int64_t begin = 0; begin < count; begin += per_item)
      for (std::int64_t head = 0; head < p.num_kv_heads; ++head)
        items.push_back({s, head, begin, std::min(count, begin + per_item), blocks});
  }
  // Longest first, so that no thread is left with a long item at the end. Keys before the last row of the item
  // measure it well enough under every mask.
  if (p.causal_lengths() || p.packed_q || args.seqused_k.present)
    std::stable_sort(items.begin(), items.end(), [&](const ForwardItem& x, const ForwardItem& y) {
      const auto keys = [&](const ForwardItem& item) {
        if (!p.causal_lengths()) return item.sequence.seqlen_k;
        const std::int64_t tiles = ceil_div(item.sequence.seqlen_q, kSkipTileRows);
        return (tiles - item.unit_begin / p.group_size) * kSkipTileRows + item.sequence.offset;
      };
      return keys(x) > keys(y);
    });
  return items;
}

void run_forward(const Problem& p, const Arguments& args, Workspace workspace) {
  const KernelTable& k = kernels();
  BlockCodes table;
  if (p.has_block_mask) {
    Carver memory(workspace.data);
    table = make_block_codes(p, args, take_block_codes(p, memory));
  }
  clear_skip_map(p, args.skip_map);
  fill_unused_outputs(p, args);
  const std::vector<ForwardItem> items = forward_items(p, args, p.has_block_mask ? &table : nullptr);
  const std::size_t scratch = k.forward_scratch(p);
  parallel_for(static_cast<std::int64_t>(items.size()), [&](std::int64_t i) {
    k.forward(p, args, items[static_cast<std::size_t>(i)], thread_scratch(scratch));
  });
}

// The same with the blocks chosen on the way, where a group fits into an item and its scores into the caches. Scores and
// maxima of a row tile: 143 KB at 32k tokens, blocks of 64 and windows every 16.
constexpr std::int64_t kSelectionBytes = std::int64_t{1}
                                         << 20;  // of an item, while it has more than one group
constexpr std::int64_t kMostSelectionBytes = std::int64_t{1} << 22;  // of a group

bool run_with_selection(const Problem& p, const Arguments& args, const NsaProblem& selection,
                        const NsaArguments& selection_args) {
  const NsaKernelTable& k = *choice().nsa_kernels;
  const std::int64_t bytes =
      4 * kSkipTileRows * (most_blocks(selection) + ceil_div(p.max_seqlen_k, skip_tile_keys(p.head_dim)));
  if (p.group_size > kMaxUnitsPerItem || p.group_size * bytes > kMostSelectionBytes) return false;
  const std::int64_t most =
      std::clamp<std::int64_t>(kSelectionBytes / bytes, p.group_size, kMaxUnitsPerItem) / p.group_size *
      p.group_size;
  fill_unused_outputs(p, args);
  fill_unused_blocks(selection, selection_args);
  const std::vector<ForwardItem> items = forward_items(p, args, nullptr, most, p.group_size);
  const std::size_t scratch = k.select_forward_scratch(p, selection, most);
  parallel_for(static_cast<std::int64_t>(items.size()), [&](std::int64_t i) {
    k.select_forward(p, args, selection, selection_args, items[static_cast<std::size_t>(i)],
                     thread_scratch(scratch));
  });
  return true;
}

// ---------------------------------------------------------------------------------------------- backward

void fill_unused_grads(const Problem& p, const Arguments& args) {
  for_unused(p, args, false, [&](std::int64_t batch, std::int64_t begin, std::int64_t end) {
    if (!p.adds_grad_query) zero_rows(args.grad_query, batch, begin, end, p.num_heads, p.head_dim);
    zero_rows(args.grad_alpha, batch, begin, end, p.num_heads, 1);
  });
  // Unused keys of a sequence belong to its items; only the rows after the last sequence belong to none.
  if (!p.packed_k) return;
  const std::int64_t begin = p.batch > 0 ? args.cu_seqlens_k.at(p.batch) : 0;
  if (!p.adds_grad_key_value) {
    zero_rows(args.grad_key, 0, begin, p.total_k, p.num_kv_heads, p.head_dim);
    zero_rows(args.grad_value, 0, begin, p.total_k, p.num_kv_heads, p.head_dim_v);
  }
  zero_rows(args.grad_delta, 0, begin, p.total_k, p.num_kv_heads, 1);
}

struct BackwardPlan {
  std::vector<RowTileItem> rows;
  std::vector<BackwardItem> keys;
  std::vector<RowParts> row_parts;  // as BackwardBuffers has them
  std::int64_t parts = 0;
};

// The row tiles between the first and the last one that see a key of [key_begin, key_end); `begin` is left open.
RowParts rows_that_see(const Problem& p, const Arguments& args, const Sequence& s, std::int64_t kv_head,
                       std::int64_t key_begin, std::int64_t key_end) {
  std::int64_t sizes[4] = {};
  if (p.has_window_sizes)
    for (int c = 0; c < 4; ++c)
      sizes[c] = args.window_sizes
                     .data[kv_head * args.window_sizes.stride_row + c * args.window_sizes.stride_column];
  const TileRanges ranges = visible_row_tiles(make_visibility(p, s, sizes), s.seqlen_q, key_begin,
                                              std::min(key_end, s.seqlen_k), kSkipTileRows);
  if (ranges.count == 0) return {};
  const std::int64_t first = ranges.range[0].begin;
  return {0, first, ranges.range[ranges.count - 1].end - first};
}

BackwardPlan backward_plan(const Problem& p, const Arguments& args, std::int64_t segments) {
  BackwardPlan plan;
  plan.row_parts.resize(static_cast<std::size_t>(p.batch * p.num_kv_heads * segments));
  std::int64_t tile_begin = 0;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(p, args, b);
    const std::int64_t tiles = ceil_div(s.seqlen_q, kSkipTileRows);
    for (std::int64_t head = 0; head < p.num_heads; ++head)
      for (std::int64_t t = 0; t < tiles; ++t) plan.rows.push_back({s, tile_begin, head, t});
    const std::int64_t per_segment = keys_per_segment(p, s.keys, segments);
    for (std::int64_t segment = 0; segment * per_segment < s.keys;
         ++segment)                                                 // left first: with a causal mask
      for (std::int64_t head = 0; head < p.num_kv_heads; ++head) {  // more rows see those keys
        const std::int64_t begin = segment * per_segment, end = std::min(s.keys, begin + per_segment);
        RowParts rows = rows_that_see(p, args, s, head, begin, end);
        rows.begin = plan.parts;
        plan.parts += p.group_size * rows.tiles;
        plan.row_parts[static_cast<std::size_t>((b * p.num_kv_heads + head) * segments + segment)] = rows;
        plan.keys.push_back({s, tile_begin, head, begin, end, rows});
      }
    tile_begin += tiles;
  }
  if (p.packed_k || args.seqused_k.present || args.seqused_q.present)
    std::stable_sort(plan.keys.begin(), plan.keys.end(), [](const BackwardItem& x, const BackwardItem& y) {
      const auto pairs = [](const BackwardItem& item) {
        return item.sequence.seqlen_q * (std::min(item.key_end, item.sequence.seqlen_k) - item.key_begin);
      };
      return pairs(x) > pairs(y);
    });
  return plan;
}

void store_grad_sink(const Problem& p, const Arguments& args, const BackwardBuffers& buffers,
                     const BackwardPlan& plan) {
  if (!args.grad_sink.present()) return;
  std::vector<double> sums(static_cast<std::size_t>(p.num_heads), 0.0);
  for (const RowTileItem& item : plan.rows)
    sums[static_cast<std::size_t>(item.head)] +=
        buffers.sink_partial[item.head * buffers.tiles_per_head + item.tile_begin + item.tile];
  for (std::int64_t head = 0; head < p.num_heads; ++head)
    store_scalar(args.grad_sink.dtype, element(args.grad_sink, 0, 0, head), 0,
                 sums[static_cast<std::size_t>(head)]);
}

void run_backward(const Problem& p, const Arguments& args, Workspace workspace) {
  const KernelTable& k = kernels();
  Carver memory(workspace.data);
  BackwardBuffers buffers = backward_buffers(p, memory);
  BlockCodes table;
  if (p.has_block_mask) {
    table = make_block_codes(p, args, take_block_codes(p, memory));
    buffers.blocks = &table;
  }
  fill_unused_grads(p, args);
  const BackwardPlan plan = backward_plan(p, args, buffers.segments);
  if (const std::int64_t room = parts_bound(p, buffers.segments); plan.parts > room)
    throw Error(ErrorCode::internal, "workspace: " + std::to_string(plan.parts) + " parts of dQ, room for " +
                                         std::to_string(room));
  buffers.row_parts = plan.row_parts.data();
  std::fill_n(buffers.touched, plan.parts, std::uint8_t{0});
  const std::size_t scratch = k.backward_scratch(p);
  const auto rows = static_cast<std::int64_t>(plan.rows.size());
  parallel_for(rows, [&](std::int64_t i) {
    k.row_statistics(p, args, buffers, plan.rows[static_cast<std::size_t>(i)], thread_scratch(scratch));
  });
  // Threads share the segments block by block: with a window a call of one key head has eight alike, and a thread that is
  // held up in its last one kept the other waiting.
  const std::int64_t block_keys = k.backward_block_keys(p);
  std::vector<std::int64_t> blocks;
  for (const BackwardItem& segment : plan.keys)
    blocks.push_back(ceil_div(segment.key_end - segment.key_begin, block_keys));
  parallel_chains(blocks, [&](std::size_t segment, std::int64_t step) {
    BackwardItem block = plan.keys[segment];
    block.key_begin += step * block_keys;
    block.key_end = std::min(block.key_end, block.key_begin + block_keys);
    k.backward(p, args, buffers, block, thread_scratch(scratch));
  });
  parallel_for(rows, [&](std::int64_t i) {
    k.finish_rows(p, args, buffers, plan.rows[static_cast<std::size_t>(i)], thread_scratch(scratch));
  });
  store_grad_sink(p, args, buffers, plan);
}

// ---------------------------------------------------------------------------------------------- decode

// Items of several heads and splits where that leaves four for each thread.
std::vector<DecodeItem> decode_items(const Problem& p, const Arguments& args, const DecodeBuffers& buffers) {
  const auto splits_of = [&](const Sequence& s) {
    return ceil_div(p.gathered ? p.gather_size : s.seqlen_k, buffers.keys_per_split);
  };
  std::int64_t units = 0;
  for (std::int64_t b = 0; b < p.batch; ++b) units += splits_of(sequence(p, args, b)) * p.num_kv_heads;
  const std::int64_t per_item = std::max<std::int64_t>(1, units / (4 * num_threads()));
  const std::int64_t most = std::clamp<std::int64_t>(per_item, 1, decode_heads(p));
  const std::int64_t heads = ceil_div(p.num_kv_heads, ceil_div(p.num_kv_heads, most));
  const std::int64_t splits = std::clamp<std::int64_t>(per_item / heads, 1, kMostDecodeSplits);
  std::vector<DecodeItem> items;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(p, args, b);
    // Splits without a key, too: each leaves its sums.
    for (std::int64_t split = 0; split < buffers.splits; split += splits)
      for (std::int64_t head = 0; head < p.num_kv_heads; head += heads)
        items.push_back({s, head, std::min(heads, p.num_kv_heads - head), split,
                         std::min(splits, buffers.splits - split)});
  }
  return items;
}

void run_decode(const Problem& p, const Arguments& args, Workspace workspace) {
  const KernelTable& k = kernels();
  Carver memory(workspace.data);
  const DecodeBuffers buffers = decode_buffers(p, memory);
  const std::size_t scratch = k.decode_scratch(p);
  std::vector<DecodeItem> heads;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(p, args, b);
    for (std::int64_t head = 0; head < p.num_kv_heads; ++head) heads.push_back({s, head});
  }
  const auto each = [&](auto phase, const std::vector<DecodeItem>& items) {
    parallel_for(static_cast<std::int64_t>(items.size()), [&](std::int64_t i) {
      phase(p, args, buffers, items[static_cast<std::size_t>(i)], thread_scratch(scratch));
    });
  };
  if (p.skips_tiles()) each(k.decode_plan, heads);
  each(k.decode, decode_items(p, args, buffers));
  each(k.decode_combine, heads);
}

void prefer_huge_outputs(const Problem& p, const Arguments& args) {
  const std::int64_t batches_q = p.packed_q ? 1 : p.batch, batches_k = p.packed_k ? 1 : p.batch;
  const std::int64_t rows = p.packed_q ? p.total_q : p.max_seqlen_q;
  const std::int64_t keys = p.packed_k ? p.total_k : p.max_seqlen_k;
  prefer_huge_pages(args.grad_query, batches_q, rows, p.num_heads, p.head_dim);
  prefer_huge_pages(args.grad_key, batches_k, keys, p.num_kv_heads, p.head_dim);
  prefer_huge_pages(args.grad_value, batches_k, keys, p.num_kv_heads, p.head_dim_v);
  if (p.operation == Operation::forward)
    prefer_huge_pages(args.out, batches_q, rows, p.num_heads, p.head_dim_v);
}

class CpuBackend final : public Backend {
 public:
  using Backend::kernel;
  using Backend::reject;
  using Backend::run;
  using Backend::run_with_selection;
  using Backend::workspace_bytes;

  std::string_view name() const override { return "cpu"; }

  Availability availability() const override {
    if (choice().kernels == nullptr) return {false, choice().reason};
    return {true, std::string("vectors of ") + std::to_string(choice().kernels->lanes) + " floats (" +
                      choice().kernels->target + "), " + std::to_string(num_threads()) + " threads"};
  }

  std::string reject(const Problem& p) const override {
    if (p.device.kind != DeviceKind::cpu) return "the tensors are not in CPU memory";
    if (p.dtype == DType::float64) return "float64 is computed by the reference";
    if (choice().kernels == nullptr && env::cpu_target().empty()) return choice().reason;
    kernels();  // a forced instruction set that is missing is an error, not a reason to try the next backend
    return {};
  }

  std::string kernel(const Problem& p) const override {
    static constexpr const char* kNames[] = {"forward", "backward", "decode"};
    return std::string(kNames[static_cast<int>(p.operation)]) + "_" + kernels().target + "_" +
           name_of(p.dtype) + "_d" + std::to_string(p.head_dim);
  }

  std::size_t workspace_bytes(const Problem& p) const override {
    Carver memory(nullptr);
    if (p.operation == Operation::backward) backward_buffers(p, memory);
    if (p.operation == Operation::decode) decode_buffers(p, memory);
    take_block_codes(p, memory);
    return memory.used();
  }

  bool merge(const MergeProblem& p) const override {
    if (p.device.kind != DeviceKind::cpu) return false;
    merge_states(p);
    return true;
  }

  void run(const Problem& p, const Arguments& args, Workspace workspace) const override {
    prefer_huge_pages(workspace.data, workspace.bytes);
    prefer_huge_outputs(p, args);
    switch (p.operation) {
      case Operation::forward:
        return run_forward(p, args, workspace);
      case Operation::backward:
        return run_backward(p, args, workspace);
      case Operation::decode:
        return run_decode(p, args, workspace);
    }
  }

  std::string reject(const NsaProblem& p) const override {
    if (p.device.kind != DeviceKind::cpu) return "the tensors are not in CPU memory";
    if (p.dtype == DType::float64) return "float64 is computed by the reference";
    if (choice().kernels == nullptr && env::cpu_target().empty()) return choice().reason;
    kernels();
    return {};
  }
  std::string kernel(const NsaProblem& p) const override { return nsa_kernel_name(p, kernels().target); }
  std::size_t workspace_bytes(const NsaProblem& p) const override { return nsa_workspace_bytes(p); }
  void run(const NsaProblem& p, const NsaArguments& args, Workspace workspace) const override {
    kernels();
    run_nsa(*choice().nsa_kernels, p, args, workspace);
  }
  bool run_with_selection(const Problem& p, const Arguments& args, const NsaProblem& selection,
                          const NsaArguments& selection_args) const override {
    if (choice().tiles && p.dtype == DType::bfloat16) return false;  // its P is never in memory as float
    prefer_huge_outputs(p, args);
    return cpu::run_with_selection(p, args, selection, selection_args);
  }
};

}  // namespace
}  // namespace fsa::cpu

namespace fsa {

const Backend& cpu_backend() {
  static const cpu::CpuBackend backend;
  return backend;
}

}  // namespace fsa
