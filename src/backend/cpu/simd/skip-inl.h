// SPDX-License-Identifier: Apache-2.0
// Policy Skip: the gate test, which needs no key, and the threshold vote, which needs no value
// (docs/semantics.md, "Threshold" and "Gate test").
#pragma once

#include "backend/cpu/simd/scores-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

struct Extremes {  // both NaN when one of the values is
  float low = 0;
  float high = 0;
};

HWY_INLINE Extremes extremes_of(const float* values, std::int64_t count) {
  Extremes e{values[0], values[0]};
  bool poisoned = false;
  std::int64_t i = 0;
  if (count >= kLanes) {
    Float low = hn::LoadU(kFloat, values), high = low;
    auto numbers = hn::Eq(low, low);
    for (i = kLanes; i + kLanes <= count; i += kLanes) {
      const Float v = hn::LoadU(kFloat, values + i);
      numbers = hn::And(numbers, hn::Eq(v, v));
      low = hn::Min(low, v);
      high = hn::Max(high, v);
    }
    e.low = hn::GetLane(hn::MinOfLanes(kFloat, low));
    e.high = hn::GetLane(hn::MaxOfLanes(kFloat, high));
    poisoned = !hn::AllTrue(kFloat, numbers);
  }
  for (; i < count; ++i) {
    e.low = min_of(e.low, values[i]);
    e.high = max_of(e.high, values[i]);
    poisoned = poisoned || values[i] != values[i];
  }
  if (poisoned) e.low = e.high = __builtin_nanf("");
  return e;
}

// The gate test of one row tile over its key tiles from right to left.
struct GateTest {
  bool on = false;
  Extremes alpha;
  double scale_log2 = 1;  // softmax_scale * log2 e
  double log2_gamma = 0;  // -inf: never skips
  bool log_sigmoid = true;
  double best = -__builtin_inf();

  // True when the tile stays open. A NaN opens it and says nothing about later tiles.
  HWY_INLINE bool open(const Extremes& delta) {
    double product = -__builtin_inf();
    for (const float a : {alpha.low, alpha.high})
      for (const float d : {delta.low, delta.high}) {
        const double corner = static_cast<double>(a) * static_cast<double>(d);
        if (corner != corner) return true;
        product = max_of(product, corner);
      }
    // The log-sigmoid lies below min(product, 0), which shuts most tiles without its logarithm.
    const bool comparable = __builtin_isfinite(best);
    if (comparable && log_sigmoid && (min_of(product, 0.0) - best) * scale_log2 < log2_gamma) return false;
    const double gate = log_sigmoid
                            ? min_of(product, 0.0) - __builtin_log1p(__builtin_exp(-__builtin_fabs(product)))
                            : product;
    if (comparable && (gate - best) * scale_log2 < log2_gamma) return false;
    best = max_of(best, gate);
    return true;
  }
};

// `first_row` and `rows`: the rows that share the test, all of them in use.
HWY_INLINE GateTest make_gate_test(const Problem& problem, const Sequence& sequence, std::int64_t first_row,
                                   const float* alpha, std::int64_t rows) {
  GateTest test;
  test.on = problem.gate_test;
  if (!test.on) return test;
  test.alpha = extremes_of(alpha, rows);
  test.scale_log2 = problem.softmax_scale * kLog2E;
  test.log_sigmoid = problem.log_sigmoid_gate;
  const double seqlen_k = static_cast<double>(sequence.seqlen_k);
  double gamma = problem.gate_threshold_default ? 1.0 / seqlen_k : problem.gate_threshold;
  if (problem.causal_lengths() && problem.adaptive_gate)
    gamma *= static_cast<double>(first_row + sequence.offset + 1) / seqlen_k;
  test.log2_gamma = gamma > 0 ? __builtin_log2(gamma) : -__builtin_inf();
  return test;
}

// log2 of clamp(threshold / visible_len, 0, 1) for a row.
HWY_INLINE float log2_threshold(const Problem& problem, const Sequence& sequence, std::int64_t row) {
  const std::int64_t visible = problem.causal_lengths() ? row + sequence.offset + 1 : sequence.seqlen_k;
  if (visible <= 0) return 0;  // sees nothing, never votes
  const double share = problem.threshold / static_cast<double>(visible);
  return share >= 1 ? 0.0f : static_cast<float>(__builtin_log2(share));
}

// Largest score of each row over the keys of a tile; NaN where a score is NaN.
HWY_INLINE void row_maxima(const float* scores, std::int64_t keys, std::int64_t lanes, float* maxima,
                           bool propagate_nan) {
  for (std::int64_t r = 0; r < lanes; r += kLanes) {
    Float m0 = hn::Set(kFloat, kNegativeInfinity), m1 = m0;
    std::int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      m0 = hn::Max(m0, hn::Load(kFloat, scores + j * kTilePitch + r));
      m1 = hn::Max(m1, hn::Load(kFloat, scores + (j + 1) * kTilePitch + r));
    }
    if (j < keys) m0 = hn::Max(m0, hn::Load(kFloat, scores + j * kTilePitch + r));
    m0 = hn::Max(m0, m1);
    if (propagate_nan) {  // Max keeps a NaN on some machines and drops it on others
      auto poisoned = hn::Lt(hn::Zero(kFloat), hn::Zero(kFloat));
      for (j = 0; j < keys; ++j)
        poisoned = hn::Or(poisoned, hn::IsNaN(hn::Load(kFloat, scores + j * kTilePitch + r)));
      m0 = hn::IfThenElse(poisoned, hn::NaN(kFloat), m0);
    }
    hn::Store(m0, kFloat, maxima + r);
  }
}

// A row votes keep unless its largest score lies below its cut; the tile is kept when one row does. The cut is
// m + log2 l + log2 thr, and the lowest finite number while the row has no key yet, so that -inf (no visible key) is
// below every cut and a NaN below none.
HWY_INLINE bool vote(const float* maxima, const float* cut, std::int64_t rows) {
  bool keep = false;
  for (std::int64_t r = 0; r < rows; ++r) keep = keep || !(maxima[r] < cut[r]);
  return keep;
}

inline constexpr float kLowestCut = -__FLT_MAX__;

}  // namespace fsa::cpu::FSA_SIMD_TARGET
