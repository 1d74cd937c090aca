"""Gated DeltaNet's decode mixer with outputs in float8, and the product of these, in CUDA C++: two launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from thalweg.ops.delta.mixer_cuda import gdn_mixer_decode_float8
from thalweg.ops.linear.fp8.matrix import multiply_float8
from thalweg.ops.toolchain.cuda_build import aligned_rows


def gdn_decode_add(
    proj_BX: Tensor,
    residual_BD: Tensor,
    apart: Callable[[Tensor, Tensor], Tensor],
    *,
    q_OD: Tensor,
    scale_OB: Tensor,
    **mixer: Any,
) -> Tensor:
    """The op: y [B, D] in bf16, of weights in e4m3 over a scale for each 128 x 128; nothing is computed `apart`."""
    y_BD = residual_BD.new_empty(len(residual_BD), len(q_OD))
    if len(y_BD):
        multiply_float8(gdn_mixer_decode_float8(proj_BX, **mixer), q_OD, scale_OB, y_BD, aligned_rows(residual_BD))
    return y_BD
