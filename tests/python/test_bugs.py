# SPDX-License-Identifier: Apache-2.0
"""One test per kind of bug that slipped through the tests of other attention libraries."""

from __future__ import annotations

import math

import checks
import flash_sparse_attention as fsa
import pytest
import torch
from cases import Case, Lengths, build

LOW = ["float32", "bfloat16", "float16"]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def verify(case: Case, dtype: str = "float32", seed: int = 71, **kwargs):
    return checks.verify(build(case, dtype, seed=seed), seed=seed, **kwargs)


@pytest.mark.parametrize("dtype", LOW)
def test_zero_length_sequences_and_max_seqlen_1(dtype):
    lengths = Lengths((0, 1, 0, 1, 0))
    verify(
        Case(form="packed", batch=5, lengths_q=lengths, lengths_k=Lengths((1, 0, 0, 1, 1)), causal=True),
        dtype,
    )
    verify(Case(form="packed", batch=3, lengths_q=Lengths((0, 0, 0)), lengths_k=Lengths((0, 0, 0))), dtype)
    verify(
        Case(form="packed", batch=2, lengths_q=Lengths((0, 1)), lengths_k=Lengths((70, 0)), seqlen_k=70),
        dtype,
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("sink", [False, True])
def test_rows_without_a_key(dtype, sink):
    """out 0, lse -inf (or the sink), zero gradients; among rows that have keys, and in tiles of their own."""
    for seqlen_q, seqlen_k, window in (
        (200, 3, None),
        (65, 64, None),
        (300, 300, (-1, -1)),
        (200, 90, (5, 0)),
    ):
        case = Case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=2, num_kv_heads=1, causal=True, sink=sink)
        problem = build(case.replace(window_size=window), dtype, seed=72)
        checks.verify(problem, seed=72)
        ours = checks.call(problem, *checks.draw_grads(problem, 72))
        empty = max(seqlen_q - seqlen_k, 0)
        assert (ours.out[0, :empty] == 0).all() and (ours.grads["query"][0, :empty] == 0).all()
        expected = problem.tensors["sink"].float()[:, None] if sink else torch.full((2, 1), -math.inf)
        torch.testing.assert_close(ours.lse[0, :, :empty], expected.expand(2, empty), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", [128, 129, 256])
def test_first_chunk_fully_masked_then_valid_keys(first):
    """The online softmax meets tiles without any key before the first key."""
    g = torch.Generator().manual_seed(73)
    indices = torch.full((2, first + 70), -1, dtype=torch.int32)
    indices[:, first:] = torch.randint(0, 300, (2, 70), generator=g, dtype=torch.int32)
    case = Case(form="decode_gathered", batch=2, seqlen_k=300, num_heads=4, num_kv_heads=2, top_k=first + 70)
    for dtype in LOW:
        problem = build(case, dtype, seed=73)
        problem.tensors["gather_kv_indices"] = indices
        checks.verify_decode(problem)
    # The same in the forward: a band that starts far from the diagonal.
    verify(Case(seqlen_q=130, seqlen_k=700, window_sizes=((0, 100, first, 0),), num_heads=2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_are_not_finite_sentinels(dtype):
    """Visible logits far below any sentinel: future keys must still have no weight at all."""
    seqlen, head_dim = 150, 16
    query = torch.zeros(1, seqlen, 1, head_dim)
    query[..., 0] = 200.0
    key = torch.zeros(1, seqlen, 1, head_dim)
    key[..., 0] = -800.0 - torch.arange(seqlen)[None, :, None] % 3  # logits near -40,000
    value = normal(1, seqlen, 1, head_dim, seed=74)
    query, key, value = (x.to(getattr(torch, dtype)) for x in (query, key, value))
    out = fsa.attention(query, key, value, causal=True, softmax_scale=0.25)
    logits = (query[0, :, 0].double() @ key[0, :, 0].double().T) * 0.25
    logits = logits.masked_fill(torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1), -math.inf)
    expected = torch.softmax(logits, 1) @ value[0, :, 0].double()
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(out[0, :, 0].double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(out[0, 0], value[0, 0]), "the first row sees exactly one key"


@pytest.mark.parametrize("num_heads,num_kv_heads", [(6, 2), (6, 3), (5, 1), (9, 3)])
@pytest.mark.parametrize("dtype", LOW)
def test_backward_of_uneven_groups(num_heads, num_kv_heads, dtype):
    verify(
        Case(seqlen_q=90, seqlen_k=140, num_heads=num_heads, num_kv_heads=num_kv_heads, causal=True), dtype
    )


@pytest.mark.parametrize("head_dim,head_dim_v", [(64, 128), (128, 64), (192, 128), (24, 7), (7, 24)])
@pytest.mark.parametrize("dtype", LOW)
def test_backward_with_another_value_head_dim(head_dim, head_dim_v, dtype):
    case = Case(batch=2, seqlen_q=100, seqlen_k=140, num_heads=4, num_kv_heads=2, causal=True)
    verify(case.replace(head_dim=head_dim, head_dim_v=head_dim_v), dtype)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 191, 193])
def test_lengths_around_tiles(length):
    """Scratch rows of one step and tiles of the next agree, last partial tile included."""
    verify(Case(batch=2, seqlen_q=length, seqlen_k=length, num_heads=2, num_kv_heads=2, causal=True))
    verify(
        Case(
            seqlen_q=length,
            seqlen_k=2 * length,
            num_heads=2,
            head_dim=136,
            head_dim_v=136,
            window_size=(length, 1),
        )
    )


@pytest.mark.parametrize("first", [1, 5, 9, 13, 17, 33, 65])
def test_head_dim_is_no_multiple_of_anything(first):
    for head_dim in range(first, first + 4):
        for dtype in LOW:
            case = Case(seqlen_q=20, seqlen_k=34, head_dim=head_dim, head_dim_v=head_dim, causal=True)
            verify(case, dtype, seed=head_dim)


def test_offsets_beyond_32_bits():
    """Batch entries more than 2**31 elements apart; the memory between them is never touched."""
    far = 2**31 + 64
    memory = torch.empty(far + 4096, dtype=torch.bfloat16)
    small = normal(2, 10, 1, 32, seed=75, dtype=torch.bfloat16)
    distant = memory.as_strided((2, 10, 1, 32), (far, 32, 32, 1))
    distant.copy_(small)
    query = normal(2, 6, 2, 32, seed=76, dtype=torch.bfloat16)
    expected = fsa.attention(query, small, small, causal=True)
    checks.assert_same_bits("keys", fsa.attention(query, distant, distant, causal=True), expected)
    memory.as_strided((2, 6, 2, 32), (far, 64, 32, 1)).copy_(query)
    distant_query = memory.as_strided((2, 6, 2, 32), (far, 64, 32, 1))
    checks.assert_same_bits("query", fsa.attention(distant_query, small, small, causal=True), expected)
    with torch.no_grad():
        out = memory.as_strided((2, 6, 2, 32), (far, 64, 32, 1))
        checks.assert_same_bits("out", fsa.attention(query, small, small, causal=True, out=out), expected)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3)])
def test_unusual_strides(order):
    """Every order of dimensions in memory, in the forward, the backward and the gradients of the result."""
    case = Case(batch=2, seqlen_q=70, seqlen_k=130, num_heads=4, num_kv_heads=2, causal=True)
    for dtype in LOW:
        problem = build(case, dtype, seed=77)
        plain = checks.call(problem, *checks.draw_grads(problem, 77))
        for name in ("query", "key", "value"):
            inverse = [order.index(i) for i in range(4)]
            problem.tensors[name] = problem.tensors[name].permute(order).contiguous().permute(inverse)
        ours = checks.call(problem, *checks.draw_grads(problem, 77, "transposed"))
        checks.assert_same_bits("out", ours.out, plain.out)
        for name, grad in plain.grads.items():
            checks.assert_same_bits(f"d{name}", ours.grads[name], grad)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", [3.0, 30.0])
def test_large_logits(dtype, size):
    problem = build(
        Case(seqlen_q=130, seqlen_k=260, num_heads=2, num_kv_heads=2, causal=True), dtype, seed=78
    )
    for name in ("query", "key"):
        problem.tensors[name] = problem.tensors[name] * size
    checks.verify(problem, seed=78, lse_grad=False)


@pytest.mark.parametrize("seqlen_q,seqlen_k", [(7, 7), (5, 9), (9, 5), (70, 133)])
@pytest.mark.parametrize("left,right", [(0, 0), (1, 0), (0, 1), (3, 2), (-1, 0), (2, -1), (64, 0), (63, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_window_edges(seqlen_q, seqlen_k, left, right, causal):
    """Every row's lse over equal logits is the log of the number of keys that the definition gives it."""
    query, key = torch.zeros(1, seqlen_q, 1, 8), torch.zeros(1, seqlen_k, 1, 8)
    value = torch.eye(seqlen_k).view(1, seqlen_k, 1, seqlen_k)
    out, lse = fsa.attention(query, key, value, causal=causal, window_size=(left, right), return_lse=True)
    for i in range(seqlen_q):
        position = i + seqlen_k - seqlen_q
        keys = [
            j
            for j in range(seqlen_k)
            if (left < 0 or j >= position - left)
            and (right < 0 or j <= position + right)
            and (not causal or j <= position)
        ]
        assert out[0, i, 0].nonzero().flatten().tolist() == keys, f"row {i}"
        expected = math.log(len(keys)) if keys else -math.inf
        assert float(lse[0, 0, i]) == pytest.approx(expected, abs=1e-6), f"row {i}"


@pytest.mark.parametrize(
    "sizes", [(0, 0, 0, 1), (2, 0, 0, 3), (0, 4, 2, 0), (1, 4, 2, 3), (40, 0, 0, 0), (0, 9, 0, 0)]
)
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(9, 9), (6, 140), (30, 12)])
def test_window_sizes_edges(sizes, seqlen_q, seqlen_k):
    sink, left, right, near = sizes
    query, key = torch.zeros(1, seqlen_q, 1, 8), torch.zeros(1, seqlen_k, 1, 8)
    value = torch.eye(seqlen_k).view(1, seqlen_k, 1, seqlen_k)
    windows = torch.tensor([sizes], dtype=torch.int32)
    out = fsa.attention(query, key, value, window_sizes=windows)
    for i in range(seqlen_q):
        keys = []
        for j in range(seqlen_k):
            d = i + seqlen_k - seqlen_q - j
            if d >= 0 and (d < near or near + right <= d < near + right + left or j < sink):
                keys.append(j)
        assert out[0, i, 0].nonzero().flatten().tolist() == keys, f"row {i}"


def test_output_is_right_element_by_element():
    """Values that are unit vectors make the output the probabilities themselves: a permutation cannot hide."""
    query, key = normal(1, 40, 2, 64, seed=79), normal(1, 100, 2, 64, seed=80)
    value = torch.eye(100).view(1, 100, 1, 100).expand(1, 100, 2, 100)
    out = fsa.attention(query, key, value)
    expected = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / 8, -1)
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top_k", [1, 2, 127, 400])
def test_gathering_one_key_or_more_than_there_are(top_k):
    g = torch.Generator().manual_seed(81)
    case = Case(form="decode_gathered", batch=3, seqlen_k=130, num_heads=4, num_kv_heads=2, top_k=top_k)
    for threshold in (None, 1.0):
        problem = build(case.replace(threshold=threshold), "float32", seed=81)
        problem.tensors["gather_kv_indices"] = torch.randint(
            -1, 130, (3, top_k), generator=g, dtype=torch.int32
        )
        checks.verify_decode(problem)


def test_many_calls_leave_nothing_behind():
    """Calls of other shapes between two equal calls: a stale workspace would show."""
    problems = [
        build(
            Case(seqlen_q=q, seqlen_k=k, num_heads=h, num_kv_heads=h, head_dim=d, head_dim_v=d, causal=True),
            dtype,
            q,
        )
        for q, k, h, d, dtype in (
            (300, 300, 2, 64, "float32"),
            (5, 700, 1, 200, "bfloat16"),
            (65, 64, 3, 17, "float16"),
        )
    ]
    first = [checks.call(p, *checks.draw_grads(p, 82)) for p in problems]
    for _ in range(3):
        for problem, expected in zip(reversed(problems), reversed(first), strict=True):
            again = checks.call(problem, *checks.draw_grads(problem, 82))
            checks.assert_same_bits("out", again.out, expected.out)
            for name, grad in expected.grads.items():
                checks.assert_same_bits(f"d{name}", again.grads[name], grad)
