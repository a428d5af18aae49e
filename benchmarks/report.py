# SPDX-License-Identifier: Apache-2.0
"""Tables and floors: how measurements are shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Values = list[tuple[str, float]]  # of a floor: where, how much
MB = 1e6


def _number(value: float | None, digits: int, suffix: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{suffix}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _megabytes(row: Row) -> str:
    value = row["extra_bytes"]
    return "-" if value is None else f"{value / MB:.1f}"


COLUMNS: list[tuple[str, int, Callable[[Row], str]]] = [
    ("case", -22, lambda r: r["case"]),
    ("dtype", -8, lambda r: r["dtype"]),
    ("pass", -8, lambda r: r["direction"]),
    ("ms", 9, lambda r: _milliseconds(r["ms"])),
    ("spread", 7, lambda r: _number(100 * r["spread"], 0, "%")),
    ("GFLOP/s", 8, lambda r: _number(r["gflops"], 0)),
    ("GB/s", 6, lambda r: _number(r["gbytes"], 1) if r["bound"] == "memory" else "-"),
    ("of rate", 11, lambda r: f"{100 * r['share']:.0f}% {r['bound']}"),
    ("torch ms", 9, lambda r: _milliseconds(r["torch_ms"])),
    ("x torch", 8, lambda r: _number(r["over_torch"], 2)),
    ("dense ms", 9, lambda r: _milliseconds(r["dense_ms"])),
    ("x dense", 8, lambda r: _number(r["over_dense"], 2)),
    ("kept", 6, lambda r: _number(r["kept"], 3)),
    ("extra MB", 9, _megabytes),
    ("max diff", 9, lambda r: "-" if r["difference"] is None else f"{r['difference']:.1e}"),
]

LEGEND = """\
ms: median of the runs; spread: (slowest - fastest) / median. GFLOP/s: useful work, over the visible pairs of
kept tiles, backward 2.5 times forward. of rate: share of torch's matrix product in the same dtype or in float32,
whichever is faster, or of the rate of reading memory where that is the limit. torch:
scaled_dot_product_attention in the same process, calls in turn; for a sparse row torch computes the dense
forward. dense: our own attention without the row's threshold, gate, window or block mask. kept: kept tiles /
visible tiles. extra MB: peak beyond inputs and outputs, in a process of its own. max diff: largest distance of
the output from torch's, with a threshold from our own dense one."""


def header() -> str:
    return " ".join(f"{title:<{-width}}" if width < 0 else f"{title:>{width}}" for title, width, _ in COLUMNS)


def line(row: Row) -> str:
    cells = [(cell(row), width) for _, width, cell in COLUMNS]
    return " ".join(f"{text:<{-width}}" if width < 0 else f"{text:>{width}}" for text, width in cells)


def facts(machine: dict[str, Any], rates: dict[str, list[float]]) -> list[str]:
    """Library, machine, and the rates before and after the run."""
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in machine.items()]
    for name, values in rates.items():
        unit = "GB/s" if name == "read" else "GFLOP/s"
        title = "memory read" if name == "read" else name.replace("gemm_", "matrix product, ")
        lines.append(f"{title}: {' before, '.join(f'{value:.1f}' for value in values)}")
        lines[-1] += f" {unit}" + (" after" if len(values) > 1 else "")
    return lines


def call_lines(calls: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'microseconds per call, one row and one key':<44}{'ours':>8}{'torch':>8}"]
    return lines + [f"{c['call']:<44}{c['ours_us']:>8.1f}{c['torch_us']:>8.1f}" for c in calls]


def _select(rows: list[Row], names: list[str], direction: str, dtype: str) -> list[Row]:
    selected = [row for row in rows if row["case"] in names and row["direction"] == direction]
    return [row for row in selected if row["dtype"] == dtype]


def floor(title: str, limit: float, values: Values, expected: int, at_most: bool = False) -> dict[str, Any]:
    """One floor over its rows: the worst one decides, and it is held only when all of them were measured."""
    result = {"floor": title, "limit": limit, "status": "not measured", "text": f"0 of {expected} rows"}
    if not values:
        return result
    worst = max(values, key=lambda v: v[1]) if at_most else min(values, key=lambda v: v[1])
    missed = sum((v > limit) if at_most else (v < limit) for _, v in values)
    result["status"] = "FAIL" if missed else "pass" if len(values) == expected else "incomplete"
    result["text"] = f"worst {worst[1]:.2f} at {worst[0]}"
    if expected > 1:
        mean = math.exp(sum(math.log(max(v, 1e-9)) for _, v in values) / len(values))
        result["text"] += f"; geometric mean {mean:.2f}; {len(values) - missed} of {expected} rows hold it"
    return result


def floors(rows: list[Row], kinds: dict[str, list[tuple[str, str]]]) -> list[dict[str, Any]]:
    """Every floor with what was measured. ``kinds``: (name, dtype) of the rows that each floor is about."""

    def over(baseline: str, kind: str, direction: str, dtype: str = "") -> tuple[Values, int]:
        labels = {(name, t): f"{name} {t} {direction}" for name, t in kinds[kind] if dtype in ("", t)}
        found = {(r["case"], r["dtype"]): r[f"over_{baseline}"] for r in rows if r["direction"] == direction}
        measured = [(label, found[key]) for key, label in labels.items() if found.get(key) is not None]
        return measured, len(labels)

    def both(first: tuple[Values, int], second: tuple[Values, int]) -> tuple[Values, int]:
        return first[0] + second[0], first[1] + second[1]

    def bfloat16_over_float32(direction: str) -> tuple[Values, int]:
        names = [name for name, dtype in kinds["dense"] if dtype == "bfloat16"]
        float32 = {r["case"]: r["gflops"] for r in _select(rows, names, direction, "float32")}
        paired = [r for r in _select(rows, names, direction, "bfloat16") if r["case"] in float32]
        ratios = [(f"{r['case']} {direction}", r["gflops"] / float32[r["case"]]) for r in paired]
        return ratios, len(names)

    lengths = _select(rows, [name for name, _ in kinds["long"]], "forward", "float32")
    lengths.sort(key=lambda r: r["seqlen_k"])
    rate: Values = []
    memory: Values = []
    if len(lengths) == len(kinds["long"]):
        shortest, longest = lengths[0], lengths[-1]
        rate = [(longest["case"], longest["gflops"] / shortest["gflops"])]
        if longest["extra_bytes"] is not None:
            memory = [(longest["case"], longest["extra_bytes"] / MB)]
    own = both(bfloat16_over_float32("forward"), bfloat16_over_float32("backward"))
    gated = both(over("dense", "gated", "forward"), over("dense", "gated", "backward"))
    return [
        floor("float32 forward, x torch >= 1.0", 1.0, *over("torch", "dense", "forward", "float32")),
        floor("float32 backward, x torch >= 1.0", 1.0, *over("torch", "dense", "backward", "float32")),
        floor("bfloat16, x own float32 >= 0.9", 0.9, *own),
        floor("decode, x torch >= 2", 2.0, *over("torch", "decode", "decode")),
        floor("threshold forward, x own dense >= 1.5", 1.5, *over("dense", "threshold", "forward")),
        floor("threshold backward, x own dense >= 4", 4.0, *over("dense", "threshold", "backward")),
        floor("gated, x own dense >= 4", 4.0, *gated),
        floor("window 256 of 16k forward, x dense >= 10", 10.0, *over("dense", "window", "forward")),
        floor("window 256 of 16k backward, x dense >= 10", 10.0, *over("dense", "window", "backward")),
        floor("64k tokens, rate / 4k rate >= 0.9", 0.9, rate, 1),
        floor("64k tokens, extra MB <= 64", 64.0, memory, 1, at_most=True),
    ]


def floor_lines(results: list[dict[str, Any]]) -> list[str]:
    return [f"{f['status']:<13}{f['floor']:<44}{f['text']}" for f in results]


def markdown(document: dict[str, Any], further: list[str]) -> str:
    """The whole report for a page of documentation; further: native sparse attention and the GPU."""
    titles = [title for title, _, _ in COLUMNS]
    lines = ["- " + fact for fact in facts(document["machine"], document["rates"])]
    lines += ["", "| " + " | ".join(titles) + " |"]
    lines += ["|" + "|".join("---" if width < 0 else "---:" for _, width, _ in COLUMNS) + "|"]
    lines += ["| " + " | ".join(cell(row) for _, _, cell in COLUMNS) + " |" for row in document["rows"]]
    lines += ["", LEGEND.replace("\n", " "), ""]
    lines += further
    if document["calls"]:
        lines += ["| microseconds per call, one row and one key | ours | torch |", "|---|---:|---:|"]
        lines += [f"| {c['call']} | {c['ours_us']:.1f} | {c['torch_us']:.1f} |" for c in document["calls"]]
        lines += [""]
    lines += ["| floor | status | measured |", "|---|---|---|"]
    lines += [f"| {f['floor']} | {f['status']} | {f['text']} |" for f in document["floors"]]
    return "\n".join(lines) + "\n"
