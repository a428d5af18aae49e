// SPDX-License-Identifier: Apache-2.0
// Which kernels compute a backward problem, and why none does. Pure: no driver, no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "backend/cuda/dispatch.h"

namespace fsa::cuda {

// Why no backward kernel computes the problem; empty when one does. As Backend::reject.
std::string reject_backward(const Problem& problem);

// The following are for problems that are not rejected.

KernelConfig backward_kernel(const Problem& problem);
KernelConfig backward_prepare_kernel(const Problem& problem);
KernelConfig backward_finish_kernel(const Problem& problem);
KernelConfig sum_sink_kernel(const Problem& problem);
KernelConfig transpose_bits_kernel(const Problem& problem);
KernelConfig split_columns_kernel(const Problem& problem);
KernelConfig sum_parts_kernel(const Problem& problem);
KernelConfig block_columns_kernel(const Problem& problem);

// Whether the row tiles come from a bit map: the skip map of the forward, or, where the order of deterministic
// sums asks for one, a map of the visible tiles.
bool walks_bits(const Problem& problem);

// Whether some column, the row tiles of a key tile, may be long enough to be cut in parts, and the mask of a kind whose
// columns differ.
bool splits_columns(const Problem& problem);

// Parts of columns at most; each has a slot for its sums.
std::int64_t most_slots(const Problem& problem);

// (sequence, key head) pairs that walk their key tiles together.
std::int64_t key_heads_per_wave(const Problem& problem);

// How many of the last heads go through their key tiles from the first to the last; the others, where the kernel is
// deterministic, from the last to the first.
std::int64_t ascending_key_heads(const Problem& problem);

// Whether who comes first to a row tile stores its sums of dQ, so that nobody clears them.
bool first_stores(const Problem& problem);

// Whether the sums of dQ are cleared by the main kernel, but for the first wave's.
bool clears_ahead(const Problem& problem);

struct BackwardWorkspace : InputCopies {
  std::size_t out = kAbsent, grad_out = kAbsent;
  // Gradients whose real rows cannot be written in units of 16 bytes.
  std::size_t grad_query = kAbsent, grad_key = kAbsent, grad_value = kAbsent;
  // BackwardParams says what they hold.
  std::size_t row_vectors = kAbsent, grad_query_sum = kAbsent, grad_alpha_sum = kAbsent;
  std::size_t gate_row_terms = kAbsent;
  std::size_t grad_sink_sum = kAbsent, turns = kAbsent, sums_done = kAbsent, clears = kAbsent;
  std::size_t visible_bits = kAbsent, column_bits = kAbsent;
  std::size_t column_parts = kAbsent, split_columns = kAbsent, column_lengths = kAbsent;
  std::size_t part_counts = kAbsent, partial_sums = kAbsent;
  std::size_t no_blocks = kAbsent, list_count = kAbsent, list_entries = kAbsent;
  std::size_t bytes = 0;
};
// float32 dQ in whole row tiles, two to four floats a row, the transposed map or lists, and sums of at most 512 parts of
// long columns (128 KB each at head_dim 128); besides what InputCopies names.
BackwardWorkspace backward_workspace(const Problem& problem);

// Batch entries of the column lists of a block mask.
std::int64_t column_batch(const Problem& problem);

// Words of a line of the transposed map: a bit per row tile of 64 rows.
std::int64_t column_words(const Problem& problem);

// Row tiles of one head: of a batched sequence, or of all packed ones.
std::int64_t backward_row_tiles(const Problem& problem);

// As the forward's.
std::vector<KernelConfig> shipped_backward_kernels();
std::vector<KernelConfig> reachable_backward_kernels();

}  // namespace fsa::cuda
