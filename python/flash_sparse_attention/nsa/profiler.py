# SPDX-License-Identifier: Apache-2.0
"""The online profiler of the selected branch: which algorithm and chunk size is fastest here.

The selected branch has two algorithms whose results agree to rounding: ``kv_outer`` goes over blocks of keys
and ``query_outer`` over tokens. Which one wins depends on the group size, the lengths and the machine. So the
first call of a new *shape class* times the candidates (:data:`CANDIDATES`) on its own tensors, warm-up first,
and takes the fastest median, or the library's own choice where nothing is 5 % faster; later calls of the
class, in this process and through a file in later ones, take the same.

Nothing is timed under ``torch.compile`` or while a CUDA graph is captured, nor where the work is too small
for the choice to matter or the backend has only one way; there the library's own rule decides, as it does
with the algorithm "off". A choice lasts for the process, so results are bitwise repeatable within it; between
processes they are where the algorithm is not "auto", or where the file holds the class.

Environment: ``FSA_NSA_ALGORITHM`` is the algorithm where a call says "auto" (read at import);
``FSA_CACHE_DIR`` is the folder of the file, as of compiled kernels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..ops import is_plain
from . import ops

ALGORITHMS = ("auto", "kv_outer", "query_outer", "off")
# (algorithm, tokens per chunk); 0 is the library's own chunk. The first is what the library's rule takes.
CANDIDATES = (("kv_outer", 0), ("kv_outer", 512), ("kv_outer", 4096), ("query_outer", 0))
# One token brings as many rows as its group has heads, so with fewer query_outer cannot win and is not timed.
QUERY_OUTER_GROUP = 8
REPEATS = 5
# A candidate whose first run takes this many times the best median is not run again.
HOPELESS = 1.5
# Another candidate than the first must be this much faster; less is noise.
MARGIN = 0.95
# Seconds after which a candidate is not repeated once more.
BUDGET = 0.5
# Multiplications and additions of the scores below which any algorithm takes milliseconds.
SMALL = 2e8
FORMAT = 1

_ENVIRONMENT = os.environ.get("FSA_NSA_ALGORITHM", "")


class Choice(NamedTuple):
    """``source``: argument, environment, rule (the library's), profile (timed here) or file."""

    algorithm: str  # of the extension: kv_outer, query_outer, or off for the library's rule
    chunk_tokens: int
    source: str
    times_ms: dict[str, float]  # by candidate; empty where nothing was timed


_RULE = Choice("off", 0, "rule", {})


def _requested(algorithm: str) -> tuple[str, str]:
    """The algorithm asked for, and by what."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: {algorithm!r}, must be one of {', '.join(map(repr, ALGORITHMS))}")
    if algorithm != "auto" or not _ENVIRONMENT:
        return algorithm, "argument"
    if _ENVIRONMENT not in ALGORITHMS:
        raise ValueError(
            f"FSA_NSA_ALGORITHM: {_ENVIRONMENT!r}, must be one of {', '.join(map(repr, ALGORITHMS))}"
        )
    return _ENVIRONMENT, "environment"


def _bucket(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def _shape_class(direction: str, tensors: tuple, block_size: int, max_seqlen: int | None) -> str:
    query, key, value, blocks, cu_seqlens = tensors
    rows = math.prod(query.shape[:-2])
    longest = max_seqlen if max_seqlen is not None else query.shape[0 if cu_seqlens is not None else 1]
    device = "cpu" if query.device.type == "cpu" else torch.cuda.get_device_name(query.device)
    return "|".join(
        (
            direction,
            device,
            str(query.dtype).removeprefix("torch."),
            f"head_dim {query.shape[-1]}/{value.shape[-1]}",
            f"heads {query.shape[-2]}/{key.shape[-2]}",
            f"block {block_size}",
            f"top_k {blocks.shape[-1]}",
            f"rows {_bucket(rows)}",
            f"seqlen {_bucket(min(longest, rows))}",
        )
    )


def _is_worth_it(tensors: tuple, block_size: int) -> bool:
    """False too for shapes that the extension is about to refuse."""
    query, key, value, blocks, cu_seqlens = tensors
    rank = 3 if cu_seqlens is not None else 4
    if any(t.dim() != rank for t in (query, key, value, blocks)) or query.dtype == torch.float64:
        return False
    dims = query.shape[-1] + value.shape[-1]
    return 2 * math.prod(query.shape[:-1]) * blocks.shape[-1] * block_size * dims > SMALL


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def choose(
    direction: str, tensors: tuple, args: tuple, rest: tuple, algorithm: str, max_seqlen: int | None
) -> Choice:
    """What a call of the selected branch is to run.

    tensors: query, key, value, selected_blocks, cu_seqlens. args, rest: what the ``run_selected_*`` function
    of the direction takes before and after algorithm and chunk_tokens.
    """
    algorithm, source = _requested(algorithm)
    if algorithm != "auto":
        return Choice(algorithm, 0, source, {})
    if not is_plain([t for t in (*args, *rest) if isinstance(t, Tensor)]):
        return _RULE
    block_size = args[-3]
    if not isinstance(block_size, int) or not _is_worth_it(tensors, block_size):
        return _RULE
    name = _shape_class(direction, tensors, block_size, max_seqlen)
    known = _memory.find(name)
    if known is not None or _is_capturing(tensors[0]):
        return known or _RULE
    with _memory.lock:  # one thread times, others of the same class wait and take its choice
        return _memory.find(name) or _measure(name, direction, args, rest)


def peek(direction: str, tensors: tuple, block_size: int, algorithm: str, max_seqlen: int | None) -> Choice:
    """As choose, without timing: the library's rule where the class is not known yet."""
    algorithm, source = _requested(algorithm)
    if algorithm != "auto":
        return Choice(algorithm, 0, source, {})
    if not _is_worth_it(tensors, block_size):
        return _RULE
    return _memory.find(_shape_class(direction, tensors, block_size, max_seqlen)) or _RULE


def remeasure(direction: str, tensors: tuple, args: tuple, rest: tuple, max_seqlen: int | None) -> Choice:
    """Times the candidates, whatever is known or small, and keeps the result."""
    if _is_capturing(tensors[0]):
        raise RuntimeError("nsa.profile: called while a CUDA graph is captured; call it before the capture")
    with _memory.lock:
        return _measure(_shape_class(direction, tensors, args[-3], max_seqlen), direction, args, rest)


def _measure(name: str, direction: str, args: tuple, rest: tuple) -> Choice:
    run = ops.run_selected_forward if direction == "forward" else ops.run_selected_backward
    explain = _C.nsa_explain_selected_forward if direction == "forward" else _C.nsa_explain_selected_backward
    *asked, backend = args
    if explain(*asked, "off", 0, backend)["backend"] == "reference":
        return _memory.keep(name, _RULE, to_file=False)
    group = args[0].shape[-2] // args[1].shape[-2]
    times: dict[tuple[str, int], float] = {}
    for candidate in CANDIDATES:
        if candidate[0] == "query_outer" and group < QUERY_OUTER_GROUP:
            continue
        limit = HOPELESS * min(times.values(), default=math.inf)
        with contextlib.suppress(NotImplementedError):  # a candidate that this backend does not have
            times[candidate] = _median_ms(lambda c=candidate: run(*args, *c, *rest), args[0].device, limit)
    if not times:
        return _memory.keep(name, _RULE, to_file=False)
    best = min(times, key=times.__getitem__)
    first = next(iter(times))
    if times[best] > MARGIN * times[first]:
        best = first
    named = {_candidate_name(*c): round(ms, 4) for c, ms in times.items()}
    return _memory.keep(name, Choice(*best, "profile", named), to_file=True)


def _candidate_name(algorithm: str, chunk_tokens: int) -> str:
    return f"{algorithm}:{chunk_tokens}" if chunk_tokens else algorithm


def _median_ms(run: Callable[[], Any], device: torch.device, limit: float) -> float:
    """Of up to REPEATS runs after one for warm-up; of the warm-up where that is beyond the limit."""

    def timed() -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    spent = timed()
    if 1e3 * spent > limit:
        return 1e3 * spent
    durations: list[float] = []
    while len(durations) < REPEATS and (not durations or spent < BUDGET):
        durations.append(timed())
        spent += durations[-1]
    return 1e3 * statistics.median(durations)


class _Memory:
    """Choices by shape class, in memory and in a file."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._choices: dict[str, Choice] = {}
        self._loaded = False

    def find(self, name: str) -> Choice | None:
        if not self._loaded:
            with self.lock:
                self._choices = {**_read(file_path()), **self._choices}
                self._loaded = True
        return self._choices.get(name)

    def keep(self, name: str, choice: Choice, to_file: bool) -> Choice:
        with self.lock:
            self._choices[name] = choice
            if to_file:
                _write(file_path(), {**_read(file_path()), name: choice})
        return choice

    def forget(self) -> None:
        """Forgets what is in memory; the file is read again."""
        with self.lock:
            self._choices, self._loaded = {}, False


_memory = _Memory()


@functools.cache
def _machine() -> str:
    """The processor and how many of them, not the host's name: a cluster's nodes share their homes."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        model = next(names, model)
    return f"{model}, {os.cpu_count()} processors"


def file_path() -> str | None:
    """Where choices are kept, one file per machine and version; None where there is no place for them."""
    folder = os.environ.get("FSA_CACHE_DIR")
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME") or (
            os.path.join(os.environ["HOME"], ".cache") if os.environ.get("HOME") else None
        )
        if base is None:
            return None
        folder = os.path.join(base, "flash_sparse_attention")
    machine = hashlib.sha256(_machine().encode()).hexdigest()[:12]
    return os.path.join(folder, f"nsa_profile-{_C.version()}-{machine}.json")


def _read(path: str | None) -> dict[str, Choice]:
    """The file's choices; none of a file that is missing, torn, or not ours."""
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or (content.get("format"), content.get("machine")) != (
        FORMAT,
        _machine(),
    ):
        return {}
    choices = content.get("choices")
    read = {n: _parse(c) for n, c in choices.items()} if isinstance(choices, dict) else {}
    return {name: choice for name, choice in read.items() if choice is not None}


def _parse(entry: Any) -> Choice | None:
    try:
        algorithm, chunk_tokens, times = entry["algorithm"], entry["chunk_tokens"], entry["times_ms"]
        if (algorithm, chunk_tokens) not in CANDIDATES:
            return None
        return Choice(algorithm, chunk_tokens, "file", {str(n): float(ms) for n, ms in times.items()})
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _write(path: str | None, choices: dict[str, Choice]) -> None:
    """Replaces the file in one step. Without a place to write, choices last as long as the process."""
    if path is None:
        return
    entries = {
        name: {"algorithm": c.algorithm, "chunk_tokens": c.chunk_tokens, "times_ms": c.times_ms}
        for name, c in sorted(choices.items())
    }
    content = {"format": FORMAT, "machine": _machine(), "choices": entries}
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
