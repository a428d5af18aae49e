# SPDX-License-Identifier: Apache-2.0
"""Threshold and gate: what is promised beyond "own decisions replay, gradients match" of test_table.py."""

from __future__ import annotations

import math

import checks
import decisions
import flash_sparse_attention as fsa
import pytest
import torch
from cases import Problem, build, case_named, load_cases

SPARSE = load_cases("test", "sparse")


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


def with_options(problem: Problem, **options) -> Problem:
    return Problem(problem.case, problem.tensors, {**problem.options, **options})


@named([c for c in SPARSE if c.threshold is not None and c.gate is None])
@pytest.mark.parametrize("threshold", [0.0, -1.0, -1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threshold_off_is_dense_bit_for_bit(case, threshold, dtype):
    """tau <= 0 gives the bits of threshold=None, in outputs and gradients."""
    problem = build(case, dtype, seed=21)
    grads = checks.draw_grads(problem, 21) if "paged" not in case.form else (None, None)
    off = checks.call(with_options(problem, threshold=threshold), *grads)
    dense = checks.call(with_options(problem, threshold=None), *grads)
    checks.assert_same_bits("out", off.out, dense.out)
    checks.assert_same_bits("lse", off.lse, dense.lse)
    assert torch.equal(off.skip_map, dense.skip_map)
    for name, grad in dense.grads.items():
        checks.assert_same_bits(f"d{name}", off.grads[name], grad)


def test_nothing_skipped_is_nearly_dense():
    """A threshold so small that every tile is kept changes nothing that can be seen."""
    case = case_named("threshold_tiny")
    problem = build(case, "float32", seed=22)
    tiny, dense = checks.call(problem), checks.call(with_options(problem, threshold=None))
    assert torch.equal(tiny.skip_map, dense.skip_map)
    torch.testing.assert_close(tiny.out, dense.out, rtol=1e-5, atol=1e-6)


@named(SPARSE)
def test_kept_fraction(case):
    """kept_fraction counts kept over visible tiles, as an own count of the map does."""
    if case.form != "batched" or case.lengths_q or case.window_sizes:
        case = case.replace(form="batched", lengths_q=None, lengths_k=None, window_sizes=None, page_size=None)
    problem = build(case, "float32", seed=23)
    ours = checks.call(problem)
    tiles = decisions.replay(problem, ours.skip_map, 1e-2)
    names = ("causal", "window_size", "block_mask")
    masks = {n: problem.options[n] for n in names if n in problem.options}
    fraction = fsa.kept_fraction(
        ours.skip_map, seqlen_q=case.seqlen_q, seqlen_k=case.seqlen_k, head_dim=case.head_dim, **masks
    )
    assert isinstance(fraction, float)
    assert fraction == pytest.approx(tiles.kept / tiles.visible, abs=1e-12)


@pytest.mark.parametrize(
    "head_dim,expected", [(1, (64, 128)), (128, (64, 128)), (129, (64, 64)), (512, (64, 64))]
)
def test_skip_tile(head_dim, expected):
    assert tuple(fsa.skip_tile(head_dim)) == expected


def test_dense_map_is_every_visible_tile():
    problem = build(case_named("causal_more_keys").replace(seqlen_q=300, seqlen_k=700), "float32", seed=24)
    bits = decisions.skip_map_bits(problem, checks.call(problem).skip_map)[0]
    for row_tile in range(5):
        last_row = min(row_tile * 64 + 63, 299) + 400
        expected = torch.arange(6) <= last_row // 128
        assert torch.equal(bits[0, row_tile], expected)


def test_map_words_follow_the_layout():
    """More than 32 key tiles: tile n is bit n & 31 of word n >> 5."""
    case = case_named("threshold_full").replace(
        seqlen_q=64, seqlen_k=64 * 70, head_dim=144, head_dim_v=8, num_heads=1
    )
    problem = build(case.replace(num_kv_heads=1, threshold=None), "float32", seed=25)
    skip_map = checks.call(problem).skip_map
    assert tuple(skip_map.shape) == (1, 1, 1, 3)
    assert skip_map.flatten().tolist() == [-1, -1, 2 ** (70 - 64) - 1]


@pytest.mark.parametrize("form", ["batched", "packed"])
def test_padding_changes_no_decision(form):
    """Rows and keys beyond the used lengths have no vote: the bits of a problem do not depend on its padding."""
    lengths = {"batched": ("300", "700"), "packed": ("300", "700")}[form]
    tight = case_named("gate_and_threshold").replace(form="batched", seqlen_q=300, seqlen_k=700)
    problem = build(tight, "float32", seed=26)
    padded = {n: t for n, t in problem.tensors.items()}
    for name, extent in (("query", 500), ("alpha", 500), ("key", 1000), ("value", 1000), ("delta", 1000)):
        tensor = torch.full((1, extent, *problem.tensors[name].shape[2:]), math.nan)
        tensor[:, : problem.tensors[name].shape[1]] = problem.tensors[name]
        padded[name] = tensor
    if form == "packed":
        padded = {n: t[0] for n, t in padded.items()}
        padded["cu_seqlens_q"] = torch.tensor([0, 500], dtype=torch.int32)
        padded["cu_seqlens_k"] = torch.tensor([0, 1000], dtype=torch.int32)
    padded["seqused_q"] = torch.tensor([int(lengths[0])], dtype=torch.int32)
    padded["seqused_k"] = torch.tensor([int(lengths[1])], dtype=torch.int32)
    ours = checks.call(problem)
    other = checks.call(Problem(tight.replace(form=form), padded, problem.options))
    out, lse = (other.out[0], other.lse[0]) if form == "batched" else (other.out, other.lse)
    checks.assert_same_bits("out", out[:300].contiguous(), ours.out[0])
    checks.assert_same_bits("lse", lse[:, :300].contiguous(), ours.lse[0])
    assert (out[300:] == 0).all() and (lse[:, 300:] == -math.inf).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_window_right_zero_is_not_causal_for_the_threshold(dtype):
    """window_size=(-1, 0) masks as causal does, but visible_len stays seqlen_k."""
    causal = build(case_named("threshold_causal").replace(inputs="normal", threshold=50.0), dtype, seed=27)
    window = with_options(causal, causal=False, window_size=(-1, 0))
    checks.verify(window, seed=27)
    tiles = [decisions.replay(p, checks.call(p).skip_map, 1e-2) for p in (causal, window)]
    assert tiles[0].visible == tiles[1].visible
    assert tiles[0].kept != tiles[1].kept


def test_nan_is_never_hidden():
    """A NaN logit keeps its tile, so it shows in the output."""
    problem = build(case_named("threshold_causal"), "float32", seed=28)
    before = decisions.skip_map_bits(problem, checks.call(problem).skip_map)[0]
    row_tile, key_tile = next((int(r), int(n)) for _, r, n in (~before).nonzero() if n * 128 + 127 < r * 64)
    key = problem.tensors["key"].clone()
    key[0, key_tile * 128 + 5, 0, 3] = math.nan
    poisoned = Problem(problem.case, {**problem.tensors, "key": key}, problem.options)
    ours = checks.call(poisoned)
    assert (ours.skip_map[0, :, row_tile, key_tile >> 5] >> (key_tile & 31) & 1 == 1).all()
    assert ours.out[0, row_tile * 64 : row_tile * 64 + 64].isnan().all()


def test_gate_off_keeps_everything():
    problem = build(case_named("gate_tiles_causal"), "float32", seed=29)
    for gamma in (0.0, -3.0):
        ours = checks.call(with_options(problem, gate_threshold=gamma))
        tiles = decisions.replay(with_options(problem, gate_threshold=gamma), ours.skip_map, 1e-2)
        assert tiles.kept == tiles.visible


def test_both_gate_layouts_agree_bit_for_bit():
    problem = build(case_named("gate_and_threshold"), "float32", seed=30)
    swapped = dict(problem.tensors)
    for name in ("alpha", "delta"):
        swapped[name] = swapped[name].transpose(1, 2).contiguous()
    grads = checks.draw_grads(problem, 30)
    bsh = checks.call(problem, *grads)
    bhs = checks.call(Problem(problem.case, swapped, {**problem.options, "gate_layout": "bhs"}), *grads)
    checks.assert_same_bits("out", bsh.out, bhs.out)
    for name, grad in bsh.grads.items():
        other = bhs.grads[name].transpose(1, 2) if name in ("alpha", "delta") else bhs.grads[name]
        checks.assert_same_bits(f"d{name}", grad.contiguous(), other.contiguous())


@pytest.mark.parametrize("name,function", [("threshold_causal", "sparse"), ("gate_and_threshold", "gated")])
def test_skipped_tiles_get_no_gradient(name, function):
    """Values that only skipped tiles hold get a gradient of exactly 0."""
    problem = build(case_named(name), "float32", seed=31)
    grads = checks.draw_grads(problem, 31)
    ours = checks.call(problem, *grads)
    bits = decisions.skip_map_bits(problem, ours.skip_map)[0]
    group = problem.case.num_heads // problem.case.num_kv_heads
    per_kv = bits.unflatten(0, (-1, group)).any(1).any(1)  # [num_kv_heads, key_tiles]
    unused = (~per_kv).nonzero().tolist()
    for head, tile in unused:
        part = ours.grads["value"][0, tile * 128 : (tile + 1) * 128, head]
        assert (part == 0).all()
    sharper = with_options(problem, threshold=1e9)
    assert decisions.replay(sharper, checks.call(sharper).skip_map, 1e-2).kept <= int(bits.sum())
