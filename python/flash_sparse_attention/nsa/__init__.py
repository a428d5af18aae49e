# SPDX-License-Identifier: Apache-2.0
"""Native sparse attention (NSA, arXiv 2502.11089): compressed, selected and sliding attention, gated
together."""

from .cache import NSACache, decode
from .functional import (
    combine,
    compress,
    compressed_attention,
    explain,
    native_sparse_attention,
    profile,
    selected_attention,
)
from .module import NativeSparseAttention
from .rope import RopeConfig, apply_rope

__all__ = [
    "NSACache",
    "NativeSparseAttention",
    "RopeConfig",
    "apply_rope",
    "combine",
    "compress",
    "compressed_attention",
    "decode",
    "explain",
    "native_sparse_attention",
    "profile",
    "selected_attention",
]
