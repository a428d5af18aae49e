# SPDX-License-Identifier: Apache-2.0
"""Hopper backward kernels: their configurations, what NVRTC makes of them, and their launches."""

from __future__ import annotations

import concurrent.futures
import ctypes
import math
import re
import struct
from dataclasses import dataclass, field

from forward_launch import Driver, Kernel, Problem, pack_scalar
from nvrtc import Compiled, ForwardConfig, compile_config, disassemble
from schedule import even_wave, last_wave

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
        return any("PairGate" in stage for stage in self.logit)

    @property
    def gate_terms(self) -> bool:
        return any(stage.startswith("FoldedPairGate") for stage in self.logit)

    @property
    def cuts(self) -> bool:
        """Whether long columns may be cut in parts."""
        return self.bits or self.mask != "window"

    @property
    def alternates(self) -> bool:
        """Whether dQ of a row tile is one warpgroup's; `backward_alternates`."""
        tile = (self.block_n, self.block_m, self.head_dim, self.head_dim_v)
        return tile == (128, 64, 128, 128) and self.stage_grad_query and not self.logit

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
        return (4 if not self.logit or (self.gate_terms and len(self.logit) == 1) else 2) + self.pair_gate

    @property
    def shared_bytes(self) -> int:
        operands = 2 if self.block_n == 64 else 1
        keys = self.block_n * (self.head_dim + self.head_dim_v) * 2
        queries = self.query_stages * self.block_m * (self.head_dim * 2 + self.row_vectors * 4)
        grad_out = self.grad_out_stages * self.block_m * self.head_dim_v * 2
        score_bytes = operands * self.block_m * self.block_n * 2
        slots = self.score_stages
        if self.block_n == 128 and (
            self.head_dim <= 64 or not self.pair_gate
        ):  # gradients leave through them
            slots = max(slots, -(-self.block_n * (self.head_dim + self.head_dim_v) * 2 // score_bytes))
        scores = slots * score_bytes
        grad_query = self.stage_grad_query * self.block_m * self.head_dim * 4
        alpha = self.score_stages * self.block_n // 16 * self.block_m * 4 if self.pair_gate else 0
        if self.gate_terms:
            alpha += self.query_stages * (self.block_m * 64 + 128) + 128
        infos = 2 * 176 + 2 * self.query_stages * 32 + 192 + 32
        handovers = 2 if self.stage_grad_query else 8
        barriers = 8 * (
            4 + 2 * (self.score_stages + self.query_stages + self.grad_out_stages + 2 + handovers)
        )
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
      .stage_grad_query = {int(self.stage_grad_query)}, .row_vectors = {self.row_vectors},
      .gate_terms = {int(self.gate_terms)}}};
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
extern "C" __global__ void __launch_bounds__(kPrepareThreads, kPrepareBlocks<Types>)
fsa_backward_prepare(const __grid_constant__ BackwardParams params) {{
  backward_prepare<Types>(params);
}}
extern "C" __global__ void __launch_bounds__(2 * Types::kBlockM)
fsa_backward_finish(const __grid_constant__ BackwardParams params) {{
  backward_finish<Types>(params);
}}
extern "C" __global__ void __launch_bounds__(kSumSinkThreads)
fsa_sum_sink(const __grid_constant__ BackwardParams params) {{
  if constexpr (Types::kSink) sum_sink<Types>(params);
}}
{transpose if self.bits else ""}{columns if self.mask == "list" else ""}{parts if self.cuts else ""}"""


def config_of(dims: tuple[int, int], element: str = "bf16", **options: object) -> BackwardConfig:
    """The shipped tile of a pair of padded head dimensions with the given policies."""
    tiled = options.get("bits") or options.get("mask") == "list" or options.get("logit")
    m, n, q, g, scores, staged = (TILED if tiled else DENSE)[dims]
    if any("PairGate" in stage for stage in options.get("logit", ())):  # alpha's sums need room
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
        # Heads of a wave, and of the one that goes from the first key tile to the last; None: as the library.
        self.per_wave = self.ascending = None
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
        row_terms = None
        if config.gate_terms:
            row_terms = torch.full((tiles, block_m * 64 + 128), 255, dtype=torch.uint8, device="cuda")
        sink_sums = torch.full((tiles,), math.nan, **nan) if config.sink else None
        turns = None
        staged = config.head_dim == 128 and config.block_n == 128 and config.stage_grad_query
        first_stores = config.deterministic or (staged and (config.cuts or config.left))
        if first_stores:
            turns = torch.full((tiles, 8), 1 << 30, dtype=torch.int32, device="cuda")
        done = torch.full((batch, heads), -1, dtype=torch.int32, device="cuda")
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
        head_bytes = max(max_q, 1) * (heads // kv_heads) * (2 * head_dim + 2 * p.v.shape[-1] + 4 * head_dim)
        per_wave = self.per_wave or even_wave(
            batch * kv_heads, L2_BUDGET_BYTES // head_bytes, max(1, -(-max_k // block_n))
        )
        ascending = self.ascending
        if ascending is None:
            causal = not config.cuts and config.right and not config.left
            waits_apart = config.deterministic and config.stage_grad_query
            ascending = last_wave(batch * kv_heads, per_wave) if causal and waits_apart else 0
        ascending_from = units - ascending * -(-max_k // block_n)
        clears, of_wave = None, per_wave * heads // kv_heads * row_tiles
        ahead = (
            config.stage_grad_query and not (config.cuts or first_stores) and not packed_q and not packed_k
        )
        if ahead and tiles > of_wave:
            clears = torch.full((1 + batch * heads,), -1, dtype=torch.int32, device="cuda")
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
        sink = outputs.get("sink")
        maps = b"".join([self.driver.tensor_map(given.grad_out, 64), self.driver.tensor_map(outputs["k"], 64),
                         self.driver.tensor_map(outputs["v"], 64)])  # fmt: skip
        body = struct.pack(
            "<" + "Qqqq" * 5 + "QQQQQQqQqqqQQqqiiiifiQQQQQiiQQii",
            *rows(given.grad_out, packed_q), *rows(outputs["q"], packed_q), *rows(outputs["k"], packed_k),
            *rows(outputs["v"], packed_k), *grad_lse, vectors.data_ptr(), sums.data_ptr(), pointer(alpha_sums),
            pointer(row_terms), pointer(sink_sums), pointer(turns), row_tiles, *bits, *lists, head_dim,
            p.k.shape[0] if packed_k else 0, per_wave, 1 / math.sqrt(head_dim), least_part,
            *map(pointer, parts), slots, ascending_from, done.data_ptr(), pointer(clears), of_wave, tiles - of_wave,
        ) + by_row(outputs.get("alpha"), packed_q) + by_row(outputs.get("delta"), packed_k) + pack_scalar(
            sink, *(() if sink is None else (0, 0, 1))
        )  # fmt: skip
        params = (forward + maps + body).ljust(PARAMS_BYTES, b"\0")
        assert len(params) == PARAMS_BYTES
        kept = ctypes.create_string_buffer(PARAMS_BYTES + 64)
        address = (ctypes.addressof(kept) + 63) // 64 * 64
        ctypes.memmove(address, params, PARAMS_BYTES)
        arguments = (ctypes.c_void_p * 1)(address)
        alive = (
            kept,
            storage,
            vectors,
            sums,
            alpha_sums,
            row_terms,
            sink_sums,
            turns,
            done,
            clears,
            columns,
            counts,
            parts,
        )

        def launcher(
            function, grid: tuple[int, int, int], threads: int, shared: int = 0, early: bool = False
        ):
            def launch() -> None:
                _ = alive
                stream = torch.cuda.current_stream().cuda_stream
                self.driver.launch(function, (*grid, threads, 1, 1, shared), stream, arguments, early)

            return launch

        row_grid = (max(1, -(-max_q // block_m)), heads, batch)
        # Columns before what they need nothing of, so that they are made meanwhile.
        columns_first = config.bits or column_grid is not None
        before = launcher(self.before, row_grid, 256, early=columns_first)
        launches = [] if columns_first else [before]
        if config.bits:
            words = columns.shape[-1] * p.gate_bits.shape[-1]
            launches.append(launcher(self.transpose, (-(-words // 4), heads, batch), 128))
        if column_grid is not None:
            launches.append(launcher(self.columns, column_grid, 512))
        if slots:
            blocks = 1 if column_grid is not None else -(-units // 16)
            launches.append(launcher(self.split, (blocks, 1, 1), 512, early=columns_first))
            units += slots
        if columns_first:
            launches.append(before)
        launches.append(
            launcher(self.main, (max(1, min(self.processors, units)), 1, 1), 384, config.shared_bytes, True)
        )
        launches.append(launcher(self.after, row_grid, 2 * block_m, early=True))
        if slots:
            launches.append(launcher(self.sum_parts, (slots, block_n // 8, 1), 128, early=True))
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
