// SPDX-License-Identifier: Apache-2.0
// The rules of native sparse attention, one small function each, in float64. docs/native_sparse.md says them in
// words; every other backend is tested against these. Nothing here knows of tensors, threads or tiles.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/cpu/reference_policies.h"

namespace fsa::reference {

// ---- Windows of tokens and blocks of tokens ----

struct Windows {
  std::int64_t block = 1;   // tokens of a window
  std::int64_t stride = 1;  // distance of two windows; divides block

  std::int64_t begin(std::int64_t window) const { return window * stride; }
  std::int64_t last_token(std::int64_t window) const { return window * stride + block - 1; }
};

// A row sees a window from its last token on.
inline bool is_window_visible(const Windows& windows, std::int64_t token, std::int64_t window) {
  return token >= windows.last_token(window);
}

inline std::int64_t block_of(std::int64_t token, std::int64_t block_size) { return token / block_size; }

// How many of a window's strides lie in a block of tokens: the weight of its probability in the block's score.
inline std::int64_t common_strides(const Windows& windows, std::int64_t window, std::int64_t block,
                                   std::int64_t block_size) {
  const std::int64_t first = std::max(windows.begin(window), block * block_size);
  const std::int64_t end = std::min(windows.begin(window) + windows.block, (block + 1) * block_size);
  return end <= first ? 0 : (end - first) / windows.stride;
}

// ---- Selection ----

struct SelectionRule {
  std::int64_t top_k = 1;
  std::int64_t init_blocks = 0;
  std::int64_t local_blocks = 0;

  // Blocks that are taken whatever their score. `own` is the row's own block; later ones are no candidates.
  bool is_forced(std::int64_t block, std::int64_t own) const {
    return block < init_blocks || block > own - local_blocks;
  }
};

// Whether block a goes before block b. NaN goes behind everything, the lowest index first among equals.
inline bool goes_before(const SelectionRule& rule, std::span<const double> scores, std::int64_t own,
                        std::int64_t a, std::int64_t b) {
  const bool forced_a = rule.is_forced(a, own), forced_b = rule.is_forced(b, own);
  if (forced_a != forced_b) return forced_a;
  if (!forced_a) {
    const bool nan_a = std::isnan(scores[a]), nan_b = std::isnan(scores[b]);
    if (nan_a != nan_b) return nan_b;
    if (!nan_a && scores[a] != scores[b]) return scores[a] > scores[b];
  }
  return a < b;
}

// The min(top_k, own + 1) best of the blocks 0 ... own, ascending. scores has own + 1 entries.
inline std::vector<std::int64_t> best_blocks(const SelectionRule& rule, std::span<const double> scores) {
  const auto candidates = static_cast<std::int64_t>(scores.size()), own = candidates - 1;
  std::vector<std::int64_t> blocks;
  for (std::int64_t block = 0; block < candidates; ++block) blocks.push_back(block);
  std::sort(blocks.begin(), blocks.end(),
            [&](std::int64_t a, std::int64_t b) { return goes_before(rule, scores, own, a, b); });
  blocks.resize(std::min(rule.top_k, candidates));
  std::sort(blocks.begin(), blocks.end());
  return blocks;
}

// ---- Selected attention ----

// What a row of selected_blocks means: the set of its blocks that do not lie in the row's future.
inline std::vector<std::int64_t> set_of_blocks(std::span<const std::int64_t> entries, std::int64_t own) {
  std::vector<std::int64_t> blocks;
  for (std::int64_t block : entries)
    if (block >= 0 && block <= own) blocks.push_back(block);
  std::sort(blocks.begin(), blocks.end());
  blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
  return blocks;
}

// The keys of those blocks up to the row's own token.
inline std::vector<std::int64_t> keys_of_blocks(std::span<const std::int64_t> blocks, std::int64_t block_size,
                                                std::int64_t token) {
  std::vector<std::int64_t> keys;
  for (std::int64_t block : blocks)
    for (std::int64_t key = block * block_size; key < (block + 1) * block_size && key <= token; ++key)
      keys.push_back(key);
  return keys;
}

}  // namespace fsa::reference
