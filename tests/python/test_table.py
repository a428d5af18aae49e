# SPDX-License-Identifier: Apache-2.0
"""Every row of cases.tsv: forward, backward and decode against the float64 oracle."""

from __future__ import annotations

import random

import checks
import pytest
from cases import build, load_cases

FEATURES = [(case, dtype) for case in load_cases("test", "feature") for dtype in case.dtypes]
DECODE = [(case, dtype) for case in load_cases("test", "decode") for dtype in case.dtypes]
HEADS = {"mha": (3, 3), "gqa": (4, 2), "mqa": (3, 1)}
MASKS = ("full", "causal", "window")


def parametrized(rows):
    return pytest.mark.parametrize("case,dtype", rows, ids=[f"{case.name}-{dtype}" for case, dtype in rows])


@parametrized(FEATURES)
def test_feature(case, dtype):
    """Outputs, lse, decisions and all gradients of one feature; sparse rows of the table skip tiles."""
    tiles = checks.verify(build(case, dtype, seed=11), seed=11)
    if "sparse" in case.tags and case.name != "threshold_tiny":
        assert tiles.kept < tiles.visible, "nothing was skipped"


@parametrized(DECODE)
def test_decode(case, dtype):
    tiles = checks.verify(build(case, dtype, seed=12))
    if case.skips:
        assert tiles.kept < tiles.visible, "nothing was skipped"


def masked(case, mask, rng):
    if mask == "causal":
        return case.replace(causal=True)
    if mask == "window":
        return case.replace(window_size=(rng.randrange(case.seqlen_k + 1), rng.randrange(case.seqlen_k + 1)))
    return case


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", load_cases("shape", without=("slow",)), ids=lambda c: c.name)
def test_shape(case, heads, mask):
    """FlashAttention's shapes. Small ones meet every dtype, with and without softcap; each of the others one."""
    num_heads, num_kv_heads = HEADS[heads]
    case = case.replace(num_heads=num_heads, num_kv_heads=num_kv_heads)
    rng = random.Random(f"{case.name} {heads} {mask}")
    case = masked(case, mask, rng)
    variants = [(dtype, softcap) for dtype in ("float32", "bfloat16", "float16") for softcap in (0.0, 15.0)]
    large = case.seqlen_q * case.seqlen_k > 60_000
    for dtype, softcap in [rng.choice(variants)] if large else variants:
        inputs = "softcap" if softcap else "normal"
        variant = case.replace(softcap=softcap, inputs=inputs, head_dim=rng.choice((32, 64, 72, 128)))
        problem = build(variant.replace(head_dim_v=variant.head_dim), dtype, seed=rng.randrange(2**31))
        try:
            checks.verify(problem, seed=3, lse_grad=False)
        except AssertionError as error:
            raise AssertionError(f"{dtype}, softcap {softcap}, {variant}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", load_cases("shape", "slow"), ids=lambda c: c.name)
def test_large_shape(case, dtype):
    checks.verify(build(case.replace(causal=dtype == "float32"), dtype, seed=13), seed=13, lse_grad=False)
