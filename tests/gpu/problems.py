# SPDX-License-Identifier: Apache-2.0
"""The case table and the random generator on the GPU, against the float64 oracle.

The main process computes on the GPU; worker processes compare on the CPU, with the oracle and the rules of
tests/python.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import checks
import decisions
import flash_sparse_attention as fsa
import oracle
import torch
from cases import Case, Problem, build, load_cases
from generator import draw, draw_case, with_block_mask
from torch import Tensor

DTYPES = ("bfloat16", "float16")
HALF = (torch.bfloat16, torch.float16)
GUARD = 64  # elements before and after out


@dataclasses.dataclass
class Named:
    name: str
    problem: Problem
    seed: int = 0  # of grad_out and grad_lse
    grad_kind: str = "normal"  # see checks.draw_grads
    lse_grad: bool = True


def select(part: str, args: argparse.Namespace) -> list[Named]:
    """The problems of a part, on the CPU."""
    return table() if part == "table" else drawn(args.seed, args.random)


def table() -> list[Named]:
    """Every row with a feature; every shape, with heads and mask that go round."""
    found = []
    for case in load_cases("test", "feature"):
        for dtype in DTYPES:
            found.append(Named(f"{case.name} {dtype}", build(case, dtype, seed=11)))
    for index, case in enumerate(load_cases("shape")):
        for turn, (heads, kv_heads) in enumerate(((3, 3), (4, 2), (3, 1))):
            mask = ("full", "causal", "window")[(index + turn) % 3]
            dtype, head_dim = DTYPES[turn % 2], (64, 128, 72, 192, 256)[(index + turn) % 5]
            rng = random.Random(f"{case.name} {turn}")
            changed = case.replace(
                num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim
            )
            if mask == "causal":
                changed = changed.replace(causal=True)
            elif mask == "window":
                left, right = rng.randrange(case.seqlen_k + 1), rng.randrange(case.seqlen_k + 1)
                changed = changed.replace(window_size=(left, right))
            name = f"{case.name} {dtype} {heads}/{kv_heads} d{head_dim} {mask}"
            found.append(Named(name, build(changed, dtype, seed=13)))
    return found


def drawn(seed: int, count: int) -> list[Named]:
    """The generator's first `count` problems that are neither decode nor paged and have 2-byte elements, without
    the block masks that are refused beside something else; and a tenth as many with a mask that is not."""
    found, masked, index = [], [], 0
    while len(found) < count or len(masked) < count // 10:
        case, dtype = draw_case(random.Random(f"{seed}/{index}"))
        case = with_block_mask(random.Random(f"{seed}/{index}/blocks"), case)
        room = len(found) < count or joins_blocks(case)
        if dtype in DTYPES and case.form in ("batched", "packed") and room:
            one = draw(seed, index)
            if not joins_blocks(case):
                one.problem.options.pop("block_mask", None)
            (found if len(found) < count else masked).append(
                Named(f"random {seed}/{index}: {one}", one.problem, index, one.grad_kind, one.lse_grad)
            )
        index += 1
    return found + masked


def joins_blocks(case: Case) -> bool:
    """Whether a problem has a block mask that the GPU takes."""
    alone = not (case.causal or case.window_size or case.window_sizes or case.gate or case.threshold)
    return case.block_mask is not None and alone and max(case.head_dim, case.head_dim_v) <= 256


def to_device(tensor: Tensor) -> Tensor:
    """The same layout in device memory, together with what lies between the elements."""
    if tensor.numel() == 0:
        return tensor.cuda()
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(problem: Problem) -> dict[str, Any]:
    """Arguments of attention()."""
    options = dict(problem.options)
    if "block_mask" in options:
        options["block_mask"] = options["block_mask"].to("cuda")
    for side in ("q", "k"):
        cu = problem.tensors.get(f"cu_seqlens_{side}")
        if cu is not None:  # the longest sequence cannot be read there
            options.setdefault(f"max_seqlen_{side}", max([0, *(cu[1:] - cu[:-1]).tolist()]))
    return {**{n: to_device(t) for n, t in problem.tensors.items()}, **options}


def prefill(tool: Path, chosen: list[Named], others: set[str]) -> str:
    """Compiles the kernels of the problems, and others, on all processors: no test waits for the compiler."""
    names = {"copy_rows_sm90", "clear_counters_sm90", *others}
    for one in chosen:
        for backward in (False, True):
            try:
                names.add(fsa.explain(**on_device(one.problem), backward=backward)["kernel"])
            except NotImplementedError:
                continue
    for keys in (64, 128):
        names |= {f"gate_prepare_sm90_{keys}"}
        names |= {f"gate_bitmap_sm90_{mask}_{keys}" for mask in ("full", "causal", "window", "bands")}
    done = subprocess.run(
        [tool, "prefill", *sorted(names), "--output", os.environ["FSA_CACHE_DIR"], "--jobs",
         str(os.cpu_count())], capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"a kernel does not compile:\n{done.stderr[-6000:]}")
    return done.stdout.splitlines()[-1]


@dataclasses.dataclass
class Outcome:
    """What came back, on the CPU."""

    out: Tensor
    lse: Tensor
    skip_map: Tensor | None  # none with a block mask
    guards: Tensor
    same_alone: bool  # without lse and map, through a fresh out: the same bits
    inputs_kept: bool
    grad_out: Tensor | None
    grad_lse: Tensor | None
    grads: dict[str, Tensor]  # empty where backward is refused
    refusal: str = ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(checks.bits(a), checks.bits(b))


def poison(count: int) -> None:
    """Fills memory that the allocator hands out next with NaN."""
    torch.full((count,), math.nan, device="cuda")


def differentiate(one: Named, out: Tensor, with_map: bool) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """grad_out, grad_lse, gradients, all on the CPU."""
    grad_out, grad_lse = checks.draw_grads(one.problem, one.seed, one.grad_kind)
    arguments = on_device(one.problem)
    names = [n for n in oracle.GRADIENTS if n in one.problem.tensors]
    for name in names:
        arguments[name] = arguments[name].requires_grad_()
    again, lse, *_ = fsa.attention(**arguments, return_lse=True, return_skip_map=with_map)
    assert same_bits(again.detach().cpu(), out), "out depends on whether gradients are wanted"
    outputs, given = [again], [to_device(grad_out)]
    if one.lse_grad:
        outputs, given = [again, lse], [*given, to_device(grad_lse)]
    poison(max(1 << 20, 8 * again.numel()))
    grads = torch.autograd.grad(outputs, [arguments[n] for n in names], given)
    by_name = {n: g.cpu() for n, g in zip(names, grads, strict=True)}
    return grad_out, grad_lse if one.lse_grad else None, by_name


def compute(one: Named) -> Outcome:
    problem = one.problem
    arguments = on_device(problem)
    query, value = arguments["query"], arguments["value"]
    shape = (*query.shape[:-1], value.shape[-1])
    memory = torch.full((math.prod(shape) + 2 * GUARD,), math.nan, dtype=query.dtype, device="cuda")
    memory[:GUARD] = memory[-GUARD:] = 12345.0
    buffer = memory[GUARD : memory.numel() - GUARD].view(shape)
    with_map = "block_mask" not in arguments
    out, lse, *rest = fsa.attention(**arguments, out=buffer, return_lse=True, return_skip_map=with_map)
    assert out.data_ptr() == buffer.data_ptr() or out.numel() == 0, "out: not written in place"
    alone = fsa.attention(**arguments)
    torch.cuda.synchronize()
    kept = all(same_bits(arguments[n].cpu(), t) for n, t in problem.tensors.items())
    guards = torch.cat([memory[:GUARD], memory[-GUARD:]]).cpu()
    skip_map = rest[0].cpu() if with_map else None
    same = same_bits(alone.cpu(), out.cpu())
    try:
        grad_out, grad_lse, grads = differentiate(one, out.cpu(), with_map)
        refusal = ""
    except NotImplementedError as error:
        grad_out, grad_lse, grads, refusal = None, None, {}, reason_of(error)
    return Outcome(out.cpu(), lse.cpu(), skip_map, guards, same, kept, grad_out, grad_lse, grads, refusal)


def reason_of(error: NotImplementedError) -> str:
    """What the CUDA backend says."""
    reasons = [line for line in str(error).splitlines() if line.strip().startswith("cuda:")]
    return (reasons or [str(error)])[0].strip()


def lse_tolerance(problem: Problem) -> float:
    """Of max(1, |lse|). The fast softcap is right to 2^-11 of the cap, half a unit of bfloat16."""
    return 1e-5 + 2.0**-11 * problem.options.get("softcap", 0.0)


def compare(problem: Problem, ours: Outcome) -> str:
    """Raises AssertionError; returns a summary."""
    torch.set_num_threads(1)
    assert (ours.guards == torch.full_like(ours.guards, 12345.0)).all(), "written outside of out"
    assert ours.inputs_kept, "an input was changed"
    assert ours.same_alone, "out depends on whether lse and the skip map are wanted"
    tiles, kept = None, None
    if ours.skip_map is not None:
        shape = tuple(ours.skip_map.shape)
        assert shape == decisions.skip_map_shape(problem), f"map {shape}"
        tiles = decisions.replay(problem, ours.skip_map, checks.tolerance_of_decisions(problem.dtype))
        kept = decisions.skip_map_bits(problem, ours.skip_map)
    same = {"grad_out": ours.grad_out, "grad_lse": ours.grad_lse, "kept": kept}
    truth = oracle.attend(problem, **same)
    naive = checks.Naive(problem, truth, **same)
    rtol = 3.0 if problem.options.get("softcap") else 2.0
    checks.assert_within_twice("out", ours.out, truth, naive, rtol)
    for name, grad in ours.grads.items():
        tensor = problem.tensors[name]
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape, (
            f"d{name}: {grad.dtype} {grad.shape}"
        )
        checks.assert_within_twice(name, grad, truth, naive, rtol)
    empty = truth.lse == -math.inf
    assert torch.equal(ours.lse == -math.inf, empty), "lse: -inf at other rows than those without a key"
    error = ((ours.lse.double() - truth.lse).abs() / truth.lse.abs().clamp(min=1))[~empty]
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= lse_tolerance(problem), f"lse: error {worst:.3g} of max(1, |lse|)"
    words = f"lse {worst:.1e}" + (f", kept {tiles.kept}/{tiles.visible}" if tiles else "")
    return words + (f", no backward: {ours.refusal}" if ours.refusal else f", {len(ours.grads)} gradients")


def verify_all(chosen: list[Named]) -> list[dict[str, str]]:
    """One entry per problem: passed, failed or refused, and why."""
    results: dict[int, dict[str, str]] = {}
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(os.cpu_count() or 1, 24) - 1)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {}
        for index, one in enumerate(chosen):
            try:
                waiting[pool.submit(compare, one.problem, compute(one))] = index
            except NotImplementedError as error:
                results[index] = {"name": one.name, "result": "refused", "detail": reason_of(error)}
            except Exception as error:  # one problem must not hide the others
                detail = f"{type(error).__name__}: {error}"[:500]
                results[index] = {"name": one.name, "result": "failed", "detail": detail}
                if "CUDA error" in detail:
                    raise RuntimeError(f"{one.name}: {detail}") from error  # no later call would work
        for future in concurrent.futures.as_completed(waiting):
            index = waiting[future]
            try:
                outcome, detail = "passed", future.result()
            except Exception as error:
                outcome, detail = "failed", f"{type(error).__name__}: {error}"[:500]
            results[index] = {"name": chosen[index].name, "result": outcome, "detail": detail}
    return [results[index] for index in sorted(results)]
