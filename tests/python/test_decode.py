# SPDX-License-Identifier: Apache-2.0
"""Decode: the twelve functions' caches, splits and agreement with attention()."""

from __future__ import annotations

import math

import checks
import decisions
import flash_sparse_attention as fsa
import oracle
import pytest
import torch
from cases import Lengths, Problem, build, case_named, load_cases

DECODE = load_cases("test", "decode")


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


@named([c for c in DECODE if not c.skips and "gathered" not in c.form])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_decode_is_attention_of_one_row(case, dtype):
    problem = build(case, dtype, seed=61)
    out, lse = checks.call_decode(problem)
    t = dict(problem.tensors)
    options = dict(problem.options)
    if "cu_seqlens_k" in t:
        t["cu_seqlens_q"] = torch.arange(case.batch + 1, dtype=torch.int32)
        expected, expected_lse = fsa.attention(**t, **options, return_lse=True)
        expected_lse = expected_lse.T
    else:
        t["query"] = t["query"][:, None]
        expected, expected_lse = fsa.attention(**t, **options, return_lse=True)
        expected, expected_lse = expected[:, 0], expected_lse[..., 0]
    tolerance = 2e-6 if dtype == "float32" else 1e-2
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@named(DECODE)
@pytest.mark.parametrize("num_splits", [1, 3, 7, 64])
def test_splits_change_no_decision(case, num_splits):
    """Every number of splits gives the result of the rule, which knows of no split."""
    problem = build(case, "float32", seed=62)
    out, lse = checks.call_decode(problem, num_splits=num_splits)
    kept, close = decisions.decode_decisions(problem)
    assert not close, "choose another seed"
    checks.compare_decode(problem, out, lse, kept)
    again = checks.call_decode(problem, num_splits=num_splits)
    checks.assert_same_bits("out of a second call", again[0], out)
    checks.assert_same_bits("lse of a second call", again[1], lse)


# Where one code path of the kernels ends and the next begins: heads of a group in blocks of 16, head_dim in blocks of
# 16 and 32 and beyond four of them, keys in blocks of 16, 32 and tiles, pages of whole blocks and others, several key
# heads whose tiles are walked together.
SHAPES = (
    # query heads, key heads, head_dim, of the value, used keys, page size
    (10, 10, 64, None, (2100, 900), None),
    (33, 11, 128, None, (1300, 1025), None),
    (16, 1, 96, 40, (127, 16), None),
    (17, 1, 128, 17, (129, 15), None),
    (40, 1, 32, 136, (1033, 1), None),
    (8, 2, 200, 64, (1100, 31), None),
    (4, 4, 130, 5, (65, 700), None),
    (6, 3, 31, 33, (300, 129), None),
    (32, 8, 128, None, (1500, 49), 16),
    (8, 4, 64, 80, (1200, 333), 24),
    (12, 12, 80, None, (640, 77), 256),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    """Within twice the error of naive attention, NaN beyond the used lengths; the same bits on one thread and five."""
    heads, kv_heads, head_dim, head_dim_v, used, page_size = shape
    case = case_named("decode_contiguous" if page_size is None else "decode_paged").replace(
        batch=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v or head_dim,
        seqlen_k=max(used) + 70,
        lengths_k=Lengths(held=(max(used) + 70,) * 2, used=used),
        page_size=page_size,
    )
    problem = build(case, dtype, seed=69)
    checks.verify_decode(problem)
    results = []
    before = fsa.num_threads()
    try:
        for threads in (1, 5):
            fsa.set_num_threads(threads)
            results.append(checks.call_decode(problem))
    finally:
        fsa.set_num_threads(before)
    checks.assert_same_bits("out", results[0][0], results[1][0])
    checks.assert_same_bits("lse", results[0][1], results[1][1])


@named([c for c in DECODE if c.form in ("decode", "decode_paged", "decode_packed")])
def test_batch_changes_nothing(case):
    """The bits of a sequence do not depend on its companions."""
    problem = build(case, "float32", seed=63)
    out, _ = checks.call_decode(problem)
    name, arguments = problem.decode_call()
    for b in range(case.batch):
        alone = dict(arguments)
        for n in ("query", "alpha", "seqused_k", "page_table"):
            if n in alone:
                alone[n] = alone[n][b : b + 1]
        if case.form == "decode":
            for n in ("key", "value", "delta"):
                if n in alone:
                    alone[n] = alone[n][b : b + 1]
        elif case.form == "decode_packed":
            begin, end = (int(x) for x in alone["cu_seqlens_k"][b : b + 2])
            for n in ("key", "value", "delta"):
                if n in alone:
                    bhs = n == "delta" and case.gate_layout == "bhs"
                    alone[n] = alone[n][:, begin:end] if bhs else alone[n][begin:end]
            alone["cu_seqlens_k"] = torch.tensor([0, end - begin], dtype=torch.int32)
        single = getattr(fsa, name)(**alone)
        checks.assert_same_bits(f"sequence {b}", single[0], out[b])


@pytest.mark.parametrize("name", ["decode_contiguous", "decode_threshold", "decode_gate"])
def test_gathering_everything_is_plain_decode(name):
    case = case_named(name).replace(lengths_k=None)
    problem = build(case, "float32", seed=64)
    plain = checks.call_decode(problem)
    indices = torch.arange(case.seqlen_k, dtype=torch.int32).expand(case.batch, -1)
    gathered = checks.call_decode(problem, gather_kv_indices=indices)
    checks.assert_same_bits("out", gathered[0], plain[0])
    checks.assert_same_bits("lse", gathered[1], plain[1])


def test_gathered_indices_may_repeat_and_be_none():
    """A repeated index counts twice; -1 counts nothing; all -1 is a row without a key."""
    g = torch.Generator().manual_seed(65)
    query = torch.randn(3, 2, 16, generator=g)
    key, value = torch.randn(3, 40, 1, 16, generator=g), torch.randn(3, 40, 1, 8, generator=g)
    indices = torch.tensor([[5, 5, -1, 9], [-1, -1, -1, -1], [-1, 39, 0, -1]], dtype=torch.int32)
    out, lse = fsa.flash_dense_attn_with_kvcache_func(
        query, key, value, gather_kv_indices=indices, return_lse=True
    )
    for b, chosen in enumerate(([5, 5, 9], [], [39, 0])):
        logits = query[b].double() @ key[b, chosen, 0].double().T / 4
        expected = torch.softmax(logits, 1) @ value[b, chosen, 0].double()
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-5, atol=1e-6)
        expected_lse = (
            torch.logsumexp(logits, 1) if chosen else torch.full((2,), -math.inf, dtype=torch.float64)
        )
        torch.testing.assert_close(lse[b].double(), expected_lse, rtol=1e-5, atol=1e-6)


def test_threshold_default_of_the_sparse_functions_is_one():
    case = case_named("decode_threshold")
    problem = build(case, "float32", seed=66)
    name, arguments = problem.decode_call()
    given = getattr(fsa, name)(**arguments)
    del arguments["softmax_threshold"]
    checks.assert_same_bits("out", getattr(fsa, name)(**arguments), given)


def test_threshold_off_is_dense_bit_for_bit():
    problem = build(case_named("decode_threshold"), "float32", seed=67)
    name, arguments = problem.decode_call()
    dense = dict(arguments)
    del dense["softmax_threshold"]
    expected = fsa.flash_dense_attn_with_kvcache_func(**dense)
    for tau in (0.0, -5.0):
        checks.assert_same_bits(
            "out", getattr(fsa, name)(**{**arguments, "softmax_threshold": tau}), expected
        )


def test_dropped_mass_is_bounded():
    """The threshold drops less than tau of the dense probability of every row."""
    problem = build(case_named("decode_threshold").replace(inputs="normal"), "float32", seed=68)
    dense = oracle.attend(problem)
    for tau in (0.1, 1.0):
        options = {**problem.options, "threshold": tau}
        _, lse = checks.call_decode(Problem(problem.case, problem.tensors, options))
        lost = 1 - torch.exp(lse.double() - dense.lse)
        assert (lost < tau + 1e-5).all()


def test_one_query_of_a_long_group():
    """One key head for many query heads: more rows than a vector, fewer than a tile."""
    for heads in (1, 7, 16, 33, 64, 96):
        case = case_named("decode_mqa").replace(num_heads=heads, seqlen_k=333)
        checks.verify(build(case, "float32", seed=69))
