# SPDX-License-Identifier: Apache-2.0
"""A Llama-style transformer over bytes: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from flash_sparse_attention import nsa
from torch import Tensor, nn

from .kinds import AttentionKind, NsaSizes, Projected

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class ModelConfig:
    dim: int = 192
    layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 512
    rope_base: float = 10_000.0
    # Query and key have biases (as in Qwen). They start such that head h of layer l looks mostly
    # start_distances[l % len][h] bytes back (None: nowhere in particular). Finding that out by itself costs
    # a byte model some thousand steps, more than a demonstration has; from here on everything is learned.
    start_distances: tuple[tuple[int | None, ...], ...] = ((1, 2, 3, 4), (1, 2, 3, None))
    start_strength: float = 4.0
    gated: bool = False
    nsa: NsaSizes | None = None

    @staticmethod
    def on(device: torch.device) -> ModelConfig:
        """A model that keeps such a device busy for a few minutes."""
        if device.type != "cuda":
            return ModelConfig()
        distances = ((1, 2, 3, 4, 5, 6, 8, 12), (1, 2, 3, 4, 6, 8, None, None))
        return ModelConfig(
            dim=512, num_heads=8, num_kv_heads=4, head_dim=64, hidden=1408, start_distances=distances
        )


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [batch, seqlen, heads, head_dim] turned by cos_sin [2, seqlen, head_dim / 2]."""
    cos, sin = cos_sin[:, None, :, None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        query_width = config.num_heads * config.head_dim
        key_width = config.num_kv_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.to_query = nn.Linear(config.dim, query_width)
        self.to_key = nn.Linear(config.dim, key_width)
        self.to_value = nn.Linear(config.dim, key_width, bias=False)
        self.to_out = nn.Linear(query_width, config.dim, bias=False)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.to_gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.to_hidden = nn.Linear(config.dim, config.hidden, bias=False)
        self.from_hidden = nn.Linear(config.hidden, config.dim, bias=False)
        if config.gated:
            self.to_alpha = nn.Linear(config.dim, config.num_heads)
            self.to_delta = nn.Linear(config.dim, config.num_kv_heads)
        if config.nsa is not None:
            window = (config.num_kv_heads, config.nsa.compress_block)
            matrices = (config.num_kv_heads, config.nsa.compress_block * config.head_dim, config.head_dim)
            self.compress_key = nn.Parameter(torch.empty(matrices))
            self.compress_value = nn.Parameter(torch.empty(matrices))
            self.compress_pe = nn.Parameter(torch.empty(*window, config.head_dim))
            self.to_branch_gates = nn.Linear(config.dim, 3 * config.num_heads)

    def project(self, x: Tensor, cos_sin: Tensor) -> Projected:
        """x [batch, seqlen, dim], cos_sin [2, seqlen, head_dim / 2]."""
        config = self.config
        normed = self.attention_norm(x)
        heads = (*x.shape[:2], -1, config.head_dim)
        query, key = self.to_query(normed).view(heads), self.to_key(normed).view(heads)
        projected = Projected(
            query=rotate(query, cos_sin),
            key=rotate(key, cos_sin),
            value=self.to_value(normed).view(heads),
        )
        if config.gated:
            projected.alpha = self.to_alpha(normed)
            projected.delta = self.to_delta(normed)
        if config.nsa is not None:
            projected.raw_query, projected.raw_key = query, key
            # Compression comes before rotation; an entry then stands at the first position of its window.
            sizes = config.nsa.compress()
            entries, _ = nsa.compress(key, self.compress_key, intra_block_pe=self.compress_pe, **sizes)
            starts = cos_sin[:, :: config.nsa.compress_stride][:, : entries.shape[1]]
            projected.compressed_key = rotate(entries, starts)
            projected.compressed_value, _ = nsa.compress(projected.value, self.compress_value, **sizes)
            projected.gates = self.to_branch_gates(normed).sigmoid().unflatten(-1, (config.num_heads, 3))
        return projected

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [batch, seqlen, dim], attended [batch, seqlen, num_heads, head_dim] -> [batch, seqlen, dim]."""
        x = x + self.to_out(attended.flatten(2))
        normed = self.mlp_norm(x)
        return x + self.from_hidden(functional.silu(self.to_gate(normed)) * self.to_hidden(normed))


class ByteLM(nn.Module):
    """Next-byte prediction. The same seed gives the same weights whatever the kind of attention, those that
    only one kind has aside."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        gate_generator = torch.Generator().manual_seed(seed + 1)
        for name, parameter in self.named_parameters():
            if name.endswith("to_alpha.bias"):
                parameter.fill_(4.0)  # with delta near -1: gates half shut, so that both ways are open
            elif name.endswith("to_delta.bias"):
                parameter.fill_(-1.0)
            elif name.endswith("to_branch_gates.bias"):
                parameter.zero_()  # every branch half open
            elif ".compress_" in name:
                self.start_as_mean(parameter, gate_generator)
            elif "to_alpha" in name or "to_delta" in name or "to_branch_gates" in name:
                parameter.normal_(0, 0.05, generator=gate_generator)
            elif name == "embedding.weight":
                parameter.normal_(0, 0.2, generator=generator)
            elif parameter.dim() > 1:
                std = 1 / math.sqrt(parameter.shape[-1])
                if name.endswith(("to_query.weight", "to_key.weight")):
                    std /= 2  # content speaks softly at first: position has the word (start_locally)
                elif name.endswith(("to_out.weight", "from_hidden.weight")):
                    std /= 2 * math.sqrt(2 * self.config.layers)
                parameter.normal_(0, std, generator=generator)
        # Logits start with a deviation of about 1; the embedding, which they share, has 0.2.
        self.norm.weight.fill_(1 / (0.2 * math.sqrt(self.config.dim)))
        for layer, block in enumerate(self.blocks):
            self.start_locally(layer, block)

    def start_as_mean(self, parameter: nn.Parameter, generator: torch.Generator) -> None:
        """A window's compressed token starts near the mean of its tokens: [num_kv_heads, window * head_dim,
        head_dim] near identities over the window's length, positions [num_kv_heads, window, head_dim] near 0."""
        config = self.config
        parameter.normal_(0, 0.02 / config.nsa.compress_block, generator=generator)
        if parameter.shape[1] != config.nsa.compress_block:
            mean = torch.eye(config.head_dim) / config.nsa.compress_block
            parameter += mean.repeat(config.nsa.compress_block, 1)

    def start_locally(self, layer: int, block: Block) -> None:
        """Sets the biases of query and key: rotated by their positions, a key bias of equal entries and a
        query bias turned back by `distance` meet at that distance. Only the faster half of the frequencies
        takes part; the slower ones hardly tell neighbours apart."""
        config = self.config
        half, fast = config.head_dim // 2, config.head_dim // 4
        frequency = config.rope_base ** (-torch.arange(fast) / half)
        query_bias = torch.zeros(config.num_heads, config.head_dim)
        key_bias = torch.zeros(config.num_kv_heads, config.head_dim)
        key_bias[:, :fast] = config.start_strength
        distances = config.start_distances[layer % len(config.start_distances)]
        for head, distance in enumerate(distances):
            if distance is not None:
                query_bias[head, :fast] = config.start_strength * torch.cos(frequency * distance)
                query_bias[head, half : half + fast] = -config.start_strength * torch.sin(
                    frequency * distance
                )
        block.to_query.bias.copy_(query_bias.flatten())
        block.to_key.bias.copy_(key_bias.flatten())

    def cos_sin(self, begin: int, end: int) -> Tensor:
        """Rotations of positions begin .. end - 1: [2, end - begin, head_dim / 2]. Angles are computed in float64:
        in float32 they would be 1e-4 off at position 2000, and decode and prefill of nsa further apart."""
        weight, half = self.embedding.weight, self.config.head_dim // 2
        steps = torch.arange(half, device=weight.device, dtype=torch.float64)
        angle = torch.arange(begin, end, device=weight.device)[:, None] * self.config.rope_base ** (
            -steps / half
        )
        return torch.stack((angle.cos(), angle.sin())).to(weight.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Last hidden states [..., dim] -> [..., 256]; embedding and output share their weights."""
        return self.norm(x) @ self.embedding.weight.T

    def forward(
        self, tokens: Tensor, attention: AttentionKind, skip_maps: list[Tensor] | None = None
    ) -> Tensor:
        """tokens int64 [batch, seqlen] -> logits [batch, seqlen, 256]; one skip map per layer is appended to
        `skip_maps` where given."""
        x = self.embedding(tokens)
        cos_sin = self.cos_sin(0, tokens.shape[1])
        for block in self.blocks:
            p = block.project(x, cos_sin)
            x = block.finish(x, attention(p, skip_maps))
        return self.logits(x)

    def loss(
        self, windows: Tensor, attention: AttentionKind, skip_maps: list[Tensor] | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats per byte of windows int64 [batch, seqlen + 1]."""
        logits = self(windows[:, :-1], attention, skip_maps)
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
