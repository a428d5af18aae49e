# SPDX-License-Identifier: Apache-2.0
"""Check and time the Hopper backward kernels on their own: NVRTC, the driver API and torch, without the library.

python3 tools/gpu/backward.py compile [name ..]  # no GPU: registers, spills, instruction counts
python3 tools/gpu/backward.py check [name ..]    # against float64, with NaN-poisoned outputs and tails
python3 tools/gpu/backward.py bench
python3 tools/gpu/backward.py bench-features
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import itertools
import math
import re
import struct
import sys
from dataclasses import dataclass, field, replace

from features import BlockMask, random_blocks
from forward import (
    Driver,
    Kernel,
    Problem,
    hidden_keys,
    interleaved_ms,
    logits_of,
    map_bits,
    new_skip_map,
    pack_scalar,
    sequences,
    take,
)
from nvrtc import Compiled, ForwardConfig, compile_config, disassemble, with_checks

# (head_dim, head_dim_v) -> block_m, block_n, stages of query, grad_out and dS, dQ staged. TILED: where one bit is
# one tile.
DENSE = {(64, 64): (128, 128, 2, 2, 2, True), (128, 128): (64, 128, 2, 2, 3, True),
         (256, 128): (64, 64, 2, 2, 2, False), (256, 256): (64, 64, 2, 2, 2, False)}  # fmt: skip
TILED = {**DENSE, (64, 64): (64, 128, 4, 2, 4, True)}
L2_BUDGET_BYTES = 40 << 20
PARAMS_BYTES = 2048
LEAST_PART, MOST_SLOTS = 32, 512  # of columns that are cut in parts
FORWARD_PARAMS_BYTES = 1152


@dataclass(frozen=True)
class BackwardConfig:
    """One backward: the fields mirror `BackwardTile` and the policies of `kernels/`."""

    element: str = "bf16"
    head_dim: int = 128
    head_dim_v: int = 128
    block_m: int = 64
    block_n: int = 128
    query_stages: int = 4
    grad_out_stages: int = 2
    score_stages: int = 4
    stage_grad_query: bool = True
    left: bool = False
    right: bool = False
    mask: str = "window"  # window (left, right), band, list
    bits: bool = False  # the row tiles of a skip map
    logit: tuple[str, ...] = ()
    sink: bool = False
    deterministic: bool = False
    defines: tuple[str, ...] = field(default=())

    @property
    def pair_gate(self) -> bool:
        return any(stage.startswith("PairGate") for stage in self.logit)

    @property
    def cuts(self) -> bool:
        """Whether long columns may be cut in parts."""
        return self.bits or self.mask != "window"

    @property
    def name(self) -> str:
        window = {(False, False): "full", (False, True): "causal"}.get((self.left, self.right), "window")
        parts = [window if self.mask == "window" else self.mask]
        parts += ["bits"] * self.bits + [re.sub(r"\W", "", stage).lower() for stage in self.logit]
        parts += ["sink"] * self.sink + ["deterministic"] * self.deterministic
        extra = "".join(f"_{d}" for d in self.defines)
        return (
            f"backward_sm90_{self.element}_d{self.head_dim}x{self.head_dim_v}_{'_'.join(parts)}"
            f"_{self.block_m}x{self.block_n}{extra}"
        )

    @property
    def row_vectors(self) -> int:
        return 3 if self.pair_gate else 2 if self.logit else 4

    @property
    def shared_bytes(self) -> int:
        operands = 2 if self.block_n == 64 else 1
        keys = self.block_n * (self.head_dim + self.head_dim_v) * 2
        queries = self.query_stages * self.block_m * (self.head_dim * 2 + self.row_vectors * 4)
        grad_out = self.grad_out_stages * self.block_m * self.head_dim_v * 2
        score_bytes = operands * self.block_m * self.block_n * 2
        slots = self.score_stages
        if self.block_n == 128 and (
            self.head_dim <= 64 or self.row_vectors != 3
        ):  # gradients leave through them
            slots = max(slots, -(-self.block_n * (self.head_dim + self.head_dim_v) * 2 // score_bytes))
        scores = slots * score_bytes
        grad_query = self.stage_grad_query * self.block_m * self.head_dim * 4
        alpha = self.score_stages * self.block_n // 16 * self.block_m * 4 if self.pair_gate else 0
        infos = 2 * 176 + (2 * self.query_stages + 1) * 32 + 64 + 32
        barriers = 8 * (3 + 2 * (self.score_stages + self.query_stages + self.grad_out_stages + 4))
        return -(-(keys + queries + grad_out + grad_query + scores + alpha + infos + barriers) // 1024) * 1024

    @property
    def mask_type(self) -> str:
        bools = ", ".join(str(b).lower() for b in (self.left, self.right))
        return {"window": f"WindowMask<{bools}>", "band": "BandMask", "list": "ListMask"}[self.mask]

    def source(self) -> str:
        shape = f"{self.block_m}, {self.block_n}"
        rows = {
            "window": f"RangeRows<{self.mask_type}, {shape}>", "band": f"BandRows<{shape}>",
            "list": f"ListRows<{shape}>",
        }[self.mask]  # fmt: skip
        if self.bits:
            rows = f"BitmapRows<{rows}, {self.block_n}>"
        columns = f"""extern "C" __global__ void __launch_bounds__(kListThreads)
fsa_block_columns(const __grid_constant__ BackwardParams params) {{
  block_columns<{self.block_n}>(params);
}}
"""
        transpose = f"""extern "C" __global__ void __launch_bounds__(32 * kTransposeWarps)
fsa_transpose_bits(const __grid_constant__ BackwardParams params) {{
  transpose_bits<{self.block_n}>(params);
}}
"""
        parts = """extern "C" __global__ void __launch_bounds__(kSplitThreads)
fsa_split_columns(const __grid_constant__ BackwardParams params) {
  split_columns<Types>(params);
}
extern "C" __global__ void __launch_bounds__(kSumThreads)
fsa_sum_parts(const __grid_constant__ BackwardParams params) {
  sum_parts<Types>(params);
}
"""
        return f"""#include "common/backward_finish.cuh"
#include "common/backward_prepare.cuh"
#include "common/block_columns.cuh"
#include "common/split_columns.cuh"
#include "common/sum_parts.cuh"
#include "common/transpose_bits.cuh"
#include "policy/row_tiles.cuh"
#include "sm90/backward.cuh"

namespace fsa::kernels {{
struct Config {{
  static constexpr ElementType kElement = ElementType::{self.element};
  static constexpr BackwardTile kTile = {{
      .head_dim = {self.head_dim}, .head_dim_v = {self.head_dim_v}, .block_m = {self.block_m},
      .block_n = {self.block_n}, .query_stages = {self.query_stages},
      .grad_out_stages = {self.grad_out_stages}, .score_stages = {self.score_stages},
      .stage_grad_query = {int(self.stage_grad_query)}, .row_vectors = {self.row_vectors}}};
  static constexpr bool kDeterministic = {str(self.deterministic).lower()};
  static constexpr bool kSink = {str(self.sink).lower()};
  using Mask = {self.mask_type};
  using RowIterator = {rows};
  using LogitChain = Logit<{", ".join(self.logit)}>;
}};
using Types = sm90::BackwardTypes<Config>;
}}  // namespace fsa::kernels

using namespace fsa::kernels;
extern "C" __global__ void __launch_bounds__(kBackwardThreads, 1)
fsa_backward(const __grid_constant__ BackwardParams params) {{
  sm90::backward<Config>(params);
}}
extern "C" __global__ void __launch_bounds__(kPrepareThreads)
fsa_backward_prepare(const __grid_constant__ BackwardParams params) {{
  backward_prepare<Types>(params);
}}
extern "C" __global__ void __launch_bounds__(2 * Types::kBlockM)
fsa_backward_finish(const __grid_constant__ BackwardParams params) {{
  backward_finish<Types>(params);
}}
extern "C" __global__ void __launch_bounds__(256)
fsa_sum_sink(const __grid_constant__ BackwardParams params) {{
  if constexpr (Types::kSink) sum_sink<Types>(params);
}}
{transpose if self.bits else ""}{columns if self.mask == "list" else ""}{parts if self.cuts else ""}"""


def config_of(dims: tuple[int, int], element: str = "bf16", **options: object) -> BackwardConfig:
    """The shipped tile of a pair of padded head dimensions with the given policies."""
    tiled = options.get("bits") or options.get("mask") == "list" or options.get("logit")
    m, n, q, g, scores, staged = (TILED if tiled else DENSE)[dims]
    if any(stage.startswith("PairGate") for stage in options.get("logit", ())):  # alpha's sums need room
        if dims == (256, 256):
            g = 1
        elif dims == (128, 128):
            scores = 3
    return BackwardConfig(
        element=element, head_dim=dims[0], head_dim_v=dims[1], block_m=m, block_n=n, query_stages=q,
        grad_out_stages=g, score_stages=scores, stage_grad_query=staged, **options,
    )  # fmt: skip


def summary(config: BackwardConfig, compiled: Compiled) -> str:
    """One line of the main kernel: registers, spills, instruction counts; warnings of any."""
    entries = re.split(r"Compiling entry function '", compiled.log)
    text = next((e for e in entries if e.startswith("fsa_backward'")), compiled.log)
    registers = re.search(r"Used (\d+) registers", text)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    sass = disassemble(compiled.cubin)
    main = next((s for s in re.split(r"\.section\t?\s*", sass) if s.startswith(".text.fsa_backward,")), "")
    count = {op: len(re.findall(rf"\b{op}\b", main)) for op in ("HGMMA", "LDL", "STL", "MUFU", "RED", "BAR")}
    total = len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", main, re.M))
    warnings = " SERIALIZED" if "serializ" in compiled.log.lower() else ""
    if "setmaxnreg" in compiled.log.lower():
        warnings += " SETMAXNREG IGNORED"
    counts = " ".join(f"{k} {v}" for k, v in count.items())
    return (
        f"{config.name:60s} {compiled.seconds:4.1f}s regs {registers.group(1) if registers else '?'} "
        f"stack/spill {'/'.join(stack.groups()) if stack else '?'} sass {total} {counts} "
        f"smem {config.shared_bytes}{warnings}"
    )


def compile_all(configs: list, jobs: int) -> dict:
    unique = list(dict.fromkeys(configs))
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        compiled = list(pool.map(compile_config, unique))
    for config, result in zip(unique, compiled, strict=True):
        if isinstance(config, BackwardConfig):
            print(summary(config, result), flush=True)
    return {c: r.cubin for c, r in zip(unique, compiled, strict=True)}


@dataclass
class Gradients:
    """What a backward is given besides the problem, and what it writes."""

    out: object
    lse: object  # float32
    grad_out: object
    grad_lse: object = None


def contiguous_like(tensor, dtype: object = None):
    """Poisoned, with the same shape."""
    import torch

    return torch.full(tensor.shape, math.nan, dtype=dtype or tensor.dtype, device="cuda")


class Backward:
    """Launches the kernels of one configuration."""

    def __init__(self, driver: Driver, config: BackwardConfig, cubin: bytes) -> None:
        import torch

        self.driver, self.config = driver, config
        self.main = driver.load(cubin, config.shared_bytes, "fsa_backward")
        self.before = driver.load(cubin, 0, "fsa_backward_prepare")
        self.after = driver.load(cubin, 0, "fsa_backward_finish")
        self.sink = driver.load(cubin, 0, "fsa_sum_sink")
        self.columns = driver.load(cubin, 0, "fsa_block_columns") if config.mask == "list" else None
        self.transpose = driver.load(cubin, 0, "fsa_transpose_bits") if config.bits else None
        self.split = driver.load(cubin, 0, "fsa_split_columns") if config.cuts else None
        self.sum_parts = driver.load(cubin, 0, "fsa_sum_parts") if config.cuts else None
        self.least_part = LEAST_PART
        self.processors = torch.cuda.get_device_properties(0).multi_processor_count
        # Of the forward's parameters only the part that describes the problem counts, and boxes of 64 rows.
        self.forward = Kernel.__new__(Kernel)
        self.forward.driver = driver
        self.forward.config = ForwardConfig(block_m=64, block_n=64)
        self.forward.counter = torch.zeros(2, dtype=torch.int32, device="cuda")

    def prepare(self, p: Problem, given: Gradients, outputs: dict):
        """Returns functions that launch on torch's current stream: one per kernel, in order."""
        import torch

        config, block_m, block_n = self.config, self.config.block_m, self.config.block_n
        packed_q, packed_k = p.cu_seqlens_q is not None, p.cu_seqlens_k is not None
        batch = (p.cu_seqlens_q if packed_q else p.q).shape[0] - packed_q
        heads, kv_heads, head_dim = p.q.shape[-2], p.k.shape[-2], p.q.shape[-1]
        max_q = p.max_seqlen_q if packed_q else p.q.shape[1]
        max_k = p.max_seqlen_k if packed_k else p.k.shape[1]
        address, storage, _ = self.forward.parameters(p, given.out, given.lse)
        forward = ctypes.string_at(address, FORWARD_PARAMS_BYTES)

        row_tiles = p.q.shape[0] // block_m + batch if packed_q else -(-max_q // block_m)
        tiles = heads * row_tiles * (1 if packed_q else batch)
        nan = {"dtype": torch.float32, "device": "cuda"}
        vectors = torch.full((tiles, config.row_vectors, block_m), math.nan, **nan)
        sums = torch.full((tiles, block_m, config.head_dim), math.nan, **nan)
        alpha_sums = torch.full((tiles, block_m), math.nan, **nan) if config.pair_gate else None
        sink_sums = torch.full((tiles,), math.nan, **nan) if config.sink else None
        turns = torch.full((tiles, 8), 1 << 30, dtype=torch.int32, device="cuda")
        columns = None
        if config.bits:
            key_tiles = p.k.shape[0] // block_n + batch if packed_k else -(-max_k // block_n)
            words = (max_q + 64 * 32 - 1) // (64 * 32)
            shape = (heads, key_tiles, words) if packed_k else (batch, heads, key_tiles, words)
            columns = torch.full(shape, -1, dtype=torch.int32, device="cuda")

        lists, counts, column_grid = (0, 0, 0, 0, 0), None, None
        if p.blocks is not None:
            mask_heads, row_blocks = p.blocks.lists[0].shape
            key_blocks = -(-max_k // p.blocks.keys)
            counts = torch.full((mask_heads, key_blocks), -1, dtype=torch.int32, device="cuda")
            entries = torch.full(
                (mask_heads, key_blocks, row_blocks, 4), -1, dtype=torch.int32, device="cuda"
            )
            stride = key_blocks if mask_heads > 1 else 0
            lists = (counts.data_ptr(), entries.data_ptr(), 0, stride, row_blocks)
            counts = (counts, entries)
            column_grid = (-(-key_blocks // 32), mask_heads, 1)

        units = -(-max_k // block_n) * batch * kv_heads
        parts, least_part, slots = (None,) * 5, 0, 0
        if config.cuts and -(-max_q // block_m) * (heads // kv_heads) >= 2 * self.least_part:
            visits = batch * heads * -(-max_q // block_m) * -(-max_k // block_n)
            least_part, slots = self.least_part, min(MOST_SLOTS, visits // self.least_part)
            floats = block_n * (config.head_dim + config.head_dim_v + 1)
            integers = {"dtype": torch.int32, "device": "cuda"}
            parts = (
                torch.full((units + slots, 4), -1, **integers), torch.full((slots, 2), -1, **integers),
                torch.full((units,), -1, **integers), torch.full((4,), -1, **integers),
                torch.full((slots, floats), math.nan, **nan),
            )  # fmt: skip

        def pointer(tensor) -> int:
            return 0 if tensor is None else tensor.data_ptr()

        def rows(tensor, packed: bool) -> tuple[int, ...]:
            stride = (0, *tensor.stride()[:2]) if packed else tensor.stride()[:3]
            return (tensor.data_ptr(), *stride)

        def by_row(tensor, packed: bool) -> bytes:
            strides = () if tensor is None else tensor.stride()
            return pack_scalar(tensor, *((0, *strides) if packed else strides))

        grad_lse = (0, 0, 0, 0)
        if given.grad_lse is not None:
            stride = given.grad_lse.stride()
            grad_lse = (given.grad_lse.data_ptr(), *((0, *stride) if packed_q else stride))
        bits = (0, 0, 0, 0)
        if columns is not None:
            stride = columns.stride()
            bits = (columns.data_ptr(), *((0, *stride[:2]) if packed_k else stride[:3]))
        head_bytes = max(max_q, 1) * (heads // kv_heads) * (2 * head_dim + 2 * p.v.shape[-1] + 4 * head_dim)
        per_wave = max(1, min(batch * kv_heads, L2_BUDGET_BYTES // head_bytes))
        sink = outputs.get("sink")
        maps = b"".join([self.driver.tensor_map(given.grad_out, 64), self.driver.tensor_map(outputs["k"], 64),
                         self.driver.tensor_map(outputs["v"], 64)])  # fmt: skip
        body = struct.pack(
            "<" + "Qqqq" * 5 + "QQQQQqQqqqQQqqiiiifiQQQQQii",
            *rows(given.grad_out, packed_q), *rows(outputs["q"], packed_q), *rows(outputs["k"], packed_k),
            *rows(outputs["v"], packed_k), *grad_lse, vectors.data_ptr(), sums.data_ptr(), pointer(alpha_sums),
            pointer(sink_sums), turns.data_ptr(), row_tiles, *bits, *lists, head_dim,
            p.k.shape[0] if packed_k else 0, per_wave, 1 / math.sqrt(head_dim), least_part,
            *map(pointer, parts), slots, 0,
        ) + by_row(outputs.get("alpha"), packed_q) + by_row(outputs.get("delta"), packed_k) + pack_scalar(
            sink, *(() if sink is None else (0, 0, 1))
        )  # fmt: skip
        params = (forward + maps + body).ljust(PARAMS_BYTES, b"\0")
        assert len(params) == PARAMS_BYTES
        kept = ctypes.create_string_buffer(PARAMS_BYTES + 64)
        address = (ctypes.addressof(kept) + 63) // 64 * 64
        ctypes.memmove(address, params, PARAMS_BYTES)
        arguments = (ctypes.c_void_p * 1)(address)
        alive = (kept, storage, vectors, sums, alpha_sums, sink_sums, turns, columns, counts, parts)

        def launcher(function, grid: tuple[int, int, int], threads: int, shared: int = 0):
            def launch() -> None:
                _ = alive
                self.driver.call(
                    "cuLaunchKernel", function, *grid, threads, 1, 1, shared,
                    ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), arguments, None,
                )  # fmt: skip

            return launch

        row_grid = (max(1, -(-max_q // block_m)), heads, batch)
        launches = [launcher(self.before, row_grid, 256)]
        if config.bits:
            words = columns.shape[-1] * p.gate_bits.shape[-1]
            launches.append(launcher(self.transpose, (-(-words // 4), heads, batch), 128))
        if column_grid is not None:
            launches.append(launcher(self.columns, column_grid, 512))
        if slots:
            launches.append(launcher(self.split, (-(-units // 8), 1, 1), 256))
            units += slots
        launches.append(
            launcher(self.main, (max(1, min(self.processors, units)), 1, 1), 384, config.shared_bytes)
        )
        if slots:
            launches.append(launcher(self.sum_parts, (slots, block_n // 32, 1), 128))
        launches.append(launcher(self.after, row_grid, 2 * block_m))
        if config.sink:
            launches.append(launcher(self.sink, (heads, 1, 1), 256))
        return launches

    def run(self, p: Problem, given: Gradients) -> dict:
        """Into poisoned outputs."""
        import torch

        outputs = {"q": contiguous_like(p.q), "k": contiguous_like(p.k), "v": contiguous_like(p.v)}
        for name in ("alpha", "delta", "sink"):
            if getattr(p, name) is not None:
                outputs[name] = contiguous_like(getattr(p, name))
        for launch in self.prepare(p, given, outputs):
            launch()
        torch.cuda.synchronize()
        if self.forward.counter.any():
            raise RuntimeError(f"{self.config.name}: the work counter was not reset")
        return outputs


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
    softcap = {"softcap": lambda p: 5.0}
    linear = {"log_sigmoid": lambda p: False}
    rows = {
        "softcap": (("Softcap",), softcap, {}), "softcap exact": (("SoftcapExact",), softcap, {}),
        "alibi": (("Alibi",), alibi, {}), "sink": ((), sink, {"sink": True}),
        "gate": (("PairGate<true>",), gate, {}),
        "all logits": (("PairGate<false>", "Softcap", "Alibi"), gate | softcap | alibi | sink | linear, {"sink": True}),
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

    options = {"right": True, "bits": True, "logit": ("PairGate<true>",), "deterministic": True}
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


def check(args: argparse.Namespace) -> bool:
    """Every case of every chosen configuration; True when all are right."""
    import torch

    chosen = {n: c for n, c in cases(args.element).items() if not args.name or any(x in n for x in args.name)}
    guard = with_checks if args.watchdog else lambda config: config
    configs = {name: guard(variant(config, args.define)) for name, (config, _) in chosen.items()}
    cubins = compile_all(list(configs.values()), args.jobs)
    driver, good = Driver(), True
    torch.zeros(1, device="cuda")
    for name, (_, problems) in chosen.items():
        config = configs[name]
        kernel = Backward(driver, config, cubins[config])
        kernel.least_part = args.least_part
        torch.manual_seed(0)
        failures, worst, count = [], 0.0, 0
        for i, (case, p) in enumerate(problems()):
            given = given_for(p, config.block_n, with_lse=i % 2 == 0)
            got = kernel.run(p, given)
            ratio, wrong = judge(p, given, got, config.block_n)
            for _ in range(args.repeats):
                again = kernel.run(p, given)
                for key, value in got.items():
                    if (config.deterministic or key in ("k", "v")) and not torch.equal(
                        value.view(torch.int16), again[key].view(torch.int16)
                    ):
                        wrong = wrong or f"{key} is not the same twice"
            worst, count = max(worst, ratio), count + 1
            if wrong:
                failures.append(f"    {case}: {wrong} (error ratio {ratio:.3g})")
        good = good and not failures
        print(f"{name}: {count - len(failures)}/{count} right, error ratio {worst:.2f}", *failures, sep="\n",
              flush=True)  # fmt: skip
    print("all right" if good else "WRONG")
    return good


def variant(config: BackwardConfig, parts: list[str]) -> BackwardConfig:
    """With fields (`block_m=64`) replaced and macros defined."""
    pairs = [part.split("=") for part in parts if part]
    fields = {pair[0]: int(pair[1]) for pair in pairs if hasattr(config, pair[0])}
    macros = tuple("=".join(pair) for pair in pairs if not hasattr(config, pair[0]))
    return replace(config, defines=macros, **fields)


def bench(args: argparse.Namespace) -> bool:
    """Our kernels and cuDNN's backward in turn: 16k tokens in all, hidden size 2048."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    masks = {"full": (False, False), "causal": (False, True)}
    options = [{"deterministic": x} for x in ([False, True] if args.deterministic else [False])]
    configs = {
        (d, name, i, text): variant(config_of((d, d), left=mask[0], right=mask[1], **option), text.split(","))
        for d in args.head_dim for name, mask in masks.items()
        for i, option in enumerate(options) for text in args.variant
    }  # fmt: skip
    cubins = compile_all(list(configs.values()), args.jobs)
    driver = Driver()
    torch.zeros(1, device="cuda")
    kernels = {key: Backward(driver, config, cubins[config]) for key, config in configs.items()}
    print(torch.cuda.get_device_name())
    for d, name, seqlen in itertools.product(args.head_dim, masks, args.seqlen):
        batch, heads = max(1, 16384 // seqlen), 2048 // d
        p = batched(batch, seqlen, seqlen, heads, heads, (d, d), torch.bfloat16,
                    window_right=0 if name == "causal" else -1)  # fmt: skip
        qt, kt, vt = (x.transpose(1, 2).detach().requires_grad_() for x in (p.q, p.k, p.v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(qt, kt, vt, is_causal=name == "causal")
        grad_out = torch.randn_like(p.q)
        # The rates do not depend on lse; a plausible one keeps P finite.
        lse = torch.full((batch, heads, seqlen), math.log(seqlen) + 0.5, device="cuda")
        given = Gradients(out.detach().transpose(1, 2), lse, grad_out)

        def cudnn(out=out, inputs=(qt, kt, vt), gradient=grad_out) -> None:
            torch.autograd.grad(out, inputs, gradient.transpose(1, 2), retain_graph=True)

        chosen = {key: kernel for key, kernel in kernels.items() if key[:2] == (d, name)}
        launches = []
        for kernel in chosen.values():
            outputs = {"q": torch.empty_like(p.q), "k": torch.empty_like(p.k), "v": torch.empty_like(p.v)}
            launches.append(kernel.prepare(p, given, outputs))

        def whole(kernels: list):
            def launch() -> None:
                for kernel in kernels:
                    kernel()

            return launch

        alone = [launches[0][1]] if args.parts else []
        parts = [launches[0][0], launches[0][-1]] if args.parts else []
        times = interleaved_ms([cudnn, *map(whole, launches), *alone, *parts], args.samples)
        flop = 10 * batch * heads * seqlen * seqlen * d / (2 if name == "causal" else 1)
        rates = [flop / ms / 1e9 for ms in times]
        labels = [f"{key[3] or 'plain'}{' det' * key[2]}" for key in chosen]
        line = "  ".join(f"{label} {rate:5.0f} ({rate / rates[0]:.3f})"
                         for label, rate in zip(labels, rates[1:], strict=False))  # fmt: skip
        if args.parts:
            line += (
                f"  main {rates[-3]:.0f} TF, before {times[-2] * 1e3:.0f} us, after {times[-1] * 1e3:.0f} us"
            )
        print(f"d{d} {name:6s} {seqlen:6d}  cuDNN {rates[0]:5.0f}  {line}", flush=True)
    return True


def sparse_bits(heads: int, row_tiles: int, key_tiles: int, density: float):
    """A causal skip map [1, heads, row tiles, words] at head_dim 128: random tiles and the diagonal."""
    import torch

    rows, keys = (torch.arange(n, device="cuda") for n in (row_tiles, key_tiles))
    diagonal = rows[:, None] // 2 - keys[None]
    kept = (torch.rand(heads, row_tiles, key_tiles, device="cuda") < density) & (diagonal > 0) | (
        diagonal == 0
    )
    words = torch.nn.functional.pad(kept, (0, -key_tiles % 32)).reshape(heads, row_tiles, -1, 32).long()
    bits = (words << torch.arange(32, device="cuda")).sum(-1)
    share = kept.sum().item() / (heads * (diagonal >= 0).sum().item())
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()[None].contiguous(), share


def bench_features(args: argparse.Namespace) -> bool:
    """What each feature costs against the dense kernel of the same run: bf16, head_dim 128, 16k, causal."""
    import torch

    n, d, dims = 16384, 128, (128, 128)
    gate = ("PairGate<true>",)
    configs = {
        "causal": config_of(dims, right=True), "deterministic": config_of(dims, right=True, deterministic=True),
        "full": config_of(dims), "full deterministic": config_of(dims, deterministic=True),
        "softcap": config_of(dims, right=True, logit=("Softcap",)),
        "alibi": config_of(dims, right=True, logit=("Alibi",)),
        "window": config_of(dims, left=True, right=True), "band": config_of(dims, mask="band"),
        "map": config_of(dims, right=True, bits=True), "gate": config_of(dims, right=True, logit=gate),
        "map gate": config_of(dims, right=True, bits=True, logit=gate),
        "map deterministic": config_of(dims, right=True, bits=True, deterministic=True),
        "fp16": config_of(dims, "fp16", right=True), "list": config_of(dims, mask="list"),
    }  # fmt: skip
    cubins = compile_all(list(configs.values()), args.jobs)
    driver = Driver()
    torch.zeros(1, device="cuda")
    kernels = {name: Backward(driver, c, cubins[c]) for name, c in configs.items()}
    print(torch.cuda.get_device_name())

    def problem(heads: int, kv_heads: int, dtype: object = torch.bfloat16, **options: object) -> Problem:
        return batched(1, n, n, heads, kv_heads, (d, d), dtype, **options)

    def launch(name: str, p: Problem):
        lse = torch.full((1, p.q.shape[2], n), math.log(n) + 0.5, device="cuda")
        given = Gradients(torch.randn_like(p.q), lse, torch.randn_like(p.q))
        outputs = {"q": torch.empty_like(p.q), "k": torch.empty_like(p.k), "v": torch.empty_like(p.v)}
        for key in ("alpha", "delta"):
            if getattr(p, key) is not None:
                outputs[key] = torch.empty_like(getattr(p, key))
        parts = kernels[name].prepare(p, given, outputs)

        def whole() -> None:
            for part in parts:
                part()

        return whole

    causal = problem(16, 16, window_right=0)
    half = problem(16, 8, window_right=0)
    bits, kept = sparse_bits(16, n // 64, n // 128, 0.12)
    sparse = replace(half, gate_bits=bits)
    gates = {"alpha": torch.randn(1, n, 16, device="cuda"), "delta": torch.randn(1, n, 8, device="cuda")}
    densities, masks = (0.5, 0.25, 0.1, 0.05), []
    for density in densities:
        blocks = torch.rand(1, n // 128, n // 128, device="cuda") < density
        blocks[:, :, 0] = True
        masks.append(BlockMask.of_full_blocks(blocks, 128, 128))
    sizes = torch.tensor([[64, 1024, 2048, 512]] * 16, dtype=torch.int32, device="cuda")
    rows = {
        "causal": launch("causal", causal), "full": launch("full", replace(causal, window_right=-1)),
        "deterministic": launch("deterministic", causal),
        "full deterministic": launch("full deterministic", replace(causal, window_right=-1)),
        "fp16": launch("fp16", problem(16, 16, torch.float16, window_right=0)),
        "softcap": launch("softcap", replace(causal, softcap=30.0)),
        "alibi": launch("alibi", replace(causal, alibi=torch.rand(16, device="cuda"))),
        "window 1024": launch("window", replace(causal, window_left=1024)),
        "window 512": launch("window", replace(causal, window_left=512)),
        "bands 64, 1024, 2048, 512": launch("band", replace(causal, window_sizes=sizes)),
        **{f"blocks {x}": launch("list", replace(causal, window_right=-1, blocks=m))
           for x, m in zip(densities, masks, strict=True)},
        "causal 16/8": launch("causal", half), "map": launch("map", sparse),
        "map deterministic": launch("map deterministic", sparse),
        "gate 16/8": launch("gate", replace(half, **gates)), "map gate": launch("map gate", replace(sparse, **gates)),
        "GQA 32/4": launch("causal", problem(32, 4, window_right=0)),
        "MHA 32/32": launch("causal", problem(32, 32, window_right=0)),
    }  # fmt: skip
    times = dict(zip(rows, interleaved_ms(list(rows.values()), args.samples), strict=True))
    rate = 5 * 16 * n * n * d / times["causal"]
    for name, ms in times.items():
        note = f"{times['causal'] / ms:.3f} of causal's speed"
        if name.startswith("window"):
            w = int(name.split()[1])
            note = f"{10 * 16 * (n * (w + 1) - w * (w + 1) / 2) * d / ms / rate:.3f} of causal's rate"
        elif name.startswith("blocks"):
            share = masks[densities.index(float(name.split()[1]))].lists[2].sum().item() / (n // 128) ** 2
            note = f"density {share:.3f}: {share * times['full'] / ms:.3f} of full's rate"
        elif name.startswith("map"):
            note = f"{times['causal 16/8'] / ms:.2f} x dense, {kept:.3f} of tiles kept"
        elif name == "full deterministic":
            note = f"{times['full'] / ms:.3f} of full's speed"
        elif name.startswith("GQA"):
            note = f"{times['MHA 32/32'] / ms:.3f} of MHA's speed"
        print(f"{name:28s} {ms:8.4f} ms  {note}")
    return True


def compile_only(args: argparse.Namespace) -> bool:
    found = [
        c for n, (c, _) in cases(args.element).items() if not args.name or any(x in n for x in args.name)
    ]
    compile_all([variant(c, args.define) for c in found], args.jobs)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["compile", "check", "bench", "bench-features"])
    parser.add_argument("name", nargs="*", help="parts of case names")
    parser.add_argument("--head-dim", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--seqlen", type=int, nargs="*", default=[2048, 8192, 16384])
    parser.add_argument("--element", nargs="*", default=["bf16", "fp16"])
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--least-part", type=int, default=LEAST_PART, help="check: row tiles of a part of a column"
    )
    parser.add_argument("--deterministic", action="store_true", help="bench: that mode too")
    parser.add_argument("--parts", action="store_true", help="bench: each kernel on its own")
    parser.add_argument("--watchdog", action="store_true", help="trap instead of hanging; slower code")
    parser.add_argument("--define", nargs="*", default=[], help="fields and macros, as `block_m=64`")
    parser.add_argument(
        "--variant", nargs="*", default=[""], help="bench: kernels to compare, as MACRO,MACRO"
    )
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    actions = {"compile": compile_only, "check": check, "bench": bench, "bench-features": bench_features}
    return 0 if actions[args.action](args) else 1


if __name__ == "__main__":
    sys.exit(main())
