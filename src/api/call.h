// SPDX-License-Identifier: Apache-2.0
// One call on its way to a backend, and how outputs and tensors of earlier calls join it.
#pragma once

#include "api/checks.h"
#include "api/overlap.h"
#include "core/problem.h"
#include "fsa/attention.h"

namespace fsa {

// Which axis of a tensor is what; -1: it has none.
struct Axes {
  int batch = -1;
  int row = -1;
  int head = -1;
  int dim = -1;
};

inline constexpr Axes kBatchedAxes{0, 1, 2, 3};  // [batch, seqlen, heads, dim]
inline constexpr Axes kPackedAxes{-1, 0, 1, 2};  // [total, heads, dim]

// The tensors of a call, as the checks across them need them. They point to the views of the caller.
struct CallTensors {
  Device device;  // of the first input, and so of all
  TensorList inputs;
  TensorList outputs;
};

struct Call : CallTensors {
  Problem problem;
  Arguments arguments;
  Axes query_axes, key_axes, lse_axes;  // out as query, value as key
  Axes alpha_axes, delta_axes;
};

Operand make_operand(const TensorView& view, const Axes& axes);
// Address and strides in multiples of 16 bytes, columns side by side. An absent operand is.
bool is_aligned(const Operand& operand);
IndexTable make_table(const TensorView& view);

Shape skip_map_shape(const Problem& problem);

// How the call uses a tensor that is not one of its inputs: an output, or one of an earlier call.
enum class Role : std::uint8_t { reads, reads_any_strides, writes };

struct Expected {
  Shape shape;
  DType dtype;
  const char* layout;  // the shape in words
};

Expected expected_out(const Call& call, const AttentionInputs& inputs);
Expected expected_lse(const Call& call);

// Inputs, those that are present: what holds for each tensor alone, and one device for all, that of the first.
// Index tensors are int32 and small; their data must be there whatever the purpose.
void take_inputs(CallTensors& call, std::initializer_list<TensorList::Item> tensors,
                 std::initializer_list<TensorList::Item> index_tensors, Purpose purpose);

// Checks the tensor and lists it for the overlap test. False when it is absent, which is an error only when it
// is required and the purpose is to run.
bool accept(CallTensors& call, const char* name, const TensorView& view, Role role, bool required,
            const Expected& expected, Purpose purpose);

// A gradient, which has the shape and dtype of its tensor. `name` begins with "grad_".
void accept_gradient(CallTensors& call, const char* name, const TensorView& gradient,
                     const TensorView& tensor, bool required, const char* layout, Purpose purpose);

// Checks and takes the skip map, which may be absent.
void accept_skip_map(Call& call, const TensorView& view, Role role, Purpose purpose);

}  // namespace fsa
