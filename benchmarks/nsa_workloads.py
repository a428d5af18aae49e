# SPDX-License-Identifier: Apache-2.0
"""Native sparse attention as it is timed: a whole layer beside dense attention, and its selected branch alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import flash_sparse_attention as fsa
import measure
import torch
from flash_sparse_attention import nsa
from measure import Call
from torch import Tensor
from workloads import set_threads

COMPRESS = {"compress_block": 32, "compress_stride": 16}
BLOCK_SIZE = 64
SELECT = {**COMPRESS, "block_size": BLOCK_SIZE, "top_k": 16, "init_blocks": 1, "local_blocks": 2}
WINDOW_LEFT = 512
HEAD_DIM = 64
TOPIC_TOKENS = 512  # of the clustered selection: so many neighbours are about the same

LAYER_HEADS = (4, 4)  # query heads, key heads
LAYER_LENGTHS = (4096, 8192, 16384, 32768)
# Group -> query heads, key heads, tokens: about the same work of dense attention.
SELECTED_SHAPES = {1: (4, 4, 16384), 4: (4, 1, 16384), 16: (16, 1, 8192)}
SELECTIONS = ("random", "clustered")


def with_backward(function: Callable[..., Tensor], leaves: list[Tensor], grad_out: Tensor) -> Call:
    def call() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))

    return call


def backward_alone(function: Callable[..., Any], leaves: list[Tensor]) -> Call:
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [torch.ones_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)


class Layer:
    """Query, key and value to output, float32, one sequence: what stands between the projections of a layer.

    nsa compresses keys and values with weights of its own and takes gates; dense is our own causal attention.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        generator = torch.Generator().manual_seed(0)
        heads, kv_heads = LAYER_HEADS

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).requires_grad_()

        self.query = random(1, tokens, heads, HEAD_DIM)
        self.key, self.value = (random(1, tokens, kv_heads, HEAD_DIM) for _ in range(2))
        window = COMPRESS["compress_block"]
        scale = (window * HEAD_DIM) ** -0.5
        self.weights = [
            (random(kv_heads, window * HEAD_DIM, HEAD_DIM).detach() * scale).requires_grad_()
            for _ in range(2)
        ]
        self.pe = random(kv_heads, window, HEAD_DIM)
        self.gates = torch.rand(1, tokens, 3, generator=generator).requires_grad_()
        self.grad_out = torch.randn(self.query.shape, generator=generator)

    def compress(
        self, key: Tensor, value: Tensor, key_weight: Tensor, value_weight: Tensor, pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        compressed_key, _ = nsa.compress(key, key_weight, intra_block_pe=pe, **COMPRESS)
        compressed_value, _ = nsa.compress(value, value_weight, **COMPRESS)
        return compressed_key, compressed_value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> Tensor:
        """others: the weights of keys and values, pe, gates."""
        *weights, gates = others
        compressed_key, compressed_value = self.compress(key, value, *weights)
        return nsa.native_sparse_attention(
            query,
            key,
            value,
            gates,
            compressed_key=compressed_key,
            compressed_value=compressed_value,
            window_left=WINDOW_LEFT,
            **SELECT,
        )

    def nsa(self) -> Call:
        leaves = [self.query, self.key, self.value, *self.weights, self.pe, self.gates]
        return with_backward(self.attend, leaves, self.grad_out)

    def dense(self) -> Call:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return fsa.attention(query, key, value, causal=True)

        return with_backward(attend, [self.query, self.key, self.value], self.grad_out)

    def parts(self) -> dict[tuple[str, str], Call]:
        """Calls of every part, forward and backward, by (part, direction)."""
        with torch.no_grad():
            entries = self.compress(self.key, self.value, *self.weights, self.pe)
            _, _, blocks = nsa.compressed_attention(self.query, *entries, **SELECT)
        compressed = [t.detach().requires_grad_() for t in entries]
        states = [self.query, self.key, self.value]
        branches = [torch.randn_like(self.query).requires_grad_() for _ in range(3)]

        def compressed_and_selection(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return nsa.compressed_attention(query, key, value, **SELECT)[0]

        def selected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return nsa.selected_attention(query, key, value, blocks, block_size=BLOCK_SIZE)

        def sliding(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return fsa.attention(query, key, value, causal=True, window_size=(WINDOW_LEFT, -1))

        functions = {
            "compress": (self.compress, [self.key, self.value, *self.weights, self.pe]),
            "compressed, selection": (compressed_and_selection, [self.query, *compressed]),
            "selected": (selected, states),
            "sliding": (sliding, states),
            "gated sum": (nsa.combine, [*branches, self.gates]),
        }
        calls: dict[tuple[str, str], Call] = {}
        for name, (function, leaves) in functions.items():
            calls[name, "forward"] = forward_alone(function, leaves)
            calls[name, "backward"] = backward_alone(function, leaves)
        return calls


def forward_alone(function: Callable[..., Any], leaves: list[Tensor]) -> Call:
    """Forward as training calls it: it keeps what the backward needs."""
    return lambda: function(*leaves)


class Selected:
    """The selected branch with blocks that the compressed scores of its own queries and keys choose.

    random: independent normal queries and keys. clustered: runs of TOPIC_TOKENS neighbours share a topic, so
    that neighbours select alike.
    """

    def __init__(self, group: int, selection: str) -> None:
        heads, kv_heads, self.tokens = SELECTED_SHAPES[group]
        self.heads = heads
        generator = torch.Generator().manual_seed(1)
        shapes = [(1, self.tokens, heads, HEAD_DIM), *[(1, self.tokens, kv_heads, HEAD_DIM)] * 2]
        query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
        if selection == "clustered":
            topics = torch.randn(self.tokens // TOPIC_TOKENS // 4, HEAD_DIM, generator=generator)
            runs = torch.randint(len(topics), (self.tokens // TOPIC_TOKENS,), generator=generator)
            topic = topics[runs].repeat_interleave(TOPIC_TOKENS, 0)[None, :, None]
            query, key = query + topic, key + topic
        compressed_key, _ = nsa.compress(key, kind="mean", **COMPRESS)
        compressed_value, _ = nsa.compress(value, kind="mean", **COMPRESS)
        _, _, self.blocks = nsa.compressed_attention(query, compressed_key, compressed_value, **SELECT)
        self.leaves = [t.requires_grad_() for t in (query, key, value)]

    def pairs(self) -> int:
        """Visible (query, key) pairs of one query head, mean over key heads."""
        position = torch.arange(self.tokens)[:, None]
        visible = (position + 1 - BLOCK_SIZE * self.blocks).clamp(0, BLOCK_SIZE)
        return int((visible * (self.blocks >= 0)).sum()) // self.blocks.shape[1]

    def flops(self, direction: str, pairs: int) -> float:
        return 4.0 * HEAD_DIM * self.heads * pairs * (2.5 if direction == "backward" else 1.0)

    def calls(self, direction: str) -> dict[str, Call]:
        def selected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return nsa.selected_attention(query, key, value, self.blocks, block_size=BLOCK_SIZE)

        def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return fsa.attention(query, key, value, causal=True)

        alone = forward_alone if direction == "forward" else backward_alone
        return {"selected": alone(selected, self.leaves), "dense": alone(dense, self.leaves)}


def _layer_memory(tokens: int, threads: int) -> int | None:
    set_threads(threads)
    small = Layer(256)  # code, thread pool, scratch of the threads
    small.nsa()()
    return measure.peak_extra_bytes(Layer(tokens).nsa())


def layer_memory(tokens: int, threads: int) -> int | None:
    """Peak bytes of forward and backward beyond inputs, output and gradients, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_layer_memory, (tokens, threads))
