# SPDX-License-Identifier: Apache-2.0
"""The attention layer: projections, compression, rotation, the three branches, gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import length
from .cache import NSACache, decode, locate
from .functional import compress, native_sparse_attention
from .rope import RopeConfig, apply_rope

GATE_MODES = ("per_token", "per_head")
KINDS = ("linear", "weighted", "mean")


class NativeSparseAttention(nn.Module):
    """Causal self-attention by three branches (NSA, arXiv 2502.11089).

    Constructor parameters, parameter names and shapes, and initialisation are those of FSA
    (Relaxed-System-Lab/Flash-Sparse-Attention), so its state dicts load. In order: projections without bias;
    compression of keys and values *before* rotation; rotation of queries and keys at their position and of
    compressed key i at position ``i * kernel_stride``; the branches; gates ``sigmoid(x W^T)``; the output
    projection.

    Args:
        hidden_size: of x.
        num_q_heads, num_kv_heads: num_q_heads is a multiple of num_kv_heads.
        head_dim: of queries, keys and values, up to 256; even, where there is a rotation.
        kernel_size, kernel_stride: l and s of the compression.
        block_size, topk, init_blocks, local_blocks: of the selection.
        window_size: keys before a token's own that the sliding branch sees: window_size + 1 keys with its
            own.
        rope_config: None: ``RopeConfig(head_dim)``, no scaling.
        gate_mode: "per_token": a gate per token and branch, ``gate.0.weight [3, hidden_size]``; "per_head":
            per query head too, ``[3 * num_q_heads, hidden_size]``, row ``3 * head + branch``.
        compress_kind: "linear", "weighted" or "mean", as :func:`compress`; of kind mean compress_key and
            compress_value are None.
        use_rope: False: no rotation at all.
        algorithm: of the selected branch, see :func:`selected_attention`.
        device, dtype: of the parameters.

    Parameters: ``proj_q.weight [num_q_heads * head_dim, hidden_size]``; ``proj_k.weight`` and
    ``proj_v.weight`` ``[num_kv_heads * head_dim, hidden_size]``, shared by the branches; ``proj_o.weight``;
    ``compress_key`` and ``compress_value [num_kv_heads, kernel_size * head_dim, head_dim]`` (kind weighted:
    ``[num_kv_heads, kernel_size]``); ``intra_block_pe [num_kv_heads, kernel_size, head_dim]``;
    ``gate.0.weight``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int,
        kernel_stride: int,
        block_size: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        window_size: int,
        rope_config: RopeConfig | None = None,
        gate_mode: str = "per_token",
        *,
        compress_kind: str = "linear",
        use_rope: bool = True,
        algorithm: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("hidden_size", hidden_size),
            ("num_q_heads", num_q_heads),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("kernel_size", kernel_size),
            ("kernel_stride", kernel_stride),
        ):
            if length(name, size) < 1:
                raise ValueError(f"{name}: {size}, must be at least 1")
        if num_q_heads % num_kv_heads:
            raise ValueError(f"num_q_heads: {num_q_heads}, must be a multiple of num_kv_heads {num_kv_heads}")
        if kernel_size % kernel_stride:
            raise ValueError(f"kernel_stride: {kernel_stride}, must divide kernel_size {kernel_size}")
        if length("block_size", block_size) % kernel_stride:
            raise ValueError(f"block_size: {block_size}, must be a multiple of kernel_stride {kernel_stride}")
        if length("topk", topk) < init_blocks + local_blocks:
            raise ValueError(
                f"topk: {topk}, must be at least init_blocks {init_blocks} + local_blocks {local_blocks}"
            )
        if gate_mode not in GATE_MODES:
            raise ValueError(f"gate_mode: {gate_mode!r}, must be one of {', '.join(map(repr, GATE_MODES))}")
        if compress_kind not in KINDS:
            raise ValueError(
                f"compress_kind: {compress_kind!r}, must be one of {', '.join(map(repr, KINDS))}"
            )
        if use_rope:
            rope_config = RopeConfig(head_dim) if rope_config is None else rope_config
            if rope_config.head_dim != head_dim:
                raise ValueError(
                    f"rope_config: head_dim {rope_config.head_dim}, but the heads have {head_dim}"
                )
        elif rope_config is not None:
            raise ValueError("rope_config: given, but use_rope is False; leave one out")
        self.hidden_size = hidden_size
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.kernel_size = kernel_size
        self.kernel_stride = kernel_stride
        self.block_size = block_size
        self.topk = topk
        self.init_blocks = init_blocks
        self.local_blocks = local_blocks
        self.window_size = window_size
        self.rope_config = rope_config
        self.gate_mode = gate_mode
        self.compress_kind = compress_kind
        self.algorithm = algorithm

        factory = {"device": device, "dtype": dtype}
        self.proj_q = nn.Linear(hidden_size, num_q_heads * head_dim, bias=False, **factory)
        self.proj_k = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False, **factory)
        self.proj_v = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False, **factory)
        self.proj_o = nn.Linear(num_q_heads * head_dim, hidden_size, bias=False, **factory)

        def weight() -> nn.Parameter | None:
            if compress_kind == "mean":
                return None
            linear = compress_kind == "linear"
            shape = (kernel_size * head_dim, head_dim) if linear else (kernel_size,)
            return nn.Parameter(torch.empty(num_kv_heads, *shape, **factory))

        self.register_parameter("compress_key", weight())
        self.register_parameter("compress_value", weight())
        self.intra_block_pe = nn.Parameter(torch.empty(num_kv_heads, kernel_size, head_dim, **factory))
        gates = 3 if gate_mode == "per_token" else 3 * num_q_heads
        self.gate = nn.Sequential(nn.Linear(hidden_size, gates, bias=False, **factory), nn.Sigmoid())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """xavier_uniform_ for every parameter, the three-dimensional ones as torch counts their fans."""
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)

    def extra_repr(self) -> str:
        return (
            f"heads {self.num_q_heads}/{self.num_kv_heads} x {self.head_dim}, compress {self.compress_kind} "
            f"{self.kernel_size}/{self.kernel_stride}, select {self.topk} x {self.block_size}, "
            f"window {self.window_size}, gates {self.gate_mode}"
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query, key, value ``[..., heads, head_dim]``, not rotated, and gates ``[..., 3]`` or ``[..., heads,
        3]``."""
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: hidden size {x.shape[-1]}, but the layer has {self.hidden_size}")
        query, key, value = (
            proj(x).unflatten(-1, (heads, self.head_dim))
            for proj, heads in (
                (self.proj_q, self.num_q_heads),
                (self.proj_k, self.num_kv_heads),
                (self.proj_v, self.num_kv_heads),
            )
        )
        gates = self.gate(x)
        return query, key, value, gates if self.gate_mode == "per_token" else gates.unflatten(-1, (-1, 3))

    def _parameter(self, name: str, like: Tensor) -> Tensor | None:
        """The parameter in the dtype of the activations, which under autocast is another."""
        parameter = getattr(self, name)
        return None if parameter is None else parameter.to(like.dtype)

    def _rotate(self, x: Tensor, positions: Tensor, bound: int) -> Tensor:
        return x if self.rope_config is None else apply_rope(x, positions, self.rope_config, bound=bound)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        total_compressed: int | None = None,
        cache: NSACache | None = None,
        return_selected_blocks: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of whole sequences.

        Args:
            x: ``[batch, seqlen, hidden_size]``, packed ``[total, hidden_size]`` with cu_seqlens, or one
                sequence ``[seqlen, hidden_size]``.
            cu_seqlens: integers ``[batch + 1]``.
            max_seqlen, total_compressed: sizes of packed sequences, where they are known: without
                total_compressed a GPU is waited for, and torch.compile and graph capture need it. See
                :func:`compress`.
            cache: takes the sequences in place of what it held, for :meth:`step` to go on with.
            return_selected_blocks: also return them, int32 ``[batch, num_kv_heads, seqlen, topk]``, packed
                ``[num_kv_heads, total, topk]``.

        Returns:
            As x.
        """
        if cu_seqlens is not None:
            if x.dim() != 2:
                raise ValueError(f"x: shape {list(x.shape)}, must be [total, hidden_size] with cu_seqlens")
            cu_seqlens = cu_seqlens.to(torch.int32)
            return self._attend(x, cu_seqlens, max_seqlen, total_compressed, cache, return_selected_blocks)
        if x.dim() not in (2, 3):
            raise ValueError(
                f"x: shape {list(x.shape)}, must be [batch, seqlen, hidden_size] or [seqlen, hidden_size]"
            )
        if x.dim() == 3:
            return self._attend(x, None, max_seqlen, total_compressed, cache, return_selected_blocks)
        result = self._attend(
            x.unsqueeze(0), None, max_seqlen, total_compressed, cache, return_selected_blocks
        )
        return (result[0].squeeze(0), result[1].squeeze(0)) if return_selected_blocks else result.squeeze(0)

    def _attend(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        total_compressed: int | None,
        cache: NSACache | None,
        return_selected_blocks: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if cache is not None:
            self._check_cache(cache)
        query, key, value, gates = self._project(x)
        windows = {"compress_block": self.kernel_size, "compress_stride": self.kernel_stride}
        known = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "total_compressed": total_compressed}
        compressed_key, cu_compressed = compress(
            key,
            self._parameter("compress_key", key),
            kind=self.compress_kind,
            intra_block_pe=self._parameter("intra_block_pe", key),
            **windows,
            **known,
        )
        if cu_seqlens is not None:  # known from here on, so that it is read once
            known["total_compressed"] = compressed_key.shape[0]
        compressed_value, _ = compress(
            value, self._parameter("compress_value", value), kind=self.compress_kind, **windows, **known
        )
        raw_key = key
        if self.rope_config is not None:
            row = 0 if cu_seqlens is not None else 1
            bound = key.shape[row]
            positions, compressed_positions = (
                torch.arange(t.shape[row], device=x.device) if cu is None else locate(cu, t.shape[row])[1]
                for t, cu in ((key, cu_seqlens), (compressed_key, cu_compressed))
            )
            query, key = (self._rotate(t, positions, bound) for t in (query, key))
            # Rows beyond the last window, which total_compressed allows, count on from it: any table row will
            # do.
            compressed_positions = (compressed_positions * self.kernel_stride).clamp(max=max(bound - 1, 0))
            compressed_key = self._rotate(compressed_key, compressed_positions, bound)
        result = native_sparse_attention(
            query,
            key,
            value,
            gates,
            compressed_key=compressed_key,
            compressed_value=compressed_value,
            **windows,
            block_size=self.block_size,
            top_k=self.topk,
            init_blocks=self.init_blocks,
            local_blocks=self.local_blocks,
            window_left=self.window_size,
            cu_seqlens=cu_seqlens,
            cu_seqlens_compressed=cu_compressed,
            max_seqlen=max_seqlen,
            algorithm=self.algorithm,
            return_selected_blocks=return_selected_blocks,
        )
        if cache is not None:
            cache.fill(
                key, value, raw_key, compressed_key, compressed_value, cu_seqlens, cu_compressed, max_seqlen
            )
        out, *blocks = result if return_selected_blocks else (result,)
        out = self.proj_o(out.flatten(-2))
        return (out, *blocks) if return_selected_blocks else out

    def new_cache(self, batch: int, max_seqlen: int) -> NSACache:
        """An empty cache that fits this layer, in the dtype and on the device of its parameters."""
        return NSACache(
            batch,
            max_seqlen,
            self.num_kv_heads,
            self.head_dim,
            compress_block=self.kernel_size,
            compress_stride=self.kernel_stride,
            dtype=self.proj_k.weight.dtype,
            device=self.proj_k.weight.device,
        )

    def _check_cache(self, cache: NSACache) -> None:
        for name, ours, theirs in (
            ("compress_block", self.kernel_size, cache.compress_block),
            ("compress_stride", self.kernel_stride, cache.compress_stride),
        ):
            if ours != theirs:
                raise ValueError(f"cache: {name} {theirs}, but the layer has {ours}")

    @torch.no_grad()
    def step(self, x: Tensor, cache: NSACache) -> Tensor:
        """Attention of new tokens, which the cache takes; no gradient.

        Args:
            x: ``[batch, new, hidden_size]``, or ``[batch, hidden_size]`` for one token of each sequence.
            cache: of :meth:`new_cache`; the sequences before, of different lengths or none.

        Returns:
            As x: what :meth:`forward` over the whole sequences gives for these tokens.
        """
        if x.dim() not in (2, 3):
            raise ValueError(
                f"x: shape {list(x.shape)}, must be [batch, new, hidden_size] or [batch, hidden_size]"
            )
        self._check_cache(cache)
        query, key, value, gates = self._project(x)
        out = decode(
            query,
            key,
            value,
            gates,
            cache,
            compress_key=self._parameter("compress_key", key),
            compress_value=self._parameter("compress_value", value),
            kind=self.compress_kind,
            intra_block_pe=self._parameter("intra_block_pe", key),
            rope=self.rope_config,
            block_size=self.block_size,
            top_k=self.topk,
            init_blocks=self.init_blocks,
            local_blocks=self.local_blocks,
            window_left=self.window_size,
            algorithm="off" if self.algorithm == "auto" else self.algorithm,
        )
        return self.proj_o(out.flatten(-2))
