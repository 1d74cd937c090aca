"""Random weights of the real shapes (--load-format dummy): to measure speed and memory without a checkpoint.

Drawn so that the model behaves like one: unit norms and zero router bias, so that routing spreads over the
experts, and decay rates of the range that training starts from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from thalweg.weights.fill import put
from thalweg.weights.plan import Init, Target

STD = 0.02  # of matrices
_E4M3_STD = 104.0  # of the numbers that the bytes 0 to 126 stand for, with either sign
_INT4_STD = 4.6  # of the numbers -8 to 7
_DRAWN_AT_ONCE = 64 << 20  # bytes of a stack, which are a few times as many while they are drawn
DT_MIN, DT_MAX = 1e-3, 0.1  # softplus(dt_bias), drawn log-uniformly
A_MIN, A_MAX = 1.0, 16.0  # exp(A_log), drawn uniformly


def fill(
    plan: Sequence[Target],
    get_param: Callable[[str], Tensor],
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fill every parameter with random values, in place.

    Each checkpoint tensor is drawn whole, on its parameter's device, from a generator seeded with (seed, its
    name), then cut: the values do not depend on the number of ranks. `progress` is called with the bytes
    filled.
    """
    drawn: tuple[str, Tensor] | None = None  # several parts of one tensor come one after another
    for target in plan:
        param = get_param(target.name).detach()
        if not target.covered:
            param.zero_()
        if target.scales:
            filled = _fill_quantized(target, get_param, seed)
            if progress is not None:
                progress(filled)
            continue
        for source in target.sources:
            if drawn is None or drawn[0] != source.name:
                drawn = None  # not two at a time
                drawn = source.name, _draw(target.init, source.shape, param.device, _seed_of(seed, source.name))
            full = drawn[1]
            if source.shard_dim is not None and source.shard is not None:
                start, stop = source.shard
                full = full.narrow(source.shard_dim, start, stop - start)
            filled = put(full, source, target, get_param)
            if progress is not None:
                progress(filled * param.element_size())


def _fill_quantized(target: Target, get_param: Callable[[str], Tensor], seed: int) -> int:
    """A weight that checkpoints store quantized: bits at random, NaN left out, under one scale that gives it the spread
    of the others. Its values depend on the number of ranks. Returns the bytes filled."""
    weight, scales = (get_param(target.name + s.suffix).detach() for s in target.parameters)
    generator = torch.Generator(weight.device).manual_seed(_seed_of(seed, target.name))
    packed, rows = weight.dtype == torch.int32, weight.view(torch.uint8)
    some = max(1, _DRAWN_AT_ONCE // max(1, rows[0].numel()))
    for part in rows.split(some) if rows.ndim == 3 else (rows,):
        random = partial(torch.randint, size=part.shape, dtype=torch.uint8, device=part.device, generator=generator)
        part.copy_(random(0, 256) if packed else random(0, 127) + random(0, 2) * 128)
    scales.fill_(STD / (_INT4_STD if packed else _E4M3_STD))
    return sum(t.numel() * t.element_size() for t in (weight, scales))


def _draw(init: Init, shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    """A float32 tensor of the distribution that `init` names."""
    values = torch.empty(shape, dtype=torch.float32, device=device)
    if init == "ones":
        return values.fill_(1)
    if init == "zeros":
        return values.zero_()
    generator = torch.Generator(device).manual_seed(seed)
    if init == "normal":
        return values.normal_(0, STD, generator=generator)
    if init == "a_log":
        return values.uniform_(A_MIN, A_MAX, generator=generator).log_()
    step = values.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator).exp_()
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus


def _seed_of(seed: int, name: str) -> int:
    """63 bits that mix the engine's seed and a tensor's name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
