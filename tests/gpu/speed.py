# SPDX-License-Identifier: Apache-2.0
"""Host time of a call, and rates beside cuDNN's in the same minute."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import flash_sparse_attention as fsa
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROWS = [
    (dim, causal, seqlen)
    for dim in (64, 128, 256)
    for causal in (False, True)
    for seqlen in (2048, 8192, 16384)
]
SAMPLES = 20
LAUNCHES = 3


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
    for _ in range(20_000):  # the processor's clock rises, the interpreter specialises
        fsa.attention(query, query, query)
    with torch.no_grad():
        return {
            "attention": _best_us(lambda: fsa.attention(query, query, query)),
            "attention, causal, lse": _best_us(
                lambda: fsa.attention(query, query, query, causal=True, return_lse=True)
            ),
            "attention, out given": _best_us(lambda: fsa.attention(query, query, query, out=out)),
            "torch.add, out given": _best_us(lambda: torch.add(query, query, out=out)),
            "torch.empty_like": _best_us(lambda: torch.empty_like(query)),
            "scaled_dot_product_attention": _best_us(
                lambda: scaled_dot_product_attention(transposed, transposed, transposed)
            ),
        }


def interleaved_ms(functions: list[Callable[[], Any]]) -> list[float]:
    """Median milliseconds of each, taken in turn so that all see the same clocks."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(SAMPLES):
        for function, into in zip(functions, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(400_000)  # the host queues the launches meanwhile: its own time is not measured
            begin.record()
            for _ in range(LAUNCHES):
                function()
            end.record()
            end.synchronize()
            into.append(begin.elapsed_time(end) / LAUNCHES)
    return [statistics.median(t) for t in times]


def table() -> list[dict[str, Any]]:
    """16k tokens in all, hidden size 2048, random normal data; TFLOP/s through the Python call, and cuDNN's."""
    rows = []
    for dim, causal, seqlen in ROWS:
        batch, heads = max(1, 16384 // seqlen), 2048 // dim
        query, key, value = (
            torch.randn(batch, seqlen, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        qt, kt, vt = (tensor.transpose(1, 2) for tensor in (query, key, value))

        def ours(q=query, k=key, v=value, causal=causal) -> None:
            fsa.attention(q, k, v, causal=causal)

        def cudnn(q=qt, k=kt, v=vt, causal=causal) -> None:
            scaled_dot_product_attention(q, k, v, is_causal=causal)

        with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            our_ms, cudnn_ms = interleaved_ms([ours, cudnn])
        flop = 4 * batch * heads * seqlen * seqlen * dim / (2 if causal else 1)
        row = {
            "head_dim": dim, "mask": "causal" if causal else "full", "seqlen": seqlen,
            "tflops": round(flop / our_ms / 1e9, 1), "cudnn_tflops": round(flop / cudnn_ms / 1e9, 1),
            "ratio": round(cudnn_ms / our_ms, 3),
        }  # fmt: skip
        rows.append(row)
        print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


if __name__ == "__main__":
    print(json.dumps(host_times()))
