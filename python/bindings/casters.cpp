// SPDX-License-Identifier: Apache-2.0
#include "casters.h"

#include <optional>
#include <string>

namespace nb = nanobind;

namespace fsa::python {
namespace {

[[noreturn]] void wrong_type(const char* name, const char* expected, PyObject* got) {
  throw Error(ErrorCode::type_mismatch, std::string(name) + ": expected " + expected + ", got " +
                                            nb::inst_name(nb::handle(got)).c_str());
}

// A foreign type counts only when it is called bool (numpy's): the truth of any other object would hide a
// misplaced argument.
bool read_bool(const char* name, PyObject* object) {
  if (object == Py_True || object == Py_False) return object == Py_True;
  const std::string type = nb::inst_name(nb::handle(object)).c_str();
  if (type != "bool" && type != "bool_") wrong_type(name, "a bool", object);
  return PyObject_IsTrue(object) == 1;
}

double read_float(const char* name, PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    wrong_type(name, "a number", object);
  }
  return value;
}

std::optional<double> read_optional_float(const char* name, PyObject* object) {
  if (object == Py_None) return std::nullopt;
  return read_float(name, object);
}

std::int64_t read_int(const char* name, PyObject* object) {
  PyObject* index = PyBool_Check(object) ? nullptr : PyNumber_Index(object);
  if (index == nullptr) {
    PyErr_Clear();
    wrong_type(name, "an int", object);
  }
  int overflow = 0;
  const std::int64_t value = PyLong_AsLongLongAndOverflow(index, &overflow);
  Py_DECREF(index);
  if (overflow != 0) throw Error(ErrorCode::invalid_argument, std::string(name) + ": does not fit 64 bits");
  return value;
}

std::optional<std::int64_t> read_optional_int(const char* name, PyObject* object) {
  if (object == Py_None) return std::nullopt;
  return read_int(name, object);
}

std::string read_string(const char* name, PyObject* object) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &size) : nullptr;
  if (text == nullptr) {
    PyErr_Clear();
    wrong_type(name, "a str", object);
  }
  return std::string(text, static_cast<std::size_t>(size));
}

GateLayout read_gate_layout(const char* name, PyObject* object) {
  const std::string text = read_string(name, object);
  if (text == "bsh") return GateLayout::bsh;
  if (text == "bhs") return GateLayout::bhs;
  throw Error(ErrorCode::invalid_argument, std::string(name) + ": '" + text + "', but it is 'bsh' or 'bhs'");
}

}  // namespace

void read_inputs(PyObject* tuple, CallInputs& inputs, InputOwners& owners) {
  TensorView* const views[] = {&inputs.query,        &inputs.key,
                               &inputs.value,        &inputs.cu_seqlens_q,
                               &inputs.cu_seqlens_k, &inputs.seqused_q,
                               &inputs.seqused_k,    &inputs.page_table,
                               &inputs.window_sizes, &inputs.alibi_slopes,
                               &inputs.sink,         &inputs.alpha,
                               &inputs.delta,        &inputs.gather_kv_indices};
  static_assert(std::size(views) == kInputNames.size());
  const auto read = [&](std::size_t i, const char* name, TensorView& view) {
    PyObject* const object = PyTuple_GetItem(tuple, static_cast<Py_ssize_t>(i));
    if (object != Py_None) view = read_tensor(name, object, Access::read, owners[i]);
  };
  for (std::size_t i = 0; i < std::size(views); ++i) read(i, kInputNames[i], *views[i]);
  if (PyTuple_Size(tuple) > std::ssize(kInputNames)) {
    BlockMask& mask = inputs.block_mask;
    TensorView* const blocks[] = {&mask.kv_num_blocks,   &mask.kv_indices,    &mask.full_kv_num_blocks,
                                  &mask.full_kv_indices, &mask.partial_begin, &mask.partial_bits};
    static_assert(std::size(blocks) == kBlockInputNames.size());
    for (std::size_t i = 0; i < std::size(blocks); ++i)
      read(kInputNames.size() + i, kBlockInputNames[i], *blocks[i]);
  }
  inputs.query_object = PyTuple_GetItem(tuple, 0);
  inputs.stream = current_stream(kInputNames[0], inputs.query_object, inputs.query.device);
}

void read_options(PyObject* tuple, CallOptions& options) {
  Py_ssize_t next = 0;
  const auto read = [&](auto reader) {
    const Py_ssize_t i = next++;
    return reader(kOptionNames[static_cast<std::size_t>(i)], PyTuple_GetItem(tuple, i));
  };
  options.causal = read(read_bool);
  options.window_left = read(read_int);
  options.window_right = read(read_int);
  options.softmax_scale = read(read_optional_float);
  options.softcap = read(read_float);
  options.threshold = read(read_optional_float);
  options.gate_threshold = read(read_optional_float);
  options.log_sigmoid_gate = read(read_bool);
  options.adaptive_gate = read(read_bool);
  options.gate_layout = read(read_gate_layout);
  options.max_seqlen_q = read(read_optional_int);
  options.max_seqlen_k = read(read_optional_int);
  options.deterministic = read(read_bool);
  options.backend = read(read_string);
  if (PyTuple_Size(tuple) == std::ssize(kOptionNames)) return;
  options.block_rows = read_int(kBlockOptionNames[0], PyTuple_GetItem(tuple, next));
  options.block_keys = read_int(kBlockOptionNames[1], PyTuple_GetItem(tuple, next + 1));
}

}  // namespace fsa::python
