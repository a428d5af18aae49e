// SPDX-License-Identifier: Apache-2.0
// The unit of every skip decision, the same on every backend (docs/semantics.md, "The skip tile").
#pragma once

#include <cstdint>

namespace fsa {

inline constexpr std::int64_t kSkipTileRows = 64;

constexpr std::int64_t skip_tile_keys(std::int64_t head_dim) { return head_dim <= 128 ? 128 : 64; }

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace fsa
