# SPDX-License-Identifier: Apache-2.0
"""The functions and the module of Relaxed-System-Lab/Flash-Sparse-Attention (``fsa.module.fsa``, ``fsa.ops``,
``nsa_ref.ops``), by their names and argument orders.

Semantics that are kept: packed sequences; gates per token, shared by the heads; the window of the sliding
branch is ``window_size + 1`` keys; state dicts load.

What differs:

* Blocks are scored by all query heads of a group (arXiv 2502.11089, equation 10). The original scores them by
  the first
  head of each group alone: ``compressed_attention(..., score_heads="first")`` does the same.
* The softmax of the selected branch has a maximum of its own per token and block; the original's reference is
  one constant for all tokens, which overflows for large logits.
* lse has base 2 where it is asked for with ``return_lse``, as in the original's kernels.
* Everything that the docstring of ``compat.xunhao`` says: the original is a fork of that package.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import nsa
from .xunhao import (
    RopeConfig,
    RotaryEmbedding,
    avgpool_compress,
    compressed_attention,
    linear_compress,
    topk_sparse_attention,
    weightedpool_compress,
)

__all__ = [
    "FSA_topk_sparse_attention",
    "FlashSparseAttention",
    "RopeConfig",
    "RotaryEmbedding",
    "avgpool_compress",
    "compressed_attention",
    "linear_compress",
    "topk_sparse_attention",
    "weightedpool_compress",
]


def FSA_topk_sparse_attention(  # noqa: N802
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    block_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float | None = None,
    **arguments: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """topk_sparse_attention; both algorithms are behind either name, see :func:`nsa.selected_attention`."""
    return topk_sparse_attention(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale, **arguments)


class FlashSparseAttention(nsa.NativeSparseAttention):
    """The original's module over :class:`nsa.NativeSparseAttention`: ``forward(x, cu_seqlens)`` with packed x
    ``[total, hidden_size]``."""

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int,
        kernel_stride: int,
        block_size: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        window_size: int,
        rope_config: RopeConfig,
    ) -> None:
        super().__init__(
            hidden_size,
            num_q_heads,
            num_kv_heads,
            head_dim,
            kernel_size,
            kernel_stride,
            block_size,
            topk,
            init_blocks,
            local_blocks,
            window_size,
            rope_config.to_nsa(),
        )
