#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs every check of the project and ends with a table of totals. `make test` calls it inside .venv.

Usage: run_tests.py [PART...]   (none = all)
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
CPP_FOLDERS = ("include", "src", "python/bindings", "tests", "examples", "benchmarks", "tools")
PYTHON_FOLDERS = ("python", "tests", "examples", "benchmarks", "tools")


@dataclass
class Totals:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, ok: bool) -> None:
        self.passed += ok
        self.failed += not ok


def run(*command: str | Path, **environment: str) -> bool:
    print("+", " ".join(str(part) for part in command), flush=True)
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode == 0


def cpp_files() -> list[Path]:
    return [
        path
        for folder in CPP_FOLDERS
        for suffix in ("*.h", "*.cpp")
        for path in sorted((ROOT / folder).rglob(suffix))
    ]


def format_and_lint() -> Totals:
    totals = Totals()
    totals.add(run("clang-format", "--dry-run", "-Werror", *(path.relative_to(ROOT) for path in cpp_files())))
    totals.add(run("ruff", "check", "--output-format", "concise", *PYTHON_FOLDERS))
    totals.add(run("ruff", "format", "--check", "--output-format", "concise", *PYTHON_FOLDERS))
    return totals


def layers() -> Totals:
    totals = Totals()
    totals.add(run(sys.executable, "tools/check_layers.py", "--self-test"))
    totals.add(run(sys.executable, "tools/check_layers.py"))
    return totals


def read_junit(report: Path, ok: bool) -> Totals:
    """Totals of a JUnit file. A run that failed without a failed test, or ran nothing, is one failure."""
    totals = Totals()
    if report.exists():
        for suite in ET.parse(report).getroot().iter("testsuite"):
            count = {name: int(suite.get(name) or 0) for name in ("tests", "failures", "errors", "skipped")}
            totals.failed += count["failures"] + count["errors"]
            totals.skipped += count["skipped"]
            totals.passed += count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    if totals.failed == 0 and (not ok or totals.passed == 0):
        totals.failed = 1
    return totals


def build(preset: str, *options: str) -> bool:
    return run("cmake", "--preset", preset, *options) and run("cmake", "--build", "--preset", preset)


def ctest(preset: str, *options: str, **environment: str) -> Totals:
    if not build(preset, *options):
        return Totals(failed=1)
    report = BUILD / preset / "ctest.xml"
    report.unlink(missing_ok=True)
    jobs = str(os.cpu_count() or 1)
    ok = run(
        "ctest", "--preset", preset, "--parallel", jobs, "--quiet", "--output-junit", report, **environment
    )
    print_failures(report)
    return read_junit(report, ok)


def print_failures(report: Path) -> None:
    for case in ET.parse(report).getroot().iter("testcase") if report.exists() else ():
        if case.find("failure") is not None:
            print(f"-- {case.get('name')}\n{case.findtext('system-out', '')}")


def cpp() -> Totals:
    return ctest("release")


def best_instruction_sets() -> str:
    """Those that the CPU backend would take, as FSA_SIMD_TARGETS; empty where this does not know."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return ""
    if not {"avx512bw", "avx512dq", "avx512vl"} <= set(flags):
        return "avx2" if "avx2" in flags else ""
    return "avx512;avx512_amx" if {"amx_tile", "amx_bf16"} <= set(flags) else "avx512"


def sanitizers() -> Totals:
    # Only what runs is compiled: three sets take four minutes more on two cores.
    # detect_stack_use_after_return would misalign AVX-512 variables: GCC bug 110027.
    return ctest(
        "asan",
        f"-DFSA_SIMD_TARGETS={best_instruction_sets()}",
        ASAN_OPTIONS="detect_stack_use_after_return=0:strict_string_checks=1",
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
    )


def kernel_objects() -> Totals:
    totals = Totals()
    totals.add(run(sys.executable, "tools/check_weak_symbols.py", "--self-test"))
    built = build("release")
    totals.add(built and run(sys.executable, "tools/check_weak_symbols.py", BUILD / "release"))
    totals.add(built and run(sys.executable, "tools/kernel_budget.py", BUILD / "release"))
    return totals


def device_kernels() -> Totals:
    """Compiles every shipped GPU kernel and fails on registers, spills or serialised multiplies. Needs no GPU."""
    totals = Totals()
    nvrtc = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/lib"
    tool = BUILD / "release" / "fsa-kernels"
    totals.add(build("release") and run(tool, "compile", FSA_NVRTC_PATH=str(nvrtc)))
    return totals


def gpu_verdict() -> str:
    """One line: whether a GPU has seen these sources."""
    command = [sys.executable, ROOT / "tests/gpu/report.py"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def python() -> Totals:
    report = BUILD / "pytest.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    jobs = str(min(os.cpu_count() or 1, 8))  # each process computes with threads of its own now and then
    return read_junit(report, run(sys.executable, "-m", "pytest", "-q", "-n", jobs, f"--junitxml={report}"))


def consumer() -> Totals:
    """Installs the library, moves the install tree, and builds a project of its own against it."""
    totals = Totals()
    staged, prefix, folder = BUILD / "staged", BUILD / "installed", BUILD / "consumer"
    for path in (staged, prefix, folder):
        shutil.rmtree(path, ignore_errors=True)
    installed = build("release") and run("cmake", "--install", BUILD / "release", "--prefix", staged)
    totals.add(installed)
    if installed:
        staged.rename(prefix)
        configure = ["cmake", "-S", "tests/consumer", "-B", folder, "-G", "Ninja"]
        totals.add(
            run(*configure, f"-DCMAKE_PREFIX_PATH={prefix}")
            and run("cmake", "--build", folder)
            and run(folder / "consumer")
        )
    return totals


PARTS: dict[str, tuple[str, Callable[[], Totals]]] = {
    "format": ("format and lint", format_and_lint),
    "layers": ("include layers", layers),
    "cpp": ("C++ tests and example", cpp),
    "symbols": ("symbols, kernel budget", kernel_objects),
    "kernels": ("GPU kernels, compiled", device_kernels),
    "consumer": ("consumer project", consumer),
    "python": ("Python tests", python),
    "asan": ("C++ tests, asan + ubsan", sanitizers),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    names = parser.parse_args().parts or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")

    rows = []
    for name in names:
        title, part = PARTS[name]
        print(f"\n== {title} ==", flush=True)
        start = time.monotonic()
        rows.append((title, part(), time.monotonic() - start))

    print(f"\n{'part':<26}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for title, totals, seconds in rows:
        print(f"{title:<26}{totals.passed:>8}{totals.failed:>8}{totals.skipped:>9}{seconds:>9.0f}")
    print(gpu_verdict())
    passed, failed, skipped = (
        sum(getattr(totals, field) for _, totals, _ in rows) for field in ("passed", "failed", "skipped")
    )
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
