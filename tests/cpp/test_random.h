// SPDX-License-Identifier: Apache-2.0
// What tests on random problems share: seeds, choices, tolerances. One seed is one problem; a failure names it,
// FSA_TEST_SEED=<seed> runs it alone.
#pragma once

#include <cstdlib>

#include "test_util.h"

namespace fsa::test {

inline DType any_dtype(Random& random) {
  static constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};
  return kTypes[random.below(3)];
}

inline double tolerance(DType dtype) {
  return dtype == DType::float64   ? 1e-12
         : dtype == DType::float32 ? 3e-5
         : dtype == DType::float16 ? 4e-3
                                   : 3e-2;
}

inline std::int64_t any_of(Random& random, std::initializer_list<std::int64_t> values) {
  return values.begin()[random.below(static_cast<std::int64_t>(values.size()))];
}

// Elementwise |a - b| <= tolerance * (1 + largest |b|), with infinities and NaN in the same places.
inline void expect_close(const Buffer& a, const Buffer& b, double tolerance, const char* name,
                         std::uint64_t seed) {
  double largest = 0;
  for (std::int64_t i = 0; i < b.numel(); ++i)
    if (std::isfinite(b.get(i))) largest = std::max(largest, std::abs(b.get(i)));
  EXPECT_LE(max_difference(a, b), tolerance * (1 + largest)) << name << ", seed " << seed;
}

// Under the address sanitizer, which takes five times as long, every fourth draw.
inline std::vector<std::uint64_t> seeds(std::uint64_t first, std::uint64_t count) {
#ifdef __SANITIZE_ADDRESS__
  constexpr std::uint64_t kStep = 4;
#else
  constexpr std::uint64_t kStep = 1;
#endif
  if (const char* alone = std::getenv("FSA_TEST_SEED")) return {std::strtoull(alone, nullptr, 10)};
  std::vector<std::uint64_t> list;
  for (std::uint64_t i = 0; i < count; i += kStep) list.push_back(first + i);
  return list;
}

}  // namespace fsa::test
