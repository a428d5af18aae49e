# SPDX-License-Identifier: Apache-2.0
"""report.json: what the GPU tests saw, and for which sources. Without torch, so that `make test` can read it.

Usage: report.py   says whether the report speaks of the sources as they are
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

REPORT = Path(__file__).with_name("report.json")
ROOT = Path(__file__).resolve().parents[2]
# What runs on the GPU or decides what runs there.
SOURCES = ("kernels/**/*.cuh", "kernels/**/*.h", "src/backend/cuda/*", "src/jit/*")


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file that the report vouches for."""
    files = sorted(path for pattern in SOURCES for path in root.glob(pattern) if path.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}


def to_text(result: dict[str, Any]) -> str:
    """JSON with one line per case and per benchmark, so that a difference of two reports can be read."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            lines.append(f' "{key}": [\n{rows}\n ]' if value else f' "{key}": []')
        else:
            lines.append(f' "{key}": {json.dumps(value, indent=1) if key == "files" else json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def verdict(root: Path = ROOT, path: Path = REPORT) -> str:
    """GPU verified, or GPU UNVERIFIED with what changed."""
    if not path.exists():
        return "GPU UNVERIFIED: there is no tests/gpu/report.json; `make test-gpu` writes it"
    result = json.loads(path.read_text())
    then, now = result["files"], digests(root)
    changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    where = f"{result['device']}, {result['date']}"
    if changed:
        return f"GPU UNVERIFIED: changed since the run on {where}: {', '.join(changed)}"
    counts = result["counts"]
    if not result["whole"] or counts["failed"] or not counts["passed"]:
        return f"GPU UNVERIFIED: the run on {where} was partial or failed ({counts['failed']} failures)"
    return f"GPU verified: {counts['passed']} passed, {counts['refused']} refused by name, {where}"


if __name__ == "__main__":
    print(verdict())
    sys.exit(0)
