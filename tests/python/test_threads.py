# SPDX-License-Identifier: Apache-2.0
"""Threads, fork and instruction sets: results do not depend on them, or the library says no."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checks
import flash_sparse_attention as fsa
import pytest
from cases import build, case_named
from flash_sparse_attention import _C

NAMES = ("plain", "packed_seqused", "window_sizes_bands", "sink_softcap_alibi_window", "threshold_causal",
         "gate_and_threshold", "gqa_ratio_7", "head_dim_511_v_512")  # fmt: skip
DECODE = ("decode_contiguous", "decode_threshold", "decode_gate_packed")
TARGETS = ("sse4", "avx2", "avx512", "avx512_amx")


def everything(names=NAMES, decode=DECODE, dtypes=("float32", "bfloat16")):
    """All outputs and gradients of some problems, as bits."""
    results = {}
    for dtype in dtypes:
        for name in names:
            problem = build(case_named(name), dtype, seed=101)
            ours = checks.call(problem, *checks.draw_grads(problem, 101))
            parts = {"out": ours.out, "lse": ours.lse, "skip_map": ours.skip_map, **ours.grads}
            results.update({f"{name} {dtype} {part}": checks.bits(tensor) for part, tensor in parts.items()})
        for name in decode:
            out, lse = checks.call_decode(build(case_named(name), dtype, seed=102))
            results[f"{name} {dtype} out"], results[f"{name} {dtype} lse"] = (
                checks.bits(out),
                checks.bits(lse),
            )
    return results


def assert_equal(results, expected, what):
    assert results.keys() == expected.keys()
    different = [name for name in expected if not results[name].equal(expected[name])]
    assert not different, f"{what}: other bits in {', '.join(different)}"


@pytest.fixture
def restore_threads():
    threads = _C.num_threads()
    yield
    _C.set_num_threads(threads)


def test_bits_do_not_depend_on_the_number_of_threads(restore_threads):
    _C.set_num_threads(1)
    expected = everything()
    for threads in (2, 3, 7):
        _C.set_num_threads(threads)
        assert _C.num_threads() == threads
        assert_equal(everything(), expected, f"{threads} threads")


def test_repeated_calls_give_the_same_bits(restore_threads):
    _C.set_num_threads(3)
    small = ("threshold_causal", "packed_seqused")
    expected = everything(small, DECODE[:2], ("float32",))
    for _ in range(10):
        assert_equal(everything(small, DECODE[:2], ("float32",)), expected, "a repeated call")


def test_calls_from_several_python_threads(restore_threads):
    _C.set_num_threads(2)
    small = ("plain", "gate_and_threshold", "packed_seqused")
    expected = everything(small, DECODE[:2], ("float32",))
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: everything(small, DECODE[:2], ("float32",)), range(8)):
            assert_equal(results, expected, "concurrent calls")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)


def test_after_fork():
    """The threads of the pool do not survive a fork; the child starts its own and computes the same."""
    code = """
import os
import torch
torch.set_num_threads(1)
import test_threads as t
from flash_sparse_attention import _C
_C.set_num_threads(3)
names = ("plain", "threshold_causal")
expected = t.everything(names, t.DECODE[:1], ("float32",))
for _ in range(3):
    child = os.fork()
    if child == 0:
        t.assert_equal(t.everything(names, t.DECODE[:1], ("float32",)), expected, "the child")
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    t.assert_equal(t.everything(names, t.DECODE[:1], ("float32",)), expected, "the parent")
print("forked")
"""
    # torch's own OpenMP threads do not survive a fork either, and would hang: one thread has no pool.
    done = run_python(code, OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "forked" in done.stdout, done.stdout + done.stderr


def test_number_of_threads_from_the_environment():
    code = "from flash_sparse_attention import _C; print(_C.num_threads())"
    assert run_python(code, FSA_NUM_THREADS="5").stdout.strip() == "5"
    allowed = len(os.sched_getaffinity(0))
    assert run_python(code, FSA_NUM_THREADS="").stdout.strip() == str(allowed)
    done = run_python(
        f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); {code}", FSA_NUM_THREADS=""
    )
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "many", "1025", "2.5"])
def test_bad_number_of_threads_in_the_environment(value):
    code = """
import torch, flash_sparse_attention as fsa
x = torch.zeros(1, 1, 1, 8)
try:
    fsa.attention(x, x, x)
except ValueError as error:
    print(error)
"""
    done = run_python(code, FSA_NUM_THREADS=value)
    assert "FSA_NUM_THREADS" in done.stdout and value in done.stdout, done.stdout + done.stderr


KERNEL = "import torch, flash_sparse_attention as f; x = torch.zeros(1, 70, 1, 8); print(f.explain(x, x, x)['kernel'])"


def machine_has(target: str) -> bool:
    done = run_python(KERNEL, FSA_CPU_TARGET=target, FSA_BACKEND="cpu")
    return done.returncode == 0 and target in done.stdout


def test_unknown_instruction_set_fails_loudly():
    for target in ("neon", "avx1024"):
        code = KERNEL.replace("print(f.explain(x, x, x)['kernel'])", "f.attention(x, x, x)")
        done = run_python(code, FSA_CPU_TARGET=target)
        assert done.returncode != 0, "computed with another instruction set, without a word"
        assert "FSA_CPU_TARGET" in done.stderr and target in done.stderr, done.stderr


def test_a_missing_instruction_set_does_not_disturb_the_reference():
    code = KERNEL.replace("f.explain(x, x, x)", "f.explain(x, x, x, backend='reference')")
    done = run_python(code.replace("['kernel']", ""), FSA_CPU_TARGET="avx1024")
    assert done.returncode == 0, done.stderr
    assert "avx1024" in done.stdout, "the reason against the cpu backend is missing"


# Every float16 number and the middle of every two. Highway's own conversions truncate where there is no instruction,
# and take infinity and NaN for numbers.
FLOAT16 = """
import torch, flash_sparse_attention as fsa
bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
zeros = torch.zeros(256, 1, 1, 8, dtype=torch.float16)
one = bits.view(torch.float16).reshape(256, 1, 1, 256)  # the only value of its row
out = fsa.attention(zeros, zeros, one)
nan = one.isnan()
assert torch.equal(out.isnan(), nan), "NaN"
assert torch.equal(out[~nan], one[~nan]), "widened or narrowed to another number"
low, high = (bits[i : i + 0x7B00].view(torch.float16) for i in (0, 1))  # neighbours, and what lies between
pair = torch.stack([low, high]).reshape(2, 123, 256).transpose(0, 1).unsqueeze(2)
query, key = zeros[:123], zeros[:123].expand(123, 2, 1, 8)
for sign in (1, -1):
    out = fsa.attention(query, key, sign * pair).flatten()
    want = (sign * (low.float() + high.float()) / 2).half()
    assert torch.equal(out, want), "not to nearest, ties to even"
print("exact")
"""


@pytest.mark.skipif("FSA_BACKEND" in os.environ, reason="one backend was asked for")
@pytest.mark.parametrize("target", TARGETS)
def test_every_instruction_set_of_the_machine(target, capsys):
    """The forced set serves a subset of the table and names itself in explain()."""
    if not machine_has(target):
        with capsys.disabled():
            print(f"\n{target}: not on this machine")
        test = run_python(
            KERNEL.replace("print(f.explain(x, x, x)['kernel'])", "f.attention(x, x, x)"),
            FSA_CPU_TARGET=target,
        )
        assert test.returncode != 0 and "FSA_CPU_TARGET" in test.stderr, test.stderr
        return
    code = f"""
import checks, flash_sparse_attention as fsa, test_threads as t
from cases import build, case_named
names = t.NAMES + t.DECODE
for dtype, some in (("float32", names), ("bfloat16", names[::2]), ("float16", names[1::2])):
    for name in some:
        problem = build(case_named(name), dtype, seed=103)
        checks.verify(problem, seed=103)
        if not problem.decode:
            kernel = fsa.explain(**problem.arguments())["kernel"]
            assert {target!r} in kernel, kernel
print("checked", kernel)
"""
    done = run_python(code, FSA_CPU_TARGET=target)
    assert done.returncode == 0 and "checked" in done.stdout, done.stdout + done.stderr
    halves = run_python(FLOAT16, FSA_CPU_TARGET=target)
    assert halves.returncode == 0 and "exact" in halves.stdout, halves.stdout + halves.stderr
    with capsys.disabled():
        print(f"\n{target}: {done.stdout.strip()}")


# A process whose requests for the AMX tile registers the kernel refuses, whoever asks: arch_prctl
# (ARCH_REQ_XCOMP_PERM) answers EPERM, by a seccomp filter that is there before anything is imported.
REFUSE_TILES = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER, FIRST_ARGUMENT = 0, 16  # where they lie in struct seccomp_data
ARCH_PRCTL, REQUEST, TILE_DATA = 158, 0x1023, 18
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM
program = [(LOAD, 0, 0, NUMBER), (JUMP_IF_EQUAL, 0, 3, ARCH_PRCTL), (LOAD, 0, 0, FIRST_ARGUMENT),
           (JUMP_IF_EQUAL, 0, 1, REQUEST), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
filters = Program(len(program), ctypes.addressof(code))
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filters), 0, 0) != 0:
    raise SystemExit("no filters here")
assert libc.syscall(ARCH_PRCTL, REQUEST, TILE_DATA) == -1 and ctypes.get_errno() == 1
"""


@pytest.mark.skipif("FSA_BACKEND" in os.environ, reason="one backend was asked for")
def test_bfloat16_when_the_system_refuses_tiles():
    """The next set serves bfloat16, correctly; asking for the tiles by name fails and says what there is."""
    if not machine_has("avx512_amx"):
        pytest.skip("no AMX tiles on this machine")
    code = """
import checks, flash_sparse_attention as fsa
from cases import build, case_named
import test_threads as t
for name in t.NAMES[::2]:
    problem = build(case_named(name), "bfloat16", seed=104)
    checks.verify(problem, seed=104)
    kernel = fsa.explain(**problem.arguments())["kernel"]
    assert "avx512" in kernel and "amx" not in kernel, kernel
print("served by", kernel)
"""
    done = run_python(REFUSE_TILES + code, FSA_CPU_TARGET="")
    if "no filters here" in done.stderr:
        pytest.skip("this system takes no seccomp filters")
    assert done.returncode == 0 and "served by" in done.stdout, done.stdout + done.stderr
    done = run_python(REFUSE_TILES + KERNEL, FSA_CPU_TARGET="avx512_amx")
    assert done.returncode != 0 and "this machine offers avx512, avx2" in done.stderr, (
        done.stdout + done.stderr
    )


def test_public_names_of_threads_are_in_the_binding():
    assert _C.num_threads() >= 1
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match="threads"):
            _C.set_num_threads(threads)
    assert fsa.__version__ == _C.version()
