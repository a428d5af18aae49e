// SPDX-License-Identifier: Apache-2.0
// One call of the CUDA backend: what forward and backward do alike. Nothing here allocates, synchronises or reads
// device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/dispatch.h"
#include "backend/cuda/loaded_kernels.h"
#include "core/problem.h"
#include "kernels/core/params.h"

namespace fsa::cuda {

inline constexpr std::size_t kAbsent = InputCopies::kAbsent;

// Keys and values of the heads that run at one time, which share the L2 of 50 MB. Row tiles that run together read the
// same keys of ranges: there few waves, which end together, count for more (64 instead of 32 MB: causal 2 % at head_dim
// 128 and 5 % at 256, seqlen 16384). Those of lists do not: there each wave should fit (16 instead of 32 MB: 3 % at a
// density of a twentieth).
inline constexpr std::int64_t kWaveBytes = std::int64_t{64} << 20;
inline constexpr std::int64_t kListedWaveBytes = std::int64_t{16} << 20;

kernels::ScalarOperand scalar_operand(const Operand& operand);

// Whether the skip map is one block of memory, which is what the kernels write and read.
bool is_dense(const Problem& p, const SkipMap& map);

class KernelCall {
 protected:
  struct Grid {
    unsigned x = 1, y = 1, z = 1;
  };
  struct Rows {  // of a tensor: packed ones have one batch entry
    std::int64_t batch, rows;
  };

  KernelCall(const Problem& problem, const Arguments& args, Workspace workspace)
      : p_(problem), args_(args), workspace_(static_cast<char*>(workspace.data)) {}

  Rows q_rows() const { return {p_.packed_q ? 1 : p_.batch, p_.packed_q ? p_.total_q : p_.max_seqlen_q}; }
  Rows k_rows() const { return {p_.packed_k ? 1 : p_.batch, p_.packed_k ? p_.total_k : p_.max_seqlen_k}; }

  const LoadedKernel& loaded(const KernelConfig& config) const {
    return loaded_kernel(config, p_.device.index, args_.stream);
  }
  int processors() const;

  void launch(const LoadedKernel& kernel, Grid grid, void* params) const;
  // Blocks begin as soon as the kernel before admits them; it is the kernel that waits for what it needs.
  void launch_early(const LoadedKernel& kernel, Grid grid, void* params) const;
  void clear(void* data, std::size_t bytes) const;

  // A part of the workspace, null when absent.
  template <class T>
  T* part(std::size_t offset) const {
    return offset == kAbsent ? nullptr : reinterpret_cast<T*>(workspace_ + offset);
  }

  // A tensor of the workspace: contiguous, with `dim` rounded up to a multiple of 8.
  Operand copy_of(std::size_t part, Rows rows, std::int64_t heads, std::int64_t dim) const;

  // The operand itself, or its copy, which is then on its way.
  Operand aligned(const Operand& operand, std::size_t part, Rows rows, std::int64_t heads,
                  std::int64_t dim) const;
  void copy(const Operand& from, const Operand& to, Rows rows, std::int64_t heads, std::int64_t dim,
            std::int64_t columns) const;

  // The table itself, or a copy without gaps, which is then on its way.
  const std::int32_t* table(const IndexTable& given, std::size_t part, std::int64_t rows,
                            std::int64_t columns = 1) const;

  // The fields of the parameters that describe the problem: sizes, tables, masks, logits. The counters are named, not
  // cleared.
  void fill_problem(kernels::ForwardParams& params, const InputCopies& copies) const;

  // The lists of the block mask; `no_blocks` is where the zero goes that stands for absent lists of partial blocks.
  void fill_blocks(kernels::ForwardParams& params, std::size_t no_blocks) const;

  // A map over skip tiles as the kernels address it, in one block of memory.
  kernels::TileBits tile_bits(void* words) const;

  const Problem& p_;
  const Arguments& args_;
  char* const workspace_;
};

}  // namespace fsa::cuda
