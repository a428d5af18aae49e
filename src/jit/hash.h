// SPDX-License-Identifier: Apache-2.0
// FNV-1a: tells kernels and files apart; no defence against somebody who wants a collision.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace fsa::jit {

inline constexpr std::uint64_t kHashStart = 0xcbf29ce484222325u;

inline std::uint64_t hash(std::string_view bytes, std::uint64_t start = kHashStart) {
  std::uint64_t value = start;
  for (const char byte : bytes) value = (value ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  return value;
}

// 16 digits.
inline std::string to_hex(std::uint64_t value) {
  std::string text(16, '0');
  for (int digit = 15; digit >= 0; --digit, value >>= 4) text[digit] = "0123456789abcdef"[value & 15];
  return text;
}

}  // namespace fsa::jit
