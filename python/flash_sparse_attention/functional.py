# SPDX-License-Identifier: Apache-2.0
"""The public functions: attention, merging, skip maps, windows and questions about the library."""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C, autograd, ops
from .block_mask import BlockMask, as_block_mask

if TYPE_CHECKING:
    import numpy
    from torch.nn.attention import flex_attention

    Array = Tensor | numpy.ndarray
    Blocks = BlockMask | flex_attention.BlockMask | Tensor

Window = tuple[int | None, int | None]
OPEN_WINDOW: Window = (-1, -1)
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = False,
    window_size: Window = OPEN_WINDOW,
    window_sizes: Array | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sink: Array | None = None,
    threshold: float | None = None,
    alpha: Array | None = None,
    delta: Array | None = None,
    gate_threshold: float | None = None,
    log_sigmoid_gate: bool = True,
    adaptive_gate: bool = True,
    gate_layout: str = "bsh",
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    page_table: Array | None = None,
    return_lse: bool = False,
    return_skip_map: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
    out: Array | None = None,
    block_mask: Blocks | None = None,
) -> Array | tuple[Array, ...]:
    """Attention, dense or sparse, with gradients.

    For row i and key j of one sequence, with ``off = seqlen_k - seqlen_q``::

        S[i, j] = softcap(softmax_scale * (q_i . k_j + g(alpha_i * delta_j))) - slope * |i + off - j|
        out_i   = sum_j exp(S[i, j] - lse_i) v_j,   lse_i = log(sum_j exp(S[i, j]) + exp(sink))

    over the keys that the masks leave visible, in the tiles that were not skipped. docs/semantics.md has
    every rule.

    Args:
        query: ``[batch, seqlen_q, num_heads, head_dim]``, or packed ``[total_q, num_heads, head_dim]`` with
            ``cu_seqlens_q``. float64, float32, bfloat16 or float16; last stride 1; head_dim 1 to 512.
        key: ``[batch, seqlen_k, num_kv_heads, head_dim]``, packed ``[total_k, num_kv_heads, head_dim]``, or
            paged ``[num_pages, page_size, num_kv_heads, head_dim]`` with ``page_table``. num_heads is a
            multiple of num_kv_heads; query head h reads key head ``h // (num_heads // num_kv_heads)``.
        value: as key, with head_dim_v in place of head_dim.
        causal: key j is visible to row i when ``j <= i + off`` (aligned bottom-right).
        window_size: (left, right): keys in ``[i + off - left, i + off + right]`` are visible; -1 or None is
            open.
        window_sizes: int32 ``[num_kv_heads, 4]``, columns sink, left, right, near; implies causal. Not
            together with window_size.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        softcap: c > 0 replaces a logit x by ``c * tanh(x / c)``; 0 is off.
        alibi_slopes: ``[num_heads]`` or ``[batch, num_heads]``; no gradient.
        sink: ``[num_heads]``, a learnable extra term of the denominator.
        threshold: a tile in which no row can hold a probability of ``threshold / visible keys`` is skipped.
            None or <= 0: none is, bit for bit the dense result.
        alpha: query side of the pair gate, ``[batch, seqlen_q, num_heads]``, packed ``[total_q, num_heads]``.
        delta: key side, ``[batch, seqlen_k, num_kv_heads]``, packed ``[total_k, num_kv_heads]``, paged
            ``[num_pages, page_size, num_kv_heads]``.
        gate_threshold: with a gate, a tile whose best gate is below this share of the best one so far is
            skipped. None: ``1 / seqlen_k`` of each sequence; <= 0: off.
        log_sigmoid_gate: ``g(x) = log(sigmoid(x))``; False: ``g(x) = x``.
        adaptive_gate: with a causal mask gate_threshold shrinks with the visible share of the row.
        gate_layout: "bsh" as above; "bhs": alpha ``[batch, num_heads, seqlen_q]``, packed ``[num_heads,
            total_q]``, and delta likewise.
        cu_seqlens_q, cu_seqlens_k: int32 ``[batch + 1]``, the first rows of packed sequences.
        max_seqlen_q, max_seqlen_k: bounds of the packed sequences' lengths; an error when smaller than the
            actual maximum, which is the default.
        seqused_q, seqused_k: int32 ``[batch]``, rows and keys in use; further rows get out 0 and lse -inf.
        page_table: int32 ``[batch, max_pages]``, the pages of each sequence; needs seqused_k. No backward.
        return_lse: also return lse, float32 (float64 for float64) ``[batch, num_heads, seqlen_q]``, packed
            ``[num_heads, total_q]``: natural logarithm, differentiable, -inf for a row without a key.
        return_skip_map: also return which tiles were kept: int32 ``[batch, num_heads, ceil(seqlen_q / 64),
            words]``, packed ``[num_heads, total_q // 64 + batch, words]``, bit ``n & 31`` of word ``n >> 5``
            for key tile n, ``words = ceil(key tiles / 32)``. Packed without max_seqlen_k and under
            torch.compile, words is that of total_k. See :func:`kept_fraction`.
        deterministic: bitwise repeatable gradients; on the CPU they always are.
        backend: None chooses; else a name of :func:`backends`.
        out: written in place and returned; only where no gradient is recorded.
        block_mask: which blocks of keys each block of rows sees: a :class:`BlockMask`, a
            ``torch.nn.attention.flex_attention.BlockMask`` (converted once and remembered), or bool
            ``[batch or 1, num_heads or 1, ceil(seqlen_q / 128), ceil(seqlen_k / 128)]``. Joins the other masks
            by "and". Batched tensors only.

    Returns:
        out, as query with head_dim_v; then lse and the skip map where asked for. NumPy arrays for NumPy
        arrays, which take no part in autograd.

    Raises:
        ValueError, TypeError, NotImplementedError: with the argument, its value and the limit, before any
            tensor is read or written.
    """
    inputs, options = collect(
        query,
        key,
        value,
        causal,
        window_size,
        window_sizes,
        softmax_scale,
        softcap,
        alibi_slopes,
        sink,
        threshold,
        alpha,
        delta,
        gate_threshold,
        log_sigmoid_gate,
        adaptive_gate,
        gate_layout,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q,
        seqused_k,
        page_table,
        deterministic,
        backend,
        block_mask,
    )
    attend = autograd.attend if isinstance(query, Tensor) else _attend_numpy
    result, lse, skip_map = attend(inputs, options, return_lse, return_skip_map, out)
    if return_lse:
        return (result, lse, skip_map) if return_skip_map else (result, lse)
    return (result, skip_map) if return_skip_map else result


def merge_attention_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of attention over disjoint sets of keys, joined; differentiable.

    Args:
        outs: ``[parts, batch, seqlen, num_heads, head_dim_v]``, or packed ``[parts, total, num_heads,
            head_dim_v]``.
        lses: ``[parts, batch, num_heads, seqlen]``, or packed ``[parts, num_heads, total]``. A sink may be
            part of one lse at most.

    Returns:
        out and lse, each as one part; a row without a key in any part has out 0 and lse -inf.
    """
    for name, tensor in (("outs", outs), ("lses", lses)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    return autograd.merge(outs, lses)


def kept_fraction(
    skip_map: Array,
    *,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    causal: bool = False,
    window_size: Window = OPEN_WINDOW,
    window_sizes: Array | None = None,
    num_kv_heads: int | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    block_mask: Blocks | None = None,
) -> float:
    """Kept tiles / visible tiles of a skip map that :func:`attention` returned.

    Args:
        skip_map: as returned.
        seqlen_q, seqlen_k: rows of query and key: the sequence lengths; packed, total_q and total_k; paged,
            seqlen_k is max_pages * page_size.
        head_dim: of query.
        num_kv_heads: needed with window_sizes of several key heads; default num_heads.
        causal, window_size, window_sizes, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, seqused_q, seqused_k,
            block_mask: of that call.

    Returns:
        1.0 where no tile is visible.
    """
    packed = cu_seqlens_q is not None
    rank = 3 if packed else 4
    if len(skip_map.shape) != rank:
        layout = (
            "[num_heads, total_q // 64 + batch, words]" if packed else "[batch, num_heads, row tiles, words]"
        )
        raise ValueError(f"skip_map: shape {list(skip_map.shape)}, must be {layout}")
    num_heads = skip_map.shape[rank - 3]
    if num_kv_heads is None:
        num_kv_heads = num_heads if window_sizes is None else window_sizes.shape[0]
    outer = () if packed else (skip_map.shape[0],)
    skip_map, window_sizes, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = (
        tensor.cpu() if isinstance(tensor, Tensor) else tensor  # counting reads them
        for tensor in (skip_map, window_sizes, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    )
    if block_mask is not None:
        block_mask = as_block_mask(block_mask, seqlen_q, seqlen_k).to("cpu")
    element = torch.empty(head_dim)
    inputs, options = collect(  # counting reads the shapes of query and key, not their elements
        element.expand(*outer, seqlen_q, num_heads, head_dim),
        element.expand(*outer, seqlen_k, num_kv_heads, head_dim),
        element.expand(*outer, seqlen_k, num_kv_heads, head_dim),
        causal=causal,
        window_size=window_size,
        window_sizes=window_sizes,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        block_mask=block_mask,
    )
    kept, visible = _C.count_tiles(inputs, options, skip_map)
    return kept / visible if visible else 1.0


def explain(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_lse: bool = False,
    return_skip_map: bool = False,
    out: Array | None = None,
    backward: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """What :func:`attention` would run for the same arguments, without running it; with ``backward`` what would
    compute the gradients, of a contiguous ``out`` and its gradient.

    Returns:
        ``backend`` and ``kernel``: what computes it. ``reasons``: ``(name, chosen, reason)`` of every backend
        in the order of asking, with why it was passed over. ``tile``: ``(rows, keys)`` of the skip tile.
        ``flops``: over visible (row, key) pairs. ``bytes``: each input read once, each output written once.
        ``workspace``: bytes. ``threads``.

    Raises:
        ValueError, TypeError, NotImplementedError: as attention.
    """
    if backward:
        inputs, options = collect(query, key, value, **arguments)
        return _C.explain_backward(inputs, options, None, None, None, None)
    return _C.explain_forward(*_question(query, key, value, return_lse, return_skip_map, out, arguments))


def prefill(
    query: Array,
    key: Array,
    value: Array,
    *,
    return_lse: bool = False,
    return_skip_map: bool = False,
    out: Array | None = None,
    **arguments: Any,
) -> None:
    """Gets the GPU kernels of :func:`attention` ready for the same arguments, without running them.

    The call itself then waits for no compiler and may be the first inside the capture of a CUDA graph.

    Raises:
        ValueError, TypeError, NotImplementedError: as attention.
    """
    _C.prefill_forward(*_question(query, key, value, return_lse, return_skip_map, out, arguments))


def _question(
    query: Array,
    key: Array,
    value: Array,
    return_lse: bool,
    return_skip_map: bool,
    out: Array | None,
    arguments: dict[str, Any],
) -> tuple[ops.Inputs, ops.Options, Array | None, Tensor | None, Tensor | None]:
    """What a question about a call of attention needs: inputs, options, and the outputs that are wanted."""
    inputs, options = collect(query, key, value, **arguments)
    lse = skip_map = None
    if return_lse or return_skip_map:
        _C.workspace_size_forward(inputs, options)  # checks the shapes before they are used
        device = query.device if isinstance(query, Tensor) else "cpu"
        wide = str(query.dtype).endswith("float64")
        if return_lse:
            dtype = torch.float64 if wide else torch.float32
            lse = torch.empty(ops.lse_shape(inputs), dtype=dtype, device=device)
        if return_skip_map:
            skip_map = torch.empty(_C.skip_map_shape(inputs, options), dtype=torch.int32, device=device)
    return inputs, options, out, lse, skip_map


def skip_tile(head_dim: int) -> tuple[int, int]:
    """(rows, keys) of the unit of every skip decision: (64, 128), and (64, 64) for head_dim above 128."""
    return _C.skip_tile(head_dim)


def backends() -> list[tuple[str, bool, str]]:
    """(name, available, what it is or why it is not available), in the order in which they are asked."""
    return _C.backends()


def num_threads() -> int:
    """Threads that calls on the CPU use: FSA_NUM_THREADS, else the processors that the process may run on."""
    return _C.num_threads()


def set_num_threads(threads: int) -> None:
    """Sets :func:`num_threads` for the process, 1 to 1024. Results do not depend on it, bit for bit."""
    _C.set_num_threads(threads)


def window_sizes_heuristic(
    seqlen_k: int | Tensor,
    num_kv_heads: int,
    device: torch.device | str | None = None,
    equal_bandwidth: bool = True,
    window_near: int = 1024,
    window_sink: int = 64,
    num_heads_kv_global: int | None = None,
    tp_rank: int | None = None,
    tp_size: int | None = None,
) -> Tensor:
    """Windows that divide the past among the key heads: together they cover it all, each reads a part.

    Every head sees the ``window_near`` newest keys and the ``window_sink`` first ones. What lies between is
    cut into one band per head, of equal width, or of equal area under the causal mask.

    Args:
        seqlen_k: the length to divide; a 0-d integer tensor is taken too, and not read.
        num_kv_heads: key heads of this process.
        device: of the result; default: that of seqlen_k, or the CPU.
        equal_bandwidth: True: bands of equal width, which balances decode; False: of equal area, which
            balances forward and backward.
        num_heads_kv_global, tp_rank, tp_size: under tensor parallelism the key heads of the model, and this
            process's rank of how many. Above one rank per key head, ranks share a head.

    Returns:
        int32 ``[num_kv_heads, 4]``: the window_sizes argument of :func:`attention`.
    """
    heads = num_kv_heads if num_heads_kv_global is None else num_heads_kv_global
    for name, count in (("num_kv_heads", num_kv_heads), ("num_heads_kv_global", heads)):
        if count < 1:
            raise ValueError(f"{name}: {count}, must be at least 1")
    for name, size in (("window_near", window_near), ("window_sink", window_sink)):
        if size < 0:
            raise ValueError(f"{name}: {size}, must not be negative")
    first = _first_head(num_kv_heads, heads, tp_rank, tp_size)
    if isinstance(seqlen_k, Tensor):
        device = seqlen_k.device if device is None else device
        length = seqlen_k.to(device=device, dtype=torch.int64)
    else:
        if seqlen_k < 0:
            raise ValueError(f"seqlen_k: {seqlen_k}, must not be negative")
        length = torch.full((), seqlen_k, dtype=torch.int64, device=device)
    near = length.clamp(max=window_near)
    sink = (length - near).clamp(max=window_sink)
    span = length - near - sink
    breaks = torch.arange(first, first + num_kv_heads + 1, device=device)
    if equal_bandwidth:
        breaks = span * breaks // heads
    else:
        breaks = (span * (1 - (1 - breaks.double() / heads).sqrt())).long()
    right, left = breaks[:-1], breaks.diff()
    return torch.stack([sink.expand_as(left), left, right, near.expand_as(left)], dim=1).int()


def _first_head(num_kv_heads: int, heads: int, tp_rank: int | None, tp_size: int | None) -> int:
    """The model's index of this process's first key head."""
    rank = 0 if tp_rank is None else tp_rank
    if tp_size is not None and not 0 <= rank < tp_size:
        raise ValueError(f"tp_rank: {rank}, must be from 0 to tp_size - 1 = {tp_size - 1}")
    shared = tp_size is not None and tp_size > heads
    first = (rank // (tp_size // heads) if shared else rank) * num_kv_heads
    if first < 0 or first + num_kv_heads > heads:
        raise ValueError(
            f"tp_rank: {rank} with num_kv_heads {num_kv_heads} gives heads {first} to "
            f"{first + num_kv_heads - 1}, but num_heads_kv_global is {heads}"
        )
    return first


def collect(
    query: Array,
    key: Array,
    value: Array,
    causal: bool = False,
    window_size: Window = OPEN_WINDOW,
    window_sizes: Array | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sink: Array | None = None,
    threshold: float | None = None,
    alpha: Array | None = None,
    delta: Array | None = None,
    gate_threshold: float | None = None,
    log_sigmoid_gate: bool = True,
    adaptive_gate: bool = True,
    gate_layout: str = "bsh",
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    page_table: Array | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    block_mask: Blocks | None = None,
) -> tuple[ops.Inputs, ops.Options]:
    """The arguments of attention, whose parameters these are, as the two tuples of ops.py."""
    left, right = OPEN_WINDOW if window_size is OPEN_WINDOW else _window_sides(window_size)
    inputs = (
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        page_table,
        window_sizes,
        alibi_slopes,
        sink,
        alpha,
        delta,
        None,
    )
    options = (
        causal,
        left,
        right,
        softmax_scale if softmax_scale is None else _number("softmax_scale", softmax_scale),
        _number("softcap", softcap),
        threshold if threshold is None else _number("threshold", threshold),
        gate_threshold if gate_threshold is None else _number("gate_threshold", gate_threshold),
        log_sigmoid_gate,
        adaptive_gate,
        gate_layout,
        max_seqlen_q if max_seqlen_q is None else length("max_seqlen_q", max_seqlen_q),
        max_seqlen_k if max_seqlen_k is None else length("max_seqlen_k", max_seqlen_k),
        deterministic,
        "" if backend is None else backend,
    )
    if block_mask is None:
        return inputs, options
    mask = as_block_mask(block_mask, *_lengths(query, key))
    return (*inputs, *mask.tensors), (*options, *mask.BLOCK_SIZE)


def _lengths(query: Any, key: Any) -> tuple[int, int]:
    """seqlen_q and seqlen_k of batched tensors; what is wrong with others is said later, with their names."""
    return tuple(tensor.shape[1] if len(tensor.shape) == 4 else -1 for tensor in (query, key))


def _window_sides(window_size: Window) -> tuple[int, int]:
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"window_size: {window_size!r}, must be a pair (left, right)") from None
    left, right = -1 if left is None else left, -1 if right is None else right
    for size in (left, right):
        if isinstance(size, int) and size < -1:
            raise ValueError(f"window_size: {tuple(window_size)}, must be -1 or None (open), 0 or above")
    return left, right


def _number(name: str, value: Any) -> float:
    if isinstance(value, _NUMBERS):
        return value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None


def length(name: str, value: Any) -> int:
    """An int from whatever counts as one: a tensor of one element, too, but no float."""
    if isinstance(value, (int, torch.SymInt)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None


def _attend_numpy(
    inputs: ops.Inputs, options: ops.Options, want_lse: bool, want_map: bool, out: numpy.ndarray | None
) -> tuple[numpy.ndarray, numpy.ndarray | None, numpy.ndarray | None]:
    """autograd.attend for NumPy arrays: forward alone."""
    autograd.require_flags(return_lse=want_lse, return_skip_map=want_map)
    np = sys.modules.get("numpy")  # whoever passes an array has imported it
    if np is None or not isinstance(inputs[0], np.ndarray):
        raise TypeError(f"query: expected a torch.Tensor or a numpy.ndarray, got {type(inputs[0]).__name__}")
    own = len(ops.INPUTS)
    blocks = (t.numpy(force=True) if isinstance(t, Tensor) else t for t in inputs[own:])
    inputs = (*inputs[:own], *blocks)
    for name, array in (*zip(ops.INPUTS, inputs, strict=False), ("out", out)):
        if array is not None and not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: expected a numpy.ndarray, as query is one, got {type(array).__name__}")
    workspace_size = _C.workspace_size_forward(inputs, options)  # checks the arguments, shapes too
    query, value = inputs[0], inputs[2]
    if out is None:
        out = np.empty((*query.shape[:-1], value.shape[-1]), query.dtype)
    lse = None
    if want_lse:
        lse = np.empty(ops.lse_shape(inputs), np.float64 if query.dtype == np.float64 else np.float32)
    skip_map = np.empty(_C.skip_map_shape(inputs, options), np.int32) if want_map else None
    workspace = torch.empty(workspace_size, dtype=torch.uint8) if workspace_size else None  # torch aligns it
    _C.forward(inputs, options, out, lse, skip_map, workspace)
    return out, lse, skip_map
