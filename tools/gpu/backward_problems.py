# SPDX-License-Identifier: Apache-2.0
"""Problems of the Hopper backward, their gradients in float64, and what is right beside them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from backward_launch import (
    DENSE,
    TILED,
    Gradients,
    config_of,
)
from features import pair_gate, random_blocks
from forward_launch import Problem
from forward_problems import hidden_keys, logits_of, map_bits, new_skip_map, sequences, take


def kept_keys(p: Problem, b: int, used_q: int, used_k: int, block_n: int):
    """bool [heads, rows, keys] of a skip map."""
    import torch

    tiles = -(-used_k // block_n)
    kept = torch.zeros(p.q.shape[-2], -(-used_q // 64), tiles, dtype=torch.bool, device="cuda")
    for head in range(p.q.shape[-2]):
        for row_tile in range(kept.shape[1]):
            kept[head, row_tile] = torch.tensor(map_bits(p, p.gate_bits, b, head, row_tile, tiles))
    return kept.repeat_interleave(64, 1)[:, :used_q].repeat_interleave(block_n, 2)[:, :, :used_k]


def attend(p: Problem, dtype, block_n: int):
    """Per sequence: where its rows are, out [rows, heads, dim] and lse [heads, rows]; differentiable."""
    import torch

    group = p.q.shape[-2] // p.k.shape[-2]
    for b, (q0, _), (k0, _), used_q, used_k in sequences(p):
        logits = logits_of(p, b, q0, k0, used_q, used_k, dtype)
        if p.gate_bits is not None:
            logits = logits.masked_fill(~kept_keys(p, b, used_q, used_k, block_n), -math.inf)
        hidden = logits.isneginf()
        v = take(p.v, b, k0, used_k).to(dtype).transpose(0, 1).repeat_interleave(group, 0)
        if p.sink is not None:
            term = p.sink.to(logits.dtype)[:, None, None].expand(-1, used_q, 1)
            logits = torch.cat([logits, term], -1)
        empty = logits.isneginf().all(-1, keepdim=True)
        finite = logits.masked_fill(empty, 0.0)
        lse = torch.logsumexp(torch.cat([finite, torch.full_like(finite[..., :1], -1e30)], -1), -1)
        probability = torch.exp(finite - lse[..., None])[..., :used_k].masked_fill(hidden, 0).to(dtype)
        yield b, q0, used_q, (probability @ v).transpose(0, 1), lse.masked_fill(empty[..., 0], -math.inf)


LEAVES = ("q", "k", "v", "alpha", "delta", "sink")


def differentiate(p: Problem, given: Gradients, dtype, block_n: int) -> dict:
    """Gradients by autograd; in float64, or naively in the tensors' own type."""
    leaves = {}
    for name in LEAVES:
        tensor = getattr(p, name)
        if tensor is not None:
            leaves[name] = tensor.detach().to(dtype).clone().requires_grad_()
    total = 0.0
    for b, q0, used, out, lse in attend(replace(p, **leaves), dtype, block_n):
        total = total + (out.double() * take(given.grad_out, b, q0, used).double()).sum()
        if given.grad_lse is not None:
            part = given.grad_lse[:, q0 : q0 + used] if p.q.dim() == 3 else given.grad_lse[b, :, :used]
            total = total + (lse.masked_fill(lse.isneginf(), 0).double() * part.double()).sum()
    if not isinstance(total, float):
        total.backward()
    return {name: leaf.grad if leaf.grad is not None else leaf.detach() * 0 for name, leaf in leaves.items()}


def given_for(p: Problem, block_n: int, with_lse: bool = False) -> Gradients:
    """out and lse as a forward would return them, and random gradients; NaN in rows that are not used."""
    import torch

    out = torch.zeros(*p.q.shape[:-1], p.v.shape[-1], dtype=p.q.dtype, device="cuda")
    lse = torch.full((*p.q.shape[:-3], p.q.shape[-2], p.q.shape[-3]), -math.inf, device="cuda")
    grad_out = torch.full_like(out, math.nan)
    grad_lse = torch.full_like(lse, math.nan) if with_lse else None
    with torch.no_grad():
        for b, q0, used, exact, exact_lse in attend(p, torch.float64, block_n):
            take(out, b, q0, used).copy_(exact)
            (lse[:, q0 : q0 + used] if p.q.dim() == 3 else lse[b, :, :used]).copy_(exact_lse)
            random = torch.randn(used, *out.shape[-2:], device="cuda")
            take(grad_out, b, q0, used).copy_(random)
            if with_lse:
                part = grad_lse[:, q0 : q0 + used] if p.q.dim() == 3 else grad_lse[b, :, :used]
                part.copy_(torch.randn_like(part))
    return Gradients(out, lse, grad_out, grad_lse)


def judge(p: Problem, given: Gradients, got: dict, block_n: int) -> tuple[float, str]:
    """Largest error over that of the naive computation, and what is wrong ("" if nothing)."""
    exact = differentiate(p, given, __import__("torch").float64, block_n)
    naive = differentiate(p, given, p.q.dtype, block_n)
    unused = {"q": given.lse.isneginf().transpose(-1, -2)}  # [.., rows, heads]
    if p.sink is not None:
        unused = {}
    unused["k"] = unused["v"] = __import__("torch").ones(p.k.shape[:-1], dtype=bool, device="cuda")
    for b, _, (k0, _), _, used_k in sequences(p):
        take(unused["k"].unsqueeze(-1), b, k0, used_k).zero_()
    worst, wrong = 0.0, ""
    for name, value in got.items():
        if not value.isfinite().all():
            return math.inf, f"NaN in the gradient of {name}"
        allowed = (naive[name].double() - exact[name].double()).abs().max().item() if value.numel() else 0
        error = (value.double() - exact[name].double()).abs().max().item() if value.numel() else 0
        # Sums of few numbers: the naive error may be anything down to zero.
        floor = 1e-3 if name in ("q", "k", "v") else exact[name].abs().max().item() * 2**-8
        ratio = error / max(allowed, floor, 1e-6)
        if not ratio <= 2:
            wrong += f" {name}: {error:.2e}, allowed twice {allowed:.2e};"
        worst = max(worst, ratio)
        if name in unused and value[unused[name]].any():
            wrong += f" {name}: a row that takes no part is not zero;"
    return worst, wrong


def random_bits(p: Problem, block_n: int, density: float):
    """A skip map with some of the visible tiles; others stay 0."""
    import torch

    bits = new_skip_map(p, block_n)
    for b, (q0, _), _, used_q, used_k in sequences(p):
        seen = ~hidden_keys(p, used_q, used_k)
        for head, row_tile in itertools.product(range(p.q.shape[-2]), range(-(-used_q // 64))):
            part = seen[head * seen.shape[0] // p.q.shape[-2], 64 * row_tile : 64 * row_tile + 64].any(0)
            first = 0 if p.cu_seqlens_q is None else q0 // 64 + b
            words = bits[head, first + row_tile] if p.q.dim() == 3 else bits[b, head, row_tile]
            values = [0] * len(words)
            for tile in range(-(-used_k // block_n)):
                if part[tile * block_n : (tile + 1) * block_n].any() and torch.rand(1).item() < density:
                    values[tile // 32] |= 1 << tile % 32
            words.copy_(torch.tensor([v - (1 << 32) if v >> 31 else v for v in values], dtype=torch.int32))
    return replace(p, gate_bits=bits)


def batched(
    batch: int,
    rows: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
    dtype,
    **options: object,
) -> Problem:
    import torch

    def tensor(*shape: int):
        return torch.randn(*shape, device="cuda").to(dtype)

    return Problem(tensor(batch, rows, heads, dims[0]), tensor(batch, keys, kv_heads, dims[0]),
                   tensor(batch, keys, kv_heads, dims[1]), **options)  # fmt: skip


def int32(values: list):
    import torch

    return torch.tensor(values, dtype=torch.int32, device="cuda")


def packed(lengths_q: list[int], lengths_k: list[int], tail: int, heads: int, kv_heads: int,
           dims: tuple[int, int], dtype, **options: object) -> Problem:  # fmt: skip
    """Sequences one after the other, and `tail` rows behind them, full of NaN."""
    import torch

    cu_q, cu_k = ([0, *itertools.accumulate(x)] for x in (lengths_q, lengths_k))

    def tensor(rows: int, *shape: int):
        values = torch.randn(rows + tail, *shape, device="cuda").to(dtype)
        values[rows:] = math.nan
        return values

    return Problem(tensor(cu_q[-1], heads, dims[0]), tensor(cu_k[-1], kv_heads, dims[0]),
                   tensor(cu_k[-1], kv_heads, dims[1]), cu_seqlens_q=int32(cu_q), cu_seqlens_k=int32(cu_k),
                   max_seqlen_q=max(lengths_q), max_seqlen_k=max(lengths_k), **options)  # fmt: skip


def dense_cases(dims: tuple[int, int], dtype, mask: dict):
    """Names and problems of one mask (the windows of a Problem)."""
    d = dims
    yield "512", batched(2, 512, 512, 4, 4, d, dtype, **mask)
    yield "1 x 1", batched(1, 1, 1, 2, 2, d, dtype, **mask)
    yield "203 x 1027, 6/2 heads", batched(2, 203, 1027, 6, 2, d, dtype, **mask)
    yield "600 x 70", batched(1, 600, 70, 2, 1, d, dtype, **mask)
    yield "many tiles", batched(3, 1300, 1300, 8, 4, d, dtype, **mask)
    yield "odd head_dim", batched(1, 333, 333, 2, 2, (d[0] - 8, d[1] - 24), dtype, **mask)
    yield "packed", packed([0, 130, 1, 700, 64, 5], [40, 130, 300, 651, 0, 1000], 19, 4, 2, d, dtype, **mask)
    used = batched(3, 300, 500, 4, 4, d, dtype, seqused_q=int32([300, 0, 77]), seqused_k=int32([450, 500, 129]),
                   **mask)  # fmt: skip
    for b, _, _, used_q, used_k in sequences(used):
        used.q[b, used_q:] = math.nan
        used.k[b, used_k:] = math.nan
        used.v[b, used_k:] = math.nan
    yield "NaN beyond the used lengths", used


def cases(elements: list[str]) -> dict:
    """Name -> configuration and problems (as a function of nothing, so that listing them needs no GPU)."""
    found = {}
    windows = {"full": {}, "causal": {"window_right": 0}, "window": {"window_left": 100, "window_right": 30}}
    for element, dims in itertools.product(elements, DENSE):
        for name, mask in windows.items():

            def problems(element=element, dims=dims, mask=mask):
                import torch

                yield from dense_cases(dims, torch.bfloat16 if element == "bf16" else torch.float16, mask)

            options = {"left": name == "window", "right": name != "full"}
            found[f"{name} {dims[0]}x{dims[1]} {element}"] = (config_of(dims, element, **options), problems)
            if element == "bf16" and name != "window":
                key = f"deterministic {name} {dims[0]}x{dims[1]}"
                found[key] = (config_of(dims, element, deterministic=True, **options), problems)
    for dims in DENSE:
        found |= policy_cases(dims)
    return found


def policy_cases(dims: tuple[int, int]) -> dict:
    """One configuration per feature, in bf16."""
    label, causal = f"{dims[0]}x{dims[1]}", {"window_right": 0}

    def shapes(options: object, **mask: int):
        """A batched and a packed problem, and `options`: names of fields -> functions of the problem."""

        def problems():
            import torch

            for name, p in (
                ("batched", batched(2, 700, 900, 4, 2, dims, torch.bfloat16, **mask)),
                (
                    "packed",
                    packed([130, 0, 300, 70], [300, 5, 300, 0], 37, 4, 2, dims, torch.bfloat16, **mask),
                ),
            ):
                yield name, replace(p, **{key: make(p) for key, make in options.items()})

        return problems

    def random(*shape: int, scale: float = 1.0, dtype: object = None):
        import torch

        return (torch.randn(*shape, device="cuda") * scale).to(dtype or torch.bfloat16)

    def heads(p: Problem) -> int:
        return p.q.shape[-2]

    alibi = {"alibi": lambda p: random(heads(p)).abs() * 0.1}
    sink = {"sink": lambda p: random(heads(p))}
    gate = {"alpha": lambda p: random(*p.q.shape[:-1]), "delta": lambda p: random(*p.k.shape[:-1])}
    small_gate = {
        "alpha": lambda p: random(*p.q.shape[:-1], scale=0.5), "delta": lambda p: random(*p.k.shape[:-1], scale=0.5),
    }  # fmt: skip
    softcap = {"softcap": lambda p: 5.0}
    linear = {"log_sigmoid": lambda p: False}
    linear_gate = pair_gate(dims[0], log_sigmoid=False)
    rows = {
        "softcap": (("Softcap",), softcap, {}), "softcap exact": (("SoftcapExact",), softcap, {}),
        "alibi": (("Alibi",), alibi, {}), "sink": ((), sink, {"sink": True}),
        "linear gate": ((linear_gate,), small_gate | linear, {}),
        "gate": ((pair_gate(dims[0]),), gate, {}), "small gate": ((pair_gate(dims[0]),), small_gate, {}),
        "all logits": ((linear_gate, "Softcap", "Alibi"), gate | softcap | alibi | sink | linear, {"sink": True}),
    }  # fmt: skip
    found = {
        f"{name} {label}": (config_of(dims, right=True, logit=logit, **extra), shapes(options, **causal))
        for name, (logit, options, extra) in rows.items()
    }

    block_n = TILED[dims][1]
    for name, mask in {
        "full": {},
        "causal": causal,
        "window": {"window_left": 300, "window_right": 10},
    }.items():
        for deterministic in (False, True):

            def problems(mask=mask):
                for case, p in shapes({}, **mask)():
                    yield case, random_bits(p, block_n, 0.3)

            key = f"map {name}{' deterministic' * deterministic} {label}"
            config = config_of(dims, left=name == "window", right=name != "full", bits=True,
                               deterministic=deterministic)  # fmt: skip
            found[key] = (config, problems)

    def gated():
        for case, p in shapes(gate, **causal)():
            yield case, random_bits(p, block_n, 0.3)

    options = {"right": True, "bits": True, "logit": (pair_gate(dims[0]),), "deterministic": True}
    found[f"map gate {label}"] = (config_of(dims, **options), gated)

    def bands():
        import torch

        sizes = [[0, 0, 0, 100], [70, 200, 130, 64], [128, 0, 50, 1], [0, 150, 0, 33], [5, 300, 600, 0]]
        yield "square", batched(1, 1300, 1300, 10, 5, dims, torch.bfloat16, window_sizes=int32(sizes))
        yield "batched", batched(2, 300, 900, 5, 5, dims, torch.bfloat16, window_sizes=int32(sizes))
        p = packed([130, 90, 70], [300, 5, 900], 3, 5, 5, dims, torch.bfloat16)
        yield "packed", replace(p, window_sizes=int32(sizes))

    def blocks():
        import torch

        p = batched(1, 700, 900, 2, 1, dims, torch.bfloat16)
        yield "128 x 128", replace(p, blocks=random_blocks(2, 700, 900, 128, 128, 0.5))
        p = batched(2, 300, 900, 2, 1, dims, torch.bfloat16)
        yield "64 x 256, shared", replace(p, blocks=random_blocks(1, 300, 900, 64, 256, 0.3))

    for deterministic in (False, True):
        key = f"blocks{' deterministic' * deterministic} {label}"
        found[key] = (config_of(dims, mask="list", deterministic=deterministic), blocks)
    found[f"bands {label}"] = (config_of(dims, mask="band"), bands)
    return found
