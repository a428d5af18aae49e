# SPDX-License-Identifier: Apache-2.0
"""Decisions about tiles in plain PyTorch: the library's skip map replayed, and what a sparse call decides.

Written from docs/semantics.md, like the oracle, whose logits it uses. Shapes inside: one sequence, as there.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from cases import TILE_ROWS, Problem, tile_keys
from oracle import (
    GRADIENTS,
    LOG2_E,
    SCORES_AT_ONCE,
    Sequence,
    gate,
    positions,
    rows_of_key,
    rows_of_query,
    scores,
    sequence_first,
    sequences,
    softmax_scale,
    visible,
)
from torch import Tensor


def skip_map_shape(problem: Problem) -> tuple[int, ...]:
    """Shape of the library's skip map."""
    t = problem.tensors
    num_heads, tile = t["query"].shape[-2], tile_keys(t["query"].shape[-1])
    if "page_table" in t:
        longest = t["page_table"].shape[1] * t["key"].shape[1]
    elif "cu_seqlens_k" in t:
        cu = t["cu_seqlens_k"]
        longest = max([problem.options.get("max_seqlen_k") or 0, *(cu[1:] - cu[:-1]).tolist()])
    else:
        longest = t["key"].shape[1]
    words = math.ceil(math.ceil(longest / tile) / 32)
    if "cu_seqlens_q" in t:
        batch = t["cu_seqlens_q"].numel() - 1
        return num_heads, t["query"].shape[0] // TILE_ROWS + batch, words
    batch, seqlen_q = t["query"].shape[:2]
    return batch, num_heads, math.ceil(seqlen_q / TILE_ROWS), words


def skip_map_bits(problem: Problem, skip_map: Tensor) -> dict[int, Tensor]:
    """The library's map as bool [num_heads, row_tiles, key_tiles] per sequence. Unused bits must be 0."""
    tile = tile_keys(problem.tensors["query"].shape[-1])
    shifts = torch.arange(32, dtype=torch.int32)
    bits = ((skip_map[..., None] >> shifts) & 1).bool().flatten(-2)
    unseen = bits.clone()
    result = {}
    for s in sequences(problem):
        row_tiles, key_tiles = math.ceil(s.seqlen_q / TILE_ROWS), math.ceil(s.keys / tile)
        if "cu_seqlens_q" in problem.tensors:
            window = (slice(None), slice(s.row_tile_begin, s.row_tile_begin + row_tiles), slice(key_tiles))
        else:
            window = (s.index, slice(None), slice(row_tiles), slice(key_tiles))
        result[s.index] = bits[window].clone()
        unseen[window] = False
    assert not unseen.any(), "skip map: bits are set outside the used row and key tiles"
    return result


def visible_len(problem: Problem, s: Sequence) -> Tensor:
    """Per row: what the threshold is divided by. int64 [seqlen_q]."""
    if causal_lengths(problem):
        return torch.arange(s.seqlen_q) + s.offset + 1
    return torch.full((s.seqlen_q,), s.seqlen_k)


def causal_lengths(problem: Problem) -> bool:
    return bool(problem.options.get("causal", False)) or "window_sizes" in problem.tensors


def log2_threshold(problem: Problem, s: Sequence) -> Tensor:
    """t(q) = log2 clamp(tau / visible_len, 0, 1) per row; +inf for rows that see nothing."""
    length = visible_len(problem, s).double()
    tau = problem.options.get("threshold") or 0.0
    t = torch.log2((tau / length).clamp(0, 1))
    return torch.where(length > 0, t, math.inf)


def gate_threshold(problem: Problem, s: Sequence) -> float:
    """gamma, the default filled in; <= 0 when the gate test is off."""
    if "alpha" not in problem.tensors:
        return 0.0
    gamma = problem.options.get("gate_threshold")
    return (1.0 / s.seqlen_k if s.seqlen_k else 0.0) if gamma is None else gamma


def _tile_bounds(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over tiles of the last dimension, [..., tiles]."""
    missing = -x.shape[-1] % tile
    low = torch.nn.functional.pad(x, (0, missing), value=math.inf).unflatten(-1, (-1, tile)).amin(-1)
    high = torch.nn.functional.pad(x, (0, missing), value=-math.inf).unflatten(-1, (-1, tile)).amax(-1)
    return low, high


def gate_bounds(problem: Problem, s: Sequence, heads: range, row_tile: int) -> Tensor:
    """c_g of every (row tile, key tile): [len(heads), row_tiles, key_tiles]; -inf for a tile without a key."""
    t = problem.tensors
    group = t["query"].shape[-2] // t["key"].shape[-2]
    kv = [h // group for h in heads]
    alpha = rows_of_query(problem, sequence_first(problem, "alpha", t["alpha"]), s).double()
    delta = rows_of_key(problem, sequence_first(problem, "delta", t["delta"]), s).double()
    a_low, a_high = _tile_bounds(alpha[:, heads.start : heads.stop].T, row_tile)
    tile = tile_keys(t["query"].shape[-1])
    exists = positions(problem, s) >= 0
    d_low = _tile_bounds(torch.where(exists, delta[:, kv].T, math.inf), tile)[0]
    d_high = _tile_bounds(torch.where(exists, delta[:, kv].T, -math.inf), tile)[1]
    has_key = d_low <= d_high
    d_low, d_high = d_low.masked_fill(~has_key, 0), d_high.masked_fill(~has_key, 0)
    corners = [a[:, :, None] * d[:, None, :] for a in (a_low, a_high) for d in (d_low, d_high)]
    bound = gate(problem, torch.stack(corners).amax(0))
    return bound.masked_fill(~has_key[:, None, :], -math.inf)


def log2_gate_threshold(problem: Problem, s: Sequence) -> Tensor | None:
    """log2 gamma_eff per row tile, -inf where the test is off; None when it is off everywhere."""
    gamma = gate_threshold(problem, s)
    if gamma <= 0:
        return None
    row_tiles = math.ceil(s.seqlen_q / TILE_ROWS)
    effective = torch.full((row_tiles,), gamma, dtype=torch.float64)
    if causal_lengths(problem) and problem.options.get("adaptive_gate", True):
        per_row = gamma * (torch.arange(s.seqlen_q).double() + s.offset + 1) / s.seqlen_k
        effective = _tile_bounds(per_row, TILE_ROWS)[0]
    return torch.log2(effective.clamp(min=0))


@dataclasses.dataclass
class Tiles:
    """Counts of a replay."""

    visible: int = 0
    kept: int = 0
    shut_by_gate: int = 0

    def add(self, other: Tiles) -> None:
        self.visible += other.visible
        self.kept += other.kept
        self.shut_by_gate += other.shut_by_gate


def _tile_statistics(problem: Problem, s: Sequence, heads: range) -> tuple[Tensor, Tensor]:
    """Per row and key tile, over visible keys: largest logit and log-sum-exp, [len(heads), rows, key_tiles]."""
    leaves = {n: problem.tensors[n].double() for n in GRADIENTS if n in problem.tensors}
    logits = scores(problem, s, leaves, heads)
    mask = torch.stack([visible(problem, s, h) for h in heads])
    logits = logits.masked_fill(~mask, -math.inf)
    tile = tile_keys(problem.tensors["query"].shape[-1])
    logits = torch.nn.functional.pad(logits, (0, -s.keys % tile), value=-math.inf).unflatten(-1, (-1, tile))
    return logits.amax(-1), torch.logsumexp(logits, dim=-1)


def replay(problem: Problem, skip_map: Tensor, tolerance: float) -> Tiles:
    """Walks the library's own decisions in float64; AssertionError when one is on the wrong side of its
    threshold by more than `tolerance` log2 units, or when an element of dense probability >= thr was dropped
    by the vote."""
    kept = skip_map_bits(problem, skip_map)
    total = Tiles()
    for s in sequences(problem):
        if s.seqlen_q == 0 or s.keys == 0:
            continue
        num_heads = problem.tensors["query"].shape[-2]
        step = max(1, SCORES_AT_ONCE // (s.seqlen_q * s.keys))
        for first in range(0, num_heads, step):
            heads = range(first, min(first + step, num_heads))
            total.add(_replay_heads(problem, s, heads, kept[s.index][heads.start : heads.stop], tolerance))
    return total


def _replay_heads(problem: Problem, s: Sequence, heads: range, kept: Tensor, tolerance: float) -> Tiles:
    largest, sums = _tile_statistics(problem, s, heads)
    row_tiles, key_tiles = kept.shape[1], kept.shape[2]
    where = f"sequence {s.index}, heads {heads.start}..{heads.stop - 1}"

    def over_rows(x: Tensor, fill: float) -> Tensor:  # [heads, rows] -> [heads, row_tiles, 64]
        missing = row_tiles * TILE_ROWS - s.seqlen_q
        return torch.nn.functional.pad(x, (0, missing), value=fill).unflatten(-1, (row_tiles, TILE_ROWS))

    sees = largest > -math.inf  # [heads, rows, key_tiles]
    tile_visible = torch.stack([over_rows(sees[..., n], 0).any(-1) for n in range(key_tiles)], dim=-1)
    assert not (kept & ~tile_visible).any(), f"{where}: a tile without a visible key is marked as kept"
    votes = (problem.options.get("threshold") or 0.0) > 0
    t = log2_threshold(problem, s)
    gamma = log2_gate_threshold(problem, s)
    bounds = gate_bounds(problem, s, heads, TILE_ROWS) if gamma is not None else None
    scale = softmax_scale(problem) * LOG2_E

    lse = torch.full(sees.shape[:2], -math.inf, dtype=torch.float64)  # over the kept tiles so far
    best_low = torch.full((len(heads), row_tiles), -math.inf, dtype=torch.float64)  # b_g lies in [low, high]
    best_high = best_low.clone()
    surely_open_tiles = torch.zeros_like(kept)
    shut_tiles = torch.zeros_like(kept)
    for n in reversed(range(key_tiles)):
        seen, is_kept = tile_visible[..., n], kept[..., n]
        may_shut = torch.zeros_like(seen)
        must_shut = may_shut.clone()
        if bounds is not None:
            c = bounds[..., n]
            finite = best_low > -math.inf
            highest = torch.where(finite, (c - best_low) * scale - gamma, math.inf)
            lowest = torch.where(finite, (c - best_high) * scale - gamma, math.inf)
            may_shut, must_shut = seen & (lowest < tolerance), seen & (highest < -tolerance)
            is_open = seen & (~may_shut | is_kept)
            best_low = torch.where(is_open, best_low.maximum(c), best_low)
            best_high = torch.where(seen & ~must_shut, best_high.maximum(c), best_high)
        surely_open_tiles[..., n] = seen & ~may_shut
        shut_tiles[..., n] = must_shut
        assert not (is_kept & must_shut).any(), f"{where}, key tile {n}: kept, but the gate shuts it"
        # Votes: rows with nothing so far and a visible key say keep, whatever the threshold.
        z = torch.where(lse > -math.inf, (largest[..., n] - lse) * LOG2_E, math.inf)
        margin = torch.where(sees[..., n], z - t, -math.inf)
        margin = over_rows(margin, -math.inf).amax(-1)
        if votes:
            wrong = is_kept & (margin < -tolerance)
            assert not wrong.any(), f"{where}, key tile {n}: kept with margin {margin[wrong].min():.3g} log2"
        else:
            margin = torch.where(seen, math.inf, margin)
        wrong = seen & ~is_kept & ~may_shut & (margin > tolerance)
        assert not wrong.any(), f"{where}, key tile {n}: skipped with margin {margin[wrong].max():.3g} log2"
        row_kept = is_kept.repeat_interleave(TILE_ROWS, dim=1)[:, : s.seqlen_q]
        lse = torch.where(row_kept, torch.logaddexp(lse, sums[..., n]), lse)

    # Nothing of dense probability >= thr was dropped by the vote.
    dense = torch.logsumexp(sums, dim=-1, keepdim=True)
    dropped = surely_open_tiles & tile_visible & ~kept
    by_row = dropped.repeat_interleave(TILE_ROWS, dim=1)[:, : s.seqlen_q] & sees
    excess = torch.where(by_row, (largest - dense) * LOG2_E - t[None, :, None], -math.inf)
    assert excess.max() <= tolerance, (
        f"{where}: an element {excess.max():.3g} log2 above its threshold was dropped"
    )
    return Tiles(int(tile_visible.sum()), int(kept.sum()), int(shut_tiles.sum()))


def own_decisions(problem: Problem) -> dict[int, Tensor]:
    """The decisions of the rules in float64, in the form of skip_map_bits(). Forward problems only."""
    result = {}
    for s in sequences(problem):
        num_heads, tile = problem.tensors["query"].shape[-2], tile_keys(problem.tensors["query"].shape[-1])
        row_tiles, key_tiles = math.ceil(s.seqlen_q / TILE_ROWS), math.ceil(s.keys / tile)
        kept = torch.zeros(num_heads, row_tiles, key_tiles, dtype=torch.bool)
        result[s.index] = kept
        if s.seqlen_q == 0 or s.keys == 0:
            continue
        votes = (problem.options.get("threshold") or 0.0) > 0
        t, gamma = log2_threshold(problem, s), log2_gate_threshold(problem, s)
        scale = softmax_scale(problem) * LOG2_E
        for h in range(num_heads):
            largest, sums = (x[0] for x in _tile_statistics(problem, s, range(h, h + 1)))
            bounds = gate_bounds(problem, s, range(h, h + 1), TILE_ROWS)[0] if gamma is not None else None
            for r in range(row_tiles):
                rows = slice(r * TILE_ROWS, min((r + 1) * TILE_ROWS, s.seqlen_q))
                lse = torch.full((rows.stop - rows.start,), -math.inf, dtype=torch.float64)
                best = -math.inf
                for n in reversed(range(key_tiles)):
                    sees = largest[rows, n] > -math.inf
                    if not sees.any():
                        continue
                    if bounds is not None:
                        c = float(bounds[r, n])
                        if math.isfinite(best) and (c - best) * scale < float(gamma[r]):
                            continue
                        best = max(best, c)
                    if votes:
                        z = (largest[rows, n] - lse) * LOG2_E
                        keep = sees & ((lse == -math.inf) | (z >= t[rows]))
                        if not keep.any():
                            continue
                    kept[h, r, n] = True
                    lse = torch.logaddexp(lse, sums[rows, n])
    return result


def decode_decisions(problem: Problem) -> tuple[dict[int, Tensor], list[tuple[int, int, int]]]:
    """Kept tiles of a decode problem by the order-free rule, bool [num_heads, 1, key_tiles] per sequence, and
    the tiles (sequence, key head, key tile) whose decision is within 1e-2 log2 units of its threshold."""
    result, close = {}, []
    t = problem.tensors
    group = t["query"].shape[-2] // t["key"].shape[-2]
    tile = tile_keys(t["query"].shape[-1])
    scale = softmax_scale(problem) * LOG2_E
    for s in sequences(problem):
        key_tiles = math.ceil(s.keys / tile)
        kept = torch.zeros(t["query"].shape[-2], 1, key_tiles, dtype=torch.bool)
        result[s.index] = kept
        if s.keys == 0 or s.seqlen_k == 0:
            continue
        tau = problem.options.get("threshold") or 0.0
        log_threshold = math.log(min(max(tau / s.seqlen_k, 0.0), 1.0)) if tau > 0 else -math.inf
        gamma = gate_threshold(problem, s)
        for head in range(t["key"].shape[-2]):
            rows = range(head * group, (head + 1) * group)
            largest, sums = (x[:, 0] for x in _tile_statistics(problem, s, rows))  # [group, key_tiles]
            candidates = [n for n in range(key_tiles) if (largest[:, n] > -math.inf).any()]
            if gamma > 0:
                # All rows of the group form one row tile: their bounds are joined.
                alpha = t["alpha"][s.index, rows.start : rows.stop].double()
                delta = rows_of_key(problem, sequence_first(problem, "delta", t["delta"]), s)[
                    :, head
                ].double()
                exists = positions(problem, s) >= 0
                best, open_tiles = -math.inf, []
                for n in reversed(candidates):
                    d = delta[n * tile : (n + 1) * tile][exists[n * tile : (n + 1) * tile]]
                    c = float(gate(problem, torch.maximum(alpha.amin() * d, alpha.amax() * d).amax()))
                    margin = (c - best) * scale - math.log2(gamma) if math.isfinite(best) else math.inf
                    if abs(margin) < 1e-2:
                        close.append((s.index, head, n))
                    if margin < 0:
                        continue
                    best = max(best, c)
                    open_tiles.append(n)
                candidates = open_tiles[::-1]
            if not candidates:
                continue
            if tau > 0:
                probes = sorted({candidates[0], *candidates[-4:]})
                probe_lse = torch.logsumexp(sums[:, probes], dim=1)
                margins = largest - (probe_lse + log_threshold)[:, None]
                margins = torch.where(largest > -math.inf, margins, -math.inf)
                margins = torch.where(
                    (probe_lse == -math.inf)[:, None] & (largest > -math.inf), math.inf, margins
                )
                for n in candidates:
                    margin = float(margins[:, n].max()) * LOG2_E
                    if n not in probes and abs(margin) < 1e-2:
                        close.append((s.index, head, n))
                candidates = [n for n in candidates if n in probes or float(margins[:, n].max()) >= 0]
            for n in candidates:
                kept[rows.start : rows.stop, 0, n] = True
    return result, close
