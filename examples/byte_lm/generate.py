# SPDX-License-Identifier: Apache-2.0
"""Greedy text through the decode functions with a cache of keys and values, checked against prefill."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from flash_sparse_attention import nsa
from torch import Tensor

from .kinds import AttentionKind, Projected, decode, decode_native_sparse
from .model import Block, ByteLM

TIE = 1e-4  # logits closer than this are equal: which of them wins is a matter of rounding


class Cache:
    """Keys, values and (gated) delta of every layer, [1, capacity, num_kv_heads, head_dim], filled from the
    front."""

    def __init__(self, model: ByteLM, capacity: int):
        config, like = model.config, model.embedding.weight
        shape = (config.layers, 1, capacity, config.num_kv_heads)
        # NaN in the unused part: were it ever read, no token would survive.
        self.key = like.new_full((*shape, config.head_dim), float("nan"))
        self.value = like.new_full((*shape, config.head_dim), float("nan"))
        self.delta = like.new_full(shape, float("nan")) if config.gated else None

    def fill(self, layer: int, p: Projected) -> None:
        """Takes a layer's prompt."""
        self.put(layer, slice(0, p.key.shape[1]), p)

    def put(self, layer: int, rows: slice, p: Projected) -> None:
        self.key[layer, :, rows] = p.key
        self.value[layer, :, rows] = p.value
        if self.delta is not None:
            self.delta[layer, :, rows] = p.delta

    def attend(self, kind: AttentionKind, layer: int, block: Block, position: int, p: Projected) -> Tensor:
        """out [1, num_heads, head_dim] of one more token, which the cache takes first."""
        self.put(layer, slice(position, position + 1), p)
        used = torch.tensor([position + 1], dtype=torch.int32, device=self.key.device)
        alpha, delta = None, None
        if self.delta is not None:
            alpha, delta = p.alpha[:, 0], self.delta[layer]
        return decode(kind, p.query[:, 0], self.key[layer], self.value[layer], used, alpha, delta)


class NativeSparseCache:
    """The same for native sparse attention, by the library's own cache of each layer."""

    def __init__(self, model: ByteLM, capacity: int):
        config, device = model.config, model.embedding.weight.device
        assert config.nsa is not None
        shape = (1, capacity, config.num_kv_heads, config.head_dim)
        self.layers = [
            nsa.NSACache(*shape, **config.nsa.compress(), device=device) for _ in range(config.layers)
        ]
        self.rope = nsa.RopeConfig(config.head_dim, rope_theta=config.rope_base)

    def fill(self, layer: int, p: Projected) -> None:
        self.layers[layer].fill(p.key, p.value, p.raw_key, p.compressed_key, p.compressed_value)

    def attend(self, kind: AttentionKind, layer: int, block: Block, position: int, p: Projected) -> Tensor:
        return decode_native_sparse(
            kind,
            p,
            self.layers[layer],
            compress_key=block.compress_key,
            compress_value=block.compress_value,
            intra_block_pe=block.compress_pe,
            rope=self.rope,
        )[:, 0]


def make_cache(model: ByteLM, capacity: int) -> Cache | NativeSparseCache:
    return (Cache if model.config.nsa is None else NativeSparseCache)(model, capacity)


def prefill(model: ByteLM, kind: AttentionKind, tokens: Tensor, cache: Cache | NativeSparseCache) -> Tensor:
    """tokens int64 [1, seqlen] into the empty cache; logits [256] after the last one."""
    x, cos_sin = model.embedding(tokens), model.cos_sin(0, tokens.shape[1])
    for layer, block in enumerate(model.blocks):
        p = block.project(x, cos_sin)
        cache.fill(layer, p)
        x = block.finish(x, kind(p))
    return model.logits(x[0, -1])


def decode_step(
    model: ByteLM, kind: AttentionKind, token: int, position: int, cache: Cache | NativeSparseCache
) -> Tensor:
    """One more token at `position`; logits [256] after it."""
    x = model.embedding(torch.tensor([[token]], device=model.embedding.weight.device))
    cos_sin = model.cos_sin(position, position + 1)
    for layer, block in enumerate(model.blocks):
        out = cache.attend(kind, layer, block, position, block.project(x, cos_sin))
        x = block.finish(x, out[:, None])
    return model.logits(x[0, 0])


@dataclass
class Sample:
    prompt: bytes
    generated: bytes
    tokens_per_second: float  # decode alone
    logits: Tensor  # [tokens, 256], those from which each token was taken


@torch.no_grad()
def generate(model: ByteLM, kind: AttentionKind, prompt: Tensor, count: int) -> Sample:
    """`count` greedy tokens after prompt int64 [length]; the first from prefill, the others from decode."""
    cache = make_cache(model, len(prompt) + count)
    logits = [prefill(model, kind, prompt[None], cache)]
    tokens = [int(logits[0].argmax())]
    begin = time.perf_counter()
    while len(tokens) < count:
        logits.append(decode_step(model, kind, tokens[-1], len(prompt) + len(tokens) - 1, cache))
        tokens.append(int(logits[-1].argmax()))
    seconds = time.perf_counter() - begin
    return Sample(bytes(prompt.tolist()), bytes(tokens), (count - 1) / seconds, torch.stack(logits))


@dataclass
class DecodeCheck:
    tokens: int
    equal: int  # tokens that are prefill's choice too
    ties: int  # others, whose logit in prefill is within TIE of the best
    logit_error: float  # largest difference between a logit of decode and prefill's

    @property
    def passed(self) -> bool:
        # NaN logits would choose the same token everywhere.
        return self.equal + self.ties == self.tokens and math.isfinite(self.logit_error)


@torch.no_grad()
def check_against_prefill(model: ByteLM, kind: AttentionKind, sample: Sample) -> DecodeCheck:
    """Prefill over prompt and generated tokens at once must choose every token that decode chose."""
    tokens = torch.tensor(list(sample.prompt + sample.generated), device=sample.logits.device)
    count = len(sample.generated)
    logits = model(tokens[None, :-1], kind)[0, -count:]  # [count, 256]
    chosen = tokens[-count:]
    equal = logits.argmax(-1) == chosen
    gap = logits.amax(-1) - logits.gather(1, chosen[:, None])[:, 0]
    return DecodeCheck(
        tokens=count,
        equal=int(equal.sum()),
        ties=int((~equal & (gap <= TIE)).sum()),
        logit_error=(logits - sample.logits).abs().max().item(),
    )


def agreement(first: bytes, second: bytes) -> int:
    """How many leading tokens two samples share."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def make_prompt(held_out: Tensor, length: int) -> Tensor:
    """About `length` bytes from the middle of the held-out text, int64, whole lines."""
    middle = len(held_out) // 2
    text = bytes(held_out[middle - length // 2 : middle + length // 2].tolist())
    begin, end = text.find(b"\n") + 1, text.rfind(b"\n") + 1
    if end - begin < length // 2:  # lines longer than that: take what there is
        begin, end = 0, len(text)
    return torch.tensor(list(text[begin:end]))
