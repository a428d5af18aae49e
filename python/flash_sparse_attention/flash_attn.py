# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for FlashAttention: its names, its positional order (version 2), and the keywords of versions 3
and 4.

Shapes, masks and scale are those of FlashAttention: q ``[batch, seqlen_q, num_heads, head_dim]``, packed
``[total_q, num_heads, head_dim]``; causal masks and windows aligned bottom-right; window_size inclusive, -1
or None open. lse is the natural logarithm, float32 ``[batch, num_heads, seqlen_q]``, packed ``[num_heads,
total_q]``, -inf for a row without a key. An argument that this library cannot honour is refused by name; only
hints on how to schedule a kernel (``num_splits``, ``pack_gqa``, ``sm_margin``, ``scheduler_metadata``,
``disable_scheduler_metadata``, ``seqlen_k_per_split``, ``min_seqlen_k``) are without effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import require_flags
from .functional import Window, attention

_OPEN: Window = (-1, -1)

# Keywords of FlashAttention 3 and 4 that change the result and are not computed here, with the value that is
# off.
_REFUSED = {
    "qv": None,
    "q_descale": None,
    "k_descale": None,
    "v_descale": None,
    "attention_chunk": 0,
    "gather_kv_indices": None,
    "score_mod": None,
    "score_mod_bwd": None,
    "mask_mod": None,
    "aux_tensors": None,
    "aux_scalars": None,
    "block_sparse_tensors": None,
    "block_sparse_tensors_bwd": None,
    "leftpad_k": None,
}
_HINTS = frozenset(
    (
        "num_splits",
        "pack_gqa",
        "sm_margin",
        "scheduler_metadata",
        "disable_scheduler_metadata",
        "seqlen_k_per_split",
        "min_seqlen_k",
    )
)


def _refuse(function: str, dropout_p: float, further: dict[str, Any]) -> None:
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p: {dropout_p}, but this library has no dropout; pass 0.0")
    for name, value in further.items():
        if name in _HINTS:
            continue
        if name not in _REFUSED:
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'")
        off = _REFUSED[name]
        if value is not None and (off is None or value != off):
            raise NotImplementedError(f"{name}: given, but this library does not compute it; leave it out")


def _one_of(name: str, tensor: Tensor | None, alias: str, other: Tensor | None) -> Tensor | None:
    if tensor is not None and other is not None:
        raise ValueError(f"{alias}: given together with {name}, which is the same; leave one out")
    return other if tensor is None else tensor


def _results(
    result: tuple[Tensor, Tensor] | Tensor, return_attn_probs: bool
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, None]:
    return (*result, None) if return_attn_probs else result


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _OPEN,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    return_lse: bool = False,
    **further: Any,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, None]:
    """Attention of a batch.

    Args:
        q, k, v: ``[batch, seqlen, heads, head_dim]``; heads of q a multiple of those of k and v.
        dropout_p: 0 only.
        alibi_slopes: ``[num_heads]`` or ``[batch, num_heads]``.
        return_attn_probs: return ``(out, lse, None)``; the probabilities are never formed.
        learnable_sink, s_aux: ``[num_heads]``, an extra term of the denominator, with a gradient; two names
            of one argument.
        return_lse: return ``(out, lse)``.
        further: keywords of FlashAttention 3 and 4; see the module.

    Raises:
        NotImplementedError: an argument that is not computed here. TypeError: one that FlashAttention has
            not.
    """
    _refuse("flash_attn_func", dropout_p, further)
    require_flags(return_lse=return_lse, return_attn_probs=return_attn_probs)
    result = attention(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink=_one_of("learnable_sink", learnable_sink, "s_aux", s_aux),
        return_lse=return_lse or return_attn_probs,
        deterministic=deterministic,
    )
    return _results(result, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _OPEN,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    page_table: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    return_lse: bool = False,
    **further: Any,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, None]:
    """Attention of packed sequences, or of packed queries over paged keys.

    Args:
        q: ``[total_q, num_heads, head_dim]``. k, v: ``[total_k, num_kv_heads, head_dim]``, or with a page
            table ``[num_pages, page_size, num_kv_heads, head_dim]``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[batch + 1]``. With a page table cu_seqlens_k gives the lengths of
            the sequences, unless seqused_k does.
        block_table, page_table: int32 ``[batch, max_pages]``; two names of one argument. No backward.
        seqused_q, seqused_k: int32 ``[batch]``, rows and keys in use.
        max_seqlen_q, max_seqlen_k, and the others: as :func:`flash_attn_func`.

    Raises:
        NotImplementedError: an argument that is not computed here. TypeError: one that FlashAttention has
            not.
    """
    _refuse("flash_attn_varlen_func", dropout_p, further)
    require_flags(return_lse=return_lse, return_attn_probs=return_attn_probs)
    page_table = _one_of("page_table", page_table, "block_table", block_table)
    if page_table is not None and cu_seqlens_k is not None:
        # The pages say where the keys are; of cu_seqlens_k the lengths remain.
        seqused_k = cu_seqlens_k.diff().to(torch.int32) if seqused_k is None else seqused_k
        cu_seqlens_k = None
    result = attention(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink=_one_of("learnable_sink", learnable_sink, "s_aux", s_aux),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        page_table=page_table,
        return_lse=return_lse or return_attn_probs,
        deterministic=deterministic,
    )
    return _results(result, return_attn_probs)
