# SPDX-License-Identifier: Apache-2.0
"""Held-out loss, kept fractions, quality against work, and the time that attention alone takes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .kinds import AttentionKind, Projected, kept_fractions, kept_tiles
from .model import ByteLM

TIMING_ROUNDS = 3
ENOUGH_KEPT = 0.5  # the sweep must reach this fraction of the tiles


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class HeldOut:
    loss: float  # nats per byte
    kept: (
        float | None
    )  # kept / visible tiles over all layers, heads and windows; None where nothing is skipped
    kept_by_head: list[list[float]] | None  # [layer][head]


@torch.no_grad()
def held_out(model: ByteLM, kind: AttentionKind, windows: Tensor) -> HeldOut:
    """Mean over windows int64 [n, seqlen + 1], one at a time."""
    losses, per_window = [], []
    seqlen, head_dim = windows.shape[1] - 1, model.config.head_dim
    for window in windows:
        skip_maps: list[Tensor] | None = [] if kind.sparse else None
        losses.append(model.loss(window[None], kind, skip_maps).item())
        if skip_maps is not None:
            per_window.append([kept_fractions(skip_map, seqlen, head_dim) for skip_map in skip_maps])
    loss = statistics.fmean(losses)
    if not per_window:
        return HeldOut(loss, None, None)
    by_head = torch.tensor(per_window).mean(0)  # [layers, num_heads]
    return HeldOut(loss, by_head.mean().item(), by_head.tolist())


@torch.no_grad()
def projections(model: ByteLM, kind: AttentionKind, window: Tensor) -> list[Projected]:
    """What attention gets in every layer for window int64 [seqlen + 1]."""
    tokens = window[None, :-1]
    x, found = model.embedding(tokens), []
    cos_sin = model.cos_sin(0, tokens.shape[1])
    for block in model.blocks:
        p = block.project(x, cos_sin)
        found.append(p)
        x = block.finish(x, kind(p))
    return found


def attention_seconds(
    calls: dict[str, tuple[AttentionKind, list[Projected]]],
) -> dict[str, tuple[float, float]]:
    """Seconds (forward, backward) that attention alone takes over all layers, for each named call; the calls
    take turns, the median of TIMING_ROUNDS rounds counts."""
    forward: dict[str, list[float]] = {name: [] for name in calls}
    backward: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TIMING_ROUNDS + 1):  # the first round warms up
        for name, (kind, layers) in calls.items():
            leaves = [p.leaves() for p in layers]
            device = leaves[0].query.device
            synchronize(device)
            begin = time.perf_counter()
            outs = [kind(p) for p in leaves]
            synchronize(device)
            middle = time.perf_counter()
            torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
            synchronize(device)
            forward[name].append(middle - begin)
            backward[name].append(time.perf_counter() - middle)
    return {
        name: (statistics.median(forward[name][1:]), statistics.median(backward[name][1:])) for name in calls
    }


@dataclass
class SweepRow:
    threshold: float
    held_out: float
    kept: float
    kept_by_head: list[list[float]]
    forward_ms: float = 0.0  # attention alone, all layers, one window
    backward_ms: float = 0.0


def threshold_sweep(model: ByteLM, kind: AttentionKind, windows: Tensor) -> list[SweepRow]:
    """Held-out loss of `model`, trained with `kind`, under the thresholds 1, 2, 4, ... up to the length of the
    context, where the threshold probability of every row has reached 1 and larger ones change nothing."""
    rows: list[SweepRow] = []
    threshold = 1.0
    while threshold < 2 * (windows.shape[1] - 1):
        result = held_out(model, kind.under(threshold), windows)
        assert result.kept is not None and result.kept_by_head is not None
        rows.append(SweepRow(threshold, result.loss, result.kept, result.kept_by_head))
        threshold *= 2
    return rows


@torch.no_grad()
def zero_threshold_is_dense(model: ByteLM, kind: AttentionKind, window: Tensor) -> bool:
    """Whether threshold 0 gives the logits of no threshold, bit for bit, on window int64 [seqlen + 1]."""
    tokens = window[None, :-1]
    return torch.equal(model(tokens, kind.without_skipping()), model(tokens, kind.under(0.0)))


@torch.no_grad()
def tiles_of(model: ByteLM, kind: AttentionKind, window: Tensor) -> list[Tensor]:
    """Kept tiles bool [num_heads, row_tiles, key_tiles] of every layer for window int64 [seqlen + 1]."""
    skip_maps: list[Tensor] = []
    model(window[None, :-1], kind, skip_maps)
    return [kept_tiles(skip_map, len(window) - 1, model.config.head_dim)[0].cpu() for skip_map in skip_maps]
