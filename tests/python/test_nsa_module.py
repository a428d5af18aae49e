# SPDX-License-Identifier: Apache-2.0
"""The layer, its rotation, and decoding, which must give what the whole sequence gives."""

from __future__ import annotations

import math
from typing import Any

import flash_sparse_attention as fsa
import nsa_oracle as oracle
import pytest
import torch
from flash_sparse_attention import nsa
from torch import Tensor, nn

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "hidden_size": 24,
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "topk": 4,
    "init_blocks": 1,
    "local_blocks": 2,
    "window_size": 12,
}
GATES = pytest.mark.parametrize("gate_mode", ["per_token", "per_head"])
KINDS = pytest.mark.parametrize("compress_kind", ["linear", "weighted", "mean"])


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> nsa.NativeSparseAttention:
    torch.manual_seed(seed)
    layer = nsa.NativeSparseAttention(**{**SIZES, **changes}, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():  # logits of more than a few hundredths
            parameter.mul_(2.0)
    return layer


def hidden(seed: int, *rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*rows, SIZES["hidden_size"], generator=generator, dtype=torch.float64).to(dtype)


def cumulative(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# ---- the layer ---------------------------------------------------------------------------------------------


def test_parameters_are_those_of_fsa():
    layer = nsa.NativeSparseAttention(**SIZES)
    expected = {
        "proj_q.weight": (32, 24),
        "proj_k.weight": (16, 24),
        "proj_v.weight": (16, 24),
        "proj_o.weight": (24, 32),
        "compress_key": (2, 64, 8),
        "compress_value": (2, 64, 8),
        "intra_block_pe": (2, 8, 8),
        "gate.0.weight": (3, 24),
    }
    assert {n: tuple(p.shape) for n, p in layer.state_dict().items()} == expected
    for name, shape in expected.items():
        bound = math.sqrt(6 / (math.prod(shape[1:]) + shape[0] * math.prod(shape[2:])))
        largest = float(layer.state_dict()[name].abs().max())
        assert 0.8 * bound < largest <= bound, f"{name}: {largest}, bound {bound}"
    state = {n: torch.randn(shape) for n, shape in expected.items()}
    layer.load_state_dict(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])


@KINDS
@GATES
@pytest.mark.parametrize("rope", [None, LLAMA3, "off"], ids=["default", "llama3", "no_rope"])
def test_layer_is_its_formula(gate_mode: str, compress_kind: str, rope: Any):
    """Every step of it with the oracle's parts, in float64."""
    rotation = {"use_rope": False} if rope == "off" else {"rope_config": nsa.RopeConfig(8, 10000.0, rope)}
    layer = make(1, gate_mode=gate_mode, compress_kind=compress_kind, **rotation)
    x = hidden(2, 75)
    out, blocks = layer(x, return_selected_blocks=True)
    state = layer.state_dict()
    q, k, v = ((x @ state[f"proj_{n}.weight"].T).view(75, -1, 8) for n in ("q", "k", "v"))
    parts = [
        oracle.compress(t, compress_kind, state.get(f"compress_{n}"), pe, 8, 4)
        for t, n, pe in ((k, "key", state["intra_block_pe"]), (v, "value", None))
    ]
    if rope != "off":
        frequencies = layer.rope_config.frequencies()
        q, k = (oracle.rope(t, list(range(75)), frequencies) for t in (q, k))
        parts[0] = oracle.rope(parts[0], [4 * i for i in range(parts[0].shape[0])], frequencies)
    compressed, _, probabilities = oracle.attend(q, *parts, oracle.compressed_mask(75, 75, 8, 4), None)
    scores = oracle.block_scores(probabilities, 75, 2, 8, 4, 16)
    truth = oracle.select(scores, 75, 16, 4, 1, 2)
    assert oracle.assert_same_selection(blocks, scores, truth, 1e-6) <= 1
    selected, _, _ = oracle.attend(q, k, v, oracle.selected_mask(blocks, 75, 16), None)
    sliding, _, _ = oracle.attend(q, k, v, oracle.sliding_mask(75, 75, 12), None)
    gates = torch.sigmoid(x @ state["gate.0.weight"].T)
    if gate_mode == "per_head":
        gates = torch.stack([gates[:, [3 * h, 3 * h + 1, 3 * h + 2]] for h in range(4)], 1)
    expected = oracle.combine(compressed, selected, sliding, gates).flatten(1) @ state["proj_o.weight"].T
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=5e-6)  # 6e-8 of float32 tables, times logits


def test_packed_batched_and_single_agree():
    layer = make(3, torch.float32)
    x = hidden(4, 2, 50, dtype=torch.float32)
    batched = layer(x)
    packed = layer(x.flatten(0, 1), cumulative(50, 50))
    torch.testing.assert_close(packed.view(2, 50, -1), batched, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x[0]), batched[0], rtol=1e-5, atol=1e-6)
    known = layer(x.flatten(0, 1), cumulative(50, 50).long(), max_seqlen=60, total_compressed=30)
    torch.testing.assert_close(known, packed, rtol=0, atol=0)


def test_every_parameter_gets_a_gradient():
    layer = make(5, torch.float32)
    x = hidden(6, 90, dtype=torch.float32).requires_grad_()
    layer(x, cumulative(60, 0, 30)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("lengths", [(0,), (1,), (7,), (8, 0, 3), ()], ids=str)
def test_short_sequences(lengths: tuple[int, ...]):
    layer = make(7, torch.float32)
    x = hidden(8, sum(lengths), dtype=torch.float32).requires_grad_()
    out = layer(x, cumulative(*lengths))
    assert out.shape == x.shape and out.isfinite().all()
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_autocast():
    layer = make(9, torch.float32)
    x = hidden(10, 1, 60, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.compress_key.grad.dtype == torch.float32


# ---- rotation ----------------------------------------------------------------------------------------------


def test_rope():
    x = hidden(11, 20, 3)[..., :10]
    for scaling in (None, {**LLAMA3, "original_max_position_embeddings": 40}):
        config = nsa.RopeConfig(10, 100.0, scaling)
        positions = torch.arange(20) * 3
        turned = nsa.apply_rope(x, positions, config, bound=58)
        expected = oracle.rope(x, positions.tolist(), config.frequencies())
        torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)
    leaf = x.float().clone().requires_grad_()
    grad = torch.randn(20, 3, 10, generator=torch.Generator().manual_seed(12))
    (back,) = torch.autograd.grad(nsa.apply_rope(leaf, positions, config, bound=58), leaf, grad)
    torch.testing.assert_close(
        back, oracle.rope(grad, (-positions).tolist(), config.frequencies()), rtol=1e-5, atol=1e-5
    )


def test_rope_frequencies():
    assert nsa.RopeConfig(4, 100.0).frequencies() == (1.0, 0.1)
    plain = nsa.RopeConfig(128).frequencies()
    llama3 = nsa.RopeConfig(128, 500000.0, {**LLAMA3, "original_max_position_embeddings": 8192}).frequencies()
    for frequency, scaled in zip(plain, llama3, strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            assert scaled == frequency
        elif wavelength > 8192:
            assert scaled == pytest.approx(frequency / 8, rel=1e-12)
        else:
            assert frequency / 8 < scaled < frequency


def test_rope_far_away():
    """Angles are exact at positions where float32 steps are radians long."""
    config = nsa.RopeConfig(2, 10.0)
    for position in (1, 1_000_001):
        turned = nsa.apply_rope(
            torch.tensor([[[1.0, 0.0]]]), torch.tensor([position]), config, bound=position + 1
        )
        expected = torch.tensor([math.cos(position), math.sin(position)])
        torch.testing.assert_close(turned[0, 0], expected, rtol=0, atol=1e-6)


# ---- decoding ----------------------------------------------------------------------------------------------


def projections(layer: nsa.NativeSparseAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = layer.state_dict()
    q, k, v = ((x @ state[f"proj_{n}.weight"].T).unflatten(-1, (-1, layer.head_dim)) for n in ("q", "k", "v"))
    return q, k, v, layer.gate(x)


def decode_blocks(layer: nsa.NativeSparseAttention, x: Tensor, cache: nsa.NSACache) -> Tensor:
    """What layer.step does, and returns the blocks."""
    _, blocks = nsa.decode(
        *projections(layer, x),
        cache,
        compress_key=layer.compress_key,
        compress_value=layer.compress_value,
        intra_block_pe=layer.intra_block_pe,
        rope=layer.rope_config,
        block_size=layer.block_size,
        top_k=layer.topk,
        init_blocks=layer.init_blocks,
        local_blocks=layer.local_blocks,
        window_left=layer.window_size,
        return_selected_blocks=True,
    )
    return blocks


def selection_of_prefill(
    layer: nsa.NativeSparseAttention, x: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """The oracle's scores for one sequence, and the layer's blocks."""
    q, k, _, _ = projections(layer, x)
    compressed = oracle.compress(k, "linear", layer.compress_key, layer.intra_block_pe, 8, 4)
    frequencies = layer.rope_config.frequencies()
    tokens = x.shape[0]
    q = oracle.rope(q, list(range(tokens)), frequencies)
    compressed = oracle.rope(compressed, [4 * i for i in range(compressed.shape[0])], frequencies)
    _, _, probabilities = oracle.attend(
        q, compressed, compressed, oracle.compressed_mask(tokens, tokens, 8, 4), None
    )
    return oracle.block_scores(probabilities, tokens, 2, 8, 4, 16), blocks


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize("new", [1, 3])
@torch.no_grad()
def test_steps_give_what_the_whole_sequence_gives(new: int, dtype: torch.dtype, tolerance: float):
    """From nothing, over boundaries of strides (4), windows (8) and blocks (16): indices and outputs."""
    layer = make(21, dtype, rope_config=nsa.RopeConfig(8, 1000.0))
    x = hidden(22, 2, 84, dtype=dtype)
    expected, blocks = layer(x, return_selected_blocks=True)
    cache, other = layer.new_cache(2, 84), layer.new_cache(2, 84)
    outs, chosen = [], []
    for start in range(0, 84, new):
        tokens = x[:, start : start + new]
        outs.append(layer.step(tokens[:, 0], cache).unsqueeze(1) if new == 1 else layer.step(tokens, cache))
        chosen.append(decode_blocks(layer, tokens, other))
    assert cache.seqlens.tolist() == [84, 84]
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=tolerance, atol=tolerance)
    ours = torch.cat(chosen, 2)
    rtol = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    wide = make(21, torch.float64, rope_config=nsa.RopeConfig(8, 1000.0))
    wide.load_state_dict({n: p.double() for n, p in layer.state_dict().items()})
    for b in range(2):
        scores, truth = selection_of_prefill(wide, x[b].double(), blocks[b])
        different = oracle.assert_same_selection(ours[b], scores, truth, rtol)
        assert different == 0 or dtype == torch.bfloat16 and different <= 8, f"{different} rows differ"


@KINDS
@torch.no_grad()
def test_sequences_of_different_lengths(compress_kind: str):
    """A packed prefill, then steps of one and of three tokens for all of them."""
    layer = make(23, torch.float32, compress_kind=compress_kind, gate_mode="per_head")
    lengths, new = (37, 0, 64, 5, 16), (1, 1, 3, 1, 3, 3)
    whole = [hidden(24 + i, n + sum(new), dtype=torch.float32) for i, n in enumerate(lengths)]
    cache = layer.new_cache(5, 80)
    x = torch.cat([w[:n] for w, n in zip(whole, lengths, strict=True)])
    prefill = layer(x, cumulative(*lengths), cache=cache)
    torch.testing.assert_close(prefill, layer(x, cumulative(*lengths)), rtol=0, atol=0)
    assert cache.seqlens.tolist() == list(lengths)
    done = 0
    outs = []
    for count in new:
        tokens = torch.stack([w[n + done : n + done + count] for w, n in zip(whole, lengths, strict=True)])
        outs.append(layer.step(tokens, cache))
        done += count
    for i, (w, n) in enumerate(zip(whole, lengths, strict=True)):
        expected = layer(w)[n:]
        torch.testing.assert_close(torch.cat(outs, 1)[i], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_batched_prefill_and_reset():
    layer = make(31, torch.float32)
    x = hidden(32, 3, 41, dtype=torch.float32)
    cache = layer.new_cache(3, 41)
    for _ in range(2):
        layer(x[:, :30], cache=cache)
        outs = [
            layer.step(x[:, 30:37], cache),
            *(layer.step(x[:, i], cache).unsqueeze(1) for i in range(37, 41)),
        ]
        torch.testing.assert_close(torch.cat(outs, 1), layer(x)[:, 30:], rtol=1e-5, atol=1e-5)
        cache.reset()
    assert cache.seqlens.tolist() == [0, 0, 0]


@torch.no_grad()
def test_a_whole_sequence_as_one_step():
    layer = make(33, torch.float32)
    x = hidden(34, 2, 70, dtype=torch.float32)
    torch.testing.assert_close(layer.step(x, layer.new_cache(2, 70)), layer(x), rtol=1e-5, atol=1e-5)


def test_step_has_no_gradient():
    layer = make(35, torch.float32)
    assert not layer.step(hidden(36, 2, dtype=torch.float32), layer.new_cache(2, 4)).requires_grad


# ---- it learns what a window cannot ------------------------------------------------------------------------


class Windowed(nn.Module):
    """The layer with its sliding branch alone."""

    def __init__(self, layer: nsa.NativeSparseAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, _ = self.layer._project(x)
        out = fsa.attention(query, key, value, causal=True, window_size=(self.layer.window_size, 0))
        return self.layer.proj_o(out.flatten(-2))


class Model(nn.Module):
    def __init__(self, windowed: bool) -> None:
        super().__init__()
        sizes = {**SIZES, "hidden_size": 32, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16, "topk": 3}
        layers = [nsa.NativeSparseAttention(**{**sizes, "window_size": 7}) for _ in range(2)]
        self.embedding = nn.Embedding(17, 32)
        self.layers = nn.ModuleList(Windowed(a) if windowed else a for a in layers)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.head = nn.Linear(32, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return self.head(self.norms[2](x[:, -QUESTIONS:]))


QUESTIONS = 16


def needles(generator: torch.Generator, batch: int, tokens: int = 96) -> tuple[Tensor, Tensor]:
    """Noise 0 to 7, somewhere the needle 8 + answer four times, and questions at the end. Two layers of
    windows reach 14 tokens back; the needle ends 18 before the first question, or earlier."""
    text = torch.randint(8, (batch, tokens), generator=generator)
    answer = torch.randint(8, (batch,), generator=generator)
    place = torch.randint(tokens - QUESTIONS - 20, (batch,), generator=generator)
    for i in range(4):
        text[torch.arange(batch), place + i] = 8 + answer
    text[:, -QUESTIONS:] = 16
    return text, answer[:, None].expand(-1, QUESTIONS)


def accuracy_after_training(windowed: bool, steps: int) -> float:
    torch.manual_seed(41)
    model = Model(windowed)
    generator = torch.Generator().manual_seed(42)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        text, answer = needles(generator, 16)
        loss = nn.functional.cross_entropy(model(text).flatten(0, 1), answer.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        text, answer = needles(torch.Generator().manual_seed(43), 100)
        return float((model(text).argmax(-1) == answer).float().mean())


def test_retrieves_a_needle():
    assert accuracy_after_training(windowed=False, steps=80) > 0.9
    assert accuracy_after_training(windowed=True, steps=40) < 0.3  # one in eight by chance
