# SPDX-License-Identifier: Apache-2.0
"""The kinds of attention that the example compares, behind one call."""

from __future__ import annotations

from dataclasses import dataclass

import flash_sparse_attention as fsa
import torch
import torch.nn.functional as functional
from torch import Tensor

NAMES = ("torch", "dense", "threshold", "gated")


@dataclass(frozen=True)
class AttentionKind:
    """Causal attention over many queries.

    torch      torch.nn.functional.scaled_dot_product_attention
    dense      flash_sparse_attention.attention
    threshold  the same, skipping tiles in which no probability reaches threshold / visible keys
    gated      with gates log sigmoid(alpha_i delta_j) inside the logits, skipping tiles whose best gate lies
               below gate_threshold times the best gate nearer to the diagonal; 0 skips none
    """

    name: str
    threshold: float | None = None  # None: the argument is not given
    gate_threshold: float = 0.0

    @property
    def gated(self) -> bool:
        return self.name == "gated"

    @property
    def sparse(self) -> bool:
        return (self.threshold or 0) > 0 or self.gate_threshold > 0

    def without_skipping(self) -> AttentionKind:
        """What this kind approximates: dense attention, or gates alone."""
        return AttentionKind("gated" if self.gated else "dense")

    def under(self, threshold: float) -> AttentionKind:
        """The same logits, with tiles skipped by `threshold` alone."""
        return AttentionKind("gated" if self.gated else "threshold", threshold=threshold)

    def options(self) -> dict:
        """Keyword arguments of flash_sparse_attention.attention, tensors aside."""
        options: dict = {"causal": True}
        if self.threshold is not None:
            options["threshold"] = self.threshold
        if self.gated:
            options.update(gate_threshold=self.gate_threshold, adaptive_gate=False)
        return options

    def describe(self) -> str:
        if self.name == "torch":
            return "torch.nn.functional.scaled_dot_product_attention(is_causal=True, enable_gqa=True)"
        options = [f"{name}={value}" for name, value in self.options().items()]
        return f"attention({', '.join(['alpha', 'delta', *options] if self.gated else options)})"

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor | None = None,
        delta: Tensor | None = None,
        skip_maps: list[Tensor] | None = None,
    ) -> Tensor:
        """query [batch, seqlen, num_heads, head_dim], key and value [batch, seqlen, num_kv_heads, head_dim],
        alpha [batch, seqlen, num_heads], delta [batch, seqlen, num_kv_heads] -> out as query.

        Appends the call's skip map to `skip_maps` where one is given (not for torch, which has none).
        """
        if self.name == "torch":
            heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
            out = functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)
        options = self.options()
        if self.gated:
            options.update(alpha=alpha, delta=delta)
        if skip_maps is None:
            return fsa.attention(query, key, value, **options)
        out, skip_map = fsa.attention(query, key, value, return_skip_map=True, **options)
        skip_maps.append(skip_map)
        return out


def make_kind(name: str, options: dict) -> AttentionKind:
    """The kind `name` as a run with these options trains it."""
    return AttentionKind(
        name,
        threshold=options["threshold"] if name == "threshold" else None,
        gate_threshold=options["gate_threshold"] if name == "gated" else 0.0,
    )


def decode(
    kind: AttentionKind,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqused_k: Tensor,
    alpha: Tensor | None = None,
    delta_cache: Tensor | None = None,
) -> Tensor:
    """One query [batch, num_heads, head_dim] over caches [batch, capacity, num_kv_heads, head_dim] of which
    seqused_k int32 [batch] entries are in use, by the library's decode function for this kind -> out as
    query. alpha [batch, num_heads] and delta_cache [batch, capacity, num_kv_heads] are for gated alone.
    torch has no decode function and takes the dense one.
    """
    if kind.gated:
        return fsa.flash_gated_attn_with_kvcache_func(
            query,
            key_cache,
            value_cache,
            alpha,
            delta_cache,
            softmax_threshold=kind.threshold or 0.0,  # None would mean 1
            gate_threshold=kind.gate_threshold,
            seqused_k=seqused_k,
        )
    if kind.threshold is not None:
        return fsa.flash_sparse_attn_with_kvcache_func(
            query, key_cache, value_cache, softmax_threshold=kind.threshold, seqused_k=seqused_k
        )
    return fsa.flash_dense_attn_with_kvcache_func(query, key_cache, value_cache, seqused_k=seqused_k)


def decode_function(kind: AttentionKind) -> str:
    """Name of the function that decode() calls."""
    family = "gated" if kind.gated else "dense" if kind.threshold is None else "sparse"
    return f"flash_{family}_attn_with_kvcache_func"


def explain(
    kind: AttentionKind, query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, delta: Tensor
) -> dict:
    """Which backend and kernel compute this kind for such tensors; raises what attention would raise."""
    if kind.name == "torch":
        return {"backend": "torch", "kernel": "scaled_dot_product_attention"}
    gates = {"alpha": alpha, "delta": delta} if kind.gated else {}
    found = fsa.explain(query, key, value, **kind.options(), **gates)
    return {"backend": str(found["backend"]), "kernel": str(found["kernel"])}


def kept_tiles(skip_map: Tensor, seqlen: int, head_dim: int) -> Tensor:
    """int32 [batch, num_heads, row_tiles, words] -> bool [batch, num_heads, row_tiles, key_tiles]."""
    _, keys = fsa.skip_tile(head_dim)
    bits = (skip_map.long().unsqueeze(-1) >> torch.arange(32, device=skip_map.device)) & 1
    return bits.flatten(-2)[..., : -(-seqlen // keys)].bool()


def kept_fractions(skip_map: Tensor, seqlen: int, head_dim: int) -> list[float]:
    """Kept / visible tiles of each head of one skip map, causal self-attention over `seqlen` tokens."""
    return [
        fsa.kept_fraction(
            skip_map[:, head : head + 1].contiguous(),
            seqlen_q=seqlen,
            seqlen_k=seqlen,
            head_dim=head_dim,
            causal=True,
        )
        for head in range(skip_map.shape[1])
    ]
