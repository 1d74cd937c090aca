"""Every op: one package each, with its contract, its reference in plain torch, and kernels where they pay.

Importing this package registers all implementations; `thalweg.ops.registry` chooses among them.
"""

from __future__ import annotations

from thalweg.ops import activation, linear, moe, moe_fp8, norm, projection, residual, sample
from thalweg.ops.attention import mla, mla_down_norms, mla_mixer
from thalweg.ops.delta import conv1d, kda, kda_mixer
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
    "mla",
    "mla_down_norms",
    "mla_mixer",
    "moe",
    "moe_fp8",
    "norm",
    "projection",
    "residual",
    "sample",
]
