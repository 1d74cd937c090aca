"""Cases of the mixers of a decode step: one token of each sequence, with what it remembers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from thalweg.bench.kernels.case import Arguments, Case, Draw, Setting, candidates_of
from thalweg.bench.kernels.projections import EPS, fp8_weight
from thalweg.ops.attention.gqa import GQA_MIXER_DECODE, GqaDims
from thalweg.ops.attention.mla_mixer import MLA_MIXER_DECODE, MlaMixerDims
from thalweg.ops.delta.gdn import GDN_MIXER_DECODE, GdnDims
from thalweg.ops.delta.gdn_decode_add import GDN_DECODE_ADD, GdnDecodeAddDims
from thalweg.ops.delta.kda_mixer import KDA_MIXER_DECODE, KdaMixerDims
from thalweg.ops.linear.fp8 import LINEAR_ADD_FP8
from thalweg.ops.registry import Resolver
from thalweg.quant import FP8_LINEARS


def kda_mixer(setting: Setting, dims: KdaMixerDims) -> Iterator[Case]:
    H, K, V, R, W = dims.H, dims.K, dims.V, dims.R, dims.W
    C, es = 2 * H * K + H * V, setting.dtype.itemsize
    columns = C + H + 2 * R
    for B, _, size in setting.calls():

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(
                draw(B, columns),
                w_up_2OR=draw(2, H * K, R, scale=R**-0.5),
                dt_bias_HK=draw(H, K, dtype=torch.float32),
                norm_weight_V=draw(V, scale=0.1).add_(1),
                **delta_inputs(draw, dims, C, B),
            )

        weights = C * (W + 1) + 2 * H * K * R
        yield Case(
            KDA_MIXER_DECODE.name,
            f"{H} heads, {size}",
            candidates_of(setting, KDA_MIXER_DECODE, dims, B),
            make,
            num_bytes=2 * 4 * B * H * V * K + es * (weights + B * (2 * W * C + columns + H * V)),
            flops=B * H * (6 * K * V + 4 * K * R + 6 * K * (W + 1)),
            changed=states,
        )


def gdn_mixer(setting: Setting, dims: GdnDims) -> Iterator[Case]:
    for B, _, size in setting.calls():

        def make(copy: int, B: int = B) -> Arguments:
            proj_BX, mixer = gdn_inputs(Draw(setting, copy), dims, B, B)
            return Arguments(proj_BX, **mixer)

        yield Case(
            GDN_MIXER_DECODE.name,
            f"{dims.H} heads over {dims.G}, {size}",
            candidates_of(setting, GDN_MIXER_DECODE, dims, B),
            make,
            num_bytes=_gdn_bytes(setting, dims, B),
            flops=_gdn_flops(dims, B),
            changed=states,
        )


def gdn_decode_add(setting: Setting, dims: GdnDecodeAddDims) -> Iterator[Case]:
    """Beside the mixer and the projection by themselves."""
    of, es, resolver = dims.linear, setting.dtype.itemsize, Resolver()
    mixer_op = resolver.resolve(GDN_MIXER_DECODE, setting.where, dims.mixer)
    linear_op = resolver.resolve(LINEAR_ADD_FP8, setting.where, of)
    for B, _, size in setting.calls():

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            proj_BX, mixer = gdn_inputs(draw, dims.mixer, B, B)
            q_OD, scale_OB = fp8_weight(draw, of)

            def apart(proj_BX: Tensor, residual_BD: Tensor) -> Tensor:
                return linear_op(mixer_op(proj_BX, **mixer), q_OD, scale_OB, residual_BD)

            return Arguments(proj_BX, draw(B, of.O), apart, q_OD=q_OD, scale_OB=scale_OB, **mixer)

        yield Case(
            GDN_DECODE_ADD.name,
            f"{dims.mixer.H} heads over {dims.mixer.G} to {of.O}, {size}",
            candidates_of(setting, GDN_DECODE_ADD, dims, B),
            make,
            num_bytes=_gdn_bytes(setting, dims.mixer, B)
            + int(FP8_LINEARS.bytes_per_weight(es) * of.D * of.O)
            + es * 2 * B * of.O,
            flops=_gdn_flops(dims.mixer, B) + 2 * B * of.D * of.O,
            changed=states,
        )


def delta_inputs(draw: Draw, dims: KdaMixerDims | GdnDims, C: int, B: int) -> dict[str, Any]:
    """What mixers of both delta rules take for B sequences, by name."""
    H, K, V, W, f32 = dims.H, dims.K, dims.V, dims.W, torch.float32
    return dict(
        conv_weight_CW=draw(C, W + 1, scale=0.5),
        conv_state_NWC=draw(B + 1, W, C),
        A_log_H=draw(H, dtype=f32),
        eps=EPS,
        state_NHVK=draw(B + 1, H, V, K, scale=0.1, dtype=f32),
        slots_B=draw.order(B),
    )


def gdn_inputs(draw: Draw, dims: GdnDims, T: int, B: int) -> tuple[Tensor, dict[str, Any]]:
    """The projection's T rows and what else a mixer takes for B sequences."""
    H, V, f32 = dims.H, dims.V, torch.float32
    C = 2 * dims.G * dims.K + H * V
    return draw(T, C + H * V + 2 * H), dict(
        dt_bias_H=draw(H, dtype=f32),
        norm_weight_V=draw(V, scale=0.1, dtype=f32).add_(1),
        **delta_inputs(draw, dims, C, B),
    )


def _gdn_bytes(setting: Setting, dims: GdnDims, B: int) -> int:
    C = 2 * dims.G * dims.K + dims.H * dims.V
    inputs = C * (dims.W + 1) + B * (2 * dims.W * C + C + dims.H * dims.V + 2 * dims.H)
    return 2 * 4 * B * dims.H * dims.V * dims.K + setting.dtype.itemsize * inputs


def _gdn_flops(dims: GdnDims, B: int) -> int:
    C = 2 * dims.G * dims.K + dims.H * dims.V
    return B * (6 * dims.H * dims.K * dims.V + 2 * C * (dims.W + 1))


def states(a: Arguments) -> tuple[Tensor, ...]:
    return a.named["conv_state_NWC"], a.named["state_NHVK"]


def mla_mixer(setting: Setting, dims: MlaMixerDims) -> Iterator[Case]:
    H, K, V, R, P, S = dims.H, dims.K, dims.V, dims.R, dims.P, dims.S
    columns, es, context = H * (K + P) + R + P, setting.dtype.itemsize, setting.context
    for B, _, size in setting.calls():

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            w = draw(H, K + V, R, scale=R**-0.5)
            tables = block_tables(draw, B, context, S)
            return Arguments(
                draw(B, columns),
                kv_norm_weight_R=draw(R, scale=0.1).add_(1),
                w_uk_HKR=w[:, :K],
                w_uv_HVR=w[:, K:],
                blocks_MSC=draw(tables.numel() + 1, S, R + P),
                **cached(tables, context),
                block_rows_B=last_rows(tables, context, S),
                scale=(K + P) ** -0.5,
                eps=EPS,
            )

        yield Case(
            MLA_MIXER_DECODE.name,
            f"{H} heads, context {context}, {size}",
            candidates_of(setting, MLA_MIXER_DECODE, dims, B),
            make,
            num_bytes=es * (B * context * (R + P) + H * (K + V) * R + B * (columns + H * V)),
            flops=2 * B * H * (context * (2 * R + P) + (K + V) * R),
            changed=lambda a: (a.named["blocks_MSC"].flatten(0, 1)[a.named["block_rows_B"]],),  # the new tokens' rows
        )


def gqa_mixer(setting: Setting, dims: GqaDims) -> Iterator[Case]:
    H, G, K, S, es, context = dims.H, dims.G, dims.K, dims.S, setting.dtype.itemsize, setting.context
    for B, _, size in setting.calls():

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            tables = block_tables(draw, B, context, S)
            return Arguments(
                draw(B, 2 * (H + G) * K),
                **head_norms(draw, dims),
                positions_B=torch.full((B,), context - 1, device=setting.device),
                keys_MSGK=draw(tables.numel() + 1, S, G, K),
                values_MSGK=draw(tables.numel() + 1, S, G, K),
                block_rows_B=last_rows(tables, context, S),
                **cached(tables, context),
            )

        yield Case(
            GQA_MIXER_DECODE.name,
            f"{H} heads over {G}, context {context}, {size}",
            candidates_of(setting, GQA_MIXER_DECODE, dims, B),
            make,
            num_bytes=es * (2 * B * context * G * K + B * (3 * H + 2 * G) * K),
            flops=4 * B * H * K * context,
            changed=written_rows,
        )


def head_norms(draw: Draw, dims: GqaDims) -> dict[str, Any]:
    """Norms of queries and keys, and the rotation."""
    return dict(
        q_norm_weight_K=draw(dims.K, scale=0.1).add_(1),
        k_norm_weight_K=draw(dims.K, scale=0.1).add_(1),
        eps=EPS,
        frequencies_F=10_000.0 ** -torch.linspace(0, 1, dims.R // 2, device=draw.setting.device),
        rope_scale=1.0,
    )


def written_rows(a: Arguments) -> tuple[Tensor, ...]:
    """The new tokens' keys and values."""
    rows = a.named["block_rows_B"] if "block_rows_B" in a.named else a.named["block_rows_T"]
    return tuple(a.named[name].flatten(0, 1)[rows] for name in ("keys_MSGK", "values_MSGK"))


def block_tables(draw: Draw, B: int, context: int, S: int) -> Tensor:
    """int64 [B, blocks of `context` tokens], in any order; block 0 is nobody's."""
    each = -(-context // S)
    return draw.order(B * each).view(B, each)


def cached(tables: Tensor, context: int) -> dict[str, Any]:
    """Of sequences with `context` tokens each."""
    lens = torch.full((len(tables),), context, dtype=torch.int32, device=tables.device)
    return {"block_tables_BN": tables.int(), "context_lens_B": lens}


def last_rows(tables: Tensor, context: int, S: int) -> Tensor:
    return tables[:, (context - 1) // S] * S + (context - 1) % S
