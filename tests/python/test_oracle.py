# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, against torch's own attention, against its second set of gradient formulas, and against
a step-by-step reading of the skip rules. The library takes no part."""

from __future__ import annotations

import math

import decisions
import oracle
import pytest
import torch
from cases import build, case_named, load_cases
from torch.nn.functional import scaled_dot_product_attention as sdpa

SMALL = [c for c in load_cases("test", without=("slow",)) if c.seqlen_q * c.seqlen_k < 300_000]
FORWARD = [c for c in SMALL if not c.decode]


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


def bits_to_map(problem, bits):
    """Inverse of skip_map_bits."""
    words = torch.zeros(decisions.skip_map_shape(problem), dtype=torch.int64)
    for s in oracle.sequences(problem):
        target = words[:, s.row_tile_begin :] if "cu_seqlens_q" in problem.tensors else words[s.index]
        for n in range(bits[s.index].shape[2]):
            target[:, : bits[s.index].shape[1], n >> 5] |= bits[s.index][:, :, n].long() << (n & 31)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@named([c for c in FORWARD if not c.skips and "paged" not in c.form])
def test_autograd_and_formulas_agree(case):
    """Two ways to the gradients, one of them written by hand, give the same in float64."""
    problem = build(case, "float64", seed=1)
    g = torch.Generator().manual_seed(2)
    empty = oracle.attend(problem)
    grad_out = torch.randn(empty.out.shape, generator=g, dtype=torch.float64)
    grad_lse = torch.randn(empty.lse.shape, generator=g, dtype=torch.float64)
    by_autograd = oracle.attend(problem, grad_out=grad_out, grad_lse=grad_lse)
    by_hand = oracle.attend(problem, grad_out=grad_out, grad_lse=grad_lse, by_hand=True)
    torch.testing.assert_close(by_hand.out, by_autograd.out, rtol=1e-12, atol=1e-12)
    assert (
        set(by_hand.grads) == set(by_autograd.grads) == {n for n in oracle.GRADIENTS if n in problem.tensors}
    )
    for name, grad in by_autograd.grads.items():
        assert not grad.isnan().any(), name
        torch.testing.assert_close(
            by_hand.grads[name], grad, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_matches_torch_attention(heads, kv_heads, causal):
    case = case_named("plain").replace(
        num_heads=heads, num_kv_heads=kv_heads, causal=causal, seqlen_q=90, seqlen_k=130
    )
    problem = build(case, "float64", seed=3)
    leaves = [problem.tensors[n].clone().requires_grad_() for n in ("query", "key", "value")]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    mask = torch.ones(90, 130, dtype=torch.bool).tril(130 - 90) if causal else None
    expected = sdpa(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    grad_out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours = oracle.attend(problem, grad_out=grad_out)
    torch.testing.assert_close(ours.out, expected, rtol=1e-12, atol=1e-12)
    expected.backward(grad_out)
    for name, leaf in zip(("query", "key", "value"), leaves, strict=True):
        torch.testing.assert_close(ours.grads[name], leaf.grad, rtol=1e-11, atol=1e-12)


@named([c for c in FORWARD if c.skips])
def test_own_decisions_replay_cleanly(case):
    """A plain loop over tiles takes decisions that the vectorised replay accepts to 1e-9, and that skip."""
    problem = build(case, "float64", seed=5)
    bits = decisions.own_decisions(problem)
    tiles = decisions.replay(problem, bits_to_map(problem, bits), 1e-9)
    if case.name == "threshold_tiny":
        assert tiles.kept == tiles.visible
    else:
        assert tiles.kept < tiles.visible


@pytest.mark.parametrize(
    "name", ["threshold_causal", "gate_tiles_causal", "gate_and_threshold", "threshold_packed"]
)
@pytest.mark.parametrize("change", ["drop", "restore"])
def test_replay_finds_a_wrong_decision(name, change):
    """A map with one decision turned round does not pass."""
    problem = build(case_named(name), "float32", seed=6)
    bits = decisions.own_decisions(problem)
    s = next(iter(oracle.sequences(problem)))
    tile = torch.zeros_like(bits[s.index])
    if change == "drop":  # the diagonal tile of the last row tile holds the largest probabilities
        tile[0, -1, math.ceil(s.keys / 128) - 1] = True
        assert bits[s.index][tile].all()
    else:
        skipped = (~bits[s.index]).nonzero()
        lower = skipped[skipped[:, 2] * 128 <= skipped[:, 1] * 64 + s.offset]
        tile[tuple(lower[0])] = True
    bits[s.index] = bits[s.index] ^ tile
    with pytest.raises(AssertionError):
        decisions.replay(problem, bits_to_map(problem, bits), 1e-2)


@named([c for c in SMALL if c.decode and not c.skips])
def test_decode_is_the_last_row(case):
    """Without skipping, decode equals attention of one query row."""
    problem = build(case, "float64", seed=7)
    bits, _ = decisions.decode_decisions(problem)
    everything = oracle.attend(problem)
    kept = oracle.attend(problem, kept=bits)
    torch.testing.assert_close(kept.out, everything.out, rtol=0, atol=0)
    assert not everything.out.isnan().any()


@named([c for c in SMALL if c.decode and c.skips])
def test_decode_skips_and_keeps_the_guarantee(case):
    """The decode rule drops tiles, and nothing of dense probability >= tau / seqlen_k by the threshold."""
    problem = build(case, "float64", seed=8)
    bits, _ = decisions.decode_decisions(problem)
    share = sum(int(b.sum()) for b in bits.values()) / sum(b.numel() for b in bits.values())
    assert share < 1
    if case.gate is None:
        dense, sparse = oracle.attend(problem), oracle.attend(problem, kept=bits)
        # Dropped mass < tau * dropped share of the keys, so lse moves by less than -log(1 - tau).
        assert (dense.lse - sparse.lse).max() < 1 and (dense.lse >= sparse.lse - 1e-12).all()
