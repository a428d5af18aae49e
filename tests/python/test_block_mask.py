# SPDX-License-Identifier: Apache-2.0
"""Block masks: where they come from, what torch's stand for, and what is refused."""

from __future__ import annotations

import gc
import math

import checks
import flash_sparse_attention as fsa
import oracle
import pytest
import torch
from cases import Problem, build, case_named
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

DOCUMENT = torch.sort(torch.randint(0, 6, (2, 600), generator=torch.Generator().manual_seed(1)))[0]
PREFIX = torch.tensor([170, 31])
WINDOW = torch.tensor([40, 90, 200, 330])


def causal(b, h, q, k):
    return q >= k


def same_document(b, h, q, k):
    return DOCUMENT[b, q] == DOCUMENT[b, k]


def row_of_documents(b, h, q, k):
    return DOCUMENT[b][q] == DOCUMENT[b][k]


def prefix(b, h, q, k):
    return (k < PREFIX[b]) | (q >= k)


def window_per_head(b, h, q, k):
    return (q - k).abs() <= WINDOW[h]


def nothing(b, h, q, k):
    return q < 0


# name -> mask_mod, per batch entry, per head
MODS = {
    "causal": (causal, False, False),
    "same_document": (same_document, True, False),
    "row_of_documents": (row_of_documents, True, False),
    "causal_document": (and_masks(causal, same_document), True, False),
    "prefix": (prefix, True, False),
    "window_per_head": (window_per_head, False, True),
    "prefix_and_window": (and_masks(prefix, window_per_head), True, True),
    "nothing": (nothing, False, False),
}


def element_mask(mask_mod, batch: int, heads: int, rows: int, keys: int) -> torch.Tensor:
    """bool [batch, heads, rows, keys], one scalar call after the other for b and h."""
    q, k = torch.arange(rows)[:, None], torch.arange(keys)[None, :]

    def whole(b, h):
        b, h = torch.tensor(b), torch.tensor(h)
        return mask_mod(b, h, q, k).expand(rows, keys)

    return torch.stack([torch.stack([whole(b, h) for h in range(heads)]) for b in range(batch)])


def plain(query, key, value, mask):
    """float64 attention through the whole score matrix, differentiable."""
    group = query.shape[2] // key.shape[2]
    q, k, v = (x.double() for x in (query, key, value))
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -math.inf)
    empty = ~mask.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def qkv(rows: int = 500, keys: int = 600, heads: int = 4, kv_heads: int = 2, dim: int = 32, batch: int = 2):
    g = torch.Generator().manual_seed(2)
    shapes = (batch, rows, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim)
    return tuple(torch.randn(shape, generator=g) for shape in shapes)


def shown(mask: fsa.BlockMask, batch: int, heads: int, rows: int, keys: int) -> torch.Tensor:
    """What a mask shows, decoded by the oracle."""
    parts = [
        oracle.in_blocks(mask, oracle.Sequence(b, 0, 0, rows, keys, 0, keys), h)
        for b in range(batch)
        for h in range(heads)
    ]
    return torch.stack(parts).view(batch, heads, rows, keys)


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("size", [128, (64, 256)])
def test_masks_of_torch(name, size):
    """torch's own mask means here what it means there: outputs and gradients."""
    mask_mod, per_batch, per_head = MODS[name]
    query, key, value = (x.requires_grad_() for x in qkv())
    theirs = create_block_mask(
        mask_mod, 2 if per_batch else None, 4 if per_head else None, 500, 600, device="cpu", BLOCK_SIZE=size
    )
    ours = fsa.BlockMask.from_torch(theirs)
    elements = element_mask(mask_mod, 2, 4, 500, 600)
    assert torch.equal(shown(ours, 2, 4, 500, 600), elements)
    assert ours.kv_num_blocks.shape[:2] == (2 if per_batch else 1, 4 if per_head else 1), (
        "nothing is expanded"
    )
    assert ours.partial_bits.shape[0] == int(theirs.kv_num_blocks.sum())

    out = fsa.attention(query, key, value, block_mask=theirs)
    expected = plain(query, key, value, elements)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad(out, (query, key, value), grad)
    wanted = torch.autograd.grad(expected, (query, key, value), grad.double())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["causal_document", "prefix_and_window"])
def test_flex_attention_agrees(name):
    """The whole way through torch: flex_attention with the same mask."""
    mask_mod, per_batch, per_head = MODS[name]
    query, key, value = qkv(256, 384)
    theirs = create_block_mask(
        mask_mod, 2 if per_batch else None, 4 if per_head else None, 256, 384, device="cpu"
    )
    arguments = (x.transpose(1, 2) for x in (query, key, value))
    expected = flex_attention(*arguments, block_mask=theirs, enable_gqa=True)
    out = fsa.attention(query, key, value, block_mask=theirs)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_a_mask_of_torch_is_evaluated_once_and_only_where_it_is_partial():
    calls = []

    def counted(b, h, q, k):
        calls.append(1)
        return q >= k

    theirs = create_block_mask(counted, None, None, 512, 512, device="cpu")
    query, key, value = qkv(512, 512)
    calls.clear()
    for _ in range(3):
        fsa.attention(query, key, value, block_mask=theirs)
    assert len(calls) == 1
    ours = fsa.BlockMask.from_torch(theirs)
    assert ours.partial_bits.shape == (4, 128, 4), "the blocks on the diagonal"
    assert int(ours.full_kv_num_blocks.sum()) == 6
    count = len(fsa.block_mask._CONVERTED)
    del theirs
    gc.collect()
    assert len(fsa.block_mask._CONVERTED) == count - 1, "conversions do not outlive their mask"


def test_mask_mod_is_not_asked_beyond_the_sequence():
    """Tables as long as the sequence are enough."""
    table = torch.arange(150) % 3

    def mask_mod(b, h, q, k):
        return table[q] == table[k]

    theirs = create_block_mask(mask_mod, None, None, 150, 150, device="cpu")
    elements = (table[:, None] == table[None, :])[None, None]
    assert torch.equal(shown(fsa.BlockMask.from_torch(theirs), 1, 1, 150, 150), elements)


@pytest.mark.parametrize("size", [64, 128, (64, 128), (192, 64)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 300, 500), (2, 3, 129, 64), (1, 2, 1, 1), (2, 1, 64, 0), (1, 1, 0, 5)]
)
def test_from_mask(size, shape):
    g = torch.Generator().manual_seed(5)
    rows, keys = (size, size) if isinstance(size, int) else size
    mask = torch.rand(shape, generator=g) < 0.5
    coarse = torch.rand(*shape[:2], shape[2] // rows + 1, shape[3] // keys + 1, generator=g)
    coarse = coarse.repeat_interleave(rows, 2).repeat_interleave(keys, 3)[:, :, : shape[2], : shape[3]]
    mask = ((coarse < 0.4) | mask) & (coarse < 0.7)
    ours = fsa.BlockMask.from_mask(mask, size)
    assert torch.equal(shown(ours, *shape), mask)
    assert ours.seq_lengths == shape[2:]
    if keys == 128 and shape[2] and shape[3]:
        query, key, value = qkv(shape[2], shape[3], heads=shape[1], kv_heads=1, batch=shape[0])
        out = fsa.attention(query, key, value, block_mask=ours)
        torch.testing.assert_close(out.double(), plain(query, key, value, mask), rtol=1e-5, atol=1e-5)


def test_an_edge_block_that_shows_all_of_the_sequence_is_full():
    ours = fsa.BlockMask.from_mask(torch.ones(1, 1, 150, 150, dtype=torch.bool))
    assert int(ours.kv_num_blocks.sum()) == 0 and ours.full_kv_num_blocks.tolist() == [[[2, 2]]]


def test_lists_without_mask_mod_show_whole_blocks():
    counts, indices = torch.tensor([[[1, 2]]]).int(), torch.tensor([[[[1, 0, 7], [0, 2, 7]]]]).int()
    query, key, value = qkv(200, 300)
    elements = torch.zeros(1, 1, 256, 384, dtype=torch.bool)
    for row, block in ((0, 1), (1, 0), (1, 2)):
        elements[:, :, row * 128 : row * 128 + 128, block * 128 : block * 128 + 128] = True
    ours = fsa.BlockMask.from_kv_blocks(counts, indices)
    out = fsa.attention(query, key, value, block_mask=ours)
    torch.testing.assert_close(
        out.double(), plain(query, key, value, elements[:, :, :200, :300]), rtol=1e-5, atol=1e-5
    )
    more = torch.tensor([[[1, 0]]]).int(), torch.tensor([[[[2], [9]]]]).int()
    elements[:, :, :128, 256:] = True
    both = fsa.BlockMask.from_kv_blocks(counts, indices, *more)
    assert torch.equal(shown(both, 1, 1, 200, 300), elements[:, :, :200, :300])
    theirs = TorchBlockMask.from_kv_blocks(counts, indices[..., :2], seq_lengths=(200, 300))
    assert torch.equal(fsa.attention(query, key, value, block_mask=theirs), out)


@pytest.mark.parametrize("scope", [(1, 1), (2, 4), (2, 1), (1, 4)])
def test_dense_masks_of_blocks(scope):
    g = torch.Generator().manual_seed(7)
    blocks = torch.rand(*scope, 2, 3, generator=g) < 0.5
    query, key, value = qkv(200, 300)
    elements = (
        blocks.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :200, :300].expand(2, 4, -1, -1)
    )
    out = fsa.attention(query, key, value, block_mask=blocks)
    torch.testing.assert_close(out.double(), plain(query, key, value, elements), rtol=1e-5, atol=1e-5)
    fine = fsa.BlockMask.from_dense(blocks.repeat_interleave(2, 2), (64, 128))
    assert torch.equal(fsa.attention(query, key, value, block_mask=fine), out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mask_of_everything_is_dense_bit_for_bit(dtype):
    problem = build(case_named("plain").replace(seqlen_q=300, seqlen_k=500), dtype, seed=61)
    grads = checks.draw_grads(problem, 61)
    dense = checks.call(problem, *grads)
    blocks = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    listed = checks.call(problem, *grads, block_mask=blocks)
    for name, a, b in (("out", dense.out, listed.out), ("lse", dense.lse, listed.lse)):
        checks.assert_same_bits(name, a, b)
    assert torch.equal(dense.skip_map, listed.skip_map)
    for name, grad in dense.grads.items():
        checks.assert_same_bits(f"d{name}", grad, listed.grads[name])


def test_rows_and_keys_that_nobody_sees():
    """Out 0, lse -inf, zero gradients, whatever the hidden keys hold."""
    blocks = torch.tensor([[True, False, False], [False, False, False]])[None, None]
    query, key, value = qkv(256, 384)
    key[:, 128:] = value[:, 128:] = math.nan
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, lse = fsa.attention(*leaves, block_mask=blocks, return_lse=True)
    assert (out[:, 128:] == 0).all() and (lse[..., 128:] == -math.inf).all()
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert (grads[0][:, 128:] == 0).all()
    for grad in grads[1:]:
        assert (grad[:, 128:] == 0).all() and grad.isfinite().all()


def test_questions_count_the_listed_blocks():
    query, key, value = qkv(512, 512)
    blocks = torch.eye(4, dtype=torch.bool)[None, None]
    dense = fsa.explain(query, key, value)
    masked = fsa.explain(query, key, value, block_mask=blocks)
    assert masked["backend"] == "cpu" and masked["flops"] == dense["flops"] / 4
    _, skip_map = fsa.attention(query, key, value, block_mask=blocks, return_skip_map=True)
    lengths = {"seqlen_q": 512, "seqlen_k": 512, "head_dim": 32}
    assert fsa.kept_fraction(skip_map, **lengths) == 0.25
    assert fsa.kept_fraction(skip_map, **lengths, block_mask=blocks) == 1.0


def test_numpy():
    problem = build(case_named("blocks"), "float32", seed=62)
    arrays = {n: t.numpy() for n, t in problem.tensors.items()}
    out = fsa.attention(**arrays, **problem.options)
    assert torch.equal(torch.from_numpy(out), fsa.attention(**problem.arguments()))


def test_compiled_calls_take_our_masks_and_refuse_those_of_torch():
    query, key, value = qkv(256, 256)
    theirs = create_block_mask(causal, None, None, 256, 256, device="cpu")
    ours = fsa.BlockMask.from_torch(theirs)

    def attend(mask):
        return fsa.attention(query, key, value, block_mask=mask) * 2

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ours), attend(ours))
    blocks = torch.rand(1, 4, 2, 2, generator=torch.Generator().manual_seed(8)) < 0.5
    assert torch.equal(compiled(blocks), attend(blocks))
    with pytest.raises(Exception, match="from_torch"):
        compiled(theirs)
    torch._dynamo.reset()


def test_moving_and_printing():
    mask = fsa.BlockMask.from_mask(torch.ones(1, 2, 200, 300, dtype=torch.bool).tril())
    again = mask.to("cpu")
    for a, b in zip(mask.tensors, again.tensors, strict=True):
        assert torch.equal(a, b)
    assert "BLOCK_SIZE=(128, 128)" in repr(mask) and "(200, 300)" in repr(mask)


@pytest.mark.parametrize(
    "wrong,error,words",
    [
        ("causal", TypeError, ("block_mask", "BlockMask", "str")),
        (torch.ones(1, 1, 2, 3), TypeError, ("block_mask", "float32", "bool")),
        (torch.ones(2, 3, dtype=torch.bool), ValueError, ("block_mask", "[2, 3]", "row_blocks")),
        (torch.ones(1, 1, 3, 3, dtype=torch.bool), ValueError, ("kv_num_blocks", "[1, 1, 3]", "[1, 1, 2]")),
        (torch.ones(3, 1, 2, 3, dtype=torch.bool), ValueError, ("kv_num_blocks", "[3, 1, 2]", "[2, 1, 2]")),
        (torch.ones(1, 1, 2, 4, dtype=torch.bool), ValueError, ("kv_indices", "3", "from 0 to 2")),
        (fsa.BlockMask.from_mask(torch.ones(1, 1, 199, 300, dtype=torch.bool)), ValueError,
         ("block_mask", "199 rows", "200")),
        (fsa.BlockMask.from_dense(torch.ones(1, 1, 2, 5, dtype=torch.bool), (128, 64)), ValueError,
         ("block_keys: 64", "128", "head_dim 32")),
    ],
)  # fmt: skip
def test_refused(wrong, error, words):
    query, key, value = qkv(200, 300)
    with pytest.raises(error) as caught:
        fsa.attention(query, key, value, block_mask=wrong)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    fsa.attention(query, key, value, block_mask=torch.ones(1, 1, 2, 3, dtype=torch.bool))


@pytest.mark.parametrize("size", [0, 63, 100, (128, -128), 128.0, (64, "64")])
def test_refused_block_sizes(size):
    with pytest.raises(ValueError, match="BLOCK_SIZE"):
        fsa.BlockMask.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool), size)


def test_refused_lists():
    counts, indices = torch.zeros(1, 1, 2).int(), torch.zeros(1, 1, 2, 3).int()
    with pytest.raises(TypeError, match="kv_indices"):
        fsa.BlockMask.from_kv_blocks(counts, None)
    with pytest.raises(ValueError, match="row_blocks"):
        fsa.BlockMask.from_kv_blocks(counts, indices[:, :, :1])
    with pytest.raises(TypeError, match="mask"):
        fsa.BlockMask.from_mask(torch.ones(2, 2))
    query, key, value = qkv(200, 300)
    wide = fsa.BlockMask(None, None, counts.long(), indices, None, None, (128, 128))
    with pytest.raises(TypeError, match="block_mask.full_kv_num_blocks: dtype int64, must be int32"):
        fsa.attention(query, key, value, block_mask=wide)


def test_not_joined_with_packed_sequences():
    problem = build(case_named("packed"), "float32", seed=63)
    blocks = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="block_mask: not supported together with cu_seqlens_q"):
        fsa.attention(**problem.arguments(), block_mask=blocks)
    paged = build(case_named("paged_16"), "float32", seed=63)
    with pytest.raises(NotImplementedError, match="block_mask: not supported together with page_table"):
        fsa.attention(**paged.arguments(), block_mask=blocks)


def test_threshold_zero_beside_a_mask_is_dense_bit_for_bit():
    problem = build(case_named("blocks_threshold"), "float32", seed=64)
    with_options = {**problem.options, "threshold": 0.0}, {**problem.options, "threshold": None}
    off, dense = (checks.call(Problem(problem.case, problem.tensors, options)) for options in with_options)
    checks.assert_same_bits("out", off.out, dense.out)
    assert torch.equal(off.skip_map, dense.skip_map)
