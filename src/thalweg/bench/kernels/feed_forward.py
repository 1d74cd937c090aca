"""Cases of routers, experts, activations and norms, and of sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thalweg.bench.kernels.case import Arguments, Case, Draw, Setting, candidates_of
from thalweg.bench.kernels.projections import EPS
from thalweg.errors import ConfigError
from thalweg.ops.activation import SILU_AND_MUL, SiluAndMulDims
from thalweg.ops.moe.experts import EXPERTS, SCHEMES, ExpertsDims
from thalweg.ops.moe.routed import ROUTED_EXPERTS, RoutedExpertsDims
from thalweg.ops.moe.router import NORM_ROUTER, NormRouterDims
from thalweg.ops.norm import RMS_NORM, RmsNormDims
from thalweg.ops.registry import Resolver
from thalweg.ops.residual import GATED_ADD, GatedAddDims
from thalweg.ops.sample import SAMPLE, SampleDims
from thalweg.quant import INT4_EXPERTS, PLAIN, scheme_named
from thalweg.quant.fp8_blocks import quantize_experts


def norm_router(setting: Setting, dims: NormRouterDims) -> Iterator[Case]:
    E, D, k, S, es = dims.E, dims.D, dims.K, dims.S, setting.dtype.itemsize
    routing = {"top_k": k, "renormalize": True, "scale": 2.5, "num_shared": S}
    if dims.G > 1:
        routing |= {"n_group": dims.G, "topk_group": -(-dims.G // 2)}
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            draw = Draw(setting, copy)
            norm = draw(D, scale=0.1, dtype=torch.float32 if dims.norm_fp32 else None).add_(1)
            bias = draw(E, scale=0.05, dtype=torch.float32)
            return Arguments(draw(T, D), norm, EPS, draw(E + int(dims.gated), D, scale=D**-0.5), bias, **routing)

        yield Case(
            NORM_ROUTER.name,
            f"{E} experts, {size}",
            candidates_of(setting, NORM_ROUTER, dims, T),
            make,
            num_bytes=es * (2 * T * D + E * D + D) + 12 * T * (k + S),
            flops=2 * T * D * E,
            timed=setting.timed,
        )


def experts(setting: Setting, dims: ExpertsDims) -> Iterator[Case]:
    """Added to the residual, in the model's scheme, then in each other one that there are kernels for."""
    for scheme in dict.fromkeys((dims.scheme, *SCHEMES)):
        if scheme in SCHEMES:
            yield from _experts(setting, replace(dims, scheme=scheme))


def _stored(setting: Setting, dims: ExpertsDims) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(gate_up, down) as the scheme stores them: words of int4 at random, with scales that keep outputs near 1."""
    draw, (E, D, I) = Draw(setting, 0), (dims.E, dims.D, dims.I)
    shapes = (E, 2 * I, D), (E, D, I)
    if dims.scheme == INT4_EXPERTS.name:
        gate_up, down = (
            (draw.bits(*s.shape), draw(*g.shape, scale=0.2 * columns**-0.5).abs_())
            for columns, (s, g) in ((shape[-1], INT4_EXPERTS.stored(shape, 1)) for shape in shapes)
        )
        return gate_up, down
    plain = [draw(*shape, scale=shape[-1] ** -0.5) for shape in shapes]
    return ((plain[0],), (plain[1],)) if dims.scheme == PLAIN.name else quantize_experts(*plain)


def _experts(setting: Setting, dims: ExpertsDims) -> Iterator[Case]:
    """The copies share one set of weights, and each routes at random in its own way."""
    router = next((r for r in setting.model.dims(NORM_ROUTER) if r.E + r.S == dims.E), None)
    if router is None:
        raise ConfigError(f"no router of the model chooses among {dims.E} experts; leave out --op experts")
    es, (E, D, I), (k, S) = setting.dtype.itemsize, (router.E, dims.D, dims.I), (router.K, router.S)
    scheme = PLAIN if dims.scheme == PLAIN.name else scheme_named(dims.scheme)
    weights_of = _stored(setting, dims)
    own: dict[str, Any] = {}
    if dims.own:
        draw = Draw(setting, 0)
        parts = draw(2 * dims.own, D, scale=D**-0.5), draw(D, dims.own, scale=dims.own**-0.5)
        own = {"own": parts, "scale": 2.5}
    expert_bytes = 3 * D * I * scheme.bytes_per_weight(es)
    shared = f" and {S or 1} shared" if S or own else ""
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            draw, device = Draw(setting, copy), setting.device
            ids = torch.rand(T, E, generator=draw.rng, device=device).topk(k).indices
            weights = torch.rand(T, k, generator=draw.rng, device=device)
            weights = torch.cat([weights, weights.new_ones(T, S)], 1)
            ids = torch.cat([ids, torch.arange(E, E + S, device=device).expand(T, S)], 1)
            return Arguments(draw(T, D), weights, ids, *weights_of, residual_TD=draw(T, D), num_shared=S, **own)

        yield Case(
            EXPERTS.name,
            f"{k} of {E}{shared}{'' if scheme is PLAIN else f' in {scheme.name}'}, {size}",
            candidates_of(setting, EXPERTS, dims, T),
            make,
            num_bytes=expert_bytes * (S + distinct_experts(E, k, T)) + es * 3 * D * (T + dims.own),
            flops=6 * T * D * ((k + S) * I + dims.own),
            rate=scheme.rate if setting.prompts else 1.0,
            timed=setting.timed,
        )


def routed_experts(setting: Setting, dims: RoutedExpertsDims) -> Iterator[Case]:
    """In the model's scheme, beside router and experts by themselves."""
    of, (D, I), (k, S), es = dims.experts, (dims.experts.D, dims.experts.I), (dims.K, dims.S), setting.dtype.itemsize
    E, scheme = of.E - S, PLAIN if of.scheme == PLAIN.name else scheme_named(of.scheme)
    gate_up, down = _stored(setting, of)
    draw = Draw(setting, 0)
    own = (draw(2 * of.own, D, scale=D**-0.5), draw(D, of.own, scale=of.own**-0.5)) if of.own else None
    scale, resolver = 2.5 if of.own else 1.0, Resolver()
    router_dims = NormRouterDims(E=E, D=D, K=k, G=dims.G, S=S, gated=dims.gated, norm_fp32=dims.norm_fp32)
    router = resolver.resolve(NORM_ROUTER, setting.where, router_dims)
    experts = resolver.resolve(EXPERTS, setting.where, of)
    routing: dict[str, Any] = {"top_k": k, "renormalize": dims.renormalize, "num_shared": S, "scoring": dims.scoring}
    if dims.G > 1:
        routing |= {"n_group": dims.G, "topk_group": -(-dims.G // 2)}
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            draw = Draw(setting, copy)
            norm = draw(D, scale=0.1, dtype=torch.float32 if dims.norm_fp32 else None).add_(1)
            weight = draw(E + int(dims.gated), D, scale=D**-0.5)
            inputs = (norm, EPS, weight, draw(E, scale=0.05, dtype=torch.float32))

            def apart(x_TD: Tensor) -> Tensor:
                routed = router(x_TD, *inputs, scale=1.5, **routing)
                added: dict[str, Any] = {"residual_TD": x_TD, "num_shared": S, "own": own, "scale": scale}
                y_TD: Tensor = experts(*routed, gate_up, down, **added)
                return y_TD

            return Arguments(draw(T, D), apart, *inputs, gate_up, down, router_scale=1.5, own=own, scale=scale)

        expert_bytes = 3 * D * I * scheme.bytes_per_weight(es)
        yield Case(
            ROUTED_EXPERTS.name,
            f"{k} of {E}{'' if scheme is PLAIN else f' in {scheme.name}'}, {size}",
            candidates_of(setting, ROUTED_EXPERTS, dims, T),
            make,
            num_bytes=expert_bytes * (S + distinct_experts(E, k, T)) + es * (3 * D * (T + of.own) + E * D),
            flops=6 * T * D * ((k + S) * I + of.own),
            timed=setting.timed,
        )


def distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """How many of `experts` the tokens choose between them, on average, where each chooses top_k at random."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def silu_and_mul(setting: Setting, dims: SiluAndMulDims) -> Iterator[Case]:
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            return Arguments(Draw(setting, copy)(T, 2 * dims.I))

        candidates = candidates_of(setting, SILU_AND_MUL, dims, T)
        num_bytes = 3 * setting.dtype.itemsize * T * dims.I
        label = f"{dims.I} wide, {size}"
        yield Case(SILU_AND_MUL.name, label, candidates, make, num_bytes=num_bytes, timed=setting.timed)


def rms_norm(setting: Setting, dims: RmsNormDims) -> Iterator[Case]:
    D, es = dims.D, setting.dtype.itemsize
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(draw(T, D), draw(D, scale=0.1).add_(1), EPS)

        candidates, num_bytes = candidates_of(setting, RMS_NORM, dims, T), es * D * (2 * T + 1)
        yield Case(RMS_NORM.name, f"{D} wide, {size}", candidates, make, num_bytes=num_bytes, timed=setting.timed)


def gated_add(setting: Setting, dims: GatedAddDims) -> Iterator[Case]:
    D, es = dims.D, setting.dtype.itemsize
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(draw(T, D), draw(T, D), draw(T, 3)[:, 2:])

        candidates, num_bytes = candidates_of(setting, GATED_ADD, dims, T), es * T * (3 * D + 1)
        yield Case(GATED_ADD.name, f"{D} wide, {size}", candidates, make, num_bytes=num_bytes, timed=setting.timed)


def sample(setting: Setting, dims: SampleDims) -> Iterator[Case]:
    V, device = dims.V, setting.device
    for B, _, size in setting.calls():

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            seeds: Tensor = draw.order(B)
            return Arguments(draw(B, V, scale=3.0), torch.ones(B, device=device), seeds, torch.full_like(seeds, copy))

        candidates, num_bytes = candidates_of(setting, SAMPLE, dims, B), B * V * setting.dtype.itemsize
        yield Case(SAMPLE.name, f"{V} logits, {size}", candidates, make, num_bytes=num_bytes, timed=setting.timed)
