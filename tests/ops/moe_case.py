"""Random mixture-of-experts inputs, and the experts' answer in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.moe import ExpertsDims
from thalweg.ops.registry import Where, implementations
from thalweg.quant.fp8_blocks import dequantize, quantize_experts


@dataclass
class MoeCase:
    x: Tensor
    residual: Tensor
    norm: Tensor
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
    g = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

    routed = torch.rand(T, E, generator=g, device=device).topk(k).indices
    shared = torch.arange(E, E + num_shared, device=device).expand(T, -1)
    weights = torch.rand(T, k, generator=g, device=device)
    return MoeCase(
        draw(T, D),
        draw(T, D),
        1 + draw(D, scale=0.2),
        draw(E, D, scale=0.05),
        torch.randn(E, generator=g, device=device) * 0.05,
        torch.cat([weights, torch.ones(T, num_shared, device=device)], 1),
        torch.cat([routed, shared], 1),
        draw(E + num_shared, 2 * I, D, scale=D**-0.5),
        draw(E + num_shared, D, I, scale=I**-0.5),
        num_shared,
    )


def routed(
    norm_router: Callable[..., tuple[Tensor, Tensor, Tensor]],
    case: MoeCase,
    k: int,
    renormalize: bool = True,
    scale: float = 1.0,
    scoring: str = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor]:
    """What "norm_router" gives, without groups."""
    routing: dict[str, Any] = dict(top_k=k, renormalize=renormalize, scale=scale, scoring=scoring)
    arguments = (case.x, case.norm, 1e-5, case.router_weight, case.bias)
    return norm_router(*arguments, **routing, num_shared=case.num_shared)


def triton_experts(op: str, tokens: int) -> Callable[..., Tensor]:
    """The best implementation of the experts in Triton for as many tokens, wherever this runs."""
    dims = ExpertsDims(E=1, D=1, I=1)
    names = ("pairs", "tiles", "grouped")
    best = next(i for i in implementations(op) if i.name in names and tokens in i.tokens(dims))
    built: Callable[..., Tensor] = best.build(Where("cuda", "float32"), dims)
    return built


def experts_in_float64(case: MoeCase) -> Tensor:
    """[T, D]; every expert takes every token, and the routing weights, zero where it was not chosen, pick."""
    T, E = case.x.shape[0], case.down.shape[0]
    weights = torch.zeros(T, E, dtype=torch.float64, device=case.x.device).scatter_(1, case.ids, case.weights.double())
    gate, up = torch.einsum("td,eid->eti", case.x.double(), case.gate_up.double()).chunk(2, dim=-1)
    return torch.einsum("eti,edi,te->td", F.silu(gate) * up, case.down.double(), weights)


def rmse_ratio(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected|| in float64; NaN, if any, stays NaN and passes no comparison."""
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def moe_case_fp8(
    T: int, D: int, I: int, E: int, k: int, num_shared: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[MoeCase, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A case whose weights are what fp8 holds, and those weights in fp8: gate_up and its scales, down and its."""
    case = moe_case(T, D, I, E, k, num_shared, dtype, device, seed)
    quantized = q_gate_up, s_gate_up, q_down, s_down = quantize_experts(case.gate_up, case.down)
    halves = dequantize(q_gate_up.unflatten(1, (2, -1)), s_gate_up.unflatten(1, (2, -1)), dtype)
    case.gate_up, case.down = halves.flatten(1, 2), dequantize(q_down, s_down, dtype)
    return case, quantized
