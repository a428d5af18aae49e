# SPDX-License-Identifier: Apache-2.0
"""Gradients: ``torch.autograd.Function`` around the operators, entered only where something requires one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from . import ops
from .ops import ALIBI_SLOPES, ALPHA, BLOCK_INPUTS, DELTA, INPUTS, KEY, QUERY, SINK, VALUE, Inputs, Options

_DIFFERENTIABLE = (QUERY, KEY, VALUE, ALPHA, DELTA, SINK)


class Call(NamedTuple):
    """A call without its tensors: the inputs that are given, by their places in ``Inputs``, of which there are
    ``length``."""

    options: Options
    places: tuple[int, ...]
    length: int

    def inputs(self, tensors: Sequence[Tensor]) -> Inputs:
        """With those tensors."""
        inputs: list[Tensor | None] = [None] * self.length
        for place, tensor in zip(self.places, tensors, strict=True):
            inputs[place] = tensor
        return tuple(inputs)


class _Attention(torch.autograd.Function):
    """``apply(call, want_lse, want_map, keep_map, *tensors)`` returns out, and lse and the skip map or None.

    ``tensors`` are those that are given: each takes autograd 0.5 us, None as well. ``keep_map``: the backward needs the
    skip map.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, call: Call, want_lse: bool, want_map: bool, keep_map: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out, lse, skip_map = ops.forward(call.inputs(tensors), call.options, keep_map)
        ctx.call = call
        ctx.save_for_backward(*tensors, out, lse, skip_map)
        if want_map:
            ctx.mark_non_differentiable(skip_map)
        if not torch.compiler.is_dynamo_compiling():  # dynamo knows no such method, and fills in zeros
            ctx.set_materialize_grads(False)
        return out, lse if want_lse else None, skip_map if want_map else None

    @staticmethod
    def backward(ctx: FunctionCtx, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple:
        call = ctx.call
        *tensors, out, lse, skip_map = ctx.saved_tensors
        if grad_out is None:  # only lse was used
            grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
        _, _, _, _, *needed = ctx.needs_input_grad
        wanted = [place for place, needs in zip(call.places, needed, strict=True) if needs]
        want_gate, want_sink = ALPHA in wanted or DELTA in wanted, SINK in wanted
        rest = (*tensors, out, lse, skip_map, grad_out, grad_lse)
        if torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling():  # create_graph=True
            grads = _AttentionGradient.apply(call, want_gate, want_sink, *rest)
        else:
            grads = _gradient(call, want_gate, want_sink, *rest)
        by_place = dict(zip(_DIFFERENTIABLE, grads, strict=True))
        return None, None, None, None, *(by_place[p] if p in wanted else None for p in call.places)


def _gradient(
    call: Call, want_gate: bool, want_sink: bool, *tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    count = len(call.places)
    return ops.backward(call.inputs(tensors[:count]), call.options, *tensors[count:], want_gate, want_sink)


class _AttentionGradient(torch.autograd.Function):
    """The gradient as a step of its own, so that differentiating it once more is an error with a reason."""

    @staticmethod
    def forward(ctx: FunctionCtx, *args: Any) -> tuple[Tensor | None, ...]:
        return _gradient(*args)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> None:
        raise NotImplementedError(
            "attention: double backward is not supported; its gradients cannot be differentiated once more"
        )


class _Decode(torch.autograd.Function):
    """Decode with inputs that require a gradient: it runs, and backward says that there is none."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        options: Options,
        num_splits: int | None,
        batch_invariant: bool,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return ops.decode(inputs, options, num_splits, batch_invariant)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> None:
        raise NotImplementedError(
            "decode: the functions over a cache have no backward; use attention() with a sequence of queries"
        )


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ops.merge(outs, lses)
        ctx.save_for_backward(outs, lses, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: FunctionCtx, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
        # out = sum_p w_p out_p and lse = log sum_p exp(lse_p), with w_p = exp(lse_p - lse).
        outs, lses, out, lse = ctx.saved_tensors
        empty = lses == -torch.inf  # parts without a key: weight 0, whatever they hold
        weights = torch.where(empty, 0, torch.exp(lses - torch.where(lse == -torch.inf, 0, lse)))
        per_row = weights.transpose(-1, -2).unsqueeze(-1)
        wide_grad = grad_out.to(lses.dtype)
        difference = torch.where(per_row == 0, 0, outs.to(lses.dtype) - out.to(lses.dtype))
        grad_lses = weights * ((wide_grad * difference).sum(-1).transpose(-1, -2) + grad_lse)
        return (per_row * wide_grad).to(outs.dtype), torch.where(empty, 0, grad_lses)


def _require_tensors(inputs: Inputs) -> None:
    for name, tensor in zip((*INPUTS, *BLOCK_INPUTS), inputs, strict=False):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "query"):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")


def distinct(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The tensors with views in place of repetitions: dynamo refuses a Function that gets a tensor twice, as
    self-attention's cu_seqlens are."""
    result: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in result)
        result.append(tensor.view_as(tensor) if repeated else tensor)
    return tuple(result)


def _records_gradient(inputs: Inputs) -> bool:
    if forward_ad._current_level >= 0:
        return True  # autograd then says that there is no forward mode
    if not torch.is_grad_enabled():
        return False
    slopes = inputs[ALIBI_SLOPES]
    if slopes is not None and slopes.requires_grad:
        raise NotImplementedError(
            "alibi_slopes: requires a gradient, but there is none; pass alibi_slopes.detach()"
        )
    for i in _DIFFERENTIABLE:
        tensor = inputs[i]
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def require_flags(**flags: bool) -> None:
    """Raises TypeError for a flag that is not a bool, whose truth may be an error or a surprise."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")


def _refuse_buffers(**buffers: Tensor | None) -> None:
    for name, buffer in buffers.items():
        if buffer is not None:
            raise ValueError(
                f"{name}: given, but an input requires a gradient, which a result written in place cannot "
                "carry; leave it out, detach the inputs or use torch.no_grad()"
            )


def _check_buffers(plain: bool, **buffers: Tensor | None) -> None:
    for name, buffer in buffers.items():
        if buffer is None:
            continue
        if not isinstance(buffer, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(buffer).__name__}")
        if plain and buffer.is_neg():  # copy_ honours it
            raise TypeError(
                f"{name}: a tensor with a pending negation cannot be written; call resolve_neg() first"
            )


def attend(
    inputs: Inputs,
    options: Options,
    want_lse: bool,
    want_map: bool,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out, lse and skip map; the last two may be None when not wanted. ``out``, ``lse``: buffers to write."""
    if type(want_lse) is not bool or type(want_map) is not bool:  # to hand them over by name takes 0.5 us
        require_flags(return_lse=want_lse, return_skip_map=want_map)
    plain = ops.is_plain(inputs if out is None and lse is None else (*inputs, out, lse))
    if not plain:
        _require_tensors(inputs)
    if out is not None or lse is not None:
        _check_buffers(plain, out=out, lse=lse)
    records_gradient = _records_gradient(inputs)
    if plain and not records_gradient:
        return ops.run_forward(inputs, options, want_lse, want_map, out, lse)
    keep_map = want_map or (records_gradient and ops.skips_tiles(inputs, options))
    if keep_map and not plain:
        options = ops.with_known_map_shape(inputs, options)
    if records_gradient:
        _refuse_buffers(out=out, lse=lse)
        places = tuple(i for i, tensor in enumerate(inputs) if tensor is not None)
        tensors = tuple(inputs[i] for i in places)
        if torch.compiler.is_dynamo_compiling():
            tensors = distinct(tensors)
        call = Call(options, places, len(inputs))
        result, result_lse, skip_map = _Attention.apply(call, want_lse, want_map, keep_map, *tensors)
    else:
        result, result_lse, skip_map = ops.forward(inputs, options, keep_map)
    if want_map and not plain:
        skip_map = skip_map.view(ops.skip_map_shape(inputs, options))
    return _written(out, result, "out"), _written(lse, result_lse, "lse"), skip_map


def attend_one(
    inputs: Inputs,
    options: Options,
    num_splits: int | None,
    batch_invariant: bool,
    want_lse: bool,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Decode: out and lse of one query per sequence; lse may be None when not wanted."""
    require_flags(return_lse=want_lse)
    plain = ops.is_plain(inputs if out is None and lse is None else (*inputs, out, lse))
    if not plain:
        _require_tensors(inputs)
    if out is not None or lse is not None:
        _check_buffers(plain, out=out, lse=lse)
    if _records_gradient(inputs):
        _refuse_buffers(out=out, lse=lse)
        return _Decode.apply(options, num_splits, batch_invariant, *inputs)
    if plain:
        return ops.run_decode(inputs, options, num_splits, batch_invariant, want_lse, out, lse)
    result, result_lse = ops.decode(inputs, options, num_splits, batch_invariant)
    return _written(out, result, "out"), _written(lse, result_lse, "lse")


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse over the union of the parts' keys, differentiable."""
    if torch.is_grad_enabled() and (outs.requires_grad or lses.requires_grad):
        return _Merge.apply(outs, lses)
    return ops.merge(outs, lses)


def _written(buffer: Tensor | None, result: Tensor, name: str) -> Tensor:
    """The result, in the caller's buffer when there is one; copy_ would broadcast or cast without a word."""
    if buffer is None:
        return result
    if buffer.shape != result.shape:
        raise ValueError(f"{name}: shape {list(buffer.shape)}, must be {list(result.shape)}")
    if buffer.dtype != result.dtype:
        raise TypeError(f"{name}: dtype {buffer.dtype}, must be {result.dtype}")
    return buffer.copy_(result)
