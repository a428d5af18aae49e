# SPDX-License-Identifier: Apache-2.0
"""The package around the computation: the twelve functions, drop-ins, explain, NumPy, autograd's edges, import."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import checks
import flash_sparse_attention as fsa
import numpy as np
import oracle
import pytest
import torch
from cases import Problem, build, case_named, load_cases

LOW = (torch.float32, torch.bfloat16, torch.float16)


# ---- the twelve functions -----------------------------------------------------------------------------------


def twelve_arguments(problem: Problem) -> dict:
    """Arguments of the twelve functions' names for a forward problem."""
    t, o = problem.tensors, problem.options
    names = {
        "threshold": "softmax_threshold",
        "log_sigmoid_gate": "is_logsigmoid_gate",
        "adaptive_gate": "is_adapt_gate",
    }
    arguments = {**t, **{names.get(n, n): v for n, v in o.items()}}
    arguments["is_causal"] = arguments.pop("causal")
    if "cu_seqlens_q" in t:
        for side, lengths in (("q", problem.case.seqlen_q), ("k", problem.case.seqlen_k)):
            arguments.setdefault(f"max_seqlen_{side}", lengths)
    if "alpha" in t:
        arguments.setdefault("softmax_threshold", 0.0)
    return arguments


TWELVE_CASES = {
    "flash_dense_attn_func": [
        "plain",
        "causal_more_keys",
        "window_both",
        "window_sizes_bands",
        "paged_16",
        "scale",
    ],
    "flash_sparse_attn_func": ["threshold_causal", "threshold_window_sizes", "paged_256_topics_threshold"],
    "flash_gated_attn_func": [
        "gate_tiles_causal",
        "gate_tiles_fixed_bhs",
        "gate_and_threshold",
        "paged_7_window_gate",
    ],
    "flash_dense_attn_varlen_func": ["packed", "packed_seqused"],
    "flash_sparse_attn_varlen_func": ["threshold_packed"],
    "flash_gated_attn_varlen_func": ["packed_window_sizes_gate_bhs"],
}


@pytest.mark.parametrize("name,case", [(n, c) for n, cases in TWELVE_CASES.items() for c in cases])
def test_the_twelve_are_attention(name, case):
    """Same bits as attention(), gradients too; hints change nothing."""
    problem = build(case_named(case), "float32", seed=111)
    arguments = twelve_arguments(problem)
    differentiable = [
        n for n in oracle.GRADIENTS if n in problem.tensors and "page_table" not in problem.tensors
    ]
    results = []
    hints = {"is_autotune": False, "tile_mn": (64, 64), "pack_gqa": True, "is_split_kv": True, "is_split_qo": True,
             "skip_checks": True}  # fmt: skip
    for call, kwargs in (
        (fsa.attention, problem.arguments()),
        (getattr(fsa, name), arguments),
        (getattr(fsa, name), {**arguments, **hints}),
    ):
        leaves = {n: problem.tensors[n].clone().requires_grad_() for n in differentiable}
        out, lse = call(**{**kwargs, **leaves}, return_lse=True)
        grads = (
            torch.autograd.grad(out.sum() + lse[lse > -math.inf].sum(), list(leaves.values()))
            if leaves
            else ()
        )
        results.append((out.detach(), lse.detach(), *grads))
    for other in results[1:]:
        for part, (a, b) in enumerate(zip(results[0], other, strict=True)):
            checks.assert_same_bits(f"result {part}", a, b)


def test_defaults_of_the_sparse_and_gated_functions():
    """softmax_threshold=None is 1.0, gate_threshold=None is 1 / seqlen_k; attention(threshold=None) is dense."""
    problem = build(case_named("gate_and_threshold"), "float32", seed=112)
    t = problem.tensors
    q, k, v, a, d = (t[n] for n in ("query", "key", "value", "alpha", "delta"))
    expected = fsa.attention(q, k, v, causal=True, threshold=1.0)
    checks.assert_same_bits("sparse", fsa.flash_sparse_attn_func(q, k, v, True), expected)
    expected = fsa.attention(
        q, k, v, causal=True, threshold=1.0, alpha=a, delta=d, gate_threshold=1 / k.shape[1]
    )
    checks.assert_same_bits("gated", fsa.flash_gated_attn_func(q, k, v, a, d, True), expected)
    expected = fsa.attention(q, k, v, causal=True, threshold=0.0)
    checks.assert_same_bits("dense", fsa.attention(q, k, v, causal=True), expected)
    checks.assert_same_bits("dense", fsa.flash_dense_attn_func(q, k, v, True), expected)


@pytest.mark.parametrize("function", ["flash_dense_attn_func", "flash_sparse_attn_func"])
def test_is_local_without_windows_takes_the_heuristic(function):
    problem = build(case_named("plain").replace(batch=1, seqlen_q=1500, seqlen_k=1500), "float32", seed=113)
    q, k, v = (problem.tensors[n] for n in ("query", "key", "value"))
    sizes = fsa.window_sizes_heuristic(1500, 2, equal_bandwidth=True)
    expected = getattr(fsa, function)(q, k, v, window_sizes=sizes)
    checks.assert_same_bits("is_local", getattr(fsa, function)(q, k, v, is_local=True), expected)


@pytest.mark.parametrize("seqlen_k", [0, 1, 50, 1088, 1089, 5000, 100_000])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("equal_bandwidth", [True, False])
def test_window_sizes_heuristic(seqlen_k, num_kv_heads, equal_bandwidth):
    """near and sink shared, the rest cut into one band per head; together the heads cover everything."""
    sizes = fsa.window_sizes_heuristic(seqlen_k, num_kv_heads, equal_bandwidth=equal_bandwidth)
    assert sizes.dtype == torch.int32 and tuple(sizes.shape) == (num_kv_heads, 4)
    near = min(1024, seqlen_k)
    sink = max(min(64, seqlen_k - near), 0)
    span = max(seqlen_k - sink - near, 0)
    breaks = []
    for h in range(num_kv_heads + 1):
        share = h / num_kv_heads
        breaks.append(
            int(span * h / num_kv_heads) if equal_bandwidth else int(span * (1 - math.sqrt(1 - share)))
        )
    expected = [[sink, breaks[h + 1] - breaks[h], breaks[h], near] for h in range(num_kv_heads)]
    assert sizes.tolist() == expected
    assert sum(row[1] for row in expected) == span


# ---- drop-ins -----------------------------------------------------------------------------------------------


def test_flash_attn_func_positional_and_keyword():
    problem = build(case_named("alibi").replace(causal=True), "bfloat16", seed=114)
    q, k, v = (problem.tensors[n] for n in ("query", "key", "value"))
    slopes = problem.tensors["alibi_slopes"]
    expected = fsa.attention(
        q, k, v, softmax_scale=0.2, causal=True, window_size=(50, 0), softcap=9.0, alibi_slopes=slopes
    )
    out = fsa.flash_attn_func(q, k, v, 0.0, 0.2, True, (50, 0), 9.0, slopes, False, False)
    checks.assert_same_bits("positional", out, expected)
    out = fsa.flash_attn_func(
        q,
        k,
        v,
        softmax_scale=0.2,
        causal=True,
        window_size=(50, None),
        softcap=9.0,
        alibi_slopes=slopes,
        dropout_p=0.0,
    )
    checks.assert_same_bits("keywords", out, expected)
    out, lse, probabilities = fsa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected, expected_lse = fsa.attention(q, k, v, causal=True, return_lse=True)
    checks.assert_same_bits("out", out, expected)
    checks.assert_same_bits("lse", lse, expected_lse)
    assert probabilities is None


def test_flash_attn_func_newer_keywords():
    problem = build(case_named("sink"), "float32", seed=115)
    q, k, v, sink = (problem.tensors[n] for n in ("query", "key", "value", "sink"))
    expected = fsa.attention(q, k, v, sink=sink, return_lse=True)
    ours = fsa.flash_attn_func(q, k, v, learnable_sink=sink, num_splits=1, pack_gqa=None, return_lse=True)
    checks.assert_same_bits("out", ours[0], expected[0])
    checks.assert_same_bits("lse", ours[1], expected[1])


def test_flash_attn_varlen_func():
    problem = build(case_named("packed_seqused"), "float32", seed=116)
    t = problem.tensors
    args = (t["query"], t["key"], t["value"], t["cu_seqlens_q"], t["cu_seqlens_k"], 100, 210)
    used = {n: t[n] for n in ("seqused_q", "seqused_k")}
    expected = fsa.attention(**problem.arguments())
    checks.assert_same_bits("out", fsa.flash_attn_varlen_func(*args, 0.0, None, True, **used), expected)
    leaves = [x.clone().requires_grad_() for x in args[:3]]
    out = fsa.flash_attn_varlen_func(*leaves, *args[3:], causal=True, **used)
    out.sum().backward()
    grads = checks.call(problem, torch.ones(()).expand(expected.shape)).grads
    for leaf, name in zip(leaves, ("query", "key", "value"), strict=True):
        checks.assert_same_bits(f"d{name}", leaf.grad, grads[name])


@pytest.mark.parametrize("keyword", ["block_table", "page_table"])
def test_flash_attn_varlen_func_paged_is_right_or_refused(keyword):
    problem = build(case_named("packed_paged"), "float32", seed=117)
    t = problem.tensors
    cu_k = torch.cat([torch.zeros(1, dtype=torch.int32), t["seqused_k"].cumsum(0).to(torch.int32)])
    args = (t["query"], t["key"], t["value"], t["cu_seqlens_q"], cu_k, 90, 192)
    try:
        out = fsa.flash_attn_varlen_func(
            *args,
            causal=True,
            seqused_q=t["seqused_q"],
            seqused_k=t["seqused_k"],
            **{keyword: t["page_table"]},
        )
    except NotImplementedError as error:
        assert keyword in str(error)
    else:
        checks.assert_same_bits("out", out, fsa.attention(**problem.arguments()))


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_dropout_is_an_error(name):
    x = torch.zeros(5, 2, 16)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    args = (x[None],) * 3 if name == "flash_attn_func" else (x, x, x, cu, cu, 5, 5)
    with pytest.raises((NotImplementedError, ValueError), match=r"dropout_p.*0\.1"):
        getattr(fsa, name)(*args, 0.1)
    getattr(fsa, name)(*args, 0.0)


# ---- explain, backends --------------------------------------------------------------------------------------


@pytest.mark.skipif("FSA_BACKEND" in os.environ, reason="one backend was asked for")
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("case", load_cases("test", "feature"), ids=lambda c: c.name)
def test_explain_proves_simd(case, dtype):
    """Every feature in float32, bfloat16 and float16 is served by the SIMD backend; float64 by the reference."""
    problem = build(case, dtype, seed=118)
    told = fsa.explain(**problem.arguments())
    assert {"backend", "kernel", "reasons"} <= told.keys()
    assert told["backend"] == ("reference" if dtype == torch.float64 else "cpu")
    chosen = [entry for entry in told["reasons"] if entry[1]]
    assert [entry[0] for entry in chosen] == [told["backend"]]
    passed_over = [e for e in told["reasons"][: told["reasons"].index(chosen[0])]]
    assert all(reason for _, _, reason in passed_over), "a backend was passed over without a reason"
    if dtype == torch.float64:
        assert "cpu" in [e[0] for e in passed_over]


@pytest.mark.skipif("FSA_BACKEND" in os.environ, reason="one backend was asked for")
@pytest.mark.parametrize("dtype", LOW)
def test_simd_serves_every_head_dim(dtype):
    for head_dim in [*range(1, 70), 79, 97, 127, 129, 191, 255, 257, 509, 511, 512]:
        x = torch.zeros(1, 4, 1, head_dim, dtype=dtype)
        assert fsa.explain(x, x, x)["backend"] == "cpu", head_dim


def test_explain_counts():
    x = torch.zeros(2, 100, 4, 64)
    k = torch.zeros(2, 130, 2, 64)
    told = fsa.explain(x, k, k[..., :48].contiguous())
    assert told["flops"] == 2 * (64 + 48) * 2 * 4 * 100 * 130
    pairs = sum(i + 30 + 1 for i in range(100))
    assert fsa.explain(x, k, k, causal=True)["flops"] == 2 * (64 + 64) * 2 * 4 * pairs
    assert tuple(told["tile"]) == (64, 128)
    assert told["bytes"] > 0 and told["workspace"] >= 0


def test_backends():
    names = [name for name, _, _ in fsa.backends()]
    assert names[-2:] == ["cpu", "reference"]
    for _, available, reason in fsa.backends():
        assert isinstance(available, bool) and reason
    assert dict((n, a) for n, a, _ in fsa.backends())["reference"]


def test_backend_by_name():
    problem = build(case_named("plain"), "float32", seed=119)
    ours, reference = (fsa.attention(**problem.arguments(), backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    x = torch.zeros(1, 2, 1, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        fsa.attention(x, x, x, backend="cpu")


# ---- NumPy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "packed", "window_sizes_bands", "gate_and_threshold", "paged_16"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_numpy(name, dtype):
    problem = build(case_named(name), dtype, seed=120)
    expected, expected_lse = fsa.attention(**problem.arguments(), return_lse=True)
    arrays = {n: t.numpy() for n, t in problem.tensors.items()}
    out, lse = fsa.attention(**{**problem.arguments(), **arrays}, return_lse=True)
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    np.testing.assert_array_equal(out, expected.numpy())
    np.testing.assert_array_equal(lse, expected_lse.numpy())
    buffer = np.full_like(out, np.nan)
    again = fsa.attention(**{**problem.arguments(), **arrays}, out=buffer)
    np.testing.assert_array_equal(buffer, out)
    assert again is buffer or np.shares_memory(again, buffer)


def test_read_only_numpy_inputs_are_fine_and_outputs_are_not():
    x = np.random.default_rng(0).standard_normal((1, 4, 2, 8), dtype=np.float32)
    x.flags.writeable = False
    out = fsa.attention(x, x, x)
    buffer = np.zeros_like(out)
    buffer.flags.writeable = False
    with pytest.raises(ValueError, match="out"):
        fsa.attention(x, x, x, out=buffer)


# ---- autograd -----------------------------------------------------------------------------------------------

GRADCHECK = ("plain", "sink_softcap_alibi_window", "gate_softcap_sink_alibi", "packed_seqused", "threshold_packed",
             "gate_tiles_linear", "window_sizes_bands")  # fmt: skip


def shrink(case):
    """The same features on few rows, so that finite differences are quick."""
    sizes = {
        "batch": 1,
        "seqlen_q": 4,
        "seqlen_k": 6,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 3,
        "head_dim_v": 2,
    }
    if case.form == "packed":
        from cases import Lengths

        lengths = {"lengths_q": Lengths((3, 0, 2), (3, 0, 1)), "lengths_k": Lengths((5, 2, 3), (4, 1, 3))}
        return case.replace(**{**sizes, "batch": 3}, **lengths)
    windows = ((1, 2, 1, 2),) if case.window_sizes else None
    return case.replace(**sizes, window_sizes=windows, lengths_q=None, lengths_k=None)


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name):
    problem = build(shrink(case_named(name)), "float64", seed=121)
    t = {n: x.nan_to_num(0.3) if x.is_floating_point() else x for n, x in problem.tensors.items()}
    names = [n for n in oracle.GRADIENTS if n in t]

    def function(*leaves):
        return fsa.attention(
            **{**t, **dict(zip(names, leaves, strict=True))}, **problem.options, return_lse=True
        )

    out, lse = function(*(t[n] for n in names))
    finite = lse > -math.inf

    def finite_function(*leaves):
        out, lse = function(*leaves)
        return out, lse[finite]

    assert torch.autograd.gradcheck(finite_function, [t[n].clone().requires_grad_() for n in names])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_backward_is_a_clear_error(dtype):
    x = torch.randn(1, 5, 1, 8, dtype=dtype, generator=torch.Generator().manual_seed(122)).requires_grad_()
    (grad,) = torch.autograd.grad(fsa.attention(x, x, x).sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)double backward|twice|once more"):
        torch.autograd.grad(grad.sum(), x)


def test_only_what_requires_a_gradient_gets_one():
    problem = build(case_named("gate_log_sigmoid"), "float32", seed=123)
    everything = checks.call(problem, torch.ones(2, 140, 4, 64)).grads
    for name in ("query", "key", "value", "alpha", "delta"):
        leaf = problem.tensors[name].clone().requires_grad_()
        fsa.attention(**{**problem.arguments(), name: leaf}).sum().backward()
        checks.assert_same_bits(f"d{name}", leaf.grad, everything[name])
    assert not fsa.attention(**problem.arguments()).requires_grad
    with torch.no_grad():
        assert not fsa.attention(
            **{**problem.arguments(), "query": leaf.new_zeros(2, 140, 4, 64)}
        ).requires_grad


def test_backward_twice_through_a_kept_graph():
    problem = build(case_named("threshold_causal"), "float32", seed=124)
    x = problem.tensors["query"].clone().requires_grad_()
    loss = fsa.attention(**{**problem.arguments(), "query": x}).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    checks.assert_same_bits("dquery", first, second)


def test_inputs_changed_before_backward_are_noticed():
    x = torch.randn(1, 5, 1, 8, generator=torch.Generator().manual_seed(125)).requires_grad_()
    k = x.detach().clone()
    out = fsa.attention(x, k, k)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_through_pages_is_refused():
    problem = build(case_named("paged_16"), "float32", seed=126)
    query = problem.tensors["query"].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="page"):
        fsa.attention(**{**problem.arguments(), "query": query}).sum().backward()


def test_backward_through_decode_is_refused():
    problem = build(case_named("decode_contiguous"), "float32", seed=127)
    query = problem.tensors["query"].clone().requires_grad_()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"decode|cache|does not require grad"):
        checks.call_decode(Problem(problem.case, {**problem.tensors, "query": query}, problem.options))[
            0
        ].sum().backward()


# ---- import -------------------------------------------------------------------------------------------------


def run_import(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout


def test_import_loads_nothing_else():
    """Beyond torch: this package and the standard library, so importing it takes what its own files take."""
    code = (
        "import sys, torch; before = set(sys.modules); import flash_sparse_attention; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = set(run_import(code).split())
    assert "flash_sparse_attention" in loaded
    assert loaded <= {"flash_sparse_attention", *sys.stdlib_module_names}


def test_import_needs_no_transformers():
    code = "import sys; sys.modules['transformers'] = None; import flash_sparse_attention"
    run_import(code)
    loaded = "import flash_sparse_attention, sys; assert 'transformers' not in sys.modules"
    run_import(loaded)
