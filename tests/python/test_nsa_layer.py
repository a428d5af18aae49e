# SPDX-License-Identifier: Apache-2.0
"""native_sparse_attention as one step of autograd: by key heads, all heads at once, and composed of its parts."""

from __future__ import annotations

import pytest
import torch
from flash_sparse_attention import attention, nsa
from flash_sparse_attention.nsa import layer

BLOCK, STRIDE, SIZE, TOP, WINDOW = 8, 4, 16, 3, 9


def arguments(gates_per_head: bool, own_sliding: bool, packed: bool, dtype: torch.dtype) -> dict:
    g = torch.Generator().manual_seed(7)
    tokens, heads, kv_heads, dim, dim_v = 90, 6, 3, 8, 12
    lengths = (50, 0, 37, 3) if packed else (tokens,)
    rows = (sum(lengths),) if packed else (2, tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*rows, *shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = {"query": normal(heads, dim), "key": normal(kv_heads, dim), "value": normal(kv_heads, dim_v)}
    tensors["gates"] = normal(heads, 3) if gates_per_head else normal(3)
    if own_sliding:
        tensors |= {"sliding_key": normal(kv_heads, dim), "sliding_value": normal(kv_heads, dim_v)}
    rest = {}
    if packed:
        rest["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    mean = {"kind": "mean", "compress_block": BLOCK, "compress_stride": STRIDE, **rest}
    for name in ("key", "value"):
        made, cu_compressed = nsa.compress(tensors[name].detach(), **mean)
        tensors[f"compressed_{name}"] = made.requires_grad_()
    if packed:
        rest["cu_seqlens_compressed"] = cu_compressed
    return tensors | rest


OPTIONS = {"compress_block": BLOCK, "compress_stride": STRIDE, "block_size": SIZE, "top_k": TOP}


def composed(
    query,
    key,
    value,
    gates,
    compressed_key,
    compressed_value,
    sliding_key=None,
    sliding_value=None,
    cu_seqlens=None,
    cu_seqlens_compressed=None,
):
    """The same from the public parts, each with its own gradient."""
    cu = {"cu_seqlens": cu_seqlens}
    out_c, _, blocks = nsa.compressed_attention(
        query, compressed_key, compressed_value, **OPTIONS, **cu, cu_seqlens_compressed=cu_seqlens_compressed
    )
    out_s = nsa.selected_attention(query, key, value, blocks, block_size=SIZE, **cu)
    out_w = attention(
        query,
        key if sliding_key is None else sliding_key,
        value if sliding_value is None else sliding_value,
        causal=True,
        window_size=(WINDOW, 0),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
    )
    return nsa.combine(out_c, out_s, out_w, gates)


def gradients(function, given: dict) -> list[torch.Tensor]:
    out = function(**given)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(8)).to(out.dtype)
    leaves = [t for t in given.values() if t.requires_grad]
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


def whole(**given):
    return nsa.native_sparse_attention(**given, **OPTIONS, window_left=WINDOW)


@pytest.mark.parametrize("by_heads", [False, True], ids=["together", "by_heads"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("own_sliding", [False, True], ids=["shared", "own_sliding"])
@pytest.mark.parametrize("gates_per_head", [False, True], ids=["per_token", "per_head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_composition(monkeypatch, dtype, gates_per_head, own_sliding, packed, by_heads):
    monkeypatch.setattr(layer, "WHOLE_BELOW", 0 if by_heads else 1 << 60)
    given = arguments(gates_per_head, own_sliding, packed, dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(gradients(whole, given), gradients(composed, given), strict=True):
        scale = other.abs().max().item() + 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def test_gradcheck_by_heads(monkeypatch):
    monkeypatch.setattr(layer, "WHOLE_BELOW", 0)
    given = arguments(False, False, False, torch.float64)
    small = {name: t[:1, : 3 if "compressed" in name else 18].detach() for name, t in given.items()}
    names = list(small)
    leaves = [t.requires_grad_() for t in small.values()]
    assert torch.autograd.gradcheck(
        lambda *t: whole(**dict(zip(names, t, strict=True))), leaves, fast_mode=True
    )


def test_only_what_needs_a_gradient_gets_one(monkeypatch):
    monkeypatch.setattr(layer, "WHOLE_BELOW", 0)
    given = {name: t.detach() for name, t in arguments(True, False, False, torch.float32).items()}
    given["value"].requires_grad_()
    out = whole(**given)
    out.sum().backward()
    assert given["value"].grad is not None and given["value"].grad.abs().max() > 0
    assert all(t.grad is None for name, t in given.items() if name != "value")


def test_double_backward_is_refused():
    given = arguments(False, False, False, torch.float64)
    (grad,) = torch.autograd.grad(whole(**given).sum(), given["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()
