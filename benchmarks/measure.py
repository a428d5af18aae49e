# SPDX-License-Identifier: Apache-2.0
"""Clocks, rates and memory: how anything is measured, with no knowledge of attention."""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import torch

Call = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)

BLOCK_SECONDS = 0.2  # short calls are repeated until one run takes this long


def _seconds(call: Call, repetitions: int) -> float:
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - start) / repetitions


def _repetitions(call: Call, first: float) -> int:
    """How often to call in one run; ``first`` is the time of the very first call, set-up included."""
    if first > BLOCK_SECONDS:
        return 1
    return max(1, math.ceil(BLOCK_SECONDS / max(_seconds(call, 3), 1e-7)))


def interleave(calls: dict[Name, Call], runs: int) -> tuple[dict[Name, list[float]], dict[Name, Any]]:
    """Times the calls in turn, A B A B: drift of the machine meets all of them alike.

    Returns:
        Seconds per call, one value per run, and what the very first call returned.
    """
    results, repetitions = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        results[name] = call()
        repetitions[name] = _repetitions(call, time.perf_counter() - start)
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            if repetitions[name] > 1:
                call()  # the other library's threads go to sleep, caches turn over
            seconds[name].append(_seconds(call, repetitions[name]))
    return seconds, results


def gemm_rate(dtype: torch.dtype, most: int = 2048, limit: float = 1.0) -> float:
    """FLOP/s of torch's own matrix product, the best of a few.

    Of the greatest size up to ``most`` that takes less than ``limit`` seconds: without instructions for 16-bit types
    torch's product of them makes 1 GFLOP/s, and 2048 would take it minutes.
    """
    size = min(256, most)
    while True:
        a, b = torch.randn(2, size, size).to(dtype).unbind()
        out = torch.empty_like(a)
        product = functools.partial(torch.mm, a, b, out=out)
        product()
        if 2 * size > most or 8 * _seconds(product, 1) > limit:
            break
        size *= 2
    seconds, _ = interleave({"gemm": product}, 4)
    return 2.0 * size**3 / min(seconds["gemm"])


def read_rate(nbytes: int = 1 << 29) -> float:
    """Bytes per second of a sum over more memory than caches hold, the best of a few."""
    data = torch.ones(nbytes // 4)
    seconds, _ = interleave({"read": lambda: data.sum()}, 4)
    return nbytes / min(seconds["read"])


def measured_rates(dtypes: list[str]) -> dict[str, float]:
    """GFLOP/s of a matrix product per dtype ("gemm_float32") and GB/s of reading ("read")."""
    rates = {f"gemm_{name}": gemm_rate(getattr(torch, name)) / 1e9 for name in dtypes}
    return {**rates, "read": read_rate() / 1e9}


def spread(seconds: list[float]) -> float:
    """(slowest - fastest) / median of the runs."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    return names.get("model name") or names.get("CPU part") or platform.machine()


def _status(field: str) -> int:
    """A size of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_extra_bytes(call: Call) -> int | None:
    """Memory that the call needs at its peak beyond what it returns. None where Linux does not say.

    For a process of its own: allocators and the library keep what earlier calls asked for.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
    except (OSError, AttributeError):
        return None
    returned = sum(t.nbytes for t in (result if isinstance(result, (tuple, list)) else (result,)))
    return max(0, peak - before - returned)
