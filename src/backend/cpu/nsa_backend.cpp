// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/nsa_backend.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "backend/cpu/carver.h"
#include "backend/cpu/huge_pages.h"
#include "backend/cpu/selected_lists.h"
#include "backend/cpu/thread_pool.h"
#include "core/skip_tile.h"
#include "fsa/attention.h"

namespace fsa::cpu {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t unit) { return ceil_div(value, unit) * unit; }

template <class Item>
void for_items(const std::vector<Item>& items, std::size_t scratch, auto&& body) {
  parallel_for(static_cast<std::int64_t>(items.size()),
               [&](std::int64_t i) { body(items[static_cast<std::size_t>(i)], thread_scratch(scratch)); });
}

char* element(const Operand& o, std::int64_t batch, std::int64_t row, std::int64_t head) {
  return static_cast<char*>(o.data) + (batch * o.stride_batch + row * o.stride_row + head * o.stride_head) *
                                          static_cast<std::int64_t>(size_of(o.dtype));
}

void zero_rows(const Operand& o, std::int64_t batch, std::int64_t begin, std::int64_t end, std::int64_t heads,
               std::int64_t dim) {
  if (!o.present()) return;
  for (std::int64_t row = begin; row < end; ++row)
    for (std::int64_t head = 0; head < heads; ++head)
      std::memset(element(o, batch, row, head), 0, static_cast<std::size_t>(dim) * size_of(o.dtype));
}

// Rows of packed tensors after the last sequence.
std::int64_t end_of_rows(const NsaProblem& p, const NsaArguments& args) {
  return p.packed ? args.cu_seqlens_q.at(p.batch) : p.total_q;
}
std::int64_t end_of_keys(const NsaProblem& p, const NsaArguments& args) {
  return p.packed ? args.cu_seqlens_k.at(p.batch) : p.total_k;
}

// ---------------------------------------------------------------------------------------------- compression

// Floats per key head, as compress_head() of the kernels lays them out.
CompressBuffers compress_buffers(const NsaProblem& p, Carver& memory) {
  CompressBuffers b;
  const bool linear = p.kind == nsa::CompressKind::linear,
             backward = p.operation == NsaOperation::compress_backward;
  const std::int64_t pitch = round_up(p.head_dim, 16), heads = p.num_kv_heads;
  if (linear)
    b.weight = memory.take<float>(heads * (p.compress_block * p.head_dim + 4) * pitch);
  else if (p.kind == nsa::CompressKind::weighted)
    b.weight = memory.take<float>(heads * round_up(p.compress_block, 16));
  if (linear && backward)
    b.weight_t = memory.take<float>(heads * (p.compress_block / p.compress_stride) * round_up(p.head_dim, 4) *
                                    round_up(p.compress_stride * p.head_dim, 16));
  if (p.has_pe && !backward) b.bias = memory.take<float>(heads * pitch);
  if (backward) b.grad_sum = memory.take<float>(heads * pitch);
  return b;
}

// Ranges of `count(sequence)` units for every sequence and key head.
template <class Count>
std::vector<CompressItem> compress_items(const NsaProblem& p, const NsaArguments& args, const Count& count) {
  std::vector<CompressItem> items;
  const std::int64_t per_item = windows_per_item(p);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const NsaSequence s = nsa_sequence(p, args, b);
    for (std::int64_t begin = 0; begin < count(s); begin += per_item)
      for (std::int64_t head = 0; head < p.num_kv_heads; ++head)
        items.push_back({s, head, begin, std::min(count(s), begin + per_item)});
  }
  return items;
}

void run_compress(const NsaKernelTable& k, const NsaProblem& p, const NsaArguments& args,
                  Workspace workspace) {
  Carver memory(workspace.data);
  const CompressBuffers buffers = compress_buffers(p, memory);
  const std::size_t scratch = k.compress_scratch(p);
  parallel_for(p.num_kv_heads, [&](std::int64_t head) {
    k.compress_prepare(p, args, buffers, head, thread_scratch(scratch));
  });
  if (p.operation == NsaOperation::compress) {
    for_items(compress_items(p, args, [](const NsaSequence& s) { return s.compressed; }), scratch,
              [&](const CompressItem& item, void* memory_of_thread) {
                k.compress(p, args, buffers, item, memory_of_thread);
              });
    if (p.packed) zero_rows(args.out, 0, end_of_keys(p, args), p.total_k, p.num_kv_heads, p.head_dim);
    return;
  }
  for_items(
      compress_items(p, args, [&](const NsaSequence& s) { return ceil_div(s.rows, p.compress_stride); }),
      scratch, [&](const CompressItem& item, void* memory_of_thread) {
        k.compress_grad_x(p, args, buffers, item, memory_of_thread);
      });
  if (p.packed) zero_rows(args.grad_key, 0, end_of_rows(p, args), p.total_q, p.num_kv_heads, p.head_dim);
  if (!args.grad_weight.present() && !args.grad_pe.present()) return;
  // Every second stride of the window begins positions that are one item with those of the next stride.
  const std::int64_t pairs = ceil_div(p.compress_block / p.compress_stride, 2) * p.compress_stride;
  parallel_for(p.num_kv_heads * pairs, [&](std::int64_t i) {
    const std::int64_t first = i % pairs / p.compress_stride * 2 * p.compress_stride + i % p.compress_stride;
    k.compress_grad_weight(p, args, buffers, i / pairs, first, thread_scratch(scratch));
  });
}

// ---------------------------------------------------------------------------------------------- selection

void run_select_blocks(const NsaKernelTable& k, const NsaProblem& p, const NsaArguments& args) {
  std::vector<RowsItem> items;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const NsaSequence s = nsa_sequence(p, args, b);
    for (std::int64_t tile = ceil_div(s.rows, kSkipTileRows) - 1; tile >= 0;
         --tile)  // the last tokens see most
      for (std::int64_t head = 0; head < p.num_kv_heads; ++head)
        items.push_back({s, head, tile * kSkipTileRows, std::min(s.rows, (tile + 1) * kSkipTileRows)});
  }
  for_items(items, k.select_scratch(p),
            [&](const RowsItem& item, void* scratch) { k.select_blocks(p, args, item, scratch); });
  fill_unused_blocks(p, args);
}

// ---------------------------------------------------------------------------------------------- selected branch

// Rows of a chunk whose query and accumulators fill half of a 2 MB second-level cache: long lists per block, so that
// packing K^T (1 us per block of 64) is spread over many rows (0.2 us each), and no misses on the accumulators.
constexpr std::int64_t kChunkBytes = 1 << 20;

std::int64_t chunk_tokens(const NsaProblem& p) {
  if (p.algorithm == nsa::Algorithm::query_outer) return 1;
  if (p.chunk_tokens > 0) return std::min(p.chunk_tokens, std::max<std::int64_t>(1, p.max_seqlen_q));
  const std::int64_t rows = kChunkBytes / (4 * (round_up(p.head_dim, 16) + round_up(p.head_dim_v, 16)));
  return std::clamp<std::int64_t>(rows / p.group_size, 1, std::max<std::int64_t>(1, p.max_seqlen_q));
}

// Copies of dK and dV, so that 8 threads have work when there are fewer key heads, within 64 MB; fixed by the shape.
std::int64_t backward_segments(const NsaProblem& p) {
  const std::int64_t heads = std::max<std::int64_t>(1, p.batch * p.num_kv_heads);
  const std::int64_t chunks = ceil_div(std::max<std::int64_t>(1, p.max_seqlen_q), chunk_tokens(p));
  const std::int64_t copy_bytes =
      4 * p.num_kv_heads * p.total_k * (round_up(p.head_dim, 16) + round_up(p.head_dim_v, 16));
  const std::int64_t fit = (std::int64_t{1} << 26) / std::max<std::int64_t>(1, copy_bytes);
  return std::max<std::int64_t>(1, std::min({ceil_div(8, heads), chunks, fit}));
}

// Key heads whose blocks are packed at a time, within 64 MB: where the chunks of a sequence read most blocks several
// times. At 32k tokens and top 16 a chunk has 64 rows for a block, and packing it for them took a seventh of the time.
std::int64_t heads_packed(const NsaProblem& p, std::int64_t bytes_per_head) {
  const std::int64_t tokens = chunk_tokens(p), blocks = ceil_div(p.max_seqlen_k, p.block_size);
  const std::int64_t chunks = ceil_div(p.max_seqlen_q, tokens);
  if (chunks * std::min(tokens * p.top_k, blocks) < 2 * blocks) return 0;
  return std::min(p.num_kv_heads, (std::int64_t{1} << 26) / std::max<std::int64_t>(1, bytes_per_head));
}

SelectedPacks selected_packs(const NsaProblem& p, const SelectedBuffers& b, Carver& memory) {
  const bool backward = p.operation == NsaOperation::selected_backward;
  const std::int64_t key_t = b.blocks * round_up(p.head_dim, 4) * b.block_pitch;
  const std::int64_t value_t = backward ? b.blocks * round_up(p.head_dim_v, 4) * b.block_pitch : 0;
  const std::int64_t key = backward ? b.blocks * p.block_size * b.key_pitch : 0;
  const std::int64_t value = backward ? 0 : b.blocks * p.block_size * b.value_pitch;
  SelectedPacks packs;
  packs.heads = heads_packed(p, 4 * (key_t + value_t + key + value));
  const auto take = [&](std::int64_t floats) {
    return floats == 0 ? nullptr : memory.take<float>(packs.heads * floats);
  };
  packs.key_t = take(key_t);
  packs.value_t = take(value_t);
  packs.key = take(key);
  packs.value = take(value);
  return packs;
}

SelectedBuffers selected_buffers(const NsaProblem& p, Carver& memory) {
  SelectedBuffers b;
  b.key_rows = p.total_k;
  b.blocks = p.packed ? p.total_k / p.block_size + p.batch : p.batch * ceil_div(p.max_seqlen_k, p.block_size);
  b.key_pitch = round_up(p.head_dim, 16);
  b.value_pitch = round_up(p.head_dim_v, 16);
  b.block_pitch = round_up(p.block_size, 16);
  b.packs = selected_packs(p, b, memory);
  if (p.operation == NsaOperation::selected_forward) return b;
  b.segments = backward_segments(p);
  const std::int64_t copies = b.segments * p.num_kv_heads;
  b.grad_key = memory.take<float>(copies * b.key_rows * b.key_pitch);
  b.grad_value = memory.take<float>(copies * b.key_rows * b.value_pitch);
  b.touched = memory.take<std::uint8_t>(copies * b.blocks);
  return b;
}

// Of the sequence among the blocks of all sequences.
std::int64_t block_begin(const NsaProblem& p, const NsaSequence& s, std::int64_t batch) {
  return p.packed ? s.k_begin / p.block_size + batch : batch * ceil_div(p.max_seqlen_k, p.block_size);
}

// Calls body(first_head, last_head) for the key heads whose blocks are packed together, all where none are.
template <class Body>
void for_packed_heads(const NsaKernelTable& k, const NsaProblem& p, const NsaArguments& args,
                      SelectedBuffers& buffers, const Body& body) {
  if (buffers.packs.heads == 0) return body(std::int64_t{0}, p.num_kv_heads);
  std::vector<SelectedItem> blocks;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const NsaSequence s = nsa_sequence(p, args, b);
    for (std::int64_t begin = 0; begin < s.tokens; begin += p.block_size)
      blocks.push_back({s, 0, begin, std::min(s.tokens, begin + p.block_size), 0, block_begin(p, s, b)});
  }
  const std::size_t staging =
      static_cast<std::size_t>(kSkipTileRows * std::max(buffers.key_pitch, buffers.value_pitch)) *
      sizeof(float);
  for (std::int64_t head = 0; head < p.num_kv_heads; head += buffers.packs.heads) {
    buffers.packs.first_head = head;
    for_items(blocks, staging, [&](const SelectedItem& item, void* scratch) {
      k.selected_pack(p, args, buffers, item, scratch);
    });
    body(head, std::min(p.num_kv_heads, head + buffers.packs.heads));
  }
}

// Lists and kernel memory of one thread for one chunk.
struct ChunkMemory {
  std::size_t lists;
  std::size_t kernel;

  ChunkMemory(const NsaKernelTable& k, const NsaProblem& p, std::int64_t tokens)
      : lists((lists_bytes(p, tokens) + 63) / 64 * 64), kernel(k.selected_scratch(p, tokens)) {}
  std::size_t total() const { return lists + kernel; }
};

template <class Kernel>
void run_chunk(const NsaProblem& p, const NsaArguments& args, const SelectedItem& item,
               const ChunkMemory& sizes, const Kernel& kernel) {
  char* memory = static_cast<char*>(thread_scratch(sizes.total()));
  const SelectedLists lists =
      build_lists(p, args, item.sequence, item.kv_head, item.row_begin, item.row_end, memory);
  kernel(item, lists, memory + sizes.lists);
}

void run_selected_forward(const NsaKernelTable& k, const NsaProblem& p, const NsaArguments& args,
                          Workspace workspace) {
  Carver memory(workspace.data);
  SelectedBuffers buffers = selected_buffers(p, memory);
  // Smaller chunks where the largest would leave threads without work: the bits of a row do not depend on them.
  const std::int64_t share =
      ceil_div(p.total_q * p.num_kv_heads, 4 * static_cast<std::int64_t>(num_threads()));
  const std::int64_t largest = chunk_tokens(p);
  const std::int64_t tokens =
      p.chunk_tokens > 0 ? largest : std::min(largest, std::max<std::int64_t>(64, share));
  const ChunkMemory sizes(k, p, tokens);
  for_packed_heads(k, p, args, buffers, [&](std::int64_t first_head, std::int64_t last_head) {
    std::vector<SelectedItem> items;
    for (std::int64_t b = 0; b < p.batch; ++b) {
      const NsaSequence s = nsa_sequence(p, args, b);
      for (std::int64_t begin = 0; begin < s.rows; begin += tokens)
        for (std::int64_t head = first_head; head < last_head; ++head)
          items.push_back({s, head, begin, std::min(s.rows, begin + tokens), 0, block_begin(p, s, b)});
    }
    parallel_for(static_cast<std::int64_t>(items.size()), [&](std::int64_t i) {
      run_chunk(p, args, items[static_cast<std::size_t>(i)], sizes,
                [&](const SelectedItem& item, const SelectedLists& lists, void* scratch) {
                  k.selected_forward(p, args, buffers, item, lists, scratch);
                });
    });
  });
  if (!p.packed) return;
  const std::int64_t used = end_of_rows(p, args);
  zero_rows(args.out, 0, used, p.total_q, p.num_heads, p.head_dim_v);
  if (!args.lse.present()) return;
  for (std::int64_t row = used; row < p.total_q; ++row)
    for (std::int64_t head = 0; head < p.num_heads; ++head)
      *reinterpret_cast<float*>(element(args.lse, 0, row, head)) = -std::numeric_limits<float>::infinity();
}

void run_selected_backward(const NsaKernelTable& k, const NsaProblem& p, const NsaArguments& args,
                           Workspace workspace) {
  Carver memory(workspace.data);
  SelectedBuffers buffers = selected_buffers(p, memory);
  std::fill_n(buffers.touched, buffers.segments * p.num_kv_heads * buffers.blocks, std::uint8_t{0});
  const std::int64_t tokens = chunk_tokens(p);
  const ChunkMemory sizes(k, p, tokens);
  for_packed_heads(k, p, args, buffers, [&](std::int64_t first_head, std::int64_t last_head) {
    std::vector<SelectedItem> segments;
    for (std::int64_t b = 0; b < p.batch; ++b) {
      const NsaSequence s = nsa_sequence(p, args, b);
      const std::int64_t per_segment = ceil_div(ceil_div(s.rows, tokens), buffers.segments) * tokens;
      for (std::int64_t segment = 0; segment * per_segment < s.rows; ++segment)
        for (std::int64_t head = first_head; head < last_head; ++head)
          segments.push_back({s, head, segment * per_segment, std::min(s.rows, (segment + 1) * per_segment),
                              segment, block_begin(p, s, b)});
    }
    std::stable_sort(segments.begin(), segments.end(), [](const SelectedItem& x, const SelectedItem& y) {
      return x.row_end - x.row_begin > y.row_end - y.row_begin;
    });
    // A call of one key head has four segments at 32k tokens; threads share them by chunks, of which a segment has many.
    std::vector<std::int64_t> chunks;
    for (const SelectedItem& segment : segments)
      chunks.push_back(ceil_div(segment.row_end - segment.row_begin, tokens));
    parallel_chains(chunks, [&](std::size_t segment, std::int64_t step) {
      SelectedItem chunk = segments[segment];
      chunk.row_begin += step * tokens;
      chunk.row_end = std::min(chunk.row_end, chunk.row_begin + tokens);
      run_chunk(p, args, chunk, sizes,
                [&](const SelectedItem& item, const SelectedLists& lists, void* scratch) {
                  k.selected_backward(p, args, buffers, item, lists, scratch);
                });
    });
  });
  std::vector<SelectedItem> blocks;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const NsaSequence s = nsa_sequence(p, args, b);
    for (std::int64_t begin = 0; begin < s.keys; begin += p.block_size)
      for (std::int64_t head = 0; head < p.num_kv_heads; ++head)
        blocks.push_back({s, head, begin, std::min(s.keys, begin + p.block_size), 0, block_begin(p, s, b)});
  }
  for_items(
      blocks, static_cast<std::size_t>(std::max(buffers.key_pitch, buffers.value_pitch)) * sizeof(float),
      [&](const SelectedItem& item, void* scratch) { k.selected_finish(p, args, buffers, item, scratch); });
  if (!p.packed) return;
  zero_rows(args.grad_query, 0, end_of_rows(p, args), p.total_q, p.num_heads, p.head_dim);
  zero_rows(args.grad_key, 0, end_of_keys(p, args), p.total_k, p.num_kv_heads, p.head_dim);
  zero_rows(args.grad_value, 0, end_of_keys(p, args), p.total_k, p.num_kv_heads, p.head_dim_v);
}

// ---------------------------------------------------------------------------------------------- combine

void run_combine(const NsaKernelTable& k, const NsaProblem& p, const NsaArguments& args) {
  std::vector<RowsItem> items;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    NsaSequence s;
    s.batch = b;
    for (std::int64_t begin = 0; begin < p.max_seqlen_q; begin += kCombineRows)
      items.push_back({s, 0, begin, std::min(p.max_seqlen_q, begin + kCombineRows)});
  }
  const auto phase = p.operation == NsaOperation::combine ? k.combine : k.combine_backward;
  for_items(items, k.combine_scratch(p),
            [&](const RowsItem& item, void* scratch) { phase(p, args, item, scratch); });
}

const char* name_of(NsaOperation operation) {
  switch (operation) {
    case NsaOperation::compress:
      return "compress";
    case NsaOperation::compress_backward:
      return "compress_backward";
    case NsaOperation::select_blocks:
      return "select_blocks";
    case NsaOperation::selected_forward:
      return "selected_forward";
    case NsaOperation::selected_backward:
      return "selected_backward";
    case NsaOperation::combine:
      return "combine";
    case NsaOperation::combine_backward:
      break;
  }
  return "combine_backward";
}

bool is_selected(NsaOperation operation) {
  return operation == NsaOperation::selected_forward || operation == NsaOperation::selected_backward;
}

void prefer_huge_outputs(const NsaProblem& p, const NsaArguments& args) {
  const std::int64_t batches = p.packed ? 1 : p.batch;
  const std::int64_t rows = p.packed ? p.total_q : p.max_seqlen_q;
  const bool compresses = p.operation == NsaOperation::compress_backward;  // grad_key: of x
  const std::int64_t keys = compresses ? rows : p.packed ? p.total_k : p.max_seqlen_k;
  prefer_huge_pages(args.grad_query, batches, rows, p.num_heads, p.head_dim);
  prefer_huge_pages(args.grad_key, batches, keys, p.num_kv_heads, p.head_dim);
  prefer_huge_pages(args.grad_value, batches, keys, p.num_kv_heads, p.head_dim_v);
  for (const Operand& o : args.grad_branches) prefer_huge_pages(o, batches, rows, p.num_heads, p.head_dim_v);
  if (p.operation == NsaOperation::selected_forward || p.operation == NsaOperation::combine)
    prefer_huge_pages(args.out, batches, rows, p.num_heads, p.head_dim_v);
}

}  // namespace

std::string nsa_kernel_name(const NsaProblem& p, const char* target) {
  std::string name = std::string("nsa_") + name_of(p.operation) + "_" + target + "_" + fsa::name_of(p.dtype) +
                     "_d" + std::to_string(p.head_dim);
  if (is_selected(p.operation))
    name += p.algorithm == nsa::Algorithm::query_outer ? "_query_outer"
                                                       : "_kv_outer_chunk" + std::to_string(chunk_tokens(p));
  return name;
}

void fill_unused_blocks(const NsaProblem& p, const NsaArguments& args) {
  if (!p.packed) return;
  for (std::int64_t head = 0; head < p.num_kv_heads; ++head)
    for (std::int64_t row = end_of_rows(p, args); row < p.total_q; ++row)
      for (std::int64_t slot = 0; slot < p.top_k; ++slot) args.selected_blocks.at(0, head, row, slot) = -1;
}

std::size_t nsa_workspace_bytes(const NsaProblem& p) {
  Carver memory(nullptr);
  if (p.operation == NsaOperation::compress || p.operation == NsaOperation::compress_backward)
    compress_buffers(p, memory);
  if (is_selected(p.operation)) selected_buffers(p, memory);
  return memory.used();
}

void run_nsa(const NsaKernelTable& k, const NsaProblem& p, const NsaArguments& args, Workspace workspace) {
  prefer_huge_pages(workspace.data, workspace.bytes);
  prefer_huge_outputs(p, args);
  switch (p.operation) {
    case NsaOperation::compress:
    case NsaOperation::compress_backward:
      return run_compress(k, p, args, workspace);
    case NsaOperation::select_blocks:
      return run_select_blocks(k, p, args);
    case NsaOperation::selected_forward:
      return run_selected_forward(k, p, args, workspace);
    case NsaOperation::selected_backward:
      return run_selected_backward(k, p, args, workspace);
    case NsaOperation::combine:
    case NsaOperation::combine_backward:
      return run_combine(k, p, args);
  }
}

}  // namespace fsa::cpu
