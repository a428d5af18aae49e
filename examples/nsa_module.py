# SPDX-License-Identifier: Apache-2.0
"""One layer of native sparse attention over two packed sequences, the first twice as long as the second: forward and
backward, part by part and as a module, with time and peak memory of each.

    python examples/nsa_module.py                       # 4096 + 2048 tokens
    python examples/nsa_module.py --full                # 65536 + 32768 tokens
    python examples/nsa_module.py --dtype float32 --gate-mode per_head

Sizes are those of the usage example of FSA (Relaxed-System-Lab/Flash-Sparse-Attention): hidden 4096, 4 query and 4 key
heads of 128, windows of 32 tokens every 16, the best 16 blocks of 64 tokens, a sliding window of 512, llama3 rotary
positions. docs/native_sparse.md explains them.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import flash_sparse_attention as fsa
import torch
from flash_sparse_attention import nsa
from torch import Tensor

TOKENS = (4096, 2048)
FULL_TOKENS = (65536, 32768)
HIDDEN, Q_HEADS, KV_HEADS, HEAD_DIM = 4096, 4, 4, 128
COMPRESS = {"compress_block": 32, "compress_stride": 16}
SELECT = {**COMPRESS, "block_size": 64, "top_k": 16, "init_blocks": 1, "local_blocks": 2}
WINDOW_LEFT = 512
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make_module(gate_mode: str, dtype: torch.dtype) -> nsa.NativeSparseAttention:
    rope = nsa.RopeConfig(HEAD_DIM, rope_theta=500_000.0, rope_scaling=LLAMA3, max_position_embeddings=131072)
    module = nsa.NativeSparseAttention(
        hidden_size=HIDDEN,
        num_q_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        kernel_size=COMPRESS["compress_block"],
        kernel_stride=COMPRESS["compress_stride"],
        block_size=SELECT["block_size"],
        topk=SELECT["top_k"],
        init_blocks=SELECT["init_blocks"],
        local_blocks=SELECT["local_blocks"],
        window_size=WINDOW_LEFT,
        rope_config=rope,
        gate_mode=gate_mode,
    )
    return module.to(dtype)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def timed(function: Callable[[], object]) -> tuple[object, float, float | None]:
    """(result, seconds, bytes at the peak beyond those before; None where the system does not say)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        before = resident("VmRSS")
    except (OSError, AttributeError):
        before = None
    begin = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - begin
    return result, seconds, None if before is None else resident("VmHWM") - before


def show(name: str, forward: tuple[float, float | None], backward: tuple[float, float | None]) -> None:
    def cells(measured: tuple[float, float | None]) -> str:
        seconds, peak = measured
        return f"{1e3 * seconds:>10.1f}{'-' if peak is None else f'{peak / 1e6:.0f}':>10}"

    print(f"{name:<28}{cells(forward)}{cells(backward)}", flush=True)


def measure(name: str, function: Callable[..., object], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward of one part on its own; its differentiable outputs and whatever else it returns."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outs, *forward = timed(lambda: function(*leaves))
    outs = outs if isinstance(outs, tuple) else (outs,)
    recorded = [out for out in outs if isinstance(out, Tensor) and out.requires_grad]
    grads = [torch.ones_like(out) for out in recorded]
    _, *backward = timed(lambda: torch.autograd.backward(recorded, grads))
    show(name, tuple(forward), tuple(backward))
    return tuple(out.detach() if isinstance(out, Tensor) else out for out in outs)


def positions(cu_seqlens: Tensor) -> Tensor:
    """Of packed rows inside their sequences."""
    return torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])


def run_parts(module: nsa.NativeSparseAttention, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What the module does, with the functions that it does it with."""
    heads = {"q": Q_HEADS, "k": KV_HEADS, "v": KV_HEADS}

    def project(x: Tensor) -> tuple[Tensor, ...]:
        projected = (getattr(module, f"proj_{name}")(x) for name in heads)
        return tuple(t.unflatten(-1, (-1, HEAD_DIM)) for t in projected)

    def gate(x: Tensor) -> Tensor:
        gates = module.gate(x)
        return gates if module.gate_mode == "per_token" else gates.unflatten(-1, (-1, 3))

    query, key, value = measure("projections", project, x)
    (gates,) = measure("gates", gate, x)

    def compress(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        options = {**COMPRESS, "cu_seqlens": cu_seqlens}
        entries, cu = nsa.compress(key, module.compress_key, intra_block_pe=module.intra_block_pe, **options)
        return entries, nsa.compress(value, module.compress_value, **options)[0], cu

    compressed_key, compressed_value, cu_compressed = measure("compression", compress, key, value)

    def rotate(query: Tensor, key: Tensor, compressed_key: Tensor) -> tuple[Tensor, ...]:
        rope = {"config": module.rope_config, "bound": len(x)}
        entries = positions(cu_compressed) * COMPRESS["compress_stride"]  # the first token of each window
        rotated = (nsa.apply_rope(t, positions(cu_seqlens), **rope) for t in (query, key))
        return (*rotated, nsa.apply_rope(compressed_key, entries, **rope))

    query, key, compressed_key = measure("rotary positions", rotate, query, key, compressed_key)

    def compressed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        packed = {"cu_seqlens": cu_seqlens, "cu_seqlens_compressed": cu_compressed}
        return nsa.compressed_attention(query, key, value, **SELECT, **packed)

    def selected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size = SELECT["block_size"]
        return nsa.selected_attention(query, key, value, blocks, block_size=size, cu_seqlens=cu_seqlens)

    def sliding(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        packed = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        return fsa.attention(query, key, value, causal=True, window_size=(WINDOW_LEFT, -1), **packed)

    compressed_out, _, blocks = measure(
        "compressed and selection", compressed, query, compressed_key, compressed_value
    )
    # The first call would time the algorithms by itself; here that shall not count as its time.
    plans = nsa.profile(query, key, value, blocks, block_size=SELECT["block_size"], cu_seqlens=cu_seqlens)
    (selected_out,) = measure("selected", selected, query, key, value)
    (sliding_out,) = measure("sliding", sliding, query, key, value)
    (out,) = measure("gated sum", nsa.combine, compressed_out, selected_out, sliding_out, gates)
    (y,) = measure("output projection", lambda out: module.proj_o(out.flatten(-2)), out)
    for direction, plan in plans.items():
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in plan["times_ms"].items())
        print(f"selected, {direction}: {plan['algorithm']}, chosen by {plan['source']}: {times}")
    return y


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="65536 + 32768 tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--gate-mode", choices=("per_token", "per_head"), default="per_token")
    arguments = parser.parse_args()
    lengths = FULL_TOKENS if arguments.full else TOKENS
    dtype = getattr(torch, arguments.dtype)

    torch.manual_seed(0)
    module = make_module(arguments.gate_mode, dtype)
    cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    x = torch.randn(sum(lengths), HIDDEN).to(dtype)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(f"{lengths[0]} + {lengths[1]} tokens, {arguments.dtype}, {parameters:,} parameters")
    print(f"{'':<28}{'forward':>20}{'backward':>20}\n{'part':<28}" + f"{'ms':>10}{'peak MB':>10}" * 2)

    by_parts = run_parts(module, x, cu_seqlens)
    module.zero_grad()
    print(f"\n{'':<28}{'forward':>20}{'backward':>20}")
    leaf = x.requires_grad_()
    y, *forward = timed(lambda: module(leaf, cu_seqlens))
    grad = torch.randn_like(y)
    _, *backward = timed(lambda: y.backward(grad))
    show("the module", tuple(forward), tuple(backward))

    difference = (y - by_parts).abs().max().item()
    print(f"\nlargest difference between the module and its parts: {difference:g}")
    for name, parameter in module.named_parameters():
        print(
            f"{name:<20}{str(tuple(parameter.shape)):<18} gradient norm {parameter.grad.float().norm():.4g}"
        )
    return 0 if difference == 0 and all(p.grad.isfinite().all() for p in module.parameters()) else 1


if __name__ == "__main__":
    sys.exit(main())
