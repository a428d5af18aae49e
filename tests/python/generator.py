# SPDX-License-Identifier: Apache-2.0
"""Draws whole attention problems at random; a seed and a number name each of them for ever.

python tests/python/generator.py --seed 0 --case 17              describe and check one problem
python tests/python/generator.py --seed 5 --cases 20000          check many, stop at the first failure
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from cases import Case, Lengths, Problem, build, packing, tile_keys

EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)
HEAD_DIMS = (1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 72, 80, 96, 100, 112, 127, 128)
WIDE_HEAD_DIMS = (129, 136, 160, 191, 192, 224, 255, 256, 257, 320, 384, 448, 511, 512)


@dataclasses.dataclass
class Drawn:
    """A problem and how it came about."""

    problem: Problem
    grad_kind: str
    lse_grad: bool
    layouts: dict[str, str]

    def __str__(self) -> str:
        plain = Case()
        fields = dataclasses.fields(Case)
        case = self.problem.case
        changed = [
            f"{f.name}={getattr(case, f.name)!r}"
            for f in fields
            if getattr(case, f.name) != getattr(plain, f.name)
        ]
        layouts = ", ".join(f"{name}: {kind}" for name, kind in self.layouts.items())
        grads = f"grad_out {self.grad_kind}, {'with' if self.lse_grad else 'no'} grad_lse"
        return f"{self.problem.dtype}, {', '.join(changed)}; {layouts or 'contiguous'}; {grads}"


def _length(rng: random.Random, limit: int) -> int:
    edges = [e for e in EDGES if e <= limit]
    return rng.choice(edges) if rng.random() < 0.5 else rng.randint(min(1, limit), limit)


def _draw_lengths(rng: random.Random, batch: int, maximum: int, packed: bool) -> Lengths | None:
    """Per-sequence lengths, one of them the maximum when packed; None = all full, not packed."""
    if not packed:
        if rng.random() < 0.7:
            return None
        return Lengths((maximum,) * batch, tuple(_length(rng, maximum) for _ in range(batch)))
    held = [maximum] + [_length(rng, maximum) if rng.random() < 0.85 else 0 for _ in range(batch - 1)]
    rng.shuffle(held)
    if rng.random() < 0.7:
        return Lengths(tuple(held))
    return Lengths(tuple(held), tuple(rng.randint(0, h) if rng.random() < 0.5 else h for h in held))


def _window_sizes(rng: random.Random, heads: int) -> tuple[tuple[int, ...], ...]:
    def row() -> tuple[int, ...]:
        return (rng.choice((0, 0, 1, 4, 64, 130)), rng.choice((0, 1, 30, 200)), rng.choice((0, 7, 100, 300)),
                rng.choice((0, 1, 2, 40, 128, 500)))  # fmt: skip

    return tuple(row() for _ in range(heads))


def draw_case(rng: random.Random) -> tuple[Case, str]:
    """A random row of the table, and a dtype."""
    dtype = rng.choices(("float32", "bfloat16", "float16", "float64"), (45, 25, 20, 10))[0]
    forms = ("batched", "packed", "paged", "decode", "decode_packed", "decode_paged", "decode_gathered")
    form = rng.choices(forms + ("decode_gathered_packed", "packed_paged"), (43, 19, 7, 9, 6, 6, 4, 3, 3))[0]
    decode, paged = form.startswith("decode"), "paged" in form
    packed_q, packed_k = packing(form)
    sparse = rng.random() < 0.4
    wide = rng.random() < 0.12
    head_dim = rng.choice(WIDE_HEAD_DIMS if wide else HEAD_DIMS)
    if sparse and head_dim < 16:
        head_dim = rng.choice((32, 48, 64, 80))
    head_dim_v = (
        head_dim if rng.random() < 0.6 else rng.choice(WIDE_HEAD_DIMS if rng.random() < 0.1 else HEAD_DIMS)
    )
    num_kv_heads, group = rng.choice(((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (1, 5), (3, 1), (2, 4), (1, 8)))
    batch = rng.choice((1, 1, 2, 2, 3))
    if sparse:
        num_kv_heads, group = rng.choice(((1, 1), (1, 2), (2, 1), (2, 2)))
        batch = rng.choice((1, 1, 2))
    tile = tile_keys(head_dim)
    if decode:
        seqlen_q = 1
        seqlen_k = rng.randint(8 * tile, 20 * tile) if sparse else _length(rng, 600)
    elif sparse:
        seqlen_k = rng.randint(2 * tile, 7 * tile)
        seqlen_q = rng.choice(
            (seqlen_k, rng.randint(1, 2 * seqlen_k), rng.randint(1, 130), min(seqlen_k, 700))
        )
        seqlen_q = min(seqlen_q, 900)
    else:
        limit = rng.choice((20, 140, 300))
        seqlen_q, seqlen_k = _length(rng, limit), _length(rng, limit)
        if rng.random() < 0.3:
            seqlen_k = seqlen_q
    changes: dict[str, Any] = {}
    if rng.random() < (0.75 if sparse else 0.4):
        changes["causal"] = not decode
    mask = rng.random()
    if form.startswith("decode_gathered"):
        mask = 1.0  # windows are refused there
    if mask < 0.2:
        left, right = (rng.choice((-1, 0, 1, 7, 64, 100, 300)) for _ in range(2))
        changes["window_size"] = (left, right)
    elif mask < 0.35:
        changes["window_sizes"] = _window_sizes(rng, num_kv_heads)
    if rng.random() < 0.15:
        changes["softmax_scale"] = rng.choice((0.02, 0.1, 0.3))
    if not decode:
        if rng.random() < 0.15:
            changes["softcap"] = rng.choice((3.0, 20.0, 50.0))
            changes["inputs"] = "softcap"
        if rng.random() < 0.15:
            changes["alibi"] = "batch" if rng.random() < 0.5 else "heads"
        changes["sink"] = rng.random() < 0.2
    if rng.random() < 0.05:
        changes["inputs"] = "large"
    kinds = rng.choices(("threshold", "gate", "both"), (50, 30, 20))[0] if sparse else "none"
    if kinds in ("threshold", "both"):
        changes["threshold"] = rng.choice((1.0, 1.0, 1.0, 0.1, 10.0, 1e-30, 1e9))
        changes["inputs"] = "topics"
        changes["segment"] = rng.choice((64, 128, 256))
        if changes.get("softcap"):
            changes["softcap"] = 50.0
    if kinds in ("gate", "both") or (not sparse and rng.random() < 0.15):
        changes["gate"] = rng.choice(("log_sigmoid", "log_sigmoid", "linear"))
        changes["adaptive_gate"] = rng.random() < 0.7
        changes["gate_layout"] = "bsh" if paged or rng.random() < 0.6 else "bhs"
        if kinds in ("gate", "both"):
            changes["gate_inputs"] = rng.choice(("tiles:0.2", "tiles:0.5", "tiles:0.5", "random"))
            changes["gate_threshold"] = rng.choice((None, None, 0.01, 0.5, 2.0))
        else:
            changes["gate_inputs"] = rng.choice(("random", "large"))
            changes["gate_threshold"] = rng.choice((0.0, -1.0))
    if paged:
        changes["page_size"] = rng.choice((1, 3, 16, 64, 100, 128, 256))
        seqlen_k = max(1, math.ceil(seqlen_k / changes["page_size"])) * changes["page_size"]
    if form.startswith("decode_gathered"):
        changes["top_k"] = rng.randint(1, seqlen_k + 1)
    lengths_q = None if decode else _draw_lengths(rng, batch, seqlen_q, packed_q)
    if paged:
        lengths_k = Lengths((seqlen_k,) * batch, tuple(_length(rng, seqlen_k) for _ in range(batch)))
    else:
        lengths_k = _draw_lengths(rng, batch, seqlen_k, packed_k)
    case = Case(
        "random",
        (),
        form,
        batch,
        seqlen_q,
        seqlen_k,
        num_kv_heads * group,
        num_kv_heads,
        head_dim,
        head_dim_v,
    )
    return case.replace(lengths_q=lengths_q, lengths_k=lengths_k, **changes), dtype


def with_block_mask(rng: random.Random, case: Case) -> Case:
    """Every fifth batched case gets a block mask. From a generator of its own: the other draws stay as they are."""
    if case.form != "batched" or rng.random() > 0.2:
        return case
    keys = tile_keys(case.head_dim) * rng.choice((1, 1, 2))
    rows, scope = rng.choice((64, 64, 128, 192)), rng.choice(("", "b", "h", "bh"))
    return case.replace(block_mask=(rows, keys, scope, None))


def _gapped(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements inside a larger tensor of NaN, the last stride 1."""
    if tensor.dtype == torch.int32:
        wide = torch.full([2 * n for n in tensor.shape], -(2**31), dtype=torch.int32)
        inner = wide[tuple(slice(0, 2 * n, 2) for n in tensor.shape)]
    else:
        wide = torch.full(
            [n + 1 for n in tensor.shape[:-1]] + [tensor.shape[-1] + 5], math.nan, dtype=tensor.dtype
        )
        inner = wide[tuple(slice(1, 1 + n) for n in tensor.shape)]
    inner.copy_(tensor)
    return inner


def _absurd(tensor: torch.Tensor) -> torch.Tensor:
    """Strides of size-1 dimensions that no memory could hold."""
    strides = [
        2**40 + 3 if n == 1 else stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return tensor.as_strided(tensor.shape, strides)


def _relayout(rng: random.Random, problem: Problem) -> dict[str, str]:
    """Gives the tensors of a problem random memory layouts, in place."""
    layouts = {}
    case, tensors = problem.case, problem.tensors
    for name in list(tensors):
        tensor = tensors[name]
        kind = "contiguous"
        if tensor.dtype == torch.int32:
            # Index tensors may have any strides.
            kind = "gapped" if name != "window_sizes" and rng.random() < 0.15 else kind
        elif tensor.dim() >= 2:
            kinds = ["contiguous"] * 4 + ["gapped", "absurd"]
            if tensor.dim() == 4:
                kinds += ["heads_first", "heads_first"]
                full = case.lengths_q is None and case.lengths_k is None and case.batch > 1
                kinds += ["expanded_batch"] if full and "paged" not in case.form else []
            if name in ("key", "value"):
                kinds += ["expanded_heads"]
            kind = rng.choice(kinds)
        if kind == "gapped":
            tensor = _gapped(tensor)
        elif kind == "absurd":
            tensor = _absurd(tensor)
        elif kind == "heads_first":
            tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        elif kind == "expanded_batch":
            tensor = tensor[:1].expand(tensor.shape)
        elif kind == "expanded_heads":
            tensor = tensor[..., :1, :].expand(tensor.shape)
        if kind != "contiguous":
            tensors[name], layouts[name] = tensor, kind
    return layouts


def _add_tail(rng: random.Random, problem: Problem) -> None:
    """Tokens beyond cu_seqlens[-1], NaN."""
    for side, names in (("q", ("query", "alpha")), ("k", ("key", "value", "delta"))):
        if f"cu_seqlens_{side}" not in problem.tensors or rng.random() < 0.75:
            continue
        extra = rng.choice((1, 70))
        for name in names:
            if name not in problem.tensors:
                continue
            tensor = problem.tensors[name]
            bhs = name in ("alpha", "delta") and problem.case.gate_layout == "bhs"
            axis = 1 if bhs else 0
            shape = list(tensor.shape)
            shape[axis] = extra
            problem.tensors[name] = torch.cat([tensor, tensor.new_full(shape, math.nan)], dim=axis)


def draw(seed: int, index: int) -> Drawn:
    """Problem `index` of `seed`."""
    rng = random.Random(f"{seed}/{index}")
    case, dtype = draw_case(rng)
    case = with_block_mask(random.Random(f"{seed}/{index}/blocks"), case)
    gate_dtype = rng.choice((None, None, torch.float32, torch.float64)) if dtype != "float64" else None
    problem = build(case, dtype, seed=rng.randrange(2**31), gate_dtype=gate_dtype)
    if rng.random() < 0.5 and case.form == "packed":
        problem.options["max_seqlen_q"] = max(case.lengths_q.held) + rng.choice((0, 0, 3, 64))
        problem.options["max_seqlen_k"] = max(case.lengths_k.held) + rng.choice((0, 0, 3, 128))
    _add_tail(rng, problem)
    layouts = _relayout(rng, problem)
    grad_kind = rng.choices(("normal", "expanded", "transposed", "gapped"), (5, 2, 2, 1))[0]
    return Drawn(problem, grad_kind, rng.random() < 0.6, layouts)


def check(seed: int, index: int) -> None:
    """Draws and verifies one problem; the AssertionError says how to see it again."""
    import checks

    drawn = draw(seed, index)
    try:
        checks.verify(drawn.problem, index, drawn.grad_kind, drawn.lse_grad)
    except Exception as error:
        backend = os.environ.get("FSA_BACKEND", "")
        again = f"python tests/python/generator.py --seed {seed} --case {index}"
        again += f" --backend {backend}" if backend else ""
        raise AssertionError(f"{type(error).__name__}: {error}\n  {drawn}\n  again: {again}") from error


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="check this problem alone")
    parser.add_argument("--cases", type=int, default=500, help="check this many, from 0")
    parser.add_argument("--backend", help="as FSA_BACKEND")
    parser.add_argument("--keep-going", action="store_true", help="count failures instead of stopping")
    options = parser.parse_args()
    if options.backend:
        os.environ["FSA_BACKEND"] = options.backend
    torch.set_num_threads(1)  # the tensors are small: a second OpenMP thread would mostly spin
    if options.case is not None:
        print(draw(options.seed, options.case), flush=True)
    failures = 0
    for index in range(options.cases) if options.case is None else (options.case,):
        try:
            check(options.seed, index)
        except AssertionError as error:
            if not options.keep_going:
                raise
            failures += 1
            print(f"case {index}: {error}", flush=True)
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
