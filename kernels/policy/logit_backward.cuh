// SPDX-License-Identifier: Apache-2.0
// The logit chain of the forward and its derivative, on S transposed: keys down (the thread's two), query rows
// across. Nothing is kept per element between the two: what a derivative needs is found again from p =
// 2^(value * scale - lse), which holds the value to 2^-20 wherever p counts.
#pragma once

#include "policy/key_work.cuh"
#include "policy/logit.cuh"
#include "tile/lane_sums.cuh"

namespace fsa::kernels {

// A tile as one thread sees it.
struct LogitRows {
  int32 sequence;
  int32 head;
  int32 distance;                           // position of its first query row less that of its first key
  const float* alpha;                       // of its query rows, four of 16 rows at a time; pair gate
  Extremes alpha_extremes, delta_extremes;  // FoldedPairGate
};

// Element i: query row and key less the thread's first.
constexpr int32 fragment_distance(int32 i) { return fragment_column(0, i) - 8 * fragment_slot(i); }

template <class Stage>
struct LogitBackward;

template <bool kExact>
struct SoftcapBackward {
  static constexpr bool kNeedsValue = true;
  float scale_out, factor;

  FSA_DEVICE SoftcapBackward(const BackwardParams& params, const KeyWork&, int32, float scale_in)
      : scale_out(params.forward.softcap * kLog2e),
        factor(scale_in / scale_out * (kExact ? 2 * kLog2e : 1)) {}

  template <int32 kCount>
  FSA_DEVICE void apply(const BackwardParams&, const LogitRows&, float (&rS)[kCount]) const {
#pragma unroll
    for (int32 i = 0; i < kCount; ++i) {
      if constexpr (kExact)
        rS[i] = 1 - 2 * ptx::reciprocal_approx(1 + ptx::exp2_approx(rS[i] * factor));
      else
        rS[i] = ptx::tanh_approx(rS[i] * factor);
    }
  }
  // Where p = 0 the value is not known, and not needed: the derivative must only be finite.
  template <int32 kCount>
  FSA_DEVICE void derive(const BackwardParams&, const LogitRows&, float (&value)[kCount],
                         float (&gradient)[kCount]) const {
#pragma unroll
    for (int32 i = 0; i < kCount; ++i) gradient[i] *= fmaxf(1 - value[i] * value[i], 0.0f);
  }
};
template <>
struct LogitBackward<Softcap> : SoftcapBackward<false> {
  using SoftcapBackward<false>::SoftcapBackward;
};
template <>
struct LogitBackward<SoftcapExact> : SoftcapBackward<true> {
  using SoftcapBackward<true>::SoftcapBackward;
};

template <>
struct LogitBackward<Alibi> {
  static constexpr bool kNeedsValue = false;
  float scale_out;

  FSA_DEVICE LogitBackward(const BackwardParams&, const KeyWork&, int32, float scale_in)
      : scale_out(scale_in) {}

  template <int32 kCount>
  FSA_DEVICE void apply(const BackwardParams& params, const LogitRows& rows, float (&rS)[kCount]) const {
    add(-slope(params, rows), rows, rS);
  }
  template <int32 kCount>
  FSA_DEVICE void derive(const BackwardParams& params, const LogitRows& rows, float (&value)[kCount],
                         float (&)[kCount]) const {
    add(slope(params, rows), rows, value);
  }

 private:
  FSA_DEVICE float slope(const BackwardParams& params, const LogitRows& rows) const {
    return load_scalar(params.forward.alibi, rows.sequence, 0, rows.head) * kLog2e / scale_out;
  }
  template <int32 kCount>
  FSA_DEVICE static void add(float slope, const LogitRows& rows, float (&values)[kCount]) {
#pragma unroll
    for (int32 i = 0; i < kCount; ++i)
      values[i] +=
          slope * fabsf(static_cast<float>(rows.distance) + static_cast<float>(fragment_distance(i)));
  }
};

// The gate comes first in the chain, so the derivative by its output is that by q k. Sums per key stay in
// registers; sums per query row are left in shared memory, one line per warp.
template <bool kLogSigmoid>
struct LogitBackward<PairGate<kLogSigmoid>> {
  using Gate = PairGate<kLogSigmoid>;
  static constexpr bool kNeedsValue = false;
  float scale_out;
  float delta[kRowsPerThread];
  float doubled_delta_sum[kRowsPerThread] = {0,
                                             0};  // over the thread's query rows; twice the gradient of delta

  FSA_DEVICE LogitBackward(const BackwardParams& params, const KeyWork& work, int32 key, float scale_in)
      : scale_out(scale_in) {
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot)
      delta[slot] = key + 8 * slot < work.seqlen_k
                        ? load_scalar(params.forward.delta, work.k_map_batch,
                                      static_cast<int64>(work.k_begin) + key + 8 * slot, work.kv_head)
                        : 0.0f;
  }

  template <int32 kCount>
  FSA_DEVICE void apply(const BackwardParams&, const LogitRows& rows, float (&rS)[kCount]) const {
#pragma unroll
    for (int32 i = 0; i < kCount; ++i)
      rS[i] = Gate::add(rS[i], alpha(rows, i) * (Gate::kUnit * delta[fragment_slot(i)]));
  }
  template <int32 kCount>
  FSA_DEVICE void derive(const BackwardParams&, const LogitRows&, float (&)[kCount],
                         float (&)[kCount]) const {}

  // alpha_sums: the warp's line, one float per query row in the order of row_vector_position. kCoarse: gradients are
  // rounded to 2^-9.
  template <bool kCoarse, int32 kCount>
  FSA_DEVICE void sum(const LogitRows& rows, const float (&gradient)[kCount], float* alpha_sums) {
    if constexpr (kLogSigmoid)  // sigmoid(-x)
      sum_slopes(rows, gradient, alpha_sums, [](float g, float x) {
        return g * ptx::reciprocal_approx(0.5f + 0.5f * ptx::exp2_approx(2 * kLog2e * x));
      });
    else
      sum_slopes(rows, gradient, alpha_sums, [](float g, float) { return 2 * g; });
  }

 protected:
  // slope(g, x / 2): twice g times the gate's derivative. The thread's sums over its two keys are added up over the eight
  // lanes that share its query rows, by 14 shuffles, not 48.
  template <int32 kCount, class Slope>
  FSA_DEVICE void sum_slopes(const LogitRows& rows, const float (&gradient)[kCount], float* alpha_sums,
                             Slope slope) {
    const float half[kRowsPerThread] = {0.5f * delta[0], 0.5f * delta[1]};
    float sums[kCount / 2];  // four of every 16 query rows
#pragma unroll
    for (int32 i = 0; i < kCount / 2; ++i) sums[i] = 0;
#pragma unroll
    for (int32 i = 0; i < kCount; ++i) {
      const int32 slot = fragment_slot(i);
      const float a = alpha(rows, i), g = slope(gradient[i], a * half[slot]);
      doubled_delta_sum[slot] += g * a;
      sums[sum_of(i)] += g * half[slot];
    }
    int32 first = 0;
    const int32 lane = own_lane();
    sum_lanes<8, 4>(sums, lane, [&](int32 n) { first += n; });
    float* const to = alpha_sums + first / 4 * 16 + lane % 4 * 4 + first % 4;
    static_assert(kCount == 32 || kCount == 16, "two or one sum remain");
    if constexpr (kCount == 32)
      *reinterpret_cast<float2*>(to) = {sums[0], sums[1]};
    else
      *to = sums[0];
  }

 protected:
  FSA_DEVICE static float alpha(const LogitRows& rows, int32 i) {
    return rows.alpha[i / 8 * 16 + i % 8 / 4 * 2 + i % 2];
  }
  // Which of the thread's query rows.
  static constexpr int32 sum_of(int32 i) { return i / 8 * 4 + i % 8 / 4 * 2 + i % 2; }
};

template <bool kLogSigmoid>
struct LogitBackward<FoldedPairGate<kLogSigmoid>> : LogitBackward<PairGate<kLogSigmoid>> {
  using Base = LogitBackward<PairGate<kLogSigmoid>>;
  using Base::Base;
  static constexpr float kGentle = 2;

  template <int32 kCount>
  FSA_DEVICE void apply(const BackwardParams& params, const LogitRows& rows, float (&rS)[kCount]) const {
    const GateRange range = gate_range<kLogSigmoid>(rows.alpha_extremes, rows.delta_extremes);
    if (range == GateRange::near) return;
    if (range == GateRange::far) {
#pragma unroll
      for (int32 i = 0; i < kCount; ++i) rS[i] += Base::alpha(rows, i) * this->delta[fragment_slot(i)];
    } else {
      Base::apply(params, rows, rS);
    }
  }

  // sigmoid(-x) = 1 / 2 - tanh(x / 2) / 2, right to 2^-12: where it is above 1 / 9, to 2^-9.
  template <bool kCoarse, int32 kCount>
  FSA_DEVICE void sum(const LogitRows& rows, const float (&gradient)[kCount], float* alpha_sums) {
    if (kLogSigmoid && kCoarse && rows.alpha_extremes.largest_product(rows.delta_extremes) <= kGentle)
      Base::sum_slopes(rows, gradient, alpha_sums,
                       [](float g, float half_x) { return g - g * ptx::tanh_approx(half_x); });
    else
      Base::template sum<kCoarse>(rows, gradient, alpha_sums);
  }
};

// A whole chain.
template <>
struct LogitBackward<Logit<>> {
  static constexpr bool kNeedsValue = false;
  static constexpr bool kPlain = true;  // the value is q k, or q k with the gate folded in
  float scale_out;

  FSA_DEVICE LogitBackward(const BackwardParams&, const KeyWork&, int32, float scale_in)
      : scale_out(scale_in) {}
  FSA_DEVICE float scale() const { return scale_out; }
  template <int32 kCount>
  FSA_DEVICE void apply(const BackwardParams&, const LogitRows&, float (&)[kCount]) const {}
  template <int32 kCount>
  FSA_DEVICE void derive(const BackwardParams&, const LogitRows&, float (&)[kCount],
                         float (&)[kCount]) const {}
};

template <class First, class... Rest>
struct LogitBackward<Logit<First, Rest...>> {
  static constexpr bool kNeedsValue =
      LogitBackward<First>::kNeedsValue || LogitBackward<Logit<Rest...>>::kNeedsValue;
  static constexpr bool kPlain = First::kGateTerms && LogitBackward<Logit<Rest...>>::kPlain;
  LogitBackward<First> first;
  LogitBackward<Logit<Rest...>> rest;

  // `key`: the thread's first, from the start of the sequence.
  FSA_DEVICE LogitBackward(const BackwardParams& params, const KeyWork& work, int32 key, float scale_in)
      : first(params, work, key, scale_in), rest(params, work, key, first.scale_out) {}
  FSA_DEVICE float scale() const { return rest.scale(); }

  template <int32 kCount>
  FSA_DEVICE void apply(const BackwardParams& params, const LogitRows& rows, float (&rS)[kCount]) const {
    first.apply(params, rows, rS);
    rest.apply(params, rows, rS);
  }
  // Turns derivatives by the chain's output into derivatives by q k; `value` holds that output and is used up.
  template <int32 kCount>
  FSA_DEVICE void derive(const BackwardParams& params, const LogitRows& rows, float (&value)[kCount],
                         float (&gradient)[kCount]) const {
    rest.derive(params, rows, value, gradient);
    first.derive(params, rows, value, gradient);
  }
};

}  // namespace fsa::kernels
