# SPDX-License-Identifier: Apache-2.0
"""Check and time the Hopper forward kernel on its own: NVRTC, the driver API and torch, without the library.

python3 tools/gpu/forward.py compile          # no GPU: registers, spills, instruction counts
python3 tools/gpu/forward.py check            # against float64, with NaN-poisoned outputs and tails
python3 tools/gpu/forward.py bench --head-dim 128 --kernel 128x128 128x176
python3 tools/gpu/forward.py check-threshold
python3 tools/gpu/forward.py bench-threshold
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import itertools
import math
import statistics
import struct
import sys
from dataclasses import dataclass, replace

from nvrtc import ForwardConfig, compile_config, summary, with_checks

OPEN_WINDOW = 1 << 30
LOG2E = math.log2(math.e)
WAVE_BYTES, LISTED_WAVE_BYTES = 64 << 20, 16 << 20

# (head_dim, block_m x block_n) -> stages of query, key and value.
TILES = {
    (64, "128x128"): (2, 4, 4),
    (64, "192x128"): (2, 4, 4),
    (128, "128x128"): (2, 2, 2),
    (128, "128x176"): (1, 2, 2),
    (256, "128x64"): (1, 2, 2),
    (256, "128x80"): (1, 2, 2),
}
# With a vote: 64 rows by block_n is the skip tile, and each warpgroup has two value stages.
THRESHOLD_TILE = {64: ("192x128", (2, 4, 6)), 128: ("128x128", (1, 2, 4))}
DEFAULT_TILE = {64: "192x128", 128: "128x128", 256: "128x80"}


def config_for(head_dim: int, tile: str, element: str, left: bool, right: bool) -> ForwardConfig:
    return _config(head_dim, tile, TILES[head_dim, tile], element, left, right, "Never")


def threshold_config(head_dim: int, element: str, left: bool, right: bool) -> ForwardConfig:
    tile, stages = THRESHOLD_TILE[head_dim]
    return _config(head_dim, tile, stages, element, left, right, "ThresholdSkip")


def _config(
    head_dim: int, tile: str, stages: tuple[int, int, int], element: str, left: bool, right: bool, skip: str
) -> ForwardConfig:
    block_m, block_n = map(int, tile.split("x"))
    return ForwardConfig(
        element=element, head_dim=head_dim, head_dim_v=head_dim, block_m=block_m, block_n=block_n,
        query_stages=stages[0], key_stages=stages[1], value_stages=stages[2],
        private_values=skip != "Never", left=left, right=right, skip=skip,
    )  # fmt: skip


def compile_all(configs: list[ForwardConfig], jobs: int) -> dict[ForwardConfig, bytes]:
    """Compiles in parallel processes and prints one line each; a failure is raised with the compiler's log."""
    unique = list(dict.fromkeys(configs))
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        compiled = list(pool.map(compile_config, unique))
    for config, result in zip(unique, compiled, strict=True):
        print(summary(config, result))
    return {c: r.cubin for c, r in zip(unique, compiled, strict=True)}


class Driver:
    """The few driver calls that a launch needs."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *args: object) -> None:
        code = getattr(self.lib, name)(*args)
        if code != 0:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: error {code} ({text.value.decode() if text.value else 'unknown'})")

    def load(self, cubin: bytes, shared_bytes: int = 0, name: str = "fsa_forward") -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), cubin)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        self.call("cuFuncSetAttribute", function, 8, shared_bytes)  # max dynamic shared memory
        return function

    def tensor_map(self, tensor, rows: int) -> bytes:
        """Boxes of 64 columns by `rows` rows of a [batch, row, head, dim] or packed [row, head, dim] tensor."""
        import torch

        if tensor.dim() == 3:
            tensor = tensor.unsqueeze(0)
        batch, length, heads, dim = tensor.shape
        stride = [s * 2 for s in tensor.stride()]
        storage = (ctypes.c_char * 192)()
        aligned = (ctypes.addressof(storage) + 63) // 64 * 64
        code = 9 if tensor.dtype == torch.bfloat16 else 6
        self.call(
            "cuTensorMapEncodeTiled", ctypes.c_void_p(aligned), code, 4, ctypes.c_void_p(tensor.data_ptr()),
            (ctypes.c_uint64 * 4)(dim, max(length, 1), heads, batch),
            (ctypes.c_uint64 * 3)(stride[1], stride[2], max(stride[0], 16)),
            (ctypes.c_uint32 * 4)(64, rows, 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1),
            0, 3, 2, 0,  # no interleave, 128-byte swizzle, 128-byte promotion into L2, zeros beyond the edges
        )  # fmt: skip
        return ctypes.string_at(aligned, 128)


@dataclass
class Problem:
    """One call: tensors as [batch, seqlen, heads, dim], or packed with cu_seqlens; windows -1 = open."""

    q: object
    k: object
    v: object
    window_left: int = -1
    window_right: int = -1
    cu_seqlens_q: object = None
    cu_seqlens_k: object = None
    seqused_q: object = None
    seqused_k: object = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    threshold: float = 0
    causal_lengths: bool = False
    skip_map: object = None  # int32 [batch, heads, row tiles, words], or packed [heads, row tiles, words]
    softcap: float = 0
    alibi: object = None  # [heads] or [batch, heads]
    sink: object = None  # [heads]
    alpha: object = None  # [batch, seqlen_q, heads], or packed [total_q, heads]
    delta: object = None  # [batch, seqlen_k, kv_heads], or packed [total_k, kv_heads]
    gate_threshold: float = 0  # 0: 1 / seqlen_k
    gate_test: bool = False
    adaptive_gate: bool = True
    log_sigmoid: bool = True
    gate_bits: object = None  # as skip_map; written by the gate kernels
    gate_delta: object = None  # float32, scratch of the gate kernels: [.., kv_heads, keys of whole tiles]
    gate_extremes: object = None  # [.., kv_heads, tiles, 2]
    window_sizes: object = None  # int32 [kv_heads, 4]
    blocks: object = None  # BlockMask of features.py


PARAMS_BYTES = 1152


def pack_scalar(tensor, *strides: int) -> bytes:
    """ScalarOperand: pointer, strides of batch, row and head, type."""
    import torch

    if tensor is None:
        return bytes(40)
    types = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    return struct.pack("<Qqqqii", tensor.data_ptr(), *strides, types.index(tensor.dtype), 0)


def pack_policies(p: Problem, packed_q: bool, packed_k: bool) -> bytes:
    """The part of ForwardParams that starts with `softcap`."""

    def pointer(tensor) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    def by_row(tensor, packed: bool) -> bytes:
        strides = () if tensor is None else tensor.stride()
        return pack_scalar(tensor, *((0, *strides) if packed else strides))

    alibi = () if p.alibi is None else (p.alibi.stride(0) if p.alibi.dim() == 2 else 0, 0, p.alibi.stride(-1))
    bits = (0, 0, 0)
    if p.gate_bits is not None:
        bits = (0, *p.gate_bits.stride()[:2]) if packed_q else p.gate_bits.stride()[:3]
    delta = (0, 0)
    if p.gate_delta is not None:
        delta = (0, p.gate_delta.stride(0)) if packed_k else p.gate_delta.stride()[:2]
    return b"".join([
        struct.pack("<fi", p.softcap, p.q.shape[0] if packed_q else 0),
        pack_scalar(p.alibi, *alibi), pack_scalar(p.sink, 0, 0, 1),
        by_row(p.alpha, packed_q), by_row(p.delta, packed_k),
        struct.pack("<Qq", pointer(p.window_sizes), 4),
        struct.pack("<QQqq", pointer(p.gate_delta), pointer(p.gate_extremes), *delta),
        struct.pack("<Qqqq", pointer(p.gate_bits), *bits),
        struct.pack("<fiii", p.gate_threshold, p.gate_test, p.adaptive_gate, p.log_sigmoid),
        bytes(152) if p.blocks is None else p.blocks.pack(),
    ])  # fmt: skip


class Kernel:
    def __init__(self, driver: Driver, config: ForwardConfig, cubin: bytes) -> None:
        import torch

        self.driver, self.config = driver, config
        self.function = driver.load(cubin, config.shared_bytes)
        self.counter = torch.zeros(2, dtype=torch.int32, device="cuda")
        self.processors = torch.cuda.get_device_properties(0).multi_processor_count

    def prepare(self, p: Problem, out, lse):
        """Returns a function that launches on torch's current stream."""
        import torch

        address, storage, tiles = self.parameters(p, out, lse)
        arguments = (ctypes.c_void_p * 1)(address)
        grid = min(self.processors, tiles)

        def launch() -> None:
            _ = storage  # keeps the parameters alive
            self.driver.call(
                "cuLaunchKernel", self.function, grid, 1, 1, self.config.threads, 1, 1, self.config.shared_bytes,
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), arguments, None,
            )  # fmt: skip

        return launch

    def parameters(self, p: Problem, out, lse):
        """ForwardParams: address, the memory that holds it, and the number of work tiles."""

        packed_q, packed_k = p.cu_seqlens_q is not None, p.cu_seqlens_k is not None
        batch = (p.cu_seqlens_q if packed_q else p.q).shape[0] - packed_q
        heads, kv_heads, head_dim = p.q.shape[-2], p.k.shape[-2], p.q.shape[-1]
        max_q = p.max_seqlen_q if packed_q else p.q.shape[1]
        max_k = p.max_seqlen_k if packed_k else p.k.shape[1]
        maps = b"".join(
            [self.driver.tensor_map(p.q, 64), self.driver.tensor_map(p.k, self.config.block_n),
             self.driver.tensor_map(p.v, self.config.block_n), self.driver.tensor_map(out, 64)]
        )  # fmt: skip
        head_bytes = max(max_k, 1) * 2 * (head_dim + p.v.shape[-1])
        wave_bytes = WAVE_BYTES if p.blocks is None else LISTED_WAVE_BYTES
        heads_per_wave = max(1, min(batch * heads, wave_bytes // head_bytes * (heads // kv_heads)))

        def pointer(tensor) -> int:
            return 0 if tensor is None else tensor.data_ptr()

        out_stride = (0, *out.stride()[:2]) if packed_q else out.stride()[:3]
        lse_stride = (0, lse.stride(0)) if packed_q else lse.stride()[:2]
        map_stride = (0, 0, 0)
        if p.skip_map is not None:
            map_stride = (0, *p.skip_map.stride()[:2]) if packed_q else p.skip_map.stride()[:3]
        body = struct.pack(
            "<QqqqQqqQQQQQ8iiffiQqqq", pointer(out), *out_stride, pointer(lse), *lse_stride,
            pointer(p.cu_seqlens_q), pointer(p.cu_seqlens_k), pointer(p.seqused_q), pointer(p.seqused_k),
            pointer(self.counter), batch, heads, heads // kv_heads, p.v.shape[-1], max_q, max_k,
            OPEN_WINDOW if p.window_left < 0 else p.window_left,
            OPEN_WINDOW if p.window_right < 0 else p.window_right, heads_per_wave, LOG2E / math.sqrt(head_dim),
            p.threshold, p.causal_lengths, pointer(p.skip_map), *map_stride,
        ) + pack_policies(p, packed_q, packed_k)  # fmt: skip
        params = (maps + body).ljust(PARAMS_BYTES, b"\0")
        storage = ctypes.create_string_buffer(PARAMS_BYTES + 64)
        address = (ctypes.addressof(storage) + 63) // 64 * 64
        ctypes.memmove(address, params, PARAMS_BYTES)
        return address, storage, -(-max_q // self.config.block_m) * batch * heads

    def run(self, p: Problem, out=None, lse=None):
        """Into poisoned outputs unless given."""
        import torch

        if out is None:
            out = torch.full((*p.q.shape[:-1], p.v.shape[-1]), math.nan, dtype=p.q.dtype, device="cuda")
            lse = torch.full((*p.q.shape[:-3], p.q.shape[-2], p.q.shape[-3]), math.nan, device="cuda")
        self.prepare(p, out, lse)()
        torch.cuda.synchronize()
        if self.counter.any():
            raise RuntimeError(f"{self.config.name}: the work counter was not reset")
        return out, lse


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


def check(args: argparse.Namespace) -> bool:
    """Every case on every chosen kernel; True when all are right."""
    import torch

    guard = with_checks if args.watchdog else lambda config: config
    masks = [(False, False), (False, True), (True, True)]
    chosen = [(d, t) for d in args.head_dim for t in (args.kernel or [DEFAULT_TILE[d]]) if (d, t) in TILES]
    configs = {
        (d, tile, element, mask): guard(config_for(d, tile, element, *mask))
        for d, tile in chosen for element in args.element for mask in masks
    }  # fmt: skip
    cubins = compile_all(list(configs.values()), args.jobs)
    driver, good = Driver(), True
    torch.zeros(1, device="cuda")
    kernels = {key: Kernel(driver, config, cubins[config]) for key, config in configs.items()}
    for d, tile in chosen:
        for element in args.element:
            torch.manual_seed(0)
            failures, worst, worst_lse, count = [], 0.0, 0.0, 0
            for name, p in check_cases(d, torch.bfloat16 if element == "bf16" else torch.float16):
                kernel = kernels[d, tile, element, (p.window_left >= 0, p.window_right >= 0)]
                out, lse = kernel.run(p)
                ratio, lse_error, wrong = judge(p, out, lse)
                again, lse_again = kernel.run(p)
                if not (
                    torch.equal(out.view(torch.int16), again.view(torch.int16))
                    and torch.equal(lse.view(torch.int32), lse_again.view(torch.int32))
                ):
                    wrong = wrong or "not the same twice"
                worst, worst_lse, count = max(worst, ratio), max(worst_lse, lse_error), count + 1
                if wrong:
                    failures.append(f"    {name}: {wrong} (error ratio {ratio:.3g}, lse {lse_error:.2g})")
            good = good and not failures
            print(f"d{d} {tile} {element}: {count - len(failures)}/{count} right, error ratio {worst:.2f}, "
                  f"lse error {worst_lse:.1e}", *failures, sep="\n")  # fmt: skip
    return good


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


def check_threshold(args: argparse.Namespace) -> bool:
    """The vote, its skip map, and the output given the map."""
    import torch

    guard = with_checks if args.watchdog else lambda config: config
    masks = {"full": (False, False), "causal": (False, True)}
    configs = {
        (d, name): guard(threshold_config(d, "bf16", *mask))
        for d in args.head_dim if d in THRESHOLD_TILE for name, mask in masks.items()
    }  # fmt: skip
    cubins = compile_all(list(configs.values()), args.jobs)
    driver, good = Driver(), True
    torch.zeros(1, device="cuda")
    for (d, name), config in configs.items():
        kernel = Kernel(driver, config, cubins[config])
        causal = {"window_right": 0, "causal_lengths": True} if name == "causal" else {}
        torch.manual_seed(0)
        packed = topics(1, 1700, 2, 1, d, torch.bfloat16)
        cu = torch.tensor([0, 700, 700, 1030, 1700], dtype=torch.int32, device="cuda")
        cases = [
            ("topics", Problem(*topics(1, 1500, 4, 2, d, torch.bfloat16), threshold=1.0, **causal)),
            ("nothing skipped", Problem(*topics(1, 700, 2, 2, d, torch.bfloat16), threshold=1e-30, **causal)),
            ("packed", Problem(*(x[0] for x in packed), threshold=0.5, cu_seqlens_q=cu, cu_seqlens_k=cu,
                               max_seqlen_q=700, max_seqlen_k=700, **causal)),
        ]  # fmt: skip
        for case, p in cases:
            p.skip_map = new_skip_map(p, config.block_n)
            out, lse = kernel.run(p)
            ratio, lse_error, kept, wrong = judge_threshold(p, out, lse, config.block_n)
            good = good and not wrong
            errors = f"error ratio {ratio:.2f}, lse {lse_error:.1e}"
            print(f"threshold d{d} {name} {case}: kept {kept:.3f}, {errors} {wrong}")
    return good


def bench_threshold(args: argparse.Namespace) -> bool:
    """Causal, 16 query and 8 key-value heads, topic inputs: dense, the vote's price, and what skipping gains."""
    import torch

    configs = {}
    for d in set(args.head_dim) & set(THRESHOLD_TILE):
        configs[d, "Never"] = config_for(d, DEFAULT_TILE[d], "bf16", False, True)
        configs[d, "ThresholdSkip"] = threshold_config(d, "bf16", False, True)
        for name in args.define:
            fields = dict(x.split("=") for x in name.split(",") if "=" in x)
            macros = tuple(x for x in name.split(",") if "=" not in x)
            configs[d, name] = replace(
                configs[d, "ThresholdSkip"], defines=macros, **{k: int(v) for k, v in fields.items()}
            )
    cubins = compile_all(list(configs.values()), args.jobs)
    driver = Driver()
    torch.zeros(1, device="cuda")
    kernels = {key: Kernel(driver, config, cubins[config]) for key, config in configs.items()}
    for d, seqlen in itertools.product(sorted(set(args.head_dim) & set(THRESHOLD_TILE)), args.seqlen):
        torch.manual_seed(0)
        q, k, v = topics(1, seqlen, 16, 8, d, torch.bfloat16)
        out, lse = torch.empty_like(q), torch.empty(1, 16, seqlen, device="cuda")
        dense = Problem(q, k, v, window_right=0)
        one = replace(dense, threshold=1.0, causal_lengths=True)
        with_map = replace(one, skip_map=new_skip_map(one, kernels[d, "ThresholdSkip"].config.block_n))
        vote = kernels[d, "ThresholdSkip"]
        times = interleaved_ms(
            [kernels[d, "Never"].prepare(dense, out, lse), vote.prepare(replace(one, threshold=1e-30), out, lse),
             vote.prepare(one, out, lse), vote.prepare(with_map, out, lse),
             *(kernels[d, name].prepare(replace(one, threshold=t), out, lse)
               for name in args.define for t in (1e-30, 1.0, 1e9))], args.samples,
        )  # fmt: skip
        for i, name in enumerate(args.define):
            none, one_ms, most = times[4 + 3 * i : 7 + 3 * i]
            print(f"    {name}: price {none / times[0]:.3f}, threshold 1 {one_ms:.3f} ms "
                  f"({times[0] / one_ms:.2f} x dense), threshold 1e9 {most:.3f} ms")  # fmt: skip
        tiles = vote.config.block_n
        visible = sum(-(-64 * (t + 1) // tiles) for t in range(-(-seqlen // 64))) * 16
        kept = (
            sum(bin(int(w) & 0xFFFFFFFF).count("1") for w in with_map.skip_map.flatten().tolist()) / visible
        )
        price, gain = times[1] / times[0], times[0] / times[2]
        print(
            f"d{d} {seqlen}: dense {times[0]:.3f} ms, vote without skipping {times[1]:.3f} ({price:.3f}), "
            f"threshold 1 {times[2]:.3f} ms ({gain:.2f} x dense, kept {kept:.3f}), with map {times[3]:.3f}",
            flush=True,
        )
    return True


def interleaved_ms(functions: list, samples: int) -> list[float]:
    """Median milliseconds of each function, taken in turn so that all see the same clocks."""
    import torch

    launches = 3
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(samples):
        for function, into in zip(functions, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000)  # the host queues the launches meanwhile: its own time is not measured
            begin.record()
            for _ in range(launches):
                function()
            end.record()
            end.synchronize()
            into.append(begin.elapsed_time(end) / launches)
    return [statistics.median(t) for t in times]


def bench(args: argparse.Namespace) -> bool:
    """Our kernels and cuDNN attention in turn: 16k tokens in all (or one longer sequence), hidden size 2048."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    chosen = [(d, t) for d in args.head_dim for t in (args.kernel or [DEFAULT_TILE[d]]) if (d, t) in TILES]
    masks = {"full": (False, False), "causal": (False, True)}
    configs = {
        (d, tile, element, name): config_for(d, tile, element, *mask)
        for d, tile in chosen for element in args.element for name, mask in masks.items()
    }  # fmt: skip
    cubins = compile_all(list(configs.values()), args.jobs)
    driver = Driver()
    torch.zeros(1, device="cuda")
    kernels = {key: Kernel(driver, config, cubins[config]) for key, config in configs.items()}
    print(torch.cuda.get_device_name())
    for d, element, name, seqlen in itertools.product(args.head_dim, args.element, masks, args.seqlen):
        tiles = [t for dd, t in chosen if dd == d]
        dtype = torch.bfloat16 if element == "bf16" else torch.float16
        batch, heads = max(1, 16384 // seqlen), 2048 // d
        q, k, v = (torch.randn(batch, seqlen, heads, d, device="cuda", dtype=dtype) for _ in range(3))
        problem = Problem(q, k, v, window_right=0 if name == "causal" else -1)
        out = torch.empty_like(q)
        lse = torch.empty(batch, heads, seqlen, device="cuda")
        ours = [kernels[d, tile, element, name].prepare(problem, out, lse) for tile in tiles]
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))

        def cudnn(qt=qt, kt=kt, vt=vt, causal=name == "causal") -> None:
            scaled_dot_product_attention(qt, kt, vt, is_causal=causal)

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            times = interleaved_ms([cudnn, *ours], args.samples)
        flop = 4 * batch * heads * seqlen * seqlen * d / (2 if name == "causal" else 1)
        rates = [flop / ms / 1e9 for ms in times]
        pairs = zip(tiles, rates[1:], strict=True)
        line = "  ".join(f"{tile} {rate:5.0f} ({rate / rates[0]:.3f})" for tile, rate in pairs)
        print(f"{element} d{d} {name:6s} {seqlen:6d}  cuDNN {rates[0]:5.0f}  {line}", flush=True)
    return True


def compile_only(args: argparse.Namespace) -> bool:
    chosen = [(d, t) for d in args.head_dim for t in (args.kernel or [DEFAULT_TILE[d]]) if (d, t) in TILES]
    masks = [(False, False), (False, True), (True, True)]
    dense = [config_for(d, t, e, *m) for d, t in chosen for e in args.element for m in masks]
    threshold = [
        threshold_config(d, e, *m)
        for d in args.head_dim if d in THRESHOLD_TILE for e in args.element for m in masks
    ]  # fmt: skip
    compile_all(dense + threshold, args.jobs)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["compile", "check", "bench", "check-threshold", "bench-threshold"])
    parser.add_argument("--head-dim", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--kernel", nargs="*", help="block_m x block_n; default: the best of each head_dim")
    parser.add_argument("--element", nargs="*", default=["bf16"], choices=["bf16", "fp16"])
    parser.add_argument("--seqlen", type=int, nargs="*", default=[2048, 8192, 16384])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument(
        "--watchdog", action="store_true", help="checks: trap instead of hanging; slower code"
    )
    parser.add_argument(
        "--define", nargs="*", default=[], help="bench-threshold: variants to compare, as MACRO,field=value"
    )
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    actions = {
        "compile": compile_only, "check": check, "bench": bench,
        "check-threshold": check_threshold, "bench-threshold": bench_threshold,
    }  # fmt: skip
    return 0 if actions[args.action](args) else 1


if __name__ == "__main__":
    sys.exit(main())
