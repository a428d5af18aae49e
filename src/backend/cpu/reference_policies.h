// SPDX-License-Identifier: Apache-2.0
// The rules of attention, one small function each, in float64. docs/semantics.md says them in words; every
// other backend is tested against these. Nothing here knows of tensors, threads or tile loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "core/block_mask.h"

namespace fsa::reference {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// log(exp(a) + exp(b)); -inf is "nothing", NaN is never lost.
inline double log_add_exp(double a, double b) {
  if (a == -kInfinity) return b;
  if (b == -kInfinity) return a;
  if (a == b) return a + std::log(2.0);  // also both +inf
  return std::max(a, b) + std::log1p(std::exp(-std::abs(a - b)));
}

// ---- Logits: S = softcap(softmax_scale * (q . k + pair_gate(alpha * delta))) - slope * distance ----

struct LogitRule {
  double softmax_scale = 1;
  double softcap = 0;  // 0 = off
  bool has_gate = false;
  bool log_sigmoid_gate = true;
  double slope = 0;  // ALiBi slope of the head; 0 = off
};

inline double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }

inline double sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

inline double pair_gate(double product, bool log_sigmoid_gate) {
  return log_sigmoid_gate ? log_sigmoid(product) : product;
}

inline double pair_gate_derivative(double product, bool log_sigmoid_gate) {
  return log_sigmoid_gate ? sigmoid(-product) : 1;
}

inline double apply_softcap(double x, double cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; }

inline double softcap_derivative(double x, double cap) {
  if (!(cap > 0)) return 1;
  const double capped = std::tanh(x / cap);
  return 1 - capped * capped;
}

inline double alibi(double slope, std::int64_t distance) {
  return slope == 0 ? 0 : slope * static_cast<double>(std::abs(distance));
}

// What the softcap is applied to. `dot` = q . k, `product` = alpha * delta.
inline double scaled_logit(const LogitRule& rule, double dot, double product) {
  return rule.softmax_scale * (rule.has_gate ? dot + pair_gate(product, rule.log_sigmoid_gate) : dot);
}

// distance = i + off - j, of either sign.
inline double logit(const LogitRule& rule, double dot, double product, std::int64_t distance) {
  return apply_softcap(scaled_logit(rule, dot, product), rule.softcap) - alibi(rule.slope, distance);
}

// dS / d(q . k); dS / d(alpha * delta) is this times pair_gate_derivative.
inline double logit_derivative(const LogitRule& rule, double dot, double product) {
  return rule.softmax_scale * softcap_derivative(scaled_logit(rule, dot, product), rule.softcap);
}

// ---- Masks ----

struct WindowSizes {
  std::int64_t sink = 0, left = 0, right = 0, near = 0;
};

struct Mask {
  std::int64_t seqlen_q = 0;
  std::int64_t seqlen_k = 0;
  bool causal = false;
  std::int64_t window_left = -1;  // -1 = open
  std::int64_t window_right = -1;
  bool has_window_sizes = false;
  WindowSizes window_sizes = {};
  std::int64_t compress_block = 0;  // above 0: keys are windows of tokens
  std::int64_t compress_stride = 1;
  std::int64_t offset = 0;  // position of row 0 among the keys (or tokens)
  HeadBlocks blocks = {};   // of the query head

  std::int64_t position(std::int64_t key) const {
    return compress_block > 0 ? key * compress_stride + compress_block - 1 : key;
  }
  std::int64_t distance(std::int64_t row, std::int64_t key) const { return row + offset - position(key); }
};

inline bool is_visible(const Mask& mask, std::int64_t row, std::int64_t key) {
  if (row < 0 || row >= mask.seqlen_q || key < 0 || key >= mask.seqlen_k) return false;
  if (!mask.blocks.sees(row, key)) return false;
  const std::int64_t distance = mask.distance(row, key);
  if (mask.has_window_sizes) {
    const WindowSizes& w = mask.window_sizes;
    const bool in_near_band = distance < w.near;
    const bool in_distant_band = distance >= w.near + w.right && distance < w.near + w.right + w.left;
    return distance >= 0 && (in_near_band || in_distant_band || key < w.sink);
  }
  if (mask.causal && distance < 0) return false;
  if (mask.window_left >= 0 && distance > mask.window_left) return false;
  if (mask.window_right >= 0 && -distance > mask.window_right) return false;
  return true;
}

// ---- Threshold ----

// The number of keys that the threshold is divided by. Windows do not shorten it.
inline std::int64_t visible_len(const Mask& mask, std::int64_t row) {
  return mask.causal || mask.has_window_sizes ? row + mask.offset + 1 : mask.seqlen_k;
}

// The probability below which a whole tile may be dropped for this row.
inline double row_threshold(double threshold, std::int64_t visible) {
  if (visible <= 0) return 0;
  return std::clamp(threshold / static_cast<double>(visible), 0.0, 1.0);
}

inline double max_logit(std::span<const double> logits) {  // NaN when one is NaN
  double best = -kInfinity;
  for (double s : logits) best = std::isnan(s) || s > best ? s : best;
  return best;
}

inline double log_sum_exp(std::span<const double> logits) {
  const double best = max_logit(logits);
  if (!std::isfinite(best)) return best;
  double sum = 0;
  for (double s : logits) sum += std::exp(s - best);
  return best + std::log(sum);
}

// One row's vote on a tile, given the logits of its visible keys there and the log-sum-exp of the tiles kept
// so far: keep when the tile's largest logit could still be a probability of at least row_threshold.
// Comparing for "less" keeps NaN.
inline bool votes_keep(std::span<const double> visible_logits, double running_lse, double row_threshold) {
  if (visible_logits.empty()) return false;
  if (running_lse == -kInfinity) return true;
  return !(max_logit(visible_logits) - running_lse < std::log(row_threshold));
}

// Decode: the same question without an order, against the log-sum-exp of the probe tiles.
inline bool reaches_cut(std::span<const double> visible_logits, double probe_lse, double row_threshold) {
  if (visible_logits.empty()) return false;
  return !(max_logit(visible_logits) < probe_lse + std::log(row_threshold));
}

// Decode: which of `candidates` tiles (in key order) are kept without asking.
inline bool is_probe(std::int64_t candidate, std::int64_t candidates) {
  return candidate == 0 || candidate >= candidates - 4;
}

// ---- Gate test ----

struct Extremes {  // of alpha over the rows, or delta over the keys, of a tile; NaN when one is NaN
  double low = kInfinity;
  double high = -kInfinity;

  void include(double value) {
    if (std::isnan(value) || std::isnan(low)) {
      low = high = kNaN;
    } else {
      low = std::min(low, value);
      high = std::max(high, value);
    }
  }
};

// The best gate that any pair of the tile can have; NaN when a product is.
inline double gate_bound(const Extremes& alpha, const Extremes& delta, bool log_sigmoid_gate) {
  const double products[] = {alpha.high * delta.high, alpha.high * delta.low, alpha.low * delta.high,
                             alpha.low * delta.low};
  return pair_gate(max_logit(products), log_sigmoid_gate);
}

inline double default_gate_threshold(std::int64_t seqlen_k) { return 1 / static_cast<double>(seqlen_k); }

// With a causal mask the adaptive form lets rows that see less of the sequence be less strict.
inline double adapted_gate_threshold(double gate_threshold, const Mask& mask, std::int64_t row_begin,
                                     std::int64_t row_end) {
  double smallest = kInfinity;
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    const double share = static_cast<double>(row + mask.offset + 1) / static_cast<double>(mask.seqlen_k);
    smallest = std::min(smallest, gate_threshold * share);
  }
  return smallest;
}

// Walks the tiles of one row tile from right to left and says which ones the gate leaves open.
class GateTest {
 public:
  GateTest(double gate_threshold, double softmax_scale)
      : log_threshold_(gate_threshold > 0 ? std::log(gate_threshold) : -kInfinity), scale_(softmax_scale) {}

  bool opens(double bound) {
    const bool closed =
        log_threshold_ > -kInfinity && std::isfinite(best_) && (bound - best_) * scale_ < log_threshold_;
    if (!closed && bound > best_) best_ = bound;
    return !closed;
  }

 private:
  double log_threshold_;
  double scale_;
  double best_ = -kInfinity;
};

}  // namespace fsa::reference
