"""Cases of the prefill suite: `batch` prompts of `context` tokens each, from an empty cache, called one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from thalweg.bench.kernels.case import Arguments, Builder, Case, Draw, Setting, candidates_of
from thalweg.bench.kernels.decode import BLOCK_SIZE, routed
from thalweg.ops.attention.mla import MLA_PREFILL, MlaPrefillDims
from thalweg.ops.delta.conv1d import CONV1D_PREFILL, Conv1dDims
from thalweg.ops.delta.kda import KDA_GATE, KDA_PREFILL, KdaDims


def _prompts(setting: Setting) -> Iterator[tuple[int, int, list[int], str]]:
    """(sequences, their tokens together, offsets, a label) of each batch size."""
    L = setting.context
    for B in setting.batch_sizes:
        yield B, B * L, [b * L for b in range(B + 1)], f"{B} x {L} tokens"


def conv1d(setting: Setting) -> Iterator[Case]:
    C, W, es = setting.shape.conv_channels, setting.shape.taps - 1, setting.dtype.itemsize
    for B, T, offsets, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(draw(T, C), draw(B + 1, W, C), draw.order(B), offsets, draw(C, W + 1, scale=0.5))

        yield Case(
            "conv1d_prefill",
            f"{C} channels, {label}",
            candidates_of(setting, CONV1D_PREFILL, Conv1dDims(C=C, W=W), T),
            make,
            num_bytes=es * C * (2 * T + 2 * B * W + W + 1),
            flops=2 * T * C * (W + 1),
            changed=lambda a: (a.args[1],),
            timed="eager",
        )


def kda_gate(setting: Setting) -> Iterator[Case]:
    H, K = setting.shape.heads, setting.shape.head_dim
    for _, T, _, label in _prompts(setting):

        def make(copy: int, T: int = T) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(draw(T, H, K), draw(H, dtype=torch.float32), draw(H, K, dtype=torch.float32))

        yield Case(
            "kda_gate",
            f"{H} heads, {label}",
            candidates_of(setting, KDA_GATE, KdaDims(H=H, K=K, V=K), T),
            make,
            num_bytes=T * H * K * (setting.dtype.itemsize + 4),
            timed="eager",
        )


def kda(setting: Setting) -> Iterator[Case]:
    H, K, f32 = setting.shape.heads, setting.shape.head_dim, torch.float32
    for B, T, offsets, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            q, k, v = (draw(T, H, K) for _ in range(3))
            g, beta = -F.softplus(draw(T, H, K, dtype=f32)), draw(T, H, dtype=f32).sigmoid_()
            state = draw(B + 1, H, K, K, scale=0.1, dtype=f32)
            return Arguments(q, k, v, g, beta, state_NHVK=state, slots_B=draw.order(B), offsets=offsets)

        yield Case(
            "kda_prefill",
            f"{H} heads, {label}",
            candidates_of(setting, KDA_PREFILL, KdaDims(H=H, K=K, V=K), T),
            make,
            num_bytes=T * H * K * (4 * setting.dtype.itemsize + 4) + 4 * T * H + 8 * B * H * K * K,
            flops=6 * T * H * K * K,  # of the recurrence; a chunked form does more, on faster units
            changed=lambda a: (a.named["state_NHVK"],),
            timed="eager",
        )


def mla(setting: Setting) -> Iterator[Case]:
    s, es = setting.shape, setting.dtype.itemsize
    H, K, R, P, L = s.heads, s.head_dim, s.latent, s.rope, setting.context
    blocks_each = -(-L // BLOCK_SIZE)
    for B, T, offsets, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            tables = draw.order(B * blocks_each).view(B, blocks_each).int()
            blocks = draw(B * blocks_each + 1, BLOCK_SIZE, R + P)
            w = draw(H, 2 * K, R, scale=R**-0.5)
            return Arguments(
                draw(T, H, K + P),
                blocks,
                block_tables_BN=tables,
                context_lens=[0] * B,
                offsets=offsets,
                w_uk_HKR=w[:, :K],
                w_uv_HVR=w[:, K:],
                scale=(K + P) ** -0.5,
            )

        yield Case(
            "mla_prefill",
            f"{H} heads, {label}",
            candidates_of(setting, MLA_PREFILL, MlaPrefillDims(H=H, K=K, V=K, R=R, P=P), T),
            make,
            num_bytes=es * (T * (H * (2 * K + P) + R + P) + 2 * H * K * R),
            flops=B * L * (L + 1) * H * (2 * K + P) + 4 * T * R * H * K,
            timed="eager",
        )


def experts(setting: Setting) -> Iterator[Case]:
    yield from routed(setting, tuple(B * setting.context for B in setting.batch_sizes), "tokens", "eager")


PREFILL: dict[str, Builder] = {
    "conv1d_prefill": conv1d,
    "kda_gate": kda_gate,
    "kda_prefill": kda,
    "mla_prefill": mla,
    "experts": experts,
}
