# SPDX-License-Identifier: Apache-2.0
"""What the case table cannot ask: streams, threads, graphs, repetition, size, refusals."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import checks
import flash_sparse_attention as fsa
import torch
from torch import Tensor

TESTS: list[Callable[[], str | None]] = []


def test(function: Callable[[], str | None]) -> Callable[[], str | None]:
    TESTS.append(function)
    return function


def run_all() -> list[dict[str, Any]]:
    results = []
    for function in TESTS:
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            detail = function() or ""
            outcome = "passed"
        except Exception as error:  # reported; the next one still runs
            outcome, detail = "failed", f"{type(error).__name__}: {error}"[:600]
        seconds = f"{time.monotonic() - start:.1f} s"
        results.append({"name": function.__name__, "result": outcome, "detail": detail})
        print(f"{function.__name__}: {outcome} {detail} ({seconds})", flush=True)
    return results


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def qkv(
    batch: int, rows: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16
):
    return (
        normal(batch, rows, heads, dim, dtype=dtype),
        normal(batch, keys, kv_heads, dim, dtype=dtype),
        normal(batch, keys, kv_heads, dim, dtype=dtype),
    )


def truth(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """float64 out [batch, rows, heads, dim] and lse of chosen rows."""
    group = query.shape[2] // key.shape[2]
    offset = key.shape[1] - query.shape[1]
    positions = torch.arange(query.shape[1], device="cuda")[rows] + offset
    q = query[:, rows].double().transpose(1, 2)
    k = key.double().transpose(1, 2).repeat_interleave(group, 1)
    v = value.double().transpose(1, 2).repeat_interleave(group, 1)
    logits = q @ k.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if causal:
        hidden = torch.arange(key.shape[1], device="cuda") > positions[:, None]
        logits = logits.masked_fill(hidden, -math.inf)
    lse = logits.logsumexp(-1)
    return ((logits - lse[..., None]).exp().nan_to_num(0) @ v).transpose(1, 2), lse


def assert_close(out: Tensor, expected: Tensor, limit: float = 0.02) -> str:
    error = float((out.double() - expected).abs().max())
    assert error <= limit, f"error {error:.3g}, limit {limit}"
    return f"error {error:.1e}"


def assert_raises(kind: type[Exception], words: str, function: Callable[[], Any]) -> None:
    try:
        function()
    except kind as error:
        assert words in str(error), f"the message lacks {words!r}: {error}"
        return
    raise AssertionError(f"no {kind.__name__} with {words!r}")


def assert_same(a: Tensor, b: Tensor) -> None:
    checks.assert_same_bits("out", a, b)


@test
def repeats_bit_for_bit() -> str:
    """50 times, with other work between, for each kind of kernel."""
    count = 0
    for options in ({}, {"causal": True}, {"causal": True, "threshold": 1.0}, {"window_size": (100, 5)}):
        for dim, dtype in ((64, torch.float16), (128, torch.bfloat16), (256, torch.bfloat16)):
            inputs = qkv(2, 1000, 1111, 4, 2, dim, dtype)
            first = fsa.attention(*inputs, return_lse=True, **options)
            for _ in range(50):
                again = fsa.attention(*inputs, return_lse=True, **options)
                for a, b in zip(first, again, strict=True):
                    assert_same(a, b)
                count += 1
    return f"{count} repeats"


@test
def follows_the_current_stream() -> None:
    query, key, value = qkv(2, 700, 700, 4, 4, 128)
    expected = fsa.attention(query, key, value, causal=True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [tensor * 1 for tensor in (query, key, value)]  # not there yet when the call returns
        out = fsa.attention(*late, causal=True)
    stream.synchronize()
    assert_same(out, expected)


@test
def two_threads_two_streams() -> str:
    inputs = [qkv(1, 900 + 64 * i, 1000, 8, 4, 128) for i in range(2)]
    options = ({"causal": True}, {"threshold": 1.0})
    expected = [fsa.attention(*inputs[i], **options[i]) for i in range(2)]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                out = fsa.attention(*inputs[i], **options[i])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(out, expected[i]):
                    failures.append(f"thread {i}")
                    return

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return "400 calls"


@test
def many_threads_one_first_use() -> None:
    """A kernel nobody has used yet, asked for by eight threads at once."""
    query, key, value = qkv(1, 100, 100, 2, 2, 64, torch.float16)
    outs: list[Tensor] = []

    def work() -> None:
        outs.append(fsa.attention(query, key, value, window_size=(7, 3), sink=torch.zeros(2, device="cuda")))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 8
    for out in outs:
        assert_same(out, outs[0])


@test
def graph_replays_with_new_data() -> None:
    query, key, value = qkv(2, 777, 777, 4, 2, 128)
    for options in ({"causal": True}, {"threshold": 1.0, "causal": True}):
        fsa.attention(query, key, value, return_skip_map=True, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, skip_map = fsa.attention(query, key, value, return_skip_map=True, **options)
        for _ in range(3):
            for tensor in (query, key, value):
                tensor.normal_()
            graph.replay()
            expected, expected_map = fsa.attention(query, key, value, return_skip_map=True, **options)
            torch.cuda.synchronize()
            assert_same(out, expected)
            assert torch.equal(skip_map, expected_map)


@test
def first_use_in_a_capture_is_refused() -> None:
    query, key, value = qkv(1, 64, 64, 2, 2, 192, torch.float16)
    ones = torch.ones(2, device="cuda")

    def capture() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fsa.attention(query, key, value, alibi_slopes=ones, sink=ones, softcap=9.0, window_size=(9, 9))

    assert_raises(
        RuntimeError, "fsa-kernels prefill forward_sm90_fp16_d192_window_softcap_alibi_sink", capture
    )
    torch.cuda.synchronize()


@test
def varlen_of_random_documents() -> str:
    lengths = torch.randint(1, 900, (32,)).tolist()
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    query, key, value = (normal(int(cu[-1]), 4, 128) for _ in range(3))
    out = fsa.attention(
        query, key, value, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=900, max_seqlen_k=900
    )
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        part = [tensor[begin:end].unsqueeze(0) for tensor in (query, key, value)]
        assert_close(out[begin:end].unsqueeze(0), truth(*part, True)[0])
    return f"{int(cu[-1])} tokens"


@test
def beyond_two_to_the_31_elements() -> str:
    """Heads whose elements begin beyond 2^31, batched and packed."""
    heads, dim, rows = 32, 128, 540_000  # 2.2e9 elements in query and out
    query = torch.empty(1, rows, heads, dim, dtype=torch.bfloat16, device="cuda").normal_()
    key, value = normal(1, 2000, 1, dim), normal(1, 2000, 1, dim)
    out, lse = fsa.attention(query, key, value, return_lse=True)
    last = slice(rows - 200, rows)
    expected, expected_lse = truth(query[:, last], key, value, False)
    detail = assert_close(out[:, last], expected)
    assert float((lse[..., last].double() - expected_lse).abs().max()) < 1e-4
    cu = torch.tensor([0, rows - 100, rows], dtype=torch.int32, device="cuda")
    cu_k = torch.tensor([0, 100, 2000], dtype=torch.int32, device="cuda")
    packed = fsa.attention(
        query[0],
        key[0],
        value[0],
        cu_seqlens_q=cu,
        cu_seqlens_k=cu_k,
        max_seqlen_q=rows - 100,
        max_seqlen_k=1900,
    )
    expected, _ = truth(query[:, rows - 100 :], key[:, 100:], value[:, 100:], False)
    assert_close(packed[rows - 100 :].unsqueeze(0), expected)
    wide = query.view(1, 8, rows // 8 * heads, dim)[:, :, :3000].transpose(1, 2)  # key rows far apart
    out = fsa.attention(query[:, :256, :8], wide, wide)
    assert_close(out, truth(query[:, :256, :8], wide, wide, False)[0])
    return detail


@test
def long_causal_rows_are_exact() -> str:
    query, key, value = qkv(1, 40_000, 40_000, 2, 1, 128)
    out, lse = fsa.attention(query, key, value, causal=True, return_lse=True)
    worst = 0.0
    for begin in (0, 127, 19_990, 39_900):
        rows = slice(begin, begin + 100)
        expected, expected_lse = truth(query, key, value, True, rows)
        assert_close(out[:, rows], expected)
        worst = max(worst, float((lse[..., rows].double() - expected_lse).abs().max()))
    assert worst < 1e-4, f"lse {worst:.3g}"
    return f"lse {worst:.1e}"


@test
def compiles_with_torch() -> None:
    query, key, value = qkv(2, 300, 300, 4, 2, 64)
    compiled = torch.compile(lambda q, k, v: fsa.attention(q, k, v, causal=True) * 2, fullgraph=True)
    assert_same(compiled(query, key, value), fsa.attention(query, key, value, causal=True) * 2)


@test
def refusals_name_the_reason() -> None:
    query, key, value = qkv(1, 64, 64, 2, 2, 128)
    wide = [tensor.float() for tensor in (query, key, value)]
    assert_raises(NotImplementedError, "bfloat16 and float16, not float32", lambda: fsa.attention(*wide))
    assert_raises(TypeError, "move them to the CPU", lambda: fsa.attention(query, key, value, backend="cpu"))
    assert_raises(TypeError, "query is on cuda:0", lambda: fsa.attention(query, key.cpu(), value))
    large = [torch.cat([tensor] * 3, -1) for tensor in (query, key, value)]
    assert_raises(NotImplementedError, "head_dim up to 256, not 384", lambda: fsa.attention(*large))
    cache = normal(4, 16, 2, 128)
    table = torch.zeros(1, 4, dtype=torch.int32, device="cuda")
    used = torch.ones(1, dtype=torch.int32, device="cuda")
    assert_raises(
        NotImplementedError,
        "page_table",
        lambda: fsa.attention(query, cache, cache, page_table=table, seqused_k=used),
    )
    blocks = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda")
    gate = {"alpha": normal(1, 64, 2), "delta": normal(1, 64, 2)}
    for words, options in (
        ("no causal mask and no window beside a block mask", {"causal": True}),
        ("no causal mask and no window beside a block mask", {"window_size": (3, 3)}),
        ("no threshold beside a block mask", {"threshold": 1.0}),
        ("no pair gate beside a block mask", gate),
        ("writes no skip map beside a block mask", {"return_skip_map": True}),
    ):
        call = partial(fsa.attention, query, key, value, block_mask=blocks, **options)
        assert_raises(NotImplementedError, words, call)
    parts, lses = normal(2, 1, 8, 2, 16), torch.zeros(2, 1, 2, 8, device="cuda")
    assert_raises(NotImplementedError, "merge", lambda: fsa.merge_attention_states(parts, lses))


@test
def masks_of_torch() -> str:
    """A BlockMask of flex_attention on the GPU: documents, causal, with a table; repeated bit for bit."""
    from torch.nn.attention.flex_attention import create_block_mask

    worst = ""
    for rows, keys, dim in ((1000, 1000, 128), (700, 1500, 256), (2048, 1024, 64)):
        ids = torch.sort(torch.randint(0, 7, (2, max(rows, keys)), device="cuda"))[0]

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor, ids: Tensor = ids) -> Tensor:
            return (ids[b, q] == ids[b, k]) & (q >= k)

        mask = create_block_mask(visible, 2, None, rows, keys, device="cuda")
        query, key, value = qkv(2, rows, keys, 4, 2, dim)
        out, lse = fsa.attention(query, key, value, block_mask=mask, return_lse=True)
        position = torch.arange(max(rows, keys), device="cuda")
        seen = ids[:, :rows, None] == ids[:, None, :keys]
        seen = seen & (position[:rows, None] >= position[None, :keys])
        worst = max(worst, assert_close(out, masked_truth(query, key, value, seen[:, None])))
        assert torch.equal(lse == -math.inf, ~seen.any(-1)[:, None].expand_as(lse))
        for _ in range(20):
            assert_same(fsa.attention(query, key, value, block_mask=mask), out)
    return worst


def masked_truth(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """float64 out through the whole score matrix; rows without a key 0."""
    group = query.shape[2] // key.shape[2]
    q = query.double().transpose(1, 2)
    k, v = (x.double().transpose(1, 2).repeat_interleave(group, 1) for x in (key, value))
    logits = (q @ k.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(~seen, -math.inf)
    return (logits.softmax(-1).nan_to_num(0) @ v).transpose(1, 2)


@test
def block_masks_of_full_blocks_and_long_sequences() -> str:
    """Full lists alone, one for all heads or one for each, at 16k; some row blocks see nothing."""
    query, key, value = qkv(1, 16384, 16384, 4, 2, 128)
    details = []
    for heads in (1, 4):
        blocks = torch.rand(1, heads, 128, 128, device="cuda") < 0.1
        blocks[:, :, 5] = False
        out = fsa.attention(query, key, value, block_mask=blocks)
        for row_block in (0, 5, 64, 127):
            rows = slice(row_block * 128, row_block * 128 + 128)
            seen = blocks[:, :, row_block].repeat_interleave(128, -1)[:, :, None]
            details.append(assert_close(out[:, rows], masked_truth(query[:, rows], key, value, seen)))
    return max(details)


@test
def block_masks_in_a_graph() -> None:
    """Lists are read when the graph runs: other blocks, the same graph."""
    query, key, value = qkv(1, 1024, 1024, 4, 4, 128)
    draw = [fsa.BlockMask.from_dense(torch.rand(1, 4, 8, 8, device="cuda") < 0.4) for _ in range(3)]
    mask = draw[0].to("cuda")
    mask.full_kv_num_blocks, mask.full_kv_indices = (
        mask.full_kv_num_blocks.clone(),
        mask.full_kv_indices.clone(),
    )
    fsa.prefill(query, key, value, block_mask=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fsa.attention(query, key, value, block_mask=mask)
    for other in draw:
        mask.full_kv_num_blocks.copy_(other.full_kv_num_blocks)
        mask.full_kv_indices.copy_(other.full_kv_indices)
        graph.replay()
        assert_same(out, fsa.attention(query, key, value, block_mask=other))


@test
def prefilled_calls_may_be_captured_first() -> None:
    query, key, value = qkv(1, 100, 100, 2, 2, 96, torch.float16)
    options = {"causal": True, "softcap": 7.0, "alibi_slopes": torch.ones(2, device="cuda")}
    fsa.prefill(query, key, value, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fsa.attention(query, key, value, **options)
    graph.replay()
    assert_same(out, fsa.attention(query, key, value, **options))


@test
def copies_move_every_element() -> str:
    """One key, so that each row of out is that key's value to the bit: through the copies of tensors whose pitch the
    copy engine cannot take, in and out."""
    count = 0
    for dtype in (torch.bfloat16, torch.float16):
        for dim in (1, 7, 8, 33, 63, 64, 100, 129, 250):
            wide = normal(3, 1, 2, dim + 5, dtype=dtype)
            value = wide[..., 3 : 3 + dim]  # odd address and pitch
            query = normal(3, 70, 4, dim + 1, dtype=dtype)[..., 1:]
            out = fsa.attention(query, value, value)
            expected = value.repeat_interleave(2, 2).expand(3, 70, 4, dim)
            assert torch.equal(out, expected), f"{dtype}, head_dim {dim}"
            count += 1
    return f"{count} shapes"


@test
def tables_with_gaps() -> None:
    """cu_seqlens, seqused and window_sizes that are slices of something else."""

    def gapped(values: list) -> Tensor:
        tensor = torch.tensor(values, dtype=torch.int32, device="cuda")
        wide = torch.full([3 * n for n in tensor.shape], -7, dtype=torch.int32, device="cuda")
        inner = wide[(slice(1, None, 3),) * tensor.dim()]
        return inner.copy_(tensor)

    query, key, value = (normal(600, 4, 64) for _ in range(3))
    tables = {"cu_seqlens_q": [0, 200, 200, 600], "cu_seqlens_k": [0, 250, 300, 600]}
    tables |= {"seqused_q": [180, 0, 400], "seqused_k": [250, 20, 299]}
    windows = [[3, 10, 20, 50], [0, 0, 0, 9], [1, 100, 0, 1], [0, 40, 40, 40]]
    bounds = {"max_seqlen_q": 400, "max_seqlen_k": 300}
    dense = {name: torch.tensor(t, dtype=torch.int32, device="cuda") for name, t in tables.items()}
    strided = {name: gapped(t) for name, t in tables.items()}
    sizes = torch.tensor(windows, dtype=torch.int32, device="cuda")
    expected = fsa.attention(query, key, value, window_sizes=sizes, **dense, **bounds)
    assert_same(fsa.attention(query, key, value, window_sizes=gapped(windows), **strided, **bounds), expected)


@test
def kept_fraction_takes_a_map_on_the_gpu() -> None:
    query, key, value = qkv(1, 500, 500, 2, 2, 64)
    _, skip_map = fsa.attention(query, key, value, causal=True, return_skip_map=True)
    share = fsa.kept_fraction(skip_map, seqlen_q=500, seqlen_k=500, head_dim=64, causal=True)
    assert share == 1.0, f"a dense call kept {share}"


@test
def leaves_the_device_alone() -> None:
    """No synchronisation and no allocation of device memory other than torch's own."""
    query, key, value = qkv(1, 256, 256, 2, 2, 128)
    out = torch.empty_like(query)
    fsa.attention(query, key, value, out=out)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    torch.cuda._sleep(200_000_000)
    start = time.perf_counter()
    for _ in range(50):
        fsa.attention(query, key, value, out=out)
    assert not torch.cuda.current_stream().query(), "the calls waited for the stream"
    assert torch.cuda.mem_get_info()[0] == free, "device memory was allocated"
    assert time.perf_counter() - start < 10
    torch.cuda.synchronize()
