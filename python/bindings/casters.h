// SPDX-License-Identifier: Apache-2.0
// How Python values become arguments of the C++ API: a tuple of tensors, in the order of kInputNames, becomes
// CallInputs; a tuple of scalars, in the order of kOptionNames, AttentionOptions; any other tensor an
// In<"name"> or, where it is written, an Out<"name">.
//
// from_python must not throw, so the values are read by the conversion operators, which may.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>

#include "fsa/attention.h"
#include "read_tensor.h"

namespace fsa::python {

inline constexpr std::array kInputNames = {
    "query",     "key",       "value",      "cu_seqlens_q",     "cu_seqlens_k",
    "seqused_q", "seqused_k", "page_table", "window_sizes",     "alibi_slopes",
    "sink",      "alpha",     "delta",      "gather_kv_indices"};

inline constexpr std::array kOptionNames = {
    "causal",       "window_size[0]", "window_size[1]",   "softmax_scale", "softcap",
    "threshold",    "gate_threshold", "log_sigmoid_gate", "adaptive_gate", "gate_layout",
    "max_seqlen_q", "max_seqlen_k",   "deterministic",    "backend"};

template <std::size_t size>
struct Name {
  char text[size];
  constexpr Name(const char (&literal)[size]) {  // implicit: In<"lse">
    for (std::size_t i = 0; i < size; ++i) text[i] = literal[i];
  }
};

template <Name name>
struct In : TensorView {
  static constexpr Access kAccess = Access::read;
  static constexpr const char* kName = name.text;
};

template <Name name>
struct Out : TensorView {
  static constexpr Access kAccess = Access::write;
  static constexpr const char* kName = name.text;
};

// The first input of a call, and the stream on which its framework is working.
template <Name name>
struct First : In<name> {
  void* stream = nullptr;
};

// The inputs, and the stream on which the framework of query is working.
struct CallInputs : AttentionInputs {
  void* stream = nullptr;
  PyObject* query_object = nullptr;  // borrowed
};

// Objects that views point into; released after the call.
using InputOwners = std::array<nanobind::object, kInputNames.size()>;

void read_inputs(PyObject* tuple, CallInputs& inputs, InputOwners& owners);
void read_options(PyObject* tuple, AttentionOptions& options);

template <typename Tensor>
struct TensorCaster {
  using Value = Tensor;
  static constexpr auto Name = nanobind::detail::const_name("object");
  template <typename T>
  using Cast = Value;

  bool from_python(nanobind::handle source, std::uint32_t, nanobind::detail::cleanup_list*) noexcept {
    source_ = source.ptr();
    return true;
  }
  operator Value() { return {read_tensor(Tensor::kName, source_, Tensor::kAccess, owner_)}; }

 protected:
  PyObject* source_ = nullptr;
  nanobind::object owner_;
};

template <typename Tensor>
struct FirstCaster : TensorCaster<Tensor> {
  operator Tensor() {
    const TensorView view = read_tensor(Tensor::kName, this->source_, Access::read, this->owner_);
    return {{view}, current_stream(Tensor::kName, this->source_, view.device)};
  }
};

template <typename T, std::size_t size>
struct TupleCaster {
  using Value = T;
  static constexpr auto Name = nanobind::detail::const_name("tuple");
  template <typename>
  using Cast = Value&;

  bool from_python(nanobind::handle source, std::uint32_t, nanobind::detail::cleanup_list*) noexcept {
    source_ = source.ptr();
    return PyTuple_Check(source_) && PyTuple_Size(source_) == std::ptrdiff_t{size};
  }

 protected:
  PyObject* source_ = nullptr;
  Value value_;
};

}  // namespace fsa::python

namespace nanobind::detail {

template <fsa::python::Name name>
struct type_caster<fsa::python::In<name>> : fsa::python::TensorCaster<fsa::python::In<name>> {};

template <fsa::python::Name name>
struct type_caster<fsa::python::Out<name>> : fsa::python::TensorCaster<fsa::python::Out<name>> {};

template <fsa::python::Name name>
struct type_caster<fsa::python::First<name>> : fsa::python::FirstCaster<fsa::python::First<name>> {};

template <>
struct type_caster<fsa::python::CallInputs>
    : fsa::python::TupleCaster<fsa::python::CallInputs, fsa::python::kInputNames.size()> {
  operator Value&() {
    fsa::python::read_inputs(source_, value_, owners_);
    return value_;
  }

 private:
  fsa::python::InputOwners owners_;
};

template <>
struct type_caster<fsa::AttentionOptions>
    : fsa::python::TupleCaster<fsa::AttentionOptions, fsa::python::kOptionNames.size()> {
  operator Value&() {
    fsa::python::read_options(source_, value_);
    return value_;
  }
};

}  // namespace nanobind::detail
