"""Puts a part of a checkpoint tensor where the plan says, stored as the target's scheme says."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from thalweg.weights.plan import Source, Target

GetParam = Callable[[str], Tensor]


def put(part: Tensor, source: Source, target: Target, get_param: GetParam) -> int:
    """Fill `source`'s place in its target from `part`, in place; returns the elements filled."""
    if target.add:
        part = part.float() + target.add
    target.scheme.put(part, source.into, [get_param(target.name + s.suffix).detach() for s in target.parameters])
    return part.numel()
