# SPDX-License-Identifier: Apache-2.0
"""Hopper forward kernels: their tiles, what NVRTC makes of them, their launches, and the time these take."""

from __future__ import annotations

import concurrent.futures
import ctypes
import math
import statistics
import struct
from dataclasses import dataclass

from nvrtc import ForwardConfig, compile_config, summary

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

    def launch(self, function, shape: tuple[int, ...], stream: int, arguments, early: bool = False) -> None:
        """Grid, block and bytes of shared memory; `early`: as soon as the kernel before admits it."""
        attribute = struct.pack("<ii64s", 6, 0, struct.pack("<i", early))  # programmatic stream serialization
        kept = ctypes.create_string_buffer(attribute)
        config = struct.pack("<7I4xQQI4x", *shape, stream, ctypes.addressof(kept), 1)
        self.call("cuLaunchKernelEx", ctypes.c_char_p(config), function, arguments, None)

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
    gate_terms: object = None  # uint8 [.., kv_heads, tiles, n * 64 + 128]
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
        struct.pack("<Q", pointer(p.gate_terms)),
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
