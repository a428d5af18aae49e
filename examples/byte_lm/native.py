# SPDX-License-Identifier: Apache-2.0
"""What native sparse attention does in a trained model: the blocks that its heads select, the share of pairs
that it computes, and its gates."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from flash_sparse_attention import attention, nsa
from torch import Tensor

from .evaluate import projections
from .kinds import AttentionKind, NsaSizes, explain_selected
from .model import ByteLM


@dataclass
class Selection:
    """Of one held-out window of `seqlen` bytes."""

    blocks: list[Tensor]  # of every layer, int32 [num_kv_heads, seqlen, top_k]
    gates: list[list[float]]  # mean of every layer and branch: compressed, selected, sliding
    plan: dict  # forward and backward: how the selected branch is computed, see nsa.explain


@torch.no_grad()
def selection(model: ByteLM, kind: AttentionKind, window: Tensor) -> Selection:
    """What every layer selects on window int64 [seqlen + 1]."""
    blocks, gates, plan = [], [], {}
    for p in projections(model, kind, window):
        assert p.compressed_key is not None and p.compressed_value is not None and p.gates is not None
        _, _, selected = nsa.compressed_attention(
            p.query, p.compressed_key, p.compressed_value, **kind.sizes.select()
        )
        blocks.append(selected[0].cpu())
        gates.append(p.gates.mean(dim=(0, 1, 2)).tolist())
        plan = explain_selected(kind, p)
    return Selection(blocks, gates, plan)


def chosen(blocks: Tensor, seqlen: int, block_size: int) -> Tensor:
    """int32 [num_kv_heads, seqlen, top_k] -> bool [num_kv_heads, seqlen, ceil(seqlen / block_size)]."""
    count = -(-seqlen // block_size)
    places = torch.where(blocks < 0, count, blocks).long()
    table = torch.zeros(*blocks.shape[:2], count + 1, dtype=torch.bool)
    return table.scatter_(2, places, True)[..., :count]


def faulty_rows(found: Selection, sizes: NsaSizes) -> tuple[int, int]:
    """(rows that break a rule of the selection, all rows), over layers and key heads.

    A row selects min(top_k, own block + 1) blocks, the first and the last ones up to its own among them and
    none after its own, in ascending order with -1 behind them.
    """
    faults = rows = 0
    for blocks in found.blocks:
        seqlen = blocks.shape[1]
        own = torch.arange(seqlen) // sizes.block_size
        table = chosen(blocks, seqlen, sizes.block_size)
        number = torch.arange(table.shape[2])
        forced = (number < sizes.init_blocks) | (number > own[:, None] - sizes.local_blocks)
        past = number <= own[:, None]
        right = table.sum(2) == (own + 1).clamp(max=sizes.top_k)
        right &= (table <= past).all(2) & (table >= (forced & past)).all(2)
        in_order = torch.where(blocks < 0, len(number), blocks)
        right &= (in_order.diff(dim=2) >= 0).all(2) & ((blocks >= 0).sum(2) == table.sum(2))
        faults += int((~right).sum())
        rows += right.numel()
    return faults, rows


def computed_share(found: Selection, sizes: NsaSizes) -> float:
    """Pairs of a query and a key (or compressed key) in the three branches / pairs that causal attention has."""
    shares = []
    for blocks in found.blocks:
        seqlen = blocks.shape[1]
        position = torch.arange(seqlen)
        windows = ((position + 1 - sizes.compress_block) // sizes.compress_stride + 1).clamp(min=0).sum()
        sliding = (position + 1).clamp(max=sizes.window_left + 1).sum()
        visible = (
            position[:, None] + 1 - sizes.block_size * torch.arange(-(-seqlen // sizes.block_size))
        ).clamp(0, sizes.block_size)
        selected = (chosen(blocks, seqlen, sizes.block_size) * visible).sum() / blocks.shape[0]
        shares.append((windows + sliding + selected).item() / (seqlen * (seqlen + 1) / 2))
    return statistics.fmean(shares)


@torch.no_grad()
def all_blocks_against_dense(
    model: ByteLM, kind: AttentionKind, window: Tensor, sizes: NsaSizes
) -> tuple[float, float]:
    """Largest difference between selected attention over every block and dense attention, on the queries, keys
    and values of all layers of `model` for window int64 [seqlen + 1], and the largest output of dense."""
    count = -(-(len(window) - 1) // sizes.block_size)
    difference = largest = 0.0
    for p in projections(model, kind, window):
        rows = (1, p.key.shape[2], p.query.shape[1], count)
        blocks = torch.arange(count, dtype=torch.int32, device=p.query.device).expand(rows).contiguous()
        out = nsa.selected_attention(p.query, p.key, p.value, blocks, block_size=sizes.block_size)
        dense = attention(p.query, p.key, p.value, causal=True)
        difference = max(difference, (out - dense).abs().max().item())
        largest = max(largest, dense.abs().max().item())
    return difference, largest


def votes_of_last_byte(found: Selection, sizes: NsaSizes) -> list[int]:
    """For every block, how many (layer, key head) pairs select it for the last byte of the window."""
    seqlen = found.blocks[0].shape[1]
    tables = [chosen(blocks, seqlen, sizes.block_size)[:, -1] for blocks in found.blocks]
    return torch.cat(tables).sum(0).tolist()
