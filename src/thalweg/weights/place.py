"""Puts a part of a checkpoint tensor where the plan says, quantized on the way where the plan says so."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from thalweg.ops.moe_fp8.blocks import quantize
from thalweg.weights.plan import Source, Target

GetParam = Callable[[str], Tensor]


def put(part: Tensor, source: Source, target: Target, get_param: GetParam) -> int:
    """Fill `source`'s place in its target from `part`, in place; returns the elements filled.

    A quantized part is moved first and quantized where its parameter lives: no more than one part at a time is there
    in another precision.
    """
    place = get_param(target.name).detach()[source.index]
    part = part.reshape(place.shape)
    if target.dtype == "fp8":
        q, scales = quantize(part.to(place.device))
        place.copy_(q)
        get_param(target.scale_name).detach()[source.scale_index].copy_(scales)
    else:
        place.copy_(part)
    return place.numel()
