# SPDX-License-Identifier: Apache-2.0
"""The kinds of attention that the example compares, behind one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import flash_sparse_attention as fsa
import torch
import torch.nn.functional as functional
from flash_sparse_attention import nsa
from torch import Tensor

NAMES = ("torch", "dense", "threshold", "gated", "nsa")
CPU_ONLY = ("nsa",)


def attention_dtype(device: torch.device) -> torch.dtype:
    """What attention computes in beside a float32 model: GPU kernels take 16-bit elements only."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass
class Projected:
    """What one layer hands to attention; [batch, seqlen, heads, head_dim], alpha and delta [batch, seqlen,
    heads]; for nsa compressed key and value [batch, windows, num_kv_heads, head_dim], the gates of its branches
    [batch, seqlen, num_heads, 3], and query and key before their rotation, as decode takes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor | None = None
    delta: Tensor | None = None
    compressed_key: Tensor | None = None
    compressed_value: Tensor | None = None
    gates: Tensor | None = None
    raw_query: Tensor | None = None
    raw_key: Tensor | None = None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Projected:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Projected(**{name: None if t is None else function(t) for name, t in tensors.items()})

    def leaves(self) -> Projected:
        """The same values as attention takes them, as tensors that gradients stop at."""
        dtype = attention_dtype(self.query.device)
        return self.mapped(lambda tensor: tensor.detach().to(dtype).requires_grad_())


@dataclass(frozen=True)
class NsaSizes:
    """Sizes of native sparse attention, in bytes of text: a compressed token stands for about a line."""

    compress_block: int = 32
    compress_stride: int = 16
    block_size: int = 64
    top_k: int = 8
    init_blocks: int = 1
    local_blocks: int = 2
    window_left: int = 128

    def compress(self) -> dict[str, int]:
        return {"compress_block": self.compress_block, "compress_stride": self.compress_stride}

    def select(self) -> dict[str, int]:
        """The arguments of nsa.compressed_attention."""
        return {name: size for name, size in asdict(self).items() if name != "window_left"}


@dataclass(frozen=True)
class AttentionKind:
    """Causal attention over many queries.

    torch      torch.nn.functional.scaled_dot_product_attention
    dense      flash_sparse_attention.attention
    threshold  the same, skipping tiles in which no probability reaches threshold / visible keys
    gated      with gates log sigmoid(alpha_i delta_j) inside the logits, skipping tiles whose best gate lies
               below gate_threshold times the best gate nearer to the diagonal; 0 skips none
    nsa        native sparse attention: gated sum of attention over compressed tokens, over the blocks of keys
               that score best there, and over a sliding window
    """

    name: str
    threshold: float | None = None  # None: the argument is not given
    gate_threshold: float = 0.0
    sizes: NsaSizes = NsaSizes()  # of nsa alone

    @property
    def gated(self) -> bool:
        return self.name == "gated"

    @property
    def native_sparse(self) -> bool:
        return self.name == "nsa"

    @property
    def sparse(self) -> bool:
        """Whether tiles are skipped."""
        return (self.threshold or 0) > 0 or self.gate_threshold > 0

    def without_skipping(self) -> AttentionKind:
        """What this kind approximates: dense attention, or gates alone; nsa skips no tiles."""
        return self if self.native_sparse else AttentionKind("gated" if self.gated else "dense")

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
        if self.native_sparse:
            sizes = ", ".join(f"{name}={size}" for name, size in asdict(self.sizes).items())
            return f"nsa.native_sparse_attention({sizes})"
        options = [f"{name}={value}" for name, value in self.options().items()]
        return f"attention({', '.join(['alpha', 'delta', *options] if self.gated else options)})"

    def __call__(self, p: Projected, skip_maps: list[Tensor] | None = None) -> Tensor:
        """out [batch, seqlen, num_heads, head_dim], of query's dtype.

        Appends the call's skip map to `skip_maps` where one is given (not for torch and nsa, which have none).
        """
        dtype = attention_dtype(p.query.device)
        return self.attend(p.mapped(lambda tensor: tensor.to(dtype)), skip_maps).to(p.query.dtype)

    def attend(self, p: Projected, skip_maps: list[Tensor] | None) -> Tensor:
        query, key, value = p.query, p.key, p.value
        if self.name == "torch":
            heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
            out = functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)
        if self.native_sparse:
            return nsa.native_sparse_attention(
                query,
                key,
                value,
                p.gates,
                compressed_key=p.compressed_key,
                compressed_value=p.compressed_value,
                **asdict(self.sizes),
            )
        options = self.options()
        if self.gated:
            options.update(alpha=p.alpha, delta=p.delta)
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


def decode_native_sparse(
    kind: AttentionKind, p: Projected, cache: nsa.NSACache, **parameters: Tensor | nsa.RopeConfig
) -> Tensor:
    """out [batch, new, num_heads, head_dim] of new tokens, which the cache takes first. parameters: those of the
    layer, as nsa.decode names them."""
    sizes = {name: size for name, size in asdict(kind.sizes).items() if name not in kind.sizes.compress()}
    return nsa.decode(p.raw_query, p.raw_key, p.value, p.gates, cache, **parameters, **sizes)


def decode_function(kind: AttentionKind) -> str:
    """Name of the function that decoding calls."""
    if kind.native_sparse:
        return "nsa.decode"
    family = "gated" if kind.gated else "dense" if kind.threshold is None else "sparse"
    return f"flash_{family}_attn_with_kvcache_func"


def explain(kind: AttentionKind, p: Projected) -> dict:
    """Which backend and kernel compute this kind for such tensors; raises what attention would raise."""
    if kind.name == "torch":
        return {"backend": "torch", "kernel": "scaled_dot_product_attention"}
    p = p.leaves()
    if kind.native_sparse:
        found = explain_selected(kind, p)["forward"]
        return {"backend": str(found["backend"]), "kernel": str(found["kernel"])}
    gates = {"alpha": p.alpha, "delta": p.delta} if kind.gated else {}
    found = fsa.explain(p.query, p.key, p.value, **kind.options(), **gates)
    return {"backend": str(found["backend"]), "kernel": str(found["kernel"])}


def explain_selected(kind: AttentionKind, p: Projected) -> dict:
    """What nsa.explain says of the selected branch, forward and backward, for such tensors."""
    batch, seqlen, num_kv_heads, _ = p.key.shape
    blocks = torch.zeros(
        (batch, num_kv_heads, seqlen, kind.sizes.top_k), dtype=torch.int32, device=p.key.device
    )
    return nsa.explain(p.query, p.key, p.value, blocks, block_size=kind.sizes.block_size)


def kept_tiles(skip_map: Tensor, seqlen: int, head_dim: int) -> Tensor:
    """int32 [batch, num_heads, row_tiles, words] -> bool [batch, num_heads, row_tiles, key_tiles]."""
    _, keys = fsa.skip_tile(head_dim)
    bits = (skip_map.long().unsqueeze(-1) >> torch.arange(32, device=skip_map.device)) & 1
    return bits.flatten(-2)[..., : -(-seqlen // keys)].bool()


def kept_fractions(skip_map: Tensor, seqlen: int, head_dim: int) -> list[float]:
    """Kept / visible tiles of each head of one skip map, causal self-attention over `seqlen` tokens."""
    skip_map = skip_map.cpu()
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
