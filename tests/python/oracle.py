# SPDX-License-Identifier: Apache-2.0
"""Attention in plain PyTorch, in any precision: dense masked softmax over whole score matrices.

Written from docs/semantics.md and nothing else, so that it shares no mistake with the library. In float64 it is
the truth that results are compared with; in the library's own dtype it is the "naive computation" whose error
bounds the library's error. Sparse results are masked by the library's own skip map, and decisions.py replays
every decision in that map tile by tile.

Shapes inside: one sequence, all heads: query [seqlen_q, num_heads, head_dim], scores
[num_heads, seqlen_q, seqlen_k].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import TILE_ROWS, Problem, tile_keys
from torch import Tensor

LOG2_E = math.log2(math.e)
GRADIENTS = ("query", "key", "value", "alpha", "delta", "sink")
# Elements of a score matrix computed at once: more heads than that go one after the other.
SCORES_AT_ONCE = 1 << 23


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Where one sequence lies in the tensors, and its used lengths."""

    index: int
    q_begin: int
    k_begin: int
    seqlen_q: int
    seqlen_k: int
    row_tile_begin: int  # first row tile in a packed skip map
    keys: int  # columns of the score matrix: seqlen_k, or the number of gathered indices

    @property
    def offset(self) -> int:
        return self.seqlen_k - self.seqlen_q


def sequences(problem: Problem) -> Iterator[Sequence]:
    """The sequences of a problem, lengths reduced by seqused_*."""
    t = problem.tensors
    cu_q, cu_k = t.get("cu_seqlens_q"), t.get("cu_seqlens_k")
    if cu_q is not None:
        batch = cu_q.numel() - 1
    else:
        batch = t["query"].shape[0]
    for b in range(batch):
        q_begin = int(cu_q[b]) if cu_q is not None else 0
        k_begin = int(cu_k[b]) if cu_k is not None else 0
        if problem.decode:
            seqlen_q = 1
        elif "seqused_q" in t:
            seqlen_q = int(t["seqused_q"][b])
        else:
            seqlen_q = int(cu_q[b + 1]) - q_begin if cu_q is not None else t["query"].shape[1]
        if "seqused_k" in t:
            seqlen_k = int(t["seqused_k"][b])
        else:
            seqlen_k = int(cu_k[b + 1]) - k_begin if cu_k is not None else t["key"].shape[1]
        keys = t["gather_kv_indices"].shape[1] if "gather_kv_indices" in t else seqlen_k
        yield Sequence(b, q_begin, k_begin, seqlen_q, seqlen_k, q_begin // TILE_ROWS + b, keys)


def positions(problem: Problem, s: Sequence) -> Tensor:
    """Original position of each column of the score matrix; -1 = no key. int64 [keys]."""
    if "gather_kv_indices" in problem.tensors:
        return problem.tensors["gather_kv_indices"][s.index].long()
    return torch.arange(s.seqlen_k)


def rows_of_query(problem: Problem, tensor: Tensor, s: Sequence) -> Tensor:
    if problem.decode:
        return tensor[s.index].unsqueeze(0)
    if "cu_seqlens_q" in problem.tensors:
        return tensor[s.q_begin : s.q_begin + s.seqlen_q]
    return tensor[s.index, : s.seqlen_q]


def rows_of_key(problem: Problem, tensor: Tensor, s: Sequence) -> Tensor:
    t = problem.tensors
    if "page_table" in t:
        page_size = t["key"].shape[1]
        pages = t["page_table"][s.index, : -(-s.seqlen_k // page_size)].long()
        return tensor[pages].flatten(0, 1)[: s.seqlen_k]
    held = (
        tensor[s.k_begin : s.k_begin + s.seqlen_k] if "cu_seqlens_k" in t else tensor[s.index, : s.seqlen_k]
    )
    if "gather_kv_indices" in t:
        indices = positions(problem, s)
        if s.seqlen_k == 0:
            return held.new_zeros(s.keys, *held.shape[1:])
        gathered = held[indices.clamp(min=0)]
        return torch.where((indices >= 0).view(-1, *[1] * (held.dim() - 1)), gathered, gathered.new_zeros(()))
    return held


def sequence_first(problem: Problem, name: str, tensor: Tensor) -> Tensor:
    """alpha and delta with heads last, whatever the layout."""
    bhs = problem.options.get("gate_layout", "bsh") == "bhs"
    if bhs and not (name == "alpha" and problem.decode):
        return tensor.transpose(-1, -2)
    return tensor


def in_blocks(mask: Any, s: Sequence, head: int) -> Tensor:
    """What the lists and bits of a block mask show of one sequence and head. bool [seqlen_q, seqlen_k]."""
    rows, keys = mask.BLOCK_SIZE

    def of(tensor: Tensor) -> Tensor:
        return tensor[min(s.index, tensor.shape[0] - 1), min(head, tensor.shape[1] - 1)]

    lists = mask.full_kv_num_blocks if mask.kv_num_blocks is None else mask.kv_num_blocks
    row_blocks, key_blocks = lists.shape[2], math.ceil(s.seqlen_k / keys)
    seen = torch.zeros(
        row_blocks, key_blocks + 1, rows, keys, dtype=torch.bool
    )  # the last: beyond the length
    shifts = torch.arange(32, dtype=torch.int32)
    for r in range(row_blocks):
        if mask.full_kv_num_blocks is not None:
            for block in of(mask.full_kv_indices)[r, : int(of(mask.full_kv_num_blocks)[r])].tolist():
                seen[r, min(block, key_blocks)] = True
        if mask.kv_num_blocks is not None:
            for i, block in enumerate(of(mask.kv_indices)[r, : int(of(mask.kv_num_blocks)[r])].tolist()):
                words = mask.partial_bits[int(of(mask.partial_begin)[r]) + i]
                seen[r, min(block, key_blocks)] = ((words[..., None] >> shifts) & 1).bool().flatten(-2)
    whole = seen[:, :key_blocks].transpose(1, 2).reshape(row_blocks * rows, key_blocks * keys)
    return whole[: s.seqlen_q, : s.seqlen_k]


def visible(problem: Problem, s: Sequence, head: int) -> Tensor:
    """Which keys the rows of a head see, thresholds aside. bool [seqlen_q, keys]."""
    t, options = problem.tensors, problem.options
    key = positions(problem, s)[None, :]
    distance = torch.arange(s.seqlen_q)[:, None] + s.offset - key
    mask = ((key >= 0) & (key < s.seqlen_k)).expand(s.seqlen_q, -1)
    if options.get("block_mask") is not None:
        mask = mask & in_blocks(options["block_mask"], s, head)
    if "window_sizes" in t:
        group = t["query"].shape[-2] // t["key"].shape[-2]
        sink, left, right, near = (int(x) for x in t["window_sizes"][head // group])
        band = (
            (distance < near) | ((distance >= near + right) & (distance < near + right + left)) | (key < sink)
        )
        return mask & (distance >= 0) & band
    if options.get("causal", False):
        mask = mask & (distance >= 0)
    left, right = options.get("window_size", (-1, -1))
    if left not in (None, -1):
        mask = mask & (distance <= left)
    if right not in (None, -1):
        mask = mask & (distance >= -right)
    return mask


def softmax_scale(problem: Problem) -> float:
    scale = problem.options.get("softmax_scale")
    return problem.tensors["query"].shape[-1] ** -0.5 if scale is None else scale


def gate(problem: Problem, product: Tensor) -> Tensor:
    """g(alpha * delta)."""
    if problem.options.get("log_sigmoid_gate", True):
        return product.clamp(max=0) - torch.log1p(torch.exp(-product.abs()))
    return product


def scores(
    problem: Problem,
    s: Sequence,
    leaves: dict[str, Tensor],
    heads: range,
    reorder: bool = False,
    unit: float = 1.0,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """Logits before the masks times `unit`, [len(heads), seqlen_q, keys], differentiable in `leaves`.

    reorder multiplies the keys by the scale instead of the products.
    """
    group = leaves["query"].shape[-2] // leaves["key"].shape[-2]
    kv = [h // group for h in heads]
    softcap = problem.options.get("softcap", 0.0)
    scale = softmax_scale(problem) * (1.0 if softcap else unit)
    query = rows_of_query(problem, leaves["query"], s)[:, heads.start : heads.stop].transpose(0, 1)
    key = rows_of_key(problem, leaves["key"], s)[:, kv].transpose(0, 1)
    added = None
    if "alpha" in leaves:
        alpha = rows_of_query(problem, sequence_first(problem, "alpha", leaves["alpha"]), s)
        delta = rows_of_key(problem, sequence_first(problem, "delta", leaves["delta"]), s)
        alpha, delta = alpha[:, heads.start : heads.stop].T, delta[:, kv].T
        added = gate(problem, alpha[:, :, None] * delta[:, None, :])
    if reorder:
        logits = product(query, (key * scale).transpose(1, 2))
        logits = logits if added is None else logits + added * scale
    else:
        logits = product(query, key.transpose(1, 2))
        logits = (logits if added is None else logits + added) * scale
    if softcap:
        logits = (softcap * unit) * torch.tanh(logits / softcap)
    if "alibi_slopes" in problem.tensors:
        slopes = problem.tensors["alibi_slopes"]
        slopes = (slopes if slopes.dim() == 1 else slopes[s.index])[heads.start : heads.stop]
        rows = torch.arange(s.seqlen_q)[:, None] + s.offset
        distance = (rows - positions(problem, s)[None, :]).abs().to(logits.dtype)
        logits = logits - (slopes * unit).to(logits.dtype)[:, None, None] * distance
    return logits


def _probabilities(logits: Tensor, mask: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Masked softmax with an optional extra denominator term: P, its share of the sink, lse."""
    logits = logits.masked_fill(~mask, -math.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.view(-1, 1, 1).expand(-1, logits.shape[1], 1)], dim=2)
    if logits.shape[2] == 0:
        return logits, logits.new_zeros(*logits.shape[:2]), logits.new_full(logits.shape[:2], -math.inf)
    empty = (logits == -math.inf).all(dim=2, keepdim=True)
    safe = logits.masked_fill(empty, 0.0)  # keeps NaN out of the gradients of rows without a key
    lse = torch.logsumexp(safe, dim=2).masked_fill(empty[..., 0], -math.inf)
    p = torch.softmax(safe, dim=2).masked_fill(empty, 0.0)
    if sink is not None:
        return p[:, :, :-1], p[:, :, -1], lse
    return p, lse.new_zeros(lse.shape), lse


@dataclasses.dataclass
class Result:
    """out and lse shaped as the library's, and gradients by name."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def _result(problem: Problem, dtype: torch.dtype) -> Result:
    query, value = problem.tensors["query"], problem.tensors["value"]
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=dtype)
    lse_shape = query.shape[:-1] if problem.decode else (*query.shape[:-3], query.shape[-2], query.shape[-3])
    return Result(out, torch.full(lse_shape, -math.inf, dtype=dtype))


def _lse_rows(problem: Problem, lse: Tensor, s: Sequence, heads: range) -> Tensor:
    """The part of lse that belongs to a sequence and heads: [len(heads), seqlen_q]."""
    if problem.decode:
        return lse[s.index, heads.start : heads.stop].unsqueeze(1)
    if "cu_seqlens_q" in problem.tensors:
        return lse[heads.start : heads.stop, s.q_begin : s.q_begin + s.seqlen_q]
    return lse[s.index, heads.start : heads.stop, : s.seqlen_q]


def attend(
    problem: Problem,
    dtype: torch.dtype = torch.float64,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    kept: dict[int, Tensor] | None = None,
    reorder: bool = False,
    by_hand: bool = False,
    shuffle: int | None = None,
) -> Result:
    """Attention and its gradients.

    kept: per sequence bool [num_heads, row_tiles, key_tiles], from skip_map_bits(); None keeps every tile.
    reorder: scales the keys instead of the scores, as FlashAttention's comparator does.
    by_hand: out by a softmax in powers of two, and gradients by the formulas of docs/semantics.md with
    P = 2^(S log2 e - lse log2 e) of the rounded lse, instead of torch.softmax and autograd. float64 to the last
    digits the same; in lower precision another naive computation with errors of its own.
    shuffle: with by_hand, products are textbook loops, one term after the other in a random order of this seed,
    accumulated in at least float32.
    """
    names = [n for n in GRADIENTS if n in problem.tensors]
    wants_grads = grad_out is not None or grad_lse is not None
    leaves = {n: problem.tensors[n].detach().to(dtype) for n in names}
    if wants_grads:
        leaves = {n: leaves[n].clone().requires_grad_(not by_hand) for n in names}
    result = _result(problem, dtype)
    if wants_grads:
        result.grads = {n: torch.zeros_like(leaves[n]) for n in names}
    num_heads = problem.tensors["query"].shape[-2]
    tile = tile_keys(problem.tensors["query"].shape[-1])
    for s in sequences(problem):
        if s.seqlen_q == 0:
            continue
        step = max(1, SCORES_AT_ONCE // max(1, s.seqlen_q * s.keys))
        for first in range(0, num_heads, step):
            heads = range(first, min(first + step, num_heads))
            mask = torch.stack([visible(problem, s, h) for h in heads])
            if kept is not None and s.keys > 0:
                bits = kept[s.index][heads.start : heads.stop]
                bits = bits.repeat_interleave(TILE_ROWS, dim=1)[:, : s.seqlen_q]
                mask = mask & bits.repeat_interleave(tile, dim=2)[:, :, : s.keys]
            g_out = g_lse = None
            if grad_out is not None:
                g_out = (
                    rows_of_query(problem, grad_out, s)[:, heads.start : heads.stop].transpose(0, 1).to(dtype)
                )
            if grad_lse is not None:
                g_lse = _lse_rows(problem, grad_lse, s, heads).to(dtype)
            if by_hand:
                _attend_by_hand(problem, s, leaves, heads, mask, g_out, g_lse, result, shuffle)
            else:
                _attend_autograd(problem, s, leaves, heads, mask, g_out, g_lse, result, reorder)
    if wants_grads and not by_hand:
        result.grads = {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
        for n in names:
            result.grads.setdefault(n, torch.zeros_like(leaves[n]))
    return result


def _values(problem: Problem, s: Sequence, leaves: dict[str, Tensor], heads: range) -> Tensor:
    group = leaves["query"].shape[-2] // leaves["key"].shape[-2]
    return rows_of_key(problem, leaves["value"], s)[:, [h // group for h in heads]].transpose(0, 1)


def _attend_autograd(problem, s, leaves, heads, mask, g_out, g_lse, result, reorder) -> None:
    logits = scores(problem, s, leaves, heads, reorder)
    sink = leaves["sink"][heads.start : heads.stop] if "sink" in leaves else None
    p, _, lse = _probabilities(logits, mask, sink)
    out = p @ _values(problem, s, leaves, heads)
    with torch.no_grad():
        rows_of_query(problem, result.out, s)[:, heads.start : heads.stop] = out.transpose(0, 1)
        _lse_rows(problem, result.lse, s, heads)[...] = lse
    loss = out.new_zeros(())
    if g_out is not None:
        loss = loss + (out * g_out).sum()
    if g_lse is not None:
        loss = loss + (lse.masked_fill(lse == -math.inf, 0.0) * g_lse).sum()
    if loss.requires_grad:
        loss.backward()


def _probabilities_base_2(
    scaled: Tensor, mask: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As _probabilities, of logits times log2 e and with statistics in at least float32: out's P, then P and the
    sink's share as a backward finds them from the rounded lse, and lse."""
    dtype = scaled.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scaled = scaled.to(wide).masked_fill(~mask, -math.inf)
    sink = torch.full(scaled.shape[:1], -math.inf, dtype=wide) if sink is None else sink.to(wide) * LOG2_E
    sink = sink[:, None]
    largest = torch.maximum(scaled.amax(2), sink) if scaled.shape[2] else sink.expand(scaled.shape[:2])
    safe = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp2(scaled - safe[:, :, None])
    total = weights.sum(2) + torch.exp2(sink - safe)
    lse = (largest + torch.log2(total)) * math.log(2)
    back = lse.masked_fill(lse == -math.inf, 0.0) * LOG2_E
    p_out = weights / total.masked_fill(total == 0, 1.0)[:, :, None]
    p = torch.exp2(scaled - back[:, :, None])
    return p_out.to(dtype), p.to(dtype), torch.exp2(sink - back).to(dtype), lse


def textbook_product(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """a @ b, one rank-1 term after the other in a random order, accumulated in at least float32."""
    g = torch.Generator().manual_seed(seed)

    def product(a: Tensor, b: Tensor) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=wide)
        for k in torch.randperm(b.shape[-2], generator=g).tolist():
            total += a[..., k, None].to(wide) * b[..., k, None, :].to(wide)
        return total.to(a.dtype)

    return product


def _attend_by_hand(problem, s, leaves, heads, mask, g_out, g_lse, result, shuffle) -> None:
    group = leaves["query"].shape[-2] // leaves["key"].shape[-2]
    kv = [h // group for h in heads]
    scale, softcap = softmax_scale(problem), problem.options.get("softcap", 0.0)
    product = torch.matmul if shuffle is None else textbook_product(shuffle)
    scaled = scores(problem, s, leaves, heads, reorder=True, unit=LOG2_E, product=product)
    sink = leaves["sink"][heads.start : heads.stop] if "sink" in leaves else None
    p_out, p, p_sink, lse = _probabilities_base_2(scaled, mask, sink)
    values = _values(problem, s, leaves, heads)
    out = product(p_out, values)
    rows_of_query(problem, result.out, s)[:, heads.start : heads.stop] = out.transpose(0, 1)
    _lse_rows(problem, result.lse, s, heads)[...] = lse.to(result.lse.dtype)
    if g_out is None and g_lse is None:
        return
    out_dot_grad = out.new_zeros(out.shape[:2])
    d_p = torch.zeros_like(p)
    if g_out is not None:
        out_dot_grad = (out * g_out).sum(dim=2)
        d_p = product(g_out, values.transpose(1, 2))
    if g_lse is not None:
        out_dot_grad = out_dot_grad - g_lse
    d_s = torch.where(mask, p * (d_p - out_dot_grad[:, :, None]), p.new_zeros(()))
    if softcap:
        tensors = {name: tensor for name, tensor in problem.tensors.items() if name != "alibi_slopes"}
        capped = scores(Problem(problem.case, tensors, problem.options), s, leaves, heads)
        d_s = d_s * (1 - (capped / softcap).square())
    d_s = d_s * scale

    def add_rows(name: str, part: Tensor) -> None:
        target = sequence_first(problem, name, result.grads[name]) if name == "alpha" else result.grads[name]
        rows_of_query(problem, target, s)[:, heads.start : heads.stop] += part

    def add_keys(name: str, part: Tensor) -> None:  # part [seqlen_k, len(heads), ...]
        target = sequence_first(problem, name, result.grads[name]) if name == "delta" else result.grads[name]
        rows = target[s.k_begin : s.k_begin + s.seqlen_k] if "cu_seqlens_k" in problem.tensors else None
        rows = target[s.index, : s.seqlen_k] if rows is None else rows
        for column, head in enumerate(kv):
            rows[:, head] += part[:, column]

    keys = rows_of_key(problem, leaves["key"], s)[:, kv].transpose(0, 1)
    add_rows("query", product(d_s, keys).transpose(0, 1))
    query = rows_of_query(problem, leaves["query"], s)[:, heads.start : heads.stop].transpose(0, 1)
    add_keys("key", product(d_s.transpose(1, 2), query).transpose(0, 1))
    if g_out is not None:
        add_keys("value", product(p.transpose(1, 2), g_out).transpose(0, 1))
    if "alpha" in leaves:
        alpha = rows_of_query(problem, sequence_first(problem, "alpha", leaves["alpha"]), s)
        delta = rows_of_key(problem, sequence_first(problem, "delta", leaves["delta"]), s)
        alpha, delta = alpha[:, heads.start : heads.stop].T, delta[:, kv].T
        if problem.options.get("log_sigmoid_gate", True):
            d_s = d_s * torch.sigmoid(-alpha[:, :, None] * delta[:, None, :])
        add_rows("alpha", (d_s * delta[:, None, :]).sum(dim=2).T)
        add_keys("delta", (d_s * alpha[:, :, None]).sum(dim=1).T)
    if sink is not None:
        result.grads["sink"][heads.start : heads.stop] -= (p_sink * out_dot_grad).sum(dim=1)
