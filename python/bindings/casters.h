// SPDX-License-Identifier: Apache-2.0
// How Python values become arguments of the C++ API: a tuple of tensors, in the order of kInputNames and
// perhaps kBlockInputNames, becomes CallInputs; a tuple of scalars, of kOptionNames likewise, CallOptions; any
// other tensor an In<"name"> or, where it is written, an Out<"name">.
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

// What follows them in a call with a block mask.
inline constexpr std::array kBlockInputNames = {"block_mask.kv_num_blocks",      "block_mask.kv_indices",
                                                "block_mask.full_kv_num_blocks", "block_mask.full_kv_indices",
                                                "block_mask.partial_begin",      "block_mask.partial_bits"};
inline constexpr std::array kBlockOptionNames = {"block_mask.BLOCK_SIZE[0]", "block_mask.BLOCK_SIZE[1]"};

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

// The options, and the sizes of the block mask, which the C++ API keeps beside its tensors.
struct CallOptions : AttentionOptions {
  std::int64_t block_rows = 128;
  std::int64_t block_keys = 128;
};

// Objects that views point into; released after the call.
using InputOwners = std::array<nanobind::object, kInputNames.size() + kBlockInputNames.size()>;

void read_inputs(PyObject* tuple, CallInputs& inputs, InputOwners& owners);
void read_options(PyObject* tuple, CallOptions& options);

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

template <typename T, std::size_t size, std::size_t more>
struct TupleCaster {
  using Value = T;
  static constexpr auto Name = nanobind::detail::const_name("tuple");
  template <typename>
  using Cast = Value&;

  bool from_python(nanobind::handle source, std::uint32_t, nanobind::detail::cleanup_list*) noexcept {
    source_ = source.ptr();
    if (!PyTuple_Check(source_)) return false;
    const Py_ssize_t length = PyTuple_Size(source_);
    return length == std::ptrdiff_t{size} || length == std::ptrdiff_t{size + more};
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
    : fsa::python::TupleCaster<fsa::python::CallInputs, fsa::python::kInputNames.size(),
                               fsa::python::kBlockInputNames.size()> {
  operator Value&() {
    fsa::python::read_inputs(source_, value_, owners_);
    return value_;
  }

 private:
  fsa::python::InputOwners owners_;
};

template <>
struct type_caster<fsa::python::CallOptions>
    : fsa::python::TupleCaster<fsa::python::CallOptions, fsa::python::kOptionNames.size(),
                               fsa::python::kBlockOptionNames.size()> {
  operator Value&() {
    fsa::python::read_options(source_, value_);
    return value_;
  }
};

}  // namespace nanobind::detail
