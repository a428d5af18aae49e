# SPDX-License-Identifier: Apache-2.0
"""The functions and modules of XunhaoLai/native-sparse-attention-triton (``native_sparse_attention.ops``,
``.module``, ``.infer``), by their names and argument orders.

Semantics that are kept: packed sequences only; compressed sequences returned with their cu_seqlens; the width
of ``topk_idx`` is ``min(topk, ceil(max_seqlen_q / block_size))``; the window of the sliding branch is
``window_size + 1`` keys; gates per query head, row ``3 * head + branch``.

What differs:

* Any float dtype, head_dim up to 256, any kernel_size that kernel_stride divides, any group; sequences
  shorter than the kernel, and empty ones; nothing needs a GPU.
* ``topk_idx``: candidates are the blocks up to the token's own, so a row holds exactly ``min(topk, own block
  + 1)``; the original can lose one to a future block when scores underflow. Scores are compared in float32,
  the lowest block wins ties; the original compares bfloat16 scores and breaks ties as ``torch.topk`` does.
  Partial last blocks compete by their scores.
* ``topk_sparse_attention`` takes rows in any order with -1 anywhere, and leaves ``topk_idx`` as it is.
* lse, where it is asked for with ``return_lse``, has base 2, as in the original's kernels: the other
  functions of this library return natural logarithms.
* Decoding sees ``window_size + 1`` keys as the prefill does; the original's sees one key less.
* ``parallel_topk_compute`` and ``rope_device`` are accepted and have no effect.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import nsa
from ..nsa.cache import locate

__all__ = [
    "NSACache",
    "NativeSparseAttention",
    "RopeConfig",
    "RotaryEmbedding",
    "avgpool_compress",
    "compressed_attention",
    "conv_compress",
    "linear_compress",
    "nsa_infer",
    "topk_sparse_attention",
    "weightedpool_compress",
]


def linear_compress(
    x: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`nsa.compress` of kind linear: w ``[num_heads, kernel_size * head_dim, head_dim]``, x ``[total,
    num_heads, head_dim]``, pe ``[num_heads, kernel_size, head_dim]``. Returns the compressed tokens and their
    cu_seqlens."""
    return _compress("linear", x, w, cu_seqlens, kernel_size, kernel_stride, pe)


def conv_compress(
    x: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As linear_compress with the weight of a grouped convolution, w ``[num_heads * head_dim, head_dim,
    kernel_size]`` (out, in, position)."""
    num_heads, head_dim = x.shape[-2:]
    expected = (num_heads * head_dim, head_dim, kernel_size)
    if tuple(w.shape) != expected:
        raise ValueError(f"w: shape {list(w.shape)}, must be {list(expected)}")
    per_head = w.view(num_heads, head_dim, head_dim, kernel_size)  # head, out, in, position
    linear = per_head.permute(0, 3, 2, 1).reshape(num_heads, kernel_size * head_dim, head_dim)
    return _compress("linear", x, linear, cu_seqlens, kernel_size, kernel_stride, pe)


def avgpool_compress(
    x: Tensor,
    w: None,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`nsa.compress` of kind mean; w must be None."""
    if w is not None:
        raise ValueError("w: given, but the mean has no weight; pass None")
    return _compress("mean", x, None, cu_seqlens, kernel_size, kernel_stride, pe)


def weightedpool_compress(
    x: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`nsa.compress` of kind weighted: w ``[num_heads, kernel_size]``."""
    return _compress("weighted", x, w, cu_seqlens, kernel_size, kernel_stride, pe)


def _compress(
    kind: str,
    x: Tensor,
    w: Tensor | None,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return nsa.compress(
        x,
        w,
        kind=kind,
        intra_block_pe=pe,
        compress_block=kernel_size,
        compress_stride=kernel_stride,
        cu_seqlens=cu_seqlens,
    )


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    sm_scale: float | None = None,
    init_blocks: int = 1,
    local_blocks: int = 2,
    parallel_topk_compute: str | bool = "auto",
    *,
    score_heads: str = "sum",
    return_lse: bool = False,
) -> tuple[Tensor, ...]:
    """out ``[total, num_heads, head_dim]`` and topk_idx int32 ``[num_kv_heads, total, min(topk, blocks)]``.

    With ``topk <= 0``, as in the original, topk_idx is None, and there is a warning. max_seqlen_k has no
    effect.

    Args:
        score_heads: which query heads of a group score the blocks: "sum", all of them; "first", the first one
            alone, as the fork inside Flash-Sparse-Attention does by default.
        return_lse: also return lse, base 2, float32 ``[num_heads, total]``.
    """
    if score_heads not in ("sum", "first"):
        raise ValueError(f"score_heads: {score_heads!r}, must be 'sum' or 'first'")
    if max_seqlen_q is not None:
        max_seqlen_q = int(max_seqlen_q)
    selects = topk > 0
    if not selects:
        warnings.warn("topk <= 0: no blocks are selected", stacklevel=2)
    selection = {
        "compress_block": kernel_size,
        "compress_stride": kernel_stride,
        "block_size": block_size,
        "top_k": topk if selects else init_blocks + local_blocks or 1,
        "init_blocks": init_blocks,
        "local_blocks": local_blocks,
        "softmax_scale": sm_scale,
        "cu_seqlens": cu_seqlens_q,
        "cu_seqlens_compressed": cu_seqlens_k,
        "max_seqlen": max_seqlen_q,
    }
    out, lse, blocks = nsa.compressed_attention(q, k, v, **selection)
    if selects and score_heads == "first":
        group = q.shape[1] // k.shape[1]
        with torch.no_grad():
            _, _, blocks = nsa.compressed_attention(
                q[:, ::group].detach().contiguous(), k.detach(), v.detach(), **selection
            )
    if selects:
        longest = max_seqlen_q if max_seqlen_q is not None else int(cu_seqlens_q.diff().max())
        blocks = blocks[..., : min(topk, -(-longest // block_size))].contiguous()
    result = (out, blocks if selects else None)
    return (*result, lse / math.log(2)) if return_lse else result


def topk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    block_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`nsa.selected_attention`: topk_idx int32 ``[num_kv_heads, total, topk]``, -1 where there is no
    block.

    return_lse: also return lse, base 2, float32 ``[num_heads, total]``.
    """
    out, lse = nsa.selected_attention(
        q,
        k,
        v,
        topk_idx,
        block_size=block_size,
        softmax_scale=softmax_scale,
        cu_seqlens=cu_seqlens,
        return_lse=True,
    )
    return (out, lse / math.log(2)) if return_lse else out


@dataclasses.dataclass
class RopeConfig:
    """As the original's: the order of the fields and the scaling of Llama 3.1 by default. hidden_size and
    num_attention_heads have no effect."""

    max_position_embeddings: int = 131072
    head_dim: int = 128
    rope_theta: float = 500000
    rope_scaling: Mapping[str, Any] | None = dataclasses.field(
        default_factory=lambda: {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    )
    hidden_size: int = 4096
    num_attention_heads: int = 32

    def to_nsa(self) -> nsa.RopeConfig:
        return nsa.RopeConfig(
            self.head_dim, float(self.rope_theta), self.rope_scaling, self.max_position_embeddings
        )


class RotaryEmbedding(torch.nn.Module):
    """Rotation of packed heads ``[total, heads, head_dim]``: row i of a sequence at position ``start + i *
    stride``.

    Cosines and sines are float32; the original rounds them to the dtype of x.
    """

    def __init__(self, config: RopeConfig, device: Any = None) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, cu_seqlens: Tensor, start: int = 0, stride: int = 1) -> Tensor:
        positions = start + locate(cu_seqlens, x.shape[0])[1] * stride
        return nsa.apply_rope(x, positions, self.config.to_nsa(), bound=start + max(x.shape[0], 1) * stride)


class NativeSparseAttention(nsa.NativeSparseAttention):
    """The original's module: gates per query head, and compress_type first. ``forward(x, cu_seqlens)`` with
    packed x ``[total, hidden_size]``; decoding is :meth:`inference`, or ``new_cache`` and ``step`` of the
    base class."""

    def __init__(
        self,
        compress_type: str,
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
        rope_device: Any = "cuda",
    ) -> None:
        kinds = {"linear": "linear", "avgpool": "mean", "weightedpool": "weighted"}
        if compress_type not in kinds:
            raise ValueError(
                f"compress_type: {compress_type!r}, must be one of {', '.join(map(repr, kinds))}"
            )
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
            gate_mode="per_head",
            compress_kind=kinds[compress_type],
        )
        self.compress_type = compress_type

    @torch.no_grad()
    def inference(self, x: Tensor, cu_seqlens: Tensor, step: int, cache: NSACache) -> Tensor:
        """Step 0: packed sequences x ``[total, hidden_size]``, which the cache takes; later steps: one token
        of each sequence, x ``[batch, hidden_size]``."""
        if step == 0:
            return self.forward(x, cu_seqlens, cache=cache)
        return self.step(x, cache)


class NSACache(nsa.NSACache):
    """:class:`nsa.NSACache` by the original's arguments; every sequence slot is in use. window_size has no
    effect: the sliding branch reads the whole keys, of which there is one copy."""

    def __init__(
        self,
        max_batch_size: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int,
        kernel_stride: int,
        window_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(
            max_batch_size,
            max_length,
            num_kv_heads,
            head_dim,
            compress_block=kernel_size,
            compress_stride=kernel_stride,
            dtype=dtype,
            device=device,
        )


_KIND_OF = {
    linear_compress: "linear",
    avgpool_compress: "mean",
    weightedpool_compress: "weighted",
}


@torch.no_grad()
def nsa_infer(
    cu_seqlens: Tensor,
    step: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_value: Tensor,
    rope: RotaryEmbedding,
    cache: NSACache,
    compress_weight: Sequence[Tensor | None],
    compress_func: Sequence[Callable],
    intra_block_pe: Tensor | None,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    window_size: int,
) -> Tensor:
    """Attention of a prefill (step 0: packed sequences, which the cache takes) or of one token of each
    sequence.

    Args:
        query, key, value: ``[total, heads, head_dim]``, at later steps ``[batch, heads, head_dim]``; not
            rotated.
        gate_value: after the sigmoid, ``[total, num_heads, 3]``.
        compress_weight, compress_func: for keys and for values, one function for both: linear_compress,
            avgpool_compress or weightedpool_compress of this module.
        The others as of the module.

    Returns:
        ``[total, num_heads, head_dim]``.
    """
    if compress_func[0] is not compress_func[1] or compress_func[0] not in _KIND_OF:
        raise NotImplementedError(
            "compress_func: keys and values must share linear_compress, avgpool_compress or weightedpool_compress"
        )
    config = rope.config.to_nsa()
    selection = {
        "block_size": block_size,
        "top_k": topk,
        "init_blocks": init_blocks,
        "local_blocks": local_blocks,
    }
    if step > 0:
        return nsa.decode(
            query,
            key,
            value,
            gate_value,
            cache,
            compress_key=compress_weight[0],
            compress_value=compress_weight[1],
            kind=_KIND_OF[compress_func[0]],
            intra_block_pe=intra_block_pe,
            rope=config,
            window_left=window_size,
            **selection,
        )
    cu_seqlens = cu_seqlens.to(torch.int32)
    windows = (cu_seqlens, kernel_size, kernel_stride)
    compressed_key, cu_compressed = compress_func[0](key, compress_weight[0], *windows, intra_block_pe)
    compressed_value, _ = compress_func[1](value, compress_weight[1], *windows, None)
    compressed_key = rope(compressed_key, cu_compressed, stride=kernel_stride)
    raw_key, key, query = key, rope(key, cu_seqlens), rope(query, cu_seqlens)
    out = nsa.native_sparse_attention(
        query,
        key,
        value,
        gate_value,
        compressed_key=compressed_key,
        compressed_value=compressed_value,
        compress_block=kernel_size,
        compress_stride=kernel_stride,
        window_left=window_size,
        cu_seqlens=cu_seqlens,
        cu_seqlens_compressed=cu_compressed,
        **selection,
    )
    cache.fill(key, value, raw_key, compressed_key, compressed_value, cu_seqlens, cu_compressed)
    return out
