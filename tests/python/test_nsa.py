# SPDX-License-Identifier: Apache-2.0
"""The functions of native sparse attention against the oracle, and properties that hold whatever the oracle
says."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import checks
import flash_sparse_attention as fsa
import nsa_oracle as oracle
import pytest
import torch
from flash_sparse_attention import nsa
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dtypes(*some: torch.dtype):
    return pytest.mark.parametrize("dtype", some or FLOATS, ids=lambda d: str(d).removeprefix("torch."))


@dataclasses.dataclass(frozen=True)
class Shape:
    """lengths: of packed sequences; batch: instead of them, so many of the one length."""

    lengths: tuple[int, ...] = (70, 0, 131, 1, 17)
    batch: int = 0
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    compress_block: int = 8
    compress_stride: int = 4
    block_size: int = 16
    top_k: int = 4
    init_blocks: int = 1
    local_blocks: int = 2
    scale: float | None = None

    @property
    def packed(self) -> bool:
        return self.batch == 0

    @property
    def rows(self) -> tuple[int, ...]:
        return (sum(self.lengths),) if self.packed else (self.batch, self.lengths[0])

    @property
    def all_lengths(self) -> list[int]:
        return list(self.lengths) if self.packed else [self.lengths[0]] * self.batch

    @property
    def split(self) -> list[int] | None:
        return list(self.lengths) if self.packed else None

    @property
    def compressed_split(self) -> list[int] | None:
        if not self.packed:
            return None
        return [len(oracle.windows(n, self.compress_block, self.compress_stride)) for n in self.lengths]

    @property
    def cu_seqlens(self) -> Tensor | None:
        return cumulative(self.lengths) if self.packed else None

    @property
    def cu_seqlens_compressed(self) -> Tensor | None:
        return cumulative(self.compressed_split) if self.packed else None

    @property
    def compressed_rows(self) -> tuple[int, ...]:
        counts = [len(oracle.windows(n, self.compress_block, self.compress_stride)) for n in self.all_lengths]
        return (sum(counts),) if self.packed else (self.batch, counts[0])

    @property
    def selection(self) -> dict[str, Any]:
        names = ("compress_block", "compress_stride", "block_size", "top_k", "init_blocks", "local_blocks")
        return {**{n: getattr(self, n) for n in names}, "softmax_scale": self.scale}

    @property
    def lengths_arguments(self) -> dict[str, Any]:
        return {"cu_seqlens": self.cu_seqlens, "cu_seqlens_compressed": self.cu_seqlens_compressed}


def cumulative(lengths) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


SHAPES = {
    "packed": Shape(),
    "batched": Shape(lengths=(90,), batch=2, heads=6, kv_heads=3, head_dim=24, head_dim_v=8),
    "group_1": Shape(heads=3, kv_heads=3, head_dim=8, head_dim_v=40, block_size=32),
    "no_overlap": Shape(compress_block=16, compress_stride=16, scale=0.4),
    "stride_1": Shape(lengths=(40, 33), compress_block=3, compress_stride=1, head_dim=5, head_dim_v=3),
    "wide_window": Shape(lengths=(150, 20), compress_block=32, compress_stride=8, top_k=3),
    "short": Shape(lengths=(0, 1, 7, 8, 3), top_k=5, local_blocks=4),
}


def shapes(*some: str):
    return pytest.mark.parametrize("shape", [SHAPES[n] for n in some or SHAPES], ids=list(some or SHAPES))


# ---- compression -------------------------------------------------------------------------------------------


def compress_tensors(shape: Shape, kind: str, pe: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    heads, dim, block = shape.kv_heads, shape.head_dim, shape.compress_block
    tensors = {"x": normal(1, *shape.rows, heads, dim, dtype=dtype)}
    if kind == "linear":
        tensors["weight"] = normal(2, heads, block * dim, dim, dtype=dtype, scale=(block * dim) ** -0.5)
    elif kind == "weighted":
        tensors["weight"] = normal(2, heads, block, dtype=dtype, scale=block**-0.5)
    if pe:
        tensors["intra_block_pe"] = normal(3, heads, block, dim, dtype=dtype)
    return tensors


@dtypes()
@pytest.mark.parametrize(
    "kind,pe", [("linear", True), ("linear", False), ("weighted", True), ("mean", False)]
)
@shapes()
def test_compress(shape: Shape, kind: str, pe: bool, dtype: torch.dtype):
    tensors = compress_tensors(shape, kind, pe, dtype)
    grad = normal(4, *shape.compressed_rows, shape.kv_heads, shape.head_dim, dtype=dtype)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    windows = {"compress_block": shape.compress_block, "compress_stride": shape.compress_stride}
    y, cu_compressed = nsa.compress(**leaves, kind=kind, **windows, cu_seqlens=shape.cu_seqlens)
    if shape.packed:
        assert torch.equal(cu_compressed, shape.cu_seqlens_compressed) and cu_compressed.dtype == torch.int32
    else:
        assert cu_compressed is None
    ours = {"out": y.detach(), **oracle.gradients(y, grad, leaves)}

    def function(t: dict[str, Tensor], order: oracle.Order) -> Tensor:
        parts = [
            oracle.compress(x, kind, t.get("weight"), t.get("intra_block_pe"), *windows.values(), order)
            for x in oracle.split(t["x"], shape.split)
        ]
        return oracle.join(parts, shape.split)

    oracle.assert_within_twice(function, tensors, grad, ours, dtype)


def test_compress_sizes_known_on_the_host():
    shape = SHAPES["packed"]
    tensors = compress_tensors(shape, "linear", True, torch.float32)
    windows = {"compress_block": 8, "compress_stride": 4, "cu_seqlens": shape.cu_seqlens}
    expected, _ = nsa.compress(**tensors, **windows)
    total = expected.shape[0]
    same, _ = nsa.compress(**tensors, **windows, total_compressed=total, max_seqlen=131)
    assert torch.equal(same, expected)
    leaf = tensors["x"].clone().requires_grad_()
    more, _ = nsa.compress(**{**tensors, "x": leaf}, **windows, total_compressed=total + 9, max_seqlen=500)
    assert torch.equal(more[:total], expected) and not more[total:].any()
    (grad,) = torch.autograd.grad(more.sum(), leaf)
    leaf = leaf.detach().requires_grad_()
    (expected_grad,) = torch.autograd.grad(nsa.compress(**{**tensors, "x": leaf}, **windows)[0].sum(), leaf)
    assert torch.equal(grad, expected_grad)


def test_order_inside_a_window_of_kind_mean_does_not_matter():
    x = normal(5, 2, 64, 3, 8, dtype=torch.float64)
    permuted = x.clone()
    for window in range(4):
        rows = torch.randperm(16, generator=torch.Generator().manual_seed(window)) + 16 * window
        permuted[:, 16 * window : 16 * window + 16] = x[:, rows]
    a, b = (nsa.compress(t, kind="mean", compress_block=16, compress_stride=16)[0] for t in (x, permuted))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert a.shape == (2, 4, 3, 8) and not torch.equal(x, permuted)


# ---- the compressed branch and the selection ---------------------------------------------------------------


def compressed_tensors(shape: Shape, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    return {
        "query": normal(11, *shape.rows, shape.heads, shape.head_dim, dtype=dtype, scale=scale),
        "compressed_key": normal(
            12, *shape.compressed_rows, shape.kv_heads, shape.head_dim, dtype=dtype, scale=scale
        ),
        "compressed_value": normal(13, *shape.compressed_rows, shape.kv_heads, shape.head_dim_v, dtype=dtype),
    }


def compressed_parts(shape: Shape, t: dict[str, Tensor], order: oracle.Order = oracle.IN_ORDER):
    """out, lse and probabilities of every sequence."""
    for q, k, v in zip(
        oracle.split(t["query"], shape.split),
        oracle.split(t["compressed_key"], shape.compressed_split),
        oracle.split(t["compressed_value"], shape.compressed_split),
        strict=True,
    ):
        mask = oracle.compressed_mask(q.shape[0], q.shape[0], shape.compress_block, shape.compress_stride)
        yield oracle.attend(q, k, v, mask, shape.scale, order)


def assert_selection(
    shape: Shape, tensors: dict[str, Tensor], blocks: Tensor, dtype: torch.dtype, share: float = 0.01
) -> None:
    """share: of the rows that may differ, by rounding."""
    wide = {n: t.double() for n, t in tensors.items()}
    parts = oracle.split(blocks, shape.split, dim=1)
    different = rows = 0
    for ours, (out, _, probabilities) in zip(parts, compressed_parts(shape, wide), strict=True):
        tokens = out.shape[0]
        scores = oracle.block_scores(
            probabilities,
            tokens,
            shape.kv_heads,
            shape.compress_block,
            shape.compress_stride,
            shape.block_size,
        )
        truth = oracle.select(
            scores, tokens, shape.block_size, shape.top_k, shape.init_blocks, shape.local_blocks
        )
        # Otherwise probabilities are float32: with their rounding, and 0 below the least of them.
        tolerance = (1e-10, 0.0) if dtype == torch.float64 else (1e-4, 1e-37)
        different += oracle.assert_same_selection(ours, scores, truth, *tolerance)
        rows += ours.shape[0] * ours.shape[1]
    assert different <= share * rows, f"{different} of {rows} rows differ by rounding"


@dtypes()
@shapes()
def test_compressed_attention(shape: Shape, dtype: torch.dtype):
    tensors = compressed_tensors(shape, dtype)
    grad = normal(14, *shape.rows, shape.heads, shape.head_dim_v, dtype=dtype)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    out, lse, blocks = nsa.compressed_attention(**leaves, **shape.selection, **shape.lengths_arguments)
    assert not lse.requires_grad and not blocks.requires_grad
    ours = {"out": out.detach(), **oracle.gradients(out, grad, leaves)}

    def function(t: dict[str, Tensor], order: oracle.Order) -> Tensor:
        return oracle.join([part[0] for part in compressed_parts(shape, t, order)], shape.split)

    oracle.assert_within_twice(function, tensors, grad, ours, dtype)
    wide = {n: t.double() for n, t in tensors.items()}
    truth = oracle.join([part[1] for part in compressed_parts(shape, wide)], shape.split, dim=1)
    checks.assert_lse(lse, truth, dtype)
    assert_selection(shape, tensors, blocks, dtype)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_selection_of_flat_and_of_sharp_scores(scale: float):
    """Logits of thousands: exponentials of what is left after the lse, no overflow, no NaN."""
    shape = dataclasses.replace(SHAPES["packed"], lengths=(300,), top_k=5)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = compressed_tensors(shape, dtype, scale)
        out, lse, blocks = nsa.compressed_attention(**tensors, **shape.selection, **shape.lengths_arguments)
        assert out.isfinite().all() and not lse.isnan().any()
        assert_selection(shape, tensors, blocks, dtype, share=1.0)


def test_lowest_block_wins_among_equals():
    """With a query of zeros every window has the same probability, and so have all inner blocks."""
    query = torch.zeros(1, 200, 2, 8)
    key, value = normal(21, 1, 49, 1, 8), normal(22, 1, 49, 1, 8)
    shape = Shape(lengths=(200,), batch=1, heads=2, kv_heads=1, head_dim=8, head_dim_v=8, top_k=5)
    _, _, blocks = nsa.compressed_attention(query, key, value, **shape.selection)
    assert blocks[0, 0, 199].tolist() == [0, 1, 2, 11, 12]
    assert blocks[0, 0, 100].tolist() == [0, 1, 2, 5, 6]
    assert blocks[0, 0, 70].tolist() == [0, 1, 2, 3, 4]
    assert blocks[0, 0, 33].tolist() == [0, 1, 2, -1, -1]
    assert blocks[0, 0, 0].tolist() == [0, -1, -1, -1, -1]


# ---- the selected branch -----------------------------------------------------------------------------------


def selected_tensors(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "query": normal(31, *shape.rows, shape.heads, shape.head_dim, dtype=dtype),
        "key": normal(32, *shape.rows, shape.kv_heads, shape.head_dim, dtype=dtype),
        "value": normal(33, *shape.rows, shape.kv_heads, shape.head_dim_v, dtype=dtype),
    }


def random_blocks(shape: Shape, seed: int, wild: bool = False) -> Tensor:
    """wild: in any order, with holes, repetitions, blocks of the future, and rows without any."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for tokens in shape.all_lengths:
        count = -(-tokens // shape.block_size)
        rows = torch.full((shape.kv_heads, tokens, shape.top_k), -1, dtype=torch.int32)
        for h, i in itertools.product(range(shape.kv_heads), range(tokens)):
            if wild:
                rows[h, i] = torch.randint(-1, count, (shape.top_k,), generator=generator)
                if i % 7 == 3:
                    rows[h, i] = -1
            else:
                own = i // shape.block_size
                some = torch.randperm(own + 1, generator=generator)[: shape.top_k].sort().values
                rows[h, i, : len(some)] = some.int()
        parts.append(rows)
    return oracle.join(parts, shape.split, dim=1)


def selected_function(shape: Shape, blocks: Tensor):
    masks = [
        oracle.selected_mask(b, b.shape[1], shape.block_size)
        for b in oracle.split(blocks, shape.split, dim=1)
    ]

    def function(t: dict[str, Tensor], order: oracle.Order) -> Tensor:
        sequences = zip(
            *(oracle.split(t[n], shape.split) for n in ("query", "key", "value")), masks, strict=True
        )
        return oracle.join([oracle.attend(*s, shape.scale, order)[0] for s in sequences], shape.split)

    return function, masks


def run_selected(
    shape: Shape, tensors: dict[str, Tensor], blocks: Tensor, grad: Tensor | None, **arguments: Any
) -> tuple[dict[str, Tensor], Tensor]:
    leaves = {n: t.clone().requires_grad_(grad is not None) for n, t in tensors.items()}
    out, lse = nsa.selected_attention(
        **leaves,
        selected_blocks=blocks,
        block_size=shape.block_size,
        softmax_scale=shape.scale,
        cu_seqlens=shape.cu_seqlens,
        return_lse=True,
        **arguments,
    )
    grads = {} if grad is None else oracle.gradients(out, grad, leaves)
    return {"out": out.detach(), **grads}, lse


def verify_selected(shape: Shape, dtype: torch.dtype, wild: bool, algorithm: str) -> None:
    tensors = selected_tensors(shape, dtype)
    blocks = random_blocks(shape, 34, wild)
    grad = normal(35, *shape.rows, shape.heads, shape.head_dim_v, dtype=dtype)
    ours, lse = run_selected(shape, tensors, blocks, grad, algorithm=algorithm)
    assert not lse.requires_grad
    function, masks = selected_function(shape, blocks)
    oracle.assert_within_twice(function, tensors, grad, ours, dtype)
    wide = {n: t.double() for n, t in tensors.items()}
    sequences = zip(
        *(oracle.split(wide[n], shape.split) for n in ("query", "key", "value")), masks, strict=True
    )
    truth = oracle.join([oracle.attend(*s, shape.scale)[1] for s in sequences], shape.split, dim=1)
    checks.assert_lse(lse, truth, dtype)
    if wild:
        empty = lse == -math.inf  # [.., heads, rows]
        assert empty.any() and not ours["out"].transpose(-2, -3)[empty].any()
        assert not ours["query"].transpose(-2, -3)[empty].any()


ALGORITHMS = ("kv_outer", "query_outer")


@dtypes()
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("wild", [False, True], ids=["rows", "sets"])
@shapes("packed", "batched", "group_1")
def test_selected_attention(shape: Shape, wild: bool, algorithm: str, dtype: torch.dtype):
    verify_selected(shape, dtype, wild, algorithm)


@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("group", [2, 3, 4, 5, 7, 8, 16, 64])
def test_selected_attention_of_every_group(group: int, algorithm: str, dtype: torch.dtype):
    shape = Shape(lengths=(50, 37), heads=group, kv_heads=1, head_dim=16, head_dim_v=16, top_k=3)
    verify_selected(shape, dtype, False, algorithm)


@dtypes(torch.float32, torch.float16)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "block_size,dim,dim_v", [(64, 64, 64), (128, 100, 36), (256, 1, 7), (16, 256, 256), (48, 192, 128)]
)
def test_selected_attention_of_every_size(
    block_size: int, dim: int, dim_v: int, algorithm: str, dtype: torch.dtype
):
    shape = Shape(
        lengths=(3 * block_size + 5,),
        batch=1,
        heads=4,
        kv_heads=2,
        head_dim=dim,
        head_dim_v=dim_v,
        block_size=block_size,
        top_k=3,
    )
    if block_size == 256:
        shape = dataclasses.replace(shape, lengths=(300,))
    verify_selected(shape, dtype, True, algorithm)


@dtypes(torch.float32, torch.bfloat16)
def test_algorithms_agree(dtype: torch.dtype):
    shape = dataclasses.replace(SHAPES["packed"], lengths=(260, 130), heads=8, head_dim=32, head_dim_v=32)
    tensors, blocks = selected_tensors(shape, dtype), random_blocks(shape, 36, wild=True)
    grad = normal(37, *shape.rows, shape.heads, shape.head_dim_v, dtype=dtype)
    (a, lse_a), (b, lse_b) = (run_selected(shape, tensors, blocks, grad, algorithm=n) for n in ALGORITHMS)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse_b, lse_a, rtol=1e-5, atol=1e-5)


def test_heads_beyond_what_packed_memory_holds():
    """64 MB hold the packed blocks of 8 such key heads, in the backward of 5: the heads beyond them have a turn of
    their own. Each must get what it gets alone; its dK and dV are then summed in more parts."""
    heads, tokens, width = 9, 2048, 256
    generator = torch.Generator().manual_seed(3)

    def random() -> Tensor:
        return torch.randn(2, tokens, heads, width, generator=generator).bfloat16()

    states, grad = [random() for _ in range(3)], random()
    blocks = torch.randint(0, tokens // 16, (2, heads, tokens, 2), generator=generator, dtype=torch.int32)

    def results(first: int, last: int) -> tuple[Tensor, ...]:
        part = [t[:, :, first:last].detach().requires_grad_() for t in states]
        out = nsa.selected_attention(*part, blocks[:, first:last], block_size=16, algorithm="kv_outer")
        return out.detach(), *torch.autograd.grad(out, part, grad[:, :, first:last])

    whole = results(0, heads)
    for head in (0, 4, 5, 7, 8):
        out, *grads = (t[:, :, head : head + 1] for t in whole)
        alone_out, *alone_grads = results(head, head + 1)
        assert torch.equal(out, alone_out)
        assert torch.equal(grads[0], alone_grads[0])
        for a, b in zip(grads[1:], alone_grads[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@dtypes(torch.float32, torch.float64)
def test_all_blocks_are_dense_attention(dtype: torch.dtype):
    shape = dataclasses.replace(SHAPES["packed"], top_k=9)
    tensors = selected_tensors(shape, dtype)
    compressed = {
        "compressed_key": normal(38, *shape.compressed_rows, 2, 16, dtype=dtype),
        "compressed_value": normal(39, *shape.compressed_rows, 2, 16, dtype=dtype),
    }
    _, _, blocks = nsa.compressed_attention(
        tensors["query"], **compressed, **shape.selection, **shape.lengths_arguments
    )
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    dense, dense_lse = fsa.attention(
        **leaves, causal=True, cu_seqlens_q=shape.cu_seqlens, cu_seqlens_k=shape.cu_seqlens, return_lse=True
    )
    grad = normal(40, *dense.shape, dtype=dtype)
    expected = {"out": dense.detach(), **oracle.gradients(dense, grad, leaves)}
    ours, lse = run_selected(shape, tensors, blocks, grad)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, dense_lse.detach(), rtol=tolerance, atol=tolerance)


def test_large_logits():
    """Rows whose blocks differ by thousands: each partial has its own maximum."""
    shape = Shape(lengths=(200,), batch=1, heads=4, kv_heads=2)
    for dtype in (torch.float32, torch.float16):
        tensors = {n: (t.float() * 40).to(dtype) for n, t in selected_tensors(shape, dtype).items()}
        tensors["value"] = tensors["value"] / 40
        blocks = random_blocks(shape, 41)
        function, _ = selected_function(shape, blocks)
        for algorithm in ALGORITHMS:
            ours, lse = run_selected(shape, tensors, blocks, None, algorithm=algorithm)
            assert lse.isfinite().all()
            oracle.assert_within_twice(function, tensors, None, ours, dtype)


# ---- combination -------------------------------------------------------------------------------------------


@dtypes()
@pytest.mark.parametrize("per_head", [False, True], ids=["per_token", "per_head"])
@pytest.mark.parametrize("rows", [(37,), (2, 19), (0,)], ids=str)
def test_combine(rows: tuple[int, ...], per_head: bool, dtype: torch.dtype):
    names = ("compressed", "selected", "sliding")
    tensors = {n: normal(51 + i, *rows, 3, 20, dtype=dtype) for i, n in enumerate(names)}
    tensors["gates"] = normal(54, *rows, *((3,) if per_head else ()), 3, dtype=dtype).sigmoid()
    grad = normal(55, *rows, 3, 20, dtype=dtype)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    out = nsa.combine(**leaves)
    ours = {"out": out.detach(), **oracle.gradients(out, grad, leaves)}

    def function(t: dict[str, Tensor], order: oracle.Order) -> Tensor:
        some = order(20)
        total = oracle.combine(**{n: x if n == "gates" else x[..., some] for n, x in t.items()}, order=order)
        back = torch.empty_like(some)
        back[some] = torch.arange(20)
        return total[..., back]

    oracle.assert_within_twice(function, tensors, grad, ours, dtype)


def test_combine_with_float32_gates():
    branches = [normal(61 + i, 30, 2, 16, dtype=torch.bfloat16) for i in range(3)]
    gates = normal(64, 30, 3).sigmoid().requires_grad_()
    out = nsa.combine(*branches, gates)
    assert out.dtype == torch.bfloat16
    exact = oracle.combine(*(b.double() for b in branches), gates.detach().double())
    assert (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    (grad,) = torch.autograd.grad(out.float().sum(), gates)
    expected = torch.stack([b.double().sum((-1, -2)) for b in branches], -1)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


# ---- the whole ---------------------------------------------------------------------------------------------


def whole_tensors(shape: Shape, dtype: torch.dtype, per_head: bool, own_sliding: bool) -> dict[str, Tensor]:
    tensors = {
        **selected_tensors(shape, dtype),
        "compressed_key": normal(71, *shape.compressed_rows, shape.kv_heads, shape.head_dim, dtype=dtype),
        "compressed_value": normal(72, *shape.compressed_rows, shape.kv_heads, shape.head_dim_v, dtype=dtype),
        "gates": normal(73, *shape.rows, *((shape.heads,) if per_head else ()), 3, dtype=dtype).sigmoid(),
    }
    if own_sliding:
        tensors["sliding_key"] = normal(74, *shape.rows, shape.kv_heads, shape.head_dim, dtype=dtype)
        tensors["sliding_value"] = normal(75, *shape.rows, shape.kv_heads, shape.head_dim_v, dtype=dtype)
    return tensors


def whole_function(shape: Shape, blocks: Tensor, window_left: int):
    selected, masks = selected_function(shape, blocks)

    def function(t: dict[str, Tensor], order: oracle.Order) -> Tensor:
        out_compressed = oracle.join([p[0] for p in compressed_parts(shape, t, order)], shape.split)
        out_selected = selected(t, order)
        sliding = []
        names = ("query", "sliding_key", "sliding_value")
        sources = [t.get(n, t[n.removeprefix("sliding_")]) for n in names]
        for q, k, v in zip(*(oracle.split(s, shape.split) for s in sources), strict=True):
            mask = oracle.sliding_mask(q.shape[0], q.shape[0], window_left)
            sliding.append(oracle.attend(q, k, v, mask, shape.scale, order)[0])
        out_sliding = oracle.join(sliding, shape.split)
        return oracle.combine(out_compressed, out_selected, out_sliding, t["gates"])

    return function


@dtypes()
@pytest.mark.parametrize("per_head,own_sliding", [(False, False), (True, True)])
@shapes("packed", "batched", "short")
def test_native_sparse_attention(shape: Shape, per_head: bool, own_sliding: bool, dtype: torch.dtype):
    tensors = whole_tensors(shape, dtype, per_head, own_sliding)
    grad = normal(76, *shape.rows, shape.heads, shape.head_dim_v, dtype=dtype)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    out, blocks = nsa.native_sparse_attention(
        **leaves, **shape.selection, **shape.lengths_arguments, window_left=12, return_selected_blocks=True
    )
    assert_selection(shape, {n: tensors[n] for n in compressed_tensors(shape, dtype)}, blocks, dtype)
    ours = {"out": out.detach(), **oracle.gradients(out, grad, leaves)}
    oracle.assert_within_twice(whole_function(shape, blocks, 12), tensors, grad, ours, dtype)


def whole(
    shape: Shape, tensors: dict[str, Tensor], grad: Tensor | None = None, **changes: Any
) -> dict[str, Tensor]:
    leaves = {n: t.clone().requires_grad_(grad is not None) for n, t in tensors.items()}
    arguments = {**shape.selection, **shape.lengths_arguments, "window_left": 12, **changes}
    out, blocks = nsa.native_sparse_attention(**leaves, **arguments, return_selected_blocks=True)
    grads = {} if grad is None else oracle.gradients(out, grad, leaves)
    return {"out": out.detach(), "blocks": blocks, **grads}


def test_packed_is_one_sequence_after_the_other():
    shape = SHAPES["packed"]
    tensors = whole_tensors(shape, torch.float32, True, False)
    grad = normal(77, *shape.rows, shape.heads, shape.head_dim_v)
    together = whole(shape, tensors, grad)
    parts: dict[str, list[Tensor]] = {n: [] for n in together}
    for i, tokens in enumerate(shape.lengths):
        one = dataclasses.replace(shape, lengths=(tokens,), batch=1)
        mine = {
            n: list(oracle.split(t, shape.compressed_split if "compressed" in n else shape.split))[
                i
            ].unsqueeze(0)
            for n, t in tensors.items()
        }
        result = whole(one, mine, grad.split(list(shape.lengths))[i].unsqueeze(0))
        for n, t in result.items():
            parts[n].append(t.squeeze(0))
    for name, value in together.items():
        alone = torch.cat(parts[name], dim=1 if name == "blocks" else 0)
        if name == "blocks":
            assert torch.equal(alone, value)
        else:
            torch.testing.assert_close(alone, value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_heads_split_in_two():
    """Tensor parallelism: each half of the key heads with its query heads gives its half of everything."""
    shape = dataclasses.replace(SHAPES["packed"], heads=8, kv_heads=4)
    tensors = whole_tensors(shape, torch.float32, True, False)
    grad = normal(78, *shape.rows, 8, 16)
    together = whole(shape, tensors, grad)
    half = dataclasses.replace(shape, heads=4, kv_heads=2)
    for rank in range(2):

        def mine(t: Tensor, name: str, rank: int = rank) -> Tensor:
            axis = 0 if name == "blocks" else 1
            return t.chunk(2, dim=axis)[rank].contiguous()

        part = whole(half, {n: mine(t, n) for n, t in tensors.items()}, mine(grad, "out"))
        for name, value in part.items():
            if name == "blocks":
                assert torch.equal(value, mine(together[name], name))
            else:
                torch.testing.assert_close(value, mine(together[name], name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["compress", "compressed", "selected", "combine", "whole"])
def test_gradcheck(case: str):
    shape = Shape(
        lengths=(6, 2, 0),
        heads=2,
        kv_heads=1,
        head_dim=2,
        head_dim_v=3,
        compress_block=4,
        compress_stride=2,
        block_size=16,
        top_k=2,
        local_blocks=1,
    )
    dtype = torch.float64
    if case == "compress":
        tensors = compress_tensors(shape, "linear", True, dtype)
        windows = {"compress_block": 4, "compress_stride": 2}

        def function(*leaves: Tensor) -> Tensor:
            return nsa.compress(
                **dict(zip(tensors, leaves, strict=True)), **windows, cu_seqlens=shape.cu_seqlens
            )[0]
    elif case == "compressed":
        tensors = compressed_tensors(shape, dtype)

        def function(*leaves: Tensor) -> Tensor:
            named = dict(zip(tensors, leaves, strict=True))
            return nsa.compressed_attention(**named, **shape.selection, **shape.lengths_arguments)[0]
    elif case == "selected":
        tensors, blocks = selected_tensors(shape, dtype), random_blocks(shape, 81, wild=True)

        def function(*leaves: Tensor) -> Tensor:
            return nsa.selected_attention(*leaves, blocks, block_size=16, cu_seqlens=shape.cu_seqlens)
    elif case == "combine":
        tensors = {str(i): normal(82 + i, 3, 2, 2, dtype=dtype) for i in range(3)}
        tensors["gates"] = normal(85, 3, 2, 3, dtype=dtype)
        function = nsa.combine
    else:
        tensors = whole_tensors(shape, dtype, False, True)

        def function(*leaves: Tensor) -> Tensor:
            named = dict(zip(tensors, leaves, strict=True))
            return nsa.native_sparse_attention(
                **named, **shape.selection, **shape.lengths_arguments, window_left=3
            )

    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(dtype: torch.dtype):
    shape = dataclasses.replace(SHAPES["packed"], lengths=(150, 0, 65))
    tensors = whole_tensors(shape, dtype, False, False)
    tensors |= {"x": tensors["key"]}
    weight = normal(91, 2, 8 * 16, 16, dtype=dtype, scale=0.1)
    grad = normal(92, *shape.rows, 4, 16, dtype=dtype)
    del tensors["compressed_key"], tensors["x"]
    cu = {"cu_seqlens": shape.cu_seqlens}

    def run(algorithm: str) -> list[Tensor]:
        leaves = {n: t.clone().requires_grad_() for n, t in {**tensors, "weight": weight}.items()}
        windows = {"compress_block": 8, "compress_stride": 4}
        compressed_key, cu_compressed = nsa.compress(leaves["key"], leaves["weight"], **windows, **cu)
        named = {n: t for n, t in leaves.items() if n != "weight"}
        out, blocks = nsa.native_sparse_attention(
            **{**named, "compressed_key": compressed_key},
            **shape.selection,
            **cu,
            cu_seqlens_compressed=cu_compressed,
            window_left=12,
            algorithm=algorithm,
            return_selected_blocks=True,
        )
        return [out.detach(), blocks, *oracle.gradients(out, grad, leaves).values()]

    threads = fsa.num_threads()
    try:
        for algorithm in ALGORITHMS:
            first = run(algorithm)
            for i in range(50):
                fsa.set_num_threads((1, 2, 3, 7)[i % 4])
                for a, b in zip(first, run(algorithm), strict=True):
                    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{algorithm}, run {i}"
    finally:
        fsa.set_num_threads(threads)


def test_double_backward_is_a_clear_error():
    x = normal(93, 1, 32, 1, 8).requires_grad_()
    y, _ = nsa.compress(x, kind="mean")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(grad.sum(), x)


def test_only_what_requires_a_gradient_gets_one():
    shape = SHAPES["batched"]
    tensors = whole_tensors(shape, torch.float32, False, False)
    everything = whole(shape, tensors, torch.ones(*shape.rows, shape.heads, shape.head_dim_v))
    for name in ("query", "key", "value", "compressed_key", "gates"):
        leaf = tensors[name].clone().requires_grad_()
        out = nsa.native_sparse_attention(**{**tensors, name: leaf}, **shape.selection, window_left=12)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        checks.assert_same_bits(f"d{name}", grad, everything[name])
    assert not nsa.native_sparse_attention(**tensors, **shape.selection).requires_grad


def test_gradients_of_any_strides():
    shape = SHAPES["batched"]
    tensors, blocks = selected_tensors(shape, torch.float32), random_blocks(shape, 94)
    grad = normal(95, *shape.rows, shape.heads, shape.head_dim_v)
    plain, _ = run_selected(shape, tensors, blocks, grad)
    turned, _ = run_selected(shape, tensors, blocks, grad.transpose(-1, -2).contiguous().transpose(-1, -2))
    for name, value in plain.items():
        checks.assert_same_bits(name, turned[name], value)
    ones = run_selected(shape, tensors, blocks, torch.ones(()).expand(grad.shape))[0]
    for name, value in run_selected(shape, tensors, blocks, torch.ones(grad.shape))[0].items():
        checks.assert_same_bits(name, ones[name], value)


def test_inputs_with_strides():
    """Heads of one projection, as views into it."""
    shape = SHAPES["batched"]
    joint = normal(96, *shape.rows, 6 + 3 + 3, 24)
    tensors = dict(zip(("query", "key", "value"), joint.split((6, 3, 3), dim=2), strict=True))
    blocks = random_blocks(shape, 97)
    views = nsa.selected_attention(**tensors, selected_blocks=blocks, block_size=16)
    copies = nsa.selected_attention(
        **{n: t.contiguous() for n, t in tensors.items()}, selected_blocks=blocks, block_size=16
    )
    checks.assert_same_bits("out", views, copies)


def test_inputs_are_not_changed():
    shape = SHAPES["packed"]
    tensors = whole_tensors(shape, torch.bfloat16, True, True)
    before = {n: checks.bits(t) for n, t in tensors.items()}
    whole(shape, tensors, normal(98, *shape.rows, 4, 16, dtype=torch.bfloat16))
    for name, tensor in tensors.items():
        assert torch.equal(checks.bits(tensor), before[name]), name
