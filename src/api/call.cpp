// SPDX-License-Identifier: Apache-2.0
#include "api/call.h"

#include "core/skip_tile.h"

namespace fsa {
namespace {

SkipMap make_skip_map(const Problem& problem, const TensorView& view) {
  const int head_axis = problem.packed_q ? 0 : 1;
  SkipMap map;
  map.present = true;
  map.data = static_cast<std::int32_t*>(view.data);
  map.stride_batch = problem.packed_q ? 0 : effective_stride(view, 0);
  map.stride_head = effective_stride(view, head_axis);
  map.stride_tile = effective_stride(view, head_axis + 1);
  map.tiles = view.shape[head_axis + 1];
  map.words = view.shape[head_axis + 2];
  return map;
}

}  // namespace

Operand make_operand(const TensorView& view, const Axes& axes) {
  Operand operand;
  if (!view.present()) return operand;
  operand.data = view.data;
  operand.dtype = view.dtype;
  operand.stride_batch = effective_stride(view, axes.batch);
  operand.stride_row = effective_stride(view, axes.row);
  operand.stride_head = effective_stride(view, axes.head);
  operand.stride_dim = axes.dim >= 0 && view.shape[axes.dim] > 1 ? view.strides[axes.dim] : 1;
  return operand;
}

bool is_aligned(const Operand& operand) {
  const auto bytes = static_cast<std::int64_t>(size_of(operand.dtype));
  const auto multiple = [](std::int64_t value) { return value % 16 == 0; };
  return !operand.present() ||
         (reinterpret_cast<std::uintptr_t>(operand.data) % 16 == 0 &&
          multiple(operand.stride_batch * bytes) && multiple(operand.stride_row * bytes) &&
          multiple(operand.stride_head * bytes) && operand.stride_dim == 1);
}

Shape skip_map_shape(const Problem& problem) {
  const std::int64_t words = ceil_div(ceil_div(problem.max_seqlen_k, skip_tile_keys(problem.head_dim)), 32);
  if (problem.packed_q) return {problem.num_heads, problem.total_q / kSkipTileRows + problem.batch, words};
  return {problem.batch, problem.num_heads, ceil_div(problem.max_seqlen_q, kSkipTileRows), words};
}

Expected expected_out(const Call& call, const AttentionInputs& inputs) {
  const Problem& p = call.problem;
  Shape shape = shape_of(inputs.query);
  shape.extent[shape.rank - 1] = p.head_dim_v;
  const char* layout = p.operation == Operation::decode ? "[batch, num_heads, head_dim_v]"
                       : p.packed_q                     ? "[total_q, num_heads, head_dim_v]"
                                                        : "[batch, seqlen_q, num_heads, head_dim_v]";
  return {shape, p.dtype, layout};
}

Expected expected_lse(const Call& call) {
  const Problem& p = call.problem;
  const DType dtype = p.dtype == DType::float64 ? DType::float64 : DType::float32;
  if (p.operation == Operation::decode) return {{p.batch, p.num_heads}, dtype, "[batch, num_heads]"};
  if (p.packed_q) return {{p.num_heads, p.total_q}, dtype, "[num_heads, total_q]"};
  return {{p.batch, p.num_heads, p.max_seqlen_q}, dtype, "[batch, num_heads, seqlen_q]"};
}

IndexTable make_table(const TensorView& view) {
  IndexTable table;
  table.present = view.present();
  if (!table.present) return table;
  table.data = static_cast<const std::int32_t*>(view.data);
  table.stride_row = effective_stride(view, 0);
  table.stride_column = view.rank > 1 ? effective_stride(view, 1) : 0;
  return table;
}

void take_inputs(CallTensors& call, std::initializer_list<TensorList::Item> tensors,
                 std::initializer_list<TensorList::Item> index_tensors, Purpose purpose) {
  const TensorList::Item& first = *tensors.begin();
  call.device = first.view->device;
  const auto take = [&](const TensorList::Item& item) {
    call.inputs.add(item.name, *item.view);
    check_view(item.name, *item.view);
    if (purpose != Purpose::shapes) check_data(item.name, *item.view);
    check_device(item.name, *item.view, first.name, call.device);
  };
  for (const TensorList::Item& item : tensors)
    if (item.view->present()) take(item);
  for (const TensorList::Item& item : index_tensors) {
    if (!item.view->present()) continue;
    take(item);
    check_data(item.name, *item.view);
    check_index_dtype(item.name, *item.view);
  }
}

bool accept(CallTensors& call, const char* name, const TensorView& view, Role role, bool required,
            const Expected& expected, Purpose purpose) {
  if (required && purpose == Purpose::run) require(name, view);
  if (!view.present()) return false;
  check_view(name, view);
  if (purpose != Purpose::shapes) check_data(name, view);
  check_device(name, view, call.inputs.begin()->name, call.device);
  check_dtype(name, view, expected.dtype, "");
  check_shape(name, view, expected.shape, expected.layout);
  if (role != Role::reads_any_strides) check_unit_last_stride(name, view);
  if (role == Role::writes) check_writable(name, view);
  (role == Role::writes ? call.outputs : call.inputs).add(name, view);
  return true;
}

void accept_gradient(CallTensors& call, const char* name, const TensorView& gradient,
                     const TensorView& tensor, bool required, const char* layout, Purpose purpose) {
  constexpr int kPrefix = 5;  // "grad_"
  if (gradient.present() && !tensor.present())
    fail(ErrorCode::invalid_argument, name, ": given, but there is no ", name + kPrefix,
         " to differentiate by; leave it out");
  accept(call, name, gradient, Role::writes, required, {shape_of(tensor), tensor.dtype, layout}, purpose);
}

void accept_skip_map(Call& call, const TensorView& view, Role role, Purpose purpose) {
  const Expected expected{skip_map_shape(call.problem), DType::int32,
                          call.problem.packed_q ? "[num_heads, total_q / 64 + batch, words]"
                                                : "[batch, num_heads, ceil(seqlen_q / 64), words]"};
  call.problem.has_skip_map = accept(call, "skip_map", view, role, false, expected, purpose);
  if (call.problem.has_skip_map) call.arguments.skip_map = make_skip_map(call.problem, view);
}

}  // namespace fsa
