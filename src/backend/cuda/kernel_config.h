// SPDX-License-Identifier: Apache-2.0
// What is fixed when a kernel is compiled, and the source text that it is compiled from. Pure: no driver, no GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "jit/hash.h"
#include "jit/kernel_source.h"
#include "kernels/core/backward.h"

namespace fsa::cuda {

enum class KernelKind : std::uint8_t {
  forward,
  gate_prepare,
  gate_bitmap,
  copy_rows,
  clear_counters,
  backward,
  backward_prepare,
  backward_finish,
  sum_sink,
  transpose_bits,
  block_columns,
  split_columns,
  sum_parts
};
enum class MaskKind : std::uint8_t { window, bands, blocks };  // bands: window_sizes; blocks: a block mask
enum class SoftcapKind : std::uint8_t { none, fast, exact, bounded };  // bounded: fast, without row maxima
enum class GateKind : std::uint8_t { none, linear, log_sigmoid };

// The key of the kernels in memory. A kind that does not use a field leaves it zero.
struct KernelConfig {
  kernels::ForwardTile tile = {};       // of the gate's kernels and transpose_bits: block_n alone
  kernels::BackwardTile backward = {};  // of the backward's kernels
  KernelKind kind = KernelKind::forward;
  kernels::ElementType element = kernels::ElementType::bf16;
  MaskKind mask = MaskKind::window;
  bool window_left = false;   // the mask has a left edge
  bool window_right = false;  // and a right one; causal is right alone
  SoftcapKind softcap = SoftcapKind::none;
  GateKind gate = GateKind::none;
  bool gate_bits = false;  // tiles are taken from the bit map of the gate test
  bool alibi = false;
  bool sink = false;
  bool threshold = false;      // tiles are voted on
  bool deterministic = false;  // backward: key tiles add to dQ in turn

  friend bool operator==(const KernelConfig& a, const KernelConfig& b) {
    return std::memcmp(&a, &b, sizeof(KernelConfig)) == 0;
  }
};
static_assert(std::has_unique_object_representations_v<KernelConfig>, "compared and hashed as bytes");

// "forward_sm90_bf16_d128_causal_threshold_128x128"; no two kernels share one.
std::string name_of(const KernelConfig& config);

jit::KernelSource source_of(const KernelConfig& config);

unsigned threads_of(const KernelConfig& config);
unsigned shared_bytes_of(const KernelConfig& config);  // dynamic

}  // namespace fsa::cuda

template <>
struct std::hash<fsa::cuda::KernelConfig> {
  // By words: it is on the way of every call.
  std::size_t operator()(const fsa::cuda::KernelConfig& config) const noexcept {
    std::uint64_t words[sizeof(config) / 8];
    static_assert(sizeof(words) == sizeof(config));
    std::memcpy(words, &config, sizeof(config));
    std::uint64_t value = fsa::jit::kHashStart;
    for (const std::uint64_t word : words) {
      value = (value ^ word) * 0x9e3779b97f4a7c15u;
      value ^= value >> 32;
    }
    return value;
  }
};
