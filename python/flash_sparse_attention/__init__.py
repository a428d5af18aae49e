# SPDX-License-Identifier: Apache-2.0
"""Exact, threshold-sparse and gated attention: forward, backward and decode."""

from . import _C, nsa
from .block_mask import BlockMask
from .flash_attn import flash_attn_func, flash_attn_varlen_func
from .functional import (
    attention,
    backends,
    explain,
    kept_fraction,
    merge_attention_states,
    num_threads,
    prefill,
    set_num_threads,
    skip_tile,
    window_sizes_heuristic,
)
from .variants import (
    flash_dense_attn_func,
    flash_dense_attn_varlen_func,
    flash_dense_attn_varlen_with_kvcache_func,
    flash_dense_attn_with_kvcache_func,
    flash_gated_attn_func,
    flash_gated_attn_varlen_func,
    flash_gated_attn_varlen_with_kvcache_func,
    flash_gated_attn_with_kvcache_func,
    flash_sparse_attn_func,
    flash_sparse_attn_varlen_func,
    flash_sparse_attn_varlen_with_kvcache_func,
    flash_sparse_attn_with_kvcache_func,
)

__version__: str = _C.version()

__all__ = [
    "BlockMask",
    "__version__",
    "attention",
    "backends",
    "explain",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_dense_attn_func",
    "flash_dense_attn_varlen_func",
    "flash_dense_attn_varlen_with_kvcache_func",
    "flash_dense_attn_with_kvcache_func",
    "flash_gated_attn_func",
    "flash_gated_attn_varlen_func",
    "flash_gated_attn_varlen_with_kvcache_func",
    "flash_gated_attn_with_kvcache_func",
    "flash_sparse_attn_func",
    "flash_sparse_attn_varlen_func",
    "flash_sparse_attn_varlen_with_kvcache_func",
    "flash_sparse_attn_with_kvcache_func",
    "kept_fraction",
    "merge_attention_states",
    "nsa",
    "num_threads",
    "prefill",
    "set_num_threads",
    "skip_tile",
    "window_sizes_heuristic",
]
