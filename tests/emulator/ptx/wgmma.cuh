// SPDX-License-Identifier: Apache-2.0
// kernels/ptx/wgmma.cuh on the CPU: each thread computes its own registers of the accumulator.
#pragma once

#include "core/base.cuh"
#include "core/config.h"
#include "ptx/math.cuh"
#include "tile/fragment.cuh"

namespace fsa::kernels::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int32 kPending>
void wgmma_wait() {
  emulator::sync_warp();  // a warp waits as a whole
}
template <class T, int32 kCount>
void settle(T (&)[kCount]) {}

// An operand in shared memory by its descriptor: with 128-byte swizzle, or in units of eight inner values.
struct SharedOperand {
  int64 start, chunk_stride, group_stride;
  bool rows;  // the inner values lie on different lines
  bool swizzled;

  SharedOperand(uint64 descriptor, bool rows_)
      : start(static_cast<int64>(descriptor & 0x3fff) << 4),
        chunk_stride(static_cast<int64>(descriptor >> 16 & 0x3fff) << 4),
        group_stride(static_cast<int64>(descriptor >> 32 & 0x3fff) << 4),
        rows(rows_),
        swizzled(descriptor >> 62 == 1) {}

  // Row or column `outer` of the product, inner index 0..15.
  float operator()(int32 outer, int32 inner) const {
    if (!swizzled)
      return element(start + outer / 8 * group_stride + outer % 8 * 16 + inner / 8 * chunk_stride +
                     inner % 8 * 2);
    const int64 address = start + (rows ? inner / 8 * group_stride + inner % 8 * 128 +
                                              outer / 64 * chunk_stride + outer % 64 * 2
                                        : outer / 8 * group_stride + outer % 8 * 128 + inner * 2);
    return element(address ^ (address >> 7 & 7) << 4);
  }

 private:
  static float element(int64 address) {
    uint16 bits;
    std::memcpy(&bits, emulator::shared_memory + address, 2);
    return float_of_bf16(bits);
  }
};

template <int32 kN, class A, class B>
void multiply(float (&d)[kN / 2], bool accumulate, A a, B b) {
  const int32 thread = warpgroup_thread();
  for (int32 i = 0; i < kN / 2; ++i) {
    float sum = accumulate ? d[i] : 0.0f;
    for (int32 k = 0; k < 16; ++k)
      sum += a(fragment_row(thread, fragment_slot(i)), k) * b(fragment_column(thread, i), k);
    d[i] = sum;
  }
}

template <ElementType kElement, int32 kN>
void multiply_shared(float (&d)[kN / 2], uint64 a, uint64 b, uint32 accumulate) {
  multiply<kN>(d, accumulate != 0, SharedOperand(a, false), SharedOperand(b, false));
}

template <ElementType kElement, int32 kN, bool kRowsOfA>
void multiply_shared_rows(float (&d)[kN / 2], uint64 a, uint64 b, uint32 accumulate) {
  multiply<kN>(d, accumulate != 0, SharedOperand(a, kRowsOfA), SharedOperand(b, true));
}

template <ElementType kElement>
void multiply_shared_rows_halves(float (&left)[32], float (&right)[32], uint64 a, uint64 b,
                                 uint32 accumulate) {
  float d[64];
  for (int i = 0; i < 32; ++i) d[i] = left[i], d[i + 32] = right[i];
  multiply<128>(d, accumulate != 0, SharedOperand(a, true), SharedOperand(b, true));
  for (int i = 0; i < 32; ++i) left[i] = d[i], right[i] = d[i + 32];
}

// A row of A is in the registers of the four lanes of a quad.
template <int32 kN, class B>
void multiply_quads(float (&d)[kN / 2], bool accumulate, uint32 a0, uint32 a1, uint32 a2, uint32 a3, B b) {
  emulator::Warp& warp = emulator::warp();
  const uint32 mine[4] = {a0, a1, a2, a3};
  for (int i = 0; i < 4; ++i) warp.registers[i][emulator::lane()] = mine[i];
  emulator::sync_warp();
  const auto a = [&](int32 row, int32 inner) {
    const uint32 pair = warp.registers[row % 16 / 8 + inner / 8 * 2][row % 8 * 4 + inner % 8 / 2];
    return float_of_bf16(inner % 2 == 0 ? pair & 0xffff : pair >> 16);
  };
  multiply<kN>(d, accumulate, a, b);
  emulator::sync_warp();
}

template <ElementType kElement, int32 kN>
void multiply_registers(float (&d)[kN / 2], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint64 b) {
  multiply_quads<kN>(d, true, a0, a1, a2, a3, SharedOperand(b, true));
}

template <ElementType kElement, int32 kN, bool kAccumulate>
void multiply_registers_columns(float (&d)[kN / 2], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint64 b) {
  multiply_quads<kN>(d, kAccumulate, a0, a1, a2, a3, SharedOperand(b, false));
}

}  // namespace fsa::kernels::ptx
