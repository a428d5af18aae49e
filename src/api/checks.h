// SPDX-License-Identifier: Apache-2.0
// Checks of one argument each. Every message names the argument, its value, the limit and, where the value
// alone does not show it, the way out.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <locale>
#include <optional>
#include <sstream>
#include <string>

#include "fsa/error.h"
#include "fsa/tensor.h"

namespace fsa {

inline constexpr std::int64_t kMaxHeadDim = 512;
inline constexpr std::int64_t kMaxLength = 0x7fffffff;  // lengths and offsets are int32 in cu_seqlens

// What the arguments are checked for.
enum class Purpose : std::uint8_t {
  run,     // all required tensors and their data must be there
  ask,     // supports(): an output may be absent; one that is there is checked
  shapes,  // workspace_size(), explain(), ...: as ask, and of the data only index tensors are looked at
};

template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
[[noreturn]] void fail(ErrorCode code, const Parts&... parts) {
  throw Error(code, text_of(parts...));
}

struct Shape {
  std::int64_t extent[kMaxRank] = {};
  int rank = 0;

  Shape(std::initializer_list<std::int64_t> extents) {
    for (std::int64_t value : extents) extent[rank++] = value;
  }
};

Shape shape_of(const TensorView& view);
std::string to_string(const Shape& shape);    // "[2, 3]"
std::string to_string(const Device& device);  // "cpu", "cuda:0"
bool same_shape(const TensorView& view, const Shape& shape);
bool is_empty(const TensorView& view);  // without the product of the extents, which may overflow

// Stride of an axis, 0 where it is never multiplied by more than 0: a size-1 axis may have any stride.
std::int64_t effective_stride(const TensorView& view, int axis);

void require(const char* name, const TensorView& view);

// Rank, extents, memory range and alignment: what holds for every tensor. Reads no data.
void check_view(const char* name, const TensorView& view);

// Data is there unless the tensor is empty.
void check_data(const char* name, const TensorView& view);

// `layout` is the shape in words, "[batch, seqlen_q, num_heads, head_dim]".
void check_rank(const char* name, const TensorView& view, int rank, const char* layout);
void check_shape(const char* name, const TensorView& view, const Shape& expected, const char* layout);

// "key: head_dim 64, but query has head_dim 128".
void check_equal(const char* name, const char* quantity, std::int64_t value, const char* other_name,
                 std::int64_t other_value);

void check_head_dim(const char* name, const char* quantity, std::int64_t value,
                    std::int64_t limit = kMaxHeadDim);

// num_kv_heads, of the tensor `key_name`, is above 0 and divides num_heads of query.
void check_heads(std::int64_t num_heads, const char* key_name, std::int64_t num_kv_heads);

void check_dtype(const char* name, const TensorView& view, DType expected, const char* why);
void check_index_dtype(const char* name, const TensorView& view);
void check_float_dtype(const char* name, const TensorView& view);
// The dtype of query, float32 or float64.
void check_parameter_dtype(const char* name, const TensorView& view, DType query_dtype);

void check_device(const char* name, const TensorView& view, const char* first_name, const Device& device);
void check_unit_last_stride(const char* name, const TensorView& view);

// No two elements share an address, so that each can be written.
void check_writable(const char* name, const TensorView& view);

// Windows of `compress_block` tokens at distance `compress_stride`.
void check_windows_of_tokens(std::int64_t compress_block, std::int64_t compress_stride);

void check_finite(const char* name, double value);

// 1 / sqrt(head_dim) unless given.
double checked_softmax_scale(const std::optional<double>& given, std::int64_t head_dim);

// `needed` bytes, 64-byte aligned. Null is accepted where nothing is needed.
void check_workspace(const Workspace& workspace, std::size_t needed);

}  // namespace fsa
