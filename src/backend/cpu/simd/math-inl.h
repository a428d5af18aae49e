// SPDX-License-Identifier: Apache-2.0
// Elementary functions of vectors.
#pragma once

#include <hwy/contrib/math/math-inl.h>

#include "backend/cpu/simd/vector-inl.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

HWY_INLINE Float exp2_polynomial(Float f) {  // f in [-0.5, 0.5]
  // Minimax of degree 6 with p(0) = 1: relative error 2e-9 before rounding.
  Float p = hn::Set(kFloat, 1.5353361811343437e-4f);
  p = hn::MulAdd(p, f, hn::Set(kFloat, 1.3398874445209907e-3f));
  p = hn::MulAdd(p, f, hn::Set(kFloat, 9.618437358306862e-3f));
  p = hn::MulAdd(p, f, hn::Set(kFloat, 5.5503324710274124e-2f));
  p = hn::MulAdd(p, f, hn::Set(kFloat, 2.4022647913619632e-1f));
  p = hn::MulAdd(p, f, hn::Set(kFloat, 6.931472028551279e-1f));
  return hn::MulAdd(p, f, hn::Set(kFloat, 1.0f));
}

// 2^x. Relative error below 1e-7 for results >= 2^-126; smaller results are 0 (no denormals, which
// would cost 100 cycles each). -inf gives 0, NaN gives NaN, x > 127.5 is not needed: arguments are <= 0 but for
// rounding.
HWY_INLINE Float exp2(Float x) {
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
  // Four instructions around the polynomial instead of eight. "Not less" keeps a NaN; what is masked out becomes 0.
  const __mmask16 normal = _mm512_cmp_ps_mask(x.raw, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const Float whole{_mm512_roundscale_ps(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const Float p = exp2_polynomial(hn::Sub(x, whole));
  return Float{_mm512_maskz_scalef_ps(normal, p.raw, whole.raw)};
#else
  // x is the second operand, so that a NaN passes through the maximum.
  const Float clamped = hn::Max(hn::Set(kFloat, -127.0f), x);
  const Float whole = hn::Round(clamped);
  const Float p = exp2_polynomial(hn::Sub(clamped, whole));
  // whole = -127 gives the exponent field 0, that is a factor of 0.
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(kInt, whole), hn::Set(kInt, 127)));
  return hn::Mul(p, hn::BitCast(kFloat, exponent));
#endif
}

// e^-|x|, in [0, 1].
HWY_INLINE Float exp_of_minus_abs(Float x) {
  return exp2(hn::Mul(hn::Abs(x), hn::Set(kFloat, -1.442695041f)));
}

// log(sigmoid(x)) = min(x, 0) - log1p(e^-|x|), to 1e-7. log1p(y) / y is a minimax polynomial of degree 8 on [0, 1],
// 3e-8 before rounding: 24 instructions in all, where a kept tile of gated attention needs 8192 of them.
HWY_INLINE Float log_sigmoid(Float x) {
  const Float y = exp_of_minus_abs(x);
  Float p = hn::Set(kFloat, 5.2326930941379795e-3f);
  p = hn::MulAdd(p, y, hn::Set(kFloat, -2.950523979961872e-2f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, 7.822595536708832e-2f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, -1.3663245737552643e-1f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, 1.9106006622314453e-1f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, -2.484298199415207e-1f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, 3.331909775733948e-1f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, -4.999949336051941e-1f));
  p = hn::MulAdd(p, y, hn::Set(kFloat, 9.999999403953552e-1f));
  return hn::NegMulAdd(p, y, hn::Min(x, hn::Zero(kFloat)));
}

// sigmoid(-x), the derivative of log_sigmoid.
HWY_INLINE Float sigmoid_of_minus(Float x) {
  const Float e = exp_of_minus_abs(x);
  const Float one = hn::Set(kFloat, 1.0f);
  const Float numerator = hn::IfThenElse(hn::Ge(x, hn::Zero(kFloat)), e, one);
  return hn::Div(numerator, hn::Add(one, e));
}

HWY_INLINE Float tanh(Float x) { return hn::Tanh(kFloat, x); }

}  // namespace fsa::cpu::FSA_SIMD_TARGET
