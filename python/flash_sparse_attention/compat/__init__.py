# SPDX-License-Identifier: Apache-2.0
"""The names and argument orders of other native sparse attention packages over the functions of this one.

``compat.fsa``: Relaxed-System-Lab/Flash-Sparse-Attention; ``compat.xunhao``:
XunhaoLai/native-sparse-attention-triton; ``compat.fla``: ``fla.ops.nsa`` of flash-linear-attention. What
differs from the originals is said in each module.
"""
