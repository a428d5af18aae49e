// SPDX-License-Identifier: Apache-2.0
#include "api/checks.h"

#include <algorithm>
#include <cmath>

namespace fsa {
namespace {

constexpr std::int64_t kMaxReach = std::int64_t{1} << 61;  // bytes; sums of two stay inside int64

// False on overflow.
bool multiply(std::int64_t& value, std::int64_t factor) {
  return !__builtin_mul_overflow(value, factor, &value);
}

// Largest distance in elements between two elements of the view; negative on overflow.
std::int64_t reach(const TensorView& view) {
  std::int64_t total = 0;
  for (int axis = 0; axis < view.rank; ++axis) {
    if (view.shape[axis] <= 1) continue;
    std::int64_t distance = view.strides[axis];
    if (distance == INT64_MIN || !multiply(distance, view.shape[axis] - 1)) return -1;
    if (__builtin_add_overflow(total, std::abs(distance), &total)) return -1;
  }
  return total;
}

void check_extents(const char* name, const TensorView& view) {
  std::int64_t bytes = std::max<std::int64_t>(1, static_cast<std::int64_t>(size_of(view.dtype)));
  bool fits = true;
  for (int axis = 0; axis < view.rank; ++axis) {
    const std::int64_t extent = view.shape[axis];
    if (extent < 0)
      fail(ErrorCode::invalid_argument, name, ": shape ", to_string(shape_of(view)),
           " has a negative extent");
    if (extent > kMaxLength)
      fail(ErrorCode::invalid_argument, name, ": shape ", to_string(shape_of(view)),
           ", the limit of an extent is ", kMaxLength);
    fits = fits && multiply(bytes, extent);
  }
  if (is_empty(view)) return;
  if (!fits || bytes > kMaxReach)
    fail(ErrorCode::invalid_argument, name, ": shape ", to_string(shape_of(view)),
         " has more elements than an address can reach; split the call");
}

}  // namespace

Shape shape_of(const TensorView& view) {
  Shape shape{};
  for (int axis = 0; axis < view.rank; ++axis) shape.extent[shape.rank++] = view.shape[axis];
  return shape;
}

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (int axis = 0; axis < shape.rank; ++axis) {
    if (axis > 0) text += ", ";
    text += std::to_string(shape.extent[axis]);
  }
  return text + "]";
}

std::string to_string(const Device& device) {
  if (device.kind == DeviceKind::cpu) return "cpu";
  const char* kind = device.kind == DeviceKind::cuda ? "cuda:" : "unknown device ";
  return kind + std::to_string(device.index);
}

bool same_shape(const TensorView& view, const Shape& shape) {
  return view.rank == shape.rank && std::equal(shape.extent, shape.extent + shape.rank, view.shape);
}

bool is_empty(const TensorView& view) {
  return std::find(view.shape, view.shape + view.rank, 0) != view.shape + view.rank;
}

std::int64_t effective_stride(const TensorView& view, int axis) {
  return axis < 0 || view.shape[axis] <= 1 ? 0 : view.strides[axis];
}

void require(const char* name, const TensorView& view) {
  if (!view.present()) fail(ErrorCode::invalid_argument, name, ": missing, but it is required");
}

void check_view(const char* name, const TensorView& view) {
  if (view.rank < 0 || view.rank > kMaxRank)
    fail(ErrorCode::invalid_argument, name, ": rank ", view.rank, ", the limit is ", kMaxRank);
  if (view.dtype == DType::other)
    fail(ErrorCode::type_mismatch, name, ": its dtype is none that this library takes; convert it first");
  if (view.device.kind == DeviceKind::other)
    fail(ErrorCode::type_mismatch, name, ": on ", to_string(view.device),
         ", must be on the CPU or a CUDA device");
  check_extents(name, view);
  if (is_empty(view)) return;
  const auto bytes = static_cast<std::int64_t>(size_of(view.dtype));
  const std::int64_t distance = reach(view);
  if (distance < 0 || distance > kMaxReach / bytes)
    fail(ErrorCode::invalid_argument, name, ": its strides reach further than an address can");
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  if (address % size_of(view.dtype) != 0)
    fail(ErrorCode::invalid_argument, name, ": data is not aligned to its ", bytes,
         "-byte elements; pass an aligned copy");
}

void check_data(const char* name, const TensorView& view) {
  if (view.data == nullptr && !is_empty(view))
    fail(ErrorCode::invalid_argument, name, ": data is null, but shape ", to_string(shape_of(view)),
         " is not empty");
}

void check_rank(const char* name, const TensorView& view, int rank, const char* layout) {
  if (view.rank != rank)
    fail(ErrorCode::invalid_argument, name, ": rank ", view.rank, " with shape ", to_string(shape_of(view)),
         ", must be rank ", rank, ", ", layout);
}

void check_shape(const char* name, const TensorView& view, const Shape& expected, const char* layout) {
  if (!same_shape(view, expected))
    fail(ErrorCode::invalid_argument, name, ": shape ", to_string(shape_of(view)), ", must be ",
         to_string(expected), " = ", layout);
}

void check_equal(const char* name, const char* quantity, std::int64_t value, const char* other_name,
                 std::int64_t other_value) {
  if (value != other_value)
    fail(ErrorCode::invalid_argument, name, ": ", quantity, " ", value, ", but ", other_name, " has ",
         quantity, " ", other_value);
}

void check_head_dim(const char* name, const char* quantity, std::int64_t value, std::int64_t limit) {
  if (value < 1 || value > limit)
    fail(ErrorCode::invalid_argument, name, ": ", quantity, " ", value, ", must be from 1 to ", limit);
}

void check_heads(std::int64_t num_heads, const char* key_name, std::int64_t num_kv_heads) {
  if (num_kv_heads < 1) fail(ErrorCode::invalid_argument, key_name, ": num_kv_heads 0, must be at least 1");
  if (num_heads % num_kv_heads != 0)
    fail(ErrorCode::invalid_argument, "query: num_heads ", num_heads, " is not a multiple of num_kv_heads ",
         num_kv_heads, " of ", key_name);
}

void check_dtype(const char* name, const TensorView& view, DType expected, const char* why) {
  if (view.dtype != expected)
    fail(ErrorCode::type_mismatch, name, ": dtype ", name_of(view.dtype), ", must be ", name_of(expected),
         why);
}

void check_index_dtype(const char* name, const TensorView& view) {
  check_dtype(name, view, DType::int32, "; convert it");
}

void check_float_dtype(const char* name, const TensorView& view) {
  switch (view.dtype) {
    case DType::float64:
    case DType::float32:
    case DType::bfloat16:
    case DType::float16:
      return;
    default:
      fail(ErrorCode::type_mismatch, name, ": dtype ", name_of(view.dtype),
           ", must be float64, float32, bfloat16 or float16");
  }
}

void check_parameter_dtype(const char* name, const TensorView& view, DType query_dtype) {
  if (view.dtype != query_dtype && view.dtype != DType::float32 && view.dtype != DType::float64)
    fail(ErrorCode::type_mismatch, name, ": dtype ", name_of(view.dtype), ", must be ", name_of(query_dtype),
         " as query, float32 or float64");
}

void check_device(const char* name, const TensorView& view, const char* first_name, const Device& device) {
  const bool same = view.device.kind == device.kind &&
                    (device.kind == DeviceKind::cpu || view.device.index == device.index);
  if (!same)
    fail(ErrorCode::type_mismatch, name, ": on ", to_string(view.device), ", but ", first_name, " is on ",
         to_string(device), "; all tensors must be on one device");
}

void check_unit_last_stride(const char* name, const TensorView& view) {
  const int last = view.rank - 1;
  if (last < 0 || view.shape[last] <= 1 || is_empty(view) || view.strides[last] == 1) return;
  fail(ErrorCode::invalid_argument, name, ": stride ", view.strides[last],
       " of the last dimension, must be 1; pass a contiguous copy");
}

void check_writable(const char* name, const TensorView& view) {
  if (is_empty(view)) return;
  int axes[kMaxRank];
  int count = 0;
  for (int axis = 0; axis < view.rank; ++axis)
    if (view.shape[axis] > 1) axes[count++] = axis;
  const auto step = [&view](int axis) { return std::abs(view.strides[axis]); };
  std::sort(axes, axes + count, [&step](int a, int b) { return step(a) < step(b); });
  std::int64_t covered = 0;  // distance that the axes so far reach
  for (int i = 0; i < count; ++i) {
    const int axis = axes[i];
    if (step(axis) == 0)
      fail(ErrorCode::invalid_argument, name, ": expanded (stride 0 over the ", view.shape[axis],
           " entries of dimension ", axis,
           "), so it cannot be written; pass a tensor with memory of its own");
    if (step(axis) <= covered)
      fail(ErrorCode::invalid_argument, name, ": stride ", view.strides[axis], " of dimension ", axis,
           " makes elements share memory, so it cannot be written; pass a tensor with memory of its own");
    covered += step(axis) * (view.shape[axis] - 1);
  }
}

void check_windows_of_tokens(std::int64_t compress_block, std::int64_t compress_stride) {
  if (compress_block < 1 || compress_block > kMaxLength)
    fail(ErrorCode::invalid_argument, "compress_block: ", compress_block, ", must be from 1 to ", kMaxLength);
  if (compress_stride < 1 || compress_block % compress_stride != 0)
    fail(ErrorCode::invalid_argument, "compress_stride: ", compress_stride,
         ", must be at least 1 and divide compress_block ", compress_block);
}

void check_finite(const char* name, double value) {
  if (!std::isfinite(value))
    fail(ErrorCode::invalid_argument, name, ": ", value, ", must be a finite number");
}

double checked_softmax_scale(const std::optional<double>& given, std::int64_t head_dim) {
  if (!given) return 1 / std::sqrt(static_cast<double>(head_dim));
  check_finite("softmax_scale", *given);
  if (*given <= 0)
    fail(ErrorCode::invalid_argument, "softmax_scale: ", *given,
         ", must be above 0; leave it unset for 1 / sqrt(head_dim)");
  return *given;
}

void check_workspace(const Workspace& workspace, std::size_t needed) {
  if (needed == 0) return;
  if (workspace.data == nullptr || workspace.bytes < needed)
    fail(ErrorCode::invalid_argument, "workspace: ", workspace.data == nullptr ? 0 : workspace.bytes,
         " bytes, but this call needs ", needed, "; workspace_size(args) says how many");
  if (reinterpret_cast<std::uintptr_t>(workspace.data) % 64 != 0)
    fail(ErrorCode::invalid_argument, "workspace: address ", workspace.data, " is not aligned to 64 bytes");
}

}  // namespace fsa
