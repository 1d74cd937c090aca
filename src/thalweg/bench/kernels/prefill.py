"""Cases of the mixers over prompts: `batch` of them with `context` tokens each, from an empty cache, called in turn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from thalweg.bench.kernels.case import Arguments, Case, Draw, Setting, candidates_of
from thalweg.bench.kernels.decode import block_tables
from thalweg.ops.attention.gqa import GQA_PREFILL, GqaDims
from thalweg.ops.attention.mla import MLA_PREFILL, MlaPrefillDims
from thalweg.ops.delta.conv1d import CONV1D_PREFILL, Conv1dDims
from thalweg.ops.delta.gdn import GDN_PREFILL, GdnDims
from thalweg.ops.delta.kda import KDA_GATE, KDA_PREFILL, KdaDims


def _prompts(setting: Setting) -> Iterator[tuple[int, int, list[int], str]]:
    """(sequences, their tokens together, offsets, a label) of each batch size."""
    for B, T, label in setting.calls():
        yield B, T, [b * setting.context for b in range(B + 1)], label


def conv1d(setting: Setting, dims: Conv1dDims) -> Iterator[Case]:
    C, W, es = dims.C, dims.W, setting.dtype.itemsize
    for B, T, offsets, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(draw(T, C), draw(B + 1, W, C), draw.order(B), offsets, draw(C, W + 1, scale=0.5))

        yield Case(
            CONV1D_PREFILL.name,
            f"{C} channels, {label}",
            candidates_of(setting, CONV1D_PREFILL, dims, T),
            make,
            num_bytes=es * C * (2 * T + 2 * B * W + W + 1),
            flops=2 * T * C * (W + 1),
            changed=lambda a: (a.args[1],),
            timed="eager",
        )


def kda_gate(setting: Setting, dims: KdaDims) -> Iterator[Case]:
    H, K = dims.H, dims.K
    for _, T, _, label in _prompts(setting):

        def make(copy: int, T: int = T) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(draw(T, H, K), draw(H, dtype=torch.float32), draw(H, K, dtype=torch.float32))

        yield Case(
            KDA_GATE.name,
            f"{H} heads, {label}",
            candidates_of(setting, KDA_GATE, dims, T),
            make,
            num_bytes=T * H * K * (setting.dtype.itemsize + 4),
            timed="eager",
        )


def kda(setting: Setting, dims: KdaDims) -> Iterator[Case]:
    H, K, V, f32 = dims.H, dims.K, dims.V, torch.float32
    for B, T, offsets, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            q, k, v = draw(T, H, K), draw(T, H, K), draw(T, H, V)
            g, beta = -F.softplus(draw(T, H, K, dtype=f32)), draw(T, H, dtype=f32).sigmoid_()
            state = draw(B + 1, H, V, K, scale=0.1, dtype=f32)
            return Arguments(q, k, v, g, beta, state_NHVK=state, slots_B=draw.order(B), offsets=offsets)

        yield Case(
            KDA_PREFILL.name,
            f"{H} heads, {label}",
            candidates_of(setting, KDA_PREFILL, dims, T),
            make,
            num_bytes=T * H * ((2 * K + 2 * V) * setting.dtype.itemsize + 4 * K + 4) + 8 * B * H * K * V,
            flops=6 * T * H * K * V,  # of the recurrence; a chunked form does more, on faster units
            changed=lambda a: (a.named["state_NHVK"],),
            timed="eager",
        )


def gdn(setting: Setting, dims: GdnDims) -> Iterator[Case]:
    G, H, K, V, f32 = dims.G, dims.H, dims.K, dims.V, torch.float32
    for B, T, offsets, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            tokens = draw(T, G, K), draw(T, G, K), draw(T, H, V), draw(T, H), draw(T, H)
            return Arguments(
                *tokens,
                A_log_H=draw(H, dtype=f32),
                dt_bias_H=draw(H, dtype=f32),
                state_NHVK=draw(B + 1, H, V, K, scale=0.1, dtype=f32),
                slots_B=draw.order(B),
                offsets=offsets,
            )

        yield Case(
            GDN_PREFILL.name,
            f"{H} heads over {G}, {label}",
            candidates_of(setting, GDN_PREFILL, dims, T),
            make,
            num_bytes=setting.dtype.itemsize * T * (2 * G * K + 2 * H * V + 2 * H) + 8 * B * H * K * V,
            flops=6 * T * H * K * V,
            changed=lambda a: (a.named["state_NHVK"],),
            timed="eager",
        )


def mla(setting: Setting, dims: MlaPrefillDims) -> Iterator[Case]:
    H, K, V, R, P = dims.H, dims.K, dims.V, dims.R, dims.P
    L, S, es = setting.context, setting.model.config.block_size, setting.dtype.itemsize
    for B, T, offsets, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            tables = block_tables(draw, B, L, S).int()
            return Arguments(
                draw(T, H, K + P),
                draw(tables.numel() + 1, S, R + P),
                block_tables_BN=tables,
                context_lens=[0] * B,
                offsets=offsets,
                up_HXR=draw(H, K + V, R, scale=R**-0.5),
                value_dims=V,
                scale=(K + P) ** -0.5,
            )

        yield Case(
            MLA_PREFILL.name,
            f"{H} heads, {label}",
            candidates_of(setting, MLA_PREFILL, dims, T),
            make,
            num_bytes=es * (T * (H * (K + V + P) + R + P) + H * (K + V) * R),
            flops=B * L * (L + 1) * H * (K + V + P) + 2 * T * R * H * (K + V),
            timed="eager",
        )


def gqa(setting: Setting, dims: GqaDims) -> Iterator[Case]:
    H, G, K, S, L = dims.H, dims.G, dims.K, dims.S, setting.context
    for B, T, offsets, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            tables = block_tables(draw, B, L, S)
            keys, values = (draw(tables.numel() + 1, S, G, K) for _ in range(2))
            return Arguments(
                draw(T, H, K),
                draw(T, 2 * (H + G) * K),
                keys_MSGK=keys,
                values_MSGK=values,
                block_tables_BN=tables.int(),
                starts=[0] * B,
                offsets=offsets,
            )

        yield Case(
            GQA_PREFILL.name,
            f"{H} heads over {G}, {label}",
            candidates_of(setting, GQA_PREFILL, dims, T),
            make,
            num_bytes=setting.dtype.itemsize * T * (3 * H + 2 * G) * K,
            flops=2 * B * L * (L + 1) * H * K,
            timed="eager",
        )
