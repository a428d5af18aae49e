// SPDX-License-Identifier: Apache-2.0
// Joining the outputs of attention over disjoint sets of keys:
//   lse = log(sum_p exp(lse_p)),  out = sum_p exp(lse_p - lse) out_p
#pragma once

#include "core/problem.h"

namespace fsa {

// Computes in float64 for float64 outputs, otherwise in float32. A part with lse -inf contributes nothing,
// whatever its out holds; when all are -inf, out is 0 and lse -inf. Parts with lse +inf share the row evenly;
// a NaN lse makes the row NaN.
void merge_states(const MergeProblem& problem);

}  // namespace fsa
