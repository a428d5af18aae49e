# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of the functions of native sparse attention: one per line, each beside a valid twin. The
error has the documented type, names the argument and (where there is one) its value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash_sparse_attention import nsa

INVALID, TYPE, REFUSED = ValueError, TypeError, NotImplementedError


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def blocks(*shape: int, fill: int = 0) -> torch.Tensor:
    return torch.full(shape, fill, dtype=torch.int32)


# ---- valid calls: 2 sequences of 40 and 30 tokens, l 8, s 4 (9 and 6 windows), B 16 ------------------------


def compress() -> dict[str, Any]:
    return {"x": zeros(70, 2, 8), "weight": zeros(2, 64, 8), "compress_block": 8, "compress_stride": 4,
            "cu_seqlens": int32(0, 40, 70)}  # fmt: skip


def compress_batched() -> dict[str, Any]:
    return {
        "x": zeros(2, 40, 2, 8),
        "kind": "weighted",
        "weight": zeros(2, 8),
        "compress_block": 8,
        "compress_stride": 4,
    }


def compressed() -> dict[str, Any]:
    return {"query": zeros(70, 4, 8), "compressed_key": zeros(15, 2, 8), "compressed_value": zeros(15, 2, 6),
            "compress_block": 8, "compress_stride": 4, "block_size": 16, "top_k": 3, "cu_seqlens": int32(0, 40, 70),
            "cu_seqlens_compressed": int32(0, 9, 15)}  # fmt: skip


def selected() -> dict[str, Any]:
    return {"query": zeros(70, 4, 8), "key": zeros(70, 2, 8), "value": zeros(70, 2, 6), "block_size": 16,
            "selected_blocks": blocks(2, 70, 3), "cu_seqlens": int32(0, 40, 70)}  # fmt: skip


def selected_batched() -> dict[str, Any]:
    return {"query": zeros(2, 40, 4, 8), "key": zeros(2, 40, 2, 8), "value": zeros(2, 40, 2, 6), "block_size": 16,
            "selected_blocks": blocks(2, 2, 40, 3)}  # fmt: skip


def combine() -> dict[str, Any]:
    return {n: zeros(70, 4, 6) for n in ("compressed", "selected", "sliding")} | {"gates": zeros(70, 3)}


def native_sparse_attention() -> dict[str, Any]:
    return {**compressed(), "key": zeros(70, 2, 8), "value": zeros(70, 2, 6), "gates": zeros(70, 4, 3)}


def module() -> dict[str, Any]:
    return {"hidden_size": 16, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8, "kernel_size": 8,
            "kernel_stride": 4, "block_size": 16, "topk": 3, "init_blocks": 1, "local_blocks": 2,
            "window_size": 16}  # fmt: skip


def llama3() -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    return {"head_dim": 8, "rope_scaling": scaling}


def scaled(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {**llama3()["rope_scaling"], **changes}}


def cache() -> dict[str, Any]:
    return {
        "batch": 2,
        "max_seqlen": 64,
        "num_kv_heads": 2,
        "head_dim": 8,
        "compress_block": 8,
        "compress_stride": 4,
    }


def decode() -> dict[str, Any]:
    return {"query": zeros(2, 1, 4, 8), "key": zeros(2, 1, 2, 8), "value": zeros(2, 1, 2, 8), "gates": zeros(2, 1, 3),
            "cache": nsa.NSACache(**cache()), "compress_key": zeros(2, 64, 8), "compress_value": zeros(2, 64, 8),
            "block_size": 16, "top_k": 3}  # fmt: skip


FUNCTIONS = {
    compress: nsa.compress,
    compress_batched: nsa.compress,
    compressed: nsa.compressed_attention,
    selected: nsa.selected_attention,
    selected_batched: nsa.selected_attention,
    combine: nsa.combine,
    native_sparse_attention: nsa.native_sparse_attention,
    module: nsa.NativeSparseAttention,
    llama3: nsa.RopeConfig,
    cache: nsa.NSACache,
    decode: nsa.decode,
}


@dataclasses.dataclass
class Bad:
    """`wrong` makes a call fail with `error`, whose message holds every one of `words`; `right` is its valid
    twin."""

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


TABLE = [
    # compress
    Bad(compress, {"x": zeros(1, 70, 2, 8)}, INVALID, ("x", "rank 4")),
    Bad(compress, {"x": None}, TYPE, ("x", "NoneType")),
    Bad(compress, {"x": torch.zeros(70, 2, 8, dtype=torch.int32)}, TYPE, ("x", "int32")),
    Bad(compress, {"x": zeros(70, 2, 16)[..., ::2]}, INVALID, ("x", "stride 2")),
    Bad(compress, {"weight": None}, INVALID, ("weight",)),
    Bad(compress, {"weight": zeros(2, 64, 9)}, INVALID, ("weight", "[2, 64, 9]", "[2, 64, 8]")),
    Bad(compress, {"weight": zeros(2, 8)}, INVALID, ("weight", "[2, 8]"), {"kind": "weighted", "weight": zeros(2, 8)}),
    Bad(compress, {"weight": zeros(2, 64, 8, dtype=torch.bfloat16)}, TYPE, ("weight", "bfloat16")),
    Bad(compress, {"kind": "max"}, INVALID, ("kind", "'max'"), {"kind": "mean", "weight": None}),
    Bad(compress, {"kind": "mean"}, INVALID, ("weight", "mean"), {"kind": "mean", "weight": None}),
    Bad(compress, {"intra_block_pe": zeros(2, 7, 8)}, INVALID, ("intra_block_pe", "[2, 7, 8]"),
        {"intra_block_pe": zeros(2, 8, 8)}),
    Bad(compress, {"intra_block_pe": zeros(2, 8, 8).double()}, TYPE, ("intra_block_pe", "float64")),
    Bad(compress, {"compress_stride": 3}, INVALID, ("compress_stride", "3", "8"), {"compress_stride": 2}),
    Bad(compress, {"compress_stride": 0}, INVALID, ("compress_stride", "0"), {"compress_stride": 8}),
    Bad(compress, {"compress_block": 0}, INVALID, ("compress_block", "0")),
    Bad(compress, {"compress_block": 8.0}, TYPE, ("compress_block", "float")),
    Bad(compress, {"cu_seqlens": torch.tensor([0, 40, 70])}, TYPE, ("cu_seqlens", "int64", "int32")),
    Bad(compress, {"cu_seqlens": int32([0, 70])}, INVALID, ("cu_seqlens", "[1, 2]")),
    Bad(compress, {"cu_seqlens": int32(1, 40, 70)}, INVALID, ("cu_seqlens", "1")),
    Bad(compress, {"cu_seqlens": int32(0, 71, 70)}, INVALID, ("cu_seqlens", "71")),
    Bad(compress, {"cu_seqlens": int32(0, 40, 99)}, INVALID, ("cu_seqlens", "99", "70")),
    Bad(compress, {"cu_seqlens": None}, INVALID, ("x", "rank 3"), {"cu_seqlens": None, "x": zeros(1, 70, 2, 8)}),
    Bad(compress, {"max_seqlen": 39}, INVALID, ("max_seqlen", "39", "40"), {"max_seqlen": 40}),
    Bad(compress, {"max_seqlen": -1}, INVALID, ("max_seqlen", "-1")),
    Bad(compress, {"total_compressed": 14}, INVALID, ("14",), {"total_compressed": 15}),
    Bad(compress, {"total_compressed": -1}, INVALID, ("total_compressed", "-1"), {"total_compressed": 20}),
    Bad(compress_batched, {"total_compressed": 18}, INVALID, ("total_compressed", "18", "cu_seqlens")),
    Bad(compress_batched, {"max_seqlen": 40}, INVALID, ("max_seqlen", "40", "cu_seqlens")),
    Bad(compress_batched, {"backend": "tpu"}, INVALID, ("backend", "tpu"), {"backend": "reference"}),
    # the compressed branch
    Bad(compressed, {"query": zeros(70, 4, 9)}, INVALID, ("head_dim", "9", "8")),
    Bad(compressed, {"query": zeros(70, 3, 8)}, INVALID, ("num_heads 3", "2")),
    Bad(compressed, {"query": zeros(1, 70, 4, 8)}, INVALID, ("query", "rank 4")),
    Bad(compressed, {"compressed_key": zeros(14, 2, 8), "compressed_value": zeros(14, 2, 6)}, INVALID,
        ("cu_seqlens_compressed", "15", "14"),
        {"compressed_key": zeros(16, 2, 8), "compressed_value": zeros(16, 2, 6)}),
    Bad(compressed, {"compressed_key": zeros(15, 2, 8).half()}, TYPE, ("compressed_key", "float16")),
    Bad(compressed, {"compressed_value": zeros(15, 2, 6).half()}, TYPE, ("compressed_value", "float16")),
    Bad(compressed, {"compressed_value": zeros(14, 2, 6)}, INVALID, ("compressed_value", "[14, 2, 6]")),
    Bad(compressed, {"cu_seqlens_compressed": int32(0, 10, 15)}, INVALID, ("cu_seqlens_compressed", "10", "9")),
    Bad(compressed, {"cu_seqlens_compressed": None}, INVALID, ("cu_seqlens_compressed", "missing")),
    Bad(compressed, {"cu_seqlens": None}, INVALID, ("cu_seqlens", "missing")),
    Bad(compressed, {"compress_stride": 3}, INVALID, ("compress_stride", "3")),
    Bad(compressed, {"block_size": 18}, INVALID, ("block_size", "18", "compress_stride 4"), {"block_size": 20}),
    Bad(compressed, {"block_size": 8}, INVALID, ("block_size", "8", "16"), {"block_size": 16}),
    Bad(compressed, {"block_size": 260}, INVALID, ("block_size", "260", "256"), {"block_size": 256}),
    Bad(compressed, {"top_k": 2}, INVALID, ("top_k", "2", "init_blocks 1", "local_blocks 2"),
        {"top_k": 2, "local_blocks": 1}),
    Bad(compressed, {"top_k": 2000}, INVALID, ("top_k", "2000", "1024"), {"top_k": 1024}),
    Bad(compressed, {"top_k": 3.0}, TYPE, ("top_k", "float")),
    Bad(compressed, {"init_blocks": -1}, INVALID, ("init_blocks", "-1"), {"init_blocks": 0}),
    Bad(compressed, {"local_blocks": -1}, INVALID, ("local_blocks", "-1"), {"local_blocks": 0}),
    Bad(compressed, {"softmax_scale": math.nan}, INVALID, ("softmax_scale", "nan"), {"softmax_scale": 0.5}),
    Bad(compressed, {"softmax_scale": "auto"}, TYPE, ("softmax_scale", "str")),
    Bad(compressed, {"max_seqlen": 39}, INVALID, ("max_seqlen", "39", "40"), {"max_seqlen": 40}),
    # the selected branch
    Bad(selected, {"query": None}, TYPE, ("query", "NoneType")),
    Bad(selected, {"query": zeros(69, 4, 8)}, INVALID, ("70", "69")),
    Bad(selected, {"key": zeros(70, 3, 8), "value": zeros(70, 3, 6)}, INVALID, ("num_heads 4", "num_kv_heads 3"),
        {"key": zeros(70, 1, 8), "value": zeros(70, 1, 6), "selected_blocks": blocks(1, 70, 3)}),
    Bad(selected, {"key": zeros(70, 2, 7)}, INVALID, ("key", "head_dim 7", "8")),
    Bad(selected, {"value": zeros(70, 1, 6)}, INVALID, ("value", "num_kv_heads 1", "2")),
    Bad(selected, {"value": zeros(70, 2, 6).half()}, TYPE, ("value", "float16")),
    Bad(selected, {"query": zeros(70, 4, 257), "key": zeros(70, 2, 257)}, INVALID, ("head_dim 257", "256"),
        {"query": zeros(70, 4, 256), "key": zeros(70, 2, 256)}),
    Bad(selected, {"value": zeros(70, 2, 12)[..., ::2]}, INVALID, ("value", "stride 2")),
    Bad(selected, {"selected_blocks": blocks(2, 70, 3).long()}, TYPE, ("selected_blocks", "int64", "int32")),
    Bad(selected, {"selected_blocks": blocks(4, 70, 3)}, INVALID, ("selected_blocks", "[4, 70, 3]", "[2, 70, 3]")),
    Bad(selected, {"selected_blocks": blocks(70, 2, 3)}, INVALID, ("selected_blocks", "[70, 2, 3]")),
    Bad(selected, {"selected_blocks": blocks(2, 70)}, INVALID, ("selected_blocks", "rank 2")),
    Bad(selected, {"selected_blocks": blocks(2, 70, 0)}, INVALID, ("selected_blocks", "top_k 0")),
    Bad(selected, {"selected_blocks": blocks(2, 70, 3, fill=3)}, INVALID, ("selected_blocks[", "3"),
        {"selected_blocks": blocks(2, 70, 3, fill=1)}),
    Bad(selected, {"selected_blocks": blocks(2, 70, 3, fill=2)}, INVALID, ("selected_blocks[0, 40, 0]", "2"),
        {"selected_blocks": blocks(2, 70, 3, fill=1)}),
    Bad(selected, {"selected_blocks": blocks(2, 70, 3, fill=-2)}, INVALID, ("selected_blocks[", "-2"),
        {"selected_blocks": blocks(2, 70, 3, fill=-1)}),
    Bad(selected, {"block_size": 15}, INVALID, ("block_size", "15"), {"block_size": 17}),
    Bad(selected, {"block_size": 257}, INVALID, ("block_size", "257"), {"block_size": 256}),
    Bad(selected, {"cu_seqlens": int32(0, 40, 71)}, INVALID, ("cu_seqlens", "71")),
    Bad(selected, {"cu_seqlens": None}, INVALID, ("query", "rank 3")),
    Bad(selected, {"max_seqlen": 39}, INVALID, ("max_seqlen", "39", "40"), {"max_seqlen": 41}),
    Bad(selected, {"softmax_scale": 0.0}, INVALID, ("softmax_scale", "0"), {"softmax_scale": 1.0}),
    Bad(selected, {"algorithm": "fast"}, INVALID, ("algorithm", "fast", "kv_outer"), {"algorithm": "kv_outer"}),
    Bad(selected, {"return_lse": 1}, TYPE, ("return_lse", "int"), {"return_lse": True}),
    Bad(selected_batched, {"key": zeros(2, 41, 2, 8), "value": zeros(2, 41, 2, 6)}, INVALID, ("41", "40")),
    Bad(selected_batched, {"selected_blocks": blocks(2, 40, 2, 3)}, INVALID, ("selected_blocks", "[2, 40, 2, 3]")),
    Bad(selected_batched, {"backend": 3}, TYPE, ("backend", "int"), {"backend": "reference"}),
    # combination
    Bad(combine, {"selected": zeros(70, 4, 7)}, INVALID, ("selected", "[70, 4, 7]", "[70, 4, 6]")),
    Bad(combine, {"sliding": zeros(70, 4, 6).half()}, TYPE, ("sliding", "float16")),
    Bad(combine, {"compressed": zeros(4, 6)}, INVALID, ("compressed", "rank 2")),
    Bad(combine, {"gates": zeros(70, 4)}, INVALID, ("gates", "[70, 4]"), {"gates": zeros(70, 4, 3)}),
    Bad(combine, {"gates": zeros(70, 5, 3)}, INVALID, ("gates", "[70, 5, 3]")),
    Bad(combine, {"gates": zeros(70)}, INVALID, ("gates", "rank 1")),
    Bad(combine, {"gates": zeros(70, 3).half()}, TYPE, ("gates", "float16"), {"gates": zeros(70, 3)}),
    Bad(combine, {"gates": None}, TYPE, ("gates", "NoneType")),
    # the whole
    Bad(native_sparse_attention, {"gates": zeros(70, 3, 4)}, INVALID, ("gates", "[70, 3, 4]")),
    Bad(native_sparse_attention, {"window_left": -2}, INVALID, ("window_left", "-2"), {"window_left": -1}),
    Bad(native_sparse_attention, {"window_left": 1.5}, TYPE, ("window_left", "float"), {"window_left": 0}),
    Bad(native_sparse_attention, {"sliding_key": zeros(70, 2, 9)}, INVALID, ("9", "8"),
        {"sliding_key": zeros(70, 2, 8), "sliding_value": zeros(70, 2, 6)}),
    Bad(native_sparse_attention, {"sliding_value": [1.0]}, TYPE, ("sliding_value", "list")),
    Bad(native_sparse_attention, {"key": None}, TYPE, ("key", "NoneType")),
    # the module
    Bad(module, {"num_q_heads": 3}, INVALID, ("num_q_heads", "3", "2"), {"num_q_heads": 6}),
    Bad(module, {"kernel_stride": 3}, INVALID, ("kernel_stride", "3", "8"), {"kernel_stride": 8}),
    Bad(module, {"block_size": 18}, INVALID, ("block_size", "18", "4"), {"block_size": 20}),
    Bad(module, {"topk": 2}, INVALID, ("topk", "2", "init_blocks 1"), {"topk": 4}),
    Bad(module, {"head_dim": 7}, INVALID, ("head_dim", "7"), {"head_dim": 7, "use_rope": False}),
    Bad(module, {"head_dim": 8.0}, TYPE, ("head_dim", "float")),
    Bad(module, {"hidden_size": 0}, INVALID, ("hidden_size", "0")),
    Bad(module, {"gate_mode": "per_block"}, INVALID, ("gate_mode", "per_block"), {"gate_mode": "per_head"}),
    Bad(module, {"compress_kind": "max"}, INVALID, ("compress_kind", "max"), {"compress_kind": "mean"}),
    Bad(module, {"rope_config": nsa.RopeConfig(16)}, INVALID, ("rope_config", "16", "8"),
        {"rope_config": nsa.RopeConfig(8)}),
    Bad(module, {"rope_config": nsa.RopeConfig(8), "use_rope": False}, INVALID, ("rope_config", "use_rope")),
    Bad(llama3, {"head_dim": 9}, INVALID, ("head_dim", "9")),
    Bad(llama3, {"rope_theta": 0.0}, INVALID, ("rope_theta", "0")),
    Bad(llama3, scaled(rope_type="yarn"), REFUSED, ("rope_scaling", "yarn"), scaled(rope_type="default")),
    Bad(llama3, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, INVALID, ("rope_scaling", "low_freq_factor")),
    Bad(llama3, scaled(low_freq_factor=4.0), INVALID, ("low_freq_factor", "4")),
    # decoding
    Bad(cache, {"max_seqlen": 0}, INVALID, ("max_seqlen", "0")),
    Bad(cache, {"compress_stride": 5}, INVALID, ("compress_stride", "5", "8"), {"compress_stride": 2}),
    Bad(cache, {"batch": -1}, INVALID, ("batch", "-1"), {"batch": 0}),
    Bad(decode, {"cache": None}, TYPE, ("cache", "NoneType")),
    Bad(decode, {"cache": nsa.NSACache(**{**cache(), "batch": 3})}, INVALID, ("batch 2", "3")),
    Bad(decode, {"cache": nsa.NSACache(**{**cache(), "head_dim": 16})}, INVALID, ("key", "[2, 1, 2, 8]", "16")),
    Bad(decode, {"cache": nsa.NSACache(**cache(), dtype=torch.bfloat16)}, TYPE, ("key", "float32", "bfloat16")),
    Bad(decode, {"query": zeros(2, 4)}, INVALID, ("query", "rank 2")),
    Bad(decode, {"query": zeros(2, 2, 4, 8), "gates": zeros(2, 2, 3)}, INVALID, ("key", "1", "2"),
        {"query": zeros(2, 2, 4, 8), "gates": zeros(2, 2, 3), "key": zeros(2, 2, 2, 8), "value": zeros(2, 2, 2, 8)}),
    Bad(decode, {"gates": zeros(2, 3)}, INVALID, ("gates", "[2, 3]"), {"gates": zeros(2, 1, 4, 3)}),
    Bad(decode, {"top_k": 2}, INVALID, ("top_k", "2"), {"top_k": 3}),
    Bad(decode, {"window_left": -2}, INVALID, ("window_left", "-2"), {"window_left": -1}),
]  # fmt: skip


def call(bad: Bad, changes: dict[str, Any]) -> Any:
    return FUNCTIONS[bad.base](**{**bad.base(), **changes})


@pytest.mark.parametrize("bad", TABLE, ids=lambda b: b.id)
def test_bad_argument(bad: Bad):
    call(bad, bad.right)
    with pytest.raises(bad.error) as caught:
        call(bad, bad.wrong)
    message = str(caught.value)
    for word in bad.words:
        assert word in message, f"{word!r} is not in: {message}"


def test_cache_overflow():
    arguments = decode()
    for _ in range(64):
        nsa.decode(**arguments)
    before = arguments["cache"].seqlens.clone()
    with pytest.raises(ValueError, match="65.*max_seqlen is 64"):
        nsa.decode(**arguments)
    assert torch.equal(arguments["cache"].seqlens, before)


def test_bad_decode_leaves_the_cache_alone():
    """A call that is refused adds no token."""
    for change in ({"top_k": 1}, {"gates": zeros(2, 1, 5)}, {"compress_key": zeros(2, 63, 8)}):
        arguments = decode()
        cache = arguments["cache"]
        for _ in range(7):
            nsa.decode(**arguments)
        held = {n: t.clone() for n, t in vars(cache).items() if isinstance(t, torch.Tensor)}
        with pytest.raises(ValueError):
            nsa.decode(
                **{**arguments, **change, "key": zeros(2, 1, 2, 8) + 1, "value": zeros(2, 1, 2, 8) + 1}
            )
        assert torch.equal(cache.seqlens, held["seqlens"]), change
        assert torch.equal(cache.raw_key, held["raw_key"]), change
        assert torch.equal(cache.compressed_key[:, :-1], held["compressed_key"][:, :-1]), change


def test_module_inputs():
    layer = nsa.NativeSparseAttention(**module())
    with pytest.raises(ValueError, match="hidden size 15"):
        layer(zeros(2, 40, 15))
    with pytest.raises(ValueError, match=r"\[2, 40, 16\].*cu_seqlens"):
        layer(zeros(2, 40, 16), int32(0, 40))
    with pytest.raises(ValueError, match="x: shape"):
        layer(zeros(16))
    with pytest.raises(ValueError, match="compress_block 16"):
        layer.step(zeros(2, 16), nsa.NSACache(**{**cache(), "compress_block": 16}))
    with pytest.raises(ValueError, match="batch 2.*3 sequences"):
        layer(zeros(3, 40, 16), cache=layer.new_cache(2, 64))
