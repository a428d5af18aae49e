// SPDX-License-Identifier: Apache-2.0
// Which row tiles the GPU backward visits for each key tile, and in which order their sums are added, against
// masks written out one element at a time.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "common/split_columns.cuh"
#include "policy/row_tiles.cuh"

namespace fsa::test {
namespace {

using namespace fsa::kernels;

constexpr int32 kBlockN = 128;
constexpr int32 kGroup = 2;

struct Shape {
  int32 seqlen_q, seqlen_k;
};

struct Visit {
  int32 head, row_tile, key_tile;
  bool masked;
  RowTileInfo info;
};

// Parts of a column, one walked after the other, are the column.
template <class Rows>
void expect_parts(const BackwardParams& params, const KeyWork& work, const std::vector<Visit>& column) {
  const int32 length = static_cast<int32>(column.size());
  int32 counted = 0;
  if constexpr (Rows::kReadsLengths)
    counted = Rows::length(params, work);
  else
    for (int32 lane = 0; lane < 32; ++lane) counted += Rows::count(params, work, lane);
  EXPECT_GE(counted, length);
  EXPECT_LE(counted, length + 3 * kGroup) << "of a last block of 256 rows three row tiles may be missing";
  for (const int32 part : {1, 3, 7, 40}) {
    for (int32 first = 0; first < length; first += part) {
      typename Rows::Walk walk;
      walk.start(params, work);
      walk.skip(params, work, first);
      RowTileInfo info;
      for (int32 i = first; i < std::min(first + part, length); ++i) {
        ASSERT_TRUE(walk.next(params, work, info)) << i << " of " << length;
        EXPECT_EQ(info.head, column[i].head) << i;
        EXPECT_EQ(info.tile, column[i].row_tile) << i;
        EXPECT_EQ(info.flags, column[i].info.flags) << i;
        EXPECT_EQ(info.block, column[i].info.block) << i;
        EXPECT_EQ(info.block_row, column[i].info.block_row) << i;
      }
    }
  }
  typename Rows::Walk walk;
  walk.start(params, work);
  walk.skip(params, work, length);
  RowTileInfo info;
  EXPECT_FALSE(walk.next(params, work, info));
}

// Of one sequence and one key head: every unit of work, walked to its end.
template <class Rows>
std::vector<Visit> walk(const BackwardParams& params, Shape shape) {
  std::vector<Visit> visits;
  for (int32 n = 0; n * kBlockN < shape.seqlen_k; ++n) {
    KeyWork work = {};
    work.seqlen_q = work.rows = shape.seqlen_q;
    work.seqlen_k = work.keys = shape.seqlen_k;
    work.n_begin = n * kBlockN;
    const std::size_t before = visits.size();
    Rows::describe(params, work);
    typename Rows::Walk walk;
    walk.start(params, work);
    for (RowTileInfo info; work.num_segments > 0 && walk.next(params, work, info);) {
      EXPECT_LE(work.num_segments, kMaxSegments);
      info.list_rank = -1;
      if constexpr (requires { Rows::rank(params, work, info); }) {
        RowTileInfo ranked = info;
        typename Rows::Walk again;  // rank may come from the walk itself
        again.start(params, work);
        for (RowTileInfo other; again.next(params, work, other);)
          if (other.tile == info.tile && other.head == info.head) ranked = other;
        info.list_rank = Rows::rank(params, work, ranked);
      }
      visits.push_back({info.head, info.tile, n, info.masked(), info});
    }
    if constexpr (Rows::kSplits)
      if (work.num_segments > 0)
        expect_parts<Rows>(params, work,
                           {visits.begin() + static_cast<std::ptrdiff_t>(before), visits.end()});
  }
  return visits;
}

// Of the turns that key tiles take.
enum class Turns : std::uint8_t { none, from_last, from_first };

// `sees(head, row, key)`; `wanted(head, row tile, key tile)`: which of the visible tiles are kept.
template <int32 kBlockM, class Sees, class Wanted>
void expect_visits(const std::vector<Visit>& visits, Shape shape, Sees sees, Wanted wanted, Turns turns) {
  std::map<std::array<int32, 3>, int> count;
  for (const Visit& v : visits) {
    const std::array<int32, 3> place = {v.head, v.row_tile, v.key_tile};
    EXPECT_EQ(++count[place], 1) << "visited twice";
    bool some = false, all = true;
    for (int32 row = v.row_tile * kBlockM; row < std::min((v.row_tile + 1) * kBlockM, shape.seqlen_q); ++row)
      for (int32 key = v.key_tile * kBlockN; key < (v.key_tile + 1) * kBlockN; ++key) {
        const bool seen = key < shape.seqlen_k && sees(v.head, row, key);
        some = some || seen;
        all = all && seen;
      }
    EXPECT_TRUE(some && wanted(v.head, v.row_tile, v.key_tile)) << v.row_tile << " x " << v.key_tile;
    EXPECT_TRUE(v.masked || all) << v.row_tile << " x " << v.key_tile << " needs its mask";
  }
  const int32 row_tiles = (shape.seqlen_q + kBlockM - 1) / kBlockM;
  const int32 key_tiles = (shape.seqlen_k + kBlockN - 1) / kBlockN;
  for (int32 head = 0; head < kGroup; ++head)
    for (int32 m = 0; m < row_tiles; ++m)
      for (int32 n = 0; n < key_tiles; ++n) {
        bool some = false;
        for (int32 row = m * kBlockM; row < std::min((m + 1) * kBlockM, shape.seqlen_q) && !some; ++row)
          for (int32 key = n * kBlockN; key < std::min((n + 1) * kBlockN, shape.seqlen_k) && !some; ++key)
            some = sees(head, row, key);
        EXPECT_EQ((count.count({head, m, n}) > 0), some && wanted(head, m, n)) << m << " x " << n;
      }
  if (turns == Turns::none) return;
  for (int32 head = 0; head < kGroup; ++head)
    for (int32 m = 0; m < row_tiles; ++m) {
      int32 turn = 0;
      for (int32 i = 0; i < key_tiles; ++i) {
        const int32 n = turns == Turns::from_first ? i : key_tiles - 1 - i;
        for (const Visit& v : visits)
          if (v.head == head && v.row_tile == m && v.key_tile == n) {
            EXPECT_EQ(v.info.list_rank, turn) << m << " x " << n;
            ++turn;
          }
      }
    }
}

const auto kAll = [](int32, int32, int32) { return true; };
const Shape kShapes[] = {{1, 1},     {64, 128},  {65, 129}, {300, 500}, {500, 300},
                         {700, 900}, {900, 700}, {0, 300},  {300, 0},   {1300, 1300}};

BackwardParams params_with_group() {
  BackwardParams params = {};
  params.forward.group_size = kGroup;
  params.forward.num_heads = kGroup;
  params.ascending_from = 1;  // the unit of a test is the one at place 0
  return params;
}

template <bool kLeft, bool kRight, int32 kBlockM>
void check_window(int32 left, int32 right) {
  BackwardParams params = params_with_group();
  params.forward.window_left = kLeft ? left : kOpenWindow;
  params.forward.window_right = kRight ? right : kOpenWindow;
  for (const Shape shape : kShapes) {
    SCOPED_TRACE(testing::Message() << shape.seqlen_q << " x " << shape.seqlen_k << ", window " << left
                                    << ", " << right);
    const auto sees = [&](int32, int32 row, int32 key) {
      const int32 diagonal = row + shape.seqlen_k - shape.seqlen_q;
      return (!kLeft || key >= diagonal - left) && (!kRight || key <= diagonal + right);
    };
    for (const Turns turns : {Turns::from_last, Turns::from_first}) {
      params.ascending_from = turns == Turns::from_first ? 0 : 1;
      expect_visits<kBlockM>(walk<RangeRows<WindowMask<kLeft, kRight>, kBlockM, kBlockN>>(params, shape),
                             shape, sees, kAll, turns);
    }
  }
}

TEST(BackwardTiles, Windows) {
  check_window<false, false, 64>(0, 0);
  check_window<false, false, 128>(0, 0);
  for (const int32 right : {0, 30, 200}) {
    check_window<false, true, 64>(0, right);
    check_window<false, true, 128>(0, right);
    for (const int32 left : {0, 100, 333}) check_window<true, true, 64>(left, right);
  }
  check_window<true, false, 64>(100, 0);
}

TEST(BackwardTiles, Bands) {
  const std::array<int32, 4> cases[] = {{0, 0, 0, 100},  {70, 200, 130, 64}, {128, 0, 50, 1},
                                        {0, 150, 0, 33}, {5, 300, 600, 0},   {0, 64, 300, 64},
                                        {256, 1, 1, 1},  {0, 0, 0, 0}};
  for (const auto& sizes : cases)
    for (const Shape shape : kShapes) {
      SCOPED_TRACE(testing::Message() << shape.seqlen_q << " x " << shape.seqlen_k << ", sink " << sizes[0]
                                      << ", near " << sizes[3]);
      BackwardParams params = params_with_group();
      params.forward.window_sizes = sizes.data();
      params.forward.window_sizes_stride = 4;
      const auto [sink, left, right, near] = sizes;
      const auto sees = [&](int32, int32 row, int32 key) {
        const int32 distance = row + shape.seqlen_k - shape.seqlen_q - key;
        return distance >= 0 && (distance < near ||
                                 (distance >= near + right && distance < near + right + left) || key < sink);
      };
      expect_visits<64>(walk<BandRows<64, kBlockN>>(params, shape), shape, sees, kAll, Turns::none);
    }
}

TEST(BackwardTiles, SkipMaps) {
  std::mt19937 random(1);
  for (const Shape shape : {Shape{700, 900}, Shape{2300, 300}, Shape{300, 4500}, Shape{2100, 4300}}) {
    SCOPED_TRACE(testing::Message() << shape.seqlen_q << " x " << shape.seqlen_k);
    const int32 row_tiles = (shape.seqlen_q + 63) / 64, key_tiles = (shape.seqlen_k + kBlockN - 1) / kBlockN;
    const int32 row_words = (row_tiles + 31) / 32, key_words = (key_tiles + 31) / 32;
    const auto sees = [&](int32, int32 row, int32 key) {
      return key <= row + shape.seqlen_k - shape.seqlen_q;
    };
    std::vector<int32> rows(kGroup * row_tiles * key_words), columns(kGroup * key_tiles * row_words);
    std::map<std::array<int32, 3>, bool> kept;
    for (int32 head = 0; head < kGroup; ++head)
      for (int32 m = 0; m < row_tiles; ++m)
        for (int32 n = 0; n < key_tiles; ++n) {
          const int32 last_row = std::min(m * 64 + 63, shape.seqlen_q - 1);
          if (!sees(head, last_row, n * kBlockN) || random() % 3 != 0) continue;
          kept[{head, m, n}] = true;
          rows[(head * row_tiles + m) * key_words + n / 32] |= static_cast<int32>(1u << n % 32);
          columns[(head * key_tiles + n) * row_words + m / 32] |= static_cast<int32>(1u << m % 32);
        }
    BackwardParams params = params_with_group();
    params.forward.window_right = 0;
    params.forward.gate_bits = {rows.data(), 0, row_tiles * key_words, key_words};
    params.column_bits = {columns.data(), 0, key_tiles * row_words, row_words};
    const auto wanted = [&](int32 head, int32 m, int32 n) { return kept.count({head, m, n}) > 0; };
    using Visible = RangeRows<WindowMask<false, true>, 64, kBlockN>;
    expect_visits<64>(walk<BitmapRows<Visible, kBlockN>>(params, shape), shape, sees, wanted,
                      Turns::from_last);
  }
}

TEST(BackwardTiles, BlockMasks) {
  std::mt19937 random(2);
  for (const auto& [block_rows, block_keys] : {std::pair{128, 128}, {64, 256}, {256, 384}})
    for (const Shape shape : {Shape{700, 900}, Shape{130, 2000}, Shape{1, 1}}) {
      SCOPED_TRACE(testing::Message() << shape.seqlen_q << " x " << shape.seqlen_k << " in blocks of "
                                      << block_rows << " x " << block_keys);
      const int32 row_blocks = (shape.seqlen_q + block_rows - 1) / block_rows;
      const int32 key_blocks = (shape.seqlen_k + block_keys - 1) / block_keys;
      // 0: absent, 1: full, 2: partial, whose elements are all visible here.
      std::map<std::array<int32, 3>, int32> kinds;
      std::vector<int32> counts(kGroup * key_blocks);
      std::vector<ColumnEntry> entries(kGroup * key_blocks * row_blocks);
      for (int32 head = 0; head < kGroup; ++head)
        for (int32 r = 0; r < row_blocks; ++r)
          for (int32 c = 0; c < key_blocks; ++c) kinds[{head, r, c}] = static_cast<int32>(random() % 3);
      for (int32 head = 0; head < kGroup; ++head)
        for (int32 c = 0; c < key_blocks; ++c)
          for (int32 r = 0; r < row_blocks; ++r) {
            const int32 kind = kinds[{head, r, c}];
            if (kind == 0) continue;
            int32 tiles = 0;
            for (int32 other = c + 1; other < key_blocks; ++other)
              if (kinds[{head, r, other}] != 0)
                tiles += (std::min(block_keys, shape.seqlen_k - other * block_keys) + kBlockN - 1) / kBlockN;
            int32& count = counts[head * key_blocks + c];
            entries[(head * key_blocks + c) * row_blocks + count++] = {r, kind == 1 ? -1 : 7, tiles, 0};
          }
      BackwardParams params = params_with_group();
      params.forward.blocks.block_rows = block_rows;
      params.forward.blocks.block_keys = block_keys;
      params.list_count = counts.data();
      params.list_entries = entries.data();
      params.list_stride_head = key_blocks;
      params.list_capacity = row_blocks;
      const auto sees = [&, rows = block_rows, keys = block_keys](int32 head, int32 row, int32 key) {
        return kinds[{head, row / rows, key / keys}] != 0;
      };
      const auto visits = walk<ListRows<64, kBlockN>>(params, shape);
      expect_visits<64>(visits, shape, sees, kAll, Turns::from_last);
      for (const Visit& v : visits) {
        const int32 kind = kinds[{v.head, v.row_tile * 64 / block_rows, v.key_tile * kBlockN / block_keys}];
        EXPECT_EQ(v.info.block, kind == 1 ? -1 : 7);
        EXPECT_EQ(v.info.block_row, v.row_tile * 64 % block_rows);
        EXPECT_TRUE(v.masked || kind != 2);
      }
    }
}

// A thread of quad position q finds the values of its columns of 16 rows at 4 q to 4 q + 3.
TEST(BackwardTiles, RowVectorsFollowTheFragment) {
  for (int32 thread = 0; thread < 4; ++thread)
    for (int32 i = 0; i < 64; ++i) {
      const int32 row = fragment_column(thread, i);
      EXPECT_EQ(row_vector_position(row), i / 8 * 16 + thread * 4 + i % 8 / 4 * 2 + i % 2)
          << thread << ", " << i;
    }
}

template <bool kDeterministicTurns>
struct OfColumns {
  static constexpr bool kDeterministic = kDeterministicTurns;
  using Schedule = KeySchedule<kBlockN, kDeterministic, true>;
};

// The units of work that columns of these lengths are laid out as; -1: there is no key tile.
struct Layout {
  std::vector<ColumnPart> units;
  std::vector<SplitColumn> split;
  std::vector<int32> sums_done;  // of each head
  int32 part;                    // L
};

template <bool kDeterministic>
Layout lay_out(std::vector<int32> lengths, int32 heads) {
  constexpr int32 kSlots = 512;
  PartCounts counts = {-1, -1, -1, -1};
  Layout made = {std::vector<ColumnPart>(lengths.size() + kSlots), std::vector<SplitColumn>(kSlots),
                 std::vector<int32>(heads, -1), kLeastPart};
  BackwardParams params = {};
  params.forward.batch = params.forward.group_size = 1;
  params.forward.num_heads = heads;
  params.forward.max_seqlen_k = static_cast<int32>(lengths.size()) / heads * kBlockN;
  params.key_heads_per_wave = 2;
  params.ascending_from = static_cast<int32>(lengths.size());
  params.column_lengths = lengths.data();
  params.column_parts = made.units.data();
  params.split_columns = made.split.data();
  params.sums_done = made.sums_done.data();
  params.part_counts = &counts;
  params.most_slots = kSlots;
  params.least_part = kLeastPart;
  emulator::launch({1, 1, 1}, kSplitThreads, [&] {
    lay_out_parts<OfColumns<kDeterministic>>(params, [&](int32 i) { return lengths[i]; });
  });
  int64 row_tiles = 0;
  for (const int32 length : lengths) row_tiles += std::max(length, 0);
  made.part = std::max<int32>(kLeastPart, static_cast<int32>((row_tiles + kSlots - 1) / kSlots));
  EXPECT_LE(counts.slots, kSlots);
  made.units.resize(counts.parts);
  made.split.resize(counts.slots);
  return made;
}

// Every row tile of every column belongs to one unit; parts of a column have slots one behind the other.
template <bool kDeterministic>
void expect_all_columns(const std::vector<int32>& lengths, const Layout& made, int32 heads) {
  std::vector<int32> covered(lengths.size(), 0), parts(lengths.size(), 0), done(heads, 0);
  for (std::size_t i = 0; i < made.units.size(); ++i) {
    const ColumnPart& unit = made.units[i];
    const int32 length = lengths[unit.key_tile];
    ASSERT_GE(length, 0) << "no key tile";
    EXPECT_EQ(unit.skip, covered[unit.key_tile]) << "parts in their order";
    const bool last = unit.count == kRestOfColumn;
    covered[unit.key_tile] += last ? length - unit.skip : unit.count;
    const int32 part = parts[unit.key_tile]++;
    EXPECT_EQ(unit.slot >= 0, length >= 2 * made.part) << length;
    if (unit.slot >= 0) {
      EXPECT_EQ(made.split[unit.slot].key_tile, unit.key_tile);
      EXPECT_EQ(made.split[unit.slot].parts, part == 0 ? length / made.part : 0);
      if (part > 0) {
        EXPECT_EQ(unit.slot, made.units[i - 1].slot + 1);
      }
    }
  }
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    EXPECT_EQ(covered[i], std::max(lengths[i], 0)) << "column " << i;
    EXPECT_EQ(parts[i] > 0, lengths[i] >= 0) << "column " << i;
    BackwardParams params = {};
    params.forward.batch = params.forward.group_size = 1;
    params.forward.num_heads = heads;
    params.forward.max_seqlen_k = static_cast<int32>(lengths.size()) / heads * kBlockN;
    params.key_heads_per_wave = 2;
    params.ascending_from = static_cast<int32>(lengths.size());
    const auto place = OfColumns<kDeterministic>::Schedule::place_of(params, static_cast<int32>(i));
    if (parts[i] > 1) done[place.batch_head] += (1 - parts[i]) * kBackwardConsumers;
  }
  EXPECT_EQ(made.sums_done, done) << "cut columns count once";
}

int32 length_of(const ColumnPart& unit, const std::vector<int32>& lengths) {
  return unit.count == kRestOfColumn ? lengths[unit.key_tile] - unit.skip : unit.count;
}

TEST(BackwardTiles, UnitsOfColumns) {
  std::mt19937 draw(0);
  for (const int32 heads : {1, 4, 40})  // 40: more columns than are kept in shared memory
    for (const int32 longest : {0, 6, 60, 900}) {
      if (heads == 40 && longest != 60) continue;
      SCOPED_TRACE(testing::Message() << heads << " heads, columns of up to " << longest);
      std::vector<int32> lengths(static_cast<std::size_t>(heads) * 128);
      for (int32& length : lengths) {
        length = static_cast<int32>(draw() % 8) == 0 ? -1 : static_cast<int32>(draw() % (longest + 1));
        if (longest == 60 && draw() % 40 == 0) length = 2000;
      }
      const Layout made = lay_out<false>(lengths, heads);
      expect_all_columns<false>(lengths, made, heads);
      // Long ones, by quarters of L; then short ones as they lie; then the last 512, by 128ths of L.
      std::size_t at = 0;
      const auto is_long = [&](const ColumnPart& unit) {
        return length_of(unit, lengths) * 4 / made.part >= 2;
      };
      int32 before = 7;
      for (; at < made.units.size() && is_long(made.units[at]); ++at) {
        if (made.units[at].skip > 0) continue;  // parts of a column stay together
        const int32 parts = lengths[made.units[at].key_tile] >= 2 * made.part
                                ? lengths[made.units[at].key_tile] / made.part
                                : 1;
        const int32 quarters = std::min(7, lengths[made.units[at].key_tile] / parts * 4 / made.part);
        EXPECT_LE(quarters, before) << at;
        before = quarters;
      }
      const std::size_t sorted_from =
          std::max(at, made.units.size() - std::min<std::size_t>(made.units.size(), kSortedLast));
      for (std::size_t i = at; i < made.units.size(); ++i) {
        EXPECT_FALSE(is_long(made.units[i])) << i;
        if (i == at || i == sorted_from) continue;
        if (i < sorted_from)
          EXPECT_LT(made.units[i - 1].key_tile, made.units[i].key_tile) << i;
        else
          EXPECT_GE(length_of(made.units[i - 1], lengths) * 128 / made.part,
                    length_of(made.units[i], lengths) * 128 / made.part)
              << i;
      }

      const Layout in_turn = lay_out<true>(lengths, heads);
      expect_all_columns<true>(lengths, in_turn, heads);
      for (std::size_t i = 1; i < in_turn.units.size(); ++i)
        EXPECT_LE(in_turn.units[i - 1].key_tile, in_turn.units[i].key_tile) << "turns want their order";
    }
}

}  // namespace
}  // namespace fsa::test
