"""Every op: one package each, with its contract, its reference in plain torch, and kernels where they pay.

Importing this package registers all implementations; `thalweg.ops.registry` chooses among them.
"""

from __future__ import annotations

from thalweg.ops import (
    activation,
    all_gather,
    all_reduce,
    embedding,
    linear,
    norm,
    projection,
    residual,
    sample,
    swiglu,
)
from thalweg.ops.attention import gqa, mla, mla_down_norms, mla_mixer, mla_rope
from thalweg.ops.delta import gdn, gdn_decode_add, kda_mixer
from thalweg.ops.linear import fp8
from thalweg.ops.moe import exchange, experts, router
from thalweg.ops.registry import Choice, Op, Resolver, Tokens, Where

__all__ = [
    "Choice",
    "Op",
    "Resolver",
    "Tokens",
    "Where",
    "activation",
    "all_gather",
    "all_reduce",
    "embedding",
    "exchange",
    "experts",
    "fp8",
    "gdn",
    "gdn_decode_add",
    "gqa",
    "kda_mixer",
    "linear",
    "mla",
    "mla_down_norms",
    "mla_mixer",
    "mla_rope",
    "norm",
    "projection",
    "residual",
    "router",
    "sample",
    "swiglu",
]
