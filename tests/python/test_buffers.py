# SPDX-License-Identifier: Apache-2.0
"""The binding with buffers of the caller: NaN before, guards around, a dirty workspace."""

from __future__ import annotations

import math

import checks
import decisions
import flash_sparse_attention as fsa
import pytest
import torch
from cases import build, case_named
from flash_sparse_attention import _C, ops

NAMES = (
    "plain",
    "packed_seqused",
    "batched_seqused_sink",
    "gate_linear_bhs",
    "gate_and_threshold",
    "threshold_packed",
    "blocks_per_head",
)


def arguments_of(problem):
    """The two tuples that the binding takes."""
    options = problem.options
    left, right = options.get("window_size", (-1, -1))
    values = {
        "causal": False, "softmax_scale": None, "softcap": 0.0, "threshold": None, "gate_threshold": None,
        "log_sigmoid_gate": True, "adaptive_gate": True, "gate_layout": "bsh", "max_seqlen_q": None,
        "max_seqlen_k": None, "deterministic": False, "backend": "", "window_left": left, "window_right": right,
    }  # fmt: skip
    values.update({n: v for n, v in options.items() if n != "window_size"})
    inputs = tuple(problem.tensors.get(n) for n in ops.INPUTS)
    scalars = tuple(values[name] for _, name in ops.OPTIONS)
    mask = options.get("block_mask")
    return (inputs, scalars) if mask is None else ((*inputs, *mask.tensors), (*scalars, *mask.BLOCK_SIZE))


def workspace(size: int):
    """Exactly `size` bytes of 0xff, aligned to 64, with room around to see a write outside."""
    memory = torch.full((size + 256,), 255, dtype=torch.uint8)
    begin = 64 + (-(memory.data_ptr() + 64) % 64)
    view = memory[begin : begin + size]

    def check():
        assert (memory[:begin] == 255).all() and (memory[begin + size :] == 255).all(), (
            "workspace: written outside"
        )

    return view, check


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_every_output_is_written_whole_and_nothing_else(name, dtype):
    problem = build(case_named(name), dtype, seed=91)
    grad_out, grad_lse = checks.draw_grads(problem, 91)
    expected = checks.call(problem, grad_out, grad_lse)
    inputs, options = arguments_of(problem)

    out, lse = (
        checks.Buffer(expected.out.shape, problem.dtype, gap=3),
        checks.Buffer(expected.lse.shape, expected.lse.dtype),
    )
    skip_map = torch.full_like(expected.skip_map, -1)
    space, check_space = workspace(_C.workspace_size_forward(inputs, options))
    _C.forward(inputs, options, out.view, lse.view, skip_map, space)
    check_space()
    out.check("out")
    lse.check("lse")
    checks.assert_same_bits("out", out.view, expected.out)
    checks.assert_same_bits("lse", lse.view, expected.lse)
    assert torch.equal(skip_map, expected.skip_map)

    names = ("query", "key", "value", "alpha", "delta", "sink")
    t = problem.tensors
    grads = {n: checks.Buffer(t[n].shape, t[n].dtype, gap=0 if n == "sink" else 2) for n in names if n in t}
    views = [grads[n].view if n in grads else None for n in names]
    size = _C.workspace_size_backward(inputs, options, out.view, skip_map, grad_out, grad_lse)
    space, check_space = workspace(size)
    _C.backward(inputs, options, out.view, lse.view, skip_map, grad_out, grad_lse, *views, space)
    check_space()
    for n, buffer in grads.items():
        buffer.check(f"d{n}")
        checks.assert_same_bits(f"d{n}", buffer.view, expected.grads[n])


@pytest.mark.parametrize(
    "name", ["decode_threshold", "decode_gate_packed", "decode_paged", "decode_gathered"]
)
def test_decode_with_a_dirty_workspace(name):
    problem = build(case_named(name), "float32", seed=92)
    expected_out, expected_lse = checks.call_decode(problem)
    if "alpha" in problem.tensors and "threshold" not in problem.options:
        problem.options["threshold"] = 0.0
    inputs, options = arguments_of(problem)
    out, lse = (
        checks.Buffer(expected_out.shape, torch.float32),
        checks.Buffer(expected_lse.shape, torch.float32),
    )
    space, check_space = workspace(_C.workspace_size_decode(inputs, options, None, False))
    _C.decode(inputs, options, None, False, out.view, lse.view, space)
    for check in (check_space, lambda: out.check("out"), lambda: lse.check("lse")):
        check()
    checks.assert_same_bits("out", out.view, expected_out)
    checks.assert_same_bits("lse", lse.view, expected_lse)


def test_workspace_from_a_function():
    """Asked once, for what the call needs, and its own error comes through; too little of it is refused by name."""
    problem = build(case_named("decode_gate_packed"), "float32", seed=92)
    problem.options["threshold"] = 0.0
    expected_out, _ = checks.call_decode(problem)
    inputs, options = arguments_of(problem)
    needed = _C.workspace_size_decode(inputs, options, None, False)
    asked = []

    def given(missing):
        def function(like, size):
            assert like is inputs[0]
            asked.append(size)
            return torch.full((size - missing,), 255, dtype=torch.uint8)

        return function

    def fails(like, size):
        raise MemoryError("none left")

    out = torch.full_like(expected_out, torch.nan)
    _C.decode(inputs, options, None, False, out, None, given(0))
    checks.assert_same_bits("out", out, expected_out)
    with pytest.raises(TypeError, match=f"workspace: the function returned {needed - 1} bytes of {needed}"):
        _C.decode(inputs, options, None, False, out, None, given(1))
    assert asked == [needed, needed]
    with pytest.raises(MemoryError, match="none left"):
        _C.decode(inputs, options, None, False, out, None, fails)
    with pytest.raises(TypeError, match="workspace: the function returned 0 bytes"):
        _C.decode(inputs, options, None, False, out, None, lambda like, size: None)


@pytest.mark.parametrize("missing", ["softcap", "alibi", "sink"])
@pytest.mark.parametrize("form", ["decode", "decode_paged"])
def test_decode_features_without_a_python_function(form, missing):
    """softcap, slopes and sink in decode: reached through the binding (and C++) only."""
    case = case_named("decode_contiguous" if form == "decode" else "decode_paged")
    case = case.replace(
        **{"softcap": {"softcap": 9.0}, "alibi": {"alibi": "batch"}, "sink": {"sink": True}}[missing]
    )
    problem = build(case, "float32", seed=93)
    inputs, options = arguments_of(problem)
    out = torch.full((case.batch, case.num_heads, case.head_dim_v), torch.nan)
    lse = torch.full((case.batch, case.num_heads), torch.nan)
    space, _ = workspace(_C.workspace_size_decode(inputs, options, None, False))
    _C.decode(inputs, options, None, False, out, lse, space)
    checks.compare_decode(problem, out, lse, decisions.decode_decisions(problem)[0])


def test_workspace_is_linear_in_the_length():
    """No buffer grows with seqlen_q * seqlen_k."""

    def sizes(seqlen):
        case = case_named("plain").replace(batch=1, seqlen_q=seqlen, seqlen_k=seqlen, causal=True)
        q = torch.empty(1, 1, 4, 64).expand(1, seqlen, 4, 64)
        k = torch.empty(1, 1, 2, 64).expand(1, seqlen, 2, 64)
        problem = build(case.replace(seqlen_q=1, seqlen_k=1), "float32")
        problem.tensors.update(query=q, key=k, value=k)
        inputs, options = arguments_of(problem)
        skip_map = None
        return _C.workspace_size_forward(inputs, options), _C.workspace_size_backward(
            inputs, options, None, skip_map, None, None
        )

    for short, long in zip(sizes(4096), sizes(65536), strict=True):
        assert long <= 16 * short + (1 << 20)
        assert long <= 65536 * 6 * 64 * 4 * 40, "more than forty float32 copies of the inputs"


def test_lse_buffer_of_the_twelve_functions():
    problem = build(case_named("plain"), "bfloat16", seed=94)
    t = problem.tensors
    out, lse = checks.Buffer(t["query"].shape, torch.bfloat16), checks.Buffer((2, 4, 150), torch.float32)
    result = fsa.flash_dense_attn_func(**t, out=out.view, lse=lse.view, return_lse=True)
    assert result[0].data_ptr() == out.view.data_ptr() and result[1].data_ptr() == lse.view.data_ptr()
    out.check("out")
    lse.check("lse")
    expected = checks.call(problem)
    checks.assert_same_bits("out", out.view, expected.out)
    checks.assert_same_bits("lse", lse.view, expected.lse)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "seqlen", "window"),
    [(1, 4, 2, 4096, None), (1, 8, 8, 2048, None), (1, 2, 1, 8192, (255, 0)), (2, 3, 3, 1000, (100, 50))],
)
def test_backward_workspace_is_that_of_the_formula(batch, heads, kv_heads, seqlen, window):
    """docs/semantics.md, "Workspace": float32, without a gate or a sink."""
    query = torch.empty(batch, seqlen, heads, 64)
    key = torch.empty(batch, seqlen, kv_heads, 64)
    mask = {"causal": True} if window is None else {"window_size": window}
    left, right = window or (math.inf, 0)
    tiles = math.ceil(seqlen / 64)
    most = min(max(2**27 // (batch * tiles * 64 * heads * 64 * 4), 2), 8)
    segments = min(math.ceil(32 / (batch * kv_heads)), math.ceil(seqlen / 256), most)
    keys = math.ceil(math.ceil(seqlen / segments) / 128) * 128
    parts = 0
    for begin in range(0, seqlen, keys):
        end = min(seqlen, begin + keys)
        rows = min(seqlen - begin + right, end - begin + left + right)
        parts += min(tiles, math.ceil(rows / 64) + 1) * batch * heads
    arrays = [heads * batch * tiles * 64 * 4] * 3 + [parts * 64 * 64 * 4, parts]
    expected = sum(math.ceil(size / 64) * 64 for size in arrays)
    assert fsa.explain(query, key, key, backward=True, **mask)["workspace"] == expected
