"""Matrices in float8_e4m3fn with one scale for each block of 128 x 128."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.quant.blocks import BLOCK, blocks

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
LEAST_EXPONENT = -100  # of a scale: q * scale stays a normal number


def quantize(w_OD: Tensor) -> tuple[Tensor, Tensor]:
    """(q e4m3 [O, D], scales float32 [ceil(O / 128), ceil(D / 128)]) with w close to q * the scale of its block.

    A scale is the smallest power of two that brings its block within e4m3's range. A product with it is then exact,
    in bfloat16 too, and an element's rounding does not depend on what else is in its block, unless that is over 2^14
    times as large: however ranks cut a matrix, they hold the same values. The error is at most 2^-4 of an element, or
    2^-10 of the scale where that is more. A block with NaN or infinity becomes NaN.
    """
    O, D = w_OD.shape
    rows, cols = blocks(O), blocks(D)
    padded = F.pad(w_OD.float(), (0, cols * BLOCK - D, 0, rows * BLOCK - O))
    tiles = padded.view(rows, BLOCK, cols, BLOCK)
    largest = tiles.abs().amax((1, 3))
    # largest / LARGEST = m * 2^e with m in [1/2, 1), so 2^e is the power wanted, but for m = 1/2, which is one itself.
    mantissa, exponent = torch.frexp(largest / LARGEST)
    biased = (exponent - (mantissa == 0.5).int() + 127).clamp(LEAST_EXPONENT + 127, 254)
    scales = (biased << 23).view(torch.float32)  # put together from its bits: no device's pow() has a say
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    q = (tiles / scales[:, None, :, None]).to(DTYPE).view(rows * BLOCK, cols * BLOCK)
    return q[:O, :D], scales


def dequantize(q_OD: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q * the scale of its block, as [..., O, D] in `dtype`; scales are [..., ceil(O / 128), ceil(D / 128)]."""
    O, D = q_OD.shape[-2:]
    by_row = scales.repeat_interleave(BLOCK, -1)[..., :D].repeat_interleave(BLOCK, -2)[..., :O, :]
    return (q_OD.float() * by_row).to(dtype)


Weight = tuple[Tensor, ...]  # as Fp8Blocks.stored lists it


def quantize_experts(gate_up_E2ID: Tensor, down_EDI: Tensor) -> tuple[Weight, Weight]:
    """(gate_up, down) as op "experts" takes them in scheme "fp8", quantized an expert at a time."""
    (E, D, I), device = down_EDI.shape, down_EDI.device
    q_gate_up, q_down = (torch.empty(w.shape, dtype=DTYPE, device=device) for w in (gate_up_E2ID, down_EDI))
    s_gate_up = torch.empty(E, 2 * blocks(I), blocks(D), device=device)
    s_down = torch.empty(E, blocks(D), blocks(I), device=device)
    for e in range(E):
        q_down[e], s_down[e] = quantize(down_EDI[e])
        for half in range(2):
            rows, scales = slice(half * I, (half + 1) * I), slice(half * blocks(I), (half + 1) * blocks(I))
            q_gate_up[e, rows], s_gate_up[e, scales] = quantize(gate_up_E2ID[e, rows])
    return (q_gate_up, s_gate_up), (q_down, s_down)
