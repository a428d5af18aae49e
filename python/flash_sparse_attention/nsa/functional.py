# SPDX-License-Identifier: Apache-2.0
"""The functions of native sparse attention (NSA, arXiv 2502.11089). docs/native_sparse.md has every rule.

Sequences are packed (``[total, heads, dim]`` with ``cu_seqlens``) or batched (``[batch, seqlen, heads,
dim]``). Names: l = compress_block, s = compress_stride, B = block_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..functional import attention, length
from ..ops import is_plain
from . import autograd, layer, ops, profiler


def compress(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    kind: str = "linear",
    intra_block_pe: Tensor | None = None,
    compress_block: int = 32,
    compress_stride: int = 16,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    total_compressed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One token for every window of l tokens, windows s apart; differentiable.

    With windows i of tokens ``[i s, i s + l)`` and ``z = x + intra_block_pe`` inside a window (arXiv
    2502.11089, equation 7)::

        linear    y_i = sum_k z[i s + k] W[k]      a GEMM with the windows as overlapping rows
        weighted  y_i = sum_k z[i s + k] w[k]
        mean      y_i = sum_k z[i s + k] / l

    A sequence of n tokens has ``floor((n - l) / s) + 1`` windows, none where n < l; tokens behind the last
    window take no part. Sums are in float32 (float64 for float64).

    Args:
        x: ``[batch, seqlen, num_kv_heads, head_dim]`` or packed ``[total, num_kv_heads, head_dim]``, keys
            before their rotation, or values.
        weight: of kind linear ``[num_kv_heads, l * head_dim, head_dim]``, row ``k * head_dim + d_in``; of
            kind weighted ``[num_kv_heads, l]``; of kind mean None. dtype of x.
        kind: "linear", "weighted" or "mean".
        intra_block_pe: ``[num_kv_heads, l, head_dim]``, dtype of x.
        compress_block, compress_stride: l and s; s divides l.
        cu_seqlens: int32 ``[batch + 1]``, with packed x.
        max_seqlen: a bound of the lengths; an error when below the actual maximum.
        total_compressed: rows of the packed result, where they are known: without it they are read from
            cu_seqlens, which waits for a GPU, and is an error under torch.compile and graph capture. Rows
            beyond the actual number are 0.
        backend: None chooses; else a name of :func:`flash_sparse_attention.backends`.

    Returns:
        y ``[batch, windows, num_kv_heads, head_dim]`` or packed ``[total_compressed, num_kv_heads,
        head_dim]``, and its cu_seqlens, int32 ``[batch + 1]``; None when batched.

    Raises:
        ValueError, TypeError, NotImplementedError: with the argument, its value and the limit.
    """
    require(x=x)
    require_or_none(weight=weight, intra_block_pe=intra_block_pe, cu_seqlens=cu_seqlens)
    block, stride = check_windows(compress_block, compress_stride)
    cu_seqlens_compressed = None
    if cu_seqlens is None:
        _refuse_without_cu_seqlens(max_seqlen=max_seqlen, total_compressed=total_compressed)
        total = None
    else:
        check_cu_seqlens(cu_seqlens, max_seqlen)
        cu_seqlens_compressed = compressed_cu_seqlens(cu_seqlens, block, stride)
        total = _total_compressed(cu_seqlens_compressed, total_compressed)
    y = autograd.compress(
        (kind, block, stride, total, _backend(backend)),
        x,
        weight,
        intra_block_pe,
        cu_seqlens,
        cu_seqlens_compressed,
    )
    return y, cu_seqlens_compressed


def compressed_cu_seqlens(cu_seqlens: Tensor, compress_block: int, compress_stride: int) -> Tensor:
    """cu_seqlens of the compressed tokens, int32 ``[batch + 1]``, computed where cu_seqlens lies."""
    lengths = (cu_seqlens.diff() - (compress_block - compress_stride)).clamp(min=0) // compress_stride
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _total_compressed(cu_seqlens_compressed: Tensor, total: int | None) -> int:
    if total is not None:
        total = length("total_compressed", total)
        if isinstance(total, int) and total < 0:
            raise ValueError(f"total_compressed: {total}, must not be negative")
        return total
    if not is_plain((cu_seqlens_compressed,)) or (
        cu_seqlens_compressed.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        raise ValueError(
            "total_compressed: missing, but under torch.compile and graph capture the number of compressed tokens "
            "must be known on the host; pass total_compressed, sum(max(n - compress_block + compress_stride, 0) "
            "// compress_stride) over the lengths n of the sequences"
        )
    return max(0, int(cu_seqlens_compressed[-1]))  # a negative one is refused with the lengths' own error


def compressed_attention(
    query: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    *,
    compress_block: int,
    compress_stride: int,
    block_size: int,
    top_k: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_compressed: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over compressed tokens, and the blocks of tokens that it finds important.

    Token t sees the windows that end at it or before: entry i when ``t >= i s + l - 1``; where there is none,
    out is 0 and lse -inf. The score of block j of B tokens is the probability of each entry, summed over the
    query heads of a key head, times the number of its s-token strides inside the block (equations 8 to 10).
    Of the blocks up to the token's own, ``min(top_k, own block + 1)`` are selected: the first init_blocks,
    the last local_blocks, and the best of the others; of equal scores the lowest block. No gradient flows
    through the selection, and no matrix of scores is held.

    Args:
        query: ``[batch, seqlen, num_heads, head_dim]`` or packed ``[total, num_heads, head_dim]``.
        compressed_key, compressed_value: as :func:`compress` returns them; the value may have another
            head_dim.
        compress_block, compress_stride: l and s of that call.
        block_size: B, 16 to 256, a multiple of s.
        top_k: blocks per token and key head, at least init_blocks + local_blocks.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        cu_seqlens, cu_seqlens_compressed: int32 ``[batch + 1]``, both when packed.
        max_seqlen: a bound of the tokens of a sequence; an error when below the actual maximum.
        backend: None chooses; else a name of :func:`flash_sparse_attention.backends`.

    Returns:
        out as query with the value's head_dim, differentiable; lse, float32 (float64 for float64) ``[batch,
        num_heads, seqlen]``, packed ``[num_heads, total]``, natural logarithm, not differentiable;
        selected_blocks, int32 ``[batch, num_kv_heads, seqlen, top_k]``, packed ``[num_kv_heads, total,
        top_k]``: numbers inside the sequence, ascending, then -1.

    Raises:
        ValueError, TypeError, NotImplementedError: with the argument, its value and the limit.
    """
    require(query=query, compressed_key=compressed_key, compressed_value=compressed_value)
    require_or_none(cu_seqlens=cu_seqlens, cu_seqlens_compressed=cu_seqlens_compressed)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, max_seqlen)
    else:
        _refuse_without_cu_seqlens(max_seqlen=max_seqlen)
    tensors = (query, compressed_key, compressed_value, cu_seqlens, cu_seqlens_compressed)
    return attend_compressed(
        tensors,
        None,
        check_windows(compress_block, compress_stride),
        check_selection(block_size, top_k, init_blocks, local_blocks),
        _scale(softmax_scale),
        max_seqlen,
        _backend(backend),
    )


def attend_compressed(
    tensors: tuple[Tensor | None, ...],
    seqused_k: Tensor | None,
    windows: tuple[int, int],
    selection: tuple[int, int, int, int],
    softmax_scale: float | None,
    max_seqlen: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """compressed_attention with checked scalars. seqused_k: int32 ``[batch]``, the tokens of each sequence,
    of which the rows of query are the last."""
    query, key, value, cu_seqlens, cu_seqlens_compressed = tensors
    lengths = (cu_seqlens, cu_seqlens_compressed, seqused_k)
    scalars = (*windows, *selection, softmax_scale, backend)
    plain = is_plain([t for t in (*tensors, seqused_k) if t is not None])
    if plain:
        _C.nsa_workspace_size_select_blocks(
            query, key, None, *lengths, *scalars
        )  # checks before anything runs
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"compressed_value: shape {list(value.shape)}, must be that of compressed_key, {list(key.shape)}, up to "
            "head_dim"
        )
    if value.dtype != query.dtype:
        raise TypeError(f"compressed_value: dtype {value.dtype}, must be {query.dtype} as query")
    options = (*windows, softmax_scale, max_seqlen, backend)
    if plain:
        return autograd.attend_and_select(options, selection, seqused_k, *tensors)
    out, lse = autograd.compressed(options, seqused_k, *tensors)
    blocks = ops.dispatch(
        "nsa_select_blocks",
        ops.run_select_blocks,
        query.detach(),
        key.detach(),
        lse.detach(),
        *lengths,
        *scalars,
    )
    return out, lse, blocks


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected_blocks: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
    algorithm: str = "auto",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the tokens of selected blocks: one softmax over all of them; differentiable.

    Key u is visible to token t of the same sequence when block ``u // B`` is in the token's row of
    selected_blocks and ``u <= t``. A row is a set: -1 anywhere is no block, a repeated block counts once, a
    block after the token's own contributes nothing. A row without a key has out 0, lse -inf, and zero
    gradients.

    Args:
        query: ``[batch, seqlen, num_heads, head_dim]`` or packed ``[total, num_heads, head_dim]``; head_dim
            <= 256.
        key, value: of the same sequences, ``num_kv_heads`` heads; the value may have another head_dim.
        selected_blocks: int32 ``[batch, num_kv_heads, seqlen, top_k]``, packed ``[num_kv_heads, total,
            top_k]``.
        block_size: B, 16 to 256.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        cu_seqlens: int32 ``[batch + 1]`` when packed.
        max_seqlen: a bound of the lengths; an error when below the actual maximum.
        return_lse: also return lse, as in :func:`compressed_attention`.
        algorithm: "kv_outer": over blocks of keys, each loaded once for the tokens that selected it;
            "query_outer": over tokens, the heads of a group together; "off": the library's rule; "auto": the
            faster one, see :func:`profile`. Results agree to rounding.
        backend: None chooses; else a name of :func:`flash_sparse_attention.backends`.

    Returns:
        out, as query with the value's head_dim; with return_lse, out and lse.

    Raises:
        ValueError, TypeError, NotImplementedError: with the argument, its value and the limit.
    """
    tensors, options = _selected_arguments(
        query, key, value, selected_blocks, block_size, softmax_scale, cu_seqlens, max_seqlen, backend
    )
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: expected a bool, got {type(return_lse).__name__}")
    out, lse = autograd.selected(options, algorithm, max_seqlen, None, *tensors)
    return (out, lse) if return_lse else out


def _selected_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected_blocks: Tensor,
    block_size: int,
    softmax_scale: float | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    backend: str | None,
) -> tuple[tuple, tuple]:
    """The tensors and options of autograd.selected."""
    require(query=query, key=key, value=value, selected_blocks=selected_blocks)
    require_or_none(cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, max_seqlen)
    else:
        _refuse_without_cu_seqlens(max_seqlen=max_seqlen)
    options = (length("block_size", block_size), _scale(softmax_scale), _backend(backend))
    return (query, key, value, selected_blocks, cu_seqlens), options


def profile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected_blocks: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backward: bool = True,
    backend: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Times the algorithms of :func:`selected_attention` for these shapes now, and keeps the fastest.

    The first call of a shape class with the algorithm "auto" does the same by itself; this function does it
    at a time of the caller's choosing, again where the class is known, and for small work too. A class is:
    device, dtype, head dimensions, heads, block_size, top_k, and rows and lengths up to the next power of
    two. Choices are kept in memory and in a JSON file in ``FSA_CACHE_DIR`` (default
    ``~/.cache/flash_sparse_attention``), one per machine and version.

    Args:
        backward: time the backward too.
        The others as in :func:`selected_attention`.

    Returns:
        ``forward`` and, with backward, ``backward``: ``algorithm``, ``chunk_tokens``, ``source``, and
        ``times_ms`` by candidate, as in :func:`explain`.
    """
    tensors, options = _selected_arguments(
        query, key, value, selected_blocks, block_size, softmax_scale, cu_seqlens, max_seqlen, backend
    )
    if not is_plain([t for t in tensors if t is not None]):
        raise RuntimeError(
            "nsa.profile: times real calls, so it cannot run under torch.compile or a dispatch mode"
        )
    result = {}
    with torch.no_grad():
        args = (*tensors, None, *options)
        choice = profiler.remeasure("forward", tensors, args, (), max_seqlen)
        result["forward"] = _describe(choice)
        if backward:
            out, lse = ops.run_selected_forward(*args, choice.algorithm, choice.chunk_tokens)
            rest = (out, lse, torch.ones_like(out))
            result["backward"] = _describe(
                profiler.remeasure("backward", tensors, (*tensors, *options), rest, max_seqlen)
            )
    return result


def _describe(choice: profiler.Choice) -> dict[str, Any]:
    return {
        "algorithm": choice.algorithm,
        "chunk_tokens": choice.chunk_tokens,
        "source": choice.source,
        "times_ms": dict(choice.times_ms),
    }


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected_blocks: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    algorithm: str = "auto",
    backend: str | None = None,
) -> dict[str, dict[str, Any]]:
    """What :func:`selected_attention` would run for these arguments, without running or timing it.

    Returns:
        ``forward`` and ``backward``, each with ``backend`` and ``kernel``: what computes it; ``reasons``:
        ``(name, chosen, reason)`` of every backend in the order of asking; ``workspace``: bytes;
        ``algorithm`` ("off": the library's rule) and ``chunk_tokens`` (0: the library's); ``source`` of that
        choice: argument, environment, rule, profile (timed in this process) or file (in an earlier one);
        ``times_ms``: the medians by candidate. Of a class that has not been timed the source is rule.
    """
    tensors, options = _selected_arguments(
        query, key, value, selected_blocks, block_size, softmax_scale, cu_seqlens, max_seqlen, backend
    )
    block_size, scale, name = options
    result = {}
    for direction, middle, ask in (
        ("forward", (None,), _C.nsa_explain_selected_forward),
        ("backward", (), _C.nsa_explain_selected_backward),
    ):
        choice = profiler.peek(direction, tensors, block_size, algorithm, max_seqlen)
        told = ask(*tensors, *middle, block_size, scale, choice.algorithm, choice.chunk_tokens, name)
        result[direction] = {**told, **_describe(choice)}
    return result


def combine(
    compressed: Tensor, selected: Tensor, sliding: Tensor, gates: Tensor, *, backend: str | None = None
) -> Tensor:
    """``gates[..., 0] * compressed + gates[..., 1] * selected + gates[..., 2] * sliding``; differentiable.

    Args:
        compressed, selected, sliding: ``[batch, seqlen, num_heads, head_dim_v]`` or packed ``[total,
            num_heads, head_dim_v]``, all alike.
        gates: after the sigmoid, per token ``[batch, seqlen, 3]`` or per head ``[batch, seqlen, num_heads,
            3]``; packed ``[total, 3]`` or ``[total, num_heads, 3]``. dtype of the branches or float32.
        backend: None chooses; else a name of :func:`flash_sparse_attention.backends`.

    Returns:
        As one branch; summed in float32.
    """
    require(compressed=compressed, selected=selected, sliding=sliding, gates=gates)
    return autograd.combine(_backend(backend), compressed, selected, sliding, gates)


def native_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    *,
    compressed_key: Tensor,
    compressed_value: Tensor,
    compress_block: int,
    compress_stride: int,
    block_size: int,
    top_k: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_left: int = 512,
    sliding_key: Tensor | None = None,
    sliding_value: Tensor | None = None,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_compressed: Tensor | None = None,
    max_seqlen: int | None = None,
    algorithm: str = "auto",
    return_selected_blocks: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The three branches and their gated sum (equation 5); differentiable.

    :func:`compressed_attention` selects blocks, :func:`selected_attention` attends to them, the sliding
    branch is :func:`flash_sparse_attention.attention` over the last ``window_left + 1`` tokens, and
    :func:`combine` adds them.

    Args:
        query: ``[batch, seqlen, num_heads, head_dim]`` or packed ``[total, num_heads, head_dim]``, rotated.
        key, value: ``num_kv_heads`` heads, the key rotated, as :func:`selected_attention` takes them.
        gates: as :func:`combine` takes them; branch order compressed, selected, sliding.
        compressed_key, compressed_value: of :func:`compress`, the key rotated at position ``i * s``.
        window_left: keys before the token's own that the sliding branch sees: ``window_left + 1`` keys with
            its own.
        sliding_key, sliding_value: other keys and values for the sliding branch; default key and value.
        max_seqlen: a bound of the lengths, which saves a GPU from waiting.
        algorithm: of the selected branch.
        return_selected_blocks: also return them.
        The others as in :func:`compressed_attention`.

    Returns:
        out, as query with the value's head_dim; with return_selected_blocks, out and selected_blocks.
    """
    require(query=query, key=key, value=value, gates=gates)
    require_or_none(sliding_key=sliding_key, sliding_value=sliding_value)
    _check_window(window_left)
    inputs = layer.Inputs(
        query,
        key,
        value,
        gates,
        compressed_key,
        compressed_value,
        sliding_key,
        sliding_value,
        cu_seqlens,
        cu_seqlens_compressed,
    )

    def attend() -> layer.Branches:
        out_compressed, compressed_lse, blocks = compressed_attention(
            query,
            compressed_key,
            compressed_value,
            compress_block=compress_block,
            compress_stride=compress_stride,
            block_size=block_size,
            top_k=top_k,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
            softmax_scale=softmax_scale,
            cu_seqlens=cu_seqlens,
            cu_seqlens_compressed=cu_seqlens_compressed,
            max_seqlen=max_seqlen,
            backend=backend,
        )
        out_selected, selected_lse = selected_attention(
            query,
            key,
            value,
            blocks,
            block_size=block_size,
            softmax_scale=softmax_scale,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            algorithm=algorithm,
            return_lse=True,
            backend=backend,
        )
        out_sliding, sliding_lse = attention(
            query,
            key if sliding_key is None else sliding_key,
            value if sliding_value is None else sliding_value,
            causal=True,
            window_size=(window_left, 0),
            softmax_scale=softmax_scale,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            return_lse=True,
            backend=backend,
        )
        return layer.Branches(
            blocks, out_compressed, compressed_lse, out_selected, selected_lse, out_sliding, sliding_lse
        )

    name = _backend(backend)
    if autograd.records_gradient(*inputs[:8]) and not torch.compiler.is_dynamo_compiling():
        settings = layer.Settings(
            compress_block,
            compress_stride,
            block_size,
            window_left,
            _scale(softmax_scale),
            max_seqlen,
            algorithm,
            name,
        )
        out, blocks = layer.attend_with_gradient(settings, attend, inputs)
    else:  # the compiler sees the single steps
        branches = attend()
        out, blocks = autograd.combine(name, *branches[1::2], gates), branches.selected_blocks
    return (out, blocks) if return_selected_blocks else out


# ---- checks of what the extension cannot see, or would see under another name ------------------------------


def require(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")


def require_or_none(**tensors: Tensor | None) -> None:
    require(**{name: tensor for name, tensor in tensors.items() if tensor is not None})


def check_windows(compress_block: int, compress_stride: int) -> tuple[int, int]:
    block, stride = length("compress_block", compress_block), length("compress_stride", compress_stride)
    if block < 1:
        raise ValueError(f"compress_block: {block}, must be at least 1")
    if stride < 1 or block % stride:
        raise ValueError(f"compress_stride: {stride}, must be at least 1 and divide compress_block {block}")
    return block, stride


def check_selection(
    block_size: int, top_k: int, init_blocks: int, local_blocks: int
) -> tuple[int, int, int, int]:
    return (
        length("block_size", block_size),
        length("top_k", top_k),
        length("init_blocks", init_blocks),
        length("local_blocks", local_blocks),
    )


def check_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int | None) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: dtype {str(cu_seqlens.dtype).removeprefix('torch.')}, must be int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: shape {list(cu_seqlens.shape)}, must be [batch + 1]")
    if max_seqlen is None:
        return
    bound = length("max_seqlen", max_seqlen)
    if isinstance(bound, int) and bound < 0:
        raise ValueError(f"max_seqlen: {bound}, must not be negative")
    if cu_seqlens.device.type == "cpu" and is_plain((cu_seqlens,)) and cu_seqlens.shape[0] > 1:
        longest = int(cu_seqlens.diff().max())
        if bound < longest:
            raise ValueError(f"max_seqlen: {bound} is smaller than the longest sequence, {longest}")


def _check_window(window_left: int) -> None:
    if length("window_left", window_left) < -1:
        raise ValueError(f"window_left: {window_left}, must be -1 (no limit), 0 or above")


def _refuse_without_cu_seqlens(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None:
            raise ValueError(
                f"{name}: {size}, but cu_seqlens is missing; without it the shapes say the lengths"
            )


def _scale(softmax_scale: float | None) -> float | None:
    if softmax_scale is None or isinstance(softmax_scale, (float, int, torch.SymFloat, torch.SymInt)):
        return softmax_scale
    raise TypeError(f"softmax_scale: expected a number, got {type(softmax_scale).__name__}")


def _backend(backend: str | None) -> str:
    if backend is None:
        return ""
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a str, got {type(backend).__name__}")
    return backend
