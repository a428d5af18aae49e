// SPDX-License-Identifier: Apache-2.0
// Vectors of float, element types, and the moves between them. Compiled once per instruction set; everything lives
// in a namespace named after it.
#pragma once

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fsa/tensor.h"

namespace fsa::cpu::FSA_SIMD_TARGET {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using IntTag = hn::RebindToSigned<FloatTag>;
using Float = hn::Vec<FloatTag>;
using Mask = hn::Mask<FloatTag>;

inline constexpr FloatTag kFloat;
inline constexpr IntTag kInt;
inline constexpr std::int64_t kLanes = hn::MaxLanes(FloatTag());

// The row side of every score tile: 64 rows, one lane per row, whatever the vector length.
inline constexpr std::int64_t kRows = 64;
static_assert(kRows % kLanes == 0, "a row tile is a whole number of vectors");

// From one row of a score tile, or of transposed row tiles, to the next, in floats. Products read them in panels: where
// a panel is 16 rows wide, rows 256 bytes apart share 16 of the 64 sets of the first-level cache.
inline constexpr std::int64_t kTilePitch = kLanes < 16 ? kRows + 16 : kRows;

inline constexpr float kNegativeInfinity = -__builtin_inff();

template <class T>
HWY_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
HWY_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}
HWY_INLINE std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Row pitch, in floats, of a packed matrix with `columns` columns: whole vectors, and an odd number of cache lines,
// so that walking down a column touches every set of the first-level cache (a pitch of 512 bytes would use 8 of 64).
HWY_INLINE std::int64_t packed_pitch(std::int64_t columns) {
  const std::int64_t lines = (columns + 15) / 16;
  return (lines % 2 == 0 ? lines + 1 : lines) * 16;
}

// ---------------------------------------------------------------------------------------------- elements

HWY_INLINE Float widen(const float* source) { return hn::LoadU(kFloat, source); }
// Without instructions for it Highway 1.0 truncates float16, and takes infinity and NaN for numbers.
#if (HWY_ARCH_X86 && HWY_TARGET < HWY_SSE4) || HWY_TARGET == HWY_NEON
HWY_INLINE Float widen(const hwy::float16_t* source) {
  return hn::PromoteTo(kFloat, hn::LoadU(hn::Rebind<hwy::float16_t, FloatTag>(), source));
}
HWY_INLINE void narrow(Float value, hwy::float16_t* target) {
  const hn::Rebind<hwy::float16_t, FloatTag> tag;
  hn::StoreU(hn::DemoteTo(tag, value), tag, target);
}
#else
// Exponents are moved by integer additions; subnormal numbers meet a float whose last bit has their place, where no
// operand and no result is a subnormal float, which threads take for zero.
HWY_INLINE Float widen(const hwy::float16_t* source) {
  const hn::RebindToUnsigned<FloatTag> tag;
  const hn::Rebind<std::uint16_t, FloatTag> half_tag;
  const auto half = hn::PromoteTo(tag, hn::LoadU(half_tag, reinterpret_cast<const std::uint16_t*>(source)));
  const auto shifted = hn::ShiftLeft<13>(hn::And(half, hn::Set(tag, 0x7FFFu)));
  const auto exponent = hn::And(shifted, hn::Set(tag, 0x1Fu << 23));
  const auto normal = hn::Add(shifted, hn::Set(tag, 112u << 23));  // 127 - 15
  const auto special = hn::Add(normal, hn::Set(tag, 112u << 23));
  const auto least = hn::Set(tag, 113u << 23);  // 2^-14
  const auto subnormal =
      hn::BitCast(tag, hn::Sub(hn::BitCast(kFloat, hn::Add(shifted, least)), hn::BitCast(kFloat, least)));
  const auto number = hn::IfThenElse(hn::Eq(exponent, hn::Zero(tag)), subnormal, normal);
  const auto magnitude = hn::IfThenElse(hn::Eq(exponent, hn::Set(tag, 0x1Fu << 23)), special, number);
  const auto sign = hn::ShiftLeft<16>(hn::And(half, hn::Set(tag, 0x8000u)));
  return hn::BitCast(kFloat, hn::Or(magnitude, sign));
}
// To nearest, ties to even; infinity from 65520 on.
HWY_INLINE void narrow(Float value, hwy::float16_t* target) {
  const hn::RebindToUnsigned<FloatTag> tag;
  const hn::RebindToSigned<FloatTag> signed_tag;
  const auto bits = hn::BitCast(tag, value);
  const auto magnitude = hn::And(bits, hn::Set(tag, 0x7FFFFFFFu));
  const auto less = [&](auto x, std::uint32_t than) HWY_ATTR {
    return hn::RebindMask(tag,
                          hn::Lt(hn::BitCast(signed_tag, x), hn::BitCast(signed_tag, hn::Set(tag, than))));
  };
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(tag, 1u));
  const auto rebased = hn::Sub(magnitude, hn::Set(tag, 112u << 23));
  const auto normal = hn::ShiftRight<13>(hn::Add(hn::Add(rebased, hn::Set(tag, 0xFFFu)), odd));
  const auto place = hn::Set(tag, 126u << 23);  // 2^-1, whose last bit is 2^-24
  const auto subnormal =
      hn::Sub(hn::BitCast(tag, hn::Add(hn::BitCast(kFloat, magnitude), hn::BitCast(kFloat, place))), place);
  const auto large =
      hn::IfThenElse(less(magnitude, 0x7F800001u), hn::Set(tag, 0x7C00u), hn::Set(tag, 0x7E00u));
  const auto finite = hn::IfThenElse(less(magnitude, 113u << 23), subnormal, normal);
  const auto result = hn::IfThenElse(less(magnitude, 0x47800000u), finite, large);  // from 2^16 on
  const auto half = hn::Or(result, hn::ShiftLeft<15>(hn::ShiftRight<31>(bits)));
  const hn::Rebind<std::uint16_t, FloatTag> half_tag;
  hn::StoreU(hn::DemoteTo(half_tag, hn::BitCast(signed_tag, half)), half_tag,
             reinterpret_cast<std::uint16_t*>(target));
}
#endif
HWY_INLINE Float widen(const hwy::bfloat16_t* source) {
  return hn::PromoteTo(kFloat, hn::LoadU(hn::Rebind<hwy::bfloat16_t, FloatTag>(), source));
}

HWY_INLINE void narrow(Float value, float* target) { hn::StoreU(value, kFloat, target); }
// Round to nearest even; Highway 1.0's own conversion truncates. A NaN keeps its sign and stays a NaN.
HWY_INLINE void narrow(Float value, hwy::bfloat16_t* target) {
  const hn::RebindToUnsigned<FloatTag> bits_tag;
  const auto bits = hn::BitCast(bits_tag, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(bits_tag, 1u));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(bits_tag, 0x7FFFu)));
  const auto quiet = hn::Or(bits, hn::Set(bits_tag, 0x00400000u));
  const auto is_nan = hn::RebindMask(bits_tag, hn::IsNaN(value));
  const auto high = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
  const hn::Rebind<std::uint16_t, FloatTag> half_tag;
  hn::StoreU(hn::DemoteTo(half_tag, hn::BitCast(kInt, high)), half_tag,
             reinterpret_cast<std::uint16_t*>(target));
}

// target[0, round_up(count, kLanes)) = source[0, count), then zeros.
template <class T>
HWY_INLINE void widen_row(const T* source, std::int64_t count, float* target) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) hn::StoreU(widen(source + i), kFloat, target + i);
  if (i == count) return;
  T tail[kLanes];
  std::memset(tail, 0, sizeof(tail));
  std::memcpy(tail, source + i, static_cast<std::size_t>(count - i) * sizeof(T));
  hn::StoreU(widen(tail), kFloat, target + i);
}

template <class T>
HWY_INLINE void narrow_row(const float* source, std::int64_t count, float factor, T* target) {
  const Float scale = hn::Set(kFloat, factor);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) narrow(hn::Mul(hn::LoadU(kFloat, source + i), scale), target + i);
  if (i == count) return;
  float wide[kLanes] = {};
  std::memcpy(wide, source + i, static_cast<std::size_t>(count - i) * sizeof(float));
  T tail[kLanes];
  narrow(hn::Mul(hn::LoadU(kFloat, wide), scale), tail);
  std::memcpy(target + i, tail, static_cast<std::size_t>(count - i) * sizeof(T));
}

// target += source * factor
template <class T>
HWY_INLINE void narrow_row_onto(const float* source, std::int64_t count, float factor, T* target) {
  const Float scale = hn::Set(kFloat, factor);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    narrow(hn::MulAdd(hn::LoadU(kFloat, source + i), scale, widen(target + i)), target + i);
  if (i == count) return;
  float wide[kLanes] = {};
  std::memcpy(wide, source + i, static_cast<std::size_t>(count - i) * sizeof(float));
  T tail[kLanes] = {};
  std::memcpy(tail, target + i, static_cast<std::size_t>(count - i) * sizeof(T));
  narrow(hn::MulAdd(hn::LoadU(kFloat, wide), scale, widen(tail)), tail);
  std::memcpy(target + i, tail, static_cast<std::size_t>(count - i) * sizeof(T));
}

// Calls function(pointer of the element type) for the three types that vectors serve.
template <class Function>
HWY_INLINE void with_element_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::bfloat16:
      return function(static_cast<hwy::bfloat16_t*>(nullptr));
    case DType::float16:
      return function(static_cast<hwy::float16_t*>(nullptr));
    default:
      return function(static_cast<float*>(nullptr));
  }
}

// One element of any float type, for the per-row and per-key scalars (alpha, delta, sink, slopes, lse).
HWY_INLINE float load_scalar(const void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::float64:
      return static_cast<float>(static_cast<const double*>(data)[index]);
    case DType::bfloat16: {  // the upper half of a float
      const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(data)[index]} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      return value;
    }
    case DType::float16: {
      float lanes[kLanes];
      widen_row(static_cast<const hwy::float16_t*>(data) + index, 1, lanes);
      return lanes[0];
    }
    default:
      return static_cast<const float*>(data)[index];
  }
}

HWY_INLINE void store_scalar(float value, void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(data)[index] = static_cast<double>(value);
      return;
    case DType::bfloat16:
      return narrow_row(&value, 1, 1.0f, static_cast<hwy::bfloat16_t*>(data) + index);
    case DType::float16:
      return narrow_row(&value, 1, 1.0f, static_cast<hwy::float16_t*>(data) + index);
    default:
      static_cast<float*>(data)[index] = value;
  }
}

// ---------------------------------------------------------------------------------------------- transposition

HWY_INLINE void transpose_4x4(const float* source, std::int64_t source_pitch, float* target,
                              std::int64_t target_pitch) {
  const hn::Full128<float> tag;
  const hn::Full128<double> pair;
  const auto a = hn::LoadU(tag, source), b = hn::LoadU(tag, source + source_pitch);
  const auto c = hn::LoadU(tag, source + 2 * source_pitch), d = hn::LoadU(tag, source + 3 * source_pitch);
  const auto ab_low = hn::BitCast(pair, hn::InterleaveLower(tag, a, b));
  const auto cd_low = hn::BitCast(pair, hn::InterleaveLower(tag, c, d));
  const auto ab_high = hn::BitCast(pair, hn::InterleaveUpper(tag, a, b));
  const auto cd_high = hn::BitCast(pair, hn::InterleaveUpper(tag, c, d));
  hn::StoreU(hn::BitCast(tag, hn::InterleaveLower(pair, ab_low, cd_low)), tag, target);
  hn::StoreU(hn::BitCast(tag, hn::InterleaveUpper(pair, ab_low, cd_low)), tag, target + target_pitch);
  hn::StoreU(hn::BitCast(tag, hn::InterleaveLower(pair, ab_high, cd_high)), tag, target + 2 * target_pitch);
  hn::StoreU(hn::BitCast(tag, hn::InterleaveUpper(pair, ab_high, cd_high)), tag, target + 3 * target_pitch);
}

#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
inline constexpr bool kTransposesWide = true;

HWY_INLINE Float rows_four_apart(const float* source,
                                 std::int64_t pitch) {  // four columns of rows 0, 4, 8, 12
  __m512 rows = _mm512_castps128_ps512(_mm_loadu_ps(source));
  rows = _mm512_insertf32x4(rows, _mm_loadu_ps(source + 4 * pitch), 1);
  rows = _mm512_insertf32x4(rows, _mm_loadu_ps(source + 8 * pitch), 2);
  return Float{_mm512_insertf32x4(rows, _mm_loadu_ps(source + 12 * pitch), 3)};
}
#elif HWY_TARGET == HWY_AVX2
inline constexpr bool kTransposesWide = true;

HWY_INLINE Float rows_four_apart(const float* source, std::int64_t pitch) {  // four columns of rows 0 and 4
  return Float{_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(source)),
                                    _mm_loadu_ps(source + 4 * pitch), 1)};
}
#else
inline constexpr bool kTransposesWide = false;
#endif

// target[column][row] = factor * source[row][column]; rows a multiple of 16, columns of 4. With AVX-512 24 instructions
// for 16 rows and 4 columns where squares of 4 take 64, with AVX2 40. 16 rows at a time: they are a cache line of target.
HWY_INLINE void transpose_wide([[maybe_unused]] const float* source,
                               [[maybe_unused]] std::int64_t source_pitch, [[maybe_unused]] std::int64_t rows,
                               [[maybe_unused]] std::int64_t columns, [[maybe_unused]] float factor,
                               [[maybe_unused]] float* target, [[maybe_unused]] std::int64_t target_pitch) {
#if HWY_TARGET <= HWY_AVX2 && HWY_ARCH_X86
  const Float scale = hn::Set(kFloat, factor);
  const hn::RepartitionToWide<FloatTag> pair;
  for (std::int64_t line = 0; line < rows; line += 16)
    for (std::int64_t column = 0; column < columns; column += 4)
#pragma GCC unroll 2
      for (std::int64_t row = line; row < line + 16; row += kLanes) {
        const float* from = source + row * source_pitch + column;
        const Float a = rows_four_apart(from, source_pitch),
                    b = rows_four_apart(from + source_pitch, source_pitch);
        const Float c = rows_four_apart(from + 2 * source_pitch, source_pitch),
                    d = rows_four_apart(from + 3 * source_pitch, source_pitch);
        const auto ab_low = hn::BitCast(pair, hn::InterleaveLower(kFloat, a, b));
        const auto cd_low = hn::BitCast(pair, hn::InterleaveLower(kFloat, c, d));
        const auto ab_high = hn::BitCast(pair, hn::InterleaveUpper(kFloat, a, b));
        const auto cd_high = hn::BitCast(pair, hn::InterleaveUpper(kFloat, c, d));
        const Float columns_of[4] = {hn::BitCast(kFloat, hn::InterleaveLower(pair, ab_low, cd_low)),
                                     hn::BitCast(kFloat, hn::InterleaveUpper(pair, ab_low, cd_low)),
                                     hn::BitCast(kFloat, hn::InterleaveLower(pair, ab_high, cd_high)),
                                     hn::BitCast(kFloat, hn::InterleaveUpper(pair, ab_high, cd_high))};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          hn::StoreU(factor == 1.0f ? columns_of[i] : hn::Mul(columns_of[i], scale), kFloat,
                     target + (column + i) * target_pitch + row);
      }
#endif
}

// target[column][row] = source[row][column]; both extents rounded up to four, which both buffers must hold.
HWY_INLINE void transpose(const float* source, std::int64_t source_pitch, std::int64_t rows,
                          std::int64_t columns, float* target, std::int64_t target_pitch) {
  if (kTransposesWide && rows % 16 == 0 && columns % 4 == 0)
    return transpose_wide(source, source_pitch, rows, columns, 1.0f, target, target_pitch);
  for (std::int64_t column = 0; column < columns; column += 4)
    for (std::int64_t row = 0; row < rows; row += 4)
      transpose_4x4(source + row * source_pitch + column, source_pitch, target + column * target_pitch + row,
                    target_pitch);
}

}  // namespace fsa::cpu::FSA_SIMD_TARGET
