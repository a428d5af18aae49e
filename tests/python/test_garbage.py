# SPDX-License-Identifier: Apache-2.0
"""Random garbage as arguments: a call succeeds or raises one of the documented exceptions; nothing else happens."""

from __future__ import annotations

import math

import flash_sparse_attention as fsa
import numpy as np
import test_bad_input as bad
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DOCUMENTED = (ValueError, TypeError, NotImplementedError)
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint8,
)
EXTENTS = st.sampled_from((0, 1, 2, 3, 4, 5, 16, 24, 32, 70, 90))
QUIET = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@st.composite
def tensors(draw):
    shape = draw(st.lists(EXTENTS, max_size=6))
    while math.prod(shape) > 200_000:
        shape.pop()
    dtype = draw(st.sampled_from(DTYPES))
    tensor = torch.ones(shape, dtype=torch.float32)
    if tensor.numel() and draw(st.booleans()):
        values = draw(st.lists(st.integers(-3, 100), min_size=1, max_size=8))
        tensor = torch.tensor(values, dtype=torch.float32).repeat(tensor.numel() // len(values) + 1)[
            : tensor.numel()
        ]
        tensor = tensor.view(shape)
    tensor = tensor.to(dtype)
    layout = draw(st.integers(0, 4))
    if layout == 1 and tensor.dim() >= 2:
        tensor = tensor.transpose(-1, -2)
    elif layout == 2 and tensor.dim():
        tensor = tensor[..., ::2]
    elif layout == 3:
        tensor = tensor[None].expand(2, *tensor.shape) if tensor.dim() < 6 else tensor
    elif layout == 4 and tensor.dim():
        tensor = torch.cat([tensor, tensor])[: tensor.shape[0]]
    return tensor


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-5, 300),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=5),
    st.sampled_from(("bsh", "bhs", "cpu", "reference", "cuda", "")),
)
ARRAYS = tensors().filter(lambda t: t.dtype not in (torch.bfloat16,)).map(lambda t: t.numpy())
GARBAGE = st.one_of(
    tensors(), tensors(), SCALARS, ARRAYS, st.lists(SCALARS, max_size=3), st.tuples(SCALARS, SCALARS)
)

ATTENTION = (
    "query",
    "key",
    "value",
    "causal",
    "window_size",
    "window_sizes",
    "softmax_scale",
    "softcap",
    "alibi_slopes",
    "sink",
    "threshold",
    "alpha",
    "delta",
    "gate_threshold",
    "log_sigmoid_gate",
    "adaptive_gate",
    "gate_layout",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "seqused_q",
    "seqused_k",
    "page_table",
    "return_lse",
    "return_skip_map",
    "deterministic",
    "backend",
    "out",
)
DECODE = ("query", "key", "value", "softmax_scale", "window_sizes", "is_local", "num_splits", "page_table",
          "gather_kv_indices", "seqused_k", "out", "lse", "return_lse", "window_size")  # fmt: skip


def attempt(function, arguments):
    try:
        results = function(**arguments)
    except DOCUMENTED as error:
        assert str(error), "an error without a message"
        return
    results = results if isinstance(results, tuple) else (results,)
    assert all(isinstance(r, (torch.Tensor, np.ndarray)) for r in results)


@QUIET
@given(
    base=st.sampled_from((bad.batched, bad.gated, bad.packed, bad.paged)),
    changes=st.dictionaries(st.sampled_from(ATTENTION), GARBAGE, min_size=1, max_size=3),
)
def test_attention(base, changes):
    attempt(fsa.attention, {**base(), **changes})


@QUIET
@given(
    base=st.sampled_from((bad.decode, bad.gathered)),
    changes=st.dictionaries(st.sampled_from(DECODE), GARBAGE, min_size=1, max_size=3),
)
def test_decode(base, changes):
    attempt(fsa.flash_dense_attn_with_kvcache_func, {**base(), **changes})


@QUIET
@given(changes=st.dictionaries(st.sampled_from(("outs", "lses")), GARBAGE, min_size=1, max_size=2))
def test_merge(changes):
    attempt(fsa.merge_attention_states, {**bad.merge(), **changes})


INDEX = st.lists(st.integers(-3, 100), min_size=2, max_size=4)


@QUIET
@given(
    cu_q=INDEX, cu_k=INDEX, used_q=INDEX, used_k=INDEX, max_q=st.integers(-1, 100), max_k=st.integers(-1, 100)
)
def test_index_tensors_of_packed_sequences(cu_q, cu_k, used_q, used_k, max_q, max_k):
    """The right shapes and dtypes, any contents: never a read outside of the tensors."""
    changes = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "seqused_q": used_q, "seqused_k": used_k}
    changes = {n: torch.tensor(v, dtype=torch.int32) for n, v in changes.items()}
    attempt(fsa.attention, {**bad.packed(), **changes, "max_seqlen_q": max_q, "max_seqlen_k": max_k})


@QUIET
@given(
    table=st.lists(st.lists(st.integers(-2, 6), min_size=2, max_size=2), min_size=2, max_size=2),
    used=st.lists(st.integers(-1, 40), min_size=2, max_size=2),
)
def test_page_tables(table, used):
    changes = {"page_table": table, "seqused_k": used}
    attempt(
        fsa.attention, {**bad.paged(), **{n: torch.tensor(v, dtype=torch.int32) for n, v in changes.items()}}
    )
