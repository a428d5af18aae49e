# SPDX-License-Identifier: Apache-2.0
"""The functions of ``fla.ops.nsa`` (fla-org/flash-linear-attention, fla-org/native-sparse-attention), by
their names and argument orders.

Semantics that are kept: ``[B, T, heads, dim]``, with cu_seqlens B = 1; compression is the mean of every
block, so window, stride and selection block are one size, and token t sees ``(t + 1) // block_size``
compressed blocks; the first block and the last two up to a token's own are always selected; gates per query
head, given by the caller, None for a branch that is off (a selected branch without gate is added as it is);
``window_size`` is the number of keys of the sliding branch, the token's own among them, and 0 turns it off;
lse is a natural logarithm ``[B, T, heads]``.

What differs:

* Any group; the original needs a power of two from 16 on.
* block_indices that are computed here are in ascending order, the original's in the order of their scores;
  both are sets to the attention. Of equal scores the lowest block wins.
* Rows of the compressed branch that see no block have lse -inf; kernels of the original store 0.
* block_counts as a tensor is taken with given block_indices, whose first so many entries count. Computed ones
  have no order
  of scores to count in: NotImplementedError.
* A pair of cu_seqlens (cached inference) is a NotImplementedError; :func:`flash_sparse_attention.nsa.decode`
  decodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nsa
from ..functional import attention
from ..nsa.functional import attend_compressed, compressed_cu_seqlens

__all__ = ["mean_pooling", "parallel_nsa", "parallel_nsa_compression", "parallel_nsa_topk"]

CuSeqlens = Tensor | tuple[Tensor, Tensor] | None


def _lengths(x: Tensor, cu_seqlens: CuSeqlens, block_size: int) -> tuple[Tensor | None, Tensor | None]:
    """cu_seqlens as int32, of tokens and of complete blocks."""
    if isinstance(cu_seqlens, tuple):
        raise NotImplementedError(
            "cu_seqlens: a pair (queries, keys) for cached inference is not supported; use nsa.decode"
        )
    if cu_seqlens is None:
        return None, None
    if x.shape[0] != 1:
        raise ValueError(f"q: batch {x.shape[0]}, must be 1 with cu_seqlens")
    cu_seqlens = cu_seqlens.to(torch.int32)
    return cu_seqlens, compressed_cu_seqlens(cu_seqlens, block_size, block_size)


def mean_pooling(x: Tensor, chunk_size: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Means of the complete chunks of x ``[B, T, heads, dim]``; differentiable.

    The original has a row for an incomplete last chunk too, which no token sees.
    """
    cu_seqlens, _ = _lengths(x, cu_seqlens, chunk_size)
    pooled, _ = nsa.compress(
        x if cu_seqlens is None else x.squeeze(0),
        kind="mean",
        compress_block=chunk_size,
        compress_stride=chunk_size,
        cu_seqlens=cu_seqlens,
    )
    return pooled if cu_seqlens is None else pooled.unsqueeze(0)


def _complete(
    x: Tensor, tokens: int, cu_seqlens: Tensor | None, cu_complete: Tensor | None, block_size: int
) -> Tensor:
    """Compressed tokens without the rows of incomplete chunks, which the original's have and ours have
    not."""
    if cu_seqlens is None:
        return x[:, : tokens // block_size]
    if x.shape[1] == int(cu_complete[-1]):
        return x
    chunks = (cu_seqlens.diff() + block_size - 1) // block_size
    starts = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    rows = [
        torch.arange(int(begin), int(begin) + int(count), device=x.device)
        for begin, count in zip(starts[:-1], cu_complete.diff(), strict=True)
    ]
    return x[:, torch.cat(rows)]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: int,
    block_size: int,
    scale: float | None,
    top_k: int,
    cu_seqlens: CuSeqlens,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, T, HQ, V], lse [B, T, HQ], and selected blocks as this library has them."""
    cu_seqlens, cu_complete = _lengths(q, cu_seqlens, block_size)
    k, v = (_complete(x, tokens, cu_seqlens, cu_complete, block_size) for x in (k, v))
    packed = cu_seqlens is not None
    if packed:
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
    out, lse, blocks = attend_compressed(
        (q, k, v, cu_seqlens, cu_complete),
        None,
        (block_size, block_size),
        (block_size, top_k, 1, 2),
        scale,
        None,
        "",
    )
    lse = lse.transpose(-1, -2)
    return (out.unsqueeze(0), lse.unsqueeze(0), blocks) if packed else (out, lse, blocks)


def parallel_nsa_compression(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    TK: int,  # noqa: N803
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens: CuSeqlens = None,
) -> tuple[Tensor, Tensor]:
    """The compressed branch: q ``[B, T, HQ, K]`` over pooled k ``[B, TC, H, K]`` and v ``[B, TC, H, V]`` of
    TK tokens. Returns out ``[B, T, HQ, V]`` and lse ``[B, T, HQ]``, which is not differentiable."""
    out, lse, _ = _attend(q, k, v, TK, block_size, scale, 3, cu_seqlens)
    return out, lse


def parallel_nsa_topk(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    TK: int,  # noqa: N803
    block_counts: Tensor | int,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens: CuSeqlens = None,
) -> Tensor:
    """block_indices int64 ``[B, T, H, block_counts]`` from pooled keys k ``[B, TC, H, K]``; -1 where there
    are fewer.
    lse has no effect: it is computed here."""
    with torch.no_grad():
        _, _, blocks = _attend(q, k, k, TK, block_size, scale, _count(block_counts), cu_seqlens)
    return _to_indices(blocks)


def _count(block_counts: Tensor | int) -> int:
    if isinstance(block_counts, Tensor):
        raise NotImplementedError(
            "block_counts: a tensor is taken with given block_indices alone; pass an int where they are computed"
        )
    if block_counts < 3:
        raise ValueError(
            f"block_counts: {block_counts}, must be at least 3: three blocks are always selected"
        )
    return block_counts


def _to_indices(blocks: Tensor) -> Tensor:
    blocks = blocks.unsqueeze(0) if blocks.dim() == 3 else blocks  # [B, H, T, S]
    return blocks.transpose(1, 2).long()


def parallel_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: Tensor | int = 16,
    block_size: int = 64,
    window_size: int = 0,
    scale: float | None = None,
    cu_seqlens: CuSeqlens = None,
) -> Tensor:
    """The three branches and their gated sum.

    Args:
        q: ``[B, T, HQ, K]``; k ``[B, T, H, K]``; v ``[B, T, H, V]``.
        g_cmp, g_slc, g_swa: gates ``[B, T, HQ]`` of the compressed, selected and sliding branch.
        block_indices: ``[B, T, H, S]``; needed without g_cmp, and taken in place of the computed ones with
            it.
        block_counts: of the selection; with given block_indices, how many of a row count: all of them where
            it is an int, as in the original, or the first so many, int ``[B, T, H]``.
        window_size: keys of the sliding branch; 0: off.

    Returns:
        ``[B, T, HQ, V]``.
    """
    if g_cmp is None and block_indices is None:
        raise ValueError("block_indices: missing, but without g_cmp there is nothing to select blocks by")
    if window_size > 0 and g_swa is None:
        raise ValueError(f"g_swa: missing, but window_size is {window_size}")
    cu, _ = _lengths(q, cu_seqlens, block_size)
    out = None
    if g_cmp is not None:
        pooled = (mean_pooling(x, block_size, cu_seqlens) for x in (k, v))
        top_k = _count(block_counts) if block_indices is None else 3
        compressed, _, blocks = _attend(q, *pooled, k.shape[1], block_size, scale, top_k, cu_seqlens)
        out = compressed * g_cmp.unsqueeze(-1)
    if block_indices is not None:
        if isinstance(block_counts, Tensor):
            slots = torch.arange(block_indices.shape[-1], device=block_indices.device)
            block_indices = block_indices.masked_fill(slots >= block_counts.unsqueeze(-1), -1)
        blocks = block_indices.transpose(1, 2).to(torch.int32).contiguous()
        blocks = blocks if cu is None else blocks.squeeze(0)
    packed = [x if cu is None else x.squeeze(0) for x in (q, k, v)]
    selected = nsa.selected_attention(
        *packed, blocks, block_size=block_size, softmax_scale=scale, cu_seqlens=cu
    )
    selected = selected if cu is None else selected.unsqueeze(0)
    selected = selected if g_slc is None else selected * g_slc.unsqueeze(-1)
    out = selected if out is None else out + selected
    if window_size > 0:
        sliding = attention(
            *packed,
            causal=True,
            window_size=(window_size - 1, 0),
            softmax_scale=scale,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
        )
        out = out + (sliding if cu is None else sliding.unsqueeze(0)) * g_swa.unsqueeze(-1)
    return out
