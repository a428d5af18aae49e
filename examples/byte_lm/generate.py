# SPDX-License-Identifier: Apache-2.0
"""Greedy text through the decode functions with a cache of keys and values, checked against prefill."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from .kinds import AttentionKind, decode
from .model import ByteLM

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
        self.used = torch.zeros(1, dtype=torch.int32, device=like.device)


def prefill(model: ByteLM, kind: AttentionKind, tokens: Tensor, cache: Cache) -> Tensor:
    """tokens int64 [1, seqlen] into the empty cache; logits [256] after the last one."""
    seqlen = tokens.shape[1]
    x, cos_sin = model.embedding(tokens), model.cos_sin(0, seqlen)
    for layer, block in enumerate(model.blocks):
        p = block.project(x, cos_sin)
        cache.key[layer, :, :seqlen] = p.key
        cache.value[layer, :, :seqlen] = p.value
        if cache.delta is not None:
            cache.delta[layer, :, :seqlen] = p.delta
        x = block.finish(x, kind(p.query, p.key, p.value, p.alpha, p.delta))
    cache.used.fill_(seqlen)
    return model.logits(x[0, -1])


def decode_step(model: ByteLM, kind: AttentionKind, token: int, position: int, cache: Cache) -> Tensor:
    """One more token at `position`; logits [256] after it."""
    x = model.embedding(torch.tensor([[token]], device=cache.key.device))
    cos_sin = model.cos_sin(position, position + 1)
    cache.used.fill_(position + 1)
    for layer, block in enumerate(model.blocks):
        p = block.project(x, cos_sin)
        cache.key[layer, :, position] = p.key[:, 0]
        cache.value[layer, :, position] = p.value[:, 0]
        alpha, delta = None, None
        if cache.delta is not None:
            cache.delta[layer, :, position] = p.delta[:, 0]
            alpha, delta = p.alpha[:, 0], cache.delta[layer]
        out = decode(kind, p.query[:, 0], cache.key[layer], cache.value[layer], cache.used, alpha, delta)
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
    cache = Cache(model, len(prompt) + count)
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
