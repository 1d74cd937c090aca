"""Random mixture-of-experts inputs, and the experts' answer in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.replays import check_replays
from thalweg.ops.moe.experts import EXPERTS, Experts, ExpertsDims, sort
from thalweg.ops.registry import Where, implementations
from thalweg.quant import PLAIN, scheme_named
from thalweg.quant.fp8_blocks import quantize_experts


@dataclass
class MoeCase:
    x: Tensor
    residual: Tensor
    norm: Tensor
    router_weight: Tensor
    bias: Tensor
    weights: Tensor
    ids: Tensor
    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    num_shared: int
    scheme: str = PLAIN.name
    own: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0

    @property
    def dims(self) -> ExpertsDims:
        E, D, I = len(self.down[0]), self.x.shape[1], self.gate_up[0].shape[1] // 2
        return ExpertsDims(E=E, D=D, I=I, scheme=self.scheme, own=0 if self.own is None else self.own[1].shape[1])

    def run(self, experts: Experts, promise: bool = True, **options: Any) -> Tensor:
        """What `experts` gives, told of the shared ones if `promise`."""
        arguments = (self.x, self.weights, self.ids, self.gate_up, self.down)
        if self.own is not None:
            options |= {"own": self.own, "scale": self.scale}
        return experts(*arguments, num_shared=self.num_shared if promise else 0, **options)


def moe_case(
    T: int,
    D: int,
    I: int,
    E: int,
    k: int,
    num_shared: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    gated: bool = False,
) -> MoeCase:
    """`k` routed experts a token of `E`, and the shared ones behind them, with a gate in the router's weight if
    `gated`; the routing is random, not the router's."""
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
        draw(E + int(gated), D, scale=0.05),
        torch.randn(E, generator=g, device=device) * 0.05,
        torch.cat([weights, torch.ones(T, num_shared, device=device)], 1),
        torch.cat([routed, shared], 1),
        (draw(E + num_shared, 2 * I, D, scale=D**-0.5),),
        (draw(E + num_shared, D, I, scale=I**-0.5),),
        num_shared,
    )


def routed(
    norm_router: Callable[..., tuple[Tensor, Tensor, Tensor]],
    case: MoeCase,
    k: int,
    renormalize: bool = True,
    scale: float = 1.0,
    scoring: str = "sigmoid",
    **groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What "norm_router" gives."""
    routing: dict[str, Any] = dict(top_k=k, renormalize=renormalize, scale=scale, scoring=scoring, **groups)
    arguments = (case.x, case.norm, 1e-5, case.router_weight, case.bias)
    return norm_router(*arguments, **routing, num_shared=case.num_shared)


def implementation(name: str, scheme: str = PLAIN.name) -> Experts:
    """That implementation of "experts", wherever this runs and however many tokens there are."""
    [found] = [i for i in implementations(EXPERTS.name) if i.name == name]
    built: Experts = found.build(Where("cuda", "float32"), ExpertsDims(E=1, D=1, I=1, scheme=scheme))
    return built


def triton_experts(case: MoeCase) -> Experts:
    """The best implementation in Triton for the case's tokens, wherever this runs."""
    names = ("pairs", "tiles", "grouped")
    able = (i.name for i in implementations(EXPERTS.name) if i.name in names and len(case.x) in i.tokens(case.dims))
    return implementation(next(able), case.scheme)


def check_left_out(case: MoeCase, experts: Experts, most: float) -> None:
    """That pairs of id -1 add nothing, whatever is read for them: some, all of a token, all of the case."""
    T = len(case.x)
    g = torch.Generator().manual_seed(T)
    for share in (0.5, 1.0):
        out = torch.rand(case.ids.shape, generator=g) < share
        out[0, 0] = share == 1
        out[T // 2] = True
        out = out.to(case.x.device)
        masked = replace(case, weights=torch.where(out, 0.0, case.weights))
        expected = experts_in_float64(masked)
        masked.ids = torch.where(out, -1, case.ids)
        y = masked.run(experts, promise=False, finish=_finished)
        assert rmse_ratio(y, expected) < most if share < 1 and T > 1 else not y.any()


def _finished(
    parts: Tensor, *, weights_Tk: Tensor | None = None, own_TD: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    assert own_TD is None
    if weights_Tk is None:
        return parts
    weights_Tk1 = weights_Tk.unsqueeze(-1)
    return torch.where(weights_Tk1 != 0, parts.view(*weights_Tk.shape, -1).float() * weights_Tk1, 0.0).sum(1)


def own_beside(case: MoeCase, own_rows: tuple[int, int]) -> Experts:
    """Op "gathered_experts" in int4 as "experts" of a case without its own expert, whose part is checked."""
    from thalweg.ops.moe.experts import cuda_int4

    own, (first, count) = case.own, own_rows
    assert own is not None
    h = F.linear(case.x[first : first + count].double(), own[0].double())
    gate, up = h.chunk(2, -1)
    expected = F.linear(F.silu(gate) * up, own[1].double())

    def experts(
        x: Tensor, weights: Tensor, ids: Tensor, *stored: Any, finish: Callable[..., Tensor], num_shared: int
    ) -> Tensor:
        def finished(parts: Tensor, *, own_TD: Tensor, **others: Any) -> Tensor:
            assert rmse_ratio(own_TD, expected) < 0.005
            return finish(parts, **others)

        apart: Any = None
        return cuda_int4.gathered_experts(x, apart, weights, ids, *stored, own, finished, own_rows=own_rows)

    form: Any = experts
    return cast(Experts, form)


def in_float8(x: Tensor, columns: int | None = None) -> Tensor:
    """Rows as W8A8 has them, in float64, or each `columns` of a row with a scale of their own."""
    parts = x.float().unflatten(-1, (-1, columns or x.shape[-1]))
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=2.0**-100) / 448
    return ((parts / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).double()


def experts_in_float64(case: MoeCase, *, quantized: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """[T, D]; every expert takes every token, and the routing weights, zero where it was not chosen, pick. `quantized`
    makes what products take of x and of what goes into down, which has been rounded to x's dtype."""
    T, E = case.x.shape[0], len(case.down[0])
    weights = torch.zeros(T, E, dtype=torch.float64, device=case.x.device).scatter_(1, case.ids, case.weights.double())
    scheme = scheme_named(case.scheme)
    gate_up, down = scheme.widened(case.gate_up, 2, torch.float64), scheme.widened(case.down, 1, torch.float64)
    x = case.x.double() if quantized is None else quantized(case.x).double()
    gate, up = torch.einsum("td,eid->eti", x, gate_up.double()).chunk(2, dim=-1)
    h = F.silu(gate) * up
    h = h if quantized is None else quantized(h.to(case.x.dtype)).double()
    routed = torch.einsum("eti,edi,te->td", h, down.double(), weights)
    if case.own is None:
        return routed
    gate, up = (case.x.double() @ case.own[0].double().T).chunk(2, dim=-1)
    return case.scale * routed + (F.silu(gate) * up) @ case.own[1].double().T


def rmse_ratio(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected|| in float64; NaN, if any, stays NaN and passes no comparison."""
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def moe_case_fp8(
    T: int,
    D: int,
    I: int,
    E: int,
    k: int,
    num_shared: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    published: bool = False,
) -> MoeCase:
    """A case whose weights are in fp8: quantized as at load, with powers of two as scales; or as published, with any
    scales, here between a quarter and four times those."""
    case = moe_case(T, D, I, E, k, num_shared, dtype, device, seed)
    case.gate_up, case.down = quantize_experts(*case.gate_up, *case.down)
    case.scheme = "fp8"
    if published:
        g = torch.Generator(device).manual_seed(seed)
        for _, scales in (case.gate_up, case.down):
            scales *= 2 ** (4 * torch.rand(scales.shape, generator=g, device=device) - 2)
    return case


def moe_case_int4(
    T: int,
    D: int,
    I: int,
    E: int,
    k: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    own: int = 0,
    scale: float = 1.0,
) -> MoeCase:
    """A case whose weights are in int4, and with one more expert `own` wide whose weights are plain, if it is not 0.
    Words are random, scales of any size between a half and twice what keeps outputs near 1."""
    case = moe_case(T, D, 8, E, k, 0, dtype, device, seed)
    g = torch.Generator(device).manual_seed(seed + 1)

    def stored(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        words = torch.randint(-(2**31), 2**31, (E, rows, columns // 8), generator=g, device=device)
        scales = 2 ** (2 * torch.rand(E, rows, -(-columns // 32), generator=g, device=device) - 1)
        return words.int(), (scales * columns**-0.5 / 5).bfloat16().to(dtype)

    case.gate_up, case.down = stored(2 * I, D), stored(D, I)
    case.scheme, case.scale = "int4", scale
    if own:
        case.own = tuple(
            (torch.randn(rows, columns, generator=g, device=device) * columns**-0.5).to(dtype)
            for rows, columns in ((2 * own, D), (D, own))
        )  # type: ignore[assignment]
    return case


def check_sort(ids: Tensor, experts: int, rows: int) -> None:
    """The sort of one launch: an expert's pairs stay in order, and its blocks are cut as the Triton form cuts them."""
    groups = sort.sort_pairs(ids, experts, rows, 16)
    assert torch.equal(groups.sorted_P.long(), ids.flatten().sort(stable=True).indices)
    expected = []
    for e, count in enumerate(ids.flatten().bincount(minlength=experts).tolist()):
        blocks = -(-count // rows)
        units = -(-count // 16)
        most = -(-units // blocks) * 16 if blocks else 0
        expected += [(e, j * most, min(count - j * most, most)) for j in range(blocks)]
    firsts = [0, *ids.flatten().bincount(minlength=experts).cumsum(0).tolist()]
    found = groups.blocks_N3.tolist()
    assert found[: len(expected)] == [[e, firsts[e] + first, count] for e, first, count in expected]
    assert all(count == 0 for *_, count in found[len(expected) :])


def check_chained_in_a_graph(layers: Sequence[MoeCase], op: Experts, replays: int = 50) -> None:
    """Each kernel may start before the one ahead is done; replays must still equal a run with nothing in flight."""
    first, D = layers[0].x, layers[0].x.shape[1]

    def chain(wait: Callable[[], None]) -> Tensor:
        x = first
        for case in layers:
            case.x = F.rms_norm(x, (D,))
            x = case.run(op, residual_TD=x)
            wait()
        return x

    check_replays(chain, replays)
