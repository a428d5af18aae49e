# SPDX-License-Identifier: Apache-2.0
"""Gradients: ``torch.autograd.Function`` around the operators, entered only where something requires one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from ..autograd import distinct
from . import ops, profiler


def records_gradient(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:
        return True  # autograd then says that there is no forward mode
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Gradient(torch.autograd.Function):
    """A gradient as a step of its own, so that differentiating it once more is an error with a reason."""

    @staticmethod
    def forward(ctx: FunctionCtx, function: Callable, *args: Any) -> tuple[Tensor, ...]:
        return function(*args)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> None:
        raise NotImplementedError(
            "nsa: double backward is not supported; its gradients cannot be differentiated once more"
        )


def as_step(function: Callable, *args: Any) -> tuple[Tensor, ...]:
    """A gradient's computation, guarded against being differentiated once more."""
    if torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling():  # create_graph=True
        return _Gradient.apply(function, *args)
    return function(*args)


def _compress_gradient(*args: Any) -> tuple[Tensor, ...]:
    return ops.dispatch("nsa_compress_backward", ops.run_compress_backward, *args)


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, options: tuple, *tensors: Tensor | None) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(*tensors)
        return ops.dispatch("nsa_compress", ops.run_compress, *tensors, *options)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        kind, block, stride, _, backend = ctx.options
        tensors = ctx.saved_tensors
        grads = as_step(_compress_gradient, *tensors, kind, block, stride, backend, grad_out)
        _, *needed = ctx.needs_input_grad
        wanted = (g if needs else None for g, needs in zip(grads, needed[:3], strict=True))
        return None, *wanted, None, None


def compress(options: tuple, *tensors: Tensor | None) -> Tensor:
    """Compressed tokens. tensors: x, weight, intra_block_pe, cu_seqlens, cu_seqlens_compressed; options:
    kind, compress_block, compress_stride, total_compressed, backend."""
    if records_gradient(*tensors):
        if torch.compiler.is_dynamo_compiling():
            tensors = distinct(tensors)
        return _Compress.apply(options, *tensors)
    return ops.dispatch("nsa_compress", ops.run_compress, *tensors, *options)


def _compressed_gradient(*args: Any) -> tuple[Tensor, ...]:
    return ops.dispatch("nsa_compressed_backward", ops.run_compressed_backward, *args)


def _compressed_forward(
    options: tuple, seqused_k: Tensor | None, *tensors: Tensor | None
) -> tuple[Tensor, Tensor]:
    return ops.dispatch("nsa_compressed_forward", ops.run_compressed_forward, *tensors, seqused_k, *options)


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, options: tuple, attend: Callable[[], tuple[Tensor, ...]], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        out, lse, *blocks = attend()
        ctx.options = options
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse, *blocks)
        return out, lse, *blocks

    @staticmethod
    def backward(ctx: FunctionCtx, grad_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        grads = as_step(_compressed_gradient, *tensors, *ctx.options, out, lse, grad_out)
        return None, None, *grads, None, None


def compressed(options: tuple, seqused_k: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """out and lse of the compressed branch. tensors: query, compressed_key, compressed_value, cu_seqlens,
    cu_seqlens_compressed; options: compress_block, compress_stride, softmax_scale, max_seqlen, backend.
    With seqused_k there is no gradient."""
    if seqused_k is None and records_gradient(*tensors[:3]):
        if torch.compiler.is_dynamo_compiling():
            tensors = distinct(tensors)
        return _Compressed.apply(options, lambda: _compressed_forward(options, None, *tensors), *tensors)
    return _compressed_forward(options, seqused_k, *tensors)


def attend_and_select(
    options: tuple, selection: tuple, seqused_k: Tensor | None, *tensors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and selected_blocks of plain tensors; otherwise as compressed. selection: block_size, top_k,
    init_blocks, local_blocks."""
    block, stride, scale, max_seqlen, backend = options

    def attend() -> tuple[Tensor, ...]:
        return ops.run_attend_and_select(
            tensors, seqused_k, (block, stride), selection, scale, max_seqlen, backend
        )

    if seqused_k is None and records_gradient(*tensors[:3]):
        return _Compressed.apply(options, attend, *tensors)
    return attend()


def selected_gradient(
    tensors: tuple,
    options: tuple,
    algorithm: str,
    max_seqlen: int | None,
    *rest: Tensor,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value. ``into``: tensors to write, where all are plain ones."""
    choice = profiler.choose("backward", tensors, (*tensors, *options), rest, algorithm, max_seqlen)
    args = (*tensors, *options, choice.algorithm, choice.chunk_tokens, *rest)
    if into is not None:
        return ops.run_selected_backward(*args, into)
    return ops.dispatch("nsa_selected_backward", ops.run_selected_backward, *args)


def _selected_forward(
    tensors: tuple, seqused_k: Tensor | None, options: tuple, algorithm: str, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    args = (*tensors, seqused_k, *options)
    choice = profiler.choose("forward", tensors, args, (), algorithm, max_seqlen)
    args = (*args, choice.algorithm, choice.chunk_tokens)
    return ops.dispatch("nsa_selected_forward", ops.run_selected_forward, *args)


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        options: tuple,
        algorithm: str,
        max_seqlen: int | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _selected_forward(tensors, None, options, algorithm, max_seqlen)
        ctx.rest = options, algorithm, max_seqlen
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: FunctionCtx, grad_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors

        # Tensors go in singly: autograd of the gradient itself looks for them among the arguments.
        def gradient(*args: Tensor | None) -> tuple[Tensor, ...]:
            return selected_gradient(args[:5], *ctx.rest, *args[5:])

        grads = as_step(gradient, *tensors, out, lse, grad_out)
        return None, None, None, *grads, None, None


def selected(
    options: tuple,
    algorithm: str,
    max_seqlen: int | None,
    seqused_k: Tensor | None,
    *tensors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out and lse of the selected branch. tensors: query, key, value, selected_blocks, cu_seqlens; options:
    block_size, softmax_scale, backend. With seqused_k there is no gradient."""
    if seqused_k is None and records_gradient(*tensors[:3]):
        if torch.compiler.is_dynamo_compiling():
            tensors = distinct(tensors)
        return _Selected.apply(options, algorithm, max_seqlen, *tensors)
    return _selected_forward(tensors, seqused_k, options, algorithm, max_seqlen)


def _combine_gradient(*args: Any) -> tuple[Tensor, ...]:
    return ops.dispatch("nsa_combine_backward", ops.run_combine_backward, *args)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, backend: str, *tensors: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(*tensors)
        return ops.dispatch("nsa_combine", ops.run_combine, *tensors, backend)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, *as_step(_combine_gradient, *ctx.saved_tensors, ctx.backend, grad_out)


def combine(backend: str, *tensors: Tensor) -> Tensor:
    """The gated sum. tensors: compressed, selected, sliding, gates."""
    if records_gradient(*tensors):
        if torch.compiler.is_dynamo_compiling():
            tensors = distinct(tensors)
        return _Combine.apply(backend, *tensors)
    return ops.dispatch("nsa_combine", ops.run_combine, *tensors, backend)
