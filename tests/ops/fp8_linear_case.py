"""Random products with matrices in float8, and what they ought to give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.quant.blocks import BLOCK, blocks


@dataclass(frozen=True)
class Fp8Case:
    x_TD: Tensor  # rows have a stride
    norm_D: Tensor
    q_OD: Tensor
    scale_OB: Tensor  # no powers of two
    rest_RD: Tensor
    residual_TO: Tensor  # rows have a stride


def draw(
    T: int,
    D: int,
    O: int,
    dtype: torch.dtype,
    *,
    rest: int = 0,
    device: str = "cpu",
    norm_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Fp8Case:
    rng = torch.Generator(device).manual_seed(T + D + O + rest + 10**6 * seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    return Fp8Case(
        normal(T, D + 8).to(dtype)[:, :D],
        (1 + normal(D) / 8).to(norm_dtype or dtype),
        (normal(O, D) * 50).to(torch.float8_e4m3fn),
        torch.rand(O, blocks(D), generator=rng, device=device) * 2e-3 + 1e-5,
        normal(rest, D).to(dtype),
        normal(T, O + 3).to(dtype)[:, :O],
    )


def expected(case: Fp8Case, *, norm: bool = False, rest: bool = False, residual: Tensor | None = None) -> Tensor:
    """float64, from weights as they are stored."""
    x = case.x_TD.double()
    if norm:
        x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * case.norm_D.double()
    w = case.q_OD.double() * case.scale_OB.double().repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    y = x @ torch.cat([w, case.rest_RD.double()] if rest else [w]).T
    return y if residual is None else y + residual.double()
