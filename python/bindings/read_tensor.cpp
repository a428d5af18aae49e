// SPDX-License-Identifier: Apache-2.0
#include "read_tensor.h"

#include <array>
#include <string>

#include "dlpack.h"
#include "fsa/error.h"

namespace nb = nanobind;

namespace fsa::python {
namespace {

std::string type_name(PyObject* object) { return nb::inst_name(nb::handle(object)).c_str(); }

[[noreturn]] void refuse(const char* name, const std::string& problem) {
  throw Error(ErrorCode::type_mismatch, std::string(name) + ": " + problem);
}

[[noreturn]] void refuse_with_python_error(const char* name, PyObject* object) {
  const nb::python_error error;  // takes the pending exception
  const std::string message = nb::str(error.value()).c_str();
  refuse(name, "cannot read this " + type_name(object) + ": " +
                   message.substr(0, message.find('\n')));  // torch appends a C++ stack
}

const DLPackExchangeAPI* find_exchange_api(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const void* header = capsule != nullptr ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  Py_XDECREF(capsule);
  PyErr_Clear();
  for (auto* api = static_cast<const DLPackExchangeAPIHeader*>(header); api != nullptr; api = api->prev_api)
    if (api->version.major == DLPACK_MAJOR_VERSION) return reinterpret_cast<const DLPackExchangeAPI*>(api);
  return nullptr;
}

// A program passes few types of tensors, so a short list is enough; a type beyond it is looked up on each
// call. The list owns its types: a freed type's address could come back as another type. The GIL guards it.
const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type = nullptr;
    const DLPackExchangeAPI* api = nullptr;
  };
  static std::array<Entry, 8> entries;
  for (Entry& entry : entries) {
    if (entry.type == type) return entry.api;
    if (entry.type == nullptr) {
      const DLPackExchangeAPI* api = find_exchange_api(type);
      Py_INCREF(reinterpret_cast<PyObject*>(type));
      entry = {type, api};
      return api;
    }
  }
  return find_exchange_api(type);
}

DType dtype_from(DLDataType dtype) {
  if (dtype.lanes != 1) return DType::other;
  switch (dtype.code) {
    case kDLFloat:
      return dtype.bits == 64   ? DType::float64
             : dtype.bits == 32 ? DType::float32
             : dtype.bits == 16 ? DType::float16
                                : DType::other;
    case kDLBfloat:
      return dtype.bits == 16 ? DType::bfloat16 : DType::other;
    case kDLInt:
      return dtype.bits == 32 ? DType::int32 : dtype.bits == 64 ? DType::int64 : DType::other;
    default:
      return DType::other;
  }
}

DeviceKind device_from(DLDeviceType type) {
  switch (type) {
    case kDLCPU:
    case kDLCUDAHost:
      return DeviceKind::cpu;
    case kDLCUDA:
    case kDLCUDAManaged:
      return DeviceKind::cuda;
    default:
      return DeviceKind::other;
  }
}

TensorView view_of(const char* name, const DLTensor& tensor) {
  if (tensor.ndim > kMaxRank)
    throw Error(ErrorCode::invalid_argument, std::string(name) + ": rank " + std::to_string(tensor.ndim) +
                                                 ", but no argument has more than " +
                                                 std::to_string(kMaxRank) + " dimensions");
  TensorView view;
  view.data = tensor.data != nullptr ? static_cast<char*>(tensor.data) + tensor.byte_offset : nullptr;
  view.dtype = dtype_from(tensor.dtype);
  view.device = {device_from(tensor.device.device_type), tensor.device.device_id};
  view.rank = tensor.ndim;
  std::int64_t stride = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    view.shape[axis] = tensor.shape[axis];
    view.strides[axis] = tensor.strides != nullptr ? tensor.strides[axis] : stride;  // null before DLPack 1.2
    stride *= tensor.shape[axis];
  }
  return view;
}

// A torch tensor of floats may carry a pending negation (x.conj().imag), which DLPack cannot express. The
// question costs more than the rest of the tensor, so written ones are not asked: the Python layer does that.
bool has_pending_negation(PyObject* object) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  PyObject* result = PyObject_VectorcallMethod(name, &object, 1, nullptr);
  PyErr_Clear();  // not a torch tensor
  Py_XDECREF(result);
  return result == Py_True;
}

TensorView read_capsule(const char* name, PyObject* object, Access access, nb::object& owner) {
  const nb::object method = nb::getattr(nb::handle(object), "__dlpack__", nb::object());
  if (!method.is_valid()) refuse(name, "expected a tensor, got " + type_name(object));
  // Only the versioned capsule can carry read-only arrays; older producers do not know the keyword.
  const nb::tuple no_arguments;
  nb::dict keywords;
  keywords["max_version"] = nb::make_tuple(DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
  PyObject* capsule = PyObject_Call(method.ptr(), no_arguments.ptr(), keywords.ptr());
  if (capsule == nullptr && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    capsule = PyObject_Call(method.ptr(), no_arguments.ptr(), nullptr);
  }
  if (capsule == nullptr) refuse_with_python_error(name, object);
  owner = nb::steal(capsule);  // keeps its name, so its own destructor frees the export
  if (PyCapsule_IsValid(capsule, "dltensor"))
    return view_of(name, static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"))->dl_tensor);
  if (!PyCapsule_IsValid(capsule, "dltensor_versioned"))
    refuse(name, "__dlpack__ of " + type_name(object) + " returned no DLPack capsule");
  const auto& managed =
      *static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
  if (managed.version.major != DLPACK_MAJOR_VERSION)
    refuse(name, "a tensor of DLPack version " + std::to_string(managed.version.major) + ", but version " +
                     std::to_string(DLPACK_MAJOR_VERSION) + " is understood");
  if (access == Access::write && (managed.flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0)
    throw Error(ErrorCode::invalid_argument, std::string(name) + ": a read-only array, but it is written");
  return view_of(name, managed.dl_tensor);
}

}  // namespace

TensorView read_tensor(const char* name, PyObject* object, Access access, nb::object& owner) {
  if (object == Py_None) return {};
  const DLPackExchangeAPI* api = exchange_api(Py_TYPE(object));
  if (api == nullptr || api->dltensor_from_py_object_no_sync == nullptr)
    return read_capsule(name, object, access, owner);
  DLTensor tensor;
  if (api->dltensor_from_py_object_no_sync(object, &tensor) != 0) refuse_with_python_error(name, object);
  if (access == Access::read && tensor.dtype.code != kDLInt && has_pending_negation(object))
    refuse(name, "a tensor with a pending negation; call resolve_neg() first");
  return view_of(name, tensor);
}

Scratch::Scratch(const char* name, nb::handle given, PyObject* like, Device device)
    : name_(name), like_(like), device_(device) {
  if (PyCallable_Check(given.ptr()) != 0) {
    function_ = given.ptr();
  } else if (!given.is_none()) {
    bytes_ = read_tensor(name, given.ptr(), Access::write, owner_);
  } else {
    api_ = exchange_api(Py_TYPE(like));
    if (api_ == nullptr) type_ = type_name(like);
  }
}

Workspace Scratch::workspace() {
  if (bytes_.present()) return {bytes_.data, static_cast<std::size_t>(bytes_.numel())};
  return {
      .allocate = [](void* self, std::size_t bytes) { return static_cast<Scratch*>(self)->allocate(bytes); },
      .owner = this};
}

void* Scratch::allocate(std::size_t bytes) {
  return function_ != nullptr ? ask_function(bytes) : ask_framework(bytes);
}

void* Scratch::ask_function(std::size_t bytes) {
  const nb::gil_scoped_acquire acquire;
  owner_ = nb::handle(function_)(nb::handle(like_), bytes);
  nb::object owner;
  bytes_ = read_tensor(name_, owner_.ptr(), Access::write, owner);
  if (!bytes_.present() || static_cast<std::size_t>(bytes_.numel()) < bytes)
    refuse(name_, "the function returned " + std::to_string(bytes_.present() ? bytes_.numel() : 0) +
                      " bytes of " + std::to_string(bytes));
  return bytes_.data;
}

void* Scratch::ask_framework(std::size_t bytes) {
  if (api_ == nullptr) refuse(name_, "missing, and " + type_ + " has no allocator to take it from");
  std::int64_t size = static_cast<std::int64_t>(bytes);
  DLTensor prototype = {};
  prototype.ndim = 1;
  prototype.shape = &size;
  prototype.dtype = {kDLUInt, 8, 1};
  prototype.device = {device_.kind == DeviceKind::cuda ? kDLCUDA : kDLCPU, device_.index};
  std::string problem;
  DLManagedTensorVersioned* memory = nullptr;
  const int failed = static_cast<const DLPackExchangeAPI*>(api_)->managed_tensor_allocator(
      &prototype, &memory, &problem,
      [](void* into, const char*, const char* message) { *static_cast<std::string*>(into) = message; });
  if (failed != 0 || memory == nullptr)
    throw Error(ErrorCode::device, std::string(name_) + ": no memory for " + std::to_string(bytes) +
                                       " bytes: " + problem.substr(0, problem.find('\n')));
  memory_ = memory;
  return static_cast<char*>(memory->dl_tensor.data) + memory->dl_tensor.byte_offset;
}

Scratch::~Scratch() {
  auto* memory = static_cast<DLManagedTensorVersioned*>(memory_);
  if (memory != nullptr && memory->deleter != nullptr) memory->deleter(memory);
}

void* current_stream(const char* name, PyObject* object, Device device) {
  if (device.kind != DeviceKind::cuda) return nullptr;
  const DLPackExchangeAPI* api = exchange_api(Py_TYPE(object));
  if (api == nullptr)
    refuse(name, "on a CUDA device, but " + type_name(object) +
                     " names no current stream (__dlpack_c_exchange_api__); pass a torch.Tensor");
  void* stream = nullptr;
  if (api->current_work_stream(kDLCUDA, device.index, &stream) != 0) refuse_with_python_error(name, object);
  return stream;
}

}  // namespace fsa::python
