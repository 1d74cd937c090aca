"""Puts a part of a checkpoint tensor where the plan says, stored as the target's scheme says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.quant import FP8_LINEARS
from thalweg.quant.scheme import tensor_index
from thalweg.weights.plan import Source, Target

GetParam = Callable[[str], Tensor]


def put(part: Tensor, source: Source, target: Target, get_param: GetParam) -> int:
    """Fill `source`'s place in its target from `part`, in place; returns the elements filled."""
    stored = [get_param(target.name + s.suffix).detach() for s in target.parameters]
    if not target.scales:
        if target.add:
            part = part.float() + target.add
        target.scheme.put(part, source.into, stored)
        return part.numel()
    place = stored[source in target.scales][tensor_index(source.into)]
    part = _repeated(part, source, len(place))
    if part.dtype == torch.float8_e4m3fn:  # what torch cannot move about in every way, it can as bytes
        part, place = part.view(torch.uint8), place.view(torch.uint8)
    place.copy_(part.reshape(place.shape))
    return place.numel()


def widened(part: Tensor, scales: Tensor, source: Source) -> Tensor:
    """A float8 part in float32, with the scales that were read for it."""
    assert source.scales is not None
    return FP8_LINEARS.widened([part, _repeated(scales, source.scales, len(part))], 1, torch.float32)


def _repeated(part: Tensor, source: Source, rows: int) -> Tensor:
    """`rows` rows of which each of the checkpoint's stands for several."""
    if source.repeat == 1:
        return part
    first = source.shard[0] % source.repeat if source.shard is not None and source.shard_dim == 0 else 0
    return part.repeat_interleave(source.repeat, 0)[first : first + rows]
