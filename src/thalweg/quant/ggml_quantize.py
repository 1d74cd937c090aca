"""Numbers to GGML's blocks, in plain torch: float32 [N, elements of a block] to uint8 [N, bytes of a block].

Scales are found by rounding, and by least squares over a few candidates for K types, each held to what the block
decodes to. llama.cpp searches likewise; its choices differ here and there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.quant.ggml_blocks import PLAIN_DTYPES
from thalweg.quant.ggml_types import GgmlType

_STEPS = 9  # candidates of a scale: from below to above what brings the largest element to the largest number


def quantize(values_ND: Tensor, kind: GgmlType) -> Tensor:
    """uint8 rows [N, bytes of a row] of numbers [N, D]. Raises KeyError for a type that is read only."""
    if kind.is_plain:
        return values_ND.to(PLAIN_DTYPES[kind.name]).contiguous().view(torch.uint8)
    blocks = values_ND.float().reshape(-1, kind.elements)
    return _ENCODERS[kind.name](blocks).view(len(values_ND), -1)


def _half(x: Tensor) -> tuple[Tensor, Tensor]:
    """float16 [N, 1] as two bytes, and what it is then."""
    half = x.half()
    return half.view(torch.uint8), half.float()


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, and 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, x / torch.where(scale == 0, 1.0, scale))


def _pairs(q: Tensor) -> Tensor:
    """[N, 2, n] numbers of four bits, low and high nibbles, to [N, n] bytes."""
    return (q[:, 0] | q[:, 1] << 4).to(torch.uint8)


def _q8_0(x: Tensor) -> Tensor:
    bytes_, d = _half(x.abs().amax(1, keepdim=True) / 127)
    q = _over(x, d).round().clamp(-128, 127).to(torch.int8)
    return torch.cat([bytes_, q.view(torch.uint8)], dim=1)


def _signed_scale(x: Tensor, largest: int) -> Tensor:
    """What takes the element furthest from 0 to -largest, [N, 1]."""
    return x.gather(1, x.abs().argmax(1, keepdim=True)) / -largest


def _q4_0(x: Tensor) -> Tensor:
    bytes_, d = _half(_signed_scale(x, 8))
    q = (_over(x, d) + 8).round().clamp(0, 15).to(torch.uint8)
    return torch.cat([bytes_, _pairs(q.view(-1, 2, 16))], dim=1)


def _q5_0(x: Tensor) -> Tensor:
    bytes_, d = _half(_signed_scale(x, 16))
    q = (_over(x, d) + 16).round().clamp(0, 31).to(torch.uint8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=x.device)
    high = ((q >> 4).view(-1, 4, 8) * weights).sum(-1, dtype=torch.uint8)
    return torch.cat([bytes_, high, _pairs((q & 15).view(-1, 2, 16))], dim=1)


def _affine_scales(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """(scale, min >= 0), each [N, S, 1], with x [N, S, 32] close to scale * q - min for q from 0 to `largest`: the best
    of several, each refitted to its own q."""
    low = x.amin(-1, keepdim=True).clamp(max=0)
    width = x.amax(-1, keepdim=True) - low
    best = torch.full_like(width, torch.inf)
    scale, minimum = width / largest, -low
    for step in range(_STEPS):
        q = (_over(x - low, width) * (largest - 1 + 0.25 * step)).round().clamp(0, largest)
        # Least squares of x on q and 1.
        n, sq, sqq = x.shape[-1], q.sum(-1, keepdim=True), q.square().sum(-1, keepdim=True)
        sx, sxq = x.sum(-1, keepdim=True), (x * q).sum(-1, keepdim=True)
        determinant = n * sqq - sq.square()
        a = _over(n * sxq - sx * sq, determinant)
        b = _over(sqq * sx - sq * sxq, determinant)
        above = b > 0  # a minimum is subtracted: then the line goes through 0
        a, b = torch.where(above, _over(sxq, sqq), a), torch.where(above, 0.0, b)
        error = (a * q + b - x).square().sum(-1, keepdim=True)
        better = (error < best) & (a > 0)
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, a, scale), torch.where(better, -b, minimum)
    return scale, minimum.clamp(min=0)


def _packed_scales(scales: Tensor, mins: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits, [N, 8] each, as twelve bytes."""
    s, m = scales.to(torch.uint8), mins.to(torch.uint8)
    a = s[:, :4] | (s[:, 4:] >> 4) << 6
    b = m[:, :4] | (m[:, 4:] >> 4) << 6
    c = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    return torch.cat([a, b, c], dim=1)


def _affine(x: Tensor, largest: int) -> tuple[list[Tensor], Tensor]:
    """d, dmin and packed scales of 256 elements in eight sub-blocks, and the numbers [N, 8, 32]."""
    x = x.view(-1, 8, 32)
    scale, minimum = _affine_scales(x, largest)
    d_bytes, d = _half(scale.amax(1) / 63)
    dmin_bytes, dmin = _half(minimum.amax(1) / 63)
    scales = _over(scale.squeeze(-1), d).round().clamp(0, 63)
    mins = _over(minimum.squeeze(-1), dmin).round().clamp(0, 63)
    q = _over(x + (dmin * mins).unsqueeze(-1), (d * scales).unsqueeze(-1)).round().clamp(0, largest)
    return [d_bytes, dmin_bytes, _packed_scales(scales, mins)], q.to(torch.uint8)


def _q4_k(x: Tensor) -> Tensor:
    head, q = _affine(x, 15)
    return torch.cat([*head, _pairs(q.view(-1, 2, 32)).view(len(x), 128)], dim=1)


def _q5_k(x: Tensor) -> Tensor:
    head, q = _affine(x, 31)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=x.device)
    high = ((q >> 4) * weights[:, None]).sum(1, dtype=torch.uint8)
    return torch.cat([*head, high, _pairs((q & 15).view(-1, 2, 32)).view(len(x), 128)], dim=1)


def _symmetric_scales(x: Tensor, largest: int) -> Tensor:
    """Scales [N, S, 1] with x [N, S, 16] close to scale * q for q from -largest to largest - 1, of either sign."""
    furthest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best = torch.full_like(furthest, torch.inf)
    scale = furthest / -largest
    for step in range(_STEPS):
        q = _over(x, furthest / (-largest + 1 - 0.25 * step)).round().clamp(-largest, largest - 1)
        a = _over((x * q).sum(-1, keepdim=True), q.square().sum(-1, keepdim=True))
        error = (a * q - x).square().sum(-1, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, a, scale)
    return scale


def _q6_k(x: Tensor) -> Tensor:
    x = x.view(-1, 16, 16)
    scale = _symmetric_scales(x, 32).squeeze(-1)
    d_bytes, d = _half(_signed_scale(scale, 128))
    scales = _over(scale, d).round().clamp(-128, 127)
    q = (_over(x, (d * scales).unsqueeze(-1)).round().clamp(-32, 31) + 32).to(torch.uint8)
    halves = q.view(-1, 2, 4, 32)  # of each half of a block four runs of 32
    low = _pairs((halves & 15).reshape(-1, 2, 64)).view(len(x), 128)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=x.device)[:, None]
    high = ((halves >> 4) << shifts).sum(2, dtype=torch.uint8).view(len(x), 64)
    return torch.cat([low, high, scales.to(torch.int8).view(torch.uint8), d_bytes], dim=1)


_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
WRITTEN = ("F32", "F16", "BF16", *_ENCODERS)
