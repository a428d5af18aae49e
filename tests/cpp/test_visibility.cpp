// SPDX-License-Identifier: Apache-2.0
// core/visibility.h against the mask written out as in docs/semantics.md, one element at a time.
#include <optional>
#include <set>

#include "core/visibility.h"
#include "test_util.h"

namespace fsa::test {
namespace {

struct Mask {
  std::int64_t seqlen_q, seqlen_k;
  bool causal = false;
  std::int64_t window_left = -1, window_right = -1;
  std::optional<std::array<std::int64_t, 4>> window_sizes = {};  // sink, left, right, near
  std::int64_t compress_block = 0, compress_stride = 1;  // then seqlen_q tokens, seqlen_k windows of them

  Visibility visibility() const {
    Problem problem;
    problem.causal = causal;
    problem.window_left = window_left;
    problem.window_right = window_right;
    problem.has_window_sizes = window_sizes.has_value();
    problem.compress_block = compress_block;
    problem.compress_stride = compress_stride;
    Sequence sequence;
    sequence.seqlen_q = seqlen_q;
    sequence.seqlen_k = seqlen_k;
    sequence.offset = compress_block > 0 ? 0 : seqlen_k - seqlen_q;
    return make_visibility(problem, sequence, window_sizes ? window_sizes->data() : nullptr);
  }

  bool sees(std::int64_t row, std::int64_t key) const {
    if (key < 0 || key >= seqlen_k) return false;
    if (compress_block > 0) return key * compress_stride + compress_block <= row + 1;
    const std::int64_t position = row + seqlen_k - seqlen_q;
    if (window_sizes) {
      const auto [sink, left, right, near] = *window_sizes;
      const std::int64_t distance = position - key;
      return distance >= 0 &&
             (distance < near || (distance >= near + right && distance < near + right + left) || key < sink);
    }
    return (!causal || key <= position) && (window_left < 0 || key >= position - window_left) &&
           (window_right < 0 || key <= position + window_right);
  }

  friend std::ostream& operator<<(std::ostream& stream, const Mask& m) {
    stream << "seqlen " << m.seqlen_q << "x" << m.seqlen_k << " causal " << m.causal << " window ("
           << m.window_left << ", " << m.window_right << ") compression " << m.compress_block << "/"
           << m.compress_stride;
    if (m.window_sizes)
      for (std::int64_t size : *m.window_sizes) stream << " " << size;
    return stream;
  }
};

Mask random_mask(Random& random) {
  Mask mask{random.below(24), random.below(24)};
  switch (random.below(5)) {
    case 0:
      mask.causal = true;
      break;
    case 1:
      mask.causal = random.below(2) == 0;
      mask.window_left = random.below(14) - 1;
      mask.window_right = random.below(14) - 1;
      break;
    case 2:
      mask.window_sizes = {random.below(6), random.below(6), random.below(6), random.below(6)};
      break;
    case 3:
      mask.causal = true;
      mask.compress_stride = 1 + random.below(5);
      mask.compress_block = mask.compress_stride * (1 + random.below(3));
      mask.seqlen_q = random.below(60);
      mask.seqlen_k = compressed_length(mask.seqlen_q, mask.compress_block, mask.compress_stride);
      break;
    default:
      break;
  }
  return mask;
}

std::set<std::int64_t> tiles_of(const TileRanges& ranges) {
  std::set<std::int64_t> tiles;
  std::int64_t previous_end = -1;
  for (int i = 0; i < ranges.count; ++i) {
    EXPECT_GT(ranges.range[i].begin, previous_end) << "ranges touch or are out of order";
    EXPECT_LT(ranges.range[i].begin, ranges.range[i].end);
    previous_end = ranges.range[i].end;
    for (std::int64_t tile = ranges.range[i].begin; tile < ranges.range[i].end; ++tile) tiles.insert(tile);
  }
  return tiles;
}

struct TileFacts {
  bool any = false, all = true;
};

TileFacts look(const Mask& mask, std::int64_t row, std::int64_t row_end, std::int64_t key,
               std::int64_t key_end) {
  TileFacts facts;
  for (std::int64_t i = row; i < row_end; ++i)
    for (std::int64_t j = key; j < key_end; ++j) {
      facts.any = facts.any || mask.sees(i, j);
      facts.all = facts.all && mask.sees(i, j);
    }
  return facts;
}

TEST(Visibility, ElementsFollowTheMask) {
  Random random(11);
  for (int trial = 0; trial < 400; ++trial) {
    const Mask mask = random_mask(random);
    const Visibility v = mask.visibility();
    bool every = true;
    for (std::int64_t row = 0; row < mask.seqlen_q; ++row)
      for (std::int64_t key = -2; key < mask.seqlen_k + 2; ++key) {
        ASSERT_EQ(is_visible(v, row, key), mask.sees(row, key)) << mask << " row " << row << " key " << key;
        if (key >= 0 && key < mask.seqlen_k) every = every && mask.sees(row, key);
      }
    if (v.unlimited) {
      ASSERT_TRUE(every) << mask;
    }
  }
}

TEST(Visibility, TilesAreClassifiedByTheirElements) {
  Random random(12);
  for (int trial = 0; trial < 400; ++trial) {
    const Mask mask = random_mask(random);
    const Visibility v = mask.visibility();
    const std::int64_t tile_rows = 1 + random.below(5), tile_keys = 1 + random.below(5);
    for (std::int64_t row = 0; row < mask.seqlen_q; row += tile_rows)
      for (std::int64_t key = 0; key < mask.seqlen_k; key += tile_keys) {
        const std::int64_t row_end = std::min(row + tile_rows, mask.seqlen_q);
        const std::int64_t key_end = std::min(key + tile_keys, mask.seqlen_k);
        const TileFacts facts = look(mask, row, row_end, key, key_end);
        const TileVisibility tile = classify_tile(v, row, row_end, key, key_end);
        ASSERT_EQ(tile == TileVisibility::none, !facts.any) << mask << " tile at " << row << ", " << key;
        if (tile == TileVisibility::full) {
          ASSERT_TRUE(facts.all) << mask << " tile at " << row << ", " << key;
        } else if (!mask.window_sizes) {
          ASSERT_FALSE(facts.all) << mask << " tile at " << row << ", " << key;  // one band: exact
        }
      }
  }
}

TEST(Visibility, KeyTileRangesHoldEveryVisibleTile) {
  Random random(13);
  for (int trial = 0; trial < 400; ++trial) {
    const Mask mask = random_mask(random);
    const Visibility v = mask.visibility();
    const std::int64_t tile_rows = 1 + random.below(5), tile_keys = 1 + random.below(5);
    for (std::int64_t row = 0; row < mask.seqlen_q; row += tile_rows) {
      const std::int64_t row_end = std::min(row + tile_rows, mask.seqlen_q);
      const std::set<std::int64_t> listed = tiles_of(visible_key_tiles(v, row, row_end, tile_keys));
      for (std::int64_t key = 0; key < mask.seqlen_k; key += tile_keys) {
        const bool any = look(mask, row, row_end, key, std::min(key + tile_keys, mask.seqlen_k)).any;
        if (any) {
          ASSERT_TRUE(listed.contains(key / tile_keys)) << mask << " rows from " << row << " key " << key;
        }
        if (tile_rows == 1 && tile_keys == 1) {
          ASSERT_EQ(listed.contains(key), any) << mask << " row " << row << " key " << key;
        }
      }
      ASSERT_TRUE(listed.empty() || *listed.rbegin() * tile_keys < mask.seqlen_k) << mask;
    }
  }
}

TEST(Visibility, RowTileRangesHoldEveryVisibleTile) {
  Random random(14);
  for (int trial = 0; trial < 400; ++trial) {
    const Mask mask = random_mask(random);
    const Visibility v = mask.visibility();
    const std::int64_t tile_rows = 1 + random.below(5), tile_keys = 1 + random.below(5);
    for (std::int64_t key = 0; key < mask.seqlen_k; key += tile_keys) {
      const std::int64_t key_end = std::min(key + tile_keys, mask.seqlen_k);
      const std::set<std::int64_t> listed =
          tiles_of(visible_row_tiles(v, mask.seqlen_q, key, key_end, tile_rows));
      for (std::int64_t row = 0; row < mask.seqlen_q; row += tile_rows)
        if (look(mask, row, std::min(row + tile_rows, mask.seqlen_q), key, key_end).any) {
          ASSERT_TRUE(listed.contains(row / tile_rows)) << mask << " keys from " << key << " row " << row;
        }
    }
  }
}

TEST(Visibility, RangesOfOneWindowAreTight) {
  const Mask mask{.seqlen_q = 1000, .seqlen_k = 1000, .causal = true, .window_left = 99};
  const Visibility v = mask.visibility();
  const std::set<std::int64_t> listed = tiles_of(visible_key_tiles(v, 512, 576, 128));
  EXPECT_EQ(listed, (std::set<std::int64_t>{3, 4}));
  EXPECT_EQ(tiles_of(visible_row_tiles(v, 1000, 384, 512, 64)), (std::set<std::int64_t>{6, 7, 8, 9}));
}

TEST(Visibility, EmptyTilesSeeNothing) {
  const Visibility v = Mask{4, 4}.visibility();
  EXPECT_EQ(classify_tile(v, 2, 2, 0, 4), TileVisibility::none);
  EXPECT_EQ(classify_tile(v, 0, 4, 3, 3), TileVisibility::none);
  EXPECT_EQ(visible_key_tiles(v, 3, 3, 2).count, 0);
  EXPECT_EQ(visible_row_tiles(v, 4, 1, 1, 2).count, 0);
}

}  // namespace
}  // namespace fsa::test
