// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/tensor_map.h"

#include <algorithm>
#include <array>
#include <string>

#include "backend/cuda/driver.h"
#include "fsa/error.h"
#include "kernels/core/config.h"

namespace fsa::cuda {
namespace {

// Of cuTensorMapEncodeTiled, as documented.
constexpr int kFloat16 = 6, kBfloat16 = 9;
constexpr int kNoInterleave = 0, kSwizzle128Bytes = 3, kPromotion128Bytes = 2, kFillZeros = 0;

std::uint64_t extent(std::int64_t value) {
  return static_cast<std::uint64_t>(std::max<std::int64_t>(value, 1));
}

// An axis that is never stepped along may have any stride; the encoder wants multiples of 16 bytes.
std::uint64_t pitch(std::int64_t stride, std::int64_t count) {
  return count > 1 ? static_cast<std::uint64_t>(stride) * kernels::kElementBytes : 16;
}

// Everything that a map is made of.
struct Description {
  void* address;
  std::uint64_t sizes[4];
  std::uint64_t pitches[3];
  std::int32_t type;
  std::uint32_t box_rows;

  friend bool operator==(const Description&, const Description&) = default;
};

Result encode(const Description& d, kernels::TensorMap& map) {
  const std::uint32_t box[] = {kernels::kChunkColumns, d.box_rows, 1, 1};
  const std::uint32_t steps[] = {1, 1, 1, 1};
  return driver().call.encode_tensor_map(&map, d.type, 4, d.address, d.sizes, d.pitches, box, steps,
                                         kNoInterleave, kSwizzle128Bytes, kPromotion128Bytes, kFillZeros);
}

// The driver takes about half a microsecond for a map, and a program that repeats its calls gets the same memory
// from its allocator again. A map depends on nothing but its description, so an old one is never wrong.
class RecentMaps {
 public:
  const kernels::TensorMap* find(const Description& description) const {
    for (const Entry& entry : entries_)
      if (entry.description == description) return &entry.map;
    return nullptr;
  }

  void keep(const Description& description, const kernels::TensorMap& map) {
    entries_[next_++ % entries_.size()] = {description, map};
  }

 private:
  struct Entry {
    Description description = {};
    kernels::TensorMap map = {};
  };
  std::array<Entry, 16> entries_;
  std::size_t next_ = 0;
};

}  // namespace

kernels::TensorMap encode_tensor_map(const char* name, const Operand& operand, const MapExtents& extents,
                                     int box_rows) {
  static thread_local RecentMaps recent;
  const Description description = {
      operand.data,
      {extent(extents.columns), extent(extents.rows), extent(extents.heads), extent(extents.batch)},
      {pitch(operand.stride_row, extents.rows), pitch(operand.stride_head, extents.heads),
       pitch(operand.stride_batch, extents.batch)},
      operand.dtype == DType::bfloat16 ? kBfloat16 : kFloat16,
      static_cast<std::uint32_t>(box_rows)};
  if (const kernels::TensorMap* map = recent.find(description)) return *map;
  kernels::TensorMap map;
  if (encode(description, map) != 0)
    throw Error(ErrorCode::unsupported,
                std::string(name) + ": the copy engine takes no tensor with the strides " +
                    std::to_string(operand.stride_batch) + ", " + std::to_string(operand.stride_row) + ", " +
                    std::to_string(operand.stride_head) + " (batch, row, head); pass a contiguous copy");
  recent.keep(description, map);
  return map;
}

}  // namespace fsa::cuda
