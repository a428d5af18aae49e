# SPDX-License-Identifier: Apache-2.0
"""Block masks: which blocks of keys each block of query rows sees."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_DEFAULT_SIZE = 128
# Elements of a mask that are evaluated at once.
_ELEMENTS_AT_ONCE = 1 << 23


class BlockMask:
    """Which blocks of keys each block of query rows sees: the ``block_mask`` argument of :func:`attention`.

    Rows are cut into blocks of ``BLOCK_SIZE[0]``, keys into blocks of ``BLOCK_SIZE[1]``, from the start of the
    sequence. For every (batch entry, query head, row block) two lists name the key blocks that are visible:
    full ones as a whole, partial ones by one bit per element. What no list names is hidden. A dimension of 1
    in place of batch or heads stands for all of them; nothing is expanded. The names are those of
    ``torch.nn.attention.flex_attention.BlockMask``.

    Made by :meth:`from_kv_blocks`, :meth:`from_dense`, :meth:`from_mask` or :meth:`from_torch`.

    Attributes:
        kv_num_blocks: int32 ``[batch or 1, num_heads or 1, row_blocks]``, partial blocks in each list; or None.
        kv_indices: int32 ``[batch or 1, num_heads or 1, row_blocks, columns]``, their key blocks; or None.
        full_kv_num_blocks, full_kv_indices: the same of full blocks; or None.
        partial_begin: int32, shape of kv_num_blocks: the bits of entry i of a list are block
            ``partial_begin + i`` of partial_bits.
        partial_bits: int32 ``[blocks, BLOCK_SIZE[0], BLOCK_SIZE[1] // 32]``: bit ``key % 32`` of word
            ``[row, key // 32]`` says whether the row sees the key.
        BLOCK_SIZE: rows and keys of a block: multiples of the skip tile, :func:`skip_tile`.
        seq_lengths: (rows, keys) that the mask was made for; or None.
    """

    def __init__(
        self,
        kv_num_blocks: Tensor | None,
        kv_indices: Tensor | None,
        full_kv_num_blocks: Tensor | None,
        full_kv_indices: Tensor | None,
        partial_begin: Tensor | None,
        partial_bits: Tensor | None,
        BLOCK_SIZE: tuple[int, int],
        seq_lengths: tuple[int, int] | None = None,
    ) -> None:
        self.kv_num_blocks = kv_num_blocks
        self.kv_indices = kv_indices
        self.full_kv_num_blocks = full_kv_num_blocks
        self.full_kv_indices = full_kv_indices
        self.partial_begin = partial_begin
        self.partial_bits = partial_bits
        self.BLOCK_SIZE = BLOCK_SIZE
        self.seq_lengths = seq_lengths

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        BLOCK_SIZE: int | tuple[int, int] = _DEFAULT_SIZE,
        mask_mod: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
    ) -> BlockMask:
        """From lists, as ``torch.nn.attention.flex_attention.BlockMask.from_kv_blocks`` takes them.

        Args:
            kv_num_blocks: int32 ``[batch or 1, num_heads or 1, row_blocks]``.
            kv_indices: int32 ``[batch or 1, num_heads or 1, row_blocks, columns]``. Entries behind the count
                may hold anything.
            full_kv_num_blocks, full_kv_indices: blocks to which mask_mod does not apply.
            BLOCK_SIZE: rows and keys of a block, or one number for both.
            mask_mod: ``(batch, head, row, key) -> bool``, on scalars. Evaluated here, once, and only on the
                blocks of kv_indices; with a 1 in place of batch or heads for entry 0. None: these blocks are
                visible as a whole.
            seq_lengths: (rows, keys); mask_mod is asked for no element beyond them. None: whole blocks.
        """
        size = _block_size(BLOCK_SIZE)
        for name, tensor in (("kv_num_blocks", kv_num_blocks), ("kv_indices", kv_indices)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if kv_num_blocks.dim() != 3 or kv_indices.dim() != 4 or kv_indices.shape[:3] != kv_num_blocks.shape:
            raise ValueError(
                f"kv_num_blocks, kv_indices: shapes {list(kv_num_blocks.shape)} and {list(kv_indices.shape)}, "
                "must be [batch or 1, num_heads or 1, row_blocks] and the same with columns"
            )
        if mask_mod is None:
            if full_kv_num_blocks is None:
                return cls(None, None, kv_num_blocks, kv_indices, None, None, size, seq_lengths)
            listed = _dense(kv_num_blocks, kv_indices), _dense(full_kv_num_blocks, full_kv_indices)
            columns = max(blocks.shape[-1] for blocks in listed)
            partial, full = (
                torch.nn.functional.pad(blocks, (0, columns - blocks.shape[-1])) for blocks in listed
            )
            return cls.from_dense(partial | full, size, seq_lengths)
        begin = kv_num_blocks.flatten().cumsum(0, dtype=torch.int32).view(kv_num_blocks.shape) - kv_num_blocks
        bits = _evaluate(mask_mod, kv_num_blocks, kv_indices, size, seq_lengths)
        return cls(
            kv_num_blocks.contiguous(), kv_indices.contiguous(), full_kv_num_blocks, full_kv_indices,
            begin.contiguous(), bits, size, seq_lengths,
        )  # fmt: skip

    @classmethod
    def from_dense(
        cls,
        blocks: Tensor,
        BLOCK_SIZE: int | tuple[int, int] = _DEFAULT_SIZE,
        seq_lengths: tuple[int, int] | None = None,
    ) -> BlockMask:
        """From bool ``[batch or 1, num_heads or 1, row_blocks, key_blocks]``: True is a block that is visible."""
        if not isinstance(blocks, Tensor):
            raise TypeError(f"block_mask: expected a torch.Tensor, got {type(blocks).__name__}")
        if blocks.dtype != torch.bool:
            raise TypeError(f"block_mask: dtype {blocks.dtype}, a dense block mask must be torch.bool")
        if blocks.dim() != 4:
            raise ValueError(
                f"block_mask: shape {list(blocks.shape)}, must be "
                "[batch or 1, num_heads or 1, row_blocks, key_blocks]"
            )
        counts, indices = _lists(blocks)
        return cls(None, None, counts, indices, None, None, _block_size(BLOCK_SIZE), seq_lengths)

    @classmethod
    def from_mask(cls, mask: Tensor, BLOCK_SIZE: int | tuple[int, int] = _DEFAULT_SIZE) -> BlockMask:
        """From bool ``[batch or 1, num_heads or 1, seqlen_q, seqlen_k]``, one element per row and key.

        Blocks without a True are hidden, blocks of nothing but True are full (where the sequence ends inside of
        them, too), the others partial.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
            found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: {found}, must be bool [batch or 1, num_heads or 1, seqlen_q, seqlen_k]")
        size = _block_size(BLOCK_SIZE)
        rows, keys = mask.shape[2:]
        missing = (0, -keys % size[1], 0, -rows % size[0])
        blocks = _blocks_of(torch.nn.functional.pad(mask, missing), size)
        some = blocks.flatten(4).any(-1)
        full = _blocks_of(torch.nn.functional.pad(mask, missing, value=True), size).flatten(4).all(-1) & some
        counts, indices = _lists(some & ~full)
        begin = counts.flatten().cumsum(0, dtype=torch.int32).view(counts.shape) - counts
        bits = _pack(blocks[some & ~full])
        return cls(counts, indices, *_lists(full), begin, bits, size, (rows, keys))

    @classmethod
    def from_torch(cls, block_mask: Any) -> BlockMask:
        """From a ``torch.nn.attention.flex_attention.BlockMask``, whose mask_mod is evaluated here, once, and only
        on the partial blocks."""
        mask_mod = block_mask.mask_mod
        if getattr(mask_mod, "__name__", "") == "noop_mask":
            mask_mod = None
        counts, indices, full_counts, full_indices = (
            None if tensor is None else tensor[(None,) * (rank - tensor.dim())]
            for tensor, rank in (
                (block_mask.kv_num_blocks, 3),
                (block_mask.kv_indices, 4),
                (block_mask.full_kv_num_blocks, 3),
                (block_mask.full_kv_indices, 4),
            )
        )
        return cls.from_kv_blocks(
            counts,
            indices,
            full_counts,
            full_indices,
            block_mask.BLOCK_SIZE,
            mask_mod,
            block_mask.seq_lengths,
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The six tensors in the order of the attributes."""
        return (
            self.kv_num_blocks,
            self.kv_indices,
            self.full_kv_num_blocks,
            self.full_kv_indices,
            self.partial_begin,
            self.partial_bits,
        )

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        moved = (None if tensor is None else tensor.to(device) for tensor in self.tensors)
        return BlockMask(*moved, self.BLOCK_SIZE, self.seq_lengths)

    def __repr__(self) -> str:
        lists = self.kv_num_blocks if self.full_kv_num_blocks is None else self.full_kv_num_blocks
        return f"BlockMask(shape={list(lists.shape)}, BLOCK_SIZE={self.BLOCK_SIZE}, seq_lengths={self.seq_lengths})"


# Keyed by the mask itself: a model passes the same one in every layer and step.
_CONVERTED: weakref.WeakKeyDictionary[Any, BlockMask] = weakref.WeakKeyDictionary()


def as_block_mask(block_mask: Any, seqlen_q: int, seqlen_k: int) -> BlockMask:
    """What attention's block_mask stands for; it must have been made for these lengths."""
    if isinstance(block_mask, BlockMask):
        found = block_mask
    elif isinstance(block_mask, Tensor):
        found = BlockMask.from_dense(block_mask)
    elif _is_torch_block_mask(block_mask):
        found = _converted(block_mask)
    else:
        raise TypeError(
            "block_mask: expected a BlockMask of this package or of torch.nn.attention.flex_attention, or a bool "
            f"tensor, got {type(block_mask).__name__}"
        )
    if found.seq_lengths is not None and tuple(found.seq_lengths) != (seqlen_q, seqlen_k):
        raise ValueError(
            f"block_mask: made for {found.seq_lengths[0]} rows and {found.seq_lengths[1]} keys, but query has "
            f"{seqlen_q} and key {seqlen_k}"
        )
    return found


def _is_torch_block_mask(value: Any) -> bool:
    flex = sys.modules.get("torch.nn.attention.flex_attention")  # whoever passes one has imported it
    return flex is not None and isinstance(value, flex.BlockMask)


def _converted(block_mask: Any) -> BlockMask:
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(
            "block_mask: a mask of torch cannot be converted under torch.compile; call BlockMask.from_torch outside"
        )
    found = _CONVERTED.get(block_mask)
    if found is None:
        found = _CONVERTED[block_mask] = BlockMask.from_torch(block_mask)
    return found


def _block_size(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= 64 and n % 64 == 0 for n in pair):
        raise ValueError(
            f"BLOCK_SIZE: {size!r}, must be one number or (rows, keys): multiples of the skip tile, 64 rows and 128 "
            "keys (64 for head_dim above 128)"
        )
    return pair


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [.., row_blocks] and ascending indices [.., row_blocks, key_blocks] of the True ones."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Which entries of the lists count."""
    return torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)


def _dense(counts: Tensor, indices: Tensor) -> Tensor:
    """bool [.., row_blocks, key_blocks]."""
    listed = _listed(counts, indices)
    columns = int(torch.where(listed, indices, -1).max()) + 1 if indices.numel() else 0
    blocks = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=counts.device)
    return blocks.scatter_(-1, torch.where(listed, indices, columns).long(), True)[..., :columns]


def _blocks_of(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """[batch, heads, row_blocks, key_blocks, rows, keys] of [batch, heads, rows, keys]."""
    return mask.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0])).transpose(3, 4)


def _pack(blocks: Tensor) -> Tensor:
    """bool [blocks, rows, keys] as int32 [blocks, rows, keys / 32], the first key the lowest bit."""
    weights = torch.ones(32, dtype=torch.int64, device=blocks.device) << torch.arange(
        32, device=blocks.device
    )
    parts = [
        (part.unflatten(-1, (-1, 32)) * weights).sum(-1).to(torch.int32)
        for part in blocks.split(max(1, _ELEMENTS_AT_ONCE // max(1, blocks[:1].numel())))
    ]
    return torch.cat(parts) if parts else blocks.new_zeros(0, blocks.shape[1], blocks.shape[2] // 32).int()


def _evaluate(
    mask_mod: MaskMod,
    counts: Tensor,
    indices: Tensor,
    size: tuple[int, int],
    seq_lengths: tuple[int, int] | None,
) -> Tensor:
    """The bits of the listed blocks, in the order of the lists."""
    # Inside vmap, tensor[index] with a scalar index reads an element only under this mode, which torch's own
    # create_mask enters, too.
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    device = counts.device
    batch, head, row_block, column = _listed(counts, indices).nonzero(as_tuple=True)
    key_block = indices[batch, head, row_block, column].long()
    rows = torch.arange(size[0], device=device)
    keys = torch.arange(size[1], device=device)
    by_key = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    by_row = torch.vmap(by_key, in_dims=(None, None, 0, None))
    by_block = torch.vmap(by_row, in_dims=(0, 0, 0, 0))
    step = max(1, _ELEMENTS_AT_ONCE // (size[0] * size[1]))
    parts = [torch.zeros(0, size[0], size[1] // 32, dtype=torch.int32, device=device)]
    for first in range(0, batch.numel(), step):
        chosen = slice(first, first + step)
        row = row_block[chosen, None] * size[0] + rows
        key = key_block[chosen, None] * size[1] + keys
        last_row, last_key = (sys.maxsize,) * 2 if seq_lengths is None else (n - 1 for n in seq_lengths)
        with TransformGetItemToIndex():
            seen = by_block(batch[chosen], head[chosen], row.clamp(max=last_row), key.clamp(max=last_key))
        exists = (row <= last_row)[:, :, None] & (key <= last_key)[:, None, :]
        parts.append(_pack(seen.bool() & exists))
    return torch.cat(parts)
