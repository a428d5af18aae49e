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

// Rows that the next step needs, asked for a few lines at a time, one portion per register block of a product: a burst
// of them waits for the fill buffers as the loads themselves would.
struct Fetch {
  struct Rows {
    const char* next;
    std::int64_t row_bytes, bytes, left;
  };
  Rows rows[5];
  int count = 0, at = 0;

  HWY_INLINE void add(const void* first, std::int64_t row_bytes, std::int64_t bytes,
                      std::int64_t count_rows) {
    rows[count++] = {static_cast<const char*>(first), row_bytes, bytes, count_rows};
  }
  HWY_INLINE void some() {
    for (std::int64_t lines = 24; lines > 0 && at < count;) {
      Rows& r = rows[at];
      for (std::int64_t b = 0; b < r.bytes; b += 64, --lines) __builtin_prefetch(r.next + b, 0, 2);
      r.next += r.row_bytes;
      if (--r.left == 0) ++at;
    }
  }
};

struct Gemm {
  const float* a;
  std::int64_t a_pitch;
  const float* b;
  std::int64_t b_n;
  std::int64_t b_k;
  std::int64_t k;
  float* c;
  std::int64_t c_pitch;

  HWY_INLINE const float* a_row(std::int64_t i) const { return a + i * a_pitch; }
  HWY_INLINE const float* b_row(std::int64_t n) const { return b + n * b_n; }
  HWY_INLINE std::int64_t b_step() const { return b_k; }
  HWY_INLINE float* c_row(std::int64_t n) const { return c + n * c_pitch; }
  HWY_INLINE void fetch() const {}
};

// The same product with the rows of one operand in a list of addresses: rows that were selected one by one are read,
// or accumulated, where they are.
struct GemmListedA {
  const float* const* a;
  const float* b;
  std::int64_t b_n;
  std::int64_t b_k;
  std::int64_t k;
  float* c;
  std::int64_t c_pitch;
  Fetch* ahead;

  HWY_INLINE const float* a_row(std::int64_t i) const { return a[i]; }
  HWY_INLINE const float* b_row(std::int64_t n) const { return b + n * b_n; }
  HWY_INLINE std::int64_t b_step() const { return b_k; }
  HWY_INLINE float* c_row(std::int64_t n) const { return c + n * c_pitch; }
  HWY_INLINE void fetch() const { ahead->some(); }
};

struct GemmListedB {
  const float* a;
  std::int64_t a_pitch;
  const float* const* b;
  std::int64_t k;
  float* c;
  std::int64_t c_pitch;
  Fetch* ahead;

  HWY_INLINE const float* a_row(std::int64_t i) const { return a + i * a_pitch; }
  HWY_INLINE const float* b_row(std::int64_t n) const { return b[n]; }
  HWY_INLINE std::int64_t b_step() const { return 1; }
  HWY_INLINE float* c_row(std::int64_t n) const { return c + n * c_pitch; }
  HWY_INLINE void fetch() const { ahead->some(); }
};

struct GemmListedC {
  const float* a;
  std::int64_t a_pitch;
  const float* b;
  std::int64_t b_n;
  std::int64_t k;
  float* const* c;
  Fetch* ahead;

  HWY_INLINE const float* a_row(std::int64_t i) const { return a + i * a_pitch; }
  HWY_INLINE const float* b_row(std::int64_t n) const { return b + n * b_n; }
  HWY_INLINE std::int64_t b_step() const { return 1; }
  HWY_INLINE float* c_row(std::int64_t n) const { return c[n]; }
  HWY_INLINE void fetch() const { ahead->some(); }
};

// C starts at 0, at C, at C times one factor per lane, or at C times one factor per row.
enum class Init { zero, add, scale, scale_rows };

#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
inline constexpr int kPanel = 4;  // vectors of C per row: 32 registers
inline constexpr int kBlock = 6;  // rows of C
#else
inline constexpr int kPanel = 2;  // 16 registers: 12 of C, 2 of A, 1 of B
inline constexpr int kBlock = 6;
#endif

// Terms [begin, end) of the sum.
struct Terms {
  std::int64_t begin;
  std::int64_t end;
};

template <int kVectors, int kColumns, Init kInit, class Product>
HWY_INLINE void gemm_block(const Product& g, Terms terms, std::int64_t n_begin, std::int64_t v_begin,
                           const float* factors) {
  g.fetch();
  Float sums[kColumns][kVectors];
#pragma GCC unroll 8
  for (int n = 0; n < kColumns; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[n][v] = hn::Zero(kFloat);
  }
  const std::int64_t b_step = g.b_step();
  const float* HWY_RESTRICT b[kColumns];
#pragma GCC unroll 8
  for (int n = 0; n < kColumns; ++n) b[n] = g.b_row(n_begin + n) + terms.begin * b_step;
  std::int64_t at = 0;
  for (std::int64_t k = terms.begin; k < terms.end; ++k) {
    const float* HWY_RESTRICT a = g.a_row(k) + v_begin;
    Float row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = hn::LoadU(kFloat, a + v * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < kColumns; ++n) {
      const Float factor = hn::Set(kFloat, b[n][at]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[n][v] = hn::MulAdd(factor, row[v], sums[n][v]);
    }
    at += b_step;
  }
#pragma GCC unroll 8
  for (int n = 0; n < kColumns; ++n) {
    float* c = g.c_row(n_begin + n) + v_begin;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* target = c + v * kLanes;
      Float sum = sums[n][v];
      if constexpr (kInit == Init::add) sum = hn::Add(hn::Load(kFloat, target), sum);
      if constexpr (kInit == Init::scale)
        sum = hn::MulAdd(hn::Load(kFloat, target), hn::Load(kFloat, factors + v_begin + v * kLanes), sum);
      if constexpr (kInit == Init::scale_rows)
        sum = hn::MulAdd(hn::Load(kFloat, target), hn::Set(kFloat, factors[n_begin + n]), sum);
      hn::Store(sum, kFloat, target);
    }
  }
}

// One panel of kVectors vectors against all n: blocks of kBlock, then a remainder.
template <int kVectors, Init kInit, class Product>
HWY_NOINLINE void gemm_panel(Product g, Terms terms, std::int64_t n_count, std::int64_t v_begin,
                             const float* factors) {
  std::int64_t n = 0;
  // A remainder of 1 to 3 would leave the FMA pipes half empty: two blocks of 3 to 5 share it instead.
  while (n_count - n >= kBlock && n_count - n != kBlock + 1 && n_count - n != kBlock + 2) {
    gemm_block<kVectors, kBlock, kInit>(g, terms, n, v_begin, factors);
    n += kBlock;
  }
  while (n < n_count) {
    const std::int64_t left = n_count - n;
    if (left >= 6) {  // 7 = 4 + 3, 8 = 4 + 4
      gemm_block<kVectors, 4, kInit>(g, terms, n, v_begin, factors);
      n += 4;
    } else if (left == 5) {
      gemm_block<kVectors, 5, kInit>(g, terms, n, v_begin, factors);
      n += 5;
    } else if (left == 4) {
      gemm_block<kVectors, 4, kInit>(g, terms, n, v_begin, factors);
      n += 4;
    } else if (left == 3) {
      gemm_block<kVectors, 3, kInit>(g, terms, n, v_begin, factors);
      n += 3;
    } else if (left == 2) {
      gemm_block<kVectors, 2, kInit>(g, terms, n, v_begin, factors);
      n += 2;
    } else {
      gemm_block<kVectors, 1, kInit>(g, terms, n, v_begin, factors);
      n += 1;
    }
  }
}

// Terms added one after the other before they join C. Rounding grows with the length of such a chain; the usual head_dim
// and tile sizes are one chain, and longer sums pay 1.5 % for half the error at head_dim 512.
inline constexpr std::int64_t kChain = 128;

template <Init kInit, class Product>
HWY_INLINE void gemm_chain(const Product& g, Terms terms, std::int64_t n_count, std::int64_t v_count,
                           const float* factors) {
  std::int64_t v = 0;
  for (; v + (kPanel - 1) * kLanes < v_count; v += kPanel * kLanes)
    gemm_panel<kPanel, kInit>(g, terms, n_count, v, factors);
  for (; v < v_count; v += kLanes) gemm_panel<1, kInit>(g, terms, n_count, v, factors);
}

// n_count rows of C by v_count lanes (rounded up to whole vectors). `factors`, one per lane or per row, with
// Init::scale and Init::scale_rows only.
template <Init kInit, class Product>
HWY_INLINE void gemm(const Product& g, std::int64_t n_count, std::int64_t v_count,
                     const float* factors = nullptr) {
  gemm_chain<kInit>(g, {0, min_of(g.k, kChain)}, n_count, v_count, factors);
  for (std::int64_t k = kChain; k < g.k; k += kChain)
    gemm_chain<Init::add>(g, {k, min_of(g.k, k + kChain)}, n_count, v_count, nullptr);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
