// SPDX-License-Identifier: Apache-2.0
// Running softmax of the two rows that a thread shares with three others of its quad.
//
//   p = 2^(scale s - scale m),   l = sum p,   o = sum p v
//
// m is a past row maximum, not always the latest: while no row of the warp has outgrown it by more than 2^8,
// p and l stay far from overflow and o needs no rescaling. Float32 sums and bf16 or fp16 p lose nothing by a
// common factor. The conditional rescale is worth about 3 % at head_dim 128.
#pragma once

#include "ptx/math.cuh"
#include "tile/fragment.cuh"

namespace fsa::kernels {

struct OnlineSoftmax {
  static constexpr float kSlack = 8;  // log2

  float row_max[kRowsPerThread] = {-kInfinity, -kInfinity};
  float row_sum[kRowsPerThread] = {0, 0};  // of this thread's columns only, until finish()
  float factor[kRowsPerThread] = {1, 1};   // what rescale() has to apply
  float added[kRowsPerThread] = {0, 0};    // to the sum of the keys, by add_term()
  bool grown = false;                      // the same in the whole warp
  bool positive = false;                   // every row_max of the warp is

  struct RowPair {
    float of[kRowsPerThread];
  };

  // Turns logits into p and updates m and l; if `grown`, the accumulated output still needs rescale(). kIntegers: row
  // maxima as integers, see maximum_above(), in warps whose m are all above zero.
  template <bool kIntegers, int32 kCount>
  FSA_DEVICE void update(float (&rS)[kCount], float scale) {
    const auto max = [](float a, float b) { return fmaxf(a, b); };
    if (kIntegers && positive) {
      raise(over_quad(maximum_above(row_max, rS), max), scale);
    } else {
      raise<kIntegers>(row_maximum(rS, max), scale);
      if constexpr (kIntegers) positive = __all_sync(0xffffffffu, row_max[0] > 0 && row_max[1] > 0);
    }
    exponentiate(rS, scale);
  }
  // The same when the row maxima are known already, or what tile_maximum() says.
  template <int32 kCount>
  FSA_DEVICE void update(float (&rS)[kCount], const RowPair& top, float scale) {
    raise(top, scale);
    exponentiate(rS, scale);
  }

  // Row maxima, NaN where a row has one; kIntegers: in warps whose m are all above zero, which then are no less, 0 in
  // place of what is below.
  template <bool kIntegers, int32 kCount>
  FSA_DEVICE RowPair tile_maximum(const float (&rS)[kCount]) {
    const auto max = [](float a, float b) { return ptx::max_nan(a, b); };
    if constexpr (kIntegers) {
      if (!positive) positive = __all_sync(0xffffffffu, row_max[0] > 0 && row_max[1] > 0);
      if (positive) return over_quad(maximum_above({0, 0}, rS), max);
    }
    return row_maximum(rS, max);
  }

  // As if update() had not been.
  FSA_DEVICE void go_back(const OnlineSoftmax& before) {
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      row_max[slot] = before.row_max[slot];
      row_sum[slot] = before.row_sum[slot];
    }
  }

  // p under the maxima that are known.
  template <int32 kCount>
  FSA_DEVICE void exponentiate(float (&rS)[kCount], float scale) {
    float base[kRowsPerThread];
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot)  // a row that has seen no key: 2^-inf, not 2^NaN
      base[slot] = row_max[slot] == -kInfinity ? 0.0f : row_max[slot] * scale;
    exponentiate(rS, scale, base);
  }

  // The same for logits near enough to zero: m = 0, and nothing ever grows.
  template <int32 kCount>
  FSA_DEVICE void update_bounded(float (&rS)[kCount], float scale) {
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) row_max[slot] = 0;
    const float base[kRowsPerThread] = {0, 0};
    exponentiate(rS, scale, base);
  }

  template <int32 kCount>
  FSA_DEVICE void rescale(float (&rO)[kCount]) const {
#pragma unroll
    for (int32 i = 0; i < kCount; ++i) rO[i] *= factor[fragment_slot(i)];
  }

  template <int32 kCount, class Max>
  FSA_DEVICE static RowPair row_maximum(const float (&rS)[kCount], Max max) {
    return over_quad(thread_maximum(rS, max), max);
  }

  // Of the thread's columns only.
  template <int32 kCount, class Max>
  FSA_DEVICE static RowPair thread_maximum(const float (&rS)[kCount], Max max) {
    // Two chains a row: one would be bound by latency.
    float chain[4] = {rS[0], rS[1], rS[2], rS[3]};
#pragma unroll
    for (int32 i = 4; i < kCount; ++i) chain[i % 4] = max(chain[i % 4], rS[i]);
    return {max(chain[0], chain[1]), max(chain[2], chain[3])};
  }

  // The larger of `bound`, not below zero, and the thread's columns: floats above zero are ordered as the integers of
  // the same bits, and all others are less. Integers have a maximum of three, so half of the instructions are enough.
  // A NaN of a multiply (0x7fffffff) is the largest.
  template <int32 kCount>
  FSA_DEVICE static RowPair maximum_above(const float (&bound)[kRowsPerThread], const float (&rS)[kCount]) {
    static_assert(kCount % 8 == 0);
    const auto bits = [](float x) { return __builtin_bit_cast(int32, x); };
    int32 chain[4] = {bits(bound[0]), bits(bound[0]), bits(bound[1]), bits(bound[1])};  // two a row
#pragma unroll
    for (int32 i = 0; i < kCount; i += 8) {
#pragma unroll
      for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
        int32& low = chain[2 * slot];
        int32& high = chain[2 * slot + 1];
        low = max_of(max_of(low, bits(rS[i + 2 * slot])), bits(rS[i + 2 * slot + 1]));
        high = max_of(max_of(high, bits(rS[i + 2 * slot + 4])), bits(rS[i + 2 * slot + 5]));
      }
    }
    return {__builtin_bit_cast(float, max_of(chain[0], chain[1])),
            __builtin_bit_cast(float, max_of(chain[2], chain[3]))};
  }

  template <class Max>
  FSA_DEVICE static RowPair over_quad(const RowPair& top, Max max) {
    return {reduce_row(top.of[0], max), reduce_row(top.of[1], max)};
  }

  // l of the whole row.
  FSA_DEVICE float total(int32 slot) const {
    return reduce_row(row_sum[slot], [](float a, float b) { return a + b; });
  }

  FSA_DEVICE void finish() {
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      row_sum[slot] = total(slot);
      if (row_sum[slot] == 0) row_max[slot] = -kInfinity;  // of update_bounded
      factor[slot] = 1;
    }
  }

  // After finish(): a term 2^term joins every row's sum; the output's numerator shrinks by `factor`.
  FSA_DEVICE void add_term(float term, float scale) {
    if (term == -kInfinity) return;
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const float top = fmaxf(row_max[slot] * scale, term);
      factor[slot] = ptx::exp2_approx(row_max[slot] * scale - top);
      added[slot] = ptx::exp2_approx(term - top);
      row_sum[slot] = row_sum[slot] * factor[slot] + added[slot];
      row_max[slot] = top / scale;
    }
  }

  // Natural logarithm of the sum of exponentials; -inf for a row without a key.
  FSA_DEVICE float lse(int32 slot, float scale) const {
    const float total = (row_max[slot] * scale + ptx::log2_approx(row_sum[slot])) * kLn2;
    return row_sum[slot] == 0 ? -kInfinity : total;
  }

 private:
  // kAboveZero: for a maximum that is not above zero it is enough to have grown if it can become so.
  template <bool kAboveZero = false>
  FSA_DEVICE void raise(const RowPair& top, float scale) {
    float next[kRowsPerThread];
    bool mine = false;
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      next[slot] = fmaxf(row_max[slot], top.of[slot]);
      mine = mine || (next[slot] - row_max[slot]) * scale > kSlack;  // false for -inf - -inf
      if constexpr (kAboveZero) mine = mine || (row_max[slot] <= 0 && next[slot] > 0);
    }
    grown = __any_sync(0xffffffffu, mine);
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot) {
      const float shrink = ptx::exp2_approx((row_max[slot] - next[slot]) * scale);
      factor[slot] = grown && next[slot] != -kInfinity ? shrink : 1.0f;
      row_max[slot] = grown ? next[slot] : row_max[slot];
      row_sum[slot] *= factor[slot];
    }
  }

  template <int32 kCount>
  FSA_DEVICE void exponentiate(float (&rS)[kCount], float scale, const float (&base)[kRowsPerThread]) {
    float chain[4] = {0, 0, 0, 0};
#pragma unroll
    for (int32 i = 0; i < kCount; ++i) {
      rS[i] = ptx::exp2_approx(rS[i] * scale - base[fragment_slot(i)]);
      chain[i % 4] += rS[i];
    }
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot)
      row_sum[slot] += chain[2 * slot] + chain[2 * slot + 1];
  }
};

}  // namespace fsa::kernels
