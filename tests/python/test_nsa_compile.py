# SPDX-License-Identifier: Apache-2.0
"""torch.compile with whole graphs, and the operators' contracts."""

from __future__ import annotations

import flash_sparse_attention as fsa
import pytest
import torch
import torch._dynamo.testing
from flash_sparse_attention import nsa
from test_nsa import SHAPES, normal, random_blocks, selected_tensors, whole_tensors
from test_nsa_module import cumulative, hidden, make
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward_and_backward(layer, function, x, *rest, **sizes):
    leaf = x.clone().requires_grad_()
    out = function(leaf, *rest, **sizes)
    parameters = list(layer.parameters())
    return out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *parameters])


@pytest.mark.parametrize("packed,gate_mode", [(False, "per_head"), (True, "per_token")])
def test_fullgraph(packed: bool, gate_mode: str):
    layer = make(51, torch.float64, gate_mode=gate_mode)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if packed:
        args, sizes = (hidden(52, 70), cumulative(40, 30)), {"total_compressed": 15}
    else:
        args, sizes = (hidden(52, 2, 45),), {}
    expected = forward_and_backward(layer, layer, *args, **sizes)
    ours = forward_and_backward(layer, compiled, *args, **sizes)
    for part, (a, b) in enumerate(zip(expected, ours, strict=True)):
        atol = 1e-12 * float(a.abs().max())
        torch.testing.assert_close(b, a, rtol=0, atol=atol, msg=lambda m, part=part: f"result {part}: {m}")


def test_self_attention_with_one_tensor_for_everything():
    """query, key and value the same tensor, and cu_seqlens of both sides."""
    x, cu = normal(57, 70, 2, 16), cumulative(40, 30)

    def function(x: torch.Tensor) -> torch.Tensor:
        blocks = torch.zeros(2, 70, 1, dtype=torch.int32)
        chosen = nsa.selected_attention(x, x, x, blocks, block_size=16, cu_seqlens=cu)
        return chosen + fsa.attention(x, x, x, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)

    def gradient(f) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf).square().sum(), leaf)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(function), rtol=1e-5, atol=1e-4)


def test_dynamic_shapes_recompile_at_most_once():
    layer = make(53, torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch, seqlen in ((2, 70), (3, 80), (4, 33), (5, 100)):
        x = hidden(54, batch, seqlen, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs"


def test_sizes_that_must_be_known():
    layer = make(55, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="total_compressed: missing.*pass total_compressed"):
        compiled(hidden(56, 70, dtype=torch.float32), cumulative(40, 30))


def operators() -> dict[str, tuple]:
    """Arguments of every operator."""
    packed, batched = SHAPES["packed"], SHAPES["batched"]
    found: dict[str, list[tuple]] = {}
    for shape in (packed, batched):
        t = whole_tensors(shape, torch.float32, False, False)
        cu, cu_compressed = shape.cu_seqlens, shape.cu_seqlens_compressed
        block, stride = shape.compress_block, shape.compress_stride
        dim = shape.head_dim
        weight = normal(61, shape.kv_heads, block * dim, dim, scale=0.1)
        pe = normal(62, shape.kv_heads, block, dim)
        total = None if cu is None else int(cu_compressed[-1])
        compress = (t["key"], weight, pe, cu, cu_compressed, "linear", block, stride)
        found.setdefault("nsa_compress", []).append((*compress, total, ""))
        mean = (t["key"], None, None, cu, cu_compressed, "mean", block, stride)
        found["nsa_compress"].append((*mean, total, ""))
        grad = normal(63, *shape.compressed_rows, shape.kv_heads, dim)
        found.setdefault("nsa_compress_backward", []).extend([(*compress, "", grad), (*mean, "", grad)])
        compressed = (t["query"], t["compressed_key"], t["compressed_value"], cu, cu_compressed)
        options = (block, stride, None, None, "")
        found.setdefault("nsa_compressed_forward", []).append((*compressed, None, *options))
        out, lse = torch.ops.fsa.nsa_compressed_forward(*compressed, None, *options)
        found.setdefault("nsa_compressed_backward", []).append((*compressed, *options, out, lse, out * 2))
        selection = (block, stride, shape.block_size, shape.top_k, 1, 2, None, "")
        found.setdefault("nsa_select_blocks", []).append(
            (*compressed[:2], lse, cu, cu_compressed, None, *selection)
        )
        blocks = random_blocks(shape, 64)
        selected = (t["query"], t["key"], t["value"], blocks, cu)
        options = (shape.block_size, None, "", "off", 0)
        found.setdefault("nsa_selected_forward", []).append((*selected, None, *options))
        out, lse = torch.ops.fsa.nsa_selected_forward(*selected, None, *options)
        found.setdefault("nsa_selected_backward", []).append((*selected, *options, out, lse, out * 2))
        branches = (out, out * 2, out * 3, t["gates"], "")
        found.setdefault("nsa_combine", []).append(branches)
        found.setdefault("nsa_combine_backward", []).append((*branches, out * 4))
    return found


OPERATORS = ("nsa_compress", "nsa_compress_backward", "nsa_compressed_forward", "nsa_compressed_backward",
             "nsa_select_blocks", "nsa_selected_forward", "nsa_selected_backward", "nsa_combine",
             "nsa_combine_backward")  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str):
    for arguments in operators()[name]:
        torch.library.opcheck(getattr(torch.ops.fsa, name).default, arguments)


def test_every_operator_is_checked():
    assert set(operators()) == set(OPERATORS)


def test_meta_tensors_give_shapes():
    """Fake kernels answer for tensors without memory."""
    with FakeTensorMode():
        query = torch.empty(2, 100, 4, 64, dtype=torch.bfloat16)
        key, value = (torch.empty(2, 100, 2, n, dtype=torch.bfloat16) for n in (64, 48))
        weight = torch.empty(2, 32 * 64, 64, dtype=torch.bfloat16)
        compressed_key, cu_compressed = nsa.compress(key, weight)
        compressed_value, _ = nsa.compress(value, kind="mean")
        out, lse, blocks = nsa.compressed_attention(
            query,
            compressed_key,
            compressed_value,
            compress_block=32,
            compress_stride=16,
            block_size=64,
            top_k=16,
        )
        chosen, chosen_lse = nsa.selected_attention(query, key, value, blocks, block_size=64, return_lse=True)
        total = nsa.combine(out, chosen, chosen, torch.empty(2, 100, 3))
    assert (
        cu_compressed is None
        and compressed_key.shape == (2, 5, 2, 64)
        and compressed_value.shape == (2, 5, 2, 48)
    )
    assert out.shape == chosen.shape == total.shape == (2, 100, 4, 48) and total.dtype == torch.bfloat16
    assert lse.shape == chosen_lse.shape == (2, 4, 100) and lse.dtype == torch.float32
    assert blocks.shape == (2, 2, 100, 16) and blocks.dtype == torch.int32


def test_functional_transforms_see_the_operators():
    """make_fx traces through to operators, whose graph then runs on other numbers."""
    shape = SHAPES["batched"]
    tensors, blocks = selected_tensors(shape, torch.float32), random_blocks(shape, 65)

    def function(query, key, value):
        return nsa.selected_attention(query, key, value, blocks, block_size=16)

    traced = torch.fx.experimental.proxy_tensor.make_fx(function)(*tensors.values())
    assert any("nsa_selected_forward" in str(node.target) for node in traced.graph.nodes)
    other = [t * 0.5 for t in tensors.values()]
    torch.testing.assert_close(traced(*other), function(*other))
