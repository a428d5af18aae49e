// SPDX-License-Identifier: Apache-2.0
// Small operands of any of the four types, read or written once per row, head or tile.
#pragma once

#include "core/base.cuh"
#include "core/params.h"
#include "ptx/math.cuh"

namespace fsa::kernels {

FSA_DEVICE float load_scalar(const ScalarOperand& operand, int32 batch, int64 row, int32 head) {
  const int64 i = batch * operand.stride_batch + row * operand.stride_row + head * operand.stride_head;
  if (operand.type == ScalarType::float32) return static_cast<const float*>(operand.data)[i];
  if (operand.type == ScalarType::float64)
    return static_cast<float>(static_cast<const double*>(operand.data)[i]);
  const uint32 bits = static_cast<const uint16*>(operand.data)[i];
  if (operand.type == ScalarType::bf16) return __builtin_bit_cast(float, bits << 16);
  return ptx::unpack<ElementType::fp16>(bits).x;
}

FSA_DEVICE void store_scalar(const ScalarOperand& operand, int32 batch, int64 row, int32 head, float value) {
  void* const data = const_cast<void*>(operand.data);
  if (data == nullptr) return;  // not wanted
  const int64 i = batch * operand.stride_batch + row * operand.stride_row + head * operand.stride_head;
  if (operand.type == ScalarType::float32) {
    static_cast<float*>(data)[i] = value;
  } else if (operand.type == ScalarType::float64) {
    static_cast<double*>(data)[i] = value;
  } else if (operand.type == ScalarType::bf16) {
    static_cast<uint16*>(data)[i] = static_cast<uint16>(ptx::pack<ElementType::bf16>(value, 0));
  } else {
    static_cast<uint16*>(data)[i] = static_cast<uint16>(ptx::pack<ElementType::fp16>(value, 0));
  }
}

}  // namespace fsa::kernels
