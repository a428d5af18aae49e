# SPDX-License-Identifier: Apache-2.0
"""Decoding: a cache of keys and values, and attention of new tokens over it.

A step computes what the same token gets in a whole sequence: the same windows are compressed at the moment
their last token arrives, the same blocks are selected, the same keys are seen.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import _C
from ..functional import attention, length
from ..ops import is_plain
from . import autograd
from .functional import (
    _backend,
    _check_window,
    _scale,
    attend_compressed,
    check_selection,
    check_windows,
    compress,
    require,
    require_or_none,
)
from .ops import compressed_rows
from .rope import RopeConfig, apply_rope


@dataclasses.dataclass(frozen=True)
class Compression:
    """How a layer compresses: the arguments of :func:`compress`, for keys and for values."""

    compress_key: Tensor | None = None
    compress_value: Tensor | None = None
    intra_block_pe: Tensor | None = None
    kind: str = "linear"


class NSACache:
    """What decoding needs of a batch of sequences, for one layer.

    Sequences may have different lengths; a step adds the same number of tokens to each. Memory: ``batch *
    num_kv_heads * (head_dim + head_dim_v)`` elements times ``max_seqlen + max_seqlen / compress_stride +
    compress_block``.

    Args:
        batch: sequences.
        max_seqlen: tokens that a sequence may reach.
        num_kv_heads, head_dim: of the keys; head_dim_v of the values, default head_dim.
        compress_block, compress_stride: of the layer.
        dtype, device: of the tensors; default torch's.

    Attributes:
        key, value: ``[batch, max_seqlen, num_kv_heads, head_dim]``, keys rotated.
        compressed_key, compressed_value: ``[batch, windows + 1, num_kv_heads, head_dim]``, keys rotated; the
            last row is a spare.
        raw_key, raw_value: ``[batch, compress_block, num_kv_heads, head_dim]``, the newest tokens before
            rotation; token t at ``t % compress_block``.
        seqlens: int32 ``[batch]``, tokens so far.
    """

    def __init__(
        self,
        batch: int,
        max_seqlen: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        compress_block: int = 32,
        compress_stride: int = 16,
        head_dim_v: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size, least in (
            ("batch", batch, 0),
            ("max_seqlen", max_seqlen, 1),
            ("num_kv_heads", num_kv_heads, 1),
            ("head_dim", head_dim, 1),
        ):
            if length(name, size) < least:
                raise ValueError(f"{name}: {size}, must be at least {least}")
        self.compress_block, self.compress_stride = check_windows(compress_block, compress_stride)
        self.max_seqlen = max_seqlen
        self._windows = compressed_rows(max_seqlen, compress_block, compress_stride)

        def zeros(rows: int, dim: int) -> Tensor:
            return torch.zeros(batch, rows, num_kv_heads, dim, dtype=dtype, device=device)

        dims = head_dim, head_dim if head_dim_v is None else head_dim_v
        self.key, self.value = (zeros(max_seqlen, dim) for dim in dims)
        self.compressed_key, self.compressed_value = (zeros(self._windows + 1, dim) for dim in dims)
        self.raw_key, self.raw_value = (zeros(compress_block, dim) for dim in dims)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self._bound = 0  # no sequence has more tokens

    @property
    def batch(self) -> int:
        return self.seqlens.shape[0]

    def reset(self) -> None:
        """Back to sequences without tokens."""
        self.seqlens.zero_()
        self._bound = 0

    def _check(self, key: Tensor, value: Tensor, rows: str) -> None:
        for name, tensor, held in (("key", key, self.key), ("value", value, self.value)):
            if tensor.dim() != len(rows.split(",")) + 2 or tensor.shape[-2:] != held.shape[-2:]:
                raise ValueError(
                    f"{name}: shape {list(tensor.shape)}, must be [{rows}, {held.shape[-2]}, {held.shape[-1]}], as the "
                    "cache was made for"
                )
            if tensor.dtype != held.dtype:
                raise TypeError(f"{name}: dtype {tensor.dtype}, but the cache has {held.dtype}")
            if tensor.device != held.device:
                raise ValueError(f"{name}: on {tensor.device}, but the cache is on {held.device}")
        if key.shape[:-2] != value.shape[:-2]:
            raise ValueError(f"value: rows {list(value.shape[:-2])}, but key has {list(key.shape[:-2])}")

    def _longest(self) -> int:
        """Tokens of the longest sequence; on a GPU, which is not waited for, a bound of them."""
        on_cpu = self.seqlens.device.type == "cpu"
        return int(self.seqlens.max()) if on_cpu and self.batch else self._bound

    def check_new(self, key: Tensor, value: Tensor) -> None:
        """Raises where :meth:`append` cannot take these tokens."""
        self._check(key, value, "batch, new")
        if key.shape[0] != self.batch:
            raise ValueError(f"key: batch {key.shape[0]}, but the cache was made for batch {self.batch}")
        self._check_room(key.shape[1], self._longest() + key.shape[1])

    def _check_room(self, tokens: int, bound: int) -> None:
        if bound > self.max_seqlen:
            raise ValueError(
                f"cache: {tokens} new tokens make a sequence of {bound}, but max_seqlen is {self.max_seqlen}; make a "
                "larger cache"
            )

    @torch.no_grad()
    def fill(
        self,
        key: Tensor,
        value: Tensor,
        raw_key: Tensor,
        compressed_key: Tensor,
        compressed_value: Tensor,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_compressed: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> None:
        """Takes whole sequences, in place of what was there: what a forward over them computed.

        Args:
            key: rotated, ``[batch, seqlen, num_kv_heads, head_dim]`` or packed with cu_seqlens; value and
                raw_key (key before its rotation) alike.
            compressed_key, compressed_value: of :func:`compress`, the key rotated.
            max_seqlen: of the packed sequences; default their sum on a GPU, where the lengths are not read.
        """
        self._check(key, value, "batch, seqlen" if cu_seqlens is None else "total")
        batch = key.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if batch != self.batch:
            raise ValueError(f"cache: made for batch {self.batch}, but there are {batch} sequences")
        if cu_seqlens is None:
            tokens = longest = key.shape[1]
            self._check_room(tokens, longest)
            self.key[:, :tokens], self.value[:, :tokens] = key, value
            self.compressed_key[:, : compressed_key.shape[1]] = compressed_key
            self.compressed_value[:, : compressed_value.shape[1]] = compressed_value
            self.seqlens.fill_(tokens)
        else:
            tokens = key.shape[0]
            longest = tokens if max_seqlen is None else max_seqlen
            if cu_seqlens.device.type == "cpu" and batch:
                longest = int(cu_seqlens.diff().max())
            self._check_room(tokens, longest)
            _scatter(self.key, self.value, key, value, cu_seqlens)
            _scatter(
                self.compressed_key,
                self.compressed_value,
                compressed_key,
                compressed_value,
                cu_seqlens_compressed,
            )
            self.seqlens.copy_(cu_seqlens.diff())
        self._bound = longest
        # Slot r of the ring holds the newest token t with t % block == r; where there is none, anything.
        last = self.seqlens[:, None].long() - 1
        slots = torch.arange(self.compress_block, device=key.device)
        newest = (last - (last - slots) % self.compress_block).clamp(min=0)
        if not tokens:
            return
        for ring, raw in ((self.raw_key, raw_key), (self.raw_value, value)):
            if cu_seqlens is None:
                ring.copy_(raw[torch.arange(batch, device=key.device)[:, None], newest])
            else:
                ring.copy_(raw[(cu_seqlens[:-1, None] + newest).clamp(max=tokens - 1)])

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor, compression: Compression, rope: RopeConfig | None) -> Tensor:
        """Adds tokens to every sequence, and the windows that they complete.

        Args:
            key, value: ``[batch, new, num_kv_heads, head_dim]``, the key not rotated.
            compression: of the layer.
            rope: the rotation of the keys; None where there is none.

        Returns:
            The positions of the new tokens, int64 ``[batch, new]``.
        """
        self.check_new(key, value)
        batch, new = key.shape[:2]
        on_cpu = self.seqlens.device.type == "cpu"
        self._bound = self._longest() + new
        before = self.seqlens[:, None].long()
        positions = before + torch.arange(new, device=key.device)
        sequence = torch.arange(batch, device=key.device)[:, None]
        self.key[sequence, positions] = (
            key if rope is None else apply_rope(key, positions, rope, bound=self.max_seqlen)
        )
        self.value[sequence, positions] = value

        windows = -(-new // self.compress_stride)  # that can be completed by so many tokens
        if on_cpu and batch:  # most steps complete none; elsewhere to ask would be to wait
            windows = int((self._complete(before + new) - self._complete(before)).max())
        if windows:
            self._compress(key, value, compression, rope, before, windows)
        kept = positions[:, -self.compress_block :]
        slots = kept % self.compress_block
        self.raw_key[sequence, slots] = key[:, -self.compress_block :]
        self.raw_value[sequence, slots] = value[:, -self.compress_block :]
        self.seqlens += new
        return positions

    def _complete(self, tokens: Tensor) -> Tensor:
        return (tokens - self.compress_block + self.compress_stride).clamp(min=0) // self.compress_stride

    def _compress(
        self,
        key: Tensor,
        value: Tensor,
        compression: Compression,
        rope: RopeConfig | None,
        before: Tensor,
        windows: int,
    ) -> None:
        """Windows that the new tokens complete, `windows` of each sequence; those not complete go to the
        spare row."""
        block, stride = self.compress_block, self.compress_stride
        batch, new = key.shape[:2]
        device = key.device
        sequence = torch.arange(batch, device=device)[:, None]
        window = self._complete(before) + torch.arange(windows, device=device)  # [batch, windows]
        complete = window < self._complete(before + new)
        # Tokens of a window, counted from the oldest one in the ring, before - block.
        tokens = window[..., None] * stride + torch.arange(block, device=device) - (before - block)[..., None]
        tokens = tokens.clamp(0, block + new - 1)
        ring = (before - block + torch.arange(block, device=device)) % block  # its slots, oldest first
        target = torch.where(complete, window, self._windows)
        for raw, held, fresh, weight, pe in (
            (self.raw_key, self.compressed_key, key, compression.compress_key, compression.intra_block_pe),
            (self.raw_value, self.compressed_value, value, compression.compress_value, None),
        ):
            recent = torch.cat([raw[sequence, ring], fresh], dim=1)
            rows = recent[sequence[..., None], tokens].flatten(0, 1)  # [batch * windows, block, heads, dim]
            y, _ = compress(
                rows,
                weight,
                kind=compression.kind,
                intra_block_pe=pe,
                compress_block=block,
                compress_stride=stride,
            )
            y = y.view(batch, windows, *y.shape[2:])
            if rope is not None and fresh is key:
                y = apply_rope(y, window * stride, rope, bound=self.max_seqlen + windows * stride)
            held[sequence, target] = y


def _scatter(
    key: Tensor, value: Tensor, packed_key: Tensor, packed_value: Tensor, cu_seqlens: Tensor
) -> None:
    sequence, row = locate(cu_seqlens, packed_key.shape[0])
    key[sequence, row] = packed_key
    value[sequence, row] = packed_value


def locate(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Sequence and position inside it of every packed row, int64 ``[total]``; nothing is read on the host."""
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], rows, right=True).clamp(max=max(cu_seqlens.shape[0] - 2, 0))
    return sequence, rows - cu_seqlens[sequence]


@torch.no_grad()
def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    cache: NSACache,
    *,
    compress_key: Tensor | None = None,
    compress_value: Tensor | None = None,
    kind: str = "linear",
    intra_block_pe: Tensor | None = None,
    rope: RopeConfig | None = None,
    block_size: int,
    top_k: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_left: int = 512,
    softmax_scale: float | None = None,
    algorithm: str = "off",
    return_selected_blocks: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new tokens over the cache, to which they are added first; no gradient.

    Results are those of :func:`native_sparse_attention` for the same tokens of the whole sequence, to
    rounding; so are the selected blocks, but for scores that differ by rounding alone.

    Args:
        query: ``[batch, new, num_heads, head_dim]``, or ``[batch, num_heads, head_dim]`` for one token; not
            rotated.
        key, value: as query with num_kv_heads heads; the key not rotated.
        gates: after the sigmoid, ``[batch, new, 3]`` or ``[batch, new, num_heads, 3]``; without `new` as
            query.
        cache: holds the tokens before; changed in place.
        compress_key, compress_value, intra_block_pe, kind: weight of keys, weight of values, pe of keys, as
            :func:`compress` takes them.
        rope: rotates query and keys; None where there is none.
        algorithm: of the selected branch, see :func:`selected_attention`.
        return_selected_blocks: also return them, int32 ``[batch, num_kv_heads, new, top_k]``.
        The others as in :func:`native_sparse_attention`.

    Returns:
        out, as query with the value's head_dim.
    """
    require(query=query, key=key, value=value, gates=gates)
    require_or_none(compress_key=compress_key, compress_value=compress_value, intra_block_pe=intra_block_pe)
    if not isinstance(cache, NSACache):
        raise TypeError(f"cache: expected an NSACache, got {type(cache).__name__}")
    single = query.dim() == 3
    if single:
        query, key, value, gates = (t.unsqueeze(1) for t in (query, key, value, gates))
    if query.dim() != 4:
        raise ValueError(
            f"query: rank {query.dim()} with shape {list(query.shape)}, must be [batch, new, num_heads, head_dim] or "
            "[batch, num_heads, head_dim]"
        )
    if gates.shape not in ((*query.shape[:2], 3), (*query.shape[:3], 3)):
        raise ValueError(
            f"gates: shape {list(gates.shape)}, must be {[*query.shape[:2], 3]} or {[*query.shape[:3], 3]}"
        )
    if key.dim() == 4 and key.shape[1] != query.shape[1]:
        raise ValueError(f"key: {key.shape[1]} new tokens, but query has {query.shape[1]}")
    selection = check_selection(block_size, top_k, init_blocks, local_blocks)
    windows = cache.compress_block, cache.compress_stride
    _check_window(window_left)
    scale, name = _scale(softmax_scale), _backend(backend)

    cache.check_new(key, value)
    if is_plain((query, key)):  # before the cache takes anything
        after = cache.seqlens + query.shape[1]
        lengths = (None, None, None, after)
        _C.nsa_workspace_size_select_blocks(
            query, cache.compressed_key, *lengths, *windows, *selection, scale, name
        )
    compression = Compression(compress_key, compress_value, intra_block_pe, kind)
    positions = cache.append(key, value, compression, rope)
    if rope is not None:
        query = apply_rope(query, positions, rope, bound=cache.max_seqlen)
    tensors = (query, cache.compressed_key, cache.compressed_value, None, None)
    out_compressed, _, blocks = attend_compressed(
        tensors, cache.seqlens, windows, selection, scale, None, name
    )
    out_selected, _ = autograd.selected(
        (selection[0], scale, name),
        algorithm,
        None,
        cache.seqlens,
        query,
        cache.key,
        cache.value,
        blocks,
        None,
    )
    out_sliding = attention(
        query,
        cache.key,
        cache.value,
        causal=True,
        window_size=(window_left, 0),
        softmax_scale=softmax_scale,
        seqused_k=cache.seqlens,
        backend=backend,
    )
    out = autograd.combine(name, out_compressed, out_selected, out_sliding, gates)
    out = out.squeeze(1) if single else out
    return (out, blocks) if return_selected_blocks else out
