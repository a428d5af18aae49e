# SPDX-License-Identifier: Apache-2.0
"""torch.compile with whole graphs, and the operators' contracts."""

from __future__ import annotations

import checks
import flash_sparse_attention as fsa
import oracle
import pytest
import torch
import torch._dynamo.testing
from cases import build, case_named
from flash_sparse_attention import ops

NAMES = ("causal_more_keys", "sink_softcap_alibi_window", "gate_and_threshold", "packed_seqused", "threshold_packed",
         "window_sizes_bands", "blocks_per_head")  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward_and_backward(problem, function):
    names = [n for n in oracle.GRADIENTS if n in problem.tensors]
    leaves = {n: problem.tensors[n].clone().requires_grad_() for n in names}
    out, lse = function({**problem.tensors, **leaves}, problem.options)
    grads = torch.autograd.grad((out.float().square().sum() + lse.clamp(min=-9).sum()), list(leaves.values()))
    return out.detach(), lse.detach(), *grads


def attend(tensors, options):
    out, lse = fsa.attention(**tensors, **options, return_lse=True)
    return out * 2, lse + 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(name, dynamic):
    problem = build(case_named(name), "float32", seed=131)
    problem.tensors = {
        n: t.nan_to_num(0.0) if t.is_floating_point() else t for n, t in problem.tensors.items()
    }
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, ours = forward_and_backward(problem, attend), forward_and_backward(problem, compiled)
    for part, (a, b) in enumerate(zip(expected, ours, strict=True)):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6, msg=lambda m, part=part: f"result {part}: {m}")


def test_fullgraph_with_the_default_compiler():
    problem = build(case_named("gate_and_threshold").replace(seqlen_q=200, seqlen_k=300), "float32", seed=132)
    compiled = torch.compile(attend, fullgraph=True)
    expected, ours = forward_and_backward(problem, attend), forward_and_backward(problem, compiled)
    for a, b in zip(expected, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_dynamic_shapes_recompile_at_most_once():
    """Static first, dynamic from the second shape on: two graphs serve every length and batch."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for batch, seqlen_q, seqlen_k in ((2, 70, 90), (3, 80, 130), (4, 33, 400), (5, 200, 201), (7, 129, 65)):
        case = case_named("plain").replace(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=True)
        problem = build(case.replace(threshold=1.0), "float32", seed=133)
        for a, b in zip(
            forward_and_backward(problem, attend), forward_and_backward(problem, compiled), strict=True
        ):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs"


def test_twelve_and_decode_compile():
    problem = build(case_named("decode_gate_threshold_paged"), "float32", seed=134)
    name, arguments = problem.decode_call()
    function = getattr(fsa, name)
    compiled = torch.compile(
        lambda kwargs: function(**kwargs, return_lse=True), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(function(**arguments, return_lse=True), compiled(arguments), strict=True):
        checks.assert_same_bits("decode", a, b)


def test_merge_compiles():
    g = torch.Generator().manual_seed(135)
    outs, lses = torch.randn(3, 2, 5, 2, 8, generator=g), torch.randn(3, 2, 2, 5, generator=g)
    compiled = torch.compile(fsa.merge_attention_states, fullgraph=True, backend="aot_eager")
    for a, b in zip(fsa.merge_attention_states(outs, lses), compiled(outs, lses), strict=True):
        torch.testing.assert_close(a, b)


def operator_arguments(problem, gather: bool = False):
    from test_buffers import arguments_of

    inputs, options = arguments_of(problem)
    options = list(options)
    at = [n for _, n in ops.OPTIONS].index("max_seqlen_k")
    if "cu_seqlens_k" in problem.tensors:
        options[at] = problem.case.seqlen_k
    return ops.operator_arguments(inputs, tuple(options))


@pytest.mark.parametrize(
    "name", ["plain", "gate_and_threshold", "packed_seqused", "paged_16", "sink", "blocks"]
)
def test_opcheck_forward(name):
    problem = build(case_named(name), "float32", seed=136)
    problem.tensors = {
        n: t.nan_to_num(0.0) if t.is_floating_point() else t for n, t in problem.tensors.items()
    }
    for want_map in (False, True):
        torch.library.opcheck(torch.ops.fsa.forward.default, (*operator_arguments(problem), want_map))


@pytest.mark.parametrize("name", ["plain", "gate_and_threshold", "packed_seqused", "sink", "blocks"])
def test_opcheck_backward(name):
    problem = build(case_named(name), "float32", seed=137)
    problem.tensors = {
        n: t.nan_to_num(0.0) if t.is_floating_point() else t for n, t in problem.tensors.items()
    }
    arguments = operator_arguments(problem)
    out, lse, skip_map = torch.ops.fsa.forward(*arguments, True)
    rest = (out, lse, skip_map, torch.ones_like(out), torch.ones_like(lse))
    wants = ("alpha" in problem.tensors, "sink" in problem.tensors)
    torch.library.opcheck(torch.ops.fsa.backward.default, (*arguments, *rest, *wants))


def test_opcheck_decode_and_merge():
    problem = build(case_named("decode_gate"), "float32", seed=138)
    torch.library.opcheck(torch.ops.fsa.decode.default, (*operator_arguments(problem), None, None, False))
    g = torch.Generator().manual_seed(139)
    outs, lses = torch.randn(3, 2, 5, 2, 8, generator=g), torch.randn(3, 2, 2, 5, generator=g)
    torch.library.opcheck(torch.ops.fsa.merge.default, (outs, lses))


def test_meta_tensors_give_shapes():
    """Fake kernels answer for tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = (
            torch.empty(2, 70, 4, 64, dtype=torch.bfloat16),
            torch.empty(2, 90, 2, 64, dtype=torch.bfloat16),
        )
        v = torch.empty(2, 90, 2, 48, dtype=torch.bfloat16)
        out, lse, skip_map = fsa.attention(q, k, v, threshold=1.0, return_lse=True, return_skip_map=True)
    assert out.shape == (2, 70, 4, 48) and out.dtype == torch.bfloat16
    assert lse.shape == (2, 4, 70) and lse.dtype == torch.float32
    assert skip_map.shape == (2, 4, 2, 1) and skip_map.dtype == torch.int32
