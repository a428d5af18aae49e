# SPDX-License-Identifier: Apache-2.0
"""Builds the library for this Python, runs the GPU tests and benchmarks, writes report.json. `make test-gpu`.

Needs a Hopper GPU and a Python with torch, and fetches nothing. Usage: run.py [--only NAME...] [--random N]
[--no-build] [--report FILE]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "gpu"
sys.path[:0] = [str(HERE), str(ROOT / "tests"), str(ROOT / "tests" / "python"), str(BUILD / "python")]

import report  # noqa: E402


def build() -> None:
    """The extension and fsa-kernels into build/gpu. The CPU's kernels only where Highway's headers are."""
    has_highway = any(Path(p, "hwy/highway.h").exists() for p in ("/usr/include", "/usr/local/include"))
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DFSA_PYTHON=ON", "-DFSA_TESTS=OFF", "-DFSA_BENCHMARKS=OFF", "-DFSA_CUDA=ON"]
    configure += [f"-DFSA_SIMD={'ON' if has_highway else 'OFF'}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", BUILD, "--target", "_C", "fsa-kernels"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}\nbuilding the library failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="parts: table random behaviour host bench")
    parser.add_argument("--random", type=int, default=400, help="problems of the random generator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--report", type=Path, default=HERE / "report.json")
    args = parser.parse_args()
    start = time.monotonic()
    if not args.no_build:
        build()
        print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    importlib.invalidate_caches()  # build/gpu may not have been there when the interpreter started
    os.environ.setdefault("FSA_CACHE_DIR", str(BUILD / "kernels"))
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:4])  # of the worker processes

    import behaviour
    import flash_sparse_attention as fsa
    import gradients  # noqa: F401  its tests join those of behaviour
    import problems
    import speed
    import torch

    status = dict((name, (available, text)) for name, available, text in fsa.backends())["cuda"]
    if not status[0]:
        sys.exit(f"no usable GPU: {status[1]}")
    wanted = args.only or ["table", "random", "behaviour", "host", "bench"]
    cases, host, bench = [], {}, []
    chosen = [p for part in ("table", "random") if part in wanted for p in problems.select(part, args)]
    bench_kernels = speed.kernel_names() if "bench" in wanted else set()
    if chosen or bench_kernels:
        print(problems.prefill(BUILD / "fsa-kernels", chosen, bench_kernels), flush=True)
    if chosen:
        cases += problems.verify_all(chosen)
    if "behaviour" in wanted:
        cases += behaviour.run_all()
    if "host" in wanted:
        # In a process of its own: this one has a large heap and the oracle's workers behind it.
        command = [sys.executable, HERE / "speed.py"]
        host = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(*(f"host {name}: {us} us" for name, us in host.items()), sep="\n", flush=True)
    if "bench" in wanted:
        bench = speed.table()

    for case in cases:
        if case["result"] == "failed":
            print(f"FAILED {case['name']}: {case['detail']}")
    counts = {r: sum(c["result"] == r for c in cases) for r in ("passed", "failed", "refused")}
    info = subprocess.run([BUILD / "fsa-kernels", "info"], capture_output=True, text=True).stdout
    whole = not args.only
    result = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "whole": whole,
        "torch": torch.__version__,
        "cuda": status[1],
        "nvrtc": re.search(r"NVRTC +(\S+),", info)[1] if "NVRTC" in info else "?",
        "bundle": re.search(r"bundle +(\S+)", info)[1],
        "files": report.digests(ROOT),
        "counts": counts,
        "host_us": host,
        "benchmarks": bench,
        "cases": cases,
    }
    args.report.write_text(report.to_text(result))
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['refused']} refused by name "
          f"in {time.monotonic() - start:.0f} s; {args.report}")  # fmt: skip
    return int(counts["failed"] > 0 or (whole and counts["passed"] == 0))


if __name__ == "__main__":
    sys.exit(main())
