// SPDX-License-Identifier: Apache-2.0
// A partial tile in squares of 16 rows and 16 keys. The float products leave out the squares in which no row sees a key:
// six of sixteen under a diagonal or at the edge of a window, where a row tile of window 512 has two such edges in nine.
// What is left out is exactly 0, so the results keep their bits.
#pragma once

#include "backend/cpu/simd/gemm-inl.h"
#include "backend/cpu/simd/scores-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

struct Span {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  HWY_INLINE std::int64_t count() const { return end - begin; }
  HWY_INLINE bool operator==(const Span& o) const { return begin == o.begin && end == o.end; }
};

inline constexpr std::int64_t kSquare = 16;
inline constexpr std::int64_t kPanelRows = kPanel * kLanes;  // of the product's fastest blocks

class SeenSquares {
 public:
  // Of the keys [first, first + keys) of a tile; all of them where `partial` is null.
  HWY_INLINE SeenSquares(const PartialTile* partial, std::int64_t first, std::int64_t keys,
                         std::int64_t lanes)
      : key_count_(keys), lanes_(lanes) {
    const Span all_keys{0, keys}, all_rows{0, lanes};
    for (Span& of_rows : keys_) of_rows = partial == nullptr ? all_keys : Span{};
    std::int64_t seen = 0;  // keys, summed over the sixteens of rows
    for (std::int64_t n = 0; n * kSquare < keys; ++n) {
      rows_[n] = all_rows;
      if (partial == nullptr) continue;
      std::uint64_t rows = 0;
      const std::int64_t end = min_of(keys, (n + 1) * kSquare);
      for (std::int64_t j = n * kSquare; j < end; ++j) rows |= partial->rows_of_key[first + j];
      rows_[n] = rows == 0 ? Span{} : span_of(rows);
      for (std::int64_t m = 0; m * kSquare < lanes; ++m) {
        if ((rows >> (m * kSquare) & 0xffff) == 0) continue;
        if (keys_[m].count() == 0) keys_[m].begin = n * kSquare;
        seen += end - max_of(keys_[m].end, n * kSquare);
        keys_[m].end = end;
      }
    }
    // Panels of one vector take 1.4 times as long per row as those of four.
    if (partial != nullptr && kPanelRows > kSquare && 4 * seen * kSquare > 3 * keys * lanes)
      for (Span& of_rows : keys_) of_rows = all_keys;
  }

  // body(keys, rows): the rows that see a key of these, neighbours alike together. Every key is in one of the calls.
  template <class Body>
  HWY_INLINE void by_keys(const Body& body) const {
    each(rows_, key_count_, body);
  }
  // body(rows, keys)
  template <class Body>
  HWY_INLINE void by_rows(const Body& body) const {
    each(keys_, lanes_, body);
  }

 private:
  HWY_INLINE Span span_of(std::uint64_t rows) const {
    Span span{__builtin_ctzll(rows) / kSquare * kSquare, round_up(64 - __builtin_clzll(rows), kSquare)};
    if (2 * span.count() > kPanelRows)
      span = {span.begin / kPanelRows * kPanelRows, round_up(span.end, kPanelRows)};
    return {span.begin, min_of(span.end, lanes_)};
  }
  template <class Body>
  static HWY_INLINE void each(const Span* spans, std::int64_t count, const Body& body) {
    for (std::int64_t begin = 0; begin < count;) {
      const Span& span = spans[begin / kSquare];
      std::int64_t end = begin + kSquare;
      while (end < count && spans[end / kSquare] == span) end += kSquare;
      end = min_of(end, count);
      body(Span{begin, end}, span);
      begin = end;
    }
  }

  std::int64_t key_count_, lanes_;
  Span rows_[kMostTileKeys / kSquare];
  Span keys_[kRows / kSquare];
};

}  // namespace fsa::cpu::FSA_SIMD_TARGET
