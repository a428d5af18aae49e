# SPDX-License-Identifier: Apache-2.0
"""Rates of the forward and backward beside cuDNN's, or beside our own dense kernel, in the same minute; host times.

speed.py           host times, as JSON
speed.py table     the table; needs the library's package on PYTHONPATH
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flash_sparse_attention as fsa
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SAMPLES = 20
LAUNCHES = 3
TOKENS = 16384
HIDDEN = 2048

# (head_dim, causal, seqlen): the best peer's forward over cuDNN's. Floor 0.90 times that, aim 1.05 times, except
# where the loop limit is known (causal, head_dim 128, long).
DENSE = {
    (64, False, 2048): 1.09, (64, False, 8192): 1.16, (64, False, 16384): 1.19,
    (64, True, 2048): 1.06, (64, True, 8192): 1.14, (64, True, 16384): 1.16,
    (128, False, 2048): 1.02, (128, False, 8192): 1.07, (128, False, 16384): 1.09,
    (128, True, 2048): 1.11, (128, True, 8192): 1.18, (128, True, 16384): 1.24, (128, True, 32768): 1.22,
    (256, False, 2048): 1.05, (256, False, 8192): 1.10, (256, False, 16384): 1.11,
    (256, True, 2048): 1.06, (256, True, 8192): 1.16, (256, True, 16384): 1.15,
}  # fmt: skip
LOOP_LIMIT = {(128, True, 16384): 1.27, (128, True, 32768): 1.27}
# The same for the backward; at head_dim 256 peers are weak and the aim is known.
DENSE_BACKWARD = {
    (64, False, 2048): 1.17, (64, False, 8192): 1.20, (64, False, 16384): 1.17,
    (64, True, 2048): 1.21, (64, True, 8192): 1.23, (64, True, 16384): 1.24,
    (128, False, 2048): 1.21, (128, False, 8192): 1.14, (128, False, 16384): 1.14,
    (128, True, 2048): 1.12, (128, True, 8192): 1.15, (128, True, 16384): 1.17, (128, True, 32768): 1.15,
    (256, False, 2048): 1.00, (256, False, 8192): 1.05, (256, False, 16384): 1.06,
    (256, True, 2048): 1.00, (256, True, 8192): 1.00, (256, True, 16384): 1.00,
}  # fmt: skip
AIM_256_BACKWARD = 1.20


class Call:
    """attention() with these arguments."""

    def __init__(self, *tensors: Tensor, **options: Any) -> None:
        self.tensors, self.options = tensors, options

    def __call__(self) -> Any:
        return fsa.attention(*self.tensors, **self.options)

    def kernel(self, **changes: Any) -> str:
        options = {**self.options, **changes}
        options.pop("return_skip_map", None)
        return fsa.explain(*self.tensors, **options)["kernel"]

    def kept(self) -> float:
        """Share of the causal tiles that a sparse call keeps."""
        _, skip_map = fsa.attention(*self.tensors, **{**self.options, "return_skip_map": True})
        seqlen, dim = self.tensors[0].shape[1], self.tensors[0].shape[3]
        return fsa.kept_fraction(skip_map, seqlen_q=seqlen, seqlen_k=seqlen, head_dim=dim, causal=True)


class Cudnn:
    """The same by cuDNN; tensors [batch, seqlen, heads, head_dim]."""

    def __init__(self, *tensors: Tensor, causal: bool) -> None:
        self.tensors, self.causal = tensors, causal

    def __call__(self) -> Tensor:
        heads_first = [tensor.transpose(1, 2) for tensor in self.tensors]
        return scaled_dot_product_attention(*heads_first, is_causal=self.causal)


class Gradient:
    """The backward alone of a call, whose forward runs here."""

    def __init__(self, call: Call | Cudnn, **options: Any) -> None:
        self.leaves = [tensor.detach().requires_grad_() for tensor in call.tensors]
        with torch.enable_grad():
            if isinstance(call, Cudnn):
                self.out = Cudnn(*self.leaves, causal=call.causal)()
            else:
                options = {**call.options, **options}
                for name in ("alpha", "delta"):
                    if name in options:
                        options[name] = options[name].detach().requires_grad_()
                        self.leaves.append(options[name])
                self.out = fsa.attention(*self.leaves[:3], **options)
        self.grad_out = torch.randn_like(self.out)

    def __call__(self) -> Any:
        return torch.autograd.grad(self.out, self.leaves, self.grad_out, retain_graph=True)


@dataclass
class Pair:
    """What is timed side by side, and the useful FLOP of each; of a sparse call those of the tiles that it keeps."""

    ours: Call
    base: Call | Cudnn
    flop: float
    base_flop: float
    sparse: bool = False


@dataclass
class Row:
    """One comparison. `make` allocates its tensors, so that rows need memory one after the other."""

    name: str
    against: str
    make: Callable[[], Pair]
    floor: float | None
    aim: float | None
    # Whether the ratio is of rates, of useful work each (a share of the yardstick's), or of times (times faster).
    of_rates: bool = False
    backward: bool = False
    deterministic: bool = False  # backward: against the default one of the same call


def _best_us(function: Callable[[], Any]) -> float:
    """Least of several means: the machine's other work only ever adds."""
    best = float("inf")
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            function()
        best = min(best, (time.perf_counter() - start) / 200 * 1e6)
    torch.cuda.synchronize()
    return round(best, 2)


def host_times() -> dict[str, float]:
    """Microseconds of the host per Python call, on a problem that the GPU finishes sooner."""
    query = torch.randn(1, 64, 2, 64, device="cuda").bfloat16()
    out = torch.empty_like(query)
    transposed = query.transpose(1, 2)
    mask = fsa.BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda"))
    for _ in range(20_000):  # the processor's clock rises, the interpreter specialises
        fsa.attention(query, query, query)
    with torch.no_grad():
        return {
            "attention": _best_us(lambda: fsa.attention(query, query, query)),
            "attention, causal, lse": _best_us(
                lambda: fsa.attention(query, query, query, causal=True, return_lse=True)
            ),
            "attention, block mask": _best_us(lambda: fsa.attention(query, query, query, block_mask=mask)),
            "attention, out given": _best_us(lambda: fsa.attention(query, query, query, out=out)),
            "torch.add, out given": _best_us(lambda: torch.add(query, query, out=out)),
            "torch.empty_like": _best_us(lambda: torch.empty_like(query)),
            "scaled_dot_product_attention": _best_us(
                lambda: scaled_dot_product_attention(transposed, transposed, transposed)
            ),
        }


def interleaved_ms(functions: list[Callable[[], Any]]) -> list[float]:
    """Median milliseconds of each, taken in turn so that all see the same clocks. The order is drawn for each
    sample and a call that does not count comes first: what ran before moves a call by up to 4 %."""
    order = random.Random(0)
    turns = list(zip(functions, [[] for _ in functions], strict=True))
    times: list[list[float]] = [into for _, into in turns]
    for function in functions:
        function()
    for _ in range(SAMPLES):
        order.shuffle(turns)
        for function, into in turns:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(400_000)  # the host queues the launches meanwhile: its own time is not measured
            function()
            begin.record()
            for _ in range(LAUNCHES):
                function()
            end.record()
            end.synchronize()
            into.append(begin.elapsed_time(end) / LAUNCHES)
    return [statistics.median(t) for t in times]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def flop(batch: int, seqlen: int, heads: int, dim: int, causal: bool) -> float:
    return 4 * batch * heads * seqlen * seqlen * dim / (2 if causal else 1)


def dense(dim: int, causal: bool, seqlen: int) -> Pair:
    """Random normal, 16k tokens in all (one sequence at least), hidden size 2048."""
    batch, heads = max(1, TOKENS // seqlen), HIDDEN // dim
    tensors = [normal(batch, seqlen, heads, dim) for _ in range(3)]
    work = flop(batch, seqlen, heads, dim, causal)
    return Pair(Call(*tensors, causal=causal), Cudnn(*tensors, causal=causal), work, work)


def window(keys: int) -> Pair:
    """Causal, the `keys` newest keys, against the causal kernel."""
    tensors = [normal(1, TOKENS, 16, 128) for _ in range(3)]
    work = 4.0 * 16 * 128 * sum(min(row + 1, keys) for row in range(TOKENS))
    ours = Call(*tensors, causal=True, window_size=(keys - 1, 0))
    return Pair(ours, Call(*tensors, causal=True), work, flop(1, TOKENS, 16, 128, True))


def blocks(density: float) -> Pair:
    """Random 128 by 128 blocks, another mask for each head, against the full kernel."""
    tensors = [normal(1, TOKENS, 16, 128) for _ in range(3)]
    chosen = torch.rand(1, 16, TOKENS // 128, TOKENS // 128, device="cuda") < density
    whole = flop(1, TOKENS, 16, 128, False)
    ours = Call(*tensors, block_mask=fsa.BlockMask.from_dense(chosen))
    return Pair(ours, Call(*tensors), whole * float(chosen.float().mean()), whole)


def documents(tokens: int) -> Pair:
    """32 causal documents of uniform random length, against a batch of 32 of the mean length."""
    drawn = torch.rand(32, generator=torch.Generator().manual_seed(0))
    ends = (drawn.cumsum(0) / drawn.sum() * tokens).round()
    cu = torch.cat([torch.zeros(1), ends]).int()
    lengths = cu.diff()
    cu, longest = cu.cuda(), int(lengths.max())
    packed = [normal(tokens, 16, 128) for _ in range(3)]
    batched = [normal(32, tokens // 32, 16, 128) for _ in range(3)]
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    work = sum(flop(1, length, 16, 128, True) for length in lengths.tolist())
    whole = flop(32, tokens // 32, 16, 128, True)
    return Pair(Call(*packed, causal=True, **options), Call(*batched, causal=True), work, whole)


def topics(seqlen: int, heads: int = 16, kv_heads: int = 8, dim: int = 128) -> list[Tensor]:
    """256-token segments that draw one of ten directions: tiles of unlike topics lie 14 nats lower, and about a
    tenth of the causal tiles is kept."""
    directions = torch.randn(10, dim, device="cuda")
    directions *= math.sqrt(14 * math.sqrt(dim)) / directions.norm(dim=1, keepdim=True)
    drawn = torch.randint(0, 10, (kv_heads, seqlen // 256), device="cuda").repeat_interleave(256, 1)
    base = directions[drawn].transpose(0, 1)[None]  # [1, seqlen, kv_heads, dim]
    query = base.repeat_interleave(heads // kv_heads, 2) + 0.3 * torch.randn(
        1, seqlen, heads, dim, device="cuda"
    )
    key = base + 0.3 * torch.randn(1, seqlen, kv_heads, dim, device="cuda")
    return [query.bfloat16(), key.bfloat16(), normal(1, seqlen, kv_heads, dim)]


def threshold(seqlen: int, tau: float, with_map: bool = False) -> Pair:
    tensors = topics(seqlen)
    whole = flop(1, seqlen, 16, 128, True)
    ours = Call(*tensors, causal=True, threshold=tau, return_skip_map=with_map)
    base = {"threshold": tau} if with_map else {}
    return Pair(ours, Call(*tensors, causal=True, **base), whole, whole, sparse=True)


def gated(seqlen: int) -> Pair:
    """A tenth of the visible tiles kept: the right-most of each row tile, and those of open key tiles. Shut ones get
    lower from right to left, so that none is kept for want of an open one to its right. The time of the gate's
    own kernels is included."""
    tensors = [normal(1, seqlen, 16, 128), *(normal(1, seqlen, 8, 128) for _ in range(2))]
    tiles = seqlen // 128
    rightmost = 2 / (tiles + 1)
    is_open = torch.rand(tiles, 8, device="cuda") < (0.1 - rightmost) / (1 - rightmost)
    depth = torch.arange(tiles, 0, -1, device="cuda")[:, None] * (60 * math.sqrt(128))
    delta = torch.where(is_open, 1.0, -depth).repeat_interleave(128, 0)[None].contiguous()
    gate = {"alpha": torch.ones(1, seqlen, 16, device="cuda"), "delta": delta}
    whole = flop(1, seqlen, 16, 128, True)
    ours = Call(*tensors, causal=True, **gate)
    return Pair(ours, Call(*tensors, causal=True), whole, whole, sparse=True)


def softcap() -> Pair:
    tensors = [normal(1, TOKENS, 16, 128) for _ in range(3)]
    work = flop(1, TOKENS, 16, 128, True)
    return Pair(Call(*tensors, causal=True, softcap=30.0), Call(*tensors, causal=True), work, work)


def grouped(key_heads: int) -> Pair:
    """32 query heads over fewer key heads against 32 over 32."""
    query = normal(1, TOKENS, 32, 128)
    few, many = ([normal(1, TOKENS, heads, 128) for _ in range(2)] for heads in (key_heads, 32))
    work = flop(1, TOKENS, 32, 128, True)
    return Pair(Call(query, *few, causal=True), Call(query, *many, causal=True), work, work)


def halves() -> Pair:
    """float16 against bfloat16."""
    tensors = [normal(1, TOKENS, 16, 128) for _ in range(3)]
    work = flop(1, TOKENS, 16, 128, True)
    other = [tensor.half() for tensor in tensors]
    return Pair(Call(*other, causal=True), Call(*tensors, causal=True), work, work)


def rows() -> list[Row]:
    found = []
    for (dim, causal, seqlen), best in DENSE.items():
        aim = LOOP_LIMIT.get((dim, causal, seqlen), round(1.05 * best, 3))
        name = f"d{dim} {'causal' if causal else 'full'} {seqlen}"
        make = partial(dense, dim, causal, seqlen)
        found.append(Row(name, "cuDNN", make, round(0.9 * best, 3), aim))
    for keys, floor, aim in ((1024, 0.77, 0.88), (512, 0.60, 0.75)):
        found.append(Row(f"window {keys}", "causal", partial(window, keys), floor, aim, True))
    for density, floor, aim in ((0.5, 0.92, 0.97), (0.25, 0.91, 0.97), (0.1, 0.84, 0.92), (0.05, 0.71, 0.82)):
        found.append(Row(f"blocks {density}", "full", partial(blocks, density), floor, aim, True))
    for tokens in (16384, 65536):
        name = f"32 documents, {tokens} tokens"
        found.append(Row(name, "mean length", partial(documents, tokens), 0.9, None, True))
    for seqlen in (16384, 32768):
        found.append(Row(f"threshold 1, {seqlen}", "causal", partial(threshold, seqlen, 1.0), 1.5, 1.75))
    return [
        *found,
        Row("threshold 1e-30", "causal", partial(threshold, TOKENS, 1e-30), 0.97, None),
        Row("threshold 1, skip map", "without", partial(threshold, TOKENS, 1.0, True), 0.98, None),
        Row("gated, a tenth kept", "causal", partial(gated, TOKENS), 5.0, 7.0),
        Row("softcap", "causal", softcap, 0.91, None),
        Row("GQA 32/8", "MHA 32/32", partial(grouped, 8), 0.97, None),
        Row("float16", "bfloat16", halves, 0.98, None),
    ]


def backward_rows() -> list[Row]:
    found = []
    for (dim, causal, seqlen), best in DENSE_BACKWARD.items():
        aim = AIM_256_BACKWARD if dim == 256 else round(1.05 * best, 3)
        name = f"backward d{dim} {'causal' if causal else 'full'} {seqlen}"
        make = partial(dense, dim, causal, seqlen)
        found.append(Row(name, "cuDNN", make, round(0.9 * best, 3), aim, backward=True))
        found.append(
            Row(f"{name} deterministic", "default", make, 0.88, 0.95, backward=True, deterministic=True)
        )
    for keys, floor, aim in ((1024, 0.71, 0.88), (512, 0.56, 0.75)):
        make = partial(window, keys)
        found.append(Row(f"backward window {keys}", "causal", make, floor, aim, True, backward=True))
    for density, floor, aim in ((0.5, 0.92, 0.95), (0.25, 0.89, 0.95), (0.1, 0.81, 0.90), (0.05, 0.65, 0.80)):
        make = partial(blocks, density)
        found.append(Row(f"backward blocks {density}", "full", make, floor, aim, True, backward=True))
    for seqlen in (16384, 32768):
        make = partial(threshold, seqlen, 1.0)
        found.append(Row(f"backward threshold 1, {seqlen}", "causal", make, 4.0, 6.0, backward=True))
    for heads in (8, 4):
        make = partial(grouped, heads)
        found.append(Row(f"backward GQA 32/{heads}", "MHA 32/32", make, None, None, backward=True))
    make = partial(gated, TOKENS)
    found.append(Row("backward gated, a tenth kept", "causal", make, 5.0, 7.0, backward=True))
    return found


def kernel_names() -> set[str]:
    """Kernels of the table, so that they can be compiled side by side beforehand."""
    names = set()
    for row in rows() + backward_rows():
        pair = row.make()
        for call in (pair.ours, pair.base):
            if isinstance(call, Call):
                names.add(call.kernel())
                if row.backward:
                    names.add(call.kernel(backward=True, deterministic=row.deterministic))
    return names


def measure(row: Row) -> dict[str, Any]:
    torch.manual_seed(0)
    pair = row.make()
    ours, base, scale = pair.ours, pair.base, 1.0
    with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        if row.deterministic:
            ours, base, scale = Gradient(pair.ours, deterministic=True), Gradient(pair.ours), 2.5
        elif row.backward:
            ours, base, scale = Gradient(pair.ours), Gradient(pair.base), 2.5
        our_ms, base_ms = interleaved_ms([ours, base])
    share = pair.ours.kept() if pair.sparse else 1.0
    rate, base_rate = scale * pair.flop * share / our_ms, scale * pair.base_flop / base_ms
    return {
        "row": row.name, "ms": round(our_ms, 4), "tflops": round(rate / 1e9, 1), "kept": round(share, 3),
        "against": row.against, "against_ms": round(base_ms, 4),
        "ratio": round(rate / base_rate if row.of_rates else base_ms / our_ms, 3),
        "floor": row.floor, "aim": row.aim,
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    floor, aim = ("-" if found[n] is None else f"{found[n]:.3g}" for n in ("floor", "aim"))
    held = "" if found["floor"] is None else "holds" if found["ratio"] >= found["floor"] else "BELOW"
    return (
        f"{found['row']:<40}{found['ms']:>9.3f} ms {found['tflops']:>7.1f} TF  x {found['against']:<12}"
        f"{found['ratio']:>7.3f}  floor {floor:>6}  aim {aim:>6}  {held}"
    )


def table(wanted: Callable[[str], bool] = lambda name: True) -> list[dict[str, Any]]:
    """The rows whose name is wanted, printed as they come. bfloat16 but for one, random normal data but for topics."""
    found = []
    for row in rows() + backward_rows():
        if not wanted(row.name):
            continue
        found.append(measure(row))
        print(line(found[-1]), flush=True)
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        table()
    else:
        print(json.dumps(host_times()))
