// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/tensor_map.h"

#include <algorithm>

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

}  // namespace

kernels::TensorMap encode_tensor_map(const char* name, const Operand& operand, const MapExtents& extents,
                                     int box_rows) {
  const std::uint64_t sizes[] = {extent(extents.columns), extent(extents.rows), extent(extents.heads),
                                 extent(extents.batch)};
  const std::uint64_t pitches[] = {pitch(operand.stride_row, extents.rows),
                                   pitch(operand.stride_head, extents.heads),
                                   pitch(operand.stride_batch, extents.batch)};
  const std::uint32_t box[] = {kernels::kChunkColumns, static_cast<std::uint32_t>(box_rows), 1, 1};
  const std::uint32_t steps[] = {1, 1, 1, 1};
  kernels::TensorMap map;
  const Result result = driver().call.encode_tensor_map(
      &map, operand.dtype == DType::bfloat16 ? kBfloat16 : kFloat16, 4, operand.data, sizes, pitches, box,
      steps, kNoInterleave, kSwizzle128Bytes, kPromotion128Bytes, kFillZeros);
  if (result != 0)
    throw Error(ErrorCode::unsupported,
                std::string(name) + ": the copy engine takes no tensor with the strides " +
                    std::to_string(operand.stride_batch) + ", " + std::to_string(operand.stride_row) + ", " +
                    std::to_string(operand.stride_head) + " (batch, row, head); pass a contiguous copy");
  return map;
}

}  // namespace fsa::cuda
