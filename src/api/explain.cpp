// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>

#include "api/choice.h"
#include "api/prepare.h"
#include "api/visibility_of.h"
#include "core/block_mask.h"
#include "core/skip_tile.h"

namespace fsa {
namespace {

// Visible (row, key) pairs of one key head's mask. Every row of an unmasked sequence sees all of its keys;
// otherwise a row sees at most three ranges, which "key tiles" of one key spell out exactly.
double visible_pairs(const Visibility& v, std::int64_t seqlen_q) {
  if (v.unlimited) return static_cast<double>(seqlen_q) * static_cast<double>(v.seqlen_k);
  double pairs = 0;
  for (std::int64_t row = 0; row < seqlen_q; ++row) {
    const TileRanges keys = visible_key_tiles(v, row, row + 1, 1);
    for (int i = 0; i < keys.count; ++i)
      pairs += static_cast<double>(keys.range[i].end - keys.range[i].begin);
  }
  return pairs;
}

// Keys [begin, end), all in one partial block, that the row sees there.
std::int64_t keys_in_partial(const HeadBlocks& blocks, std::int32_t block, std::int64_t row,
                             std::int64_t begin, std::int64_t end) {
  std::int64_t keys = 0;
  for (std::int64_t word = begin / 32 * 32; word < end; word += 32) {
    std::uint32_t bits = blocks.word(block, row, word);
    if (word < begin) bits &= ~std::uint32_t{0} << (begin - word);
    if (word + 32 > end) bits &= ~std::uint32_t{0} >> (word + 32 - end);
    keys += std::popcount(bits);
  }
  return keys;
}

// The same of one query head with a block mask.
double visible_pairs(const Visibility& v, const HeadBlocks& blocks, std::int64_t seqlen_q) {
  double pairs = 0;
  for (std::int64_t row = 0; row < seqlen_q; ++row) {
    const TileRanges keys = visible_key_tiles(v, row, row + 1, 1);
    for (int i = 0; i < keys.count; ++i)
      for (std::int64_t begin = keys.range[i].begin, end; begin < keys.range[i].end; begin = end) {
        end = std::min(keys.range[i].end, (begin / blocks.block_keys() + 1) * blocks.block_keys());
        const std::int32_t block = blocks.code(row, begin);
        if (block == kHiddenBlock) continue;
        pairs += static_cast<double>(block == kFullBlock ? end - begin
                                                         : keys_in_partial(blocks, block, row, begin, end));
      }
  }
  return pairs;
}

std::int64_t gathered_keys(const Problem& problem, const Arguments& args, std::int64_t batch) {
  std::int64_t keys = 0;
  for (std::int64_t i = 0; i < problem.gather_size; ++i) keys += args.gather_kv_indices.at(batch, i) >= 0;
  return keys;
}

// Lengths and lists in device memory are not read: then sequences count as equally long, window_sizes as
// causal, and a block mask as none.
Sequence mean_sequence(const Problem& problem) {
  const std::int64_t batch = std::max<std::int64_t>(1, problem.batch);
  Sequence s;
  s.seqlen_q = problem.packed_q ? problem.total_q / batch : problem.max_seqlen_q;
  s.seqlen_k = problem.packed_k ? problem.total_k / batch : problem.max_seqlen_k;
  s.offset = s.seqlen_k - s.seqlen_q;
  return s;
}

struct Work {
  double pairs = 0;  // visible (row, key) pairs, over all query heads
  double rows = 0;   // rows and keys in use, over all sequences
  double keys = 0;
};

Work measure(Problem problem, const Arguments& args) {
  Work work;
  const bool readable = problem.device.kind == DeviceKind::cpu;
  if (problem.has_window_sizes && !readable) {
    problem.has_window_sizes = false;
    problem.causal = true;
  }
  const std::int64_t masks = problem.has_window_sizes ? problem.num_kv_heads : 1;  // different ones
  const double heads_per_mask = static_cast<double>(problem.num_heads) / static_cast<double>(masks);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const Sequence s = readable ? sequence(problem, args, b) : mean_sequence(problem);
    work.rows += static_cast<double>(s.seqlen_q);
    if (problem.gathered && readable) {
      const auto keys = static_cast<double>(gathered_keys(problem, args, b));
      work.keys += keys;
      work.pairs += keys * static_cast<double>(problem.num_heads);
      continue;
    }
    work.keys += static_cast<double>(s.seqlen_k);
    if (problem.has_block_mask && readable) {
      for (std::int64_t head = 0; head < problem.num_heads; ++head)
        work.pairs += visible_pairs(visibility_of(problem, args, s, head / problem.group_size),
                                    HeadBlocks(problem, args, b, head), s.seqlen_q);
      continue;
    }
    for (std::int64_t mask = 0; mask < masks; ++mask)
      work.pairs += heads_per_mask * visible_pairs(visibility_of(problem, args, s, mask), s.seqlen_q);
  }
  return work;
}

double bytes_of(DType dtype) { return static_cast<double>(size_of(dtype)); }

// Inputs count with the rows in use, outputs with all of theirs: unused rows are written too.
double count_bytes(const Call& call, const Work& work) {
  const Problem& p = call.problem;
  const Arguments& a = call.arguments;
  const double element = bytes_of(p.dtype);
  const double heads = static_cast<double>(p.num_heads), kv_heads = static_cast<double>(p.num_kv_heads);
  const double dims = static_cast<double>(p.head_dim), dims_v = static_cast<double>(p.head_dim_v);
  const double all_rows = static_cast<double>(p.total_q), all_keys = static_cast<double>(p.total_k);
  const double lse_element = p.dtype == DType::float64 ? 8 : 4;

  double bytes = (work.rows * heads * dims + work.keys * kv_heads * (dims + dims_v)) * element;
  bytes += work.rows * heads * bytes_of(a.alpha.dtype) + work.keys * kv_heads * bytes_of(a.delta.dtype);
  if (p.operation == Operation::backward) {
    bytes += work.rows * heads * (2 * dims_v * element + lse_element * (p.has_grad_lse ? 2 : 1));
    bytes += (all_rows * heads * dims + all_keys * kv_heads * (dims + dims_v)) * element;
    bytes +=
        all_rows * heads * bytes_of(a.grad_alpha.dtype) + all_keys * kv_heads * bytes_of(a.grad_delta.dtype);
  } else {
    bytes += all_rows * heads * dims_v * element + (a.lse.present() ? all_rows * heads * lse_element : 0);
  }
  if (a.skip_map.present) {
    const Shape map = skip_map_shape(p);
    double words = 1;
    for (int axis = 0; axis < map.rank; ++axis) words *= static_cast<double>(map.extent[axis]);
    bytes += 4 * words;
  }
  return bytes;
}

template <class Args>
Explanation explanation_of(const Args& args) {
  const Call call = prepare(args, Purpose::shapes);
  const Problem& problem = call.problem;
  const Backend& backend = choose_backend(problem, args.options.backend);
  const Work work = measure(problem, call.arguments);
  const double per_pair = 2 * static_cast<double>(problem.head_dim + problem.head_dim_v);
  Explanation explanation;
  explanation.backend = backend.name();
  explanation.kernel = backend.kernel(problem);
  explanation.reasons = explain_choice(problem, backend);
  explanation.tile_rows = kSkipTileRows;
  explanation.tile_keys = skip_tile_keys(problem.head_dim);
  explanation.flops = work.pairs * per_pair * (problem.operation == Operation::backward ? 2.5 : 1);
  explanation.bytes = count_bytes(call, work);
  explanation.workspace_bytes = backend.workspace_bytes(problem);
  explanation.threads = num_threads();
  return explanation;
}

}  // namespace

Explanation explain(const ForwardArgs& args) { return explanation_of(args); }
Explanation explain(const BackwardArgs& args) { return explanation_of(args); }
Explanation explain(const DecodeArgs& args) { return explanation_of(args); }

}  // namespace fsa
