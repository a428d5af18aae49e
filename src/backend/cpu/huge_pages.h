// SPDX-License-Identifier: Apache-2.0
// Large pages for large buffers.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fsa::cpu {

inline constexpr std::size_t kHugePage = std::size_t{1} << 21;

// A hint: fresh memory costs a fault per page of 4 KB, a sixth of the time of a sparse backward; pages of 2 MB cost one
// in 512. Only whole ones inside the buffer, so its neighbours keep theirs.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fsa::cpu
