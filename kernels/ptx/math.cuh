// SPDX-License-Identifier: Apache-2.0
// Approximate functions, conversions and the matrix store.
#pragma once

#include "core/base.cuh"
#include "core/config.h"

namespace fsa::kernels::ptx {

FSA_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FSA_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FSA_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FSA_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Unlike fmaxf, a NaN on either side wins.
FSA_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

FSA_DEVICE float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// 0 for shifts by 32 and more.
FSA_DEVICE uint32 shift_left(uint32 value, uint32 by) {
  uint32 y;
  asm("shl.b32 %0, %1, %2;" : "=r"(y) : "r"(value), "r"(by));
  return y;
}

// Two values as one register, the first in the low half.
template <ElementType kElement>
FSA_DEVICE uint32 pack(float low, float high) {
  uint32 packed;
  if constexpr (kElement == ElementType::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <ElementType kElement>
FSA_DEVICE float2 unpack(uint32 packed) {
  if constexpr (kElement == ElementType::bf16)
    return make_float2(__builtin_bit_cast(float, packed << 16),
                       __builtin_bit_cast(float, packed & 0xffff0000u));
  float low, high;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
      : "=f"(low), "=f"(high)
      : "r"(packed));
  return make_float2(low, high);
}

// Four 8x8 matrices of 2-byte elements, as one multiply's A; lane l gives the address of row l % 8 of matrix l / 8.
FSA_DEVICE void load_matrices(uint32 address, uint32& m0, uint32& m1, uint32& m2, uint32& m3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m0), "=r"(m1), "=r"(m2), "=r"(m3)
               : "r"(address)
               : "memory");
}

// Four 8x8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8.
FSA_DEVICE void store_matrices(uint32 address, uint32 m0, uint32 m1, uint32 m2, uint32 m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

}  // namespace fsa::kernels::ptx
