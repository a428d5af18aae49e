# SPDX-License-Identifier: Apache-2.0
"""Problems of the Hopper forward, attention in float64, and what is right beside it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from forward_launch import (
    LOG2E,
    Problem,
)


def sequences(p: Problem):
    """(batch index, query rows, key rows, used query rows, used key rows) of each sequence."""
    batch = p.q.shape[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
    for b in range(batch):
        ranges = []
        for cu, tensor in ((p.cu_seqlens_q, p.q), (p.cu_seqlens_k, p.k)):
            ranges.append((0, tensor.shape[1]) if cu is None else (int(cu[b]), int(cu[b + 1])))
        used = []
        for seqused, (begin, end) in zip((p.seqused_q, p.seqused_k), ranges, strict=True):
            used.append(end - begin if seqused is None else int(seqused[b]))
        yield b, *ranges, *used


def take(tensor, b: int, begin: int, length: int):
    return tensor[begin : begin + length] if tensor.dim() == 3 else tensor[b, begin : begin + length]


def hidden_keys(p: Problem, used_q: int, used_k: int):
    """bool [kv_heads or heads or 1, rows, keys]: what the masks hide."""
    import torch

    i = torch.arange(used_q, device="cuda")[None, :, None] + used_k - used_q
    j = torch.arange(used_k, device="cuda")[None, None]
    if p.blocks is not None:
        return ~p.blocks.visible[:, :used_q, :used_k]
    if p.window_sizes is not None:
        sink, left, right, near = (p.window_sizes.long()[:, c, None, None] for c in range(4))
        distance = i - j
        seen = (
            (distance < near) | ((distance >= near + right) & (distance < near + right + left)) | (j < sink)
        )
        return ~((distance >= 0) & seen)
    hidden = torch.zeros(1, used_q, used_k, dtype=torch.bool, device="cuda")
    if p.window_left >= 0:
        hidden = hidden | (j < i - p.window_left)
    if p.window_right >= 0:
        hidden = hidden | (j > i + p.window_right)
    return hidden


def logits_of(p: Problem, b: int, q_begin: int, k_begin: int, used_q: int, used_k: int, dtype):
    """[heads, rows, keys] with masks; the product in `dtype`, the rest in float32 at least."""
    import torch

    group = p.q.shape[-2] // p.k.shape[-2]
    q = take(p.q, b, q_begin, used_q).to(dtype).transpose(0, 1)
    k = take(p.k, b, k_begin, used_k).to(dtype).transpose(0, 1).repeat_interleave(group, 0)
    wide = torch.promote_types(dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1])
    logits = ((q * scale) @ k.transpose(1, 2)).to(wide)
    if p.alpha is not None:
        alpha = take(p.alpha.unsqueeze(-1), b, q_begin, used_q).to(wide).transpose(0, 1)
        delta = take(p.delta.unsqueeze(-1), b, k_begin, used_k).to(wide).transpose(0, 1)
        product = alpha @ delta.repeat_interleave(group, 0).transpose(1, 2)
        gate = torch.nn.functional.logsigmoid(product) if p.log_sigmoid else product
        logits = logits + gate * scale
    if p.softcap > 0:
        logits = p.softcap * torch.tanh(logits / p.softcap)
    if p.alibi is not None:
        slopes = (p.alibi[b] if p.alibi.dim() == 2 else p.alibi).to(wide)[:, None, None]
        i = torch.arange(used_q, device="cuda")[:, None] + used_k - used_q
        logits = logits - slopes * (i - torch.arange(used_k, device="cuda")[None]).abs()
    hidden = hidden_keys(p, used_q, used_k)
    hidden = hidden.repeat_interleave(logits.shape[0] // hidden.shape[0], 0)
    return logits.masked_fill(hidden, -math.inf)


def reference(p: Problem, b: int, q_begin: int, k_begin: int, used_q: int, used_k: int, dtype):
    """[rows, heads, dim] and [heads, rows] of one sequence; float64, or naively in the tensors' own type."""
    import torch

    group = p.q.shape[-2] // p.k.shape[-2]
    logits = logits_of(p, b, q_begin, k_begin, used_q, used_k, dtype)
    v = take(p.v, b, k_begin, used_k).to(dtype).transpose(0, 1).repeat_interleave(group, 0)
    lse = torch.full(logits.shape[:2], -math.inf, dtype=logits.dtype, device="cuda")
    if used_k:
        lse = torch.logsumexp(logits, -1)
    if p.sink is not None:
        lse = torch.logaddexp(lse, p.sink.to(lse.dtype)[:, None].expand_as(lse))
    probability = torch.exp(logits - lse[..., None]).masked_fill(logits.isneginf(), 0).to(dtype)
    return (probability @ v).transpose(0, 1), lse


def judge(p: Problem, out, lse, lse_tolerance: float = 1e-4) -> tuple[float, float, str]:
    """Largest error over that of the naive computation, largest lse error, and what is wrong ("" if nothing)."""
    import torch

    worst, worst_lse, wrong = 0.0, 0.0, ""
    for b, (q0, q1), (k0, _), used_q, used_k in sequences(p):
        got = take(out, b, q0, q1 - q0)
        got_lse = lse[:, q0:q1] if p.q.dim() == 3 else lse[b]
        if got[used_q:].any() or not torch.isneginf(got_lse[:, used_q:]).all():
            wrong = "rows beyond the used length"
        exact, exact_lse = reference(p, b, q0, k0, used_q, used_k, torch.float64)
        naive, _ = reference(p, b, q0, k0, used_q, used_k, p.q.dtype)
        got, got_lse = got[:used_q].double(), got_lse[:, :used_q].double()
        if not got.isfinite().all() or not (got_lse.isneginf() == exact_lse.isneginf()).all():
            wrong = "NaN or a wrong empty row"
        empty = exact_lse.isneginf()
        if got.transpose(0, 1)[empty].any():
            wrong = "empty row not zero"
        if used_q == 0 or used_k == 0:
            continue
        error = (got - exact).abs().max().item()
        allowed = (naive.double() - exact).abs().max().item()
        worst = max(worst, error / max(allowed, 1e-6))
        difference = (got_lse - exact_lse).masked_fill(empty, 0).abs().max().item()
        worst_lse = max(worst_lse, difference if difference == difference else math.inf)
    if not worst <= 2:
        wrong = wrong or "error above twice that of the naive computation"
    if not worst_lse <= lse_tolerance:
        wrong = wrong or "lse"
    return worst, worst_lse, wrong


def check_cases(head_dim: int, dtype):
    """Names and problems, small enough for a float64 reference."""
    import torch

    def tensor(*shape: int):
        return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)

    def batched(
        batch: int, seqlen_q: int, seqlen_k: int, heads: int, kv_heads: int, **options: object
    ) -> Problem:
        return Problem(
            tensor(batch, seqlen_q, heads, head_dim), tensor(batch, seqlen_k, kv_heads, head_dim),
            tensor(batch, seqlen_k, kv_heads, head_dim), **options,
        )  # fmt: skip

    def int32(values: list[int]):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    for causal in (False, True):
        right = {"window_right": 0} if causal else {}
        mask = "causal" if causal else "full"
        yield f"{mask} 512", batched(2, 512, 512, 4, 4, **right)
        yield f"{mask} 1 x 1", batched(1, 1, 1, 2, 2, **right)
        yield f"{mask} 203 x 1027, 6/2 heads", batched(2, 203, 1027, 6, 2, **right)
        yield f"{mask} 600 x 70", batched(1, 600, 70, 2, 1, **right)
        yield f"{mask} 2048, many tiles", batched(3, 2048, 2048, 8, 8, **right)

        lengths_q, lengths_k = [0, 130, 1, 700, 64, 5], [40, 130, 300, 651, 0, 1000]
        cu_q, cu_k = ([0, *itertools.accumulate(x)] for x in (lengths_q, lengths_k))
        yield (
            f"{mask} packed",
            Problem(
                tensor(cu_q[-1], 4, head_dim), tensor(cu_k[-1], 2, head_dim), tensor(cu_k[-1], 2, head_dim),
                cu_seqlens_q=int32(cu_q), cu_seqlens_k=int32(cu_k), max_seqlen_q=700, max_seqlen_k=1000, **right,
            ),
        )  # fmt: skip

        used = batched(
            3, 300, 500, 4, 4, seqused_q=int32([300, 0, 77]), seqused_k=int32([450, 500, 129]), **right
        )
        for b, _, _, used_q, used_k in sequences(used):
            used.q[b, used_q:] = math.nan
            used.k[b, used_k:] = math.nan
            used.v[b, used_k:] = math.nan
        yield f"{mask} NaN beyond the used lengths", used
    yield "window 100 left, causal", batched(2, 1000, 1000, 4, 2, window_left=100, window_right=0)
    yield "window 37 left, 300 right", batched(1, 700, 900, 2, 2, window_left=37, window_right=300)
    large = batched(1, 777, 777, 2, 2, window_right=0)
    growth = torch.linspace(0, 3, 777, device="cuda", dtype=dtype)[:, None, None]
    yield "large logits", replace(large, q=large.q * 12, k=large.k * growth)


def topics(batch: int, seqlen: int, heads: int, kv_heads: int, head_dim: int, dtype):
    """q, k, v whose 256-token segments draw one of ten directions: about a tenth of the tiles matters."""
    import torch

    directions = torch.nn.functional.normalize(torch.randn(10, head_dim, device="cuda"), dim=-1)
    segment = torch.randint(10, (batch, -(-seqlen // 256)), device="cuda").repeat_interleave(256, 1)[
        :, :seqlen
    ]
    base = math.sqrt(14 * math.sqrt(head_dim)) * directions[segment][:, :, None]

    def noisy(count: int):
        return (base + 0.3 * torch.randn(batch, seqlen, count, head_dim, device="cuda")).to(dtype)

    return (
        noisy(heads),
        noisy(kv_heads),
        torch.randn(batch, seqlen, kv_heads, head_dim, device="cuda").to(dtype),
    )


def map_bits(p: Problem, bits, b: int, head: int, row_tile: int, tiles: int) -> list[bool]:
    """The key tiles of a row tile in a skip map or gate bitmap."""
    first = 0 if p.cu_seqlens_q is None else int(p.cu_seqlens_q[b]) // 64 + b
    words = bits[head, first + row_tile] if p.q.dim() == 3 else bits[b, head, row_tile]
    words = [w & 0xFFFFFFFF for w in words.tolist()]
    return [bool(words[t // 32] >> (t % 32) & 1) for t in range(tiles)]


def replay_gate(p: Problem, b: int, head: int, row_tile: int, logits, gate_open: list[bool], n: int) -> str:
    """The gate test in float64 on the kernel's own history; what is wrong, or ""."""
    import torch

    _, (q0, _), (k0, _), used_q, used_k = list(sequences(p))[b]
    group, scale = p.q.shape[-2] // p.k.shape[-2], LOG2E / math.sqrt(p.q.shape[-1])
    begin, end = 64 * row_tile, min(64 * row_tile + 64, used_q)
    alpha = take(p.alpha.unsqueeze(-1), b, q0, used_q)[begin:end, head, 0].double()
    delta = take(p.delta.unsqueeze(-1), b, k0, used_k)[:, head // group, 0].double()
    gamma = p.gate_threshold or 1 / used_k
    if p.adaptive_gate and p.causal_lengths:
        gamma *= (begin + used_k - used_q + 1) / used_k
    best = -math.inf
    for tile in reversed(range(-(-used_k // n))):
        sees = bool((~logits[:, tile * n : (tile + 1) * n].isneginf()).any())
        if not sees:
            if gate_open[tile]:
                return f"gate: tile {tile} of row tile {row_tile} is open but not visible"
            continue
        part = delta[tile * n : (tile + 1) * n]
        products = torch.stack([x * y for x in (alpha.min(), alpha.max()) for y in (part.min(), part.max())])
        c = products.max()
        c = (torch.nn.functional.logsigmoid(c) if p.log_sigmoid else c).item()
        margin = (c - best) * scale - math.log2(gamma) if math.isfinite(best) and gamma > 0 else math.inf
        if margin > 1e-2 and not gate_open[tile] or margin < -1e-2 and gate_open[tile]:
            return f"gate: tile {tile} of row tile {row_tile}, head {head}: margin {margin:.3g}"
        if gate_open[tile]:
            best = max(best, c)
    return ""


def judge_threshold(p: Problem, out, lse, block_n: int) -> tuple[float, float, float, str]:
    """Replays the kernel's own decisions in float64: error ratio, lse error, kept share, what is wrong."""
    import torch

    group = p.q.shape[-2] // p.k.shape[-2]
    worst = worst_lse = 0.0
    wrong, kept_count, visible_count = "", 0, 0
    for b, (q0, _), (k0, _), used_q, used_k in sequences(p):
        all_logits = logits_of(p, b, q0, k0, used_q, used_k, torch.float64)
        all_naive = logits_of(p, b, q0, k0, used_q, used_k, p.q.dtype)
        tiles = -(-used_k // block_n)
        for head, row_tile in itertools.product(range(p.q.shape[-2]), range(-(-used_q // 64))):
            begin, end = 64 * row_tile, min(64 * row_tile + 64, used_q)
            v = take(p.v, b, k0, used_k)[:, head // group].double()
            logits = all_logits[head, begin:end]
            i = torch.arange(begin, end, device="cuda") + used_k - used_q
            length = i + 1 if p.causal_lengths else torch.full_like(i, used_k)
            cut = (p.threshold / length.clamp(min=1)).clamp(0, 1).log2()
            total = torch.full((end - begin,), -math.inf, dtype=torch.float64, device="cuda")
            kept = map_bits(p, p.skip_map, b, head, row_tile, tiles)
            gate_open = [True] * tiles
            if p.gate_test:
                gate_open = map_bits(p, p.gate_bits, b, head, row_tile, tiles)
                wrong = wrong or replay_gate(p, b, head, row_tile, logits, gate_open, block_n)
            keep_column = torch.zeros(used_k, dtype=torch.bool, device="cuda")
            for tile in reversed(range(tiles)):
                part = logits[:, tile * block_n : (tile + 1) * block_n]
                top = part.amax(1)
                sees = ~top.isneginf()
                visible_count += bool(sees.any())
                kept_count += kept[tile]
                if p.threshold > 0 and gate_open[tile]:
                    # How far above its cut the tile lies, in log2 units; a row's first keys always count.
                    margin = torch.where(total.isneginf(), math.inf, (top - total) * LOG2E - cut)[sees]
                    highest = margin.max().item() if margin.numel() else -math.inf
                    bad = highest > 1e-2 and not kept[tile] or highest < -1e-2 and kept[tile]
                else:
                    highest, bad = 0.0, kept[tile] != (gate_open[tile] and bool(sees.any()))
                if bad:
                    place = f"tile {tile} of row tile {row_tile}, head {head}"
                    wrong = wrong or f"{place}: margin {highest:.3g}, kept {kept[tile]}"
                if kept[tile]:
                    keep_column[tile * block_n : (tile + 1) * block_n] = True
                    total = torch.logaddexp(total, torch.logsumexp(part, 1))
            chosen = logits.masked_fill(~keep_column[None], -math.inf)
            low = all_naive[head, begin:end].masked_fill(~keep_column[None], -math.inf)
            if p.sink is not None:
                total = torch.logaddexp(total, p.sink[head].double())
                low = torch.cat([low, p.sink[head].to(low.dtype).expand(end - begin, 1)], 1)
            exact = torch.exp(chosen - total[:, None]).nan_to_num(0) @ v
            naive = torch.softmax(low, -1)[:, :used_k].nan_to_num(0).to(p.q.dtype) @ v.to(p.q.dtype)
            got = take(out, b, q0, used_q)[begin:end, head].double()
            got_lse = (
                lse[head, q0 + begin : q0 + end] if p.q.dim() == 3 else lse[b, head, begin:end]
            ).double()
            allowed = max((naive.double() - exact).abs().max().item(), 1e-3)
            error = (got - exact).abs().max().item()
            worst = max(worst, error / allowed if error == error else math.inf)
            difference = (
                (got_lse - total).masked_fill(total.isneginf() & got_lse.isneginf(), 0).abs().max().item()
            )
            worst_lse = max(worst_lse, difference if difference == difference else math.inf)
    if not worst <= 2 or not worst_lse <= 2e-4:
        wrong = wrong or f"error ratio {worst:.3g}, lse {worst_lse:.2g}"
    return worst, worst_lse, kept_count / max(visible_count, 1), wrong


def new_skip_map(p: Problem, block_n: int):
    import torch

    packed = p.cu_seqlens_q is not None
    batch = p.cu_seqlens_q.shape[0] - 1 if packed else p.q.shape[0]
    row_tiles = p.q.shape[0] // 64 + batch if packed else -(-p.q.shape[1] // 64)
    key_tiles = -(-(p.max_seqlen_k if packed else p.k.shape[1]) // block_n)
    words = -(-key_tiles // 32)
    shape = (p.q.shape[-2], row_tiles, words) if packed else (batch, p.q.shape[-2], row_tiles, words)
    return torch.zeros(shape, dtype=torch.int32, device="cuda")
