# SPDX-License-Identifier: Apache-2.0
"""The rows of the benchmark about native sparse attention: names, measurement, tables and floors."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from typing import Any

import measure
import nsa_workloads as nsa
from report import MB, floor

Row = dict[str, Any]
ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError)
LAYER_TITLES = ("layer", "tokens", "dense ms", "nsa ms", "spread", "x dense", "extra MB")
PART_TITLES = ("part", "tokens", "forward ms", "backward ms", "of nsa")
SELECTED_TITLES = ("selected branch", "pass", "ms", "spread", "GFLOP/s", "dense", "of dense")
LEGEND = """\
layer: compression, selection and the three branches of native sparse attention, forward and backward, 4 query
and 4 key heads of 64, float32, l 32, s 16, blocks of 64, top 16, window 512; dense: our own causal attention,
calls in turn. part: the same alone. selected branch: the same sizes, GFLOP/s over the visible pairs of the
selected blocks, backward 2.5 times forward; of dense: share of our own dense rate in the same run. random:
independent normal queries and keys; clustered: runs of 512 neighbours are about the same. extra MB: peak
beyond inputs, output and gradients, in a process of its own."""


def layer_name(tokens: int) -> str:
    return f"nsa_layer_{tokens // 1024}k/float32/both"


def selected_name(group: int, selection: str, direction: str) -> str:
    return f"nsa_selected_g{group}_{selection}/float32/{direction}"


def names(pattern: str) -> list[str]:
    """Rows whose name matches."""
    every = [layer_name(tokens) for tokens in nsa.LAYER_LENGTHS]
    for group in nsa.SELECTED_SHAPES:
        for selection in nsa.SELECTIONS:
            every += [selected_name(group, selection, direction) for direction in ("forward", "backward")]
    return [name for name in every if re.search(pattern, name)]


def measure_layer(tokens: int, runs: int, threads: int | None) -> Row:
    """threads: None leaves out peak memory."""
    extra = None if threads is None else nsa.layer_memory(tokens, threads)
    layer = nsa.Layer(tokens)
    whole, _ = measure.interleave({"nsa": layer.nsa(), "dense": layer.dense()}, runs)
    parts, _ = measure.interleave(layer.parts(), runs)
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in whole.items()}
    return {
        "case": layer_name(tokens),
        "tokens": tokens,
        "ms": ms["nsa"],
        "spread": measure.spread(whole["nsa"]),
        "dense_ms": ms["dense"],
        "over_dense": ms["dense"] / ms["nsa"],
        "extra_bytes": extra,
        "parts": {
            part: [1e3 * statistics.median(parts[part, d]) for d in ("forward", "backward")]
            for part in dict.fromkeys(part for part, _ in parts)
        },
        "seconds": whole,
    }


def measure_selected(group: int, selection: str, directions: list[str], runs: int) -> list[Row]:
    workload = nsa.Selected(group, selection)
    pairs = workload.pairs()
    causal = workload.tokens * (workload.tokens + 1) // 2
    rows = []
    for direction in directions:
        seconds, _ = measure.interleave(workload.calls(direction), runs)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        gflops = workload.flops(direction, pairs) / median["selected"] / 1e9
        dense_gflops = workload.flops(direction, causal) / median["dense"] / 1e9
        rows.append(
            {
                "case": selected_name(group, selection, direction),
                "direction": direction,
                "ms": 1e3 * median["selected"],
                "spread": measure.spread(seconds["selected"]),
                "gflops": gflops,
                "dense_gflops": dense_gflops,
                "share": gflops / dense_gflops,
                "seconds": seconds,
            }
        )
    return rows


def run(pattern: str, runs: int, threads: int | None, failed: list[str]) -> tuple[list[Row], list[Row]]:
    """(rows of the layer, rows of the selected branch), printed as they come; `failed` gets what raised."""
    wanted = set(names(pattern))
    layers: list[Row] = []
    selected: list[Row] = []
    for tokens in nsa.LAYER_LENGTHS:
        if layer_name(tokens) not in wanted:
            continue
        try:
            layers.append(measure_layer(tokens, runs, threads))
        except ERRORS as error:
            failed.append(f"{layer_name(tokens)}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
            continue
        print("\n".join(text_table(LAYER_TITLES, [layer_cells(layers[-1])])))
        print("\n".join(text_table(PART_TITLES, part_cells(layers[-1]))) + "\n", flush=True)
    for group, selection in itertools.product(nsa.SELECTED_SHAPES, nsa.SELECTIONS):
        directions = [d for d in ("forward", "backward") if selected_name(group, selection, d) in wanted]
        if not directions:
            continue
        try:
            rows = measure_selected(group, selection, directions, runs)
        except ERRORS as error:
            failed.append(f"nsa_selected_g{group}_{selection}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
            continue
        selected += rows
        print(
            "\n".join(text_table(SELECTED_TITLES, [selected_cells(row) for row in rows])) + "\n", flush=True
        )
    return layers, selected


def layer_cells(row: Row) -> list[str]:
    extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / MB:.0f}"
    cells = [row["case"].split("/")[0], str(row["tokens"]), f"{row['dense_ms']:.1f}", f"{row['ms']:.1f}"]
    return [*cells, f"{100 * row['spread']:.0f}%", f"{row['over_dense']:.2f}", extra]


def part_cells(row: Row) -> list[list[str]]:
    return [
        [part, str(row["tokens"]), f"{f:.1f}", f"{b:.1f}", f"{100 * (f + b) / row['ms']:.0f}%"]
        for part, (f, b) in row["parts"].items()
    ]


def selected_cells(row: Row) -> list[str]:
    cells = [row["case"].split("/")[0], row["direction"], f"{row['ms']:.1f}", f"{100 * row['spread']:.0f}%"]
    return [*cells, f"{row['gflops']:.0f}", f"{row['dense_gflops']:.0f}", f"{100 * row['share']:.0f}%"]


def text_table(titles: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    widths = [26] + [max(10, len(title)) for title in titles[1:]]
    return [
        f"{cells[0]:<{widths[0]}}"
        + "".join(f"{cell:>{width + 1}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        for cells in [list(titles), *rows]
    ]


def markdown_table(titles: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def markdown(layers: list[Row], selected: list[Row]) -> list[str]:
    lines: list[str] = []
    if layers:
        lines += [*markdown_table(LAYER_TITLES, [layer_cells(row) for row in layers]), ""]
        lines += [*markdown_table(PART_TITLES, [cells for row in layers for cells in part_cells(row)]), ""]
    if selected:
        lines += [*markdown_table(SELECTED_TITLES, [selected_cells(row) for row in selected]), ""]
    return [*lines, LEGEND.replace("\n", " "), ""] if lines else []


def break_even(layers: list[Row]) -> float | None:
    """Tokens from which on nsa is faster than dense: between measured lengths by a straight line through the
    logarithms. The shortest length when it is faster there already; None when it is nowhere faster."""
    rows = sorted(layers, key=lambda row: row["tokens"])
    slower = [i for i, row in enumerate(rows) if row["over_dense"] < 1]
    if not rows or (slower and slower[-1] == len(rows) - 1):
        return None
    if not slower:
        return float(rows[0]["tokens"])
    below, above = rows[slower[-1]], rows[slower[-1] + 1]
    low, high = math.log(below["over_dense"]), math.log(above["over_dense"])
    share = -low / (high - low)
    return below["tokens"] * (above["tokens"] / below["tokens"]) ** share


def floors(layers: list[Row], selected: list[Row]) -> list[dict[str, Any]]:
    longest = [row for row in layers if row["tokens"] == nsa.LAYER_LENGTHS[-1]]
    speed = [(row["case"], row["over_dense"]) for row in longest]
    memory = [(row["case"], row["extra_bytes"] / MB) for row in longest if row["extra_bytes"] is not None]
    even: list[tuple[str, float]] = []
    if len(layers) == len(nsa.LAYER_LENGTHS):
        length = break_even(layers)
        even = [("the layer, tokens", math.inf if length is None else length)]
    shares = {
        d: [(r["case"], r["share"]) for r in selected if r["direction"] == d] for d in ("forward", "backward")
    }
    rows = len(nsa.SELECTED_SHAPES) * len(nsa.SELECTIONS)
    return [
        floor("nsa layer of 32k, x own dense >= 3.5", 3.5, speed, 1),
        floor("nsa layer, break-even <= 8192 tokens", 8192.0, even, 1, at_most=True),
        floor("nsa layer of 32k, extra MB <= 300", 300.0, memory, 1, at_most=True),
        floor("nsa selected forward, of dense rate >= 0.6", 0.6, shares["forward"], rows),
        floor("nsa selected backward, of dense rate >= 0.6", 0.6, shares["backward"], rows),
    ]
