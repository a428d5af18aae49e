// SPDX-License-Identifier: Apache-2.0
// What the functions of the module share.
#pragma once

#include <nanobind/nanobind.h>

#include "fsa/tensor.h"

namespace fsa::python {

inline Workspace workspace_from(const TensorView& bytes) {
  return {bytes.data, bytes.present() ? static_cast<std::size_t>(bytes.numel()) : 0};
}

// The GIL is released around what may take long, so that Python threads run meanwhile.
template <typename Function>
decltype(auto) without_gil(Function function) {
  const nanobind::gil_scoped_release release;
  return function();
}

void bind_nsa(nanobind::module_& m);

}  // namespace fsa::python
