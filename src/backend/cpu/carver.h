// SPDX-License-Identifier: Apache-2.0
// Arrays in a workspace.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fsa::cpu {

// Carves arrays of whole cache lines out of the workspace; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(std::int64_t count) {
    T* result = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return result;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace fsa::cpu
