#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that no object compiled for one instruction set defines a function that another one could borrow.

An inline function or template that is not inlined becomes a weak symbol, and the linker keeps the first copy
it meets. If that copy was compiled for AVX-512, an older machine dies in ordinary code. So every weak
definition in an object of target T must carry T's namespace (or Highway's namespace for T) in its mangled
name, which makes it T's own. Usage: check_weak_symbols.py BUILD_DIR | --self-test
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HIGHWAY_NAMESPACE = {
    "sse4": "N_SSE4",
    "avx2": "N_AVX2",
    "avx512": "N_AVX3",
    "avx512_amx": "N_AVX3",  # the same flags
    "neon": "N_NEON",
}
OBJECT_FOLDER = re.compile(r"fsa_simd_(\w+)\.dir$")
WEAK = set("WVu")  # weak function, weak object, unique object; lower case w and v are undefined


def owners(target: str) -> list[str]:
    names = [target]
    if target in HIGHWAY_NAMESPACE:
        names.append(HIGHWAY_NAMESPACE[target])
    return [f"{len(name)}{name}" for name in names]  # as the C++ ABI writes a name


def weak_definitions(path: Path) -> list[str]:
    lines = subprocess.run(
        ["nm", "--defined-only", "--portability", path], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [fields[0] for fields in map(str.split, lines) if len(fields) > 1 and fields[1] in WEAK]


def demangle(symbol: str) -> str:
    return subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout.strip()


def check(build_dir: Path) -> tuple[int, list[str]]:
    objects = 0
    violations = []
    for folder in sorted(build_dir.rglob("fsa_simd_*.dir")):
        match = OBJECT_FOLDER.search(folder.name)
        for path in sorted(folder.rglob("*.o")) if match else []:
            objects += 1
            for symbol in weak_definitions(path):
                if symbol.startswith("DW.ref.") or any(owner in symbol for owner in owners(match[1])):
                    continue
                violations.append(f"{match[1]}: {path.name} defines {demangle(symbol)} for everybody")
    return objects, violations


SELF_TEST_SOURCE = """
#include <vector>
template <class T> __attribute__((noinline)) T shared(T x) { return x * 3; }
namespace TARGET {
template <class T> __attribute__((noinline)) T own(T x) { return x * 5; }
int entry(int x) { return SHARED(x) + own(x); }
}
"""


def self_test() -> int:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("check_weak_symbols self-test: no C++ compiler")
        return 1
    failed = 0
    for call, expected in (("shared", 1), ("own", 0)):
        with tempfile.TemporaryDirectory() as folder:
            objects = Path(folder) / "fsa_simd_avx2.dir"
            objects.mkdir()
            source = Path(folder) / "kernels.cpp"
            source.write_text(SELF_TEST_SOURCE.replace("TARGET", "avx2").replace("SHARED", call))
            subprocess.run([compiler, "-O2", "-c", source, "-o", objects / "kernels.cpp.o"], check=True)
            count, violations = check(Path(folder))
        if count != 1 or len(violations) != expected:
            print(f"self-test: calling {call}() gave {violations}, expected {expected} violations")
            failed += 1
    print(f"check_weak_symbols self-test: 2 objects, {failed} wrong")
    return int(failed > 0)


def main() -> int:
    if "--self-test" in sys.argv[1:]:
        return self_test()
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    objects, violations = check(Path(sys.argv[1]))
    if objects == 0:
        print(f"check_weak_symbols: no fsa_simd_* objects under {sys.argv[1]}; build first")
        return 1
    print("\n".join([*violations, f"check_weak_symbols: {objects} objects, {len(violations)} violations"]))
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
