# SPDX-License-Identifier: Apache-2.0
"""Runs a problem through the library and compares everything that comes back with the oracle."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import decisions
import flash_sparse_attention as fsa
import oracle
import torch
from cases import Problem
from torch import Tensor

GUARD = 64  # elements before and after every output buffer


def tolerance_of_decisions(dtype: torch.dtype) -> float:
    """log2 units by which a decision may lie on the wrong side of its threshold."""
    return 1e-9 if dtype == torch.float64 else 1e-2


class Naive:
    """Errors of naive same-precision computations of a problem: plain PyTorch over whole score matrices.

    The first is FlashAttention's own comparator (torch.softmax, autograd, the scale on the keys), the second works
    in powers of two with an lse rounded to float32, as every backward of this kind does. The error of a sum of a
    few terms can be 0 by luck, in the sink's gradient of four heads for one; so where these two do not vouch for a
    result, more of them are drawn, which sum like a textbook, term by term, in random orders.
    """

    DRAWS = 12

    def __init__(self, problem: Problem, truth: oracle.Result, **arguments: Any) -> None:
        self._problem, self._truth, self._arguments = problem, truth, arguments
        self._results = [self._attend(reorder=True), self._attend(by_hand=True)]

    def _attend(self, **way: Any) -> oracle.Result:
        return oracle.attend(self._problem, self._problem.dtype, **self._arguments, **way)

    def allowed(self, name: str, error: float, rtol: float) -> float:
        """The bound of FlashAttention's rule, from as many draws as `error` needs."""
        truth = _part(self._truth, name)
        if float(truth.abs().max()) < 1e-12:
            return self._noise_of_nothing(name)
        rounded = truth.to(self._problem.dtype)
        noise = 2 * float(((rounded + 0.3 - 0.3) - rounded).abs().max())
        largest = 0.0
        for draw in range(2 + self.DRAWS):
            if draw == len(self._results):
                self._results.append(self._attend(by_hand=True, shuffle=draw))
            largest = max(largest, float((_part(self._results[draw], name).double() - truth).abs().max()))
            if draw >= 1 and error <= rtol * largest + noise:
                break
        return rtol * largest + noise

    def _noise_of_nothing(self, name: str) -> float:
        """Rows that see one key have gradients of exactly 0, the difference of two equal dot products: what float32
        leaves of it. Where no row sees a key, and in out and dvalue, nothing is subtracted: 0 is 0."""
        if name in ("out", "value") or not self._truth.out.any():
            return 0.0

        def largest(tensor: Tensor | None) -> float:
            return float(tensor.abs().nan_to_num(0.0).max()) if tensor is not None and tensor.numel() else 1.0

        t, grad_out = self._problem.tensors, self._arguments.get("grad_out")
        others = max(1.0, *(largest(t[n]) for n in oracle.GRADIENTS if n in t))
        dot = t["value"].shape[-1] * largest(grad_out) * largest(t["value"])
        return torch.finfo(torch.float32).eps * dot * others * oracle.softmax_scale(self._problem)


def _part(result: oracle.Result, name: str) -> Tensor:
    return result.out if name == "out" else result.grads[name]


def assert_within_twice(
    name: str, ours: Tensor, truth: oracle.Result, naive: Naive | None, rtol: float = 2.0
) -> None:
    """FlashAttention's rule: max|ours - truth| <= rtol * max|naive - truth| + 2 * max|(truth + 0.3 - 0.3) - truth|,
    truth in float64, naive in the problem's dtype, and so the last term, the rounding noise of one addition.

    naive None, for float64, which has no finer truth: the bound is 1e-10 of the largest element.
    """
    expected = _part(truth, name)
    assert ours.shape == expected.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    assert not ours.isnan().any(), f"{name}: {int(ours.isnan().sum())} of {ours.numel()} elements are NaN"
    difference = (ours.double() - expected).abs()
    error = float(difference.max())
    if naive is None:
        allowed = 1e-10 * max(1.0, float(expected.abs().max()))
    else:
        allowed = naive.allowed(name, error, rtol)
    if error > allowed:
        label = name if name == "out" else f"d{name}"
        where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), expected.shape))
        raise AssertionError(
            f"{label}: error {error:.3g} > {allowed:.3g} allowed, "
            f"at {where}: {float(ours[where]):.9g}, truth {float(expected[where]):.9g}"
        )


def assert_lse(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """lse within 1e-5 * max(1, |lse|) (1e-12 in float64); -inf exactly where the truth has it."""
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert ours.dtype == expected, f"lse: dtype {ours.dtype}"
    assert ours.shape == truth.shape, f"lse: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    assert not ours.isnan().any(), "lse: NaN"
    infinite = truth == -math.inf
    assert torch.equal(ours == -math.inf, infinite), "lse: -inf at other rows than those without a key"
    error = (ours.double() - truth)[~infinite].abs() / truth[~infinite].abs().clamp(min=1)
    if error.numel():
        limit = 1e-12 if dtype == torch.float64 else 1e-5
        assert error.max() <= limit, f"lse: error {float(error.max()):.3g} of max(1, |lse|), limit {limit}"


class Buffer:
    """An output buffer full of NaN inside a larger one; check() finds a write outside of it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, gap: int = 0) -> None:
        """gap: unused elements after each last dimension."""
        padded = (*shape[:-1], shape[-1] + gap)
        self._memory = torch.full((math.prod(padded) + 2 * GUARD,), math.nan, dtype=dtype)
        self._memory[:GUARD] = self._memory[-GUARD:] = 12345.0
        inner = self._memory[GUARD : self._memory.numel() - GUARD].view(padded)
        inner[..., shape[-1] :] = 12345.0
        self.view = inner[..., : shape[-1]]
        self._gap = inner[..., shape[-1] :]

    def check(self, name: str) -> None:
        outside = torch.cat([self._memory[:GUARD], self._memory[-GUARD:], self._gap.flatten()])
        assert (outside == 12345.0).all(), f"{name}: written outside the buffer"


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit pattern, so that NaN equals itself."""
    size = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.detach().clone().contiguous().view(size)


def assert_same_bits(name: str, a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.shape} {a.dtype}, {b.shape} {b.dtype}"
    different = int((bits(a) != bits(b)).sum())
    assert different == 0, f"{name}: {different} of {a.numel()} elements differ in their bits"


@dataclasses.dataclass
class Outcome:
    """What the library returned."""

    out: Tensor
    lse: Tensor
    skip_map: Tensor
    grads: dict[str, Tensor]


def call(
    problem: Problem,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    **changes: Any,
) -> Outcome:
    """attention() of the problem with every output, and the gradients when grad_out or grad_lse is given."""
    arguments = {**problem.arguments(), "return_lse": True, "return_skip_map": True, **changes}
    names = [n for n in oracle.GRADIENTS if n in problem.tensors]
    wants_grads = grad_out is not None or grad_lse is not None
    if wants_grads:
        for n in names:
            arguments[n] = arguments[n].detach().requires_grad_()
    out, lse, skip_map = fsa.attention(**arguments)
    grads = {}
    if wants_grads:
        pairs = [(o, g) for o, g in ((out, grad_out), (lse, grad_lse)) if g is not None]
        outputs, grad_outputs = zip(*pairs, strict=True)
        values = torch.autograd.grad(outputs, [arguments[n] for n in names], grad_outputs)
        grads = dict(zip(names, values, strict=True))
    return Outcome(out.detach(), lse.detach(), skip_map, grads)


def poison_unused_rows(problem: Problem, grad: Tensor, is_lse: bool) -> Tensor:
    """A copy of grad with NaN at the rows beyond the used lengths."""
    poisoned = torch.full_like(grad, math.nan)
    everything = range(problem.tensors["query"].shape[-2])
    for s in oracle.sequences(problem):
        if is_lse:
            part = oracle._lse_rows(problem, grad, s, everything)
            oracle._lse_rows(problem, poisoned, s, everything)[...] = part
        else:
            oracle.rows_of_query(problem, poisoned, s)[...] = oracle.rows_of_query(problem, grad, s)
    return poisoned


def verify(
    problem: Problem, seed: int = 0, grad_kind: str = "normal", lse_grad: bool = True
) -> decisions.Tiles:
    """Forward and backward of a problem against the oracle, and everything around them. Returns its tiles.

    grad_kind: normal | expanded (all strides 0, as of out.sum()) | transposed | gapped.
    """
    if problem.decode:
        return verify_decode(problem)
    dtype = problem.dtype
    before = {n: bits(t) for n, t in problem.tensors.items()}
    grad_out = grad_lse = None
    if "page_table" not in problem.tensors:
        grad_out, grad_lse = draw_grads(problem, seed, grad_kind)
        if not lse_grad:
            grad_lse = None
    ours = call(problem, grad_out, grad_lse)

    # The same through a buffer of the caller, full of NaN, between guards.
    buffer = Buffer(tuple(ours.out.shape), dtype, gap=seed % 3)
    with torch.no_grad():
        plain = fsa.attention(**problem.arguments(), out=buffer.view)
    assert plain.data_ptr() == buffer.view.data_ptr() or plain.numel() == 0, "out: not written in place"
    buffer.check("out")
    assert_same_bits("out with and without gradients", buffer.view, ours.out)
    for name, tensor in problem.tensors.items():
        assert torch.equal(bits(tensor), before[name]), f"{name}: the input was changed"

    assert ours.skip_map.dtype == torch.int32
    assert tuple(ours.skip_map.shape) == decisions.skip_map_shape(problem), (
        f"skip_map: {tuple(ours.skip_map.shape)}"
    )
    tiles = decisions.replay(problem, ours.skip_map, tolerance_of_decisions(dtype))
    kept = decisions.skip_map_bits(problem, ours.skip_map)
    truth = oracle.attend(problem, grad_out=grad_out, grad_lse=grad_lse, kept=kept)
    same = {"grad_out": grad_out, "grad_lse": grad_lse, "kept": kept}
    naive = None if dtype == torch.float64 else Naive(problem, truth, **same)
    rtol = 3.0 if problem.options.get("softcap") else 2.0
    assert ours.out.dtype == dtype
    assert_within_twice("out", ours.out, truth, naive, rtol)
    assert_lse(ours.lse, truth.lse, dtype)
    for name, grad in ours.grads.items():
        tensor = problem.tensors[name]
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape, (
            f"d{name}: {grad.dtype} {grad.shape}"
        )
        assert_within_twice(name, grad, truth, naive, rtol)
    return tiles


def draw_grads(problem: Problem, seed: int, kind: str = "normal") -> tuple[Tensor, Tensor]:
    """grad_out and grad_lse, NaN beyond the used rows except where all elements share one address."""
    g = torch.Generator().manual_seed(seed + 1000)
    query, value = problem.tensors["query"], problem.tensors["value"]
    shape = (*query.shape[:-1], value.shape[-1])
    lse_shape = (*query.shape[:-3], query.shape[-2], query.shape[-3])
    lse_dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
    if kind == "expanded":
        return torch.ones((), dtype=problem.dtype).expand(shape), torch.ones((), dtype=lse_dtype).expand(
            lse_shape
        )
    grad_out = torch.randn(shape, generator=g).to(problem.dtype)
    grad_lse = torch.randn(lse_shape, generator=g).to(lse_dtype)
    grad_out = poison_unused_rows(problem, grad_out, is_lse=False)
    grad_lse = poison_unused_rows(problem, grad_lse, is_lse=True)
    if kind == "transposed":
        grad_out = grad_out.transpose(-1, -2).contiguous().transpose(-1, -2)
        grad_lse = grad_lse.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif kind == "gapped":
        wide = torch.full((*shape[:-1], 2 * shape[-1] + 1), math.nan, dtype=problem.dtype)
        wide[..., 1::2] = grad_out
        grad_out = wide[..., 1::2]
    elif kind != "normal":
        raise ValueError(f"grad_kind: {kind}")
    return grad_out, grad_lse


def call_decode(problem: Problem, **changes: Any) -> tuple[Tensor, Tensor]:
    """out and lse of the decode function that fits the problem."""
    name, arguments = problem.decode_call()
    return getattr(fsa, name)(**{**arguments, "return_lse": True, **changes})


def verify_decode(problem: Problem) -> decisions.Tiles:
    """A decode problem against the oracle, with decisions by the order-free rule."""
    dtype = problem.dtype
    before = {n: bits(t) for n, t in problem.tensors.items()}
    query, value = problem.tensors["query"], problem.tensors["value"]
    buffer = Buffer((*query.shape[:-1], value.shape[-1]), dtype)
    lse_buffer = Buffer(tuple(query.shape[:-1]), torch.float64 if dtype == torch.float64 else torch.float32)
    out, lse = call_decode(problem, out=buffer.view, lse=lse_buffer.view)
    if out.numel():
        assert out.data_ptr() == buffer.view.data_ptr(), "out: not written in place"
        assert lse.data_ptr() == lse_buffer.view.data_ptr(), "lse: not written in place"
    buffer.check("out")
    lse_buffer.check("lse")
    for name, tensor in problem.tensors.items():
        assert torch.equal(bits(tensor), before[name]), f"{name}: the input was changed"

    kept, close = decisions.decode_decisions(problem)
    assert len(close) <= 4, f"{len(close)} decisions too close to call"
    group = query.shape[-2] // problem.tensors["key"].shape[-2]
    failures = []
    for turned in itertools.product((False, True), repeat=len(close)):
        chosen = {i: b.clone() for i, b in kept.items()}
        for (sequence, head, tile), turn in zip(close, turned, strict=True):
            if turn:
                chosen[sequence][head * group : (head + 1) * group, 0, tile] ^= True
        try:
            compare_decode(problem, out, lse, chosen)
            break
        except AssertionError as error:
            failures.append(error)
    else:
        raise failures[0]
    possible = decisions.Tiles()
    for s in oracle.sequences(problem):
        if s.keys and s.seqlen_k:
            for head in range(query.shape[-2]):
                seen = oracle.visible(problem, s, head)[0]
                possible.visible += sum(
                    int(part.any()) for part in seen.split(oracle.tile_keys(query.shape[-1]))
                )
    possible.kept = sum(int(b.sum()) for b in kept.values())
    return possible


def compare_decode(problem: Problem, out: Tensor, lse: Tensor, kept: dict[int, Tensor]) -> None:
    """out and lse of decode against the oracle over the kept tiles."""
    truth = oracle.attend(problem, kept=kept)
    naive = None if problem.dtype == torch.float64 else Naive(problem, truth, kept=kept)
    assert_within_twice("out", out, truth, naive)
    assert_lse(lse, truth.lse, problem.dtype)
