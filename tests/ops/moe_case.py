"""Random mixture-of-experts inputs, and the experts' answer in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class MoeCase:
    x: Tensor
    router_weight: Tensor
    bias: Tensor
    weights: Tensor
    ids: Tensor
    gate_up: Tensor
    down: Tensor
    num_shared: int


def moe_case(
    T: int, D: int, I: int, E: int, k: int, num_shared: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> MoeCase:
    """`k` routed experts a token of `E`, and the shared ones behind them; the routing is random, not the router's."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    routed = torch.rand(T, E, generator=g).topk(k).indices
    shared = torch.arange(E, E + num_shared).expand(T, -1)
    weights = torch.cat([torch.rand(T, k, generator=g), torch.ones(T, num_shared)], 1)
    return MoeCase(
        draw(T, D),
        draw(E, D, scale=0.05),
        torch.randn(E, generator=g).to(device) * 0.05,
        weights.to(device),
        torch.cat([routed, shared], 1).to(device),
        draw(E + num_shared, 2 * I, D, scale=D**-0.5),
        draw(E + num_shared, D, I, scale=I**-0.5),
        num_shared,
    )


def experts_in_float64(case: MoeCase) -> Tensor:
    """[T, D], one pair at a time."""
    rows = []
    for x, weights, ids in zip(case.x.double(), case.weights.double(), case.ids.tolist(), strict=True):
        y = torch.zeros_like(x)
        for weight, e in zip(weights, ids, strict=True):
            gate, up = (case.gate_up[e].double() @ x).chunk(2)
            y += weight * (case.down[e].double() @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def rmse_ratio(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected|| in float64; NaN, if any, stays NaN and passes no comparison."""
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()
