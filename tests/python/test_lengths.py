# SPDX-License-Identifier: Apache-2.0
"""Other ways to the same numbers: packed and batched, paged and contiguous, strided and contiguous, LSE joins."""

from __future__ import annotations

import math

import checks
import decisions
import flash_sparse_attention as fsa
import pytest
import torch
from cases import build, case_named
from torch.nn.functional import scaled_dot_product_attention as sdpa


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_one_sequence_at_a_time(dtype, causal):
    problem = build(case_named("packed").replace(causal=causal), dtype, seed=41)
    whole = checks.call(problem)
    t = problem.tensors
    cu_q, cu_k = t["cu_seqlens_q"].tolist(), t["cu_seqlens_k"].tolist()
    for b in range(len(cu_q) - 1):
        q = slice(cu_q[b], cu_q[b + 1])
        k = slice(cu_k[b], cu_k[b + 1])
        out = fsa.attention(t["query"][None, q], t["key"][None, k], t["value"][None, k], causal=causal)
        checks.assert_same_bits(f"sequence {b}", whole.out[q], out[0])


@pytest.mark.parametrize("name", ["plain", "causal_more_keys", "one_query_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_attention_is_near(name, dtype):
    """A second, independent oracle: torch's own attention in the same dtype."""
    problem = build(case_named(name), dtype, seed=42)
    q, k, v = (problem.tensors[n].transpose(1, 2) for n in ("query", "key", "value"))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    expected = sdpa(q, k, v, attn_mask=mask if problem.options["causal"] else None, enable_gqa=True)
    tolerance = 3e-6 if dtype == torch.float32 else 2e-2
    out = fsa.attention(**problem.arguments())
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_merge_of_key_sets_is_attention(parts, dtype, packed):
    """Attention over disjoint key sets, joined by their lse, is attention over all keys; gradients too."""
    problem = build(case_named("plain"), dtype, seed=43)
    q, k, v = (problem.tensors[n].clone().requires_grad_() for n in ("query", "key", "value"))

    def whole_and_merged():
        yield fsa.attention(q, k, v, return_lse=True)
        pieces = [
            fsa.attention(q, a, b, return_lse=True)
            for a, b in zip(k.tensor_split(parts, 1), v.tensor_split(parts, 1), strict=True)
        ]
        outs, lses = (torch.stack(x) for x in zip(*pieces, strict=True))
        if packed:  # [parts, total, num_heads, head_dim_v] and [parts, num_heads, total]
            out, lse = fsa.merge_attention_states(outs.flatten(1, 2), lses.transpose(1, 2).flatten(2, 3))
            yield (
                out.unflatten(0, (q.shape[0], q.shape[1])),
                lse.unflatten(1, (q.shape[0], q.shape[1])).transpose(0, 1),
            )
        else:
            yield fsa.merge_attention_states(outs, lses)

    g = torch.Generator().manual_seed(44)
    results = []
    for out, lse in whole_and_merged():
        g.manual_seed(44)
        loss = (out * torch.randn(out.shape, generator=g).to(dtype)).sum() + (
            lse * torch.randn(lse.shape, generator=g)
        ).sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2}[dtype]
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        scale = float(a.detach().abs().max())
        assert float((a - b).detach().abs().max()) <= tolerance * max(1.0, scale), name


def test_merge_with_empty_parts():
    """A part that saw no key (out 0, lse -inf) changes nothing; all parts empty stay empty."""
    g = torch.Generator().manual_seed(45)
    out, lse = torch.randn(1, 3, 2, 8, generator=g), torch.randn(1, 2, 3, generator=g)
    empty_out, empty_lse = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    merged = fsa.merge_attention_states(torch.stack([empty_out, out]), torch.stack([empty_lse, lse]))
    checks.assert_same_bits("out", merged[0], out)
    checks.assert_same_bits("lse", merged[1], lse)
    outs = torch.stack([empty_out, empty_out]).requires_grad_()
    lses = torch.stack([empty_lse, empty_lse]).requires_grad_()
    merged = fsa.merge_attention_states(outs, lses)
    assert (merged[0] == 0).all() and (merged[1] == -math.inf).all()
    grads = torch.autograd.grad(merged[0].sum(), (outs, lses))
    assert all((x == 0).all() for x in grads)


def test_merge_is_exact_in_float64():
    g = torch.Generator().manual_seed(46)
    outs = torch.randn(4, 2, 5, 3, 8, generator=g, dtype=torch.float64)
    lses = 5 * torch.randn(4, 2, 3, 5, generator=g, dtype=torch.float64)
    weights = torch.softmax(lses, 0).transpose(2, 3)[..., None]
    out, lse = fsa.merge_attention_states(outs, lses)
    torch.testing.assert_close(out, (weights * outs).sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, torch.logsumexp(lses, 0), rtol=1e-12, atol=1e-12)
    leaves = outs.clone().requires_grad_(), lses.clone().requires_grad_()
    assert torch.autograd.gradcheck(fsa.merge_attention_states, leaves)


@pytest.mark.parametrize("name", ["plain", "sink", "gate_log_sigmoid", "threshold_causal", "packed_seqused"])
def test_gradient_of_lse_alone(name):
    """lse is differentiable on its own; value then gets no gradient."""
    problem = build(case_named(name), "float32", seed=47)
    _, grad_lse = checks.draw_grads(problem, 47)
    grads = checks.call(problem, None, grad_lse).grads
    assert (grads["value"] == 0).all()
    problem64 = build(case_named(name), "float64", seed=47)
    kept = decisions.skip_map_bits(problem, checks.call(problem).skip_map)
    truth = checks.oracle.attend(problem64, grad_lse=grad_lse, kept=kept)
    for n, grad in grads.items():
        torch.testing.assert_close(
            grad.double(), truth.grads[n], rtol=1e-4, atol=2e-5, msg=lambda m, n=n: f"d{n}: {m}"
        )


@pytest.mark.parametrize("page_size", [1, 5, 16, 128, 300])
@pytest.mark.parametrize("name", ["causal_more_keys", "threshold_full", "gate_tiles_full_default"])
def test_paged_is_contiguous(name, page_size):
    """Keys behind a page table give the bits of the same keys in one piece, also when sequences share pages."""
    case = case_named(name).replace(batch=1)
    whole = build(case, "float32", seed=48)
    length = case.seqlen_k
    pages = -(-length // page_size)
    table = torch.randperm(pages + 2, generator=torch.Generator().manual_seed(49))[:pages].to(torch.int32)
    paged = dict(whole.tensors)
    for n in ("key", "value", "delta"):
        if n in paged:
            storage = torch.full((pages + 2, page_size, *paged[n].shape[2:]), math.nan)
            flat = torch.full((pages * page_size, *paged[n].shape[2:]), math.nan)
            flat[:length] = paged[n][0]
            storage[table.long()] = flat.unflatten(0, (pages, page_size))
            paged[n] = storage
    # Two sequences read the same pages; the second stops earlier.
    for n in ("query", "alpha"):
        if n in paged:
            paged[n] = paged[n].expand(2, *paged[n].shape[1:])
    paged["page_table"] = table.expand(2, pages)
    paged["seqused_k"] = torch.tensor([length, length - 37], dtype=torch.int32)
    out = fsa.attention(**paged, **whole.options)
    checks.assert_same_bits("out", out[0], fsa.attention(**whole.arguments())[0])
    shorter = {
        n: t[:, : length - 37] if n in ("key", "value", "delta") else t for n, t in whole.tensors.items()
    }
    checks.assert_same_bits("shorter", out[1], fsa.attention(**shorter, **whole.options)[0])


def test_expanded_and_absurd_strides_give_the_same_bits():
    problem = build(case_named("plain").replace(batch=1, num_heads=3, num_kv_heads=1), "float32", seed=50)
    plain = checks.call(problem)
    t = problem.tensors
    query = t["query"].as_strided(t["query"].shape, (2**50, *t["query"].stride()[1:]))
    key = t["key"].expand(1, 200, 3, 64)
    value = t["value"].as_strided(t["value"].shape, (7, 64, 2**45 + 1, 1))
    out = fsa.attention(query, key[:, :, :1], value)
    checks.assert_same_bits("absurd", out, plain.out)
    out = fsa.attention(query, key, t["value"].expand(1, 200, 3, 64))
    checks.assert_same_bits("expanded heads", out, plain.out)
