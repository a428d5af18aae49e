// SPDX-License-Identifier: Apache-2.0
#include "api/overlap.h"

#include <algorithm>
#include <cstdlib>

#include "api/checks.h"

namespace fsa {
namespace {

// Signed, so that negative strides may lead below `data`.
struct ByteRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;  // empty when not above begin
};

ByteRange byte_range(const TensorView& view) {
  if (view.data == nullptr || is_empty(view)) return {};
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  ByteRange range;
  range.begin = range.end = static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(view.data));
  for (int axis = 0; axis < view.rank; ++axis) {
    const std::int64_t distance = effective_stride(view, axis) * (view.shape[axis] - 1) * size;
    (distance < 0 ? range.begin : range.end) += distance;
  }
  range.end += size;
  return range;
}

bool intersect(const ByteRange& a, const ByteRange& b) { return a.begin < b.end && b.begin < a.end; }

// The distance in bytes between an element of a and one of b is  d = base + sum_k weight_k * u_k  with each
// integer u_k free in its own range. They share a byte iff d lies in (-size_a, size_b). Terms of equal weight
// are merged; with the weights falling and the reach of the rest known, few u_k per level need a look.
class DistanceProblem {
 public:
  DistanceProblem(const TensorView& a, const TensorView& b) {
    add_axes(a, 1);
    add_axes(b, -1);
    std::sort(terms_, terms_ + count_, [](const Term& x, const Term& y) { return x.weight > y.weight; });
    for (int i = count_ - 1; i >= 0; --i) {
      rest_low_[i] = rest_low_[i + 1] + terms_[i].weight * terms_[i].low;
      rest_high_[i] = rest_high_[i + 1] + terms_[i].weight * terms_[i].high;
    }
    base_ = static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(a.data)) -
            static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(b.data));
    low_ = 1 - static_cast<std::int64_t>(size_of(a.dtype));
    high_ = static_cast<std::int64_t>(size_of(b.dtype)) - 1;
  }

  bool has_solution() { return search(0, low_ - base_, high_ - base_); }

 private:
  struct Term {
    std::int64_t weight;  // > 0
    std::int64_t low, high;
  };

  void add_axes(const TensorView& view, int sign) {
    for (int axis = 0; axis < view.rank; ++axis) {
      const std::int64_t step =
          sign * effective_stride(view, axis) * static_cast<std::int64_t>(size_of(view.dtype));
      if (step == 0) continue;
      const std::int64_t last = view.shape[axis] - 1;
      const std::int64_t low = step < 0 ? -last : 0, high = step < 0 ? 0 : last;
      Term* same =
          std::find_if(terms_, terms_ + count_, [step](const Term& t) { return t.weight == std::abs(step); });
      if (same == terms_ + count_) terms_[count_++] = {std::abs(step), 0, 0};
      same->low += low;
      same->high += high;
    }
  }

  static std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

  // Is there a choice of u_k, k >= level, whose sum lies in [low, high]?
  bool search(int level, std::int64_t low, std::int64_t high) {
    if (high < rest_low_[level] || low > rest_high_[level]) return false;
    if (level == count_) return true;
    if (--budget_ < 0) return true;
    const Term& term = terms_[level];
    const std::int64_t first = std::max(term.low, -floor_div(rest_high_[level + 1] - low, term.weight));
    const std::int64_t last = std::min(term.high, floor_div(high - rest_low_[level + 1], term.weight));
    for (std::int64_t u = first; u <= last; ++u)
      if (search(level + 1, low - u * term.weight, high - u * term.weight)) return true;
    return false;
  }

  Term terms_[2 * kMaxRank];
  int count_ = 0;
  std::int64_t rest_low_[2 * kMaxRank + 1] = {};  // of the terms from here on
  std::int64_t rest_high_[2 * kMaxRank + 1] = {};
  std::int64_t base_ = 0, low_ = 0, high_ = 0;
  int budget_ = 20000;
};

[[noreturn]] void report(const char* output, const char* other) {
  fail(ErrorCode::invalid_argument, output, ": shares memory with ", other,
       "; pass a tensor with memory of its own");
}

}  // namespace

bool may_share_memory(const TensorView& a, const TensorView& b) {
  return intersect(byte_range(a), byte_range(b)) && DistanceProblem(a, b).has_solution();
}

void check_no_overlap(const TensorList& inputs, const TensorList& outputs) {
  for (const TensorList::Item& output : outputs) {
    const ByteRange range = byte_range(*output.view);
    const auto shares = [&](const TensorList::Item& other) {
      return intersect(range, byte_range(*other.view)) &&
             DistanceProblem(*output.view, *other.view).has_solution();
    };
    for (const TensorList::Item& input : inputs)
      if (shares(input)) report(output.name, input.name);
    for (const TensorList::Item* other = outputs.begin(); other != &output; ++other)
      if (shares(*other)) report(output.name, other->name);
  }
}

void check_no_overlap(const TensorList& inputs, const TensorList& outputs, const Workspace& workspace,
                      std::size_t bytes) {
  if (bytes == 0) return;
  ByteRange used;
  used.begin = static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(workspace.data));
  used.end = used.begin + static_cast<std::int64_t>(bytes);
  for (const TensorList* list : {&inputs, &outputs})
    for (const TensorList::Item& item : *list)
      if (intersect(used, byte_range(*item.view))) report("workspace", item.name);
}

}  // namespace fsa
