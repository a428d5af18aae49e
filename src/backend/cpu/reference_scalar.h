// SPDX-License-Identifier: Apache-2.0
// One element of any float dtype, read exactly as float64 and written with one rounding to nearest even.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "fsa/tensor.h"

namespace fsa {

inline double bfloat16_to_double(std::uint16_t bits) {
  return std::bit_cast<float>(std::uint32_t{bits} << 16);
}

inline double float16_to_double(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  double magnitude;
  if (exponent == 31)
    magnitude = mantissa == 0 ? INFINITY : NAN;
  else if (exponent == 0)
    magnitude = std::ldexp(mantissa, -24);
  else
    magnitude = std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// The nearest number with `digits` significant bits and no bit below 2^lowest_exponent.
inline double round_to_digits(double value, int digits, int lowest_exponent) {
  if (!std::isfinite(value) || value == 0) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int unit = std::max(exponent - digits, lowest_exponent);
  return std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
}

inline std::uint16_t double_to_bfloat16(double value) {
  if (std::isnan(value)) return 0x7fc0;
  const auto rounded = static_cast<float>(round_to_digits(value, 8, -133));
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(rounded) >> 16);
}

inline std::uint16_t double_to_float16(double value) {
  if (std::isnan(value)) return 0x7e00;
  const double magnitude = std::abs(round_to_digits(value, 11, -24));
  int bits;
  if (magnitude >= 65536) {
    bits = 31 << 10;
  } else if (magnitude < 0x1p-14) {
    bits = static_cast<int>(std::ldexp(magnitude, 24));
  } else {
    const int exponent = std::ilogb(magnitude);
    bits = (exponent + 15) << 10 | (static_cast<int>(std::ldexp(magnitude, 10 - exponent)) - 1024);
  }
  return static_cast<std::uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
}

inline double load_scalar(DType dtype, const void* data, std::int64_t index) {
  switch (dtype) {
    case DType::float64:
      return static_cast<const double*>(data)[index];
    case DType::float32:
      return static_cast<const float*>(data)[index];
    case DType::bfloat16:
      return bfloat16_to_double(static_cast<const std::uint16_t*>(data)[index]);
    case DType::float16:
      return float16_to_double(static_cast<const std::uint16_t*>(data)[index]);
    default:
      return NAN;  // the API lets no other dtype through
  }
}

inline void store_scalar(DType dtype, void* data, std::int64_t index, double value) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(data)[index] = value;
      return;
    case DType::float32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      return;
    case DType::bfloat16:
      static_cast<std::uint16_t*>(data)[index] = double_to_bfloat16(value);
      return;
    case DType::float16:
      static_cast<std::uint16_t*>(data)[index] = double_to_float16(value);
      return;
    default:
      return;
  }
}

}  // namespace fsa
