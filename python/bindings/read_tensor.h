// SPDX-License-Identifier: Apache-2.0
// A Python tensor as an fsa::TensorView, through DLPack and without a copy.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "fsa/tensor.h"

namespace fsa::python {

enum class Access { read, write };

// None is the absent view. torch publishes a table of C functions on its type (__dlpack_c_exchange_api__),
// through which a tensor costs some tens of nanoseconds and needs no owner; any other array is asked for a
// __dlpack__ capsule, which `owner` then holds and which must outlive the use of the view. Throws Error with
// `name`.
TensorView read_tensor(const char* name, PyObject* object, Access access, nanobind::object& owner);

// Memory for one call, as the caller gives it: a tensor of bytes; a function (like, bytes) that returns one; or None,
// the allocator of the framework of `like`, stream-ordered on the GPU and without the cost of a Python object. A
// function and an allocator are asked when the call turns out to need something, without the GIL. Throws Error with
// `name` when the type of `like` has no allocator or the allocator has no memory, and what the function throws.
class Scratch {
 public:
  Scratch(const char* name, nanobind::handle given, PyObject* like, Device device);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Workspace workspace();

 private:
  void* allocate(std::size_t bytes);
  void* ask_function(std::size_t bytes);
  void* ask_framework(std::size_t bytes);

  const char* name_;
  PyObject* function_ = nullptr;  // borrowed, as like_ is
  PyObject* like_;
  Device device_;
  TensorView bytes_;
  nanobind::object owner_;     // of bytes_
  std::string type_;           // filled in where there is no allocator
  const void* api_ = nullptr;  // DLPackExchangeAPI
  void* memory_ = nullptr;     // DLManagedTensorVersioned
};

// The stream on which the tensor's framework is working on that device; null on the CPU. Throws Error with `name`
// for a framework that does not tell: the default stream would be a guess.
void* current_stream(const char* name, PyObject* object, Device device);

}  // namespace fsa::python
