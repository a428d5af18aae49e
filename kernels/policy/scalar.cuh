// SPDX-License-Identifier: Apache-2.0
// Small operands of any of the four types, read once per row, head or tile.
#pragma once

#include "core/base.cuh"
#include "core/params.h"

namespace fsa::kernels {

FSA_DEVICE float load_scalar(const ScalarOperand& operand, int32 batch, int64 row, int32 head) {
  const int64 i = batch * operand.stride_batch + row * operand.stride_row + head * operand.stride_head;
  if (operand.type == ScalarType::float32) return static_cast<const float*>(operand.data)[i];
  if (operand.type == ScalarType::float64)
    return static_cast<float>(static_cast<const double*>(operand.data)[i]);
  const uint32 bits = static_cast<const uint16*>(operand.data)[i];
  if (operand.type == ScalarType::bf16) return __builtin_bit_cast(float, bits << 16);
  float value;
  asm("{\n.reg .b16 half;\ncvt.u16.u32 half, %1;\ncvt.f32.f16 %0, half;\n}\n" : "=f"(value) : "r"(bits));
  return value;
}

}  // namespace fsa::kernels
