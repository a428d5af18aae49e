#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints how many template instances and how much code each instruction set's kernels have, and the budget.

Sizes such as head_dim are run-time values: a type or number becomes a template argument only where that has
been measured to pay. The budget keeps the source install under two minutes on two cores.
Usage: kernel_budget.py BUILD_DIR
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MAX_INSTANCES = 24
MAX_TEXT_KIB = 256


def output_of(*command: str | Path) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def instances(path: Path) -> set[str]:
    """Names of emitted functions that come from a template; the compiler's clones count once."""
    names = set()
    for line in output_of("nm", "--demangle", "--defined-only", path):
        _, kind, name = line.split(" ", 2)
        if kind in "tTW" and "<" in name.split("(", 1)[0]:
            names.add(re.sub(r" \[clone [^]]*\]", "", name))
    return names


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    rows = []
    for folder in sorted(Path(sys.argv[1]).rglob("fsa_simd_*.dir")):
        for path in sorted(folder.rglob("*.o")):
            text_bytes = int(output_of("size", path)[1].split()[0])
            target = folder.name.removeprefix("fsa_simd_").removesuffix(".dir")
            rows.append((target, len(instances(path)), text_bytes / 1024))
    if not rows:
        print(f"kernel_budget: no fsa_simd_* objects under {sys.argv[1]}; build first")
        return 1
    print(f"{'target':<10}{'template instances':>20}{'code KiB':>10}")
    for target, count, kib in [*rows, ("budget", MAX_INSTANCES, MAX_TEXT_KIB)]:
        print(f"{target:<10}{count:>20}{kib:>10.0f}")
    over = [target for target, count, kib in rows if count > MAX_INSTANCES or kib > MAX_TEXT_KIB]
    print("kernel_budget: " + (f"over budget: {', '.join(over)}" if over else "within budget"))
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
