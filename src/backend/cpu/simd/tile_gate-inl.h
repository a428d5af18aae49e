// SPDX-License-Identifier: Apache-2.0
// The pair gate of bfloat16 tiles: log(sigmoid(alpha_i delta_j)) joins the scores of 16 rows, and its slope.
#pragma once

#include "backend/cpu/simd/scores-inl.h"
#include "backend/cpu/simd/tiles-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

// 2^-|x|, in [0, 1].
HWY_INLINE Float exp2_of_minus_abs(Float x) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return exp2_short(Float{_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(x.raw), sign))});
}

// log(sigmoid(x / log2 e)) = min(x, 0) ln 2 - log1p(y), y = 2^-|x|, to 3e-6: 1.5e-6 each from y and from the polynomial
// of degree 5 for log1p(y) / y. The sum of a row loses as much to the exponentials. 16 instructions.
HWY_INLINE Float log_sigmoid_short(Float x, Float y) {
  Float p = hn::Set(kFloat, -1.8338900059461594e-2f);
  p = hn::MulAdd(p, y, hn::Set(kFloat, 8.557002991437912e-2f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, -1.9376105070114136e-1f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, 3.1764909625053406e-1f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, -4.978750944137573e-1f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, 9.999016523361206e-1f));
  const Float linear = hn::Mul(hn::Min(x, hn::Zero(kFloat)), hn::Set(kFloat, 6.931471806e-1f));
  return hn::NegMulAdd(p, y, linear);
}

// Near 0: log(sigmoid(x)) = x / 2 - log(2 cosh(x / 2)), whose second term depends on |x| alone. It is a quadratic in
// w = 1 + 1.6 |x|, one of eight to an octave; w stays below 16, so the last two bits of its exponent and the first three
// of its mantissa choose one. Nine instructions; to 1.3e-5, so where softmax_scale is at most 0.23 a logit is right to
// 3e-6, as with the long form.
inline constexpr float kNearUnit = 1.6f;
inline constexpr float kNear = 9.3f;
static_assert(1 + kNearUnit * kNear < 15.9f, "w below 16 after rounding");
inline constexpr double kNearScale = 0.23;

// Coefficients of -log(2 cosh(x / 2)), constant term first.
alignas(64) inline constexpr float kLogCosh[3][32] = {
    {
        -0.724805474f, -0.712429345f,  -0.695579767f,  -0.673993409f, -0.647657752f, -0.616798937f,
        -0.581846833f, -0.543387234f,  -0.481276274f,  -0.392051488f, -0.301474243f, -0.21404998f,
        -0.132912517f, -0.0598872639f, 0.00425995514f, 0.0595259741f, 0.125937283f,  0.191551059f,
        0.235525042f,  0.264229059f,   0.282594532f,   0.294161052f,  0.301352322f,  0.305775344f,
        -0.741953075f, -0.741762161f,  -0.741297424f,  -0.740464687f, -0.739163578f, -0.737290561f,
        -0.734741867f, -0.731416583f,
    },
    {
        0.0783076882f,  0.0673196763f,  0.0538497865f, 0.038157206f,  0.0206037462f, 0.00161471521f,
        -0.0183589924f, -0.0388736054f, -0.069585599f, -0.109283917f, -0.14555952f,  -0.177391499f,
        -0.204472855f,  -0.226971313f,  -0.245322272f, -0.260077864f, -0.276531428f, -0.291175216f,
        -0.30000481f,   -0.305242747f,  -0.308313936f, -0.310098946f, -0.311129242f, -0.31172061f,
        0.0976130962f,  0.0972762331f,  0.096535258f,  0.0953266025f, 0.0935943648f, 0.0912915617f,
        0.0883810669f,  0.0848362744f,
    },
    {
        -0.0432522818f,   -0.0408127606f,   -0.0381201766f,   -0.0352676846f,   -0.0323422924f,
        -0.0294207036f,   -0.0265668556f,   -0.0238309465f,   -0.0200339779f,   -0.0156171555f,
        -0.011984366f,    -0.0090862941f,   -0.00682622567f,  -0.00509311724f,  -0.00378054054f,
        -0.00279554166f,  -0.00177629991f,  -0.000959047989f, -0.000515732856f, -0.000276740786f,
        -0.000148326624f, -7.94503139e-05f, -4.25429789e-05f, -2.2776283e-05f,  -0.0488071777f,
        -0.0486585721f,   -0.0483631678f,   -0.047924526f,    -0.0473478734f,   -0.0466399826f,
        -0.0458089858f,   -0.0448642001f,
    }};

// Those of tanh(x / 2) / (2 x): 1/2 - x times it is sigmoid(-x), to 1.6e-5.
alignas(64) inline constexpr float kTanhRatio[3][32] = {
    {
        0.248404369f, 0.252852291f, 0.258633196f, 0.265641689f, 0.273660094f, 0.282387048f, 0.29147318f,
        0.300557822f, 0.313278049f, 0.327712744f, 0.337756932f, 0.342953324f, 0.343555152f, 0.3402282f,
        0.333801955f, 0.325104266f, 0.309527308f, 0.286408573f, 0.26333195f,  0.241764307f, 0.222285375f,
        0.20499748f,  0.189774275f, 0.176398024f, 0.241870865f, 0.241947129f, 0.242132172f, 0.242461979f,
        0.242973492f, 0.243702903f, 0.244684011f, 0.245946646f,
    },
    {
        0.0088786548f,  0.00492835511f, 0.000305399735f, -0.00479141111f, -0.0101380041f, -0.0155103412f,
        -0.0207049698f, -0.0255530067f, -0.031849768f,   -0.0382872857f,  -0.0423225462f, -0.044224754f,
        -0.0444336496f, -0.0434149317f, -0.0415814891f,  -0.0392631963f,  -0.0354136527f, -0.0302707013f,
        -0.0256487336f, -0.021721473f,  -0.0184703227f,  -0.0158071127f,  -0.0136297382f, -0.0118442886f,
        0.0162587836f,  0.0161242299f,  0.0158291999f,   0.0153504871f,   0.0146694388f,  0.013772605f,
        0.0126521578f,  0.0113060782f,
    },
    {
        -0.00599833904f, -0.00512102898f,  -0.00419659819f,  -0.0032697944f,  -0.00237840414f,
        -0.00155149435f, -0.000808961748f, -0.000162110504f, 0.000617242942f, 0.00133516325f,
        0.00174053293f,  0.00191463763f,   0.00193273905f,   0.00185474847f,  0.00172396202f,
        0.00156946713f,  0.001331607f,     0.00104551099f,   0.000814032275f, 0.000635222706f,
        0.000499544258f, 0.000396964489f,  0.000319098792f,  0.000259513297f, -0.00812964421f,
        -0.00807028636f, -0.00795266312f,  -0.0077789221f,   -0.00755219441f, -0.0072764894f,
        -0.00695656287f, -0.00659777084f,
    }};

// Three coefficients of 32 quadratics.
struct Quadratics {
  __m512 low[3], high[3];

  HWY_INLINE explicit Quadratics(const float (&table)[3][32]) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      low[i] = _mm512_load_ps(table[i]);
      high[i] = _mm512_load_ps(table[i] + 16);
    }
  }
  HWY_INLINE Float of(int i, Float w) const {
    const __m512i piece = _mm512_srli_epi32(_mm512_castps_si512(w.raw), 20);
    return Float{_mm512_permutex2var_ps(low[i], piece, high[i])};
  }
};

// The keys of a tile.
struct GateKeys {
  const float* delta;
  alignas(64) float sizes[kMostTileKeys];  // |delta|; 0 beyond the last key
  Float largest;                           // of the sizes, in every lane; a NaN is larger than all

  HWY_INLINE GateKeys(const float* tile_delta, std::int64_t keys) : delta(tile_delta) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i most = _mm512_setzero_si512();
    for (std::int64_t j = 0; j < round_up(keys, kTileTerms); j += kLanes) {
      const auto left =
          static_cast<unsigned>(max_of<std::int64_t>(min_of<std::int64_t>(keys - j, kLanes), 0));
      const __m512i bits = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << left) - 1), delta + j);
      const __m512i size = _mm512_and_si512(bits, magnitude);
      most = _mm512_max_epu32(most, size);
      _mm512_store_si512(sizes + j, size);
    }
    largest = Float{_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(_mm512_reduce_max_epu32(most))))};
  }
};

// The gate of 16 rows whose products with the keys of a tile are all near 0.
struct NearGate {
  Float alpha, half, unit;  // alpha, alpha / 2, 1.6 |alpha|

  HWY_INLINE explicit NearGate(Float rows)
      : alpha(rows),
        half(hn::Mul(rows, hn::Set(kFloat, 0.5f))),
        unit(hn::Mul(hn::Abs(rows), hn::Set(kFloat, kNearUnit))) {}

  // w, of a key with |delta| = size.
  HWY_INLINE Float argument(float size) const {
    return hn::MulAdd(unit, hn::Set(kFloat, size), hn::Set(kFloat, 1.0f));
  }
  // scores + log(sigmoid(alpha delta))
  HWY_INLINE Float add(const Quadratics& log_cosh, Float w, float delta, Float scores) const {
    const Float s = hn::MulAdd(half, hn::Set(kFloat, delta), scores);
    return hn::MulAdd(hn::MulAdd(log_cosh.of(2, w), w, log_cosh.of(1, w)), w, hn::Add(s, log_cosh.of(0, w)));
  }
  // sigmoid(-alpha delta)
  HWY_INLINE Float slope(const Quadratics& tanh_ratio, Float w, float delta) const {
    const Float ratio =
        hn::MulAdd(hn::MulAdd(tanh_ratio.of(2, w), w, tanh_ratio.of(1, w)), w, tanh_ratio.of(0, w));
    return hn::NegMulAdd(ratio, hn::Mul(alpha, hn::Set(kFloat, delta)), hn::Set(kFloat, 0.5f));
  }
};

// Far from 0: alpha times log2 e, so that products are arguments of 2^x. y = 2^-|x| serves the gate and its slope.
struct FarGate {
  Float alpha;

  explicit HWY_INLINE FarGate(Float rows)
      : alpha(hn::Mul(rows, hn::Set(kFloat, static_cast<float>(kLog2E)))) {}

  HWY_INLINE Float argument(float delta) const { return hn::Mul(alpha, hn::Set(kFloat, delta)); }
  HWY_INLINE Float add(Float x, Float y, Float scores) const {
    return hn::Add(scores, log_sigmoid_short(x, y));
  }
  // sigmoid(-x) = (x < 0 ? 1 : y) / (1 + y)
  HWY_INLINE Float slope(Float x, Float y) const {
    const Float one = hn::Set(kFloat, 1.0f);
    const __m512 numerator =
        _mm512_mask_mov_ps(y.raw, _mm512_movepi32_mask(_mm512_castps_si512(x.raw)), one.raw);
    return Float{_mm512_mul_ps(numerator, _mm512_rcp14_ps(hn::Add(y, one).raw))};
  }
};

// The gate of 16 rows, from `first_row` on, and the keys of a tile.
struct TileGate {
  Float alpha;
  bool log_sigmoid;
  bool near;  // every product is at most kNear, and the scale small enough

  HWY_INLINE TileGate(const LogitPolicies& logit, const RowTile& tile, std::int64_t first_row,
                      const GateKeys& keys)
      : alpha(hn::LoadU(kFloat, tile.alpha + first_row)), log_sigmoid(logit.log_sigmoid) {
    const Float largest = hn::Mul(hn::Abs(alpha), keys.largest);
    near = log_sigmoid && __builtin_fabsf(logit.pre_scale) <= static_cast<float>(kNearScale * kLog2E) &&
           hn::AllTrue(kFloat, hn::Le(largest, hn::Set(kFloat, kNear)));
  }

  // For the keys [begin, end) f(j, add), where add(scores) is the scores of key j, before the scale, with the gate.
  template <class F>
  HWY_INLINE void for_keys(const GateKeys& keys, std::int64_t begin, std::int64_t end, const F& f) const {
    const float* const delta = keys.delta;
    const float* const sizes = keys.sizes;
    if (near) {
      const NearGate gate(alpha);
      const Quadratics log_cosh(kLogCosh);
      for (std::int64_t j = begin; j < end; ++j)
        f(j, [&](Float scores)
                 HWY_ATTR { return gate.add(log_cosh, gate.argument(sizes[j]), delta[j], scores); });
    } else if (log_sigmoid) {
      const FarGate gate(alpha);
      for (std::int64_t j = begin; j < end; ++j)
        f(j, [&](Float scores) HWY_ATTR {
          const Float x = gate.argument(delta[j]);
          return gate.add(x, exp2_of_minus_abs(x), scores);
        });
    } else {
      for (std::int64_t j = begin; j < end; ++j)
        f(j, [&](Float scores) HWY_ATTR { return hn::MulAdd(alpha, hn::Set(kFloat, delta[j]), scores); });
    }
  }
};

}  // namespace fsa::cpu::FSA_SIMD_TARGET
