# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.fsa.nsa_*`` and the direct calls of the extension that they stand on.

As in the package's ops.py: ``run_*`` allocate the outputs and call the extension; the functions without the
prefix go through the operators instead where tensors have no memory to use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..ops import define, empty, is_plain, lse_dtype, workspace

Scale = float | None


def dispatch(name: str, run: Callable, *args: Any) -> Any:
    """``run(*args)`` where the tensors among args are plain ones, else the operator of that name."""
    if is_plain([a for a in args if isinstance(a, Tensor)]):
        return run(*args)
    return getattr(torch.ops.fsa, name)(*args)


def lse_shape(query: Tensor, packed: bool) -> tuple[int, ...]:
    """[batch, num_heads, seqlen_q], packed [num_heads, total_q]."""
    shape = query.shape
    return (shape[1], shape[0]) if packed else (shape[0], shape[2], shape[1])


# ---- compression -------------------------------------------------------------------------------------------


def compressed_rows(tokens: int, compress_block: int, compress_stride: int) -> int:
    """Complete windows among so many tokens: 0 below compress_block."""
    return torch.sym_max(tokens - compress_block + compress_stride, 0) // compress_stride


def _compressed_shape(x: Tensor, block: int, stride: int, total_compressed: int | None) -> tuple[int, ...]:
    if total_compressed is not None:
        return (total_compressed, *x.shape[1:])
    return (x.shape[0], compressed_rows(x.shape[1], block, stride), *x.shape[2:])


def run_compress(
    x: Tensor,
    weight: Tensor | None,
    intra_block_pe: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_compressed: Tensor | None,
    kind: str,
    compress_block: int,
    compress_stride: int,
    total_compressed: int | None,
    backend: str,
) -> Tensor:
    """The compressed tokens; ``total_compressed``: rows of the packed result, None when batched."""
    args = (x, weight, intra_block_pe, cu_seqlens, cu_seqlens_compressed)
    args += (kind, compress_block, compress_stride, backend)
    size = _C.nsa_workspace_size_compress(*args)  # checks the arguments, shapes too
    out = empty(x, _compressed_shape(x, compress_block, compress_stride, total_compressed))
    _C.nsa_compress(*args, out, workspace(x, size))
    return out


def _compress_fake(
    x: Tensor,
    weight: Tensor | None,
    intra_block_pe: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_compressed: Tensor | None,
    kind: str,
    compress_block: int,
    compress_stride: int,
    total_compressed: int | None,
    backend: str,
) -> Tensor:
    return empty(x, _compressed_shape(x, compress_block, compress_stride, total_compressed))


_COMPRESS = (
    "Tensor x, Tensor? weight, Tensor? intra_block_pe, Tensor? cu_seqlens, Tensor? cu_seqlens_compressed, "
    "str kind, SymInt compress_block, SymInt compress_stride"
)
define(
    f"nsa_compress({_COMPRESS}, SymInt? total_compressed, str backend) -> Tensor",
    run_compress,
    _compress_fake,
)


def run_compress_backward(
    x: Tensor,
    weight: Tensor | None,
    intra_block_pe: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_compressed: Tensor | None,
    kind: str,
    compress_block: int,
    compress_stride: int,
    backend: str,
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and intra_block_pe; without elements for what is None."""
    args = (x, weight, intra_block_pe, cu_seqlens, cu_seqlens_compressed)
    args += (kind, compress_block, compress_stride, backend)
    size = _C.nsa_workspace_size_compress_backward(*args)
    grads = _compress_backward_fake(*args, grad_out)
    wanted = (grads[0], None if weight is None else grads[1], None if intra_block_pe is None else grads[2])
    _C.nsa_compress_backward(*args, grad_out.resolve_neg(), *wanted, workspace(x, size))
    return grads


def _compress_backward_fake(
    x: Tensor, weight: Tensor | None, intra_block_pe: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(empty(x, (0,) if t is None else t.shape) for t in (x, weight, intra_block_pe))


define(
    f"nsa_compress_backward({_COMPRESS}, str backend, Tensor grad_out)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_intra_block_pe)",
    run_compress_backward,
    _compress_backward_fake,
)


# ---- the compressed branch ---------------------------------------------------------------------------------


def run_compressed_forward(
    query: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_compressed: Tensor | None,
    seqused_k: Tensor | None,
    compress_block: int,
    compress_stride: int,
    softmax_scale: Scale,
    max_seqlen: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out and lse over the compressed keys."""
    args = (query, compressed_key, compressed_value, cu_seqlens, cu_seqlens_compressed, seqused_k)
    args += (compress_block, compress_stride, softmax_scale, max_seqlen, backend)
    size = _C.nsa_workspace_size_compressed_forward(*args)
    out, lse = _attention_fake(query, compressed_key, compressed_value, cu_seqlens)
    _C.nsa_compressed_forward(*args, out, lse, workspace(query, size))
    return out, lse


def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    out = empty(query, (*query.shape[:-1], value.shape[-1]))
    return out, empty(query, lse_shape(query, cu_seqlens is not None), lse_dtype(query.dtype))


_COMPRESSED = (
    "Tensor query, Tensor compressed_key, Tensor compressed_value, Tensor? cu_seqlens, "
    "Tensor? cu_seqlens_compressed"
)
_WINDOWS = "SymInt compress_block, SymInt compress_stride"
define(
    f"nsa_compressed_forward({_COMPRESSED}, Tensor? seqused_k, {_WINDOWS}, float? softmax_scale, "
    "SymInt? max_seqlen, str backend) -> (Tensor out, Tensor lse)",
    run_compressed_forward,
    _attention_fake,
)


def run_compressed_backward(
    query: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_compressed: Tensor | None,
    compress_block: int,
    compress_stride: int,
    softmax_scale: Scale,
    max_seqlen: int | None,
    backend: str,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    onto: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, compressed_key and compressed_value. ``onto``, on a CPU: what that of query is added to;
    ``into``: tensors to write the others to."""
    args = (query, compressed_key, compressed_value, cu_seqlens, cu_seqlens_compressed)
    args += (compress_block, compress_stride, softmax_scale, max_seqlen, backend)
    size = _C.nsa_workspace_size_compressed_backward(*args)
    grad_query = empty(query, query.shape) if onto is None else onto
    grads = (grad_query, *(into or (empty(t, t.shape) for t in (compressed_key, compressed_value))))
    scratch = workspace(query, size)
    _C.nsa_compressed_backward(*args, out, lse, grad_out.resolve_neg(), *grads, scratch, onto is not None)
    return grads


def _three_grads_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(empty(t, t.shape) for t in args[:3])


define(
    f"nsa_compressed_backward({_COMPRESSED}, {_WINDOWS}, float? softmax_scale, SymInt? max_seqlen, "
    "str backend, Tensor out, Tensor lse, Tensor grad_out)"
    " -> (Tensor grad_query, Tensor grad_compressed_key, Tensor grad_compressed_value)",
    run_compressed_backward,
    _three_grads_fake,
)


# ---- selection ---------------------------------------------------------------------------------------------


def run_select_blocks(
    query: Tensor,
    compressed_key: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_compressed: Tensor | None,
    seqused_k: Tensor | None,
    compress_block: int,
    compress_stride: int,
    block_size: int,
    top_k: int,
    init_blocks: int,
    local_blocks: int,
    softmax_scale: Scale,
    backend: str,
) -> Tensor:
    """selected_blocks, int32 [batch, num_kv_heads, seqlen_q, top_k], packed [num_kv_heads, total_q,
    top_k]."""
    args = (query, compressed_key, lse, cu_seqlens, cu_seqlens_compressed, seqused_k, compress_block)
    args += (compress_stride, block_size, top_k, init_blocks, local_blocks, softmax_scale, backend)
    size = _C.nsa_workspace_size_select_blocks(*args)
    blocks = _select_blocks_fake(*args)
    _C.nsa_select_blocks(*args, blocks, workspace(query, size))
    return blocks


def _select_blocks_fake(
    query: Tensor, compressed_key: Tensor, lse: Tensor, cu_seqlens: Tensor | None, *rest: Any
) -> Tensor:
    top_k, num_kv_heads = rest[5], compressed_key.shape[-2]
    if cu_seqlens is not None:
        return empty(query, (num_kv_heads, query.shape[0], top_k), torch.int32)
    return empty(query, (query.shape[0], num_kv_heads, query.shape[1], top_k), torch.int32)


define(
    f"nsa_select_blocks(Tensor query, Tensor compressed_key, Tensor lse, Tensor? cu_seqlens, "
    f"Tensor? cu_seqlens_compressed, Tensor? seqused_k, {_WINDOWS}, SymInt block_size, SymInt top_k, "
    "SymInt init_blocks, SymInt local_blocks, float? softmax_scale, str backend) -> Tensor",
    run_select_blocks,
    _select_blocks_fake,
)


def run_attend_and_select(
    tensors: tuple[Tensor | None, ...],
    seqused_k: Tensor | None,
    windows: tuple[int, int],
    selection: tuple[int, int, int, int],
    softmax_scale: Scale,
    max_seqlen: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The two above in one call, which computes the scores once where it can: out, lse, selected_blocks.

    tensors: query, compressed_key, compressed_value, cu_seqlens, cu_seqlens_compressed.
    """
    query, key, value, *lengths = tensors
    lengths.append(seqused_k)
    size = max(
        _C.nsa_workspace_size_select_blocks(
            query, key, None, *lengths, *windows, *selection, softmax_scale, backend
        ),
        _C.nsa_workspace_size_compressed_forward(
            query, key, value, *lengths, *windows, softmax_scale, max_seqlen, backend
        ),
    )
    out, lse = _attention_fake(query, key, value, lengths[0])
    blocks = _select_blocks_fake(query, key, lse, *lengths, *windows, *selection)
    args = (*tensors, seqused_k, *windows, *selection, softmax_scale, max_seqlen, backend)
    _C.nsa_attend_and_select(*args, out, lse, blocks, workspace(query, size))
    return out, lse, blocks


# ---- the selected branch -----------------------------------------------------------------------------------


def run_selected_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected_blocks: Tensor,
    cu_seqlens: Tensor | None,
    seqused_k: Tensor | None,
    block_size: int,
    softmax_scale: Scale,
    backend: str,
    algorithm: str,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """out and lse over the tokens of the selected blocks."""
    args = (query, key, value, selected_blocks, cu_seqlens, seqused_k, block_size, softmax_scale)
    args += (algorithm, chunk_tokens, backend)
    size = _C.nsa_workspace_size_selected_forward(*args)
    out, lse = _attention_fake(query, key, value, cu_seqlens)
    _C.nsa_selected_forward(*args, out, lse, workspace(query, size))
    return out, lse


def _selected_forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected_blocks: Tensor,
    cu_seqlens: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return _attention_fake(query, key, value, cu_seqlens)


_SELECTED = "Tensor query, Tensor key, Tensor value, Tensor selected_blocks, Tensor? cu_seqlens"
_SELECTED_SCALARS = "SymInt block_size, float? softmax_scale, str backend, str algorithm, SymInt chunk_tokens"
define(
    f"nsa_selected_forward({_SELECTED}, Tensor? seqused_k, {_SELECTED_SCALARS}) -> (Tensor out, Tensor lse)",
    run_selected_forward,
    _selected_forward_fake,
)


def run_selected_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected_blocks: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    softmax_scale: Scale,
    backend: str,
    algorithm: str,
    chunk_tokens: int,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``into``: tensors to write."""
    args = (query, key, value, selected_blocks, cu_seqlens, block_size, softmax_scale)
    args += (algorithm, chunk_tokens, backend)
    size = _C.nsa_workspace_size_selected_backward(*args)
    grads = into or _three_grads_fake(query, key, value)
    _C.nsa_selected_backward(*args, out, lse, grad_out.resolve_neg(), *grads, workspace(query, size))
    return grads


define(
    f"nsa_selected_backward({_SELECTED}, {_SELECTED_SCALARS}, Tensor out, Tensor lse, Tensor grad_out)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    run_selected_backward,
    _three_grads_fake,
)


# ---- combination -------------------------------------------------------------------------------------------


def run_combine(compressed: Tensor, selected: Tensor, sliding: Tensor, gates: Tensor, backend: str) -> Tensor:
    """The gated sum of the three branches."""
    out = empty(compressed, compressed.shape)
    _C.nsa_combine(compressed, selected, sliding, gates, backend, out)
    return out


def _combine_fake(compressed: Tensor, *rest: Any) -> Tensor:
    return empty(compressed, compressed.shape)


_BRANCHES = "Tensor compressed, Tensor selected, Tensor sliding, Tensor gates, str backend"
define(f"nsa_combine({_BRANCHES}) -> Tensor", run_combine, _combine_fake)


def run_combine_backward(
    compressed: Tensor,
    selected: Tensor,
    sliding: Tensor,
    gates: Tensor,
    backend: str,
    grad_out: Tensor,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the three branches and of the gates; ``into``: tensors to write those of the branches to."""
    fresh = into or (empty(t, t.shape) for t in (compressed, selected, sliding))
    grads = (*fresh, empty(gates, gates.shape))
    _C.nsa_combine_backward(compressed, selected, sliding, gates, backend, grad_out.resolve_neg(), *grads)
    return grads


def _combine_backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(empty(t, t.shape) for t in args[:4])


define(
    f"nsa_combine_backward({_BRANCHES}, Tensor grad_out)"
    " -> (Tensor grad_compressed, Tensor grad_selected, Tensor grad_sliding, Tensor grad_gates)",
    run_combine_backward,
    _combine_backward_fake,
)
