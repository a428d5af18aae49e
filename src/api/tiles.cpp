// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "api/prepare.h"
#include "api/visibility_of.h"
#include "core/block_mask.h"
#include "core/skip_tile.h"

namespace fsa {
namespace {

// Rows [row, row_end) by keys [key, key_end) of one tile, which some row may see by the bands of `v`.
bool sees_some(const Visibility& v, const HeadBlocks& blocks, std::int64_t row, std::int64_t row_end,
               std::int64_t key, std::int64_t key_end) {
  const TileVisibility seen = classify_tile(v, row, row_end, key, key_end);
  const std::int32_t block = blocks.code(row, key);
  if (seen == TileVisibility::none || block == kHiddenBlock) return false;
  if (block == kFullBlock) return true;
  for (std::int64_t i = row; i < row_end; ++i)
    for (std::int64_t j = key; j < key_end; ++j)
      if (is_visible(v, i, j) && blocks.sees(i, j)) return true;
  return false;
}

// One sequence and query head.
TileCounts count_head(const Problem& problem, const SkipMap& map, const Sequence& s, const Visibility& v,
                      const HeadBlocks& blocks, std::int64_t head) {
  const std::int64_t tile_keys = skip_tile_keys(problem.head_dim);
  TileCounts counts;
  for (std::int64_t row = 0; row < s.seqlen_q; row += kSkipTileRows) {
    const std::int64_t row_end = std::min(row + kSkipTileRows, s.seqlen_q);
    const std::int32_t* words = map.data + s.batch * map.stride_batch + head * map.stride_head +
                                (s.row_tile_begin + row / kSkipTileRows) * map.stride_tile;
    const TileRanges ranges = visible_key_tiles(v, row, row_end, tile_keys);
    for (int i = 0; i < ranges.count; ++i)
      for (std::int64_t tile = ranges.range[i].begin; tile < ranges.range[i].end; ++tile) {
        const std::int64_t key = tile * tile_keys, key_end = std::min(key + tile_keys, s.seqlen_k);
        if (!sees_some(v, blocks, row, row_end, key, key_end)) continue;
        ++counts.visible;
        counts.kept += static_cast<std::uint32_t>(words[tile >> 5]) >> (tile & 31) & 1;
      }
  }
  return counts;
}

}  // namespace

SkipTile skip_tile(std::int64_t head_dim) {
  check_head_dim("head_dim", "value", head_dim);
  return {kSkipTileRows, skip_tile_keys(head_dim)};
}

std::vector<std::int64_t> skip_map_shape(const ForwardArgs& args) {
  const Shape shape = skip_map_shape(prepare(args, Purpose::shapes).problem);
  return {shape.extent, shape.extent + shape.rank};
}

TileCounts count_tiles(const ForwardArgs& args) {
  require("skip_map", args.skip_map);
  check_view("skip_map", args.skip_map);
  check_data("skip_map", args.skip_map);
  const Call call = prepare(args, Purpose::shapes);
  const Problem& problem = call.problem;
  if (problem.device.kind != DeviceKind::cpu)
    fail(ErrorCode::unsupported, "skip_map: on ", to_string(problem.device),
         ", but tiles are counted on the CPU; copy it there");
  TileCounts counts;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const Sequence s = sequence(problem, call.arguments, b);
    for (std::int64_t head = 0; head < problem.num_heads; ++head) {
      const Visibility v = visibility_of(problem, call.arguments, s, head / problem.group_size);
      const HeadBlocks blocks(problem, call.arguments, b, head);
      const TileCounts of_head = count_head(problem, call.arguments.skip_map, s, v, blocks, head);
      counts.kept += of_head.kept;
      counts.visible += of_head.visible;
    }
  }
  return counts;
}

}  // namespace fsa
