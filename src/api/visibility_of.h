// SPDX-License-Identifier: Apache-2.0
// The masks of one sequence and key head, read from a checked call.
#pragma once

#include "core/problem.h"
#include "core/visibility.h"

namespace fsa {

inline Visibility visibility_of(const Problem& problem, const Arguments& args, const Sequence& s,
                                std::int64_t kv_head) {
  std::int64_t sizes[4] = {};
  if (problem.has_window_sizes)
    for (int column = 0; column < 4; ++column) sizes[column] = args.window_sizes.at(kv_head, column);
  return make_visibility(problem, s, sizes);
}

}  // namespace fsa
