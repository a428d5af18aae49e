# SPDX-License-Identifier: Apache-2.0
"""The online profiler: what it times, when it does not, and its file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from flash_sparse_attention import nsa
from flash_sparse_attention.nsa import ops, profiler
from torch import Tensor


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file and a memory of its own, and a timer that says what the test wants."""
    monkeypatch.setenv("FSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(profiler, "_ENVIRONMENT", "")
    monkeypatch.setattr(profiler, "SMALL", 0)
    monkeypatch.setattr(profiler, "QUERY_OUTER_GROUP", 1)
    profiler._memory.forget()
    yield
    profiler._memory.forget()


class Timer:
    """In place of the clock: milliseconds by candidate. The extension has the reference alone for what the
    fake backend claims to serve, so the runs are real ones with the library's rule."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **times: float) -> None:
        self.times = {
            ("query_outer", 0): 4.0,
            ("kv_outer", 0): 3.0,
            ("kv_outer", 512): 2.0,
            ("kv_outer", 4096): 5.0,
        }
        self.measured: list[str] = []
        self.ran: list[tuple[str, str, int]] = []
        order = iter(())

        def median(run, device, limit):
            nonlocal order
            candidate = next(order, None)
            if candidate is None:
                order = iter(profiler.CANDIDATES)
                candidate = next(order)
            run()
            return self.times[candidate]

        measure, forward, backward = profiler._measure, ops.run_selected_forward, ops.run_selected_backward

        def counted(name, direction, args, rest):
            self.measured.append(direction)
            return measure(name, direction, args, rest)

        def forward_of(*args):
            self.ran.append(("forward", *args[9:11]))
            return forward(*args)

        def backward_of(*args):
            self.ran.append(("backward", *args[8:10]))
            return backward(*args)

        def told(*args):
            return {"backend": "cpu"}

        monkeypatch.setattr(profiler, "_median_ms", median)
        monkeypatch.setattr(profiler, "_measure", counted)
        monkeypatch.setattr(ops, "run_selected_forward", forward_of)
        monkeypatch.setattr(ops, "run_selected_backward", backward_of)
        monkeypatch.setattr(profiler._C, "nsa_explain_selected_forward", told)
        monkeypatch.setattr(profiler._C, "nsa_explain_selected_backward", told)


def arguments(tokens: int = 60, heads: int = 4, dtype: torch.dtype = torch.float32) -> dict:
    g = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, tokens, n, 8, generator=g).to(dtype) for n in (heads, 2, 2))
    blocks = torch.arange(tokens).view(-1, 1) // 16 - torch.arange(3)
    blocks = blocks.clamp(min=-1).int().expand(1, 2, tokens, 3).contiguous()
    return {"query": query, "key": key, "value": value, "selected_blocks": blocks, "block_size": 16}


def last(timer: Timer, direction: str) -> tuple[str, int]:
    return [ran[1:] for ran in timer.ran if ran[0] == direction][-1]


def file_content(tmp_path: Path) -> dict:
    (file,) = tmp_path.glob("nsa_profile-*.json")
    return json.loads(file.read_text())


def test_first_call_of_a_class_times_and_later_ones_do_not(monkeypatch, tmp_path):
    timer = Timer(monkeypatch)
    inputs = arguments()
    out = nsa.selected_attention(**inputs)
    assert timer.measured == ["forward"] and last(timer, "forward") == ("kv_outer", 512)
    nsa.selected_attention(**inputs)
    nsa.selected_attention(**arguments(tokens=50))  # up to the same power of two
    assert timer.measured == ["forward"]
    nsa.selected_attention(**arguments(tokens=70))
    nsa.selected_attention(**arguments(heads=6))
    nsa.selected_attention(**arguments(dtype=torch.bfloat16))
    assert len(timer.measured) == 4
    torch.testing.assert_close(out, nsa.selected_attention(**inputs, algorithm="off"), rtol=1e-5, atol=1e-5)
    content = file_content(tmp_path)
    assert len(content["choices"]) == 4
    assert all(c["algorithm"] == "kv_outer" and c["chunk_tokens"] == 512 for c in content["choices"].values())
    assert list(tmp_path.iterdir()) == list(tmp_path.glob("nsa_profile-*.json")), "a temporary file is left"


def test_backward_has_a_choice_of_its_own(monkeypatch):
    timer = Timer(monkeypatch)
    inputs = arguments()
    leaf = inputs["query"].clone().requires_grad_()
    out = nsa.selected_attention(**{**inputs, "query": leaf})
    timer.times[("query_outer", 0)] = 1.0
    out.sum().backward()
    assert timer.measured == ["forward", "backward"]
    assert (last(timer, "forward"), last(timer, "backward")) == (("kv_outer", 512), ("query_outer", 0))


def test_choices_outlive_the_process(monkeypatch):
    timer = Timer(monkeypatch)
    nsa.selected_attention(**arguments())
    profiler._memory.forget()  # as a new process
    nsa.selected_attention(**arguments())
    assert timer.measured == ["forward"] and last(timer, "forward") == ("kv_outer", 512)
    told = nsa.explain(**arguments())["forward"]
    assert (told["source"], told["algorithm"], told["chunk_tokens"]) == ("file", "kv_outer", 512)
    assert told["times_ms"] == {
        "kv_outer": 3.0,
        "kv_outer:512": 2.0,
        "kv_outer:4096": 5.0,
        "query_outer": 4.0,
    }


def test_explain_does_not_time(monkeypatch):
    timer = Timer(monkeypatch)
    told = nsa.explain(**arguments())
    assert timer.measured == [] and timer.ran == []
    for direction in ("forward", "backward"):
        assert (told[direction]["source"], told[direction]["algorithm"]) == ("rule", "off")
    nsa.selected_attention(**arguments())
    told = nsa.explain(**arguments())
    assert told["forward"]["source"] == "profile" and told["backward"]["source"] == "rule"


def test_profile_times_again(monkeypatch):
    timer = Timer(monkeypatch)
    told = nsa.profile(**arguments())
    assert timer.measured == ["forward", "backward"]
    assert told["forward"]["algorithm"] == told["backward"]["algorithm"] == "kv_outer"
    timer.times[("query_outer", 0)] = 1.0
    assert nsa.profile(**arguments(), backward=False)["forward"]["algorithm"] == "query_outer"
    nsa.selected_attention(**arguments())
    assert timer.measured == ["forward", "backward", "forward"] and last(timer, "forward") == (
        "query_outer",
        0,
    )


@pytest.mark.parametrize("algorithm", ["kv_outer", "query_outer", "off"])
def test_argument_and_environment_override(monkeypatch, algorithm):
    timer = Timer(monkeypatch)
    nsa.selected_attention(**arguments(), algorithm=algorithm)
    assert timer.measured == [] and last(timer, "forward") == (algorithm, 0)
    assert nsa.explain(**arguments(), algorithm=algorithm)["backward"]["source"] == "argument"
    monkeypatch.setattr(profiler, "_ENVIRONMENT", algorithm)
    nsa.selected_attention(**arguments())
    assert timer.measured == [] and last(timer, "forward") == (algorithm, 0)
    assert nsa.explain(**arguments())["forward"]["source"] == "environment"
    nsa.selected_attention(**arguments(), algorithm="kv_outer")
    assert last(timer, "forward") == ("kv_outer", 0), "the argument wins"


def test_small_work_is_not_timed(monkeypatch):
    timer = Timer(monkeypatch)
    monkeypatch.setattr(profiler, "SMALL", 1e12)
    nsa.selected_attention(**arguments())
    assert timer.measured == [] and last(timer, "forward") == ("off", 0)


def test_float64_and_the_reference_are_not_timed(monkeypatch):
    nsa.selected_attention(**arguments(), backend="reference")
    assert nsa.explain(**arguments(), backend="reference")["forward"]["source"] == "rule"
    timer = Timer(monkeypatch)
    nsa.selected_attention(**arguments(dtype=torch.float64))
    assert timer.measured == []


def test_nothing_is_timed_under_compile(monkeypatch):
    timer = Timer(monkeypatch)
    inputs = arguments()
    compiled = torch.compile(nsa.selected_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), nsa.selected_attention(**inputs, algorithm="off"))
    assert timer.measured == []
    torch._dynamo.reset()


def test_nothing_is_timed_during_a_capture(monkeypatch):
    timer = Timer(monkeypatch)
    monkeypatch.setattr(profiler, "_is_capturing", lambda tensor: True)
    nsa.selected_attention(**arguments())
    assert timer.measured == [] and last(timer, "forward") == ("off", 0)
    with pytest.raises(RuntimeError, match="captured"):
        nsa.profile(**arguments())


def test_a_candidate_that_the_backend_lacks_is_passed_over(monkeypatch):
    Timer(monkeypatch)
    median = profiler._median_ms
    refused = iter([False, False, True, False])

    def some(*args):
        result = median(*args)
        if next(refused, False):
            raise NotImplementedError("chunk_tokens: 4096")
        return result

    monkeypatch.setattr(profiler, "_median_ms", some)
    assert nsa.profile(**arguments(), backward=False)["forward"]["times_ms"] == {
        "kv_outer": 3.0,
        "kv_outer:512": 2.0,
        "query_outer": 4.0,
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 99, "choices": {}}',
        "\x00\xff",
        "TORN",
        "OTHER",
        "ODD",
    ],
    ids=["empty", "brace", "list", "null", "no_choices", "format", "binary", "torn", "machine", "entries"],
)
def test_torn_and_foreign_files_are_replaced(monkeypatch, tmp_path, text):
    timer = Timer(monkeypatch)
    nsa.selected_attention(**arguments())
    path = Path(profiler.file_path())
    good = path.read_text()
    name, choice = next(iter(json.loads(good)["choices"].items()))
    other = {"format": 1, "machine": "another", "choices": {name: choice}}
    odd = {
        "format": 1,
        "machine": profiler._machine(),
        "choices": {name: {**choice, "algorithm": "rm -rf"}, "x": 3, "y": {"algorithm": "kv_outer"}},
    }
    path.write_text({"TORN": good[:-20], "OTHER": json.dumps(other), "ODD": json.dumps(odd)}.get(text, text))
    profiler._memory.forget()
    nsa.selected_attention(**arguments())
    assert timer.measured == ["forward", "forward"]
    assert json.loads(path.read_text())["choices"] == {name: choice}


def test_without_a_place_for_the_file(monkeypatch, tmp_path):
    timer = Timer(monkeypatch)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FSA_CACHE_DIR", str(blocked / "below"))
    for _ in range(2):
        nsa.selected_attention(**arguments())
    assert timer.measured == ["forward"]
    for name in ("FSA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert profiler.file_path() is None
    profiler._memory.forget()
    nsa.selected_attention(**arguments())
    assert timer.measured == ["forward", "forward"]


def test_the_file_keeps_what_others_wrote(monkeypatch, tmp_path):
    Timer(monkeypatch)
    nsa.selected_attention(**arguments())
    content = file_content(tmp_path)
    content["choices"]["theirs"] = {"algorithm": "query_outer", "chunk_tokens": 0, "times_ms": {}}
    Path(profiler.file_path()).write_text(json.dumps(content))
    nsa.selected_attention(**arguments(tokens=200))
    assert len(file_content(tmp_path)["choices"]) == 3 and "theirs" in file_content(tmp_path)["choices"]


def test_threads_of_one_class_time_once(monkeypatch):
    timer = Timer(monkeypatch)
    outs: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: outs.append(nsa.selected_attention(**arguments()))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timer.measured == ["forward"] and len(outs) == 4
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_the_clock_itself():
    """One run for warm-up, then the median of the repeats; a hopeless candidate runs once."""
    runs = []
    device = torch.device("cpu")
    assert profiler._median_ms(lambda: runs.append(0), device, math.inf) >= 0.0
    assert len(runs) == 1 + profiler.REPEATS
    runs.clear()
    assert profiler._median_ms(lambda: runs.append(0), device, 0.0) > 0.0
    assert len(runs) == 1


def test_the_limit_is_a_multiple_of_the_best(monkeypatch):
    Timer(monkeypatch)
    median, limits = profiler._median_ms, []

    def recorded(run, device, limit):
        limits.append(limit)
        return median(run, device, limit)

    monkeypatch.setattr(profiler, "_median_ms", recorded)
    nsa.profile(**arguments(), backward=False)
    assert limits == [math.inf, 3.0 * profiler.HOPELESS, 2.0 * profiler.HOPELESS, 2.0 * profiler.HOPELESS]


def test_noise_does_not_beat_the_rule(monkeypatch):
    timer = Timer(monkeypatch)
    timer.times[("kv_outer", 512)] = 2.9
    told = nsa.profile(**arguments(), backward=False)["forward"]
    assert (told["algorithm"], told["chunk_tokens"]) == ("kv_outer", 0)


def test_small_groups_do_not_time_query_outer(monkeypatch):
    Timer(monkeypatch)
    monkeypatch.setattr(profiler, "QUERY_OUTER_GROUP", 3)  # arguments() has groups of 2
    assert "query_outer" not in nsa.profile(**arguments(), backward=False)["forward"]["times_ms"]


def test_the_environment_variable(monkeypatch):
    code = "from flash_sparse_attention.nsa import profiler; print(profiler._requested('auto'))"
    env = {**os.environ, "FSA_NSA_ALGORITHM": "query_outer", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "('query_outer', 'environment')", done.stderr
    monkeypatch.setattr(profiler, "_ENVIRONMENT", "fast")
    with pytest.raises(ValueError, match="FSA_NSA_ALGORITHM: 'fast'"):
        nsa.selected_attention(**arguments())
