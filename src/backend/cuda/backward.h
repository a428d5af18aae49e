// SPDX-License-Identifier: Apache-2.0
// The launches of one backward call.
#pragma once

#include "core/problem.h"
#include "fsa/tensor.h"

namespace fsa::cuda {

// For a problem that is not rejected. Enqueues on args.stream and returns; allocates nothing, waits for nothing,
// reads no device memory.
void run_backward(const Problem& problem, const Arguments& args, Workspace workspace);

// Loads, and compiles where needed, the kernels that run_backward would launch.
void prefill_backward(const Problem& problem, const Arguments& args);

}  // namespace fsa::cuda
