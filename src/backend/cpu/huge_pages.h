// SPDX-License-Identifier: Apache-2.0
// Large pages for large buffers: workspaces and outputs are often fresh from the system, and the first touch of a page is
// a fault.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/problem.h"

namespace fsa::cpu {

inline constexpr std::size_t kHugePage = std::size_t{1} << 21;

// A hint: faults of pages of 4 KB took a sixth of the time of a sparse backward, and there is one in 512 of them with
// pages of 2 MB. Only whole ones inside the buffer, so its neighbours keep theirs.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Of an output [batches, rows, heads, dim].
inline void prefer_huge_pages(const Operand& o, std::int64_t batches, std::int64_t rows, std::int64_t heads,
                              std::int64_t dim) {
  if (!o.present() || batches * rows * heads * dim == 0) return;
  const std::int64_t elements =
      (batches - 1) * o.stride_batch + (rows - 1) * o.stride_row + (heads - 1) * o.stride_head + dim;
  if (elements > 0) prefer_huge_pages(o.data, static_cast<std::size_t>(elements) * size_of(o.dtype));
}

}  // namespace fsa::cpu
