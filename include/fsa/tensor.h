// SPDX-License-Identifier: Apache-2.0
// TensorView: a tensor that somebody else owns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "fsa/export.h"

namespace fsa {

enum class DType : std::uint8_t {
  none,  ///< No tensor: a default-constructed view.
  float64,
  float32,
  bfloat16,
  float16,
  int32,
  int64,
  other,  ///< A type that no function takes; kept so that an error can be raised by name.
};

/// Size of one element in bytes; 0 for `none` and `other`.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      return 2;
    default:
      return 0;
  }
}

/// "float32", "bfloat16", ...
FSA_API const char* name_of(DType dtype);

enum class DeviceKind : std::uint8_t { cpu, cuda, other };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  std::int32_t index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

inline constexpr int kMaxRank = 6;

/// Pointer, shape, strides, dtype and device of a tensor owned by the caller. Strides count elements,
/// not bytes. A default-constructed view means "no tensor"; every optional tensor of the API is one.
struct TensorView {
  void* data = nullptr;
  std::int64_t shape[kMaxRank] = {};
  std::int64_t strides[kMaxRank] = {};
  std::int32_t rank = 0;
  DType dtype = DType::none;
  Device device = {};

  bool present() const { return dtype != DType::none; }
  explicit operator bool() const { return present(); }

  std::int64_t numel() const {
    std::int64_t count = 1;
    for (int axis = 0; axis < rank; ++axis) count *= shape[axis];
    return count;
  }

  /// A row-major (contiguous) view.
  static TensorView contiguous(void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                               Device device = {}) {
    TensorView view;
    view.data = data;
    view.dtype = dtype;
    view.device = device;
    for (std::int64_t extent : shape)
      if (view.rank < kMaxRank) view.shape[view.rank++] = extent;
    std::int64_t stride = 1;
    for (int axis = view.rank - 1; axis >= 0; --axis) {
      view.strides[axis] = stride;
      stride *= view.shape[axis] > 1 ? view.shape[axis] : 1;
    }
    return view;
  }
};

/// Scratch memory owned by the caller, aligned to 64 bytes, on the device of the inputs. Instead of the memory, a
/// function that returns some: called at most once, with the bytes that the call needs, when data is null and they
/// are not 0. Saves a workspace_size(), which checks all arguments once more. It may throw.
struct Workspace {
  void* data = nullptr;
  std::size_t bytes = 0;
  void* (*allocate)(void* owner, std::size_t bytes) = nullptr;
  void* owner = nullptr;
};

}  // namespace fsa
