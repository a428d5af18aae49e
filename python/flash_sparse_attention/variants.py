# SPDX-License-Identifier: Apache-2.0
"""The twelve functions of flash-sparse-attn 2, with its names, order and defaults.

``flash_{dense,sparse,gated}_attn_`` times ``func`` (batched), ``varlen_func`` (packed), ``with_kvcache_func``
(one query per sequence over a batched, paged or gathered cache) and ``varlen_with_kvcache_func`` (over a
packed cache).

Shapes: query ``[batch, seqlen_q, num_heads, head_dim]``, key and value ``[batch, seqlen_k, num_kv_heads,
...]``, packed ``[total, heads, ...]``, paged ``[num_pages, page_size, num_kv_heads, ...]``; over a cache
query is ``[batch, num_heads, head_dim]``. alpha ``[batch, seqlen_q, num_heads]`` (over a cache ``[batch,
num_heads]``), delta ``[batch, seqlen_k, num_kv_heads]``.

Common to all:

* ``softmax_threshold=None`` means 1.0, ``gate_threshold=None`` means 1 / seqlen_k, <= 0 switches the test
  off.
* ``is_local`` without ``window_sizes`` takes :func:`window_sizes_heuristic` of the longest key sequence.
* ``window_size=(left, right)`` and ``gate_layout`` are further keywords, with the meaning they have in
  ``attention``.
* ``out`` and ``lse`` are written in place and returned; only where no gradient is recorded.
* ``is_split_kv``, ``is_split_qo``, ``pack_gqa``, ``is_autotune``, ``tile_mn`` and ``skip_checks`` are hints
  and change nothing, and neither does ``num_splits`` where keys are not split (everywhere but over a cache).
* ``is_quant``, the scales and float8 tensors are refused: NotImplementedError.
* The functions over a cache have no backward.

They return out, or ``(out, lse)`` with ``return_lse=True``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd
from .functional import Window, collect, length, window_sizes_heuristic

_OPEN: Window = (-1, -1)
_FLOAT8 = frozenset(
    (
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    )
)


def _refuse_quantised(
    query: Tensor, key: Tensor, value: Tensor, is_quant: bool, *scales: Tensor | None
) -> None:
    autograd.require_flags(is_quant=is_quant)
    if is_quant:
        raise NotImplementedError("is_quant: True, but this version does not quantise; pass is_quant=False")
    for name, scale in zip(("query_scale", "key_scale", "value_scale"), scales, strict=True):
        if scale is not None:
            raise NotImplementedError(
                f"{name}: given, but this version computes no quantised tensors; leave it out"
            )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if isinstance(tensor, Tensor) and tensor.dtype in _FLOAT8:
            raise NotImplementedError(
                f"{name}: dtype {tensor.dtype}, but this version computes no quantised tensors; "
                "convert it to bfloat16"
            )


def _windows(
    key: Tensor,
    window_size: Window,
    window_sizes: Tensor | None,
    is_local: bool,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
) -> Tensor | None:
    """window_sizes, or the heuristic's for the longest key sequence where is_local stands for it."""
    autograd.require_flags(is_local=is_local)
    if window_sizes is not None or not is_local:
        return window_sizes
    if tuple(window_size) not in ((-1, -1), (None, None), (-1, None), (None, -1)):
        raise ValueError(
            f"is_local: True without window_sizes chooses windows, but window_size is {window_size}; "
            "leave one out"
        )
    num_kv_heads = key.shape[-2]
    if seqused_k is not None:
        lengths = seqused_k
    elif cu_seqlens_k is not None:
        lengths = cu_seqlens_k.diff()
    elif page_table is not None:
        return None  # without seqused_k: refused in a moment
    else:
        return window_sizes_heuristic(key.shape[1], num_kv_heads, key.device)
    longest = lengths.max().clamp(min=0) if lengths.numel() else 0
    return window_sizes_heuristic(longest, num_kv_heads, key.device)


def _threshold(softmax_threshold: float | None) -> float:
    return 1.0 if softmax_threshold is None else softmax_threshold


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    return_lse: bool,
    **arguments: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    inputs, options = collect(query, key, value, **arguments)
    out, lse, _ = autograd.attend(inputs, options, return_lse, False, out, lse)
    return (out, lse) if return_lse else out


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gather_kv_indices: Tensor | None,
    num_splits: int | None,
    out: Tensor | None,
    lse: Tensor | None,
    return_lse: bool,
    **arguments: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    inputs, options = collect(query, key, value, **arguments)
    inputs = (*inputs[:-1], gather_kv_indices)
    num_splits = None if num_splits is None else length("num_splits", num_splits)
    out, lse = autograd.attend_one(inputs, options, num_splits, False, return_lse, out, lse)
    return (out, lse) if return_lse else out


def flash_dense_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    is_local: bool = False,
    is_quant: bool = False,
    is_split_kv: bool = False,
    is_split_qo: bool = False,
    pack_gqa: bool = False,
    num_splits: int | None = None,
    page_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention of a batch."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, None, seqused_k, page_table)
    return _attend(
        query,
        key,
        value,
        out,
        lse,
        return_lse,
        seqused_k=seqused_k,
        page_table=page_table,
        causal=is_causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        gate_layout=gate_layout,
    )


def flash_dense_attn_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    is_local: bool = False,
    is_quant: bool = False,
    num_splits: int | None = None,
    page_table: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention of one query per sequence over a batched, paged or gathered cache."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, None, seqused_k, page_table)
    return _decode(
        query,
        key,
        value,
        gather_kv_indices,
        num_splits,
        out,
        lse,
        return_lse,
        seqused_k=seqused_k,
        page_table=page_table,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        gate_layout=gate_layout,
    )


def flash_dense_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    is_local: bool = False,
    is_quant: bool = False,
    is_split_kv: bool = False,
    is_split_qo: bool = False,
    pack_gqa: bool = False,
    num_splits: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention of packed sequences."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, cu_seqlens_k, seqused_k, None)
    return _attend(
        query,
        key,
        value,
        out,
        lse,
        return_lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        causal=is_causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        gate_layout=gate_layout,
    )


def flash_dense_attn_varlen_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    is_local: bool = False,
    is_quant: bool = False,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention of one query per sequence over a packed cache."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, cu_seqlens_k, seqused_k, None)
    return _decode(
        query,
        key,
        value,
        gather_kv_indices,
        num_splits,
        out,
        lse,
        return_lse,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        gate_layout=gate_layout,
    )


def flash_sparse_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    softmax_threshold: float | None = None,
    is_local: bool = False,
    is_quant: bool = False,
    is_split_kv: bool = False,
    is_split_qo: bool = False,
    pack_gqa: bool = False,
    num_splits: int | None = None,
    page_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Threshold-sparse attention of a batch."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, None, seqused_k, page_table)
    return _attend(
        query,
        key,
        value,
        out,
        lse,
        return_lse,
        seqused_k=seqused_k,
        page_table=page_table,
        causal=is_causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        threshold=_threshold(softmax_threshold),
        gate_layout=gate_layout,
    )


def flash_sparse_attn_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    softmax_threshold: float | None = None,
    is_local: bool = False,
    is_quant: bool = False,
    num_splits: int | None = None,
    page_table: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Threshold-sparse attention of one query per sequence over a batched, paged or gathered cache."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, None, seqused_k, page_table)
    return _decode(
        query,
        key,
        value,
        gather_kv_indices,
        num_splits,
        out,
        lse,
        return_lse,
        seqused_k=seqused_k,
        page_table=page_table,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        threshold=_threshold(softmax_threshold),
        gate_layout=gate_layout,
    )


def flash_sparse_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    softmax_threshold: float | None = None,
    is_local: bool = False,
    is_quant: bool = False,
    is_split_kv: bool = False,
    is_split_qo: bool = False,
    pack_gqa: bool = False,
    num_splits: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Threshold-sparse attention of packed sequences."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, cu_seqlens_k, seqused_k, None)
    return _attend(
        query,
        key,
        value,
        out,
        lse,
        return_lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        causal=is_causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        threshold=_threshold(softmax_threshold),
        gate_layout=gate_layout,
    )


def flash_sparse_attn_varlen_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    softmax_threshold: float | None = None,
    is_local: bool = False,
    is_quant: bool = False,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Threshold-sparse attention of one query per sequence over a packed cache."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, cu_seqlens_k, seqused_k, None)
    return _decode(
        query,
        key,
        value,
        gather_kv_indices,
        num_splits,
        out,
        lse,
        return_lse,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        threshold=_threshold(softmax_threshold),
        gate_layout=gate_layout,
    )


def flash_gated_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    delta: Tensor,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    softmax_threshold: float | None = None,
    gate_threshold: float | None = None,
    is_logsigmoid_gate: bool = True,
    is_adapt_gate: bool = True,
    is_local: bool = False,
    is_quant: bool = False,
    is_split_kv: bool = False,
    is_split_qo: bool = False,
    pack_gqa: bool = False,
    num_splits: int | None = None,
    page_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated and sparse attention of a batch."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, None, seqused_k, page_table)
    return _attend(
        query,
        key,
        value,
        out,
        lse,
        return_lse,
        seqused_k=seqused_k,
        page_table=page_table,
        causal=is_causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        threshold=_threshold(softmax_threshold),
        alpha=alpha,
        delta=delta,
        gate_threshold=gate_threshold,
        log_sigmoid_gate=is_logsigmoid_gate,
        adaptive_gate=is_adapt_gate,
        gate_layout=gate_layout,
    )


def flash_gated_attn_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    delta: Tensor,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    softmax_threshold: float | None = None,
    gate_threshold: float | None = None,
    is_logsigmoid_gate: bool = True,
    is_local: bool = False,
    is_quant: bool = False,
    num_splits: int | None = None,
    page_table: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated and sparse attention of one query per sequence over a batched, paged or gathered cache."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, None, seqused_k, page_table)
    return _decode(
        query,
        key,
        value,
        gather_kv_indices,
        num_splits,
        out,
        lse,
        return_lse,
        seqused_k=seqused_k,
        page_table=page_table,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        threshold=_threshold(softmax_threshold),
        alpha=alpha,
        delta=delta,
        gate_threshold=gate_threshold,
        log_sigmoid_gate=is_logsigmoid_gate,
        gate_layout=gate_layout,
    )


def flash_gated_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    delta: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    softmax_threshold: float | None = None,
    gate_threshold: float | None = None,
    is_logsigmoid_gate: bool = True,
    is_adapt_gate: bool = True,
    is_local: bool = False,
    is_quant: bool = False,
    is_split_kv: bool = False,
    is_split_qo: bool = False,
    pack_gqa: bool = False,
    num_splits: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated and sparse attention of packed sequences."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, cu_seqlens_k, seqused_k, None)
    return _attend(
        query,
        key,
        value,
        out,
        lse,
        return_lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        causal=is_causal,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        threshold=_threshold(softmax_threshold),
        alpha=alpha,
        delta=delta,
        gate_threshold=gate_threshold,
        log_sigmoid_gate=is_logsigmoid_gate,
        adaptive_gate=is_adapt_gate,
        gate_layout=gate_layout,
    )


def flash_gated_attn_varlen_with_kvcache_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    delta: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window_sizes: Tensor | None = None,
    softmax_threshold: float | None = None,
    gate_threshold: float | None = None,
    is_logsigmoid_gate: bool = True,
    is_local: bool = False,
    is_quant: bool = False,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    is_autotune: bool = True,
    tile_mn: tuple[int, int] | None = None,
    skip_checks: bool = False,
    return_lse: bool = False,
    *,
    window_size: Window = _OPEN,
    gate_layout: str = "bsh",
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated and sparse attention of one query per sequence over a packed cache."""
    _refuse_quantised(query, key, value, is_quant, query_scale, key_scale, value_scale)
    windows = _windows(key, window_size, window_sizes, is_local, cu_seqlens_k, seqused_k, None)
    return _decode(
        query,
        key,
        value,
        gather_kv_indices,
        num_splits,
        out,
        lse,
        return_lse,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        window_size=window_size,
        window_sizes=windows,
        threshold=_threshold(softmax_threshold),
        alpha=alpha,
        delta=delta,
        gate_threshold=gate_threshold,
        log_sigmoid_gate=is_logsigmoid_gate,
        gate_layout=gate_layout,
    )
