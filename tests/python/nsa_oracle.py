# SPDX-License-Identifier: Apache-2.0
"""Native sparse attention in plain PyTorch, one sequence at a time: loops over windows, dense masks.

Written from docs/native_sparse.md and include/fsa/nsa.h, so that it shares no code with the library. In
float64 it is the truth; in the library's own dtype it is the naive computation whose error bounds the
library's error. Gradients come from autograd.

Shapes of one sequence: x [tokens, heads, dim], masks [heads, rows, keys], selected blocks
[num_kv_heads, rows, top_k].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Order:
    """In which order sums are taken, and whether attention's gradient is written by hand.

    The latter works as every flash backward does: probabilities once more from an lse in powers of two, which
    is rounded to float32, and rowsum(out * grad_out) in place of the softmax's own gradient.
    """

    def __init__(self, seed: int | None = None, by_hand: bool = False) -> None:
        self.by_hand = by_hand
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, terms: int) -> Tensor:
        """A permutation of so many terms."""
        if self._generator is None:
            return torch.arange(terms)
        return torch.randperm(terms, generator=self._generator)


IN_ORDER = Order()


def windows(tokens: int, block: int, stride: int) -> list[range]:
    """The tokens of each complete window."""
    found, start = [], 0
    while start + block <= tokens:
        found.append(range(start, start + block))
        start += stride
    return found


def compress(
    x: Tensor,
    kind: str,
    weight: Tensor | None,
    pe: Tensor | None,
    block: int,
    stride: int,
    order: Order = IN_ORDER,
) -> Tensor:
    """[windows, heads, dim]."""
    tokens, heads, dim = x.shape
    rows = []
    for window in windows(tokens, block, stride):
        z = x[list(window)]
        if pe is not None:
            z = z + pe.transpose(0, 1)
        per_head = []
        for h in range(heads):
            if kind == "linear":
                some = order(block * dim)
                per_head.append(z[:, h].reshape(-1)[some] @ weight[h][some])
            else:
                some = order(block)
                factor = weight[h] if kind == "weighted" else torch.full_like(z[:, 0, 0], 1 / block)
                per_head.append((factor[some, None] * z[some, h]).sum(0))
        rows.append(torch.stack(per_head))
    return torch.stack(rows) if rows else x[:0] * 1


def compressed_mask(rows: int, tokens: int, block: int, stride: int) -> Tensor:
    """Which windows a row sees: those that end at its token or before. The rows are the last tokens."""
    ends = [window[-1] for window in windows(tokens, block, stride)]
    mask = torch.zeros(rows, len(ends), dtype=torch.bool)
    for i in range(rows):
        for j, end in enumerate(ends):
            mask[i, j] = end <= i + tokens - rows
    return mask


def sliding_mask(rows: int, tokens: int, left: int) -> Tensor:
    position = torch.arange(rows)[:, None] + tokens - rows
    key = torch.arange(tokens)[None, :]
    mask = key <= position
    return mask if left < 0 else mask & (key >= position - left)


def selected_mask(blocks: Tensor, tokens: int, block_size: int) -> Tensor:
    """[num_kv_heads, rows, tokens]: a row is a set of blocks, and no key is in the future."""
    heads, rows, _ = blocks.shape
    mask = torch.zeros(heads, rows, tokens, dtype=torch.bool)
    for h in range(heads):
        for i in range(rows):
            for block in set(blocks[h, i].tolist()) - {-1}:
                mask[h, i, block * block_size : (block + 1) * block_size] = True
            mask[h, i, i + tokens - rows + 1 :] = False
    return mask


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, order: Order = IN_ORDER
) -> tuple[Tensor, Tensor, Tensor]:
    """out [rows, heads, dim_v], lse and probabilities; mask [rows, keys] or [num_kv_heads, rows, keys].

    A row without a key: out 0, lse -inf.
    """
    rows, heads, dim = query.shape
    keys, kv_heads, _ = key.shape
    group = heads // kv_heads
    scale = dim**-0.5 if scale is None else scale
    if keys == 0:
        zero = query.sum() * 0 + key.sum() * 0 + value.sum() * 0
        out = torch.zeros(rows, heads, value.shape[-1], dtype=query.dtype) + zero
        return out, torch.full((heads, rows), -math.inf, dtype=query.dtype), query.new_zeros(heads, rows, 0)
    dims, some = order(dim), order(keys)
    k, v = (t[some].repeat_interleave(group, dim=1) for t in (key, value))
    mask = (mask if mask.dim() == 3 else mask.expand(kv_heads, -1, -1))[:, :, some]
    mask = mask.repeat_interleave(group, dim=0)
    if order.by_hand:
        out = _ByHand.apply(query[..., dims], k[..., dims], v, mask, scale)
        return out, query.new_zeros(0), query.new_zeros(0)
    scores = torch.einsum("qhd,khd->hqk", query[..., dims], k[..., dims] * scale)
    scores = scores.masked_fill(~mask, -math.inf)
    empty = ~mask.any(-1, keepdim=True)
    probabilities = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    out = torch.einsum("hqk,khd->qhd", probabilities, v)
    lse = torch.where(empty, -math.inf, scores.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)).squeeze(
        -1
    )
    back = torch.empty_like(some)
    back[some] = torch.arange(keys)
    return out, lse, probabilities[..., back]


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", query, key).float() * (scale * math.log2(math.e))
        scores = scores.masked_fill(~mask, -math.inf)
        largest = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        lse = largest + torch.exp2(scores - largest).sum(-1, keepdim=True).log2()
        probabilities = torch.exp2(scores - lse.clamp(min=-1e30)).to(query.dtype)
        out = torch.einsum("hqk,khd->qhd", probabilities, value)
        ctx.save_for_backward(query, key, value, probabilities, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities, out = ctx.saved_tensors
        products = torch.einsum("qhd,khd->hqk", grad_out, value) - (out * grad_out).sum(-1).T[..., None]
        grad_scores = probabilities * products * ctx.scale
        return (
            torch.einsum("hqk,khd->qhd", grad_scores, key),
            torch.einsum("hqk,qhd->khd", grad_scores, query),
            torch.einsum("hqk,qhd->khd", probabilities, grad_out),
            None,
            None,
        )


def block_scores(
    probabilities: Tensor, tokens: int, kv_heads: int, block: int, stride: int, block_size: int
) -> Tensor:
    """[num_kv_heads, rows, blocks]: each window's probability, summed over the group, for every stride of the
    window that lies in the block."""
    heads, rows, _ = probabilities.shape
    group = heads // kv_heads
    blocks = -(-tokens // block_size)
    summed = probabilities.reshape(kv_heads, group, rows, probabilities.shape[-1]).sum(1)
    scores = torch.zeros(kv_heads, rows, blocks, dtype=probabilities.dtype)
    for i, window in enumerate(windows(tokens, block, stride)):
        for start in range(window[0], window[0] + block, stride):
            scores[..., start // block_size] += summed[..., i]
    return scores


def select(scores: Tensor, tokens: int, block_size: int, top_k: int, init: int, local: int) -> Tensor:
    """int32 [num_kv_heads, rows, top_k]: forced ones, then the best, the lowest of equals; ascending, then
    -1."""
    heads, rows, _ = scores.shape
    selected = torch.full((heads, rows, top_k), -1, dtype=torch.int32)
    for h in range(heads):
        for i in range(rows):
            own = (i + tokens - rows) // block_size
            forced = [j for j in range(own + 1) if j < init or j > own - local]
            others = [j for j in range(own + 1) if j not in forced]
            others.sort(key=lambda j: (-float(scores[h, i, j]), j))
            chosen = sorted((forced + others)[: min(top_k, own + 1)])
            selected[h, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return selected


def assert_same_selection(ours: Tensor, scores: Tensor, truth: Tensor, rtol: float, atol: float = 0.0) -> int:
    """Equal but where blocks were exchanged whose scores lie within the tolerance. Returns the number of such
    rows."""
    assert ours.dtype == torch.int32 and ours.shape == truth.shape, f"{ours.dtype} {tuple(ours.shape)}"
    different = (ours != truth).any(-1).nonzero().tolist()
    for h, i in different:
        a, b = set(ours[h, i].tolist()), set(truth[h, i].tolist())
        assert len(a - {-1}) == len(b - {-1}), f"head {h} row {i}: {sorted(a)}, not {sorted(b)}"
        assert ours[h, i].tolist()[: len(a - {-1})] == sorted(a - {-1}), f"head {h} row {i}: not ascending"
        exchanged = [float(scores[h, i, j]) for j in a ^ b]
        spread = max(exchanged) - min(exchanged)
        assert spread <= rtol * max(exchanged) + atol, (
            f"head {h} row {i}: {sorted(a)}, not {sorted(b)}; scores differ by {spread:.3g} "
            f"of {max(exchanged):.3g}"
        )
    return len(different)


def combine(
    compressed: Tensor, selected: Tensor, sliding: Tensor, gates: Tensor, order: Order = IN_ORDER
) -> Tensor:
    """Gates [rows, 3] or [rows, heads, 3]."""
    per_head = (
        gates if gates.dim() == compressed.dim() else gates[..., None, :].expand(*compressed.shape[:-1], 3)
    )
    branches = (compressed, selected, sliding)
    total = torch.zeros_like(compressed)
    for branch in order(3).tolist():
        total = total + per_head[..., branch, None] * branches[branch]
    return total


def rope(x: Tensor, positions: list[int], frequencies: list[float]) -> Tensor:
    """Pairs (i, i + dim / 2) of each head turned by position * frequency_i."""
    turned = x.clone()
    half = x.shape[-1] // 2
    for row, position in enumerate(positions):
        for i, frequency in enumerate(frequencies):
            c, s = math.cos(position * frequency), math.sin(position * frequency)
            a, b = x[row, :, i], x[row, :, i + half]
            turned[row, :, i], turned[row, :, i + half] = a * c - b * s, a * s + b * c
    return turned


def split(tensor: Tensor, lengths: list[int] | None, dim: int = 0) -> Iterator[Tensor]:
    """The sequences of a packed tensor, or of a batched one."""
    yield from tensor.unbind(0) if lengths is None else tensor.split(lengths, dim)


def join(parts: list[Tensor], lengths: list[int] | None, dim: int = 0) -> Tensor:
    return torch.stack(parts) if lengths is None else torch.cat(parts, dim)


def gradients(outputs: Tensor, grad_out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    values = torch.autograd.grad(
        outputs, list(leaves.values()), grad_out.to(outputs.dtype), allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if value is None else value
        for (name, leaf), value in zip(leaves.items(), values, strict=True)
    }


def results(
    function: Callable[[dict[str, Tensor], Order], Tensor],
    tensors: dict[str, Tensor],
    grad_out: Tensor | None,
    dtype: torch.dtype,
    order: Order = IN_ORDER,
) -> dict[str, Tensor]:
    """out and, with grad_out, every gradient, of function(tensors, order) computed in dtype."""
    leaves = {n: t.detach().to(dtype).requires_grad_(grad_out is not None) for n, t in tensors.items()}
    out = function(leaves, order)
    grads = gradients(out, grad_out, leaves) if grad_out is not None else {}
    return {"out": out.detach(), **grads}


def _noise_of_nothing(tensors: dict[str, Tensor], grad_out: Tensor) -> float:
    """Rows that see one key have gradients of exactly 0, the difference of two equal dot products: what
    float32 leaves of it."""
    largest = max(float(t.abs().max()) for t in tensors.values() if t.numel())
    return torch.finfo(torch.float32).eps * grad_out.shape[-1] * float(grad_out.abs().max()) * largest**2


DRAWS = 8


def assert_within_twice(
    function: Callable[[dict[str, Tensor], Order], Tensor],
    tensors: dict[str, Tensor],
    grad_out: Tensor | None,
    ours: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """The error of each result is at most twice that of a naive computation in dtype, plus the rounding noise
    of an addition; in float64 at most 1e-10. The error of a sum of a few terms may be 0 by luck, so where the
    first naive computations do not vouch for a result, more are drawn, which sum in random orders."""
    truth = results(function, tensors, grad_out, torch.float64)
    assert set(ours) == set(truth), f"{set(ours)}, not {set(truth)}"
    naive = []
    for name, expected in truth.items():
        got = ours[name]
        assert got.dtype == dtype, f"{name}: dtype {got.dtype}"
        assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        assert got.isfinite().all(), f"{name}: not finite"
        if not got.numel():
            continue
        error = float((got.double() - expected).abs().max())
        if dtype == torch.float64:
            allowed = 1e-10 * max(1.0, float(expected.abs().max()))
        else:
            rounded = expected.to(dtype)
            noise = 2 * float(((rounded + 0.3 - 0.3) - rounded).abs().max())
            if name != "out" and float(expected.abs().max()) < 1e-12:
                noise = _noise_of_nothing(tensors, grad_out)
            largest = allowed = 0.0
            for draw in range(DRAWS):
                if draw == len(naive):
                    order = Order(seed=draw if draw > 1 else None, by_hand=draw % 2 == 1)
                    naive.append(results(function, tensors, grad_out, dtype, order))
                largest = max(largest, float((naive[draw][name].double() - expected).abs().max()))
                allowed = 2 * largest + noise
                if draw and error <= allowed:
                    break
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g} allowed"
