# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments: one per line, each beside a valid twin. The error has the documented type, names the argument and
(where there is one) its value, and comes before any tensor is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flash_sparse_attention as fsa
import pytest
import torch
from cases import build, case_named

INVALID, TYPE, REFUSED = ValueError, TypeError, NotImplementedError


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# ---- valid calls --------------------------------------------------------------------------------------------


def batched() -> dict[str, Any]:
    return {"query": zeros(2, 70, 4, 32), "key": zeros(2, 90, 2, 32), "value": zeros(2, 90, 2, 24)}


def gated() -> dict[str, Any]:
    return {**batched(), "alpha": zeros(2, 70, 4), "delta": zeros(2, 90, 2)}


def packed() -> dict[str, Any]:
    lengths = {"cu_seqlens_q": int32(0, 30, 70), "cu_seqlens_k": int32(0, 50, 90)}
    return {"query": zeros(70, 4, 32), "key": zeros(90, 2, 32), "value": zeros(90, 2, 24), **lengths}


def paged() -> dict[str, Any]:
    pages = {"key": zeros(5, 16, 2, 32), "value": zeros(5, 16, 2, 24)}
    return {**batched(), **pages, "page_table": int32([0, 4], [3, 2]), "seqused_k": int32(32, 7)}


def listed(counts: list, indices: list, size: tuple[int, int] = (128, 128), **more: Any) -> fsa.BlockMask:
    """Full blocks as they are given."""
    tensors = {"full_kv_num_blocks": int32(*counts), "full_kv_indices": int32(*indices)}
    names = (
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "partial_begin",
        "partial_bits",
    )
    return fsa.BlockMask(*({**tensors, **more}.get(name) for name in names), size)


def decode() -> dict[str, Any]:
    return {"query": zeros(2, 4, 32), "key": zeros(2, 90, 2, 32), "value": zeros(2, 90, 2, 24)}


def gated_decode() -> dict[str, Any]:
    return {**decode(), "alpha": zeros(2, 4), "delta": zeros(2, 90, 2)}


def gathered() -> dict[str, Any]:
    return {**decode(), "gather_kv_indices": int32([0, 89, -1], [5, 5, 5])}


def packed_decode() -> dict[str, Any]:
    keys = {"key": zeros(90, 2, 32), "value": zeros(90, 2, 24), "cu_seqlens_k": int32(0, 50, 90)}
    return {"query": zeros(2, 4, 32), **keys, "max_seqlen_k": 50}


def dense() -> dict[str, Any]:
    return batched()


def merge() -> dict[str, Any]:
    return {"outs": zeros(3, 2, 70, 4, 24), "lses": zeros(3, 2, 4, 70)}


FUNCTIONS = {
    batched: "attention",
    gated: "attention",
    packed: "attention",
    paged: "attention",
    decode: "flash_dense_attn_with_kvcache_func",
    gathered: "flash_dense_attn_with_kvcache_func",
    gated_decode: "flash_gated_attn_with_kvcache_func",
    packed_decode: "flash_dense_attn_varlen_with_kvcache_func",
    dense: "flash_dense_attn_func",
    merge: "merge_attention_states",
}


@dataclasses.dataclass
class Bad:
    """`wrong` makes a call fail with `error`, whose message holds every one of `words`; `right` is its valid twin."""

    base: Callable[[], dict[str, Any]]
    wrong: dict[str, Any]
    error: type[Exception] | tuple[type[Exception], ...]
    words: tuple[str, ...]
    right: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        def short(value: Any) -> str:
            if isinstance(value, torch.Tensor):
                return "x".join(map(str, value.shape)) + str(value.dtype).removeprefix("torch.")
            return str(value)[:24]

        return f"{self.base.__name__}-" + "-".join(f"{n}={short(v)}" for n, v in self.wrong.items())


def strided_last(*shape: int) -> torch.Tensor:
    return zeros(*shape[:-1], 2 * shape[-1])[..., ::2]


SHARED = zeros(2, 70, 4, 32)
MANY = zeros(1, 4, 1, 513)

TABLE = [
    # rank
    Bad(batched, {"query": zeros(70, 4, 32)}, INVALID, ("query", "rank 3")),
    Bad(batched, {"query": zeros(1, 2, 70, 4, 32)}, INVALID, ("query", "rank 5")),
    Bad(batched, {"key": zeros(90, 2, 32)}, INVALID, ("key", "rank 3")),
    Bad(batched, {"value": zeros(90, 2, 24)}, INVALID, ("value", "rank 3")),
    Bad(packed, {"query": zeros(1, 70, 4, 32)}, INVALID, ("query", "rank 4")),
    Bad(packed, {"key": zeros(1, 90, 2, 32)}, INVALID, ("key", "rank 4")),
    Bad(packed, {"cu_seqlens_q": int32([0, 30, 70])}, INVALID, ("cu_seqlens_q", "rank 2")),
    Bad(packed, {"cu_seqlens_q": int32()}, INVALID, ("cu_seqlens_q", "[0]")),
    Bad(paged, {"page_table": int32(0, 4)}, INVALID, ("page_table", "rank 1")),
    Bad(paged, {"key": zeros(80, 2, 32)}, INVALID, ("key", "rank 3")),
    Bad(gated, {"alpha": zeros(2, 70, 4, 1)}, INVALID, ("alpha", "[2, 70, 4, 1]")),
    Bad(decode, {"query": zeros(2, 1, 4, 32)}, INVALID, ("query", "rank 4")),
    Bad(gathered, {"gather_kv_indices": int32(0, 1)}, INVALID, ("gather_kv_indices", "rank 1")),
    Bad(batched, {"alibi_slopes": zeros(1, 2, 4)}, INVALID, ("alibi_slopes", "[1, 2, 4]"),
        {"alibi_slopes": zeros(2, 4)}),
    Bad(merge, {"outs": zeros(2, 70, 4)}, INVALID, ("outs", "rank 3")),
    # shape, batch and head counts
    Bad(batched, {"key": zeros(2, 90, 2, 64)}, INVALID, ("key", "head_dim 64", "head_dim 32")),
    Bad(batched, {"value": zeros(2, 91, 2, 24)}, INVALID, ("value", "seqlen_k 91", "90")),
    Bad(batched, {"value": zeros(2, 90, 4, 24)}, INVALID, ("value", "num_kv_heads 4", "2")),
    Bad(batched, {"key": zeros(3, 90, 2, 32)}, INVALID, ("key", "batch 3", "batch 2")),
    Bad(batched, {"value": zeros(1, 90, 2, 24)}, INVALID, ("value", "batch 1", "2")),
    Bad(batched, {"key": zeros(2, 90, 3, 32),
        "value": zeros(2, 90, 3, 24)}, INVALID, ("num_heads 4", "num_kv_heads 3"),
        {"key": zeros(2, 90, 4, 32), "value": zeros(2, 90, 4, 24)}),
    Bad(batched, {"key": zeros(2, 90, 0, 32), "value": zeros(2, 90, 0, 24)}, INVALID, ("key", "num_kv_heads 0")),
    Bad(batched, {"query": zeros(2, 70, 0, 32)}, INVALID, ("query", "num_heads 0")),
    Bad(packed, {"value": zeros(89, 2, 24)}, INVALID, ("value", "total_k 89", "90")),
    Bad(paged, {"value": zeros(4, 16, 2, 24)}, INVALID, ("value", "num_pages 4", "5")),
    Bad(paged, {"value": zeros(5, 8, 2, 24)}, INVALID, ("value", "page_size 8", "16")),
    Bad(paged, {"page_table": int32([0, 4])}, INVALID, ("page_table", "batch 1", "2")),
    Bad(decode, {"key": zeros(1, 90, 2, 32), "value": zeros(1, 90, 2, 24)}, INVALID, ("key", "batch 1", "2")),
    Bad(gathered, {"gather_kv_indices": int32([0, 1])}, INVALID, ("gather_kv_indices", "batch 1", "2")),
    Bad(batched, {"seqused_k": int32(1, 2, 3)}, INVALID, ("seqused_k", "[3]"), {"seqused_k": int32(1, 90)}),
    Bad(batched, {"seqused_q": int32(1)}, INVALID, ("seqused_q", "[1]"), {"seqused_q": int32(0, 70)}),
    Bad(batched, {"window_sizes": int32([1, 1, 1])}, INVALID, ("window_sizes", "[1, 3]"),
        {"window_sizes": int32([1, 1, 1, 1], [0, 0, 0, 9])}),
    Bad(batched, {"window_sizes": int32([1, 1, 1, 1])}, INVALID, ("window_sizes", "[1, 4]")),
    Bad(merge, {"lses": zeros(2, 2, 4, 70)}, INVALID, ("lses", "[2, 2, 4, 70]")),
    Bad(merge, {"lses": zeros(3, 2, 70, 4)}, INVALID, ("lses", "[3, 2, 70, 4]")),
    # head_dim
    Bad(batched, {"query": MANY, "key": MANY, "value": MANY}, INVALID, ("head_dim 513", "512"),
        {"query": zeros(1, 4, 1, 512), "key": zeros(1, 4, 1, 512), "value": zeros(1, 4, 1, 512)}),
    Bad(batched, {"value": zeros(2, 90, 2, 513)}, INVALID, ("value", "513", "512"), {"value": zeros(2, 90, 2, 512)}),
    Bad(batched, {"value": zeros(2, 90, 2, 0)}, INVALID, ("value", "head_dim_v 0"), {"value": zeros(2, 90, 2, 1)}),
    # dtype and type
    Bad(batched, {"key": zeros(2, 90, 2, 32, dtype=torch.bfloat16)}, TYPE, ("key", "bfloat16", "float32")),
    Bad(batched, {"value": zeros(2, 90, 2, 24, dtype=torch.float64)}, TYPE, ("value", "float64", "float32")),
    Bad(batched, {n: t.int() for n, t in batched().items()}, TYPE, ("query", "int32")),
    Bad(batched, {n: t.bool() for n, t in batched().items()}, TYPE, ("query",)),
    Bad(batched, {n: t.to(torch.complex64) for n, t in batched().items()}, TYPE, ("query",)),
    Bad(batched, {n: t.to(torch.float8_e5m2) for n, t in batched().items()}, (TYPE, REFUSED), ("query",)),
    Bad(gated, {"alpha": zeros(2, 70, 4, dtype=torch.float16)}, TYPE, ("alpha", "float16"),
        {"alpha": zeros(2, 70, 4, dtype=torch.float64)}),
    Bad(gated, {"delta": zeros(2, 90, 2, dtype=torch.int32)}, TYPE, ("delta", "int32")),
    Bad(batched, {"sink": zeros(4, dtype=torch.bfloat16)}, TYPE, ("sink", "bfloat16"), {"sink": zeros(4)}),
    Bad(batched, {"alibi_slopes": int32(1, 2, 3, 4)}, TYPE, ("alibi_slopes", "int32"), {"alibi_slopes": zeros(4)}),
    Bad(packed, {"cu_seqlens_q": torch.tensor([0, 30, 70])}, TYPE, ("cu_seqlens_q", "int64", "int32")),
    Bad(packed, {"cu_seqlens_k": torch.tensor([0.0, 50.0, 90.0])}, TYPE, ("cu_seqlens_k", "float32", "int32")),
    Bad(batched, {"seqused_k": torch.tensor([1, 2])}, TYPE, ("seqused_k", "int64", "int32"),
        {"seqused_k": int32(1, 2)}),
    Bad(batched, {"seqused_q": torch.tensor([1, 2])}, TYPE, ("seqused_q", "int64", "int32"),
        {"seqused_q": int32(1, 2)}),
    Bad(paged, {"page_table": torch.tensor([[0, 4], [3, 2]])}, TYPE, ("page_table", "int64", "int32")),
    Bad(gathered, {"gather_kv_indices": torch.tensor([[0], [5]])}, TYPE, ("gather_kv_indices", "int64", "int32")),
    Bad(batched, {"window_sizes": torch.ones(2, 4)}, TYPE, ("window_sizes", "float32", "int32"),
        {"window_sizes": torch.ones(2, 4, dtype=torch.int32)}),
    Bad(batched, {"query": None}, (TYPE, INVALID), ("query",)),
    Bad(batched, {"value": [1.0, 2.0]}, TYPE, ("value", "list")),
    Bad(batched, {"sink": 1.0}, TYPE, ("sink", "float"), {"sink": zeros(4)}),
    Bad(batched, {"causal": "yes"}, TYPE, ("causal", "str"), {"causal": True}),
    Bad(batched, {"causal": 1}, TYPE, ("causal", "int"), {"causal": False}),
    Bad(batched, {"softcap": "high"}, TYPE, ("softcap", "str"), {"softcap": 3}),
    Bad(batched, {"softmax_scale": "auto"}, TYPE, ("softmax_scale", "str"), {"softmax_scale": 1}),
    Bad(batched, {"threshold": [1.0]}, TYPE, ("threshold", "list"), {"threshold": 1}),
    Bad(batched, {"window_size": 5}, (TYPE, INVALID), ("window_size", "5"), {"window_size": (5, 5)}),
    Bad(batched, {"window_size": (5,)}, (TYPE, INVALID), ("window_size",), {"window_size": [5, None]}),
    Bad(batched, {"window_size": (1.5, 0)}, TYPE, ("window",), {"window_size": (1, 0)}),
    Bad(packed, {"max_seqlen_q": 40.0}, TYPE, ("max_seqlen_q", "float"), {"max_seqlen_q": 40}),
    Bad(batched, {"backend": 3}, TYPE, ("backend", "int"), {"backend": "reference"}),
    Bad(merge, {"outs": zeros(3, 2, 70, 4, 24, dtype=torch.int32)}, TYPE, ("outs", "int32")),
    Bad(merge, {"lses": zeros(3, 2, 4, 70, dtype=torch.float16)}, TYPE, ("lses", "float16")),
    # device
    Bad(batched, {"key": zeros(2, 90, 2, 32).to("meta")}, (TYPE, INVALID, REFUSED), ("key", "meta")),
    Bad(gated, {"delta": zeros(2, 90, 2).to("meta")}, (TYPE, INVALID, REFUSED), ("delta", "meta")),
    # strides
    Bad(batched, {"query": strided_last(2, 70, 4, 32)}, INVALID, ("query", "stride 2")),
    Bad(batched, {"key": strided_last(2, 90, 2, 32)}, INVALID, ("key", "stride 2")),
    Bad(batched, {"value": zeros(2, 90, 24, 2).transpose(2, 3)}, INVALID, ("value", "stride 2")),
    Bad(batched, {"query": zeros(1).expand(2, 70, 4, 32)}, INVALID, ("query", "stride 0"),
        {"query": zeros(32).expand(2, 70, 4, 32)}),
    # numbers
    *(Bad(batched, {"softmax_scale": x}, INVALID, ("softmax_scale", str(x)), {"softmax_scale": 0.5})
      for x in (math.nan, math.inf, -math.inf)),
    Bad(batched, {"softmax_scale": 0.0}, INVALID, ("softmax_scale", "0"), {"softmax_scale": 1e-30}),
    Bad(batched, {"softmax_scale": -0.5}, INVALID, ("softmax_scale", "-0.5")),
    *(Bad(batched, {"softcap": x}, INVALID, ("softcap", str(x)), {"softcap": 2.0}) for x in (math.nan, math.inf, -1.5)),
    *(Bad(batched, {"threshold": x}, INVALID, ("threshold", str(x)), {"threshold": -1e300})
      for x in (math.nan, math.inf, -math.inf)),
    *(Bad(gated, {"gate_threshold": x}, INVALID, ("gate_threshold", str(x)), {"gate_threshold": 1e300})
      for x in (math.nan, math.inf, -math.inf)),
    # windows
    Bad(batched, {"window_size": (-2, 0)}, INVALID, ("window_size", "-2"), {"window_size": (-1, 0)}),
    Bad(batched, {"window_size": (0, -7)}, INVALID, ("window_size", "-7"), {"window_size": (0, -1)}),
    Bad(batched, {"window_sizes": int32([0, 0, 0, -1], [0, 0, 0, 1])}, INVALID, ("window_sizes", "-1"),
        {"window_sizes": int32([0, 0, 0, 0], [0, 0, 0, 1])}),
    Bad(batched, {"window_sizes": int32([0, 0, 0, 5], [0, 0, 0, 1]), "window_size": (5, 0)}, INVALID,
        ("window_sizes", "window"), {"window_sizes": int32([0, 0, 0, 5], [0, 0, 0, 1]), "window_size": (-1, None)}),
    Bad(dense, {"is_local": True, "window_size": (5, 0)}, INVALID, ("is_local", "window_size"), {"is_local": True}),
    # lengths
    Bad(packed, {"cu_seqlens_q": int32(1, 30, 70)}, INVALID, ("cu_seqlens_q", "1")),
    Bad(packed, {"cu_seqlens_k": int32(-1, 50, 90)}, INVALID, ("cu_seqlens_k", "-1")),
    Bad(packed, {"cu_seqlens_q": int32(0, 71, 70)}, INVALID, ("cu_seqlens_q", "71"),
        {"cu_seqlens_q": int32(0, 70, 70)}),
    Bad(packed, {"cu_seqlens_k": int32(0, 50, 91)}, INVALID, ("cu_seqlens_k", "91", "90"),
        {"cu_seqlens_k": int32(0, 50, 60)}),
    Bad(packed, {"cu_seqlens_k": int32(0, 50, 70, 90)}, INVALID, ("cu_seqlens_k", "batch 3", "2")),
    Bad(packed, {"cu_seqlens_k": None}, INVALID, ("cu_seqlens_k", "cu_seqlens_q")),
    Bad(packed, {"cu_seqlens_q": None, "query": zeros(2, 70, 4, 32)}, INVALID, ("cu_seqlens_q", "cu_seqlens_k")),
    Bad(packed, {"max_seqlen_q": 39}, INVALID, ("max_seqlen_q", "39", "40"), {"max_seqlen_q": 40}),
    Bad(packed, {"max_seqlen_k": 49}, INVALID, ("max_seqlen_k", "49", "50"), {"max_seqlen_k": 1000}),
    Bad(packed, {"max_seqlen_k": -1}, INVALID, ("max_seqlen_k", "-1")),
    Bad(packed_decode, {"max_seqlen_k": 49}, INVALID, ("max_seqlen_k", "49", "50")),
    Bad(packed_decode, {"cu_seqlens_k": int32(0, 50, 91)}, INVALID, ("cu_seqlens_k", "91", "90")),
    Bad(packed_decode, {"cu_seqlens_k": int32(0, 90)}, INVALID, ("cu_seqlens_k", "batch 1", "2")),
    Bad(batched, {"seqused_k": int32(-1, 90)}, INVALID, ("seqused_k", "-1"), {"seqused_k": int32(0, 90)}),
    Bad(batched, {"seqused_k": int32(0, 91)}, INVALID, ("seqused_k", "91", "90")),
    Bad(batched, {"seqused_q": int32(0, -3)}, INVALID, ("seqused_q", "-3"), {"seqused_q": int32(70, 70)}),
    Bad(batched, {"seqused_q": int32(71, 70)}, INVALID, ("seqused_q", "71", "70")),
    Bad(packed, {"seqused_k": int32(50, 41)}, INVALID, ("seqused_k", "41", "40"), {"seqused_k": int32(50, 40)}),
    Bad(packed, {"seqused_q": int32(31, 40)}, INVALID, ("seqused_q", "31", "30"), {"seqused_q": int32(0, 40)}),
    Bad(decode, {"seqused_k": int32(91, 0)}, INVALID, ("seqused_k", "91", "90"), {"seqused_k": int32(90, 0)}),
    # indices
    Bad(paged, {"page_table": int32([0, 5], [3, 2])}, INVALID, ("page_table", "5"),
        {"page_table": int32([0, 4], [3, 99])}),
    Bad(paged, {"page_table": int32([-1, 4], [3, 2])}, INVALID, ("page_table", "-1")),
    Bad(paged, {"seqused_k": None}, INVALID, ("seqused_k", "page_table")),
    Bad(paged, {"seqused_k": int32(33, 7)}, INVALID, ("seqused_k", "33", "32")),
    Bad(paged, {"key": zeros(5, 0, 2, 32), "value": zeros(5, 0, 2, 24)}, INVALID, ("page_size 0",)),
    Bad(paged, {"cu_seqlens_k": int32(0, 10, 20), "cu_seqlens_q": int32(0, 30, 70),
        "query": zeros(70, 4, 32)}, INVALID,
        ("cu_seqlens_k", "page_table"), {"cu_seqlens_q": int32(0, 30, 70), "query": zeros(70, 4, 32)}),
    Bad(gathered, {"gather_kv_indices": int32([0, 90], [5, 5])}, INVALID, ("gather_kv_indices", "90"),
        {"gather_kv_indices": int32([0, 89], [5, 5])}),
    Bad(gathered, {"gather_kv_indices": int32([0, -2], [5, 5])}, INVALID, ("gather_kv_indices", "-2"),
        {"gather_kv_indices": int32([0, -1], [-1, -1])}),
    Bad(gathered, {"seqused_k": int32(89, 90)}, INVALID, ("gather_kv_indices", "89"), {"seqused_k": int32(90, 6)}),
    Bad(gathered, {"key": zeros(5, 45, 2, 32), "value": zeros(5, 45, 2, 24), "page_table": int32([0, 1], [2, 3]),
                   "seqused_k": int32(90, 90)}, (INVALID, REFUSED), ("gather_kv_indices", "page_table")),
    Bad(gathered, {"window_size": (5, 0)}, (INVALID, REFUSED), ("gather_kv_indices", "window")),
    Bad(gathered, {"window_sizes": int32([0, 0, 0, 9], [0, 0, 0, 9])}, (INVALID, REFUSED),
        ("gather_kv_indices", "window")),
    # block masks
    Bad(batched, {"block_mask": "causal"}, TYPE, ("block_mask", "str"), {"block_mask": None}),
    Bad(batched, {"block_mask": zeros(1, 1, 1, 1)}, TYPE, ("block_mask", "float32", "bool"),
        {"block_mask": zeros(1, 1, 1, 1).bool()}),
    Bad(batched, {"block_mask": zeros(1, 1, 1).bool()}, INVALID, ("block_mask", "[1, 1, 1]", "key_blocks")),
    Bad(batched, {"block_mask": zeros(1, 1, 2, 1).bool()}, INVALID, ("kv_num_blocks", "[1, 1, 2]", "[1, 1, 1]")),
    Bad(batched, {"block_mask": zeros(3, 1, 1, 1).bool()}, INVALID, ("kv_num_blocks", "[3, 1, 1]", "[2, 1, 1]"),
        {"block_mask": zeros(2, 4, 1, 1).bool()}),
    Bad(batched, {"block_mask": zeros(1, 2, 1, 1).bool()}, INVALID, ("kv_num_blocks", "[1, 2, 1]", "[1, 4, 1]")),
    Bad(batched, {"block_mask": listed([[[2]]], [[[[0]]]])}, INVALID, ("full_kv_num_blocks[0, 0, 0]: 2", "from 0 to 1"),
        {"block_mask": listed([[[1]]], [[[[0]]]])}),
    Bad(batched, {"block_mask": listed([[[-1]]], [[[[0]]]])}, INVALID, ("full_kv_num_blocks[0, 0, 0]: -1",)),
    Bad(batched, {"block_mask": listed([[[1]]], [[[[1]]]])}, INVALID, ("full_kv_indices[0, 0, 0, 0]: 1", "from 0 to 0"),
        {"block_mask": listed([[[0]]], [[[[1]]]])}),
    Bad(batched, {"block_mask": listed([[[1]]], [[[[-1]]]])}, INVALID, ("full_kv_indices[0, 0, 0, 0]: -1",)),
    Bad(batched, {"block_mask": listed([[[2]]], [[[[0, 0]]]])}, INVALID, ("full_kv_indices[0, 0, 0, 1]: 0", "once"),
        {"block_mask": listed([[[1]]], [[[[0, 0]]]])}),
    Bad(batched, {"block_mask": listed([[[1]]], [[[[0]]]], (128, 64))}, INVALID, ("block_keys: 64", "128"),
        {"block_mask": listed([[[1]]], [[[[0]]]], (192, 256))}),
    Bad(batched, {"block_mask": listed([[[1]]], [[[[0]]]], (100, 128))}, INVALID, ("block_rows: 100", "64")),
    Bad(batched, {"block_mask": listed([[[1]]], [[[[0]]]], (128, "128"))}, TYPE, ("BLOCK_SIZE[1]", "str")),
    Bad(batched, {"block_mask": listed([[[1]]], [[[[0]]]], partial_bits=int32([[0]]))}, INVALID,
        ("kv_num_blocks: missing", "partial_bits")),
    Bad(batched, {"block_mask": listed([[[1]]], [[[0]]])}, INVALID, ("full_kv_indices: rank 3",)),
    Bad(packed, {"block_mask": zeros(1, 1, 1, 1).bool()}, REFUSED, ("block_mask", "cu_seqlens_q"), {"block_mask": None}),
    Bad(paged, {"block_mask": zeros(1, 1, 1, 1).bool()}, REFUSED, ("block_mask", "page_table")),
    Bad(decode, {"num_splits": -1}, INVALID, ("num_splits", "-1"), {"num_splits": 7}),
    Bad(decode, {"num_splits": 2.5}, TYPE, ("num_splits", "float"), {"num_splits": None}),
    # gates
    Bad(batched, {"alpha": zeros(2, 70, 4)}, INVALID, ("delta", "alpha"),
        {"alpha": zeros(2, 70, 4), "delta": zeros(2, 90, 2)}),
    Bad(batched, {"delta": zeros(2, 90, 2)}, INVALID, ("alpha", "delta")),
    Bad(gated, {"gate_layout": "bhs"}, INVALID, ("alpha", "[2, 70, 4]", "bhs"),
        {"gate_layout": "bhs", "alpha": zeros(2, 4, 70), "delta": zeros(2, 2, 90)}),
    Bad(gated, {"delta": zeros(2, 2, 90)}, INVALID, ("delta", "[2, 2, 90]")),
    Bad(gated, {"gate_layout": "shb"}, INVALID, ("gate_layout", "shb")),
    Bad(gated, {"gate_layout": None}, TYPE, ("gate_layout", "None")),
    Bad(batched, {"gate_threshold": 0.5}, INVALID, ("gate_threshold", "0.5", "alpha")),
    Bad(gated_decode, {"alpha": zeros(2, 1, 4)}, INVALID, ("alpha", "[2, 1, 4]")),
    Bad(gated_decode, {"delta": zeros(2, 91, 2)}, INVALID, ("delta", "[2, 91, 2]")),
    # sink and slopes
    Bad(batched, {"sink": zeros(2)}, INVALID, ("sink", "[2]", "[4]"), {"sink": zeros(4)}),
    Bad(batched, {"sink": zeros(2, 4)}, INVALID, ("sink", "[2, 4]", "[4]")),
    Bad(batched, {"alibi_slopes": zeros(2)}, INVALID, ("alibi_slopes", "[2]"), {"alibi_slopes": zeros(4)}),
    Bad(batched, {"alibi_slopes": zeros(4, 4)}, INVALID, ("alibi_slopes", "[4, 4]"), {"alibi_slopes": zeros(2, 4)}),
    Bad(batched, {"alibi_slopes": zeros(4).requires_grad_()}, REFUSED, ("alibi_slopes", "gradient")),
    # output buffers
    Bad(batched, {"out": zeros(2, 70, 4, 32)}, INVALID, ("out", "[2, 70, 4, 32]"), {"out": zeros(2, 70, 4, 24)}),
    Bad(batched, {"out": zeros(2, 70, 4, 24, dtype=torch.bfloat16)}, TYPE, ("out", "bfloat16")),
    Bad(batched, {"out": strided_last(2, 70, 4, 24)}, INVALID, ("out", "stride 2")),
    Bad(batched, {"out": zeros(70, 4, 24).expand(2, 70, 4, 24)}, INVALID, ("out", "stride 0")),
    Bad(batched, {"query": SHARED, "out": SHARED[..., :24]}, INVALID, ("out", "query", "memory")),
    Bad(batched, {"out": zeros(2, 70, 4, 24),
        "query": zeros(2, 70, 4, 32).requires_grad_()}, INVALID, ("out", "gradient")),
    Bad(batched, {"out": 3}, TYPE, ("out", "int")),
    Bad(dense, {"lse": zeros(2, 70, 4)}, INVALID, ("lse", "[2, 70, 4]"), {"lse": zeros(2, 4, 70)}),
    Bad(dense, {"lse": zeros(2, 4, 70, dtype=torch.float64)}, TYPE, ("lse", "float64")),
    Bad(decode, {"out": zeros(2, 1, 4, 24)}, INVALID, ("out", "[2, 1, 4, 24]"), {"out": zeros(2, 4, 24)}),
    Bad(decode, {"lse": zeros(4, 2)}, INVALID, ("lse", "[4, 2]"), {"lse": zeros(2, 4)}),
    # backends and what this version does not compute
    Bad(batched, {"backend": "warp"}, INVALID, ("backend", "warp", "cpu", "reference"), {"backend": "reference"}),
    Bad(dense, {"is_quant": True}, REFUSED, ("is_quant",), {"is_quant": False}),
    Bad(dense, {"query_scale": torch.ones(1)}, REFUSED, ("query_scale",), {"query_scale": None}),
    Bad(dense, {"value_scale": torch.ones(1)}, REFUSED, ("value_scale",)),
    Bad(decode, {"is_quant": True}, REFUSED, ("is_quant",)),
    Bad(decode, {"key_scale": torch.ones(1)}, REFUSED, ("key_scale",)),
]  # fmt: skip


def copies(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        n: v.detach().clone() if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
        for n, v in arguments.items()
    }


@pytest.mark.parametrize("bad", TABLE, ids=[f"{i}-{bad.id}" for i, bad in enumerate(TABLE)])
def test_bad_argument(bad):
    function = getattr(fsa, FUNCTIONS[bad.base])
    function(**{**bad.base(), **bad.right})  # the valid twin

    arguments = {**bad.base(), **bad.wrong}
    poisoned = None
    if "out" not in bad.wrong and not {"query", "value"} & bad.wrong.keys() and bad.base is not merge:
        valid = bad.base()
        poisoned = arguments["out"] = torch.full(
            (*valid["query"].shape[:-1], valid["value"].shape[-1]), math.nan
        )
    before = copies(arguments)
    with pytest.raises(bad.error) as caught:
        function(**arguments)
    for word in bad.words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert poisoned is None or poisoned.isnan().all(), "out was written"
    for name, tensor in before.items():
        if (
            isinstance(tensor, torch.Tensor)
            and tensor.device.type == "cpu"
            and tensor.dtype.is_floating_point
        ):
            assert torch.equal(tensor.double().nan_to_num(7), arguments[name].double().nan_to_num(7)), (
                f"{name} was changed"
            )


def test_out_over_any_input_is_refused():
    """Every input, index tensors too, may lie in the memory that out would overwrite."""
    memory = torch.zeros(4096)
    out = memory[: 2 * 3 * 4 * 8].view(2, 3, 4, 8)
    base = {n: torch.zeros(2, 3, 4, 8) for n in ("query", "key", "value")}
    hidden = {
        "key": memory[100 : 100 + 2 * 3 * 4 * 8].view(2, 3, 4, 8),
        "value": memory[: 2 * 3 * 4 * 8].view(2, 3, 4, 8),
        "sink": memory[5:9],
        "alibi_slopes": memory[:4],
        "seqused_k": memory[10:12].view(torch.int32),
    }
    for name, tensor in hidden.items():
        with pytest.raises(ValueError, match=f"out.*{name}|{name}.*out"):
            fsa.attention(**{**base, name: tensor}, out=out)
    fsa.attention(**base, out=out)


@pytest.mark.parametrize("size", [0, -1, 513, 2**40])
def test_skip_tile_limits(size):
    with pytest.raises(ValueError, match=f"head_dim.*{size}"):
        fsa.skip_tile(size)


def test_kept_fraction_of_a_wrong_map():
    problem = build(case_named("threshold_causal"), "float32", seed=141)
    _, skip_map = fsa.attention(**problem.arguments(), return_skip_map=True)
    right = {"seqlen_q": 1024, "seqlen_k": 1024, "head_dim": 64, "causal": True}
    assert 0 < fsa.kept_fraction(skip_map, **right) < 1
    for wrong in ({"seqlen_q": 2048}, {"seqlen_k": 9000}):
        with pytest.raises(ValueError, match="skip_map"):
            fsa.kept_fraction(skip_map, **{**right, **wrong})
    with pytest.raises(TypeError, match="skip_map"):
        fsa.kept_fraction(skip_map.float(), **right)


def test_explain_gives_the_same_errors():
    with pytest.raises(ValueError, match="key: head_dim 64"):
        fsa.explain(zeros(1, 2, 1, 32), zeros(1, 2, 1, 64), zeros(1, 2, 1, 64))
    with pytest.raises(ValueError, match="warp"):
        fsa.explain(zeros(1, 2, 1, 32), zeros(1, 2, 1, 32), zeros(1, 2, 1, 32), backend="warp")
