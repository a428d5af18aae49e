#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks who includes whom. Each violation is one line; the exit status is 1 if there is any.

C++: a file belongs to the first layer of LAYERS whose pattern matches its path, and may include what that
layer allows, besides the C++ standard library, which only device code (kernels/) has to do without. Python:
modules of the package import only what PYTHON_MODULES allows when they are imported (imports inside functions
are free).
"""

from __future__ import annotations

import ast
import fnmatch
import re
import sys
import tempfile
from pathlib import Path

POSIX = [
    "<dlfcn.h>",
    "<fcntl.h>",
    "<link.h>",
    "<pthread.h>",
    "<sched.h>",
    "<signal.h>",
    "<unistd.h>",
    "<sys/*.h>",
    "<linux/*.h>",
]
CONTRACT = ['"backend/backend.h"', '"backend/registry.h"']
CPU = ["<cpuid.h>", "<immintrin.h>", "<arm_neon.h>"]
SHARED = [  # read by both compilers
    '"kernels/core/config.h"',
    '"kernels/core/params.h"',
    '"kernels/core/backward.h"',
]
DEVICE = ['"core/*"', '"ptx/*"', '"tile/*"', '"policy/*"']

# (name, files, what they may include). The order matters: first match.
LAYERS: list[tuple[str, str, list[str]]] = [
    ("public API", "include/fsa/*", ['"fsa/*"']),
    ("device core", "kernels/core/*", ['"core/*"']),
    ("device instructions", "kernels/ptx/*", ['"core/*"', '"ptx/*"']),
    ("device tiles", "kernels/tile/*", ['"core/*"', '"ptx/*"', '"tile/*"']),
    ("device policies", "kernels/policy/*", ['"core/*"', '"ptx/*"', '"tile/*"', '"policy/*"']),
    ("sm90 kernels", "kernels/sm90/*", [*DEVICE, '"sm90/*"']),
    ("common kernels", "kernels/common/*", [*DEVICE, '"common/*"']),
    ("core", "src/core/*", ['"fsa/*"', '"core/*"', *POSIX]),
    ("api", "src/api/*", ['"fsa/*"', '"core/*"', '"api/*"', '"backend/backend.h"']),
    (
        "cpu kernels",
        "src/backend/cpu/simd/*",
        ['"fsa/*"', '"core/*"', '"backend/cpu/*"', '"hwy/*"', "<hwy/*>", *CPU],
    ),
    (
        "cpu backend",
        "src/backend/cpu/*",
        ['"fsa/*"', '"core/*"', *CONTRACT, '"backend/cpu/*"', *POSIX, *CPU],
    ),
    ("jit", "src/jit/*", ['"fsa/*"', '"core/*"', '"jit/*"', *POSIX]),
    (
        "cuda backend",
        "src/backend/cuda/*",
        ['"fsa/*"', '"core/*"', '"jit/*"', *CONTRACT, '"backend/cuda/*"', *SHARED, *POSIX],
    ),
    ("backend contract", "src/backend/*", ['"fsa/*"', '"core/*"', *CONTRACT]),
    (
        "python bindings",
        "python/bindings/*",
        ['"fsa/*"', '"*.h"', "<fsa/*>", "<nanobind/*>", "<Python.h>", '"dlpack.h"', "<dlpack.h>"],
    ),
    ("C++ examples", "examples/cpp/*", ['"fsa/*"', "<fsa/*>"]),
    ("consumer", "tests/consumer/*", ["<fsa/*>"]),
]
# '"*.h"' above means a header beside the file: no folder in it.
LOCAL_ONLY = re.compile(r'"[^/]*"')

INCLUDE = re.compile(r'^\s*#\s*include\s+("[^"]+"|<[^>]+>)', re.MULTILINE)
STANDARD = re.compile(r"<[a-z_]+>")  # <vector>; C headers carry a ".h"
CPP_SUFFIXES = {".h", ".cpp", ".cuh"}
CPP_FOLDERS = ("include", "kernels", "src", "python/bindings", "examples/cpp", "tests/consumer")

PYTHON_PACKAGE = "python/flash_sparse_attention"
PYTHON_MODULES = {"flash_sparse_attention", "numpy", "torch", *sys.stdlib_module_names}


def allowed(include: str, patterns: list[str], on_device: bool) -> bool:
    if STANDARD.fullmatch(include):
        return not on_device
    for pattern in patterns:
        if pattern == '"*.h"':
            if LOCAL_ONLY.fullmatch(include):
                return True
        elif fnmatch.fnmatchcase(include, pattern):
            return True
    return False


def check_cpp(root: Path) -> tuple[int, list[str]]:
    count, violations = 0, []
    for folder in CPP_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in CPP_SUFFIXES:
                continue
            count += 1
            name = path.relative_to(root).as_posix()
            layer = next((layer for layer in LAYERS if fnmatch.fnmatchcase(name, layer[1])), None)
            if layer is None:
                violations.append(f"{name}: belongs to no layer of tools/check_layers.py")
                continue
            text = path.read_text()
            for match in INCLUDE.finditer(text):
                if not allowed(match[1], layer[2], name.startswith("kernels/")):
                    line = text.count("\n", 0, match.start(1)) + 1
                    violations.append(f"{name}:{line}: {layer[0]} may not include {match[1]}")
    return count, violations


def imports_at_import_time(tree: ast.AST) -> list[tuple[int, str]]:
    found, nodes = [], [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module or ""))
        nodes.extend(ast.iter_child_nodes(node))
    return sorted(found)


def check_python(root: Path) -> tuple[int, list[str]]:
    count, violations = 0, []
    for path in sorted((root / PYTHON_PACKAGE).rglob("*.py")):
        count += 1
        name = path.relative_to(root).as_posix()
        for line, module in imports_at_import_time(ast.parse(path.read_text())):
            if module.split(".")[0] not in PYTHON_MODULES:
                violations.append(f"{name}:{line}: the package may not import {module} when it is imported")
    return count, violations


def check(root: Path) -> tuple[int, list[str]]:
    cpp_count, cpp = check_cpp(root)
    python_count, python = check_python(root)
    return cpp_count + python_count, cpp + python


SELF_TEST = [  # (path, text, violations)
    ("include/fsa/good.h", '#include <vector>\n#include "fsa/tensor.h"\n', 0),
    ("include/fsa/bad.h", '#include "core/problem.h"\n', 1),
    ("kernels/core/bad.cuh", '#include <cstdint>\n#include "ptx/tma.cuh"\n', 2),
    ("kernels/policy/bad.cuh", '#include "tile/ring.cuh"\n#include "sm90/forward.cuh"\n', 1),
    ("kernels/sm90/bad.cuh", '#include "policy/mask.cuh"\n#include <cuda_bf16.h>\n', 1),
    ("src/core/bad.cpp", '#include "backend/backend.h"\n#include <cuda.h>\n#include <dlfcn.h>\n', 2),
    ("src/api/good.cpp", '#include "backend/backend.h"\n', 0),
    ("src/api/bad.cpp", '  #  include "backend/cpu/thread_pool.h"\n#include <torch/extension.h>\n', 2),
    ("src/backend/registry.cpp", '#include "backend/cpu/cpu_backend.h"\n', 1),
    ("src/backend/cpu/bad.cpp", '#include "backend/cuda/driver.h"\n#include <hwy/highway.h>\n', 2),
    ("src/backend/cuda/good.cpp", '#include "backend/registry.h"\n#include <dlfcn.h>\n', 0),
    ("src/backend/cpu/simd/good.cpp", '#include "hwy/highway.h"\n#include <immintrin.h>\n', 0),
    ("src/backend/cuda/bad.cpp", '#include <cuda_runtime.h>\n#include "kernels/sm90/forward.cuh"\n', 2),
    ("src/jit/good.cpp", '#include "core/env.h"\n#include "jit/hash.h"\n#include <link.h>\n', 0),
    ("src/jit/bad.cpp", '#include "backend/backend.h"\n#include "kernels/core/config.h"\n', 2),
    ("src/backend/good.h", '#include "backend/backend.h"\n', 0),
    ("src/elsewhere/file.cpp", "", 1),
    ("python/bindings/good.cpp", '#include "tensor_caster.h"\n#include <nanobind/nanobind.h>\n', 0),
    ("python/bindings/bad.cpp", '#include "core/problem.h"\n', 1),
    ("examples/cpp/bad.cpp", '#include "core/problem.h"\n', 1),
    ("tests/consumer/bad.cpp", '#include "fsa/fsa.h"\n', 1),
    (f"{PYTHON_PACKAGE}/good.py", "import torch\nfrom . import _C\ndef f():\n  import transformers\n", 0),
    (f"{PYTHON_PACKAGE}/bad.py", "try:\n  from transformers.x import y\nexcept ImportError:\n  pass\n", 1),
]


def self_test() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, text, _ in SELF_TEST:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        count, violations = check(root)
    failed = int(count != len(SELF_TEST))
    for name, _, expected in SELF_TEST:
        actual = sum(violation.startswith(name + ":") for violation in violations)
        if actual != expected:
            print(f"self-test: {name} gave {actual} violations, expected {expected}")
            failed += 1
    print(f"check_layers self-test: {len(SELF_TEST)} files, {failed} wrong")
    return int(failed > 0)


def main() -> int:
    if "--self-test" in sys.argv[1:]:
        return self_test()
    count, violations = check(Path(__file__).resolve().parent.parent)
    print("\n".join([*violations, f"check_layers: {count} files, {len(violations)} violations"]))
    return int(bool(violations) or count == 0)


if __name__ == "__main__":
    sys.exit(main())
