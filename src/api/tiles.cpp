// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "api/prepare.h"
#include "api/visibility_of.h"
#include "core/skip_tile.h"

namespace fsa {
namespace {

// One sequence and key head: its mask decides which tiles are visible to all query heads of the group.
TileCounts count_group(const Problem& problem, const SkipMap& map, const Sequence& s, const Visibility& v,
                       std::int64_t kv_head) {
  const std::int64_t tile_keys = skip_tile_keys(problem.head_dim);
  const std::int64_t head_begin = kv_head * problem.group_size, head_end = head_begin + problem.group_size;
  TileCounts counts;
  for (std::int64_t row = 0; row < s.seqlen_q; row += kSkipTileRows) {
    const std::int64_t row_end = std::min(row + kSkipTileRows, s.seqlen_q);
    const std::int32_t* words =
        map.data + s.batch * map.stride_batch + (s.row_tile_begin + row / kSkipTileRows) * map.stride_tile;
    const TileRanges ranges = visible_key_tiles(v, row, row_end, tile_keys);
    for (int i = 0; i < ranges.count; ++i)
      for (std::int64_t tile = ranges.range[i].begin; tile < ranges.range[i].end; ++tile) {
        const std::int64_t key = tile * tile_keys, key_end = std::min(key + tile_keys, s.seqlen_k);
        if (classify_tile(v, row, row_end, key, key_end) == TileVisibility::none) continue;
        counts.visible += problem.group_size;
        for (std::int64_t head = head_begin; head < head_end; ++head) {
          const auto word = static_cast<std::uint32_t>(words[head * map.stride_head + (tile >> 5)]);
          counts.kept += word >> (tile & 31) & 1;
        }
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
    for (std::int64_t kv_head = 0; kv_head < problem.num_kv_heads; ++kv_head) {
      const Visibility v = visibility_of(problem, call.arguments, s, kv_head);
      const TileCounts group = count_group(problem, call.arguments.skip_map, s, v, kv_head);
      counts.kept += group.kept;
      counts.visible += group.visible;
    }
  }
  return counts;
}

}  // namespace fsa
