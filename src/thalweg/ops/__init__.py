"""Every op: one package each, with its contract, its reference in plain torch, and kernels where they pay.

Importing this package registers all implementations; `thalweg.ops.registry` chooses among them.
"""

from __future__ import annotations

from thalweg.ops import (
    activation,
    conv1d,
    kda,
    kda_mixer,
    linear,
    mla_attention,
    mla_down_norms,
    mla_mixer,
    moe,
    moe_fp8,
    norm,
    projection,
    residual,
    sample,
)
from thalweg.ops.registry import Choice, OpContext, Resolver

__all__ = [
    "Choice",
    "OpContext",
    "Resolver",
    "activation",
    "conv1d",
    "kda",
    "kda_mixer",
    "linear",
    "mla_attention",
    "mla_down_norms",
    "mla_mixer",
    "moe",
    "moe_fp8",
    "norm",
    "projection",
    "residual",
    "sample",
]
