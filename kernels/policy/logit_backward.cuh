// SPDX-License-Identifier: Apache-2.0
// The logit chain of the forward and its derivative, on S transposed: keys down (the thread's two), query rows
// across. Nothing is kept per element between the two: what a derivative needs is found again from p =
// 2^(value * scale - lse), which holds the value to 2^-20 wherever p counts.
#pragma once

#include "policy/key_work.cuh"
#include "policy/logit.cuh"

namespace fsa::kernels {

// A tile as one thread sees it.
struct LogitRows {
  int32 sequence;
  int32 head;
  int32 distance;      // position of its first query row less that of its first key
  const float* alpha;  // of its query rows, four of 16 rows at a time; pair gate
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
  float delta_sum[kRowsPerThread] = {0, 0};  // over the thread's query rows

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

  // alpha_sums: the warp's line, one float per query row in the order of row_vector_position.
  template <int32 kCount>
  FSA_DEVICE void sum(const LogitRows& rows, const float (&gradient)[kCount], float* alpha_sums) {
#pragma unroll
    for (int32 i = 0; i < kCount; i += 8) {  // 16 query rows, of which the thread has four
      float sums[4] = {0, 0, 0, 0};
#pragma unroll
      for (int32 j = 0; j < 8; ++j) {
        const int32 slot = fragment_slot(j), row = j / 4 * 2 + j % 2;
        const float a = rows.alpha[2 * i + row];
        float g = gradient[i + j];
        if constexpr (kLogSigmoid)  // sigmoid(-alpha delta)
          g *= ptx::reciprocal_approx(1 + ptx::exp2_approx(kLog2e * a * delta[slot]));
        delta_sum[slot] += g * a;
        sums[row] += g * delta[slot];
      }
#pragma unroll
      for (int32 row = 0; row < 4; ++row) {
#pragma unroll
        for (int32 distance = 4; distance < kWarpThreads; distance *= 2)
          sums[row] += __shfl_xor_sync(0xffffffffu, sums[row], distance);
      }
      if (own_lane() < 4)
        *reinterpret_cast<float4*>(alpha_sums + 2 * i + 4 * own_lane()) =
            make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
  }

 private:
  FSA_DEVICE static float alpha(const LogitRows& rows, int32 i) {
    return rows.alpha[i / 8 * 16 + i % 8 / 4 * 2 + i % 2];
  }
};

// A whole chain.
template <>
struct LogitBackward<Logit<>> {
  static constexpr bool kNeedsValue = false;
  static constexpr bool kPlain = true;  // the value is q k
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
  static constexpr bool kPlain = false;
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
