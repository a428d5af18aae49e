// SPDX-License-Identifier: Apache-2.0
// A Python tensor as an fsa::TensorView, through DLPack and without a copy.
#pragma once

#include <nanobind/nanobind.h>

#include "fsa/tensor.h"

namespace fsa::python {

enum class Access { read, write };

// None is the absent view. torch publishes a table of C functions on its type (__dlpack_c_exchange_api__),
// through which a tensor costs some tens of nanoseconds and needs no owner; any other array is asked for a
// __dlpack__ capsule, which `owner` then holds and which must outlive the use of the view. Throws Error with
// `name`.
TensorView read_tensor(const char* name, PyObject* object, Access access, nanobind::object& owner);

}  // namespace fsa::python
