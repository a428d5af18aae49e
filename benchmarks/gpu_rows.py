# SPDX-License-Identifier: Apache-2.0
"""The GPU part: the table of tests/gpu/speed.py, on machines with a Hopper GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import flash_sparse_attention as fsa
import torch

sys.path.append(
    str(Path(__file__).resolve().parent.parent / "tests" / "gpu")
)  # last: it has a report.py, too
import speed  # noqa: E402

LEGEND = """\
GPU rows: forward and backward alone, bfloat16, through the Python call; medians of times taken in turn. TF: TFLOP/s
of useful work. ratio: to cuDNN in the same run, how many times faster than our own dense kernel, or (windows, blocks,
documents) the share of its rate."""


def available() -> bool:
    """Whether there is a GPU that the library and torch can use."""
    usable = {name: there for name, there, _ in fsa.backends()}
    return usable.get("cuda", False) and torch.cuda.is_available()


def names(pattern: str) -> list[str]:
    """gpu/<row> of the rows that match."""
    if not available():
        return []
    return [
        f"gpu/{row.name}"
        for row in speed.rows() + speed.backward_rows()
        if re.search(pattern, f"gpu/{row.name}")
    ]


def run(pattern: str) -> list[dict[str, Any]]:
    """The rows that match, printed as they come."""
    wanted = set(names(pattern))
    return speed.table(lambda name: f"gpu/{name}" in wanted) if wanted else []


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    titles = ("row", "ms", "tflops", "kept", "against", "against_ms", "ratio", "floor", "aim")
    lines = ["| " + " | ".join(titles) + " |", "|---|---:|---:|---:|---|---:|---:|---:|---:|"]
    lines += [
        "| " + " | ".join("-" if row[t] is None else str(row[t]) for t in titles) + " |" for row in rows
    ]
    return [*lines, "", LEGEND.replace("\n", " "), ""]
