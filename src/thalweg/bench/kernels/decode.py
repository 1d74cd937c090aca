"""Cases of the decode suite: the launches of a decode step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from thalweg.bench.kernels.case import Arguments, Builder, Case, Draw, Setting, candidates_of
from thalweg.bench.kernels.shape import distinct_experts
from thalweg.ops.attention.mla_mixer import MLA_MIXER_DECODE, MlaMixerDims
from thalweg.ops.delta.kda_mixer import KDA_MIXER_DECODE, KdaMixerDims
from thalweg.ops.linear import LINEAR, LINEAR_ADD, NORM_LINEAR, LinearDims, NormLinearDims
from thalweg.ops.moe.experts import EXPERTS, ExpertsDims
from thalweg.ops.moe.router import NORM_ROUTER, NormRouterDims
from thalweg.ops.norm import RMS_NORM, RmsNormDims
from thalweg.ops.sample import SAMPLE, SampleDims
from thalweg.quant import PLAIN, Scheme, scheme_named
from thalweg.quant.fp8_blocks import quantize_experts

EPS, BLOCK_SIZE = 1e-5, 64
ROUTED_SCALE = 2.446


def linear(setting: Setting) -> Iterator[Case]:
    yield from _projections(setting, "linear")


def norm_linear(setting: Setting) -> Iterator[Case]:
    yield from _projections(setting, "norm_linear")


def linear_add(setting: Setting) -> Iterator[Case]:
    yield from _projections(setting, "linear_add")


def _projections(setting: Setting, name: str) -> Iterator[Case]:
    s, es = setting.shape, setting.dtype.itemsize
    inner = s.heads * s.head_dim
    of_a_norm: dict[str, tuple[int, tuple[int, ...]]] = {
        "KDA in": (s.width, s.kda_parts),
        "MLA in": (s.width, s.mla_parts),
        "dense gate, up": (s.width, (s.dense, s.dense)),
        "head": (s.width, (s.vocab,)),
    }
    added: dict[str, tuple[int, tuple[int, ...]]] = {
        "mixer out": (inner, (s.width,)),
        "dense down": (s.dense, (s.width,)),
    }
    shapes = {"norm_linear": of_a_norm, "linear_add": added}.get(name, of_a_norm | added)
    for what, (D, parts) in shapes.items():
        O = sum(parts)
        for B in setting.batch_sizes:

            def make(copy: int, B: int = B, D: int = D, O: int = O) -> Arguments:
                draw = Draw(setting, copy)
                x, w = draw(B, D), draw(O, D, scale=D**-0.5)
                if name == "norm_linear":
                    return Arguments(x, draw(D, scale=0.1).add_(1), EPS, w)
                return Arguments(x, w, draw(B, O)) if name == "linear_add" else Arguments(x, w)

            if name == "norm_linear":
                candidates = candidates_of(setting, NORM_LINEAR, NormLinearDims(D=D, parts=parts), B)
            elif name == "linear_add":
                candidates = candidates_of(setting, LINEAR_ADD, LinearDims(D=D, O=O), B)
            else:
                candidates = candidates_of(setting, LINEAR, LinearDims(D=D, O=O), B)
            yield Case(
                name,
                f"{what} {D} to {O}, batch {B}",
                candidates,
                make,
                num_bytes=es * (B * D + O * D + B * O * (2 if name == "linear_add" else 1)),
                flops=2 * B * D * O,
            )


def norm_router(setting: Setting) -> Iterator[Case]:
    s, es = setting.shape, setting.dtype.itemsize
    E, D, k = s.experts, s.width, s.top_k
    for B in setting.batch_sizes:

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            norm, bias = draw(D, scale=0.1).add_(1), draw(E, scale=0.05, dtype=torch.float32)
            routing = {"top_k": k, "renormalize": True, "scale": ROUTED_SCALE, "num_shared": 1}
            return Arguments(draw(B, D), norm, EPS, draw(E, D, scale=D**-0.5), bias, **routing)

        yield Case(
            "norm_router",
            f"{E} experts, batch {B}",
            candidates_of(setting, NORM_ROUTER, NormRouterDims(E=E, D=D, K=k, G=1, S=1), B),
            make,
            num_bytes=es * (2 * B * D + E * D + D) + 12 * B * (k + 1),
            flops=2 * B * D * E,
        )


def experts(setting: Setting) -> Iterator[Case]:
    yield from routed(setting, setting.batch_sizes, "batch", "graph")


def routed(setting: Setting, sizes: tuple[int, ...], unit: str, timed: Any) -> Iterator[Case]:
    """Cases of the experts, added to the residual, over weights in the setting's dtype and in fp8."""
    for scheme in (PLAIN, scheme_named("fp8")):
        yield from _routed(setting, sizes, unit, timed, scheme)


def _routed(setting: Setting, sizes: tuple[int, ...], unit: str, timed: Any, scheme: Scheme) -> Iterator[Case]:
    """The copies share one set of weights, and each routes at random in its own way."""
    s, es = setting.shape, setting.dtype.itemsize
    E, D, I, k = s.experts, s.width, s.inner, s.top_k
    draw = Draw(setting, 0)
    gate_up, down = draw(E + 1, 2 * I, D, scale=D**-0.5), draw(E + 1, D, I, scale=I**-0.5)
    experts = ((gate_up,), (down,)) if scheme is PLAIN else quantize_experts(gate_up, down)
    expert_bytes = 3 * D * I * scheme.bytes_per_weight(es)
    dims = ExpertsDims(E=E + 1, D=D, I=I, scheme=scheme.name)
    for T in sizes:

        def make(copy: int, T: int = T) -> Arguments:
            draw, device = Draw(setting, copy), setting.device
            ids = torch.rand(T, E, generator=draw.rng, device=device).topk(k).indices
            weights = torch.rand(T, k, generator=draw.rng, device=device)
            weights = torch.cat([weights, weights.new_ones(T, 1)], 1)
            ids = torch.cat([ids, torch.full_like(ids[:, :1], E)], 1)
            return Arguments(draw(T, D), weights, ids, *experts, residual_TD=draw(T, D), num_shared=1)

        yield Case(
            "experts",
            f"{k} of {E} and 1 shared{'' if scheme is PLAIN else f' in {scheme.name}'}, {unit} {T}",
            candidates_of(setting, EXPERTS, dims, T),
            make,
            num_bytes=expert_bytes * (1 + distinct_experts(E, k, T)) + es * 3 * T * D,
            flops=6 * T * (k + 1) * D * I,
            timed=timed,
        )


def kda_mixer(setting: Setting) -> Iterator[Case]:
    s, es, f32 = setting.shape, setting.dtype.itemsize, torch.float32
    H, K, C, W = s.heads, s.head_dim, s.conv_channels, s.taps - 1
    for B in setting.batch_sizes:

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(
                draw(B, s.kda_projection),
                conv_weight_CW=draw(C, W + 1, scale=0.5),
                conv_state_NWC=draw(B + 1, W, C),
                w_up_2OR=draw(2, H * K, K, scale=K**-0.5),
                A_log_H=draw(H, dtype=f32),
                dt_bias_HK=draw(H, K, dtype=f32),
                norm_weight_V=draw(K, scale=0.1).add_(1),
                eps=EPS,
                state_NHVK=draw(B + 1, H, K, K, scale=0.1, dtype=f32),
                slots_B=draw.order(B),
            )

        weights = C * (W + 1) + 2 * H * K * K
        yield Case(
            "kda_mixer_decode",
            f"{H} heads, batch {B}",
            candidates_of(setting, KDA_MIXER_DECODE, KdaMixerDims(H=H, K=K, V=K, R=K, W=W), B),
            make,
            num_bytes=2 * 4 * B * H * K * K + es * (weights + B * (2 * W * C + s.kda_projection + H * K)),
            flops=B * H * (6 * K * K + 4 * K * K + 6 * K * (W + 1)),
            changed=lambda a: (a.named["conv_state_NWC"], a.named["state_NHVK"]),
        )


def mla_mixer(setting: Setting) -> Iterator[Case]:
    s, es = setting.shape, setting.dtype.itemsize
    H, K, R, P = s.heads, s.head_dim, s.latent, s.rope
    context = setting.context
    blocks_each = -(-context // BLOCK_SIZE)
    for B in setting.batch_sizes:

        def make(copy: int, B: int = B) -> Arguments:
            draw, device = Draw(setting, copy), setting.device
            tables = draw.order(B * blocks_each).view(B, blocks_each)
            last = tables[:, (context - 1) // BLOCK_SIZE] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
            w = draw(H, 2 * K, R, scale=R**-0.5)
            return Arguments(
                draw(B, s.mla_projection),
                kv_norm_weight_R=draw(R, scale=0.1).add_(1),
                w_uk_HKR=w[:, :K],
                w_uv_HVR=w[:, K:],
                blocks_MSC=draw(B * blocks_each + 1, BLOCK_SIZE, R + P),
                block_tables_BN=tables.int(),
                context_lens_B=torch.full((B,), context, dtype=torch.int32, device=device),
                block_rows_B=last,
                scale=(K + P) ** -0.5,
                eps=EPS,
            )

        yield Case(
            "mla_mixer_decode",
            f"{H} heads, context {context}, batch {B}",
            candidates_of(setting, MLA_MIXER_DECODE, MlaMixerDims(H=H, K=K, V=K, R=R, P=P, S=BLOCK_SIZE), B),
            make,
            num_bytes=es * (B * context * (R + P) + 2 * H * K * R + B * (s.mla_projection + H * K)),
            flops=2 * B * H * (context * (2 * R + P) + 2 * K * R),
            changed=lambda a: (a.named["blocks_MSC"].flatten(0, 1)[a.named["block_rows_B"]],),  # the new tokens' rows
        )


def rms_norm(setting: Setting) -> Iterator[Case]:
    D, es = setting.shape.width, setting.dtype.itemsize
    for B in setting.batch_sizes:

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(draw(B, D), draw(D, scale=0.1).add_(1), EPS)

        candidates = candidates_of(setting, RMS_NORM, RmsNormDims(D=D), B)
        yield Case("rms_norm", f"{D} wide, batch {B}", candidates, make, num_bytes=es * D * (2 * B + 1))


def sample(setting: Setting) -> Iterator[Case]:
    V, device = setting.shape.vocab, setting.device
    for B in setting.batch_sizes:

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            seeds = draw.order(B)
            return Arguments(draw(B, V, scale=3.0), torch.ones(B, device=device), seeds, torch.full_like(seeds, copy))

        candidates = candidates_of(setting, SAMPLE, SampleDims(V=V), B)
        yield Case("sample", f"{V} logits, batch {B}", candidates, make, num_bytes=B * V * setting.dtype.itemsize)


DECODE: dict[str, Builder] = {
    "linear": linear,
    "norm_linear": norm_linear,
    "linear_add": linear_add,
    "norm_router": norm_router,
    "experts": experts,
    "kda_mixer_decode": kda_mixer,
    "mla_mixer_decode": mla_mixer,
    "rms_norm": rms_norm,
    "sample": sample,
}
