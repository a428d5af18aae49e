# SPDX-License-Identifier: Apache-2.0
"""The three branches and their gated sum as one step of autograd.

Composed of the steps of autograd.py, the backward would hold the gradients of all three branches and two sets of
gradients of query, key and value at once. Heads are independent, so this step walks the key heads: only one head's
share of those exists at a time (32k tokens of 4 heads of 64, float32: 530 MB beyond the results become 230 MB).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import functional as dense
from .. import ops as dense_ops
from ..ops import is_plain
from . import autograd, ops

Three = tuple[Tensor, Tensor, Tensor]


class Targets(NamedTuple):
    """Memory for the gradients of one key head, where all tensors are plain ones."""

    states: Three  # of query, key and value
    compressed: tuple[Tensor, Tensor]  # of compressed_key and compressed_value
    branches: Three  # used anew by every head: fresh memory is cleared by the system page by page


# Below this many bytes of one branch's gradient the heads are taken together: less to launch.
WHOLE_BELOW = 16 << 20


class Settings(NamedTuple):
    compress_block: int
    compress_stride: int
    block_size: int
    window_left: int
    softmax_scale: float | None
    max_seqlen: int | None
    algorithm: str
    backend: str


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    gates: Tensor
    compressed_key: Tensor
    compressed_value: Tensor
    sliding_key: Tensor | None
    sliding_value: Tensor | None
    cu_seqlens: Tensor | None
    cu_seqlens_compressed: Tensor | None


class Branches(NamedTuple):
    selected_blocks: Tensor
    compressed: Tensor
    compressed_lse: Tensor
    selected: Tensor
    selected_lse: Tensor
    sliding: Tensor
    sliding_lse: Tensor

    def combine(self, gates: Tensor, backend: str) -> Tensor:
        args = (self.compressed, self.selected, self.sliding, gates, backend)
        return ops.dispatch("nsa_combine", ops.run_combine, *args)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, settings: Settings, attend: Callable[[], Branches], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        branches = attend()
        ctx.settings = settings
        ctx.save_for_backward(*tensors, *branches)
        ctx.mark_non_differentiable(branches.selected_blocks)
        ctx.set_materialize_grads(False)  # of selected_blocks: torch's threads would fill 8 MB, then spin
        return branches.combine(Inputs(*tensors).gates, settings.backend), branches.selected_blocks

    @staticmethod
    def backward(ctx: FunctionCtx, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)

        def gradient(*args: Tensor | None) -> tuple[Tensor | None, ...]:
            count = len(Inputs._fields)
            return _gradients(ctx.settings, Inputs(*args[:count]), Branches(*args[count:-1]), args[-1])

        grads = autograd.as_step(gradient, *ctx.saved_tensors, grad_out)
        needs = ctx.needs_input_grad[2 : 2 + len(grads)]
        wanted = (g if needed else None for g, needed in zip(grads, needs, strict=True))
        return None, None, *wanted, None, None


def attend_with_gradient(
    settings: Settings, attend: Callable[[], Branches], inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """out and selected_blocks. ``attend`` computes the branches and records no gradient."""
    return _Layer.apply(settings, attend, *inputs)


def _heads(tensor: Tensor, first: int, last: int) -> Tensor:
    return tensor[..., first:last, :]


# torch shares out an operation of that many elements; its threads then spin for milliseconds beside those of the
# kernels (8k tokens: a tenth of the processor time of forward and backward).
SHARED_FROM = 32768


def _in_pieces(
    operation: Callable[[Tensor, Tensor], object], target: Tensor, source: Tensor, axis: int
) -> None:
    """``operation(target, source)`` along the rows, in pieces that torch computes in this thread."""
    per_row = target.numel() // max(1, target.shape[axis])
    rows = max(1, (SHARED_FROM - 1) // max(1, per_row))
    for part, piece in zip(target.split(rows, axis), source.split(rows, axis), strict=True):
        operation(part, piece)


def _add(target: Tensor, source: Tensor) -> None:
    _in_pieces(Tensor.add_, target, source, -3)


def _gradients(
    settings: Settings, inputs: Inputs, branches: Branches, grad_out: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the first eight inputs."""
    query, key, gates = inputs.query, inputs.key, inputs.gates
    kv_heads = key.shape[-2]
    group = query.shape[-2] // kv_heads
    per_head = gates.dim() == query.dim()

    def share(gates: Tensor, first: int, count: int, targets: Targets | None) -> tuple[Tensor | None, ...]:
        return _slice_gradients(
            settings, inputs, branches, gates, per_head, grad_out, first, count, group, targets
        )

    if kv_heads == 1 or query.numel() * query.element_size() < WHOLE_BELOW:
        return share(gates, 0, kv_heads, None)
    results = [None if t is None else ops.empty(t, t.shape) for t in inputs[:8]]
    plain = is_plain([t for t in (*inputs, *branches, grad_out) if t is not None])
    branch_grads: Three | None = None
    if plain:
        shape = (*branches.selected.shape[:-2], group, branches.selected.shape[-1])
        branch_grads = tuple(ops.empty(branches.selected, shape) for _ in range(3))
    token_gates: Tensor | None = None
    # A gate per token gets a share from every head: those are not rounded to 16 bits before they are added.
    wide_gates = gates if gates.dtype == torch.float64 else gates.float()
    for head in range(kv_heads):
        parts = {
            name: _heads(result, head * heads, (head + 1) * heads)
            for name, result in zip(Inputs._fields, results, strict=False)
            if result is not None and (name != "gates" or per_head)
            for heads in (group if name in ("query", "gates") else 1,)
        }
        targets = None
        if branch_grads is not None:
            states = (parts["query"], parts["key"], parts["value"])
            targets = Targets(states, (parts["compressed_key"], parts["compressed_value"]), branch_grads)
        for name, grad in zip(Inputs._fields, share(wide_gates, head, 1, targets), strict=False):
            if name == "gates" and not per_head:
                if token_gates is None:
                    token_gates = grad
                else:
                    _in_pieces(Tensor.add_, token_gates, grad, -2)
            elif name in parts and grad is not parts[name]:
                _in_pieces(Tensor.copy_, parts[name], grad, -3)
    if not per_head:
        _in_pieces(Tensor.copy_, results[Inputs._fields.index("gates")], token_gates, -2)
    return tuple(results)


def _slice_gradients(
    settings: Settings,
    inputs: Inputs,
    branches: Branches,
    gates: Tensor,
    per_head: bool,
    grad_out: Tensor,
    first: int,
    count: int,
    group: int,
    targets: Targets | None,
) -> tuple[Tensor | None, ...]:
    """The same for key heads [first, first + count) and their query heads. ``targets``: where they are to be."""
    block, stride, block_size, window_left, scale, max_seqlen, algorithm, backend = settings

    def of_queries(tensor: Tensor) -> Tensor:
        return _heads(tensor, first * group, (first + count) * group)

    def of_keys(tensor: Tensor) -> Tensor:
        return _heads(tensor, first, first + count)

    query, key, value = of_queries(inputs.query), of_keys(inputs.key), of_keys(inputs.value)
    tensors = [t for t in (*inputs, *branches, grad_out) if t is not None]
    # On a CPU the gradients of the later branches are added where they are computed: sums of their own took 3 to 4 %
    # of the layer.
    joins = query.device.type == "cpu" and is_plain(tensors)
    out_compressed, out_selected, out_sliding = (
        of_queries(t) for t in (branches.compressed, branches.selected, branches.sliding)
    )
    combined = (out_compressed, out_selected, out_sliding, of_queries(gates) if per_head else gates, backend)
    combined = (*combined, of_queries(grad_out))
    if targets is None:
        grads = ops.dispatch("nsa_combine_backward", ops.run_combine_backward, *combined)
    else:
        grads = ops.run_combine_backward(*combined, into=targets.branches)
    grad_compressed, grad_selected, grad_sliding, grad_gates = grads
    del grads
    grad_query, grad_key, grad_value = autograd.selected_gradient(
        (query, key, value, branches.selected_blocks[..., first : first + count, :, :], inputs.cu_seqlens),
        (block_size, scale, backend),
        algorithm,
        max_seqlen,
        out_selected,
        of_queries(branches.selected_lse),
        grad_selected,
        into=None if targets is None else targets.states,
    )
    del grad_selected
    arguments = (
        query,
        of_keys(inputs.compressed_key),
        of_keys(inputs.compressed_value),
        inputs.cu_seqlens,
        inputs.cu_seqlens_compressed,
        block,
        stride,
        scale,
        max_seqlen,
        backend,
        out_compressed,
        of_queries(branches.compressed_lse),
        grad_compressed,
    )
    if joins:
        into = None if targets is None else targets.compressed
        _, *compressed_grads = ops.run_compressed_backward(*arguments, onto=grad_query, into=into)
    else:
        more_query, *compressed_grads = ops.dispatch(
            "nsa_compressed_backward", ops.run_compressed_backward, *arguments
        )
        _add(grad_query, more_query)
        del more_query
    del arguments, grad_compressed
    own = inputs.sliding_key is not None, inputs.sliding_value is not None
    arguments, options = dense.collect(
        query,
        of_keys(inputs.sliding_key) if own[0] else key,
        of_keys(inputs.sliding_value) if own[1] else value,
        causal=True,
        window_size=(window_left, 0),
        softmax_scale=scale,
        cu_seqlens_q=inputs.cu_seqlens,
        cu_seqlens_k=inputs.cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        backend=backend or None,
    )
    rest = (out_sliding, of_queries(branches.sliding_lse), None, grad_sliding, None)
    if joins:
        shared = (None, None) if any(own) else (grad_key, grad_value)
        onto = (grad_query, *shared)
        _, sliding_key, sliding_value, *_ = dense_ops.run_backward(
            arguments, options, *rest, False, False, onto=onto
        )
    else:
        more_query, sliding_key, sliding_value, *_ = dense_ops.backward(
            arguments, options, *rest, False, False
        )
        _add(grad_query, more_query)
    if not own[0] and sliding_key is not grad_key:
        _add(grad_key, sliding_key)
    if not own[1] and sliding_value is not grad_value:
        _add(grad_value, sliding_value)
    return (
        grad_query,
        grad_key,
        grad_value,
        grad_gates,
        *compressed_grads,
        sliding_key if own[0] else None,
        sliding_value if own[1] else None,
    )
