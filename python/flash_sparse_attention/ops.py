# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.fsa.*`` and the direct calls of the extension that they stand on.

Everything here takes the arguments of attention as two tuples: ``inputs``, the tensors in the order of
``INPUTS``, and ``options``, the scalars in the order of ``OPTIONS``; both are longer with a block mask. The
``run_*`` functions allocate the outputs and call the extension; they need tensors with data. The functions
without the prefix go through the operators instead where the tensors have none: under ``torch.compile``, in a
dispatch mode, or with a subclass.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling

from . import _C

INPUTS = (
    "query",
    "key",
    "value",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "page_table",
    "window_sizes",
    "alibi_slopes",
    "sink",
    "alpha",
    "delta",
    "gather_kv_indices",
)
# A call with a block mask has these, too, and the last two options; tuples without are what they were.
BLOCK_INPUTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "partial_begin",
    "partial_bits",
)
QUERY, KEY, VALUE = 0, 1, 2
CU_SEQLENS_Q, CU_SEQLENS_K, PAGE_TABLE = 3, 4, 7
ALIBI_SLOPES, SINK, ALPHA, DELTA = 9, 10, 11, 12

OPTIONS = (
    ("bool", "causal"),
    ("SymInt", "window_left"),
    ("SymInt", "window_right"),
    ("float?", "softmax_scale"),
    ("float", "softcap"),
    ("float?", "threshold"),
    ("float?", "gate_threshold"),
    ("bool", "log_sigmoid_gate"),
    ("bool", "adaptive_gate"),
    ("str", "gate_layout"),
    ("SymInt?", "max_seqlen_q"),
    ("SymInt?", "max_seqlen_k"),
    ("bool", "deterministic"),
    ("str", "backend"),
)
BLOCK_OPTIONS = (("int", "block_rows"), ("int", "block_keys"))
THRESHOLD, GATE_THRESHOLD, MAX_SEQLEN_K = 5, 6, 11

Inputs = tuple[Tensor | None, ...]
Options = tuple[Any, ...]

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the tensors are ordinary ones that nothing watches, so that their memory can be used."""
    if is_dynamo_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) not in _PLAIN_TYPES:
            return False
    return not (
        tensors[0] is None
        or tensors[0].is_meta
        or _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state()
    )


def skips_tiles(inputs: Inputs, options: Options) -> bool:
    """Whether a forward may skip tiles, so that its backward needs the skip map."""
    if (options[THRESHOLD] or 0) > 0:
        return True
    return inputs[ALPHA] is not None and (options[GATE_THRESHOLD] is None or options[GATE_THRESHOLD] > 0)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lse_shape(inputs: Inputs) -> tuple[int, ...]:
    """[batch, num_heads, seqlen_q], packed [num_heads, total_q]."""
    shape = inputs[QUERY].shape
    return (shape[1], shape[0]) if inputs[CU_SEQLENS_Q] is not None else (shape[0], shape[2], shape[1])


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on the device of ``like``, contiguous."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _empty_out(query: Tensor, value: Tensor) -> Tensor:
    """[..., head_dim_v], contiguous; empty_like takes half the time of empty, and less without a format."""
    if query.shape[-1] == value.shape[-1]:
        if query.is_contiguous():
            return torch.empty_like(query)
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    return empty(query, (*query.shape[:-1], value.shape[-1]))


def _empty_lse(inputs: Inputs) -> Tensor:
    """Of lse_shape; empty_strided takes two thirds of the time of empty."""
    query = inputs[QUERY]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if inputs[CU_SEQLENS_Q] is not None:
        rows, heads, _ = query.shape
        return torch.empty_strided((heads, rows), (max(rows, 1), 1), dtype=dtype, device=query.device)
    batch, rows, heads, _ = query.shape
    row = max(rows, 1)
    return torch.empty_strided(
        (batch, heads, rows), (max(heads, 1) * row, row, 1), dtype=dtype, device=query.device
    )


KEPT_WORKSPACE = 128 << 20
_kept = threading.local()


def workspace(like: Tensor, size: int) -> Tensor | None:
    """``size`` bytes on the device of ``like``; None for 0. The extension calls it once it knows how many it needs.

    On a CPU the thread keeps them for its next call, up to KEPT_WORKSPACE: fresh memory is cleared by the system
    page by page, a quarter of the time of a sparse backward at 8k.
    """
    if not size:
        return None
    if not like.is_cpu or size > KEPT_WORKSPACE:
        return empty(like, (size,), torch.uint8)
    kept: Tensor | None = getattr(_kept, "workspace", None)
    if kept is None or kept.numel() < size:
        kept = _kept.workspace = None  # the smaller one goes before its successor comes
        kept = _kept.workspace = empty(like, (size,), torch.uint8)
    return kept


def run_forward(
    inputs: Inputs,
    options: Options,
    want_lse: bool,
    want_map: bool,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out, lse and skip map; the last two None when not wanted. ``out``, ``lse``: buffers to write."""
    query = inputs[QUERY]
    skip_map = empty(query, _C.skip_map_shape(inputs, options), torch.int32) if want_map else None
    try:
        if out is None:
            out = _empty_out(query, inputs[VALUE])
        if lse is None and want_lse:
            lse = _empty_lse(inputs)
    except Exception:
        _C.workspace_size_forward(inputs, options)  # checks the arguments: says what is wrong with them
        raise
    _C.forward(inputs, options, out, lse, skip_map, None)  # takes its workspace from torch's allocator
    return out, lse, skip_map


def _gradient_of(tensor: Tensor | None, wanted: bool, onto: Tensor | None = None) -> Tensor | None:
    """Memory for it, contiguous; None where it is not wanted."""
    if not wanted or onto is not None:
        return onto
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def run_backward(
    inputs: Inputs,
    options: Options,
    out: Tensor,
    lse: Tensor,
    skip_map: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    want_gate: bool,
    want_sink: bool,
    onto: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, alpha, delta, sink; the last three None when not wanted.

    ``onto``, on a CPU: tensors that the gradients of query, and of key and value, are added to.
    """
    grad_out = grad_out.resolve_neg()  # autograd may hand over a pending negation
    grad_lse = None if grad_lse is None else grad_lse.resolve_neg()
    if skip_map is not None:
        skip_map = skip_map.view(_C.skip_map_shape(inputs, options))
    grads = (
        *(_gradient_of(inputs[i], True, there) for i, there in zip((QUERY, KEY, VALUE), onto, strict=True)),
        _gradient_of(inputs[ALPHA], want_gate),
        _gradient_of(inputs[DELTA], want_gate),
        _gradient_of(inputs[SINK], want_sink),
    )
    adds = onto[0] is not None, onto[1] is not None
    _C.backward(inputs, options, out, lse, skip_map, grad_out, grad_lse, *grads, workspace, *adds)
    return grads


def run_decode(
    inputs: Inputs,
    options: Options,
    num_splits: int | None,
    batch_invariant: bool,
    want_lse: bool,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [batch, num_heads, head_dim_v] and lse [batch, num_heads] of one query per sequence."""
    query = inputs[QUERY]
    try:
        if out is None:
            out = _empty_out(query, inputs[VALUE])
        if lse is None and want_lse:
            lse = empty(query, query.shape[:-1], lse_dtype(query.dtype))
    except Exception:
        _C.workspace_size_decode(inputs, options, num_splits, batch_invariant)  # says what is wrong
        raise
    _C.decode(inputs, options, num_splits, batch_invariant, out, lse, workspace)
    return out, lse


def run_merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse over the union of the parts' keys."""
    out, lse = empty(outs, outs.shape[1:]), empty(lses, lses.shape[1:])
    _C.merge(outs, lses, out, lse)
    return out, lse


# The operators. Schemas are flat, every output is a fresh tensor, and an output that is not wanted has no
# element. A skip map has one dimension here: each of its own may be 1 or not, which torch.compile would
# specialise on.

_NUM_INPUTS = len(INPUTS) - 1  # gather_kv_indices is decode's alone
_NUM_TENSORS = _NUM_INPUTS + len(BLOCK_INPUTS)
_NUM_OPTIONS = len(OPTIONS) + len(BLOCK_OPTIONS)
_TENSORS = "Tensor query, Tensor key, Tensor value, " + ", ".join(
    f"Tensor? {n}" for n in (*INPUTS[3:_NUM_INPUTS], *BLOCK_INPUTS)
)
_SCALARS = ", ".join(f"{kind} {name}" for kind, name in (*OPTIONS, *BLOCK_OPTIONS))


def flat_inputs(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """All tensors but gather_kv_indices, those of a block mask None where there is none."""
    return (*inputs[:_NUM_INPUTS], *(inputs[_NUM_INPUTS + 1 :] or (None,) * len(BLOCK_INPUTS)))


def inputs_from(tensors: Sequence[Tensor | None], gather_kv_indices: Tensor | None = None) -> Inputs:
    """The inputs that flat_inputs came from."""
    blocks = tuple(tensors[_NUM_INPUTS:])
    inputs = (*tensors[:_NUM_INPUTS], gather_kv_indices)
    return inputs if all(tensor is None for tensor in blocks) else (*inputs, *blocks)


def operator_arguments(inputs: Inputs, options: Options) -> tuple:
    """The first arguments of the operators."""
    sizes = () if len(options) == _NUM_OPTIONS else (0,) * len(BLOCK_OPTIONS)
    return (*flat_inputs(inputs), *options, *sizes)


_library = torch.library.Library("fsa", "DEF")


def define(schema: str, implementation: Any, fake: Any) -> None:
    """``torch.ops.fsa.<name>``: its schema, what it runs on every device, and the shapes of its results."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fsa::{name}", fake, lib=_library)


def _split(args: tuple) -> tuple[Inputs, Options, tuple]:
    """inputs, options and what follows them."""
    inputs, end = inputs_from(args[:_NUM_TENSORS]), _NUM_TENSORS + _NUM_OPTIONS
    options = args[_NUM_TENSORS : end if len(inputs) > len(INPUTS) else end - len(BLOCK_OPTIONS)]
    return inputs, options, args[end:]


def skip_map_shape(inputs: Inputs, options: Options) -> tuple[int, ...]:
    """As the library's, from shapes alone: max_seqlen_k must be given with packed keys."""
    query, key, page_table = inputs[QUERY], inputs[KEY], inputs[PAGE_TABLE]
    if inputs[CU_SEQLENS_K] is not None:
        keys = options[MAX_SEQLEN_K]
    elif page_table is not None:
        keys = page_table.shape[1] * key.shape[1]
    else:
        keys = key.shape[1]
    tile_rows, tile_keys = 64, 128 if query.shape[-1] <= 128 else 64
    words = (keys + 32 * tile_keys - 1) // (32 * tile_keys)
    if inputs[CU_SEQLENS_Q] is not None:
        return query.shape[1], query.shape[0] // tile_rows + inputs[CU_SEQLENS_Q].shape[0] - 1, words
    return query.shape[0], query.shape[2], (query.shape[1] + tile_rows - 1) // tile_rows, words


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, options, (want_map,) = _split(args)
    out, lse, skip_map = run_forward(inputs, options, True, want_map)
    return out, lse, empty(out, (0,), torch.int32) if skip_map is None else skip_map.flatten()


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, options, (want_map,) = _split(args)
    query = inputs[QUERY]
    out = empty(query, (*query.shape[:-1], inputs[VALUE].shape[-1]))
    lse = empty(query, lse_shape(inputs), lse_dtype(query.dtype))
    return (
        out,
        lse,
        empty(query, (math.prod(skip_map_shape(inputs, options)),) if want_map else (0,), torch.int32),
    )


define(
    f"forward({_TENSORS}, {_SCALARS}, bool want_skip_map) -> (Tensor out, Tensor lse, Tensor skip_map)",
    _forward,
    _forward_fake,
)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    inputs, options, rest = _split(args)
    grads = run_backward(inputs, options, *rest)
    return tuple(empty(inputs[QUERY], (0,)) if grad is None else grad for grad in grads)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, _, (*_, want_gate, want_sink) = _split(args)
    wanted = (True, True, True, want_gate, want_gate, want_sink)
    return tuple(
        empty(inputs[i], inputs[i].shape) if wants else empty(inputs[QUERY], (0,))
        for i, wants in zip((QUERY, KEY, VALUE, ALPHA, DELTA, SINK), wanted, strict=True)
    )


define(
    f"backward({_TENSORS}, {_SCALARS}, Tensor out, Tensor lse, Tensor? skip_map, Tensor grad_out, "
    "Tensor? grad_lse, bool want_gate, bool want_sink) -> (Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value, Tensor grad_alpha, Tensor grad_delta, Tensor grad_sink)",
    _backward,
    _backward_fake,
)


def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, options, (gather_kv_indices, num_splits, batch_invariant) = _split(args)
    inputs = (*inputs[:_NUM_INPUTS], gather_kv_indices, *inputs[_NUM_INPUTS + 1 :])
    return run_decode(inputs, options, num_splits, batch_invariant, True)


def _decode_fake(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, _, _ = _split(args)
    query = inputs[QUERY]
    out = empty(query, (*query.shape[:-1], inputs[VALUE].shape[-1]))
    return out, empty(query, query.shape[:-1], lse_dtype(query.dtype))


define(
    f"decode({_TENSORS}, {_SCALARS}, Tensor? gather_kv_indices, SymInt? num_splits, bool batch_invariant)"
    " -> (Tensor out, Tensor lse)",
    _decode,
    _decode_fake,
)


def _merge_fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return empty(outs, outs.shape[1:]), empty(lses, lses.shape[1:])


define("merge(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)", run_merge, _merge_fake)


def with_known_map_shape(inputs: Inputs, options: Options) -> Options:
    """The options with max_seqlen_k filled in where the skip map's shape needs it.

    The longest packed sequence is not known without reading memory, which the operators' shapes must not do;
    the total is a bound.
    """
    if inputs[CU_SEQLENS_K] is None or options[MAX_SEQLEN_K] is not None:
        return options
    return (*options[:MAX_SEQLEN_K], inputs[KEY].shape[0], *options[MAX_SEQLEN_K + 1 :])


def forward(inputs: Inputs, options: Options, want_map: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and skip map; the last None when not wanted, and in one or in its own dimensions."""
    if is_plain(inputs):
        return run_forward(inputs, options, True, want_map)
    out, lse, skip_map = torch.ops.fsa.forward(*operator_arguments(inputs, options), want_map)
    return out, lse, skip_map if want_map else None


def backward(
    inputs: Inputs,
    options: Options,
    out: Tensor,
    lse: Tensor,
    skip_map: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    want_gate: bool,
    want_sink: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, alpha, delta, sink; the last three None when not wanted."""
    rest = (out, lse, skip_map, grad_out, grad_lse)
    if is_plain((*inputs, *rest)):
        return run_backward(inputs, options, *rest, want_gate, want_sink)
    grads = torch.ops.fsa.backward(*operator_arguments(inputs, options), *rest, want_gate, want_sink)
    return (*grads[:3], *(grads[3:5] if want_gate else (None, None)), grads[5] if want_sink else None)


def decode(
    inputs: Inputs, options: Options, num_splits: int | None, batch_invariant: bool
) -> tuple[Tensor, Tensor]:
    """out and lse of one query per sequence."""
    if is_plain(inputs):
        return run_decode(inputs, options, num_splits, batch_invariant, True)
    arguments = operator_arguments(inputs, options)
    return torch.ops.fsa.decode(*arguments, inputs[_NUM_INPUTS], num_splits, batch_invariant)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse over the union of the parts' keys."""
    return run_merge(outs, lses) if is_plain((outs, lses)) else torch.ops.fsa.merge(outs, lses)
