// SPDX-License-Identifier: Apache-2.0
// Native sparse attention: the functions nsa_* of the module.
#include "fsa/nsa.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "calls.h"
#include "casters.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fsa::python {
namespace {

using Int = std::int64_t;
using Scale = std::optional<double>;
using Text = const std::string&;

nsa::CompressKind compress_kind(Text name) {
  if (name == "linear") return nsa::CompressKind::linear;
  if (name == "mean") return nsa::CompressKind::mean;
  if (name == "weighted") return nsa::CompressKind::weighted;
  throw Error(ErrorCode::invalid_argument, "kind: '" + name + "', but it is 'linear', 'mean' or 'weighted'");
}

nsa::Algorithm algorithm_from(Text name) {
  if (name == "off") return nsa::Algorithm::automatic;
  if (name == "kv_outer") return nsa::Algorithm::kv_outer;
  if (name == "query_outer") return nsa::Algorithm::query_outer;
  throw Error(ErrorCode::invalid_argument,
              "algorithm: '" + name + "', but it is 'off', 'kv_outer' or 'query_outer' here");
}

nsa::CompressInputs compress_inputs(const TensorView& x, const TensorView& weight, const TensorView& pe,
                                    const TensorView& cu_seqlens, const TensorView& cu_compressed) {
  return {.x = x,
          .weight = weight,
          .intra_block_pe = pe,
          .cu_seqlens = cu_seqlens,
          .cu_seqlens_compressed = cu_compressed};
}

nsa::CompressOptions compress_options(Text kind, Int compress_block, Int compress_stride, Text backend) {
  return {.kind = compress_kind(kind),
          .compress_block = compress_block,
          .compress_stride = compress_stride,
          .backend = backend};
}

void bind_compress(nb::module_& m) {
  m.def(
      "nsa_compress",
      [](First<"x"> x, In<"weight"> weight, In<"intra_block_pe"> pe, In<"cu_seqlens"> cu_seqlens,
         In<"cu_seqlens_compressed"> cu_compressed, Text kind, Int block, Int stride, Text backend,
         Out<"out"> out, Out<"workspace"> workspace) {
        const nsa::CompressArgs args{.inputs = compress_inputs(x, weight, pe, cu_seqlens, cu_compressed),
                                     .options = compress_options(kind, block, stride, backend),
                                     .out = out,
                                     .workspace = workspace_from(workspace),
                                     .stream = x.stream};
        without_gil([&] { nsa::compress(args); });
      },
      "x"_a, "weight"_a.none(), "intra_block_pe"_a.none(), "cu_seqlens"_a.none(),
      "cu_seqlens_compressed"_a.none(), "kind"_a, "compress_block"_a, "compress_stride"_a, "backend"_a,
      "out"_a, "workspace"_a.none());
  m.def(
      "nsa_workspace_size_compress",
      [](First<"x"> x, In<"weight"> weight, In<"intra_block_pe"> pe, In<"cu_seqlens"> cu_seqlens,
         In<"cu_seqlens_compressed"> cu_compressed, Text kind, Int block, Int stride, Text backend) {
        const nsa::CompressArgs args{.inputs = compress_inputs(x, weight, pe, cu_seqlens, cu_compressed),
                                     .options = compress_options(kind, block, stride, backend)};
        return without_gil([&] { return nsa::workspace_size(args); });
      },
      "x"_a, "weight"_a.none(), "intra_block_pe"_a.none(), "cu_seqlens"_a.none(),
      "cu_seqlens_compressed"_a.none(), "kind"_a, "compress_block"_a, "compress_stride"_a, "backend"_a);
  m.def(
      "nsa_compress_backward",
      [](First<"x"> x, In<"weight"> weight, In<"intra_block_pe"> pe, In<"cu_seqlens"> cu_seqlens,
         In<"cu_seqlens_compressed"> cu_compressed, Text kind, Int block, Int stride, Text backend,
         In<"grad_out"> grad_out, Out<"grad_x"> grad_x, Out<"grad_weight"> grad_weight,
         Out<"grad_intra_block_pe"> grad_pe, Out<"workspace"> workspace) {
        const nsa::CompressBackwardArgs args{
            .inputs = compress_inputs(x, weight, pe, cu_seqlens, cu_compressed),
            .options = compress_options(kind, block, stride, backend),
            .grad_out = grad_out,
            .grad_x = grad_x,
            .grad_weight = grad_weight,
            .grad_intra_block_pe = grad_pe,
            .workspace = workspace_from(workspace),
            .stream = x.stream};
        without_gil([&] { nsa::compress_backward(args); });
      },
      "x"_a, "weight"_a.none(), "intra_block_pe"_a.none(), "cu_seqlens"_a.none(),
      "cu_seqlens_compressed"_a.none(), "kind"_a, "compress_block"_a, "compress_stride"_a, "backend"_a,
      "grad_out"_a, "grad_x"_a, "grad_weight"_a.none(), "grad_intra_block_pe"_a.none(), "workspace"_a.none());
  m.def(
      "nsa_workspace_size_compress_backward",
      [](First<"x"> x, In<"weight"> weight, In<"intra_block_pe"> pe, In<"cu_seqlens"> cu_seqlens,
         In<"cu_seqlens_compressed"> cu_compressed, Text kind, Int block, Int stride, Text backend) {
        const nsa::CompressBackwardArgs args{
            .inputs = compress_inputs(x, weight, pe, cu_seqlens, cu_compressed),
            .options = compress_options(kind, block, stride, backend)};
        return without_gil([&] { return nsa::workspace_size(args); });
      },
      "x"_a, "weight"_a.none(), "intra_block_pe"_a.none(), "cu_seqlens"_a.none(),
      "cu_seqlens_compressed"_a.none(), "kind"_a, "compress_block"_a, "compress_stride"_a, "backend"_a);
}

// The compressed branch is fsa::forward and fsa::backward over compressed keys.
AttentionInputs compressed_inputs(const TensorView& query, const TensorView& key, const TensorView& value,
                                  const TensorView& cu_seqlens, const TensorView& cu_compressed,
                                  const TensorView& seqused_k) {
  return {.query = query,
          .key = key,
          .value = value,
          .cu_seqlens_q = cu_seqlens,
          .cu_seqlens_k = cu_compressed,
          .seqused_k = seqused_k};
}

AttentionOptions compressed_options(Int compress_block, Int compress_stride, Scale softmax_scale,
                                    std::optional<Int> max_seqlen, Text backend) {
  return {.causal = true,
          .compress_block = compress_block,
          .compress_stride = compress_stride,
          .softmax_scale = softmax_scale,
          .max_seqlen_q = max_seqlen,
          .backend = backend};
}

void bind_compressed(nb::module_& m) {
  m.def(
      "nsa_compressed_forward",
      [](First<"query"> query, In<"compressed_key"> key, In<"compressed_value"> value,
         In<"cu_seqlens"> cu_seqlens, In<"cu_seqlens_compressed"> cu_compressed, In<"seqused_k"> seqused_k,
         Int block, Int stride, Scale scale, std::optional<Int> max_seqlen, Text backend, Out<"out"> out,
         Out<"lse"> lse, Out<"workspace"> workspace) {
        const ForwardArgs args{
            .inputs = compressed_inputs(query, key, value, cu_seqlens, cu_compressed, seqused_k),
            .options = compressed_options(block, stride, scale, max_seqlen, backend),
            .out = out,
            .lse = lse,
            .workspace = workspace_from(workspace),
            .stream = query.stream};
        without_gil([&] { forward(args); });
      },
      "query"_a, "compressed_key"_a, "compressed_value"_a, "cu_seqlens"_a.none(),
      "cu_seqlens_compressed"_a.none(), "seqused_k"_a.none(), "compress_block"_a, "compress_stride"_a,
      "softmax_scale"_a.none(), "max_seqlen"_a.none(), "backend"_a, "out"_a, "lse"_a, "workspace"_a.none());
  m.def(
      "nsa_workspace_size_compressed_forward",
      [](First<"query"> query, In<"compressed_key"> key, In<"compressed_value"> value,
         In<"cu_seqlens"> cu_seqlens, In<"cu_seqlens_compressed"> cu_compressed, In<"seqused_k"> seqused_k,
         Int block, Int stride, Scale scale, std::optional<Int> max_seqlen, Text backend) {
        const ForwardArgs args{
            .inputs = compressed_inputs(query, key, value, cu_seqlens, cu_compressed, seqused_k),
            .options = compressed_options(block, stride, scale, max_seqlen, backend)};
        return without_gil([&] { return workspace_size(args); });
      },
      "query"_a, "compressed_key"_a, "compressed_value"_a, "cu_seqlens"_a.none(),
      "cu_seqlens_compressed"_a.none(), "seqused_k"_a.none(), "compress_block"_a, "compress_stride"_a,
      "softmax_scale"_a.none(), "max_seqlen"_a.none(), "backend"_a);
  m.def(
      "nsa_compressed_backward",
      [](First<"query"> query, In<"compressed_key"> key, In<"compressed_value"> value,
         In<"cu_seqlens"> cu_seqlens, In<"cu_seqlens_compressed"> cu_compressed, Int block, Int stride,
         Scale scale, std::optional<Int> max_seqlen, Text backend, In<"out"> out, In<"lse"> lse,
         In<"grad_out"> grad_out, Out<"grad_query"> grad_query, Out<"grad_key"> grad_key,
         Out<"grad_value"> grad_value, Out<"workspace"> workspace, bool add_to_grad_query) {
        const BackwardArgs args{.inputs = compressed_inputs(query, key, value, cu_seqlens, cu_compressed, {}),
                                .options = compressed_options(block, stride, scale, max_seqlen, backend),
                                .out = out,
                                .lse = lse,
                                .grad_out = grad_out,
                                .grad_query = grad_query,
                                .grad_key = grad_key,
                                .grad_value = grad_value,
                                .add_to_grad_query = add_to_grad_query,
                                .workspace = workspace_from(workspace),
                                .stream = query.stream};
        without_gil([&] { backward(args); });
      },
      "query"_a, "compressed_key"_a, "compressed_value"_a, "cu_seqlens"_a.none(),
      "cu_seqlens_compressed"_a.none(), "compress_block"_a, "compress_stride"_a, "softmax_scale"_a.none(),
      "max_seqlen"_a.none(), "backend"_a, "out"_a, "lse"_a, "grad_out"_a, "grad_query"_a, "grad_key"_a,
      "grad_value"_a, "workspace"_a.none(), "add_to_grad_query"_a = false);
  m.def(
      "nsa_workspace_size_compressed_backward",
      [](First<"query"> query, In<"compressed_key"> key, In<"compressed_value"> value,
         In<"cu_seqlens"> cu_seqlens, In<"cu_seqlens_compressed"> cu_compressed, Int block, Int stride,
         Scale scale, std::optional<Int> max_seqlen, Text backend) {
        const BackwardArgs args{.inputs = compressed_inputs(query, key, value, cu_seqlens, cu_compressed, {}),
                                .options = compressed_options(block, stride, scale, max_seqlen, backend)};
        return without_gil([&] { return workspace_size(args); });
      },
      "query"_a, "compressed_key"_a, "compressed_value"_a, "cu_seqlens"_a.none(),
      "cu_seqlens_compressed"_a.none(), "compress_block"_a, "compress_stride"_a, "softmax_scale"_a.none(),
      "max_seqlen"_a.none(), "backend"_a);
}

nsa::SelectBlocksArgs select_args(const TensorView& query, const TensorView& compressed_key,
                                  const TensorView& lse, const TensorView& cu_seqlens,
                                  const TensorView& cu_compressed, const TensorView& seqused_k,
                                  Int compress_block, Int compress_stride, Int block_size, Int top_k,
                                  Int init_blocks, Int local_blocks, Scale softmax_scale, Text backend) {
  return {.query = query,
          .compressed_key = compressed_key,
          .lse = lse,
          .cu_seqlens_q = cu_seqlens,
          .cu_seqlens_compressed = cu_compressed,
          .seqused_k = seqused_k,
          .compress_block = compress_block,
          .compress_stride = compress_stride,
          .block_size = block_size,
          .top_k = top_k,
          .init_blocks = init_blocks,
          .local_blocks = local_blocks,
          .softmax_scale = softmax_scale,
          .backend = backend};
}

void bind_select(nb::module_& m) {
  m.def(
      "nsa_select_blocks",
      [](First<"query"> query, In<"compressed_key"> key, In<"lse"> lse, In<"cu_seqlens"> cu_seqlens,
         In<"cu_seqlens_compressed"> cu_compressed, In<"seqused_k"> seqused_k, Int block, Int stride,
         Int block_size, Int top_k, Int init_blocks, Int local_blocks, Scale scale, Text backend,
         Out<"selected_blocks"> selected_blocks, Out<"workspace"> workspace) {
        nsa::SelectBlocksArgs args =
            select_args(query, key, lse, cu_seqlens, cu_compressed, seqused_k, block, stride, block_size,
                        top_k, init_blocks, local_blocks, scale, backend);
        args.selected_blocks = selected_blocks;
        args.workspace = workspace_from(workspace);
        args.stream = query.stream;
        without_gil([&] { nsa::select_blocks(args); });
      },
      "query"_a, "compressed_key"_a, "lse"_a, "cu_seqlens"_a.none(), "cu_seqlens_compressed"_a.none(),
      "seqused_k"_a.none(), "compress_block"_a, "compress_stride"_a, "block_size"_a, "top_k"_a,
      "init_blocks"_a, "local_blocks"_a, "softmax_scale"_a.none(), "backend"_a, "selected_blocks"_a,
      "workspace"_a.none());
  m.def(
      "nsa_workspace_size_select_blocks",
      [](First<"query"> query, In<"compressed_key"> key, In<"lse"> lse, In<"cu_seqlens"> cu_seqlens,
         In<"cu_seqlens_compressed"> cu_compressed, In<"seqused_k"> seqused_k, Int block, Int stride,
         Int block_size, Int top_k, Int init_blocks, Int local_blocks, Scale scale, Text backend) {
        const nsa::SelectBlocksArgs args =
            select_args(query, key, lse, cu_seqlens, cu_compressed, seqused_k, block, stride, block_size,
                        top_k, init_blocks, local_blocks, scale, backend);
        return without_gil([&] { return nsa::workspace_size(args); });
      },
      "query"_a, "compressed_key"_a, "lse"_a.none(), "cu_seqlens"_a.none(), "cu_seqlens_compressed"_a.none(),
      "seqused_k"_a.none(), "compress_block"_a, "compress_stride"_a, "block_size"_a, "top_k"_a,
      "init_blocks"_a, "local_blocks"_a, "softmax_scale"_a.none(), "backend"_a);
}

void bind_attend_and_select(nb::module_& m) {
  m.def(
      "nsa_attend_and_select",
      [](First<"query"> query, In<"compressed_key"> key, In<"compressed_value"> value,
         In<"cu_seqlens"> cu_seqlens, In<"cu_seqlens_compressed"> cu_compressed, In<"seqused_k"> seqused_k,
         Int block, Int stride, Int block_size, Int top_k, Int init_blocks, Int local_blocks, Scale scale,
         std::optional<Int> max_seqlen, Text backend, Out<"out"> out, Out<"lse"> lse,
         Out<"selected_blocks"> selected_blocks, Out<"workspace"> workspace) {
        const ForwardArgs attention{
            .inputs = compressed_inputs(query, key, value, cu_seqlens, cu_compressed, seqused_k),
            .options = compressed_options(block, stride, scale, max_seqlen, backend),
            .out = out,
            .lse = lse,
            .workspace = workspace_from(workspace),
            .stream = query.stream};
        nsa::SelectBlocksArgs selection =
            select_args(query, key, lse, cu_seqlens, cu_compressed, seqused_k, block, stride, block_size,
                        top_k, init_blocks, local_blocks, scale, backend);
        selection.selected_blocks = selected_blocks;
        selection.workspace = attention.workspace;
        selection.stream = query.stream;
        without_gil([&] { nsa::attend_and_select(attention, selection); });
      },
      "query"_a, "compressed_key"_a, "compressed_value"_a, "cu_seqlens"_a.none(),
      "cu_seqlens_compressed"_a.none(), "seqused_k"_a.none(), "compress_block"_a, "compress_stride"_a,
      "block_size"_a, "top_k"_a, "init_blocks"_a, "local_blocks"_a, "softmax_scale"_a.none(),
      "max_seqlen"_a.none(), "backend"_a, "out"_a, "lse"_a, "selected_blocks"_a, "workspace"_a.none());
}

nsa::SelectedInputs selected_inputs(const TensorView& query, const TensorView& key, const TensorView& value,
                                    const TensorView& selected_blocks, const TensorView& cu_seqlens,
                                    const TensorView& seqused_k) {
  return {.query = query,
          .key = key,
          .value = value,
          .selected_blocks = selected_blocks,
          .cu_seqlens = cu_seqlens,
          .seqused_k = seqused_k};
}

nsa::SelectedOptions selected_options(Int block_size, Scale softmax_scale, Text algorithm, Int chunk_tokens,
                                      Text backend) {
  return {.block_size = block_size,
          .softmax_scale = softmax_scale,
          .algorithm = algorithm_from(algorithm),
          .chunk_tokens = chunk_tokens,
          .backend = backend};
}

nb::dict to_dict(const nsa::Choice& choice) {
  nb::list reasons;
  for (const BackendChoice& asked : choice.reasons)
    reasons.append(nb::make_tuple(asked.name, asked.chosen, asked.reason));
  nb::dict dict;
  dict["backend"] = choice.backend;
  dict["kernel"] = choice.kernel;
  dict["reasons"] = reasons;
  dict["workspace"] = choice.workspace_bytes;
  return dict;
}

void bind_selected(nb::module_& m) {
  m.def(
      "nsa_selected_forward",
      [](First<"query"> query, In<"key"> key, In<"value"> value, In<"selected_blocks"> selected_blocks,
         In<"cu_seqlens"> cu_seqlens, In<"seqused_k"> seqused_k, Int block_size, Scale scale, Text algorithm,
         Int chunk_tokens, Text backend, Out<"out"> out, Out<"lse"> lse, Out<"workspace"> workspace) {
        const nsa::SelectedForwardArgs args{
            .inputs = selected_inputs(query, key, value, selected_blocks, cu_seqlens, seqused_k),
            .options = selected_options(block_size, scale, algorithm, chunk_tokens, backend),
            .out = out,
            .lse = lse,
            .workspace = workspace_from(workspace),
            .stream = query.stream};
        without_gil([&] { nsa::selected_forward(args); });
      },
      "query"_a, "key"_a, "value"_a, "selected_blocks"_a, "cu_seqlens"_a.none(), "seqused_k"_a.none(),
      "block_size"_a, "softmax_scale"_a.none(), "algorithm"_a, "chunk_tokens"_a, "backend"_a, "out"_a,
      "lse"_a.none(), "workspace"_a.none());
  m.def(
      "nsa_workspace_size_selected_forward",
      [](First<"query"> query, In<"key"> key, In<"value"> value, In<"selected_blocks"> selected_blocks,
         In<"cu_seqlens"> cu_seqlens, In<"seqused_k"> seqused_k, Int block_size, Scale scale, Text algorithm,
         Int chunk_tokens, Text backend) {
        const nsa::SelectedForwardArgs args{
            .inputs = selected_inputs(query, key, value, selected_blocks, cu_seqlens, seqused_k),
            .options = selected_options(block_size, scale, algorithm, chunk_tokens, backend)};
        return without_gil([&] { return nsa::workspace_size(args); });
      },
      "query"_a, "key"_a, "value"_a, "selected_blocks"_a, "cu_seqlens"_a.none(), "seqused_k"_a.none(),
      "block_size"_a, "softmax_scale"_a.none(), "algorithm"_a, "chunk_tokens"_a, "backend"_a);
  m.def(
      "nsa_explain_selected_forward",
      [](First<"query"> query, In<"key"> key, In<"value"> value, In<"selected_blocks"> selected_blocks,
         In<"cu_seqlens"> cu_seqlens, In<"seqused_k"> seqused_k, Int block_size, Scale scale, Text algorithm,
         Int chunk_tokens, Text backend) {
        const nsa::SelectedForwardArgs args{
            .inputs = selected_inputs(query, key, value, selected_blocks, cu_seqlens, seqused_k),
            .options = selected_options(block_size, scale, algorithm, chunk_tokens, backend)};
        return to_dict(nsa::explain(args));
      },
      "query"_a, "key"_a, "value"_a, "selected_blocks"_a, "cu_seqlens"_a.none(), "seqused_k"_a.none(),
      "block_size"_a, "softmax_scale"_a.none(), "algorithm"_a, "chunk_tokens"_a, "backend"_a);
  m.def(
      "nsa_selected_backward",
      [](First<"query"> query, In<"key"> key, In<"value"> value, In<"selected_blocks"> selected_blocks,
         In<"cu_seqlens"> cu_seqlens, Int block_size, Scale scale, Text algorithm, Int chunk_tokens,
         Text backend, In<"out"> out, In<"lse"> lse, In<"grad_out"> grad_out, Out<"grad_query"> grad_query,
         Out<"grad_key"> grad_key, Out<"grad_value"> grad_value, Out<"workspace"> workspace) {
        const nsa::SelectedBackwardArgs args{
            .inputs = selected_inputs(query, key, value, selected_blocks, cu_seqlens, {}),
            .options = selected_options(block_size, scale, algorithm, chunk_tokens, backend),
            .out = out,
            .lse = lse,
            .grad_out = grad_out,
            .grad_query = grad_query,
            .grad_key = grad_key,
            .grad_value = grad_value,
            .workspace = workspace_from(workspace),
            .stream = query.stream};
        without_gil([&] { nsa::selected_backward(args); });
      },
      "query"_a, "key"_a, "value"_a, "selected_blocks"_a, "cu_seqlens"_a.none(), "block_size"_a,
      "softmax_scale"_a.none(), "algorithm"_a, "chunk_tokens"_a, "backend"_a, "out"_a, "lse"_a, "grad_out"_a,
      "grad_query"_a, "grad_key"_a, "grad_value"_a, "workspace"_a.none());
  m.def(
      "nsa_workspace_size_selected_backward",
      [](First<"query"> query, In<"key"> key, In<"value"> value, In<"selected_blocks"> selected_blocks,
         In<"cu_seqlens"> cu_seqlens, Int block_size, Scale scale, Text algorithm, Int chunk_tokens,
         Text backend) {
        const nsa::SelectedBackwardArgs args{
            .inputs = selected_inputs(query, key, value, selected_blocks, cu_seqlens, {}),
            .options = selected_options(block_size, scale, algorithm, chunk_tokens, backend)};
        return without_gil([&] { return nsa::workspace_size(args); });
      },
      "query"_a, "key"_a, "value"_a, "selected_blocks"_a, "cu_seqlens"_a.none(), "block_size"_a,
      "softmax_scale"_a.none(), "algorithm"_a, "chunk_tokens"_a, "backend"_a);
  m.def(
      "nsa_explain_selected_backward",
      [](First<"query"> query, In<"key"> key, In<"value"> value, In<"selected_blocks"> selected_blocks,
         In<"cu_seqlens"> cu_seqlens, Int block_size, Scale scale, Text algorithm, Int chunk_tokens,
         Text backend) {
        const nsa::SelectedBackwardArgs args{
            .inputs = selected_inputs(query, key, value, selected_blocks, cu_seqlens, {}),
            .options = selected_options(block_size, scale, algorithm, chunk_tokens, backend)};
        return to_dict(nsa::explain(args));
      },
      "query"_a, "key"_a, "value"_a, "selected_blocks"_a, "cu_seqlens"_a.none(), "block_size"_a,
      "softmax_scale"_a.none(), "algorithm"_a, "chunk_tokens"_a, "backend"_a);
}

void bind_combine(nb::module_& m) {
  m.def(
      "nsa_combine",
      [](First<"compressed"> compressed, In<"selected"> selected, In<"sliding"> sliding, In<"gates"> gates,
         Text backend, Out<"out"> out) {
        const nsa::CombineArgs args{.compressed = compressed,
                                    .selected = selected,
                                    .sliding = sliding,
                                    .gates = gates,
                                    .out = out,
                                    .backend = backend,
                                    .stream = compressed.stream};
        without_gil([&] { nsa::combine(args); });
      },
      "compressed"_a, "selected"_a, "sliding"_a, "gates"_a, "backend"_a, "out"_a);
  m.def(
      "nsa_combine_backward",
      [](First<"compressed"> compressed, In<"selected"> selected, In<"sliding"> sliding, In<"gates"> gates,
         Text backend, In<"grad_out"> grad_out, Out<"grad_compressed"> grad_compressed,
         Out<"grad_selected"> grad_selected, Out<"grad_sliding"> grad_sliding, Out<"grad_gates"> grad_gates) {
        const nsa::CombineBackwardArgs args{.compressed = compressed,
                                            .selected = selected,
                                            .sliding = sliding,
                                            .gates = gates,
                                            .grad_out = grad_out,
                                            .grad_compressed = grad_compressed,
                                            .grad_selected = grad_selected,
                                            .grad_sliding = grad_sliding,
                                            .grad_gates = grad_gates,
                                            .backend = backend,
                                            .stream = compressed.stream};
        without_gil([&] { nsa::combine_backward(args); });
      },
      "compressed"_a, "selected"_a, "sliding"_a, "gates"_a, "backend"_a, "grad_out"_a, "grad_compressed"_a,
      "grad_selected"_a, "grad_sliding"_a, "grad_gates"_a);
}

}  // namespace

void bind_nsa(nb::module_& m) {
  bind_compress(m);
  bind_compressed(m);
  bind_select(m);
  bind_attend_and_select(m);
  bind_selected(m);
  bind_combine(m);
}

}  // namespace fsa::python
