// SPDX-License-Identifier: Apache-2.0
// The module flash_sparse_attention._C: one function per entry of the C++ API, and no decision of its own.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <exception>
#include <optional>

#include "calls.h"
#include "casters.h"
#include "fsa/fsa.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fsa::python {
namespace {

using Inputs = const CallInputs&;
using Options = const CallOptions&;

PyObject* python_type(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return PyExc_ValueError;
    case ErrorCode::type_mismatch:
      return PyExc_TypeError;
    case ErrorCode::unsupported:
      return PyExc_NotImplementedError;
    default:
      return PyExc_RuntimeError;
  }
}

void translate(const std::exception_ptr& exception, void*) {
  try {
    std::rethrow_exception(exception);
  } catch (const Error& error) {
    PyErr_SetString(python_type(error.code()), error.what());
  }
}

nb::tuple to_tuple(const Status& status) { return nb::make_tuple(status.ok, status.reason); }

nb::dict to_dict(const Explanation& explanation) {
  nb::list reasons;
  for (const BackendChoice& choice : explanation.reasons)
    reasons.append(nb::make_tuple(choice.name, choice.chosen, choice.reason));
  nb::dict dict;
  dict["backend"] = explanation.backend;
  dict["kernel"] = explanation.kernel;
  dict["reasons"] = reasons;
  dict["tile"] = nb::make_tuple(explanation.tile_rows, explanation.tile_keys);
  dict["flops"] = explanation.flops;
  dict["bytes"] = explanation.bytes;
  dict["workspace"] = explanation.workspace_bytes;
  dict["threads"] = explanation.threads;
  return dict;
}

// The inputs with the sizes of the block mask.
AttentionInputs inputs_of(Inputs inputs, Options options) {
  AttentionInputs result = inputs;
  result.block_mask.block_rows = options.block_rows;
  result.block_mask.block_keys = options.block_keys;
  return result;
}

ForwardArgs forward_args(Inputs inputs, Options options) {
  return {.inputs = inputs_of(inputs, options), .options = options, .stream = inputs.stream};
}

BackwardArgs backward_args(Inputs inputs, Options options, const TensorView& out, const TensorView& skip_map,
                           const TensorView& grad_out, const TensorView& grad_lse) {
  return {.inputs = inputs_of(inputs, options),
          .options = options,
          .out = out,
          .skip_map = skip_map,
          .grad_out = grad_out,
          .grad_lse = grad_lse,
          .stream = inputs.stream};
}

DecodeArgs decode_args(Inputs inputs, Options options, std::optional<std::int64_t> num_splits,
                       bool batch_invariant) {
  return {.inputs = inputs_of(inputs, options),
          .options = options,
          .num_splits = num_splits,
          .batch_invariant = batch_invariant,
          .stream = inputs.stream};
}

void bind_forward(nb::module_& m) {
  m.def(
      "forward",
      [](Inputs inputs, Options options, Out<"out"> out, Out<"lse"> lse, Out<"skip_map"> skip_map,
         nb::handle workspace) {
        ForwardArgs args = forward_args(inputs, options);
        args.out = out;
        args.lse = lse;
        args.skip_map = skip_map;
        Scratch scratch("workspace", workspace, inputs.query_object, inputs.query.device);
        args.workspace = scratch.workspace();
        without_gil([&] { forward(args); });
      },
      "inputs"_a, "options"_a, "out"_a, "lse"_a.none(), "skip_map"_a.none(), "workspace"_a.none());
  m.def(
      "workspace_size_forward",
      [](Inputs inputs, Options options) {
        return without_gil([&] { return workspace_size(forward_args(inputs, options)); });
      },
      "inputs"_a, "options"_a);
  m.def(
      "supports_forward",
      [](Inputs inputs, Options options) { return to_tuple(supports(forward_args(inputs, options))); },
      "inputs"_a, "options"_a);
  m.def(
      "explain_forward",
      [](Inputs inputs, Options options, Out<"out"> out, Out<"lse"> lse, Out<"skip_map"> skip_map) {
        ForwardArgs args = forward_args(inputs, options);
        args.out = out;
        args.lse = lse;
        args.skip_map = skip_map;
        return to_dict(explain(args));
      },
      "inputs"_a, "options"_a, "out"_a.none(), "lse"_a.none(), "skip_map"_a.none());
  m.def(
      "prefill_forward",
      [](Inputs inputs, Options options, Out<"out"> out, Out<"lse"> lse, Out<"skip_map"> skip_map) {
        ForwardArgs args = forward_args(inputs, options);
        args.out = out;
        args.lse = lse;
        args.skip_map = skip_map;
        without_gil([&] { prefill(args); });
      },
      "inputs"_a, "options"_a, "out"_a.none(), "lse"_a.none(), "skip_map"_a.none());
  m.def(
      "skip_map_shape",
      [](Inputs inputs, Options options) {
        nb::list shape;
        for (const std::int64_t extent : skip_map_shape(forward_args(inputs, options))) shape.append(extent);
        return nb::tuple(shape);
      },
      "inputs"_a, "options"_a);
  m.def(
      "count_tiles",
      [](Inputs inputs, Options options, In<"skip_map"> skip_map) {
        ForwardArgs args = forward_args(inputs, options);
        args.skip_map = skip_map;
        const TileCounts counts = without_gil([&] { return count_tiles(args); });
        return nb::make_tuple(counts.kept, counts.visible);
      },
      "inputs"_a, "options"_a, "skip_map"_a);
}

void bind_backward(nb::module_& m) {
  m.def(
      "backward",
      [](Inputs inputs, Options options, In<"out"> out, In<"lse"> lse, In<"skip_map"> skip_map,
         In<"grad_out"> grad_out, In<"grad_lse"> grad_lse, Out<"grad_query"> grad_query,
         Out<"grad_key"> grad_key, Out<"grad_value"> grad_value, Out<"grad_alpha"> grad_alpha,
         Out<"grad_delta"> grad_delta, Out<"grad_sink"> grad_sink, nb::handle workspace,
         bool add_to_grad_query, bool add_to_grad_key_value) {
        BackwardArgs args = backward_args(inputs, options, out, skip_map, grad_out, grad_lse);
        args.lse = lse;
        args.grad_query = grad_query;
        args.grad_key = grad_key;
        args.grad_value = grad_value;
        args.grad_alpha = grad_alpha;
        args.grad_delta = grad_delta;
        args.grad_sink = grad_sink;
        args.add_to_grad_query = add_to_grad_query;
        args.add_to_grad_key_value = add_to_grad_key_value;
        Scratch scratch("workspace", workspace, inputs.query_object, inputs.query.device);
        args.workspace = scratch.workspace();
        without_gil([&] { backward(args); });
      },
      "inputs"_a, "options"_a, "out"_a, "lse"_a, "skip_map"_a.none(), "grad_out"_a, "grad_lse"_a.none(),
      "grad_query"_a, "grad_key"_a, "grad_value"_a, "grad_alpha"_a.none(), "grad_delta"_a.none(),
      "grad_sink"_a.none(), "workspace"_a.none(), "add_to_grad_query"_a = false,
      "add_to_grad_key_value"_a = false);
  m.def(
      "workspace_size_backward",
      [](Inputs inputs, Options options, In<"out"> out, In<"skip_map"> skip_map, In<"grad_out"> grad_out,
         In<"grad_lse"> grad_lse) {
        return without_gil([&] {
          return workspace_size(backward_args(inputs, options, out, skip_map, grad_out, grad_lse));
        });
      },
      "inputs"_a, "options"_a, "out"_a.none(), "skip_map"_a.none(), "grad_out"_a.none(), "grad_lse"_a.none());
  m.def(
      "supports_backward",
      [](Inputs inputs, Options options, In<"out"> out, In<"skip_map"> skip_map, In<"grad_out"> grad_out,
         In<"grad_lse"> grad_lse) {
        return to_tuple(supports(backward_args(inputs, options, out, skip_map, grad_out, grad_lse)));
      },
      "inputs"_a, "options"_a, "out"_a.none(), "skip_map"_a.none(), "grad_out"_a.none(), "grad_lse"_a.none());
  m.def(
      "explain_backward",
      [](Inputs inputs, Options options, In<"out"> out, In<"skip_map"> skip_map, In<"grad_out"> grad_out,
         In<"grad_lse"> grad_lse) {
        return to_dict(explain(backward_args(inputs, options, out, skip_map, grad_out, grad_lse)));
      },
      "inputs"_a, "options"_a, "out"_a.none(), "skip_map"_a.none(), "grad_out"_a.none(), "grad_lse"_a.none());
}

void bind_decode(nb::module_& m) {
  m.def(
      "decode",
      [](Inputs inputs, Options options, std::optional<std::int64_t> num_splits, bool batch_invariant,
         Out<"out"> out, Out<"lse"> lse, nb::handle workspace) {
        DecodeArgs args = decode_args(inputs, options, num_splits, batch_invariant);
        args.out = out;
        args.lse = lse;
        Scratch scratch("workspace", workspace, inputs.query_object, inputs.query.device);
        args.workspace = scratch.workspace();
        without_gil([&] { decode(args); });
      },
      "inputs"_a, "options"_a, "num_splits"_a.none(), "batch_invariant"_a, "out"_a, "lse"_a.none(),
      "workspace"_a.none());
  m.def(
      "workspace_size_decode",
      [](Inputs inputs, Options options, std::optional<std::int64_t> num_splits, bool batch_invariant) {
        return without_gil(
            [&] { return workspace_size(decode_args(inputs, options, num_splits, batch_invariant)); });
      },
      "inputs"_a, "options"_a, "num_splits"_a.none(), "batch_invariant"_a);
  m.def(
      "supports_decode",
      [](Inputs inputs, Options options, std::optional<std::int64_t> num_splits, bool batch_invariant) {
        return to_tuple(supports(decode_args(inputs, options, num_splits, batch_invariant)));
      },
      "inputs"_a, "options"_a, "num_splits"_a.none(), "batch_invariant"_a);
  m.def(
      "explain_decode",
      [](Inputs inputs, Options options, std::optional<std::int64_t> num_splits, bool batch_invariant) {
        return to_dict(explain(decode_args(inputs, options, num_splits, batch_invariant)));
      },
      "inputs"_a, "options"_a, "num_splits"_a.none(), "batch_invariant"_a);
}

void bind_library(nb::module_& m) {
  m.def(
      "merge",
      [](In<"outs"> outs, In<"lses"> lses, Out<"out"> out, Out<"lse"> lse) {
        without_gil([&] { merge({.outs = outs, .lses = lses, .out = out, .lse = lse}); });
      },
      "outs"_a, "lses"_a, "out"_a, "lse"_a);
  m.def("backends", [] {
    nb::list list;
    for (const BackendInfo& backend : backends())
      list.append(nb::make_tuple(backend.name, backend.available, backend.reason));
    return list;
  });
  m.def(
      "skip_tile",
      [](std::int64_t head_dim) {
        const SkipTile tile = skip_tile(head_dim);
        return nb::make_tuple(tile.rows, tile.keys);
      },
      "head_dim"_a);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, "threads"_a);
  m.def("version", &version);
}

}  // namespace
}  // namespace fsa::python

NB_MODULE(_C, m) {
  m.doc() = "Binding of the C++ library; use the functions of flash_sparse_attention.";
  nb::register_exception_translator(fsa::python::translate);
  fsa::python::bind_forward(m);
  fsa::python::bind_backward(m);
  fsa::python::bind_decode(m);
  fsa::python::bind_library(m);
  fsa::python::bind_nsa(m);
}
