// SPDX-License-Identifier: Apache-2.0
// What the choice of forward kernels and that of backward kernels share.
#pragma once

#include "backend/cuda/dispatch.h"
#include "core/skip_tile.h"

namespace fsa::cuda {

inline constexpr std::int64_t kCounterBytes = 64;  // two counters, in a cache line of their own

// Cuts a workspace into parts.
class Carver {
 public:
  std::size_t take(std::int64_t bytes) {
    const std::size_t begin = used_;
    used_ += static_cast<std::size_t>((bytes + 63) / 64 * 64);
    return begin;
  }
  // For a tensor of 2-byte elements whose rows are padded to 16 bytes.
  std::size_t take_copy(std::int64_t rows, std::int64_t heads, std::int64_t dim) {
    return take(rows * heads * ceil_div(dim, 8) * 16);
  }
  std::size_t used() const { return used_; }

 private:
  std::size_t used_ = 0;
};

void set_mask(const Problem& problem, KernelConfig& config);
void take_inputs(const Problem& problem, Carver& carver, InputCopies& copies);

// Words of a map over the skip tiles of a call.
std::int64_t map_words(const Problem& problem);

}  // namespace fsa::cuda
