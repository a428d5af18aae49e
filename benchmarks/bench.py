# SPDX-License-Identifier: Apache-2.0
"""Times the rows of tests/cases.tsv tagged "bench" against torch's attention and the library's own dense one,
native sparse attention against the latter, and on a Hopper GPU its kernels against cuDNN's.

    python benchmarks/bench.py                                  every row; about fifteen minutes on two cores
    python benchmarks/bench.py --list                           names only
    python benchmarks/bench.py --filter 's2048.*/float32/forward'  rows whose case/dtype/pass matches
    python benchmarks/bench.py --markdown table.md              the report as a page

Calls of one case take turns in one process, with the same number of threads; a time is the median of the
runs. Floors are printed for information: the exit code is 0 unless a row could not be computed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import flash_sparse_attention as fsa
import gpu_rows
import measure
import nsa_rows
import report
import torch
from workloads import Workload, extra_memory, set_threads, tiny_calls

from cases import Case, load_cases  # isort: skip

ROOT = Path(__file__).resolve().parent.parent
TINY = "tiny_calls"


def group_rows(pattern: str) -> list[list[tuple[Case, str, list[str]]]]:
    """(case, dtype, directions) that match, in groups whose calls take turns.

    A group holds the dtypes of a case; all cases tagged "long" are one, as their rates are compared.
    """
    groups: dict[str, list[tuple[Case, str, list[str]]]] = {}
    for case in load_cases("bench", without=("dense_twin",)):
        every = ["decode"] if case.decode else ["forward", "backward"]
        if "long" in case.tags:
            every = ["forward"]
        for dtype in case.dtypes:
            wanted = [d for d in every if re.search(pattern, f"{case.name}/{dtype}/{d}")]
            if wanted:
                group = "long" if "long" in case.tags else case.name
                groups.setdefault(group, []).append((case, dtype, wanted))
    return list(groups.values())


def kinds() -> dict[str, list[tuple[str, str]]]:
    """(name, dtype) of the rows that each floor is about."""
    table = load_cases("bench", "speed", without=("dense_twin",))
    floor = load_cases("bench", "floor")
    cases = {
        "dense": [c for c in table if "dense" in c.tags],
        "decode": [c for c in table if c.decode],
        "threshold": [c for c in floor if c.threshold is not None],
        "gated": [c for c in floor if c.gate is not None],
        "window": [c for c in table if c.window_size is not None],
        "long": [c for c in table if "long" in c.tags],
    }
    return {kind: [(c.name, dtype) for c in chosen for dtype in c.dtypes] for kind, chosen in cases.items()}


def make_row(
    workload: Workload,
    direction: str,
    seconds: dict[str, list[float]],
    results: dict[str, Any],
    rates: dict[str, float],
    extra_bytes: int | None,
) -> report.Row:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ours = median["ours"]
    torch_best = min((s for name, s in median.items() if name.startswith("torch")), default=None)
    dense = median.get("dense")
    flops, nbytes = workload.flops(direction), workload.nbytes(direction)
    gflops, gbytes = flops / ours / 1e9, nbytes / ours / 1e9
    gemm = max(rates[f"gemm_{workload.dtype}"], rates["gemm_float32"])
    memory_bound = nbytes / rates["read"] > flops / gemm
    return {
        "case": workload.case.name,
        "dtype": workload.dtype,
        "direction": direction,
        "seqlen_k": workload.case.seqlen_k,
        "kernel": workload.kernel(),
        "ms": ours * 1e3,
        "spread": measure.spread(seconds["ours"]),
        "gflops": gflops,
        "gbytes": gbytes,
        "bound": "memory" if memory_bound else "gemm",
        "share": gbytes / rates["read"] if memory_bound else gflops / gemm,
        "torch_ms": None if torch_best is None else torch_best * 1e3,
        "over_torch": None if torch_best is None else torch_best / ours,
        "dense_ms": None if dense is None else dense * 1e3,
        "over_dense": None if dense is None else dense / ours,
        "kept": workload.kept,
        "extra_bytes": extra_bytes,
        "difference": workload.difference(direction, results),
        "seconds": seconds,
    }


def run_group(
    group: list[tuple[Case, str, list[str]]],
    arguments: argparse.Namespace,
    rates: dict[str, float],
    rows: list[report.Row],
) -> None:
    """Adds the rows of one group, printed as they come."""
    workloads = [(Workload(case, dtype), wanted) for case, dtype, wanted in group]
    extra: dict[tuple[str, str, str], int | None] = {}
    if arguments.memory:
        for case, dtype, wanted in group:
            for direction, nbytes in extra_memory(case, dtype, wanted, arguments.threads).items():
                extra[case.name, dtype, direction] = nbytes
    for direction in dict.fromkeys(d for _, wanted in workloads for d in wanted):
        taking_part = [w for w, wanted in workloads if direction in wanted]
        calls = {(i, name): c for i, w in enumerate(taking_part) for name, c in w.calls(direction).items()}
        seconds, results = measure.interleave(calls, arguments.repeat)
        for index, workload in enumerate(taking_part):
            of_workload = {name: s for (i, name), s in seconds.items() if i == index}
            first = {name: r for (i, name), r in results.items() if i == index}
            key = (workload.case.name, workload.dtype, direction)
            rows.append(make_row(workload, direction, of_workload, first, rates, extra.get(key)))
            print(report.line(rows[-1]), flush=True)


def run_tiny_calls(runs: int) -> list[dict[str, Any]]:
    lines = []
    for title, calls in tiny_calls().items():
        seconds, _ = measure.interleave(calls, runs)
        lines.append({"call": title, **{f"{n}_us": statistics.median(s) * 1e6 for n, s in seconds.items()}})
    return lines


def describe(threads: int) -> dict[str, Any]:
    tiny = torch.zeros(1, 1, 1, 64)
    plan = fsa.explain(tiny, tiny, tiny)
    return {
        "flash_sparse_attention": fsa.__version__,
        "kernel": f"{plan['backend']}:{plan['kernel']}",
        "backends": "; ".join(f"{name}: {text}" for name, available, text in fsa.backends() if available),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{measure.cpu_model()}, {os.cpu_count()} processors",
        "threads": threads,
        "load": f"{os.getloadavg()[0]:.1f} at the start",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--filter", default="", metavar="REGEX", help="rows whose case/dtype/pass matches")
    parser.add_argument("--repeat", type=int, default=3, help="runs per call; the median counts (default 3)")
    parser.add_argument(
        "--threads", type=int, default=fsa.num_threads(), help="of both libraries (default: all)"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out peak memory")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "bench-cpu.json", metavar="PATH")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the report as Markdown")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    arguments = parser.parse_args()
    if arguments.repeat < 1:
        parser.error(f"--repeat: {arguments.repeat}, must be at least 1")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    groups = group_rows(arguments.filter)
    if arguments.list:
        for case, dtype, wanted in (row for group in groups for row in group):
            print("\n".join(f"{case.name}/{dtype}/{direction}" for direction in wanted))
        print("\n".join([*nsa_rows.names(arguments.filter), *gpu_rows.names(arguments.filter)]))
        return 0
    with_tiny_calls = re.search(arguments.filter, TINY) is not None
    others = [*nsa_rows.names(arguments.filter), *gpu_rows.names(arguments.filter)]
    if not groups and not with_tiny_calls and not others:
        print(f"--filter: {arguments.filter!r} matches no row; --list shows them", file=sys.stderr)
        return 2

    set_threads(arguments.threads)
    machine = describe(arguments.threads)
    used = [dtype for group in groups for _, dtype, _ in group]
    dtypes = list(dict.fromkeys(["float32", "bfloat16", *used]))
    before = measure.measured_rates(dtypes)
    print("\n".join(report.facts(machine, {name: [rate] for name, rate in before.items()})))
    if groups:
        print("\n" + report.header(), flush=True)
    rows: list[report.Row] = []
    failed: list[str] = []
    for group in groups:
        try:
            run_group(group, arguments, before, rows)
        except nsa_rows.ERRORS as error:
            failed.append(f"{group[0][0].name}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
    if nsa_rows.names(arguments.filter):
        print(flush=True)
    threads = arguments.threads if arguments.memory else None
    layers, selected = nsa_rows.run(arguments.filter, arguments.repeat, threads, failed)
    on_gpu = gpu_rows.run(arguments.filter)
    after = measure.measured_rates(dtypes)
    rates = {name: [before[name], after[name]] for name in before}
    document = {
        "machine": machine,
        "rates": rates,
        "rows": rows,
        "nsa_layers": layers,
        "nsa_selected": selected,
        "gpu": on_gpu,
        "calls": run_tiny_calls(arguments.repeat) if with_tiny_calls else [],
        "floors": report.floors(rows, kinds()) + nsa_rows.floors(layers, selected),
        "failed": failed,
    }
    print("\n" + report.LEGEND + "\n")
    if layers or selected:
        print(nsa_rows.LEGEND + "\n")
    if on_gpu:
        print(gpu_rows.LEGEND + "\n")
    print("\n".join(report.facts({}, rates)) + "\n")
    if document["calls"]:
        print("\n".join(report.call_lines(document["calls"])) + "\n")
    print("\n".join(report.floor_lines(document["floors"])))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{arguments.json}")
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        further = nsa_rows.markdown(layers, selected) + gpu_rows.markdown(on_gpu)
        arguments.markdown.write_text(report.markdown(document, further))
        print(arguments.markdown)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
