// SPDX-License-Identifier: Apache-2.0
// Policy KvSource: where the rows of a tensor are. Contiguous, packed and paged memory, and gathered keys, differ
// here and nowhere else.
#pragma once

#include "backend/cpu/simd/vector-inl.h"
#include "core/problem.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

// Rows of one head of one sequence. `row(j)` is the address of element 0 of row j.
struct RowSource {
  const char* base = nullptr;
  std::int64_t row_bytes = 0;
  const std::int32_t* pages = nullptr;  // paged: page of keys [p * page_size, (p + 1) * page_size)
  std::int64_t page_stride = 0;         // between entries of the page table
  std::int64_t page_size = 1;
  std::int64_t page_bytes = 0;
  const std::int32_t* gather = nullptr;  // gathered: key of each position, never negative where it is read
  std::int64_t gather_stride = 0;
  DType dtype = DType::float32;

  HWY_INLINE const char* row(std::int64_t j) const {
    if (gather != nullptr) j = gather[j * gather_stride];
    if (pages == nullptr) return base + j * row_bytes;
    return base + pages[j / page_size * page_stride] * page_bytes + j % page_size * row_bytes;
  }
};

HWY_INLINE std::int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// `first_row`: where the sequence begins in a packed tensor.
HWY_INLINE RowSource row_source(const Operand& operand, std::int64_t batch, std::int64_t first_row,
                                std::int64_t head) {
  RowSource source;
  const std::int64_t size = bytes_of(operand.dtype);
  source.dtype = operand.dtype;
  source.base =
      static_cast<const char*>(operand.data) +
      (batch * operand.stride_batch + first_row * operand.stride_row + head * operand.stride_head) * size;
  source.row_bytes = operand.stride_row * size;
  return source;
}

// Keys, values and deltas of a sequence, through the page table and the gathered indices where there are such.
HWY_INLINE RowSource key_source(const Problem& problem, const Arguments& args, const Operand& operand,
                                const Sequence& sequence, std::int64_t kv_head) {
  RowSource source = row_source(operand, problem.paged ? 0 : sequence.batch, sequence.k_begin, kv_head);
  if (problem.paged) {
    source.pages = args.page_table.data + sequence.batch * args.page_table.stride_row;
    source.page_stride = args.page_table.stride_column;
    source.page_size = problem.page_size;
    source.page_bytes = operand.stride_batch * bytes_of(operand.dtype);
  }
  if (problem.gathered) {
    source.gather = args.gather_kv_indices.data + sequence.batch * args.gather_kv_indices.stride_row;
    source.gather_stride = args.gather_kv_indices.stride_column;
  }
  return source;
}

// Addresses of rows [begin, begin + count), page by page: one division per page and not one per row.
HWY_INLINE void row_pointers(const RowSource& source, std::int64_t begin, std::int64_t count,
                             const char** pointers) {
  if (source.gather != nullptr || source.pages == nullptr) {
    for (std::int64_t r = 0; r < count; ++r) pointers[r] = source.row(begin + r);
    return;
  }
  for (std::int64_t r = 0; r < count;) {
    const char* row = source.row(begin + r);
    const std::int64_t end = min_of(count, r + source.page_size - (begin + r) % source.page_size);
    for (; r < end; ++r, row += source.row_bytes) pointers[r] = row;
  }
}

inline constexpr std::int64_t kPointerChunk = 128;  // no fewer than the keys of a tile

// target[r][0, round_up(dim, kLanes)) = row begin + r as float, zero-padded; rows at distance `pitch`.
HWY_INLINE void pack_rows(const RowSource& source, std::int64_t begin, std::int64_t count, std::int64_t dim,
                          float* target, std::int64_t pitch) {
  const char* pointers[kPointerChunk];
  with_element_type(source.dtype, [&](auto* type) HWY_ATTR {
    using T = std::remove_pointer_t<decltype(type)>;
    for (std::int64_t done = 0; done < count; done += kPointerChunk) {
      const std::int64_t chunk = min_of(kPointerChunk, count - done);
      row_pointers(source, begin + done, chunk, pointers);
      for (std::int64_t r = 0; r < chunk; ++r)
        widen_row(reinterpret_cast<const T*>(pointers[r]), dim, target + (done + r) * pitch);
    }
  });
}

// Asks for a row that a loop over strided rows reaches in a moment: no hardware prefetcher follows them.
inline constexpr std::int64_t kRowsAhead = 8;
HWY_INLINE void fetch_row(const RowSource& source, std::int64_t row, std::int64_t dim) {
  const char* first = source.row(row);
  for (std::int64_t b = 0; b < dim * bytes_of(source.dtype); b += 64) __builtin_prefetch(first + b);
}

// One scalar per row (alpha, delta).
HWY_INLINE void pack_scalars(const RowSource& source, std::int64_t begin, std::int64_t count, float* target) {
  const bool contiguous = source.pages == nullptr && source.gather == nullptr &&
                          source.row_bytes == bytes_of(source.dtype) && source.dtype != DType::float64;
  if (!contiguous) {
    const char* pointers[kPointerChunk];
    for (std::int64_t done = 0; done < count; done += kPointerChunk) {
      const std::int64_t chunk = min_of(kPointerChunk, count - done);
      row_pointers(source, begin + done, chunk, pointers);
      for (std::int64_t r = 0; r < chunk; ++r) target[done + r] = load_scalar(pointers[r], source.dtype, 0);
    }
    return;
  }
  with_element_type(source.dtype, [&](auto* type) HWY_ATTR {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* first = reinterpret_cast<const T*>(source.row(begin));
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) hn::StoreU(widen(first + i), kFloat, target + i);
    for (; i < count; ++i) target[i] = load_scalar(first, source.dtype, i);
  });
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
