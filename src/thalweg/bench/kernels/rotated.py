"""Cases of latent attention with rotated positions (Kimi-K2): what stands ahead of attention, and a decode step's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from thalweg.bench.kernels.case import Arguments, Case, Draw, Setting, candidates_of
from thalweg.bench.kernels.decode import block_tables, cached
from thalweg.bench.kernels.projections import EPS
from thalweg.ops.attention.mla_down_norms import SPLIT_NORMS, SplitNormsDims
from thalweg.ops.attention.mla_mixer import MLA_DECODE, MlaMixerDims
from thalweg.ops.attention.mla_rope import MLA_ROPE, MlaRopeDims


def split_norms(setting: Setting, dims: SplitNormsDims, *, published: str = "") -> Iterator[Case]:
    Q, R, P, es = dims.Q, dims.R, dims.P, setting.dtype.itemsize
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(
                draw(T, Q + R + P),
                draw(Q, scale=0.1).add_(1) if Q else None,
                draw(R, scale=0.1).add_(1),
                EPS,
                **_rotation(setting, P if dims.rotated else 0),
                positions_T=_positions(setting, T),
                blocks_MSC=draw(T + 1, 1, R + P),
                block_rows_T=draw.order(T),
            )

        yield Case(
            SPLIT_NORMS.name,
            f"{Q} + {R} + {P}, {size}",
            candidates_of(setting, SPLIT_NORMS, dims, T),
            make,
            num_bytes=es * (2 * T * (Q + R + P) + Q + R),
            changed=lambda a: (a.named["blocks_MSC"],),
            same_bits_as="separate",
            timed=setting.timed,
            published=published,
        )


def mla_decode(setting: Setting, dims: MlaMixerDims) -> Iterator[Case]:
    H, K, V, R, P, S = dims.H, dims.K, dims.V, dims.R, dims.P, dims.S
    es, context = setting.dtype.itemsize, setting.context
    for B, _, size in setting.calls():

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            w = draw(H, K + V, R, scale=R**-0.5)
            tables = block_tables(draw, B, context, S)
            return Arguments(
                draw(B, H * (K + P)),
                **_rotation(setting, P),
                positions_B=_positions(setting, B),
                w_uk_HKR=w[:, :K],
                w_uv_HVR=w[:, K:],
                blocks_MSC=draw(tables.numel() + 1, S, R + P),
                **cached(tables, context),
                scale=(K + P) ** -0.5,
            )

        yield Case(
            MLA_DECODE.name,
            f"{H} heads, context {context}, {size}",
            candidates_of(setting, MLA_DECODE, dims, B),
            make,
            num_bytes=es * (B * context * (R + P) + H * (K + V) * R + B * H * (K + P + V)),
            flops=2 * B * H * (context * (2 * R + P) + (K + V) * R),
        )


def mla_rope(setting: Setting, dims: MlaRopeDims) -> Iterator[Case]:
    H, X, P = dims.H, dims.K + dims.P, dims.P
    for _, T, size in setting.calls():

        def make(copy: int, T: int = T) -> Arguments:
            positions = _positions(setting, T)
            return Arguments(Draw(setting, copy)(T, H, X), **_rotation(setting, P), positions_T=positions)

        yield Case(
            MLA_ROPE.name,
            f"{H} heads, {P} of {X} dims, {size}",
            candidates_of(setting, MLA_ROPE, dims, T),
            make,
            num_bytes=2 * setting.dtype.itemsize * T * H * P,
            changed=lambda a: (a.args[0],),
            timed=setting.timed,
        )


def _rotation(setting: Setting, dims: int) -> dict[str, object]:
    pairs = torch.arange(0, dims, 2, device=setting.device)
    return {"frequencies_F": 10_000.0 ** -(pairs / dims), "rope_scale": 1.0}


def _positions(setting: Setting, tokens: int) -> torch.Tensor:
    """int64 [tokens]: the last of each context, or those of prompts one after another."""
    device, context = setting.device, setting.context
    if not setting.prompts:
        return torch.full((tokens,), context - 1, device=device)
    return torch.arange(tokens, device=device) % context
