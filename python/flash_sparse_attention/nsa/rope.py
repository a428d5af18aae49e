# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: halves of the head rotated against each other ("half-split", as in GPT-NeoX).

Element i of the first half and i of the second are one pair, turned by ``position * frequency_i`` with
``frequency_i = rope_theta^(-2 i / head_dim)``. Angles are computed in float64, their cosines and sines kept
in float32, and the rotation done in float32 (float64 for float64 tensors).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..ops import is_plain

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Which rotation.

    Args:
        head_dim: of the heads that are rotated; even.
        rope_theta: the base of the frequencies.
        rope_scaling: None, or ``{"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings"}``: frequencies whose wavelength is longer than
            ``original / low_freq_factor`` are divided by factor, those below ``original / high_freq_factor``
            stay, and between the two the change is gradual. ``{"rope_type": "default"}`` is None.
        max_position_embeddings: the longest context the model is meant for. Angles are defined beyond it, and
            nothing is cut off there.
    """

    head_dim: int
    rope_theta: float = 500000.0
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int = 131072

    def __post_init__(self) -> None:
        if not isinstance(self.head_dim, int) or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim: {self.head_dim!r}, must be an even number for the rotation of halves"
            )
        if not self.rope_theta > 0 or math.isinf(self.rope_theta):
            raise ValueError(f"rope_theta: {self.rope_theta!r}, must be a positive number")
        if self.rope_type not in ("default", "llama3"):
            raise NotImplementedError(
                f"rope_scaling: rope_type {self.rope_type!r}, but 'default' and 'llama3' are supported"
            )
        if self.rope_type == "llama3":
            missing = [n for n in _LLAMA3 if n not in self.rope_scaling]
            if missing:
                raise ValueError(f"rope_scaling: {missing[0]!r} is missing, which rope_type 'llama3' needs")
            if not self.rope_scaling["low_freq_factor"] < self.rope_scaling["high_freq_factor"]:
                raise ValueError(
                    f"rope_scaling: low_freq_factor {self.rope_scaling['low_freq_factor']} must be below "
                    f"high_freq_factor {self.rope_scaling['high_freq_factor']}"
                )

    @property
    def rope_type(self) -> str:
        if self.rope_scaling is None:
            return "default"
        return self.rope_scaling.get("rope_type", self.rope_scaling.get("type", "default"))

    def frequencies(self) -> tuple[float, ...]:
        """Radians per position of each pair: head_dim / 2 of them."""
        plain = [self.rope_theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)]
        if self.rope_type == "default":
            return tuple(plain)
        factor, low, high, original = (float(self.rope_scaling[n]) for n in _LLAMA3)

        def scaled(frequency: float) -> float:
            turns = original * frequency / (2 * math.pi)  # in the context of the first training
            smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
            return (1 - smooth) * frequency / factor + smooth * frequency

        return tuple(scaled(f) for f in plain)


_tables: dict[tuple, tuple[Tensor, Tensor]] = {}


def _cos_sin_of(config: RopeConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    frequencies = torch.tensor(config.frequencies(), dtype=torch.float64, device=positions.device)
    angles = positions.to(torch.float64)[..., None] * frequencies
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)


def cos_sin(config: RopeConfig, positions: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """float32 ``[*positions, head_dim / 2]`` each; every position is below ``bound``."""
    if not is_plain((positions,)):  # under torch.compile, which fuses it, or without memory
        return _cos_sin_of(config, positions)
    key = (config.frequencies(), positions.device)
    table = _tables.get(key)
    if table is None or table[0].shape[0] < bound:
        rows = torch.arange(1 << max(10, (bound - 1).bit_length()), device=positions.device)
        table = _tables[key] = _cos_sin_of(config, rows)  # one for all layers
    return table[0][positions], table[1][positions]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    turned = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Its gradient is the rotation by the opposite angle, so x need not be kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def apply_rope(x: Tensor, positions: Tensor, config: RopeConfig, *, bound: int) -> Tensor:
    """x rotated; differentiable.

    Args:
        x: ``[..., heads, head_dim]``.
        positions: integers ``[...]``, of the rows of x; they broadcast against x's leading dimensions.
        config: see :class:`RopeConfig`.
        bound: a number above every position, known on the host: how long the table of angles must be.
    """
    if x.shape[-1] != config.head_dim:
        raise ValueError(f"rope: head_dim {config.head_dim}, but the heads have head_dim {x.shape[-1]}")
    cos, sin = (t[..., None, :] for t in cos_sin(config, positions, bound))
    return _Rotate.apply(x, cos, sin)
