// SPDX-License-Identifier: Apache-2.0
// The one matrix product that every step of attention uses, without packing either operand:
//
//   C[n][v] = init(C[n][v]) + sum_k B[n * b_n + k * b_k] * A[k][v]
//
// The sum starts at zero and C joins at its end: a gradient that grows over thousands of rows then rounds once per tile
// at its own magnitude, not once per row (dK and dV of 2048 rows: a third of the error, for 1.5 % more additions).
// v runs over vector lanes: A and C are read and written as whole vectors (rows of the score tile, or columns of a
// value row); A may be unaligned. B is read one element at a time and broadcast, so its two strides are free: K and V are used as they
// lie in memory, transposed or not. With AVX-512, 6 x 4 vectors of C stay in registers: 24 FMAs for 4 loads and 6
// broadcasts, so the two FMA ports and not the two load ports are the limit.
#pragma once

#include "backend/cpu/simd/vector-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

struct Gemm {
  const float* a;
  std::int64_t a_pitch;
  const float* b;
  std::int64_t b_n;
  std::int64_t b_k;
  std::int64_t k;
  float* c;
  std::int64_t c_pitch;
};

enum class Init { zero, add, scale };  // C starts at 0, at C, or at C times one factor per lane

#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
inline constexpr int kPanel = 4;  // vectors of C per row: 32 registers
inline constexpr int kBlock = 6;  // rows of C
#else
inline constexpr int kPanel = 2;  // 16 registers: 12 of C, 2 of A, 1 of B
inline constexpr int kBlock = 6;
#endif

template <int kVectors, int kColumns, Init kInit>
HWY_INLINE void gemm_block(const Gemm& g, const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, float* c,
                           const float* factors) {
  Float sums[kColumns][kVectors];
#pragma GCC unroll 8
  for (int n = 0; n < kColumns; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[n][v] = hn::Zero(kFloat);
  }
  const std::int64_t b_k = g.b_k, b_n = g.b_n, a_pitch = g.a_pitch;
  for (std::int64_t k = 0; k < g.k; ++k) {
    Float row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = hn::LoadU(kFloat, a + v * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) {
      const Float factor = hn::Set(kFloat, b[n * b_n]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[n][v] = hn::MulAdd(factor, row[v], sums[n][v]);
    }
    a += a_pitch;
    b += b_k;
  }
#pragma GCC unroll 8
  for (int n = 0; n < kColumns; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* target = c + n * g.c_pitch + v * kLanes;
      Float sum = sums[n][v];
      if constexpr (kInit == Init::add) sum = hn::Add(hn::Load(kFloat, target), sum);
      if constexpr (kInit == Init::scale)
        sum = hn::MulAdd(hn::Load(kFloat, target), hn::Load(kFloat, factors + v * kLanes), sum);
      hn::Store(sum, kFloat, target);
    }
  }
}

// One panel of kVectors vectors against all n: blocks of kBlock, then a remainder.
template <int kVectors, Init kInit>
HWY_NOINLINE void gemm_panel(const Gemm& g, std::int64_t n_count, std::int64_t v_begin,
                             const float* factors) {
  const float* a = g.a + v_begin;
  if (kInit == Init::scale) factors += v_begin;
  std::int64_t n = 0;
  // A remainder of 1 to 3 would leave the FMA pipes half empty: two blocks of 3 to 5 share it instead.
  while (n_count - n >= kBlock && n_count - n != kBlock + 1 && n_count - n != kBlock + 2) {
    gemm_block<kVectors, kBlock, kInit>(g, a, g.b + n * g.b_n, g.c + n * g.c_pitch + v_begin, factors);
    n += kBlock;
  }
  while (n < n_count) {
    const float* b = g.b + n * g.b_n;
    float* c = g.c + n * g.c_pitch + v_begin;
    const std::int64_t left = n_count - n;
    if (left >= 6) {  // 7 = 4 + 3, 8 = 4 + 4
      gemm_block<kVectors, 4, kInit>(g, a, b, c, factors);
      n += 4;
    } else if (left == 5) {
      gemm_block<kVectors, 5, kInit>(g, a, b, c, factors);
      n += 5;
    } else if (left == 4) {
      gemm_block<kVectors, 4, kInit>(g, a, b, c, factors);
      n += 4;
    } else if (left == 3) {
      gemm_block<kVectors, 3, kInit>(g, a, b, c, factors);
      n += 3;
    } else if (left == 2) {
      gemm_block<kVectors, 2, kInit>(g, a, b, c, factors);
      n += 2;
    } else {
      gemm_block<kVectors, 1, kInit>(g, a, b, c, factors);
      n += 1;
    }
  }
}

// Terms added one after the other before they join C. Rounding grows with the length of such a chain; the usual head_dim
// and tile sizes are one chain, and longer sums pay 1.5 % for half the error at head_dim 512.
inline constexpr std::int64_t kChain = 128;

template <Init kInit>
HWY_INLINE void gemm_chain(const Gemm& g, std::int64_t n_count, std::int64_t v_count, const float* factors) {
  std::int64_t v = 0;
  for (; v + (kPanel - 1) * kLanes < v_count; v += kPanel * kLanes)
    gemm_panel<kPanel, kInit>(g, n_count, v, factors);
  for (; v < v_count; v += kLanes) gemm_panel<1, kInit>(g, n_count, v, factors);
}

// n_count rows of C by v_count lanes (rounded up to whole vectors). `factors`, one per lane, with Init::scale only.
template <Init kInit>
HWY_INLINE void gemm(const Gemm& g, std::int64_t n_count, std::int64_t v_count,
                     const float* factors = nullptr) {
  Gemm chain = g;
  chain.k = min_of(g.k, kChain);
  gemm_chain<kInit>(chain, n_count, v_count, factors);
  for (std::int64_t k = chain.k; k < g.k; k += kChain) {
    chain.k = min_of(g.k - k, kChain);
    chain.a = g.a + k * g.a_pitch;
    chain.b = g.b + k * g.b_k;
    gemm_chain<Init::add>(chain, n_count, v_count, nullptr);
  }
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
