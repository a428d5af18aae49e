# SPDX-License-Identifier: Apache-2.0
"""Names, order and defaults of the public functions, word for word. A change here breaks callers."""

from __future__ import annotations

import ast
import inspect
import re

import flash_sparse_attention as fsa
import pytest

# flash-sparse-attn 2.0.6.
TWELVE = """
flash_dense_attn_func(query, key, value, is_causal=False, softmax_scale=None, query_scale=None,
    key_scale=None, value_scale=None, window_sizes=None, is_local=False, is_quant=False,
    is_split_kv=False, is_split_qo=False, pack_gqa=False, num_splits=None, page_table=None,
    seqused_k=None, out=None, lse=None, is_autotune=True, tile_mn=None, skip_checks=False,
    return_lse=False)
flash_dense_attn_with_kvcache_func(query, key, value, softmax_scale=None, query_scale=None,
    key_scale=None, value_scale=None, window_sizes=None, is_local=False, is_quant=False, num_splits=None,
    page_table=None, gather_kv_indices=None, seqused_k=None, out=None, lse=None, is_autotune=True,
    tile_mn=None, skip_checks=False, return_lse=False)
flash_dense_attn_varlen_func(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    is_causal=False, softmax_scale=None, query_scale=None, key_scale=None, value_scale=None,
    window_sizes=None, is_local=False, is_quant=False, is_split_kv=False, is_split_qo=False,
    pack_gqa=False, num_splits=None, seqused_q=None, seqused_k=None, out=None, lse=None, is_autotune=True,
    tile_mn=None, skip_checks=False, return_lse=False)
flash_dense_attn_varlen_with_kvcache_func(query, key, value, cu_seqlens_k, max_seqlen_k,
    softmax_scale=None, query_scale=None, key_scale=None, value_scale=None, window_sizes=None,
    is_local=False, is_quant=False, seqused_k=None, gather_kv_indices=None, num_splits=None, out=None,
    lse=None, is_autotune=True, tile_mn=None, skip_checks=False, return_lse=False)
flash_sparse_attn_func(query, key, value, is_causal=False, softmax_scale=None, query_scale=None,
    key_scale=None, value_scale=None, window_sizes=None, softmax_threshold=None, is_local=False,
    is_quant=False, is_split_kv=False, is_split_qo=False, pack_gqa=False, num_splits=None,
    page_table=None, seqused_k=None, out=None, lse=None, is_autotune=True, tile_mn=None,
    skip_checks=False, return_lse=False)
flash_sparse_attn_with_kvcache_func(query, key, value, softmax_scale=None, query_scale=None,
    key_scale=None, value_scale=None, window_sizes=None, softmax_threshold=None, is_local=False,
    is_quant=False, num_splits=None, page_table=None, gather_kv_indices=None, seqused_k=None, out=None,
    lse=None, is_autotune=True, tile_mn=None, skip_checks=False, return_lse=False)
flash_sparse_attn_varlen_func(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    is_causal=False, softmax_scale=None, query_scale=None, key_scale=None, value_scale=None,
    window_sizes=None, softmax_threshold=None, is_local=False, is_quant=False, is_split_kv=False,
    is_split_qo=False, pack_gqa=False, num_splits=None, seqused_q=None, seqused_k=None, out=None,
    lse=None, is_autotune=True, tile_mn=None, skip_checks=False, return_lse=False)
flash_sparse_attn_varlen_with_kvcache_func(query, key, value, cu_seqlens_k, max_seqlen_k,
    softmax_scale=None, query_scale=None, key_scale=None, value_scale=None, window_sizes=None,
    softmax_threshold=None, is_local=False, is_quant=False, seqused_k=None, gather_kv_indices=None,
    num_splits=None, out=None, lse=None, is_autotune=True, tile_mn=None, skip_checks=False,
    return_lse=False)
flash_gated_attn_func(query, key, value, alpha, delta, is_causal=False, softmax_scale=None,
    query_scale=None, key_scale=None, value_scale=None, window_sizes=None, softmax_threshold=None,
    gate_threshold=None, is_logsigmoid_gate=True, is_adapt_gate=True, is_local=False, is_quant=False,
    is_split_kv=False, is_split_qo=False, pack_gqa=False, num_splits=None, page_table=None,
    seqused_k=None, out=None, lse=None, is_autotune=True, tile_mn=None, skip_checks=False,
    return_lse=False)
flash_gated_attn_with_kvcache_func(query, key, value, alpha, delta, softmax_scale=None, query_scale=None,
    key_scale=None, value_scale=None, window_sizes=None, softmax_threshold=None, gate_threshold=None,
    is_logsigmoid_gate=True, is_local=False, is_quant=False, num_splits=None, page_table=None,
    gather_kv_indices=None, seqused_k=None, out=None, lse=None, is_autotune=True, tile_mn=None,
    skip_checks=False, return_lse=False)
flash_gated_attn_varlen_func(query, key, value, alpha, delta, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, is_causal=False, softmax_scale=None, query_scale=None, key_scale=None, value_scale=None,
    window_sizes=None, softmax_threshold=None, gate_threshold=None, is_logsigmoid_gate=True,
    is_adapt_gate=True, is_local=False, is_quant=False, is_split_kv=False, is_split_qo=False,
    pack_gqa=False, num_splits=None, seqused_q=None, seqused_k=None, out=None, lse=None, is_autotune=True,
    tile_mn=None, skip_checks=False, return_lse=False)
flash_gated_attn_varlen_with_kvcache_func(query, key, value, alpha, delta, cu_seqlens_k, max_seqlen_k,
    softmax_scale=None, query_scale=None, key_scale=None, value_scale=None, window_sizes=None,
    softmax_threshold=None, gate_threshold=None, is_logsigmoid_gate=True, is_local=False, is_quant=False,
    seqused_k=None, gather_kv_indices=None, num_splits=None, out=None, lse=None, is_autotune=True,
    tile_mn=None, skip_checks=False, return_lse=False)
"""

ATTENTION = """
attention(query, key, value, *, causal=False, window_size=(-1, -1), window_sizes=None, softmax_scale=None, softcap=0.0,
    alibi_slopes=None, sink=None, threshold=None, alpha=None, delta=None, gate_threshold=None, log_sigmoid_gate=True,
    adaptive_gate=True, gate_layout="bsh", cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    seqused_q=None, seqused_k=None, page_table=None, return_lse=False, return_skip_map=False, deterministic=False,
    backend=None, out=None, block_mask=None)
merge_attention_states(outs, lses)
skip_tile(head_dim)
backends()
"""

# FlashAttention-2; the keyword names of FlashAttention-3 and -4 follow, keyword or not.
DROP_INS = """
flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False)
flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None)
"""


def signatures(text: str) -> dict[str, list[tuple[str, str, object]]]:
    """(kind, name, default) of every parameter, by function."""
    result = {}
    for definition in re.findall(r"^\w+\(.*?\)$", text, re.M | re.S):
        function = ast.parse(f"def {definition}: pass").body[0]
        arguments = function.args
        defaults = [ast.literal_eval(d) for d in arguments.defaults]
        required = len(arguments.args) - len(defaults)
        parameters = [("positional", a.arg, inspect.Parameter.empty) for a in arguments.args[:required]]
        parameters += [
            ("positional", a.arg, d) for a, d in zip(arguments.args[required:], defaults, strict=True)
        ]
        parameters += [
            ("keyword", a.arg, ast.literal_eval(d))
            for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        ]
        result[function.name] = parameters
    return result


def actual(function) -> list[tuple[str, str, object]]:
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional", inspect.Parameter.KEYWORD_ONLY: "keyword"}
    parameters = inspect.signature(function).parameters.values()
    return [(kinds.get(p.kind, "further"), p.name, p.default) for p in parameters]


def parametrized(text: str):
    return pytest.mark.parametrize(
        "name,expected", signatures(text).items(), ids=lambda x: x if type(x) is str else ""
    )


def test_all_twelve_are_here():
    kinds, suffixes = ("dense", "sparse", "gated"), ("", "with_kvcache_", "varlen_", "varlen_with_kvcache_")
    assert set(signatures(TWELVE)) == {f"flash_{k}_attn_{s}func" for k in kinds for s in suffixes}


@parametrized(TWELVE)
def test_the_twelve(name, expected):
    """The listed parameters first, in order; window_size and gate_layout as further keywords."""
    function = getattr(fsa, name)
    parameters = actual(function)
    assert parameters[: len(expected)] == expected
    further = {n for _, n, _ in parameters[len(expected) :]}
    assert further == {"window_size", "gate_layout"}
    assert function.__doc__


@parametrized(ATTENTION)
def test_attention(name, expected):
    assert actual(getattr(fsa, name)) == expected


@parametrized(DROP_INS)
def test_drop_ins(name, expected):
    """FlashAttention's names, order and defaults; what it requires may have a default here."""
    ours = actual(getattr(fsa, name))[: len(expected)]
    assert [parameter[:2] for parameter in ours] == [parameter[:2] for parameter in expected]
    for (_, _, default), (_, _, wanted) in zip(ours, expected, strict=True):
        assert wanted is inspect.Parameter.empty or default == wanted


def test_everything_public_is_listed_and_documented():
    names = set(signatures(TWELVE)) | set(signatures(ATTENTION)) | set(signatures(DROP_INS))
    names |= {"kept_fraction", "explain", "window_sizes_heuristic", "BlockMask", "prefill"}
    assert names <= set(fsa.__all__)
    for name in fsa.__all__:
        assert inspect.getdoc(getattr(fsa, name)), name


def test_kept_fraction_and_heuristic():
    kept = actual(fsa.kept_fraction)
    assert kept[0] == ("positional", "skip_map", inspect.Parameter.empty)
    assert {("keyword", n, inspect.Parameter.empty) for n in ("seqlen_q", "seqlen_k", "head_dim")} <= set(
        kept
    )
    assert ("keyword", "causal", False) in kept
    heuristic = {name: default for _, name, default in actual(fsa.window_sizes_heuristic)}
    expected = {"equal_bandwidth": True, "window_near": 1024, "window_sink": 64}
    assert expected.items() <= heuristic.items()


@pytest.mark.parametrize("function", [fsa.explain, fsa.prefill])
def test_questions_take_what_attention_takes(function):
    assert [n for _, n, _ in actual(function)][:3] == ["query", "key", "value"]
