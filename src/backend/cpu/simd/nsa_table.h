// SPDX-License-Identifier: Apache-2.0
// What one instruction set's copy of the NSA kernels offers, as kernel_table.h: work items for any thread, any order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cpu/selected_lists.h"
#include "backend/cpu/simd/kernel_table.h"
#include "core/nsa_problem.h"

namespace fsa::cpu {

// ---- compression ----

// Windows [begin, end) of one sequence and key head; of grad_x, groups of compress_stride tokens instead.
struct CompressItem {
  NsaSequence sequence;
  std::int64_t kv_head = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// Per key head, in float; what a call does not need is null.
struct CompressBuffers {
  float* weight =
      nullptr;  // linear: [l * head_dim, pitch], pitch = head_dim in whole vectors of 16; weighted: [l]
  float* weight_t = nullptr;  // linear backward: l / s slices [head_dim, s * head_dim], each transposed
  float* bias = nullptr;      // [pitch]: what intra_block_pe adds to every window
  float* grad_sum = nullptr;  // backward: [pitch], grad_out summed over all windows
};

// Windows per item: enough rows to fill the register blocks of the product, not more than a second-level cache.
inline std::int64_t windows_per_item(const NsaProblem& p) {
  const std::int64_t fit = (std::int64_t{1} << 18) / (p.compress_stride * p.head_dim);
  return fit < 1 ? 1 : fit > 64 ? 64 : fit;
}

// ---- selected branch ----

// Rows [row_begin, row_end) of one sequence and key head, all heads of the group.
struct SelectedItem {
  NsaSequence sequence;
  std::int64_t kv_head = 0;
  std::int64_t row_begin = 0;
  std::int64_t row_end = 0;
  std::int64_t segment = 0;      // backward: whose dK and dV the item adds to
  std::int64_t block_begin = 0;  // of the sequence among the blocks of all sequences
};

// Keys and values as the products read them, packed once for all chunks: some key heads at a time. Of a block K^T and V,
// in the backward K^T, V^T and K.
struct SelectedPacks {
  std::int64_t heads = 0;  // at a time; 0: every chunk packs what it reads
  std::int64_t first_head = 0;
  float* key_t = nullptr;    // [heads, blocks, head_dim, keys], scaled
  float* value_t = nullptr;  // [heads, blocks, head_dim_v, keys]
  float* key = nullptr;      // [heads, blocks, keys, key_pitch]
  float* value = nullptr;    // [heads, blocks, keys, value_pitch]
};

// dK and dV of backward: one copy per segment of the rows, so that no two items add to the same.
struct SelectedBuffers {
  SelectedPacks packs;
  std::int64_t segments = 1;
  std::int64_t key_rows = 0;   // of all sequences
  std::int64_t blocks = 0;     // of all sequences
  std::int64_t key_pitch = 0;  // floats per row: head_dim and head_dim_v in whole cache lines
  std::int64_t value_pitch = 0;
  std::int64_t block_pitch = 0;     // floats per row of K^T and V^T
  float* grad_key = nullptr;        // [segments, num_kv_heads, key_rows, key_pitch], unscaled
  float* grad_value = nullptr;      // [segments, num_kv_heads, key_rows, value_pitch]
  std::uint8_t* touched = nullptr;  // [segments, num_kv_heads, blocks]: the two above were written
};

// ---- rows ----

struct RowsItem {  // combine: rows of one batch entry; select_blocks: of one sequence and key head
  NsaSequence sequence;
  std::int64_t kv_head = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

inline constexpr std::int64_t kCombineRows = 64;  // of an item of combine, at most

struct NsaKernelTable {
  void (*compress_prepare)(const NsaProblem&, const NsaArguments&, const CompressBuffers&,
                           std::int64_t kv_head, void* scratch);
  std::size_t (*compress_scratch)(const NsaProblem&);
  void (*compress)(const NsaProblem&, const NsaArguments&, const CompressBuffers&, const CompressItem&,
                   void* scratch);
  void (*compress_grad_x)(const NsaProblem&, const NsaArguments&, const CompressBuffers&, const CompressItem&,
                          void* scratch);
  // A position of the window and the one a stride on, all windows of all sequences of a key head: grad_weight and grad_pe.
  void (*compress_grad_weight)(const NsaProblem&, const NsaArguments&, const CompressBuffers&,
                               std::int64_t kv_head, std::int64_t first_position, void* scratch);

  std::size_t (*select_scratch)(const NsaProblem&);
  void (*select_blocks)(const NsaProblem&, const NsaArguments&, const RowsItem&, void* scratch);

  // The compressed branch and the selection in one: items of whole groups, `units` row tiles at most.
  std::size_t (*select_forward_scratch)(const Problem&, const NsaProblem&, std::int64_t units);
  void (*select_forward)(const Problem&, const Arguments&, const NsaProblem&, const NsaArguments&,
                         const ForwardItem&, void* scratch);

  std::size_t (*selected_scratch)(const NsaProblem&, std::int64_t chunk_tokens);
  // The keys row_begin to row_end of one block, of all heads of the packs.
  void (*selected_pack)(const NsaProblem&, const NsaArguments&, const SelectedBuffers&, const SelectedItem&,
                        void* scratch);
  void (*selected_forward)(const NsaProblem&, const NsaArguments&, const SelectedBuffers&,
                           const SelectedItem&, const SelectedLists&, void* scratch);
  void (*selected_backward)(const NsaProblem&, const NsaArguments&, const SelectedBuffers&,
                            const SelectedItem&, const SelectedLists&, void* scratch);
  // Rows of a key block: dk and dv, the segments added in order. row_begin and row_end are keys here.
  void (*selected_finish)(const NsaProblem&, const NsaArguments&, const SelectedBuffers&, const SelectedItem&,
                          void* scratch);

  std::size_t (*combine_scratch)(const NsaProblem&);
  void (*combine)(const NsaProblem&, const NsaArguments&, const RowsItem&, void* scratch);
  void (*combine_backward)(const NsaProblem&, const NsaArguments&, const RowsItem&, void* scratch);
};

const NsaKernelTable& sse4_nsa_kernels();
const NsaKernelTable& avx2_nsa_kernels();
const NsaKernelTable& avx512_nsa_kernels();
const NsaKernelTable& neon_nsa_kernels();
const NsaKernelTable& generic_nsa_kernels();

}  // namespace fsa::cpu
