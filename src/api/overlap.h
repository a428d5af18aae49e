// SPDX-License-Identifier: Apache-2.0
// Whether two strided tensors share a byte. Slices that interleave inside one buffer (the query, key and value
// parts of a packed qkv tensor) do not, although their address ranges overlap.
#pragma once

#include <cstdint>

#include "fsa/tensor.h"

namespace fsa {

// True also in the rare case that deciding takes too long.
bool may_share_memory(const TensorView& a, const TensorView& b);

// Tensors by name; fixed capacity, so that a call allocates nothing.
class TensorList {
 public:
  struct Item {
    const char* name;
    const TensorView* view;
  };

  void add(const char* name, const TensorView& view) {
    if (view.present()) items_[count_++] = {name, &view};
  }
  const Item* begin() const { return items_; }
  const Item* end() const { return items_ + count_; }

 private:
  static constexpr int kCapacity = 32;
  Item items_[kCapacity] = {};
  int count_ = 0;
};

// Throws when an output shares memory with an input, another output or the bytes of the workspace in use.
void check_no_overlap(const TensorList& inputs, const TensorList& outputs);
void check_no_overlap(const TensorList& inputs, const TensorList& outputs, const Workspace& workspace,
                      std::size_t bytes);

}  // namespace fsa
