// SPDX-License-Identifier: Apache-2.0
// kernels/ptx/math.cuh on the CPU. bf16 only.
#pragma once

#include "core/base.cuh"
#include "core/config.h"

namespace fsa::kernels::ptx {

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float tanh_approx(float x) { return std::tanh(x); }
inline float reciprocal_approx(float x) { return 1 / x; }
inline float max_nan(float a, float b) { return std::isnan(a) ? a : std::isnan(b) ? b : std::max(a, b); }
inline float min_nan(float a, float b) { return std::isnan(a) ? a : std::isnan(b) ? b : std::min(a, b); }

inline uint32 shift_left(uint32 value, uint32 by) { return by < 32 ? value << by : 0; }

// To nearest, ties to even.
inline uint32 bf16_bits(float x) {
  const uint32 bits = std::bit_cast<uint32>(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float float_of_bf16(uint32 bits) { return std::bit_cast<float>(bits << 16); }

template <ElementType kElement>
uint32 pack(float low, float high) {
  if (kElement != ElementType::bf16) std::abort();
  return bf16_bits(low) | bf16_bits(high) << 16;
}

template <ElementType kElement>
float2 unpack(uint32 packed) {
  if (kElement != ElementType::bf16) std::abort();
  return {float_of_bf16(packed & 0xffff), float_of_bf16(packed >> 16)};
}

// Lane l writes row l % 8 of matrix l / 8, of which each of four lanes has two elements.
inline void load_matrices(uint32 address, uint32& m0, uint32& m1, uint32& m2, uint32& m3) {
  emulator::Warp& warp = emulator::warp();
  const int lane = emulator::lane();
  std::memcpy(&warp.registers[lane / 8][lane % 8 * 4], emulator::shared_memory + static_cast<int32>(address),
              16);
  emulator::sync_warp();
  uint32* const mine[4] = {&m0, &m1, &m2, &m3};
  for (int i = 0; i < 4; ++i) *mine[i] = warp.registers[i][lane];
  emulator::sync_warp();
}

inline void store_matrices(uint32 address, uint32 m0, uint32 m1, uint32 m2, uint32 m3) {
  emulator::Warp& warp = emulator::warp();
  const int lane = emulator::lane();
  const uint32 mine[4] = {m0, m1, m2, m3};
  for (int i = 0; i < 4; ++i) warp.registers[i][lane] = mine[i];
  emulator::sync_warp();
  std::memcpy(emulator::shared_memory + static_cast<int32>(address), &warp.registers[lane / 8][lane % 8 * 4],
              16);
  emulator::sync_warp();
}

}  // namespace fsa::kernels::ptx
