// SPDX-License-Identifier: Apache-2.0
// The pair gate as columns of Q K^T. Where |x| <= kNearGate, x = alpha delta,
//
//   log sigmoid x = x / 2 + c0 + c1 x^2 + ... + c7 x^14   (to 4e-6)
//
// is a sum of products of a power of alpha and one of delta: nine inner values of one more multiply; without log sigmoid
// there is one, which holds everywhere. Each factor is
// split into bfloat16 parts (h, m, l: 8 bits, 8 of the rest, 8 of the rest of that), of whose products those count that
// are above 2^-17 of the largest: 32 inner values, two steps of a multiply, instead of ten instructions an element.
// Absolute error 3e-6 root mean square, 5e-5 at most where |x| is near 4, times softmax_scale in a logit.
#pragma once

#include "core/base.cuh"
#include "core/config.h"
#include "ptx/math.cuh"
#include "ptx/sync.cuh"

namespace fsa::kernels {

inline constexpr float kNearGate = 4;
// Of alpha and delta: 256^14 is finite.
template <bool kLogSigmoid>
inline constexpr float kLargestGateFactor = kLogSigmoid ? 256.0f : 1e18f;
// Multiplies of 16 inner values.
template <bool kLogSigmoid>
inline constexpr int32 kGateSteps = kLogSigmoid ? kGateTerms / 16 : 1;
inline constexpr float kFarGate = -17;  // below it log sigmoid x = x to 2^-24

// {smallest, largest}; NaN when one value is NaN.
struct Extremes {
  float low = kInfinity;
  float high = -kInfinity;

  FSA_DEVICE void include(const Extremes& other) {
    low = ptx::min_nan(low, other.low);
    high = ptx::max_nan(high, other.high);
  }
  FSA_DEVICE void reduce_warp() {
#pragma unroll
    for (int32 distance = kWarpThreads / 2; distance > 0; distance /= 2)
      include({__shfl_xor_sync(0xffffffffu, low, distance), __shfl_xor_sync(0xffffffffu, high, distance)});
  }
  FSA_DEVICE float magnitude() const { return ptx::max_nan(fabsf(low), fabsf(high)); }
  // Of the product with a value of `other`.
  FSA_DEVICE float largest_product(const Extremes& other) const {
    return ptx::max_nan(ptx::max_nan(low * other.low, low * other.high),
                        ptx::max_nan(high * other.low, high * other.high));
  }
};

// What is known of all x of a tile: the terms hold, or the gate is x.
enum class GateRange : int32 { any, near, far };

template <bool kLogSigmoid>
FSA_DEVICE bool has_gate_terms(const Extremes& factors) {
  return factors.magnitude() <= kLargestGateFactor<kLogSigmoid>;
}

template <bool kLogSigmoid>
FSA_DEVICE GateRange gate_range(const Extremes& alpha, const Extremes& delta) {
  if (has_gate_terms<kLogSigmoid>(alpha) && has_gate_terms<kLogSigmoid>(delta) &&
      (!kLogSigmoid || alpha.magnitude() * delta.magnitude() <= kNearGate))
    return GateRange::near;
  return !kLogSigmoid || alpha.largest_product(delta) <= kFarGate ? GateRange::far : GateRange::any;
}

// A tile of terms: units of eight columns, of a unit the rows one behind the other. No swizzle: a multiply reads eight
// rows of a unit, 128 bytes side by side.
template <int32 kRows>
struct GateTermRows {
  static constexpr int32 kUnitStride = kRows * 16;
  static constexpr int32 kBytes = kGateTerms / 8 * kUnitStride;

  static constexpr int32 unit_offset(int32 row, int32 unit) { return unit * kUnitStride + row * 16; }
  // Of 16 columns, as A or as B of a product over columns.
  FSA_DEVICE static uint64 inner_columns(uint32 address, int32 step) {
    constexpr uint64 kRowGroupStride = uint64{8 * 16 >> 4} << 32;
    return kRowGroupStride | static_cast<uint64>(kUnitStride >> 4) << 16 |
           static_cast<uint64>(((address + step * (2 * kUnitStride)) & 0x3ffff) >> 4);
  }
};

// An operand of any number of rows.
struct alignas(128) ZeroTerms {
  uint8 bytes[kZeroTermBytes];

  FSA_DEVICE void fill() {
#pragma unroll
    for (int32 i = 0; i < kZeroTermBytes; i += 16)
      *reinterpret_cast<uint4*>(bytes + i) = make_uint4(0, 0, 0, 0);
    ptx::fence_shared_for_async();
  }
  FSA_DEVICE uint64 inner_columns() const {
    return static_cast<uint64>((shared_address(bytes) & 0x3ffff) >> 4);
  }
};

namespace gate_terms_detail {

struct Column {
  int32 power;  // 0: the constant, 1: x, k: x^(2k - 2)
  int32 part;   // of three
};
inline constexpr int32 kPowers = 9;
inline constexpr float kConstant = -0.693150915f;
inline constexpr float kCoefficients[] = {
    0.5f,           -0.124969807f,    0.00516654028f,  -0.000324036819f,
    1.95469066e-5f, -9.07181136e-07f, 2.63210344e-08f, -3.43600594e-10f};

// Column by column the part of alpha's factor, and that of delta's. The first powers have room for smaller products.
constexpr Column column(int32 i, bool keys) {
  constexpr int32 kRowParts[] = {0, 0, 0, 0, 0, 1, 1, 0, 2, 0, 0, 1, 0, 2};
  constexpr int32 kKeyParts[] = {0, 1, 2, 0, 1, 0, 1, 2, 0, 0, 1, 0, 2, 0};
  if (i < 14) return {i < 3 ? 0 : i < 9 ? 1 : 2, keys ? kKeyParts[i] : kRowParts[i]};
  const int32 product = (i - 14) % 3;  // h h, h m, m h
  return {3 + (i - 14) / 3, product == (keys ? 1 : 2) ? 1 : 0};
}
static_assert(column(kGateTerms - 1, false).power == kPowers - 1);

}  // namespace gate_terms_detail

// The terms of one row, two columns a word. The coefficients lie with the keys.
template <bool kLogSigmoid, bool kKeys>
FSA_DEVICE void make_gate_terms(float value, uint32 (&terms)[kGateTerms / 2]) {
  using namespace gate_terms_detail;
  constexpr ElementType kBf16 = ElementType::bf16;
  float parts[kPowers][3];
  const float square = value * value;
  float power = 1;
#pragma unroll
  for (int32 k = 0; k < kPowers; ++k) {
    if (k >= 2) power *= square;
    float rest = k == 0 ? 1.0f : k == 1 ? value : power;
    if (kKeys && kLogSigmoid) rest *= k == 0 ? kConstant : kCoefficients[max_of(k, 1) - 1];
    if (!kLogSigmoid && k != 1) rest = 0;
#pragma unroll
    for (int32 part = 0; part < 3; ++part) {
      parts[k][part] = ptx::unpack<kBf16>(ptx::pack<kBf16>(rest, 0.0f)).x;
      rest -= parts[k][part];
    }
  }
#pragma unroll
  for (int32 i = 0; i < kGateTerms; i += 2) {
    const Column a = column(i, kKeys), b = column(i + 1, kKeys);
    terms[i / 2] = ptx::pack<kBf16>(parts[a.power][a.part], parts[b.power][b.part]);
  }
}

// One row of a GateTermTile: zeros where it is not `used`, or where the tile has no terms. Row 0 adds the extremes.
template <bool kLogSigmoid, bool kKeys, int32 kRows>
FSA_DEVICE void store_gate_terms(uint8* tile, int32 row, float value, bool used, const Extremes& extremes) {
  if (row == 0)
    *reinterpret_cast<float2*>(tile + GateTermRows<kRows>::kBytes) = {extremes.low, extremes.high};
  const bool there = used && has_gate_terms<kLogSigmoid>(extremes);
  uint32 terms[kGateTerms / 2];
  make_gate_terms<kLogSigmoid, kKeys>(there ? value : 0.0f, terms);
#pragma unroll
  for (int32 unit = 0; unit < kGateTerms / 8; ++unit)
    *reinterpret_cast<uint4*>(tile + GateTermRows<kRows>::unit_offset(row, unit)) =
        there ? make_uint4(terms[4 * unit], terms[4 * unit + 1], terms[4 * unit + 2], terms[4 * unit + 3])
              : make_uint4(0, 0, 0, 0);
}

// The terms of a tile and the extremes of their factor.
template <int32 kRows>
struct alignas(128) GateTermTile {
  uint8 terms[GateTermRows<kRows>::kBytes];
  Extremes extremes;
};
static_assert(sizeof(GateTermTile<128>) == gate_term_bytes(128) &&
                  sizeof(GateTermTile<64>) == gate_term_bytes(64),
              "config.h must know the size of a GateTermTile");

}  // namespace fsa::kernels
