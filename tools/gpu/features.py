# SPDX-License-Identifier: Apache-2.0
"""Logit policies, gates, bands, block masks and head dimensions of the Hopper forward kernel.

python3 tools/gpu/features.py compile         # no GPU
python3 tools/gpu/features.py check [name ..]  # against float64
python3 tools/gpu/features.py check-large     # beyond 2^31 elements
python3 tools/gpu/features.py bench
"""

from __future__ import annotations

import argparse
import ctypes
import math
import struct
import sys
from dataclasses import dataclass, replace

from forward_launch import Driver, Kernel, Problem, compile_all, interleaved_ms
from forward_problems import judge, judge_threshold, new_skip_map, reference, topics
from nvrtc import ForwardConfig, GateConfig, with_checks

# (head_dim, head_dim_v) -> block_m, block_n, stages of query, key and value. Dense, and where one bit is one
# tile of 64 rows by the skip tile's keys (lists, gate bits); the third has a vote: stages, V on demand or not.
DENSE = {
    (64, 64): (192, 128, 2, 4, 4), (96, 96): (128, 128, 2, 2, 2), (128, 128): (128, 128, 2, 2, 2),
    (192, 128): (128, 128, 1, 2, 2), (192, 192): (128, 112, 1, 2, 2), (256, 256): (128, 80, 1, 2, 2),
}  # fmt: skip
TILED = {
    (64, 64): (128, 128, 2, 4, 4), (96, 96): (128, 128, 2, 2, 2), (128, 128): (128, 128, 2, 2, 2),
    (192, 128): (128, 64, 1, 4, 4), (192, 192): (128, 64, 1, 2, 4), (256, 256): (128, 64, 1, 2, 2),
}  # fmt: skip
VOTING = {
    (64, 64): (192, 128, 2, 4, 6, True), (96, 96): (128, 128, 1, 2, 4, True),
    (128, 128): (128, 128, 1, 2, 4, True), (192, 128): (128, 64, 1, 4, 4, True),
    (192, 192): (128, 64, 1, 2, 4, True), (256, 256): (128, 64, 1, 2, 2, False),
}  # fmt: skip

SOFTCAP = (192, 80, 2, 2, 4)  # dense, head_dim 128, the fast softcap, bounded or not


def pair_gate(head_dim: int, skip: str = "Never", log_sigmoid: bool = True) -> str:
    """The gate as the library computes it: folded into Q K^T where shared memory has room for its terms."""
    folded = "Folded" * (head_dim <= 128 and skip == "Never")
    return f"{folded}PairGate<{str(log_sigmoid).lower()}>"


def config_of(dims: tuple[int, int], element: str = "bf16", **options: object) -> ForwardConfig:
    """The shipped tile of a pair of padded head dimensions with the given policies."""
    voting = options.get("skip", "Never") != "Never"
    tiled = options.get("gate_bits") or options.get("mask") == "list"
    m, n, q, k, v, *private = (VOTING if voting else TILED if tiled else DENSE)[dims]
    logit = options.get("logit", ())
    if (
        {"Softcap", "SoftcapBounded"} & {*logit}
        and not (voting or tiled or "PairGate" in logit[0])
        and dims == (128, 128)
    ):
        m, n, q, k, v = SOFTCAP
    if voting and tiled and m == 192:  # three warpgroups have no registers for the pair gate beside a vote
        m, v = 128, 4
    return ForwardConfig(
        element=element, head_dim=dims[0], head_dim_v=dims[1], block_m=m, block_n=n, query_stages=q,
        key_stages=k, value_stages=v, private_values=bool(private and private[0]), **options,
    )  # fmt: skip


@dataclass
class BlockMask:
    """Lists of full and partial blocks made from a dense mask, and the bits of the partial ones."""

    visible: object  # bool [heads or 1, rows, keys], padded to whole blocks
    rows: int
    keys: int

    def __post_init__(self) -> None:
        import torch

        heads, rows, keys = self.visible.shape
        blocks = self.visible.reshape(heads, rows // self.rows, self.rows, keys // self.keys, self.keys)
        some, full = blocks.any(4).any(2), blocks.all(4).all(2)
        self.lists = []
        for chosen in (some & ~full, full):
            count = chosen.sum(-1).int()
            order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()
            self.lists += [count, order]
        partial = self.lists[0]
        self.bits_begin = (partial.flatten().cumsum(0) - partial.flatten()).int().reshape(partial.shape)
        words = []
        for h in range(heads):
            for r in range(rows // self.rows):
                for c in self.lists[1][h, r, : int(partial[h, r])].tolist():
                    block = blocks[h, r, :, c].reshape(self.rows, self.keys // 32, 32).long()
                    words.append((block << torch.arange(32, device="cuda")).sum(-1))
        empty = torch.zeros(1, self.rows, self.keys // 32, dtype=torch.long, device="cuda")
        self.bits = (torch.stack(words) if words else empty).to(torch.uint32).contiguous()

    @classmethod
    def of_full_blocks(cls, blocks, rows: int, keys: int) -> BlockMask:
        """From bool [heads, row blocks, key blocks], without a dense mask."""
        import torch

        mask = cls.__new__(cls)
        mask.visible, mask.rows, mask.keys = None, rows, keys
        none = torch.zeros(blocks.shape[:2], dtype=torch.int32, device="cuda")
        order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()
        mask.lists = [none, order, blocks.sum(-1).int(), order]
        mask.bits_begin, mask.bits = none, none
        return mask

    def pack(self) -> bytes:
        count, indices, full_count, full_indices = self.lists
        tensors = [count, indices, full_count, full_indices, self.bits_begin, self.bits]

        def strides(tensor) -> list[int]:  # batch broadcast, head, row block
            return [0, tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1)]

        four = strides(count) + strides(indices) + strides(full_count) + strides(full_indices)
        return struct.pack("<6Q12q2i", *(t.data_ptr() for t in tensors), *four, self.rows, self.keys)


class Gate:
    """The two small kernels that run before gated attention."""

    def __init__(self, driver: Driver, config: GateConfig, cubin: bytes) -> None:
        self.driver, self.config = driver, config
        self.prepare_function = driver.load(cubin, name="fsa_gate_prepare")
        self.bitmap_function = driver.load(cubin, name="fsa_gate_bitmap")

    def prepare(self, kernel: Kernel, p: Problem, out, lse, scalars: bool = True):
        """Returns a function that launches both; without `scalars` only the bitmap."""
        import torch

        address, storage, _ = kernel.parameters(p, out, lse)
        arguments = (ctypes.c_void_p * 1)(address)
        packed = p.cu_seqlens_q is not None
        batch = p.cu_seqlens_q.shape[0] - 1 if packed else p.q.shape[0]
        max_q, max_k = (p.max_seqlen_q, p.max_seqlen_k) if packed else (p.q.shape[1], p.k.shape[1])
        n = self.config.block_n
        grids = [(self.prepare_function, (-(-max_k // n), p.k.shape[-2], batch), n)] * scalars
        grids.append((self.bitmap_function, (-(-max_q // 256), p.q.shape[-2], batch), 128))

        def launch() -> None:
            _ = storage
            for function, grid, threads in grids:
                self.driver.call(
                    "cuLaunchKernel", function, *grid, threads, 1, 1, 0,
                    ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), arguments, None,
                )  # fmt: skip

        return launch


def with_gate_scratch(p: Problem, n: int) -> Problem:
    import torch

    packed = p.cu_seqlens_k is not None
    if packed:
        tiles = p.k.shape[0] // n + p.cu_seqlens_k.shape[0] - 1
        lead = (p.k.shape[-2],)
    else:
        tiles, lead = -(-p.k.shape[1] // n), (p.k.shape[0], p.k.shape[-2])
    nan = {"dtype": torch.float32, "device": "cuda"}
    return replace(
        p, gate_bits=new_skip_map(p, n), gate_delta=torch.full((*lead, tiles * n), math.nan, **nan),
        gate_extremes=torch.full((*lead, tiles, 2), math.nan, **nan),
        gate_terms=torch.full((*lead, tiles, n * 64 + 128), 255, dtype=torch.uint8, device="cuda"),
    )  # fmt: skip


def random_blocks(heads: int, rows: int, keys: int, block_rows: int, block_keys: int, density: float):
    import torch

    r, k = -(-rows // block_rows), -(-keys // block_keys)
    kind = torch.rand(heads, r, k, device="cuda")
    kind = kind.repeat_interleave(block_rows, 1).repeat_interleave(block_keys, 2)
    bits = torch.rand(heads, r * block_rows, k * block_keys, device="cuda") < 0.5
    return BlockMask((kind < density / 2) | ((kind < density) & bits), block_rows, block_keys)


def cases() -> dict[str, tuple[ForwardConfig, list]]:
    """Name -> configuration and problems (as functions, so that listing them needs no GPU)."""

    def tensor(*shape: int, scale: float = 1.0, dtype: object = None):
        import torch

        return (torch.randn(*shape, device="cuda") * scale).to(dtype or torch.bfloat16)

    def int32(values: list):
        import torch

        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def batched(
        batch: int, rows: int, keys: int, heads: int, kv_heads: int, d: int, dv: int, **options: object
    ):
        return Problem(
            tensor(batch, rows, heads, d), tensor(batch, keys, kv_heads, d), tensor(batch, keys, kv_heads, dv),
            **options,
        )  # fmt: skip

    def packed(lengths_q: list[int], lengths_k: list[int], tail: int, heads: int, kv: int, d: int, **options):
        cu_q, cu_k = ([0, *[sum(x[: i + 1]) for i in range(len(x))]] for x in (lengths_q, lengths_k))
        return Problem(
            tensor(cu_q[-1] + tail, heads, d), tensor(cu_k[-1] + tail, kv, d), tensor(cu_k[-1] + tail, kv, d),
            cu_seqlens_q=int32(cu_q), cu_seqlens_k=int32(cu_k), max_seqlen_q=max(lengths_q),
            max_seqlen_k=max(lengths_k), **options,
        )  # fmt: skip

    def gated(p: Problem, spread: float, **options: object) -> Problem:
        alpha = tensor(*p.q.shape[:-1], scale=spread)
        return replace(p, alpha=alpha, delta=tensor(*p.k.shape[:-1], scale=spread), **options)

    def spread(p: Problem) -> Problem:
        """Logits of up to ten caps, of either sign in whole rows."""
        import torch

        sign = 1 - torch.arange(p.q.shape[1], device="cuda") // 50 % 3
        return replace(
            p, q=(p.q.abs() * sign[:, None, None] * 12).to(p.q.dtype), k=(p.k.abs() * 3).to(p.k.dtype)
        )

    def closing(p: Problem) -> Problem:
        """Gates that close tiles, and not the same ones in neighbouring row tiles: alpha's sign alternates, and
        delta's from one tile of keys to the next but three."""
        import torch

        keys = torch.arange(p.k.shape[-3], device="cuda") // 128
        side = torch.tensor([40.0, -40.0, -40.0, 40.0, 40.0], device="cuda")[keys % 5]
        sign = 1 - torch.arange(p.q.shape[-3], device="cuda") // 64 % 2 * 2
        alpha = (p.alpha.float().abs() + 1) * sign[:, None]
        return replace(p, alpha=alpha, delta=p.delta.float() + side[:, None])

    causal = {"window_right": 0}
    found: dict[str, tuple[ForwardConfig, list]] = {}
    for dims in DENSE:
        d, dv = dims
        real, real_v = d - 8 if d != 256 else 248, dv - 24
        found[f"dims {d}x{dv} causal"] = (
            config_of(dims, right=True),
            [lambda d=d, dv=dv: batched(2, 300, 777, 4, 2, d, dv, **causal),
             lambda d=real, dv=real_v: batched(1, 1027, 1027, 2, 2, d, dv, **causal)],
        )  # fmt: skip
        found[f"dims {d}x{dv} full"] = (
            config_of(dims), [lambda d=real, dv=real_v: batched(1, 515, 1027, 2, 1, d, dv)],
        )  # fmt: skip
        found[f"threshold {d}x{dv}"] = (
            config_of(dims, right=True, skip="ThresholdSkip"),
            [lambda d=d, dv=dv, t=t: replace(
                Problem(*topics(1, 1100, 4, 2, d, __import__("torch").bfloat16), **causal), threshold=t,
                v=tensor(1, 1100, 2, dv), causal_lengths=True) for t in (1.0, 1e-30)],
        )  # fmt: skip
        found[f"blocks {d}x{dv}"] = (
            config_of(dims, mask="list"),
            [lambda d=d, dv=dv: replace(batched(1, 700, 900, 2, 1, d, dv),
                                        blocks=random_blocks(2, 700, 900, 128, 128, 0.5)),
             lambda d=d, dv=dv: replace(batched(2, 300, 900, 2, 1, d, dv),
                                        blocks=random_blocks(1, 300, 900, 64, 256, 0.3))],
        )  # fmt: skip
    b128 = (128, 128)
    found["softcap"] = (config_of(b128, right=True, logit=("Softcap",)),
                        [lambda: batched(1, 700, 700, 2, 2, 128, 128, softcap=5.0, **causal)])  # fmt: skip
    found["softcap exact"] = (config_of(b128, right=True, logit=("SoftcapExact",)),
                              [lambda: batched(1, 700, 700, 2, 2, 128, 128, softcap=5.0, **causal)])  # fmt: skip
    for d in (64, 128, 256):
        found[f"softcap bounded {d}"] = (
            config_of((d, d), right=True, logit=("SoftcapBounded",), sink=True),
            [lambda d=d: batched(1, 700, 700, 2, 2, d, d, softcap=5.0, sink=tensor(2), **causal),
             lambda d=d: spread(batched(2, 500, 300, 2, 1, d, d, softcap=38.0, sink=tensor(2) * 80, **causal)),
             lambda d=d: packed([130, 0, 70], [300, 5, 0], 37, 4, 2, d, softcap=30.0, sink=tensor(4) * 80,
                                **causal)],
        )  # fmt: skip
    for d in (64, 128):
        found[f"alibi {d}"] = (
            config_of((d, d), logit=("Alibi",)),
            [lambda d=d: batched(2, 300, 500, 4, 2, d, d, alibi=tensor(4).abs() * 0.1),
             lambda d=d: packed([130, 0, 70], [300, 5, 70], 37, 4, 2, d,
                                alibi=tensor(3, 4, dtype=__import__("torch").float64).abs() * 0.1)],
        )  # fmt: skip
        found[f"sink {d}"] = (
            config_of((d, d), right=True, sink=True),
            [lambda d=d: batched(2, 500, 300, 4, 2, d, d, sink=tensor(4, scale=20), **causal),
             lambda d=d: packed([130, 0, 70], [300, 5, 0], 37, 4, 2, d, sink=tensor(4), **causal)],
        )  # fmt: skip
        bands = [[0, 0, 0, 100], [70, 200, 130, 64], [128, 0, 50, 1], [0, 150, 0, 33], [5, 300, 600, 0]]
        found[f"bands {d}"] = (
            config_of((d, d), mask="band"),
            [lambda d=d, bands=bands: replace(batched(1, 1300, 1300, 10, 5, d, d), window_sizes=int32(bands)),
             lambda d=d, bands=bands: replace(batched(2, 300, 900, 5, 5, d, d), window_sizes=int32(bands)),
             lambda d=d, bands=bands: replace(
                 packed([130, 90, 70], [300, 5, 900], 3, 5, 5, d), window_sizes=int32(bands))],
        )  # fmt: skip
        for element in ("bf16",):
            found[f"all logits {d}"] = (
                config_of((d, d), element, right=True, sink=True,
                          logit=(pair_gate(d, log_sigmoid=False), "Softcap", "Alibi")),
                [lambda d=d: with_gate_scratch(
                    gated(batched(2, 500, 700, 4, 2, d, d, softcap=8.0, alibi=tensor(4).abs() * 0.1,
                                  sink=tensor(4), log_sigmoid=False, **causal), 1.0), 128)],
            )  # fmt: skip
        found[f"log gate {d}"] = (
            config_of((d, d), right=True, logit=(pair_gate(d),)),
            [lambda d=d, s=s: gated(batched(2, 500, 700, 4, 2, d, d, **causal), s)
             for s in (0.4, 1.0, 4.0, 20.0)],
        )  # fmt: skip
        gate = {"gate_test": True, "causal_lengths": True, **causal}
        gate_cases = [
            lambda d=d, gate=gate: gated(batched(1, 1300, 1300, 4, 2, d, d, **gate), 1.0, gate_threshold=1.0),
            lambda d=d, gate=gate: gated(packed([700, 0, 330], [800, 5, 330], 9, 4, 2, d, **gate), 1.0),
        ]
        for skip in ("Never", "ThresholdSkip"):
            tau = 0.0 if skip == "Never" else 1.0
            found[f"gate {d} {skip}"] = (
                config_of((d, d), right=True, logit=(pair_gate(d, skip),), gate_bits=True, skip=skip),
                [lambda c=c, tau=tau: replace(closing(c()), threshold=tau) for c in gate_cases],
            )  # fmt: skip
    return found


def check(args: argparse.Namespace) -> bool:
    import torch

    chosen = {name: c for name, c in cases().items() if not args.name or any(n in name for n in args.name)}
    guard = with_checks if args.watchdog else lambda config: config
    configs = {name: guard(config) for name, (config, _) in chosen.items()}
    gates = {name: GateConfig(c.block_n, c.left, c.right, c.mask) for name, c in configs.items()
             if c.mask != "list"}  # fmt: skip
    cubins = compile_all([*configs.values(), *gates.values()], args.jobs)
    driver, good = Driver(), True
    torch.zeros(1, device="cuda")
    for name, (_, problems) in chosen.items():
        config = configs[name]
        kernel = Kernel(driver, config, cubins[config])
        gate = Gate(driver, gates[name], cubins[gates[name]]) if name in gates else None
        results = []
        torch.manual_seed(0)
        for make in problems:
            p = make()
            if p.alpha is not None and p.gate_bits is None:
                p = with_gate_scratch(p, config.block_n)
            out = torch.full((*p.q.shape[:-1], p.v.shape[-1]), math.nan, dtype=p.q.dtype, device="cuda")
            lse = torch.full((*p.q.shape[:-3], p.q.shape[-2], p.q.shape[-3]), math.nan, device="cuda")
            if p.alpha is not None:
                gate.prepare(kernel, p, out, lse)()
            tolerance = 1e-4
            if {"Softcap", "SoftcapBounded"} & set(config.logit):
                tolerance += 2**-11 * p.softcap
            if config.skip != "Never" or p.gate_test:
                p.skip_map = new_skip_map(p, config.block_n) if config.skip != "Never" else p.gate_bits
                first = kernel.run(p, out, lse)
                ratio, lse_error, kept, wrong = judge_threshold(p, *first, config.block_n)
                extra = f"kept {kept:.2f}"
            else:
                first = kernel.run(p, out, lse)
                ratio, lse_error, wrong = judge(p, *first, tolerance)
                extra = ""
                if p.blocks is None and config.block_n in (64, 128) and p.alpha is None:
                    visible = replace(p, gate_bits=new_skip_map(p, config.block_n), gate_test=False)
                    gate.prepare(kernel, visible, out, lse, scalars=False)()
                    visible.skip_map = visible.gate_bits
                    *_, share, map_wrong = judge_threshold(visible, *first, config.block_n)
                    extra = f"map {share:.2f}"
                    wrong = wrong or (map_wrong and f"dense map: {map_wrong}")
            if p.q.dim() == 3:
                tail = int(p.cu_seqlens_q[-1])
                if first[0][tail:].any() or not first[1][:, tail:].isneginf().all():
                    wrong = wrong or "rows behind the last sequence"
            again = kernel.run(replace(p, skip_map=None), *(torch.full_like(x, math.nan) for x in first))
            same = torch.equal(first[0].view(torch.int16), again[0].view(torch.int16))
            wrong = wrong or ("" if same else "not the same twice")
            results.append(f"{ratio:.2f}/{lse_error:.0e} {extra} {wrong}".strip())
            good = good and not wrong
        print(f"{name:28s} {' | '.join(results)}", flush=True)
    print("all right" if good else "WRONG")
    return good


def check_large(args: argparse.Namespace) -> bool:
    """Query and output of more than 2^31 elements, rows at stride; the last rows of the last head."""
    import torch

    rows, heads, d, window = 140_000, 128, 128, 300
    config = config_of((d, d), left=True, right=True)
    cubins = compile_all([config], args.jobs)
    driver = Driver()
    torch.manual_seed(0)
    q = torch.randn(1, rows, heads, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, rows, 1, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse = Kernel(driver, config, cubins[config]).run(
        Problem(q, k, v, window_left=window, window_right=0)
    )
    last = window + 500  # rows that see nothing before this part
    part = Problem(q[:, -last:, -1:], k[:, -last:], v[:, -last:], window_left=window, window_right=0)
    exact, exact_lse = reference(part, 0, 0, 0, last, last, torch.float64)
    naive, _ = reference(part, 0, 0, 0, last, last, torch.bfloat16)
    rows_seen = slice(window, None)
    error = (out[0, -last:, -1:].double() - exact)[rows_seen].abs().max().item()
    allowed = 2 * (naive.double() - exact)[rows_seen].abs().max().item()
    lse_error = (lse[0, -1:, -last:].double() - exact_lse)[:, rows_seen].abs().max().item()
    written = not (out.isnan().any() or lse.isnan().any())
    print(
        f"{out.numel()} elements: error {error:.1e}, allowed {allowed:.1e}, lse {lse_error:.1e}, {written=}"
    )
    return error <= allowed and lse_error <= 1e-4 and written


def bench(args: argparse.Namespace) -> bool:
    """What each feature costs against the dense kernel of the same run: bf16, head_dim 128, 16k."""
    import torch

    n, d, dims = args.seqlen, 128, (128, 128)
    base = {"full": config_of(dims), "causal": config_of(dims, right=True)}
    configs = {
        **base, "softcap": config_of(dims, right=True, logit=("SoftcapBounded",)),
        "alibi": config_of(dims, right=True, logit=("Alibi",)), "sink": config_of(dims, right=True, sink=True),
        "window": config_of(dims, left=True, right=True), "band": config_of(dims, mask="band"),
        "list": config_of(dims, mask="list"),
        "gate": config_of(dims, right=True, logit=(pair_gate(d),), gate_bits=True),
        "gate_voting": config_of(dims, right=True, logit=("PairGate<true>",), gate_bits=True, skip="ThresholdSkip"),
    }  # fmt: skip
    gate_config = GateConfig(128, right=True)
    cubins = compile_all([*configs.values(), gate_config], args.jobs)
    driver = Driver()
    torch.zeros(1, device="cuda")
    print(torch.cuda.get_device_name())
    kernels = {name: Kernel(driver, c, cubins[c]) for name, c in configs.items()}
    gate = Gate(driver, gate_config, cubins[gate_config])

    def tensors(heads: int, kv_heads: int):
        return [
            torch.randn(1, n, h, d, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads)
        ]

    def launch(name: str, p: Problem):
        out = torch.empty_like(p.q)
        return kernels[name].prepare(p, out, torch.empty(1, p.q.shape[2], n, device="cuda"))

    mha = Problem(*tensors(16, 16))
    causal = replace(mha, window_right=0)
    gqa, same = Problem(*tensors(32, 8), window_right=0), Problem(*tensors(32, 32), window_right=0)
    slopes = torch.rand(16, device="cuda")
    sizes = [[0, 0, 0, 1024], [64, 0, 0, 1024], [64, 1024, 2048, 512]]
    bands = [
        replace(mha, window_sizes=torch.tensor([s] * 16, dtype=torch.int32, device="cuda")) for s in sizes
    ]
    densities = (0.5, 0.25, 0.1, 0.05)
    masks = []
    for density in densities:
        blocks = torch.rand(1, n // 128, n // 128, device="cuda") < density
        blocks[:, :, 0] = True
        masks.append(BlockMask.of_full_blocks(blocks, 128, 128))
    # With gamma = 1 a tile is open when its gate is the best so far or near it: about a tenth of them.
    gated = Problem(*tensors(16, 8), window_right=0, causal_lengths=True, gate_test=True, gate_threshold=1.0,
                    adaptive_gate=False)  # fmt: skip
    by_tile = torch.randn(1, n // 128, 8, device="cuda").repeat_interleave(128, 1)
    gated = with_gate_scratch(
        replace(gated, alpha=1 + 0.1 * torch.rand(1, n, 16, device="cuda"),
                delta=4 * by_tile + torch.rand(1, n, 8, device="cuda")), 128,
    )  # fmt: skip
    out, lse = torch.empty_like(gated.q), torch.empty(1, 16, n, device="cuda")
    bits = gate.prepare(kernels["gate"], gated, out, lse)
    attend, attend_voting = launch("gate", gated), launch("gate_voting", replace(gated, threshold=1.0))

    def whole() -> None:
        bits()
        attend()

    def whole_voting() -> None:
        bits()
        attend_voting()

    ungated = replace(gated, alpha=None, delta=None, gate_test=False)
    rows = {
        "causal": launch("causal", causal), "full": launch("full", mha),
        "GQA 32/8": launch("causal", gqa), "MHA 32/32": launch("causal", same),
        "softcap": launch("softcap", replace(causal, softcap=30.0)),
        "alibi": launch("alibi", replace(causal, alibi=slopes)), "sink": launch("sink", replace(causal, sink=slopes)),
        "window 1024": launch("window", replace(causal, window_left=1024)),
        "window 512": launch("window", replace(causal, window_left=512)),
        **{f"bands {s}": launch("band", p) for s, p in zip(sizes, bands, strict=True)},
        **{f"blocks {x}": launch("list", replace(mha, blocks=m)) for x, m in zip(densities, masks, strict=True)},
        "causal 16/8": launch("causal", ungated), "gate bitmap": bits, "gated": whole, "gated, tau 1": whole_voting,
    }  # fmt: skip
    times = dict(zip(rows, interleaved_ms(list(rows.values()), args.samples), strict=True))
    visible = 16 * sum(-(-64 * (t + 1) // 128) for t in range(n // 64))
    opened = sum((gated.gate_bits >> i & 1).sum().item() for i in range(32)) / visible
    rate = {"causal": 2 * 16 * n * n * d / times["causal"], "full": 4 * 16 * n * n * d / times["full"]}
    for name, ms in times.items():
        note = f"{times['causal'] / ms:.3f} of causal's speed"
        if name.startswith("window"):
            w = int(name.split()[1])
            note = (
                f"{4 * 16 * (n * (w + 1) - w * (w + 1) / 2) * d / ms / rate['causal']:.3f} of causal's rate"
            )
        elif name.startswith("blocks"):
            m = masks[densities.index(float(name.split()[1]))]
            share = m.lists[2].sum().item() / (n // 128) ** 2
            note = f"density {share:.3f}: {share * times['full'] / ms:.3f} of full's rate"
        elif name.startswith("GQA"):
            note = f"{times['MHA 32/32'] / ms:.3f} of MHA's speed"
        elif name.startswith("gate"):
            note = f"{times['causal 16/8'] / ms:.2f} x dense, {opened:.3f} of tiles open"
        print(f"{name:32s} {ms:8.4f} ms  {note}")
    return True


def compile_only(args: argparse.Namespace) -> bool:
    found = [c for name, (c, _) in cases().items() if not args.name or any(n in name for n in args.name)]
    gates = [GateConfig(n, left, right, mask) for n in (64, 128)
             for left, right, mask in [(False, False, "window"), (False, True, "window"),
                                       (True, True, "window"), (False, False, "band")]]  # fmt: skip
    compile_all(found + gates, args.jobs)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["compile", "check", "check-large", "bench"])
    parser.add_argument("name", nargs="*", help="parts of case names")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seqlen", type=int, default=16384)
    parser.add_argument("--watchdog", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    actions = {"compile": compile_only, "check": check, "check-large": check_large, "bench": bench}
    return 0 if actions[args.action](args) else 1


if __name__ == "__main__":
    sys.exit(main())
