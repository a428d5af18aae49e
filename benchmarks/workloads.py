# SPDX-License-Identifier: Apache-2.0
"""What a row of tests/cases.tsv is timed as: our call, torch's, and our dense one where the row is sparse."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flash_sparse_attention as fsa
import measure
import torch
import torch.nn.functional as F
from measure import Call
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cases import TILE_ROWS, Case, Problem, build, case_named, tile_keys  # noqa: E402

SPARSITY = ("window_size", "window_sizes", "threshold", "alpha", "delta", "gate_threshold", "block_mask")
SPARSITY += ("adaptive_gate", "log_sigmoid_gate", "gate_layout")
GATE_STEP = 60.0  # nats from one shut key tile to the next: more than log(1 / gate_threshold) of any row


def open_tiles(case: Case, share: float, generator: torch.Generator) -> Tensor:
    """Random key tiles, bool [key tiles], with which a causal forward keeps ``share`` of its visible tiles.

    The first tile that a row tile visits, its right-most, is kept whatever its gate.
    """
    tile = tile_keys(case.head_dim)
    rows, keys = -(-case.seqlen_q // TILE_ROWS), -(-case.seqlen_k // tile)
    last = [min(TILE_ROWS * row + TILE_ROWS - 1, case.seqlen_k - 1) // tile for row in range(rows)]
    budget = share * sum(n + 1 for n in last) - rows
    chosen = torch.zeros(keys, dtype=torch.bool)
    for n in torch.randperm(keys, generator=generator).tolist():
        further = sum(n < right for right in last)
        if further <= budget:
            chosen[n] = True
            budget -= further
    return chosen


def _set_gates(problem: Problem) -> None:
    """Replaces delta so that exactly the given share of the tiles is kept.

    An open tile has a gate near 1. Shut tiles get lower from right to left, so that none of them is kept for
    want of an open one to its right.
    """
    case = problem.case
    kind, _, share = case.gate_inputs.partition(":")
    if kind != "tiles" or not case.causal or case.form != "batched" or case.seqlen_q != case.seqlen_k:
        return
    generator = torch.Generator().manual_seed(1)
    tile = tile_keys(case.head_dim)
    delta = problem.tensors["delta"]
    by_key_head = delta if case.gate_layout == "bsh" else delta.transpose(1, 2)
    for head in range(case.num_kv_heads):
        chosen = open_tiles(case, float(share), generator)
        depth = torch.arange(len(chosen), 0, -1)
        height = torch.where(chosen, 1.0, -GATE_STEP * depth / case.scale)
        by_key_head[:, :, head] = height.repeat_interleave(tile)[: case.seqlen_k].to(delta.dtype)


class Workload:
    """One row of the table in one dtype.

    ``calls(direction)`` gives what is timed: "ours"; "torch..." where torch's attention computes the row, or
    a sparse row's dense problem; "dense", our own attention without the row's sparsity. Torch takes no part
    in the backward of sparse rows: with few heads it is slow by itself, and "dense" is the yardstick.
    """

    def __init__(self, case: Case, dtype: str) -> None:
        self.case, self.dtype = case, dtype
        self.problem = build(case, dtype)
        if case.gate is not None:
            _set_gates(self.problem)
        masks = (case.window_size, case.window_sizes, case.block_mask)
        self.sparse = case.skips or any(mask is not None for mask in masks)
        self.kept: float | None = None
        if case.skips and not case.decode:
            self.kept = self._kept_fraction()

    @property
    def directions(self) -> tuple[str, ...]:
        if self.case.decode:
            return ("decode",)
        return ("forward",) if "long" in self.case.tags else ("forward", "backward")

    def _kept_fraction(self) -> float:
        arguments = self.problem.arguments()
        _, skip_map = fsa.attention(**arguments, return_skip_map=True)
        masks = ("causal", "window_size", "window_sizes", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_k")
        masks += ("seqused_q", "seqused_k", "block_mask")
        rows = 0 if "cu_seqlens_q" in arguments else 1
        return fsa.kept_fraction(
            skip_map,
            seqlen_q=arguments["query"].shape[rows],
            seqlen_k=arguments["key"].shape[rows],
            head_dim=self.case.head_dim,
            num_kv_heads=self.case.num_kv_heads,
            **{name: arguments[name] for name in masks if name in arguments},
        )

    def kernel(self) -> str:
        """Backend and kernel of the forward; "" for decode, which explain does not describe."""
        if self.case.decode:
            return ""
        plan = fsa.explain(**self.problem.arguments())
        return f"{plan['backend']}:{plan['kernel']}"

    def flops(self, direction: str) -> float:
        """Useful work: over the visible pairs of the kept tiles."""
        case = self.case
        if direction == "decode":
            keys = case.batch * case.seqlen_k if case.lengths_k is None else sum(case.lengths_k.used)
            return 2.0 * (case.head_dim + case.head_dim_v) * case.num_heads * keys
        visible = fsa.explain(**self.problem.arguments())["flops"]
        return visible * (2.5 if direction == "backward" else 1.0) * (1.0 if self.kept is None else self.kept)

    def nbytes(self, direction: str) -> int:
        """Each input read once, each output written once."""
        tensors = self.problem.tensors
        query = tensors["query"]
        inputs = sum(t.nbytes for t in tensors.values())
        out = query.nbytes // self.case.head_dim * self.case.head_dim_v
        if direction != "backward":
            return inputs + out
        return 2 * inputs + 2 * out + 4 * query.numel() // self.case.head_dim

    def calls(self, direction: str) -> dict[str, Call]:
        if direction == "decode":
            return {"ours": self.ours(direction), **self._torch_decode()}
        calls = {"ours": self.ours(direction)}
        if self.sparse:
            calls["dense"] = self.ours(direction, dense=True)
        if self._torch_can() and not (self.sparse and direction == "backward"):
            calls["torch"] = self._torch(direction)
        return calls

    def ours(self, direction: str, dense: bool = False) -> Call:
        if direction == "decode":
            name, arguments = self.problem.decode_call()
            function = getattr(fsa, name)
            return lambda: function(**arguments)
        arguments = self.problem.arguments()
        if dense:
            arguments = {name: value for name, value in arguments.items() if name not in SPARSITY}
        if direction == "forward":
            return lambda: fsa.attention(**arguments)
        names = [n for n in ("query", "key", "value", "alpha", "delta", "sink") if n in arguments]
        leaves = [arguments[n].detach().requires_grad_() for n in names]
        out = fsa.attention(**{**arguments, **dict(zip(names, leaves, strict=True))})
        grad_out = self._grad_out(out)
        return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    def _grad_out(self, out: Tensor) -> Tensor:
        return torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)

    def _torch_can(self) -> bool:
        """Whether torch's attention computes this row, or for a sparse row its dense causal problem."""
        case = self.case
        square = case.seqlen_q == case.seqlen_k and case.lengths_q == case.lengths_k
        unused = all(lengths is None or lengths.used is None for lengths in (case.lengths_q, case.lengths_k))
        plain = not case.softcap and case.alibi is None and not case.sink and case.window_sizes is None
        return case.form in ("batched", "packed") and square and unused and plain

    def _sequences(self) -> list[list[Tensor]]:
        """query, key, value as torch likes them best, [batch, heads, seqlen, head_dim], per packed sequence.

        Values are padded to head_dim beforehand: torch's fast path wants one size.
        """
        tensors = self.problem.tensors
        sides = [tensors[name] for name in ("query", "key", "value")]
        if self.case.form == "packed":
            starts = tensors["cu_seqlens_q"].tolist()
            cuts = [(a, b) for a, b in zip(starts, starts[1:], strict=False) if b > a]
            parts = [[side[a:b].unsqueeze(0) for side in sides] for a, b in cuts]
        else:
            parts = [sides]
        width = self.case.head_dim
        padded = [[F.pad(t, (0, width - t.shape[-1])) for t in part] for part in parts]
        return [[t.transpose(1, 2).contiguous() for t in part] for part in padded]

    def _torch(self, direction: str) -> Call:
        options = {
            "is_causal": self.case.causal,
            "scale": self.case.scale,
            "enable_gqa": self.case.num_heads != self.case.num_kv_heads,
        }
        sequences = self._sequences()
        if direction == "forward":
            return lambda: [F.scaled_dot_product_attention(*part, **options) for part in sequences]
        sequences = [[t.detach().requires_grad_() for t in part] for part in sequences]
        leaves = [t for part in sequences for t in part]
        outs = [F.scaled_dot_product_attention(*part, **options) for part in sequences]
        grads = [self._grad_out(out) for out in outs]
        return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    def _torch_decode(self) -> dict[str, Call]:
        """Torch over a cache in its own layout and in ours; the better one counts."""
        case, tensors = self.case, self.problem.tensors
        if case.form != "decode" or self.sparse or "seqused_k" in tensors:
            return {}
        query = tensors["query"].unsqueeze(2)
        ours = [tensors[name].transpose(1, 2) for name in ("key", "value")]
        own = [t.contiguous() for t in ours]
        options = {"scale": case.scale, "enable_gqa": case.num_heads != case.num_kv_heads}
        return {
            "torch": lambda: F.scaled_dot_product_attention(query, *own, **options),
            "torch_our_layout": lambda: F.scaled_dot_product_attention(query, *ours, **options),
        }

    def difference(self, direction: str, results: dict[str, Any]) -> float | None:
        """Largest distance of our output from torch's, or for a threshold from our own dense one."""
        ours = results["ours"]
        case = self.case
        other_keys = case.gate is not None or case.window_size is not None or case.block_mask is not None
        if direction == "backward" or other_keys:
            return None
        if self.case.threshold is not None:
            other = results["dense"]
        elif "torch" not in results:
            other = None
        elif direction == "decode":
            other = results["torch"].squeeze(2)
        else:
            parts = [part.transpose(1, 2)[..., : self.case.head_dim_v] for part in results["torch"]]
            other = torch.cat([part.squeeze(0) for part in parts]) if self.case.form == "packed" else parts[0]
        return None if other is None else (ours.float() - other.float()).abs().max().item()


def _extra_memory(name: str, dtype: str, directions: list[str], threads: int) -> dict[str, int | None]:
    set_threads(threads)
    tiny = torch.zeros(1, 64, 1, 64, requires_grad=True)
    fsa.attention(tiny, tiny, tiny).sum().backward()  # code, thread pool
    workload = Workload(case_named(name), dtype)
    return {d: measure.peak_extra_bytes(workload.ours(d)) for d in directions}


def extra_memory(case: Case, dtype: str, directions: list[str], threads: int) -> dict[str, int | None]:
    """Peak bytes of our call beyond inputs and outputs, each workload in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_extra_memory, (case.name, dtype, directions, threads))


def set_threads(threads: int) -> None:
    """The same number for both libraries."""
    torch.set_num_threads(threads)
    fsa.set_num_threads(threads)


def tiny_calls() -> dict[str, dict[str, Call]]:
    """Calls that compute next to nothing: what is left is the way from Python to the kernel and back."""
    query, key, value = torch.randn(3, 1, 1, 1, 64).unbind()
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    theirs = [t.clone().requires_grad_() for t in (query, key, value)]
    grad_out = torch.randn(1, 1, 1, 64)

    def plain(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Call:
        return lambda: function(*tensors)

    def with_backward(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(*tensors), tensors, grad_out)

    sdpa = F.scaled_dot_product_attention
    decode = fsa.flash_dense_attn_with_kvcache_func
    states = (query, key, value)
    return {
        "attention": {"ours": plain(fsa.attention, states), "torch": plain(sdpa, states)},
        "attention, recording for backward": {
            "ours": plain(fsa.attention, leaves),
            "torch": plain(sdpa, theirs),
        },
        "attention and backward": {
            "ours": with_backward(fsa.attention, leaves),
            "torch": with_backward(sdpa, theirs),
        },
        "decode": {"ours": plain(decode, (query[:, 0], key, value)), "torch": plain(sdpa, states)},
    }
