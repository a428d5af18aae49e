// SPDX-License-Identifier: Apache-2.0
// Which kernels compute a problem, and why none does. Pure: no driver, no GPU.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "backend/cuda/kernel_config.h"
#include "core/problem.h"

namespace fsa::cuda {

// Why no forward kernel computes the problem; empty when one does. As Backend::reject.
std::string reject_forward(const Problem& problem);

// The following are for problems that are not rejected.

KernelConfig forward_kernel(const Problem& problem);
KernelConfig gate_prepare_kernel(const Problem& problem);
KernelConfig gate_bitmap_kernel(const Problem& problem);
KernelConfig copy_rows_kernel();
KernelConfig clear_counters_kernel();

// Parts of a workspace as byte offsets; kAbsent for what the problem does not need. These serve its inputs.
struct InputCopies {
  static constexpr std::size_t kAbsent = ~std::size_t{0};

  std::size_t counters = kAbsent;  // of the scheduler
  // Tensors that the copy engine cannot read: contiguous, with head_dim rounded up to a multiple of 8.
  std::size_t query = kAbsent, key = kAbsent, value = kAbsent;
  // Tables with gaps between their entries.
  std::size_t cu_seqlens_q = kAbsent, cu_seqlens_k = kAbsent, seqused_q = kAbsent, seqused_k = kAbsent;
  std::size_t window_sizes = kAbsent;
};

struct ForwardWorkspace : InputCopies {
  std::size_t out = kAbsent;        // of which the copy engine cannot write the real one
  std::size_t no_blocks = kAbsent;  // a zero: the length of every list of partial blocks, when there are none
  std::size_t gate_delta = kAbsent, gate_extremes = kAbsent, gate_terms = kAbsent, gate_bits = kAbsent;
  std::size_t bytes = 0;
};
ForwardWorkspace forward_workspace(const Problem& problem);

// Key tiles per key head that the gate's arrays hold, over all sequences when packed.
std::int64_t gate_tiles(const Problem& problem);

// Kernels that are compiled by CI and by `fsa-kernels prefill` without a pattern.
std::vector<KernelConfig> shipped_kernels();

// Every kernel that a problem can lead to: features of the shipped ones in any combination.
std::vector<KernelConfig> reachable_kernels();

}  // namespace fsa::cuda
