// SPDX-License-Identifier: Apache-2.0
// What happens to Q K^T before masks and softmax: a chain of stages,
//
//   S = softcap(scale (q k + g(alpha delta))) - slope |distance|
//
// A stage gets values x with the logit x * scale_in (in log2 units) and leaves values with scale_out. The last
// scale_out is multiplied inside the exponent, for free; no stage, no code. State is per work tile: the
// thread's two rows.
#pragma once

#include "policy/gate_terms.cuh"
#include "policy/scalar.cuh"
#include "policy/work_tile.cuh"
#include "ptx/math.cuh"
#include "tile/fragment.cuh"

namespace fsa::kernels {

inline constexpr float kLog2e = 1.44269504088896341f;

// What a stage may know of a tile.
struct LogitTile {
  int32 key_begin;           // from the start of the sequence
  const float* key_scalars;  // [block_n] in shared memory; PairGate
  GateRange gate_range;      // FoldedPairGate
};

// tanh by the special function unit: relative error up to 2^-11, below that of a logit rounded to bf16. One
// more per element than dense; an exact one would be two more.
struct Softcap {
  static constexpr bool kKeyScalars = false;
  static constexpr bool kGateTerms = false;
  static constexpr bool kLogGate = false;  // its terms are those of log sigmoid
  static constexpr bool kBounded = false;
  float scale_out, factor;

  FSA_DEVICE Softcap(const ForwardParams& params, const WorkTile&, int32, float scale_in)
      : scale_out(params.softcap * kLog2e), factor(scale_in / scale_out) {}

  template <int32 kCount>
  FSA_DEVICE void apply(const LogitTile&, float (&rS)[kCount]) const {
#pragma unroll
    for (int32 i = 0; i < kCount; ++i) rS[i] = ptx::tanh_approx(rS[i] * factor);
  }
};

// The same for caps up to kLargestBoundedCap. Where it comes last (kBounded) p = 2^logit lies between 2^-55 and 2^55,
// which float32 and bf16 hold without a row maximum and fp16 does not. Finding and subtracting one made a step a
// seventh longer.
struct SoftcapBounded : Softcap {
  static constexpr bool kBounded = true;
  using Softcap::Softcap;
};

// Absolute error 2^-22 of the cap: where tiles are voted on, 2^-11 of a large logit would be felt.
struct SoftcapExact {
  static constexpr bool kKeyScalars = false;
  static constexpr bool kGateTerms = false;
  static constexpr bool kLogGate = false;
  static constexpr bool kBounded = false;
  float scale_out, factor;

  FSA_DEVICE SoftcapExact(const ForwardParams& params, const WorkTile&, int32, float scale_in)
      : scale_out(params.softcap * kLog2e), factor(2 * kLog2e * scale_in / scale_out) {}

  // tanh x = 1 - 2 / (1 + e^2x), right at both ends: e^2x = 0 gives -1, infinity gives 1.
  template <int32 kCount>
  FSA_DEVICE void apply(const LogitTile&, float (&rS)[kCount]) const {
#pragma unroll
    for (int32 i = 0; i < kCount; ++i)
      rS[i] = 1 - 2 * ptx::reciprocal_approx(1 + ptx::exp2_approx(rS[i] * factor));
  }
};

struct Alibi {
  static constexpr bool kKeyScalars = false;
  static constexpr bool kGateTerms = false;
  static constexpr bool kLogGate = false;
  static constexpr bool kBounded = false;
  float scale_out;
  float slope;  // in units of the values
  int32 position;

  FSA_DEVICE Alibi(const ForwardParams& params, const WorkTile& work, int32 row, float scale_in)
      : scale_out(scale_in),
        slope(load_scalar(params.alibi, work.sequence, 0, work.head) * kLog2e / scale_in),
        position(row + work.offset()) {}

  template <int32 kCount>
  FSA_DEVICE void apply(const LogitTile& tile, float (&rS)[kCount]) const {
    float distance[kRowsPerThread];  // from the row to the thread's first key
    distance[0] = static_cast<float>(position - tile.key_begin - fragment_column(lane_id(), 0));
    distance[1] = distance[0] + 8;
#pragma unroll
    for (int32 i = 0; i < kCount; ++i)
      rS[i] -= slope * fabsf(distance[fragment_slot(i)] - static_cast<float>(fragment_column(0, i)));
  }
};

// g(alpha delta) added to q k; delta comes with K.
template <bool kLogSigmoid>
struct PairGate {
  static constexpr bool kKeyScalars = true;
  static constexpr bool kGateTerms = false;
  static constexpr bool kLogGate = false;
  static constexpr bool kBounded = false;
  static constexpr float kUnit = kLogSigmoid ? kLog2e : 1;
  float scale_out;
  float alpha[kRowsPerThread];  // times kUnit

  FSA_DEVICE PairGate(const ForwardParams& params, const WorkTile& work, int32 row, float scale_in)
      : scale_out(scale_in) {
#pragma unroll
    for (int32 slot = 0; slot < kRowsPerThread; ++slot)
      alpha[slot] =
          row + 8 * slot < work.seqlen_q
              ? kUnit * load_scalar(params.alpha, work.q_map_batch, work.q_begin + row + 8 * slot, work.head)
              : 0.0f;
  }

  // log sigmoid x = min(x, 0) - log(1 + e^-|x|)
  FSA_DEVICE static float gate(float x) {
    if constexpr (!kLogSigmoid) return x;
    return fminf(x, 0.0f) - kLn2 * ptx::log2_approx(1 + ptx::exp2_approx(-kLog2e * fabsf(x)));
  }

  // value + gate(x / kUnit). The logarithm of 1 + y by a polynomial, right to 1e-5 (times softmax_scale in a logit): a
  // special function takes a warp as long as four or five other instructions. Degree 3 would do for out, not for lse.
  FSA_DEVICE static float add(float value, float x) {
    if constexpr (!kLogSigmoid) return value + x;
    const float y = ptx::exp2_approx(-fabsf(x));
    float p = 0.0321481787f;
    p = p * y - 0.136035472f;
    p = p * y + 0.289449185f;
    p = p * y - 0.491899014f;
    p = p * y + 0.999494195f;
    return value + kLn2 * fminf(x, 0.0f) - y * p;
  }

  template <int32 kCount>
  FSA_DEVICE void apply(const LogitTile& tile, float (&rS)[kCount]) const {
    with_products(tile, rS, [](float value, float x) { return add(value, x); });
  }

  // What log sigmoid is far below 0.
  template <int32 kCount>
  FSA_DEVICE void add_products(const LogitTile& tile, float (&rS)[kCount]) const {
    with_products(tile, rS, [](float value, float x) { return value + x * (1 / kUnit); });
  }

 private:
  template <int32 kCount, class Function>
  FSA_DEVICE void with_products(const LogitTile& tile, float (&rS)[kCount], Function f) const {
    const float2* const pairs =
        reinterpret_cast<const float2*>(tile.key_scalars + fragment_column(lane_id(), 0));
#pragma unroll
    for (int32 i = 0; i < kCount; i += 4) {
      const float2 delta = pairs[fragment_column(0, i) / 2];
      rS[i] = f(rS[i], alpha[0] * delta.x);
      rS[i + 1] = f(rS[i + 1], alpha[0] * delta.y);
      rS[i + 2] = f(rS[i + 2], alpha[1] * delta.x);
      rS[i + 3] = f(rS[i + 3], alpha[1] * delta.y);
    }
  }
};

// Which Q K^T holds already where the tile's terms do (gate_terms.cuh).
template <bool kLogSigmoid>
struct FoldedPairGate : PairGate<kLogSigmoid> {
  using Base = PairGate<kLogSigmoid>;
  static constexpr bool kGateTerms = true;
  static constexpr bool kLogGate = kLogSigmoid;
  using Base::Base;

  template <int32 kCount>
  FSA_DEVICE void apply(const LogitTile& tile, float (&rS)[kCount]) const {
    if (tile.gate_range == GateRange::near) return;
    if (tile.gate_range == GateRange::far)
      this->add_products(tile, rS);
    else
      Base::apply(tile, rS);
  }
};

template <class... Stages>
struct Logit;

template <>
struct Logit<> {
  static constexpr bool kKeyScalars = false;
  static constexpr bool kGateTerms = false;
  static constexpr bool kLogGate = false;
  static constexpr bool kBounded = false;
  float scale_out;

  FSA_DEVICE Logit(const ForwardParams&, const WorkTile&, int32, float scale_in) : scale_out(scale_in) {}
  FSA_DEVICE float scale() const { return scale_out; }
  template <int32 kCount>
  FSA_DEVICE void apply(const LogitTile&, float (&)[kCount]) const {}
};

template <class First, class... Rest>
struct Logit<First, Rest...> {
  static constexpr bool kKeyScalars = First::kKeyScalars || Logit<Rest...>::kKeyScalars;
  static constexpr bool kGateTerms = First::kGateTerms;  // the gate comes first
  static constexpr bool kLogGate = First::kLogGate;
  static constexpr bool kBounded =
      sizeof...(Rest) == 0 ? First::kBounded : Logit<Rest...>::kBounded;  // the last stage's
  First first;
  Logit<Rest...> rest;

  // `row`: the thread's first, from the start of the sequence.
  FSA_DEVICE Logit(const ForwardParams& params, const WorkTile& work, int32 row, float scale_in)
      : first(params, work, row, scale_in), rest(params, work, row, first.scale_out) {}
  FSA_DEVICE float scale() const { return rest.scale(); }

  template <int32 kCount>
  FSA_DEVICE void apply(const LogitTile& tile, float (&rS)[kCount]) const {
    first.apply(tile, rS);
    rest.apply(tile, rS);
  }
};

}  // namespace fsa::kernels
