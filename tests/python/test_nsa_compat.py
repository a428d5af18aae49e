# SPDX-License-Identifier: Apache-2.0
"""The names of other packages: their signatures, and what their functions mean by the oracle."""

from __future__ import annotations

import inspect
import math

import checks
import nsa_oracle as oracle
import pytest
import torch
from flash_sparse_attention import nsa
from flash_sparse_attention.compat import fla, fsa, xunhao
from test_nsa_module import SIZES, cumulative, hidden
from torch import Tensor

LENGTHS = [130, 0, 33]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- signatures --------------------------------------------------------------------------------------------

XUNHAO = {
    "linear_compress": "x w cu_seqlens kernel_size kernel_stride pe",
    "conv_compress": "x w cu_seqlens kernel_size kernel_stride pe",
    "avgpool_compress": "x w cu_seqlens kernel_size kernel_stride pe",
    "weightedpool_compress": "x w cu_seqlens kernel_size kernel_stride pe",
    "compressed_attention": "q k v kernel_size kernel_stride block_size topk cu_seqlens_q cu_seqlens_k max_seqlen_q "
    "max_seqlen_k sm_scale init_blocks local_blocks parallel_topk_compute",
    "topk_sparse_attention": "q k v topk_idx block_size cu_seqlens softmax_scale",
    "NativeSparseAttention": "compress_type hidden_size num_q_heads num_kv_heads head_dim kernel_size kernel_stride "
    "block_size topk init_blocks local_blocks window_size rope_config rope_device",
    "NSACache": "max_batch_size max_length num_kv_heads head_dim kernel_size kernel_stride window_size dtype device",
    "RopeConfig": "max_position_embeddings head_dim rope_theta rope_scaling hidden_size num_attention_heads",
    "RotaryEmbedding": "config device",
    "nsa_infer": "cu_seqlens step query key value gate_value rope cache compress_weight compress_func intra_block_pe "
    "kernel_size kernel_stride block_size topk init_blocks local_blocks window_size",
}
FSA = {
    **{
        n: XUNHAO[n]
        for n in ("linear_compress", "compressed_attention", "topk_sparse_attention", "RopeConfig")
    },
    "FSA_topk_sparse_attention": "q k v topk_idx block_size cu_seqlens softmax_scale",
    "FlashSparseAttention": "hidden_size num_q_heads num_kv_heads head_dim kernel_size kernel_stride block_size topk "
    "init_blocks local_blocks window_size rope_config",
}
FLA = {
    "parallel_nsa": "q k v g_cmp g_slc g_swa block_indices block_counts block_size window_size scale cu_seqlens",
    "parallel_nsa_compression": "q k v TK block_size scale cu_seqlens",
    "parallel_nsa_topk": "q k lse TK block_counts block_size scale cu_seqlens",
    "mean_pooling": "x chunk_size cu_seqlens",
}


@pytest.mark.parametrize(
    "module,table", [(xunhao, XUNHAO), (fsa, FSA), (fla, FLA)], ids=["xunhao", "fsa", "fla"]
)
def test_signatures(module, table: dict[str, str]):
    for name, expected in table.items():
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        positional = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert positional == expected.split(), name
        assert name in module.__all__


# ---- xunhao and fsa ----------------------------------------------------------------------------------------


def test_compress_functions():
    x, pe, cu = normal(1, 163, 2, 8), normal(2, 2, 8, 8), cumulative(*LENGTHS)
    linear, pool = normal(3, 2, 64, 8), normal(4, 2, 8)
    # Weight of a convolution: out channels of all heads, in channels of one, positions.
    conv = torch.stack(
        [linear[h, k * 8 + i, o] for h in range(2) for o in range(8) for i in range(8) for k in range(8)]
    )
    conv = conv.view(16, 8, 8)
    for function, kind, weight, ours in (
        (xunhao.linear_compress, "linear", linear, linear),
        (xunhao.conv_compress, "linear", linear, conv),
        (xunhao.weightedpool_compress, "weighted", pool, pool),
        (xunhao.avgpool_compress, "mean", None, None),
    ):
        y, cu_compressed = function(x, ours, cu, 8, 4, pe)
        expected = torch.cat([oracle.compress(part, kind, weight, pe, 8, 4) for part in x.split(LENGTHS)])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert cu_compressed.tolist() == [0, 31, 31, 38] and cu_compressed.dtype == torch.int32
    with pytest.raises(ValueError, match="w"):
        xunhao.avgpool_compress(x, pool, cu, 8, 4)
    with pytest.raises(ValueError, match=r"w: shape \[16, 8, 7\]"):
        xunhao.conv_compress(x, conv[..., :7], cu, 8, 4)


def compressed_case() -> tuple[tuple, list]:
    """Arguments, and out, lse, scores by all heads and by the first of each group, of every sequence."""
    q, k, v = normal(11, 163, 4, 8), normal(12, 38, 2, 8), normal(13, 38, 2, 8)
    cu, cu_compressed = cumulative(*LENGTHS), cumulative(31, 0, 7)
    parts = []
    for qs, ks, vs in zip(
        q.double().split(LENGTHS), k.double().split((31, 0, 7)), v.double().split((31, 0, 7)), strict=True
    ):
        tokens = qs.shape[0]
        out, lse, p = oracle.attend(qs, ks, vs, oracle.compressed_mask(tokens, tokens, 8, 4), None)
        scores = [oracle.block_scores(some, tokens, 2, 8, 4, 16) for some in (p, p[::2])]
        parts.append((out, lse, *scores))
    return (q, k, v, 8, 4, 16, 4, cu, cu_compressed, 130, 31), parts


def assert_blocks(ours: Tensor, scores: list[Tensor]) -> None:
    for mine, score in zip(ours.split(LENGTHS, 1), scores, strict=True):
        truth = oracle.select(score, mine.shape[1], 16, mine.shape[2], 1, 2)
        oracle.assert_same_selection(mine, score, truth, 1e-5)


@pytest.mark.parametrize("module", [xunhao, fsa], ids=["xunhao", "fsa"])
def test_compressed_attention(module):
    arguments, parts = compressed_case()
    out, topk_idx, lse = module.compressed_attention(*arguments, return_lse=True)
    torch.testing.assert_close(out.double(), torch.cat([p[0] for p in parts]), rtol=1e-5, atol=1e-6)
    assert_blocks(topk_idx, [p[2] for p in parts])
    natural = torch.cat([p[1] for p in parts], 1)  # the originals' kernels keep powers of two
    checks.assert_lse(lse * math.log(2), natural, torch.float32)
    _, first = module.compressed_attention(*arguments, score_heads="first")
    assert_blocks(first, [p[3] for p in parts])
    assert not torch.equal(first, topk_idx)
    with pytest.raises(ValueError, match="score_heads: 'last'"):
        module.compressed_attention(*arguments, score_heads="last")


def test_width_of_topk_idx_and_topk_0():
    arguments, parts = compressed_case()
    wide = (*arguments[:6], 12, *arguments[7:])
    _, topk_idx = xunhao.compressed_attention(*wide)
    assert topk_idx.shape == (2, 163, 9)  # 9 blocks of 16 in the longest sequence
    assert torch.equal(topk_idx, xunhao.compressed_attention(*wide[:9])[1])
    with pytest.warns(UserWarning, match="topk"):
        out, none = xunhao.compressed_attention(*arguments[:6], 0, *arguments[7:])
    assert none is None
    torch.testing.assert_close(out.double(), torch.cat([p[0] for p in parts]), rtol=1e-5, atol=1e-6)


def test_topk_sparse_attention():
    arguments, _ = compressed_case()
    q, cu = arguments[0], arguments[7]
    k, v = normal(14, 163, 2, 8), normal(15, 163, 2, 8)
    _, topk_idx = xunhao.compressed_attention(*arguments)
    before = topk_idx.clone()
    parts = []
    for qs, ks, vs, blocks in zip(
        *(t.double().split(LENGTHS) for t in (q, k, v)), topk_idx.split(LENGTHS, 1), strict=True
    ):
        parts.append(oracle.attend(qs, ks, vs, oracle.selected_mask(blocks, qs.shape[0], 16), 0.3))
    for function in (xunhao.topk_sparse_attention, fsa.FSA_topk_sparse_attention):
        out, lse = function(q, k, v, topk_idx, 16, cu, 0.3, return_lse=True)
        torch.testing.assert_close(out.double(), torch.cat([p[0] for p in parts]), rtol=1e-5, atol=1e-6)
        checks.assert_lse(lse * math.log(2), torch.cat([p[1] for p in parts], 1), torch.float32)
        assert torch.equal(function(q, k, v, topk_idx, 16, cu, 0.3), out)
    assert torch.equal(topk_idx, before)


def test_rotary_embedding_is_llama3_by_default():
    config = xunhao.RopeConfig(head_dim=8)
    assert config.to_nsa().rope_type == "llama3" and config.rope_theta == 500000
    x = normal(21, 163, 2, 8)
    turned = xunhao.RotaryEmbedding(config)(x, cumulative(*LENGTHS), start=3, stride=5)
    expected = [
        oracle.rope(part, [3 + 5 * i for i in range(part.shape[0])], config.to_nsa().frequencies())
        for part in x.split(LENGTHS)
    ]
    torch.testing.assert_close(turned, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_module_of_fsa():
    """The same layer as ours, with its window of window_size + 1 keys and one gate per token."""
    layer = fsa.FlashSparseAttention(**SIZES, rope_config=fsa.RopeConfig(head_dim=8))
    ours = nsa.NativeSparseAttention(**SIZES, rope_config=fsa.RopeConfig(head_dim=8).to_nsa())
    ours.load_state_dict(layer.state_dict())
    x, cu = hidden(31, 163, dtype=torch.float32), cumulative(*LENGTHS)
    assert torch.equal(layer(x, cu), ours(x, cu))
    assert layer.gate[0].weight.shape == (3, 24)


def test_windows_hold_one_key_more_than_their_size():
    """A key at distance window_size is seen by the sliding branch, the next one is not."""
    layer = fsa.FlashSparseAttention(**{**SIZES, "window_size": 5}, rope_config=fsa.RopeConfig(head_dim=8))
    with torch.no_grad():
        layer.gate[0].weight.zero_()
    layer.gate = torch.nn.Sequential(layer.gate, OnlySliding())
    x = hidden(32, 30, dtype=torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x, cumulative(30))[20].sum(), x)
    assert (grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [15, 16, 17, 18, 19, 20]


class OnlySliding(torch.nn.Module):
    def forward(self, gates: Tensor) -> Tensor:
        return gates * 0 + torch.tensor([0.0, 0.0, 1.0])


@pytest.mark.parametrize("kind", ["linear", "avgpool", "weightedpool"])
@torch.no_grad()
def test_module_and_inference_of_xunhao(kind: str):
    torch.manual_seed(33)
    layer = xunhao.NativeSparseAttention(
        kind, *SIZES.values(), xunhao.RopeConfig(head_dim=8), rope_device="cpu"
    )
    assert layer.gate[0].weight.shape == (12, 24)
    x = [hidden(34 + i, n + 3, dtype=torch.float32) for i, n in enumerate(LENGTHS)]
    cu = cumulative(*LENGTHS)
    cache = xunhao.NSACache(3, 140, 2, 8, 8, 4, 12, torch.float32, "cpu")
    other = xunhao.NSACache(3, 140, 2, 8, 8, 4, 12, torch.float32, "cpu")
    prefill = torch.cat([part[:n] for part, n in zip(x, LENGTHS, strict=True)])
    functions = {
        "linear": xunhao.linear_compress,
        "avgpool": xunhao.avgpool_compress,
        "weightedpool": xunhao.weightedpool_compress,
    }
    expected = [layer(part, cumulative(part.shape[0])) for part in x]
    for step in range(4):
        tokens = (
            prefill
            if step == 0
            else torch.stack([part[n + step - 1] for part, n in zip(x, LENGTHS, strict=True)])
        )
        out = layer.inference(tokens, cu, step, cache)
        q, k, v, gates = layer._project(tokens)
        direct = xunhao.nsa_infer(
            cu,
            step,
            q,
            k,
            v,
            gates,
            xunhao.RotaryEmbedding(xunhao.RopeConfig(head_dim=8)),
            other,
            [layer.compress_key, layer.compress_value],
            [functions[kind]] * 2,
            layer.intra_block_pe,
            *(SIZES[n] for n in ("kernel_size", "kernel_stride", "block_size", "topk")),
            *(SIZES[n] for n in ("init_blocks", "local_blocks", "window_size")),
        )
        torch.testing.assert_close(layer.proj_o(direct.flatten(-2)), out, rtol=1e-5, atol=1e-6)
        rows = (
            [slice(0, n) for n in LENGTHS] if step == 0 else [slice(n + step - 1, n + step) for n in LENGTHS]
        )
        truth = torch.cat([part[some] for part, some in zip(expected, rows, strict=True)])
        torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-6)


# ---- fla ---------------------------------------------------------------------------------------------------


def fla_case(packed: bool) -> tuple[list[Tensor], Tensor | None, list[list[Tensor]]]:
    """q, k, v and gates ``[B, T, ...]``, cu_seqlens, and the sequences."""
    lengths = [150, 0, 97] if packed else None
    rows = (1, 247) if packed else (2, 120)
    tensors = [normal(41, *rows, 4, 8), normal(42, *rows, 2, 8), normal(43, *rows, 2, 6)]
    tensors += [normal(44 + i, *rows, 4).sigmoid() for i in range(3)]
    flat = [t.squeeze(0) for t in tensors] if packed else tensors
    sequences = [list(s) for s in zip(*(oracle.split(t.double(), lengths) for t in flat), strict=True)]
    return tensors, cumulative(*lengths).long() if packed else None, sequences


def fla_truth(q, k, v, g_cmp, g_slc, g_swa, window: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = q.shape[0]
    kc, vc = (oracle.compress(t, "mean", None, None, 16, 16) for t in (k, v))
    out, lse, p = oracle.attend(q, kc, vc, oracle.compressed_mask(tokens, tokens, 16, 16), 0.4)
    blocks = oracle.select(oracle.block_scores(p, tokens, 2, 16, 16, 16), tokens, 16, 4, 1, 2)
    selected, _, _ = oracle.attend(q, k, v, oracle.selected_mask(blocks, tokens, 16), 0.4)
    sliding, _, _ = oracle.attend(q, k, v, oracle.sliding_mask(tokens, tokens, window - 1), 0.4)
    total = out * g_cmp[..., None] + selected * g_slc[..., None] + sliding * g_swa[..., None]
    return total, lse, blocks


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_parallel_nsa(packed: bool):
    (q, k, v, *gates), cu, sequences = fla_case(packed)
    sizes = {"block_size": 16, "scale": 0.4, "cu_seqlens": cu}
    out = fla.parallel_nsa(q, k, v, *gates, block_counts=4, window_size=9, **sizes)
    truth = [fla_truth(*s, window=9) for s in sequences]

    def joined(i: int, dim: int = 0) -> Tensor:
        parts = [t[i] for t in truth]
        return torch.cat(parts, dim).unsqueeze(0) if packed else torch.stack(parts)

    torch.testing.assert_close(out.double(), joined(0), rtol=1e-5, atol=1e-6)
    pooled = [fla.mean_pooling(t, 16, cu) for t in (k, v)]
    compressed, lse = fla.parallel_nsa_compression(q, *pooled, k.shape[1], **sizes)
    assert compressed.shape == (*q.shape[:3], 6)
    checks.assert_lse(lse.transpose(1, 2), joined(1, 1), torch.float32)
    indices = fla.parallel_nsa_topk(q, pooled[0], None, k.shape[1], 4, **sizes)
    assert indices.dtype == torch.int64 and indices.shape == (*q.shape[:2], 2, 4)
    assert torch.equal(indices.transpose(1, 2).int(), joined(2, 1))
    # The same with the indices given: in any order, and with a count per row.
    given = fla.parallel_nsa(q, k, v, *gates, indices.flip(-1), block_counts=4, window_size=9, **sizes)
    torch.testing.assert_close(given, out, rtol=1e-5, atol=1e-6)
    noisy = torch.cat([indices, torch.zeros_like(indices)], -1)
    noisy[..., 4:] = indices[..., :1] * 0 + 1
    counts = torch.full(indices.shape[:3], 4)
    counted = fla.parallel_nsa(q, k, v, *gates, noisy, block_counts=counts, window_size=9, **sizes)
    torch.testing.assert_close(counted, out, rtol=1e-5, atol=1e-6)


def test_branches_that_are_off():
    (q, k, v, g_cmp, g_slc, _), _, sequences = fla_case(False)
    indices = fla.parallel_nsa_topk(q, fla.mean_pooling(k, 16), None, 120, 4, 16)
    selected = fla.parallel_nsa(q, k, v, block_indices=indices, block_size=16)
    blocks = indices.transpose(1, 2).int().contiguous()
    torch.testing.assert_close(selected, nsa.selected_attention(q, k, v, blocks, block_size=16))
    gated = fla.parallel_nsa(q, k, v, g_slc=g_slc, block_indices=indices, block_size=16)
    torch.testing.assert_close(gated, selected * g_slc[..., None])
    both = fla.parallel_nsa(q, k, v, g_cmp, g_slc, block_counts=4, block_size=16)
    compressed, _ = fla.parallel_nsa_compression(q, *(fla.mean_pooling(t, 16) for t in (k, v)), 120, 16)
    torch.testing.assert_close(both, compressed * g_cmp[..., None] + gated)


def test_pooled_rows_of_incomplete_chunks_are_ignored():
    """fla's own mean_pooling has them."""
    q, k = normal(51, 1, 90, 2, 8), normal(52, 1, 90, 2, 8)
    cu = torch.tensor([0, 37, 90])
    pooled = fla.mean_pooling(k, 16, cu)  # 2 and 3 complete chunks
    odd = torch.full((1, 1, 2, 8), 1e3)
    theirs = torch.cat([pooled[:, :2], odd, pooled[:, 2:], odd], 1)
    ours = fla.parallel_nsa_compression(q, pooled, pooled, 90, 16, None, cu)
    for a, b in zip(ours, fla.parallel_nsa_compression(q, theirs, theirs, 90, 16, None, cu), strict=True):
        assert torch.equal(a, b)
    batched = fla.mean_pooling(k, 16)
    more = torch.cat([batched, odd], 1)
    a, b = (fla.parallel_nsa_compression(q, p, p, 90, 16)[0] for p in (batched, more))
    assert torch.equal(a, b)


def test_gradients_flow_through_pooling_and_gates():
    tensors = [t.requires_grad_() for t in fla_case(True)[0]]
    out = fla.parallel_nsa(
        *tensors, block_counts=4, block_size=16, window_size=4, cu_seqlens=torch.tensor([0, 150, 247])
    )
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert grad.isfinite().all() and grad.abs().sum() > 0


def test_what_fla_has_and_this_has_not():
    (q, k, v, g_cmp, g_slc, g_swa), cu, _ = fla_case(True)
    refused = [
        (NotImplementedError, "cu_seqlens", {"cu_seqlens": (cu, cu)}),
        (NotImplementedError, "block_counts", {"block_counts": torch.full((1, 247, 2), 4)}),
        (ValueError, "block_counts: 2", {"block_counts": 2}),
        (ValueError, "g_swa", {"window_size": 4, "g_swa": None}),
        (ValueError, "block_indices", {"g_cmp": None}),
    ]
    base = {
        "g_cmp": g_cmp,
        "g_slc": g_slc,
        "g_swa": g_swa,
        "block_counts": 4,
        "block_size": 16,
        "cu_seqlens": cu,
    }
    fla.parallel_nsa(q, k, v, **base)
    for error, message, change in refused:
        with pytest.raises(error, match=message):
            fla.parallel_nsa(q, k, v, **{**base, **change})
