"""Cases of the mixers over prompts: `batch` of them with `context` tokens each, from an empty cache, called in turn.

Attention is timed behind cached tokens too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from thalweg.bench.kernels.case import Arguments, Candidate, Case, Draw, Setting, candidates_of
from thalweg.bench.kernels.decode import block_tables, delta_inputs, gdn_inputs, head_norms, states, written_rows
from thalweg.ops.attention.gqa import GQA_PREFILL, GQA_PREPARE, GqaDims
from thalweg.ops.attention.mla import MLA_PREFILL, MlaPrefillDims
from thalweg.ops.delta.gdn import GDN_MIXER_PREFILL, GdnDims
from thalweg.ops.delta.kda_mixer import KDA_MIXER_PREFILL, KdaMixerDims, reference


def _prompts(setting: Setting) -> Iterator[tuple[int, int, list[int], str]]:
    """(sequences, their tokens together, offsets, a label) of each batch size."""
    for B, T, label in setting.calls():
        yield B, T, [b * setting.context for b in range(B + 1)], label


def kda_mixer(setting: Setting, dims: KdaMixerDims) -> Iterator[Case]:
    H, K, V, W = dims.H, dims.K, dims.V, dims.W
    C, es = 3 * H * K, setting.dtype.itemsize
    for B, T, offsets, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(
                draw(T, C + H),
                draw(T, 2, H * K),
                dt_bias_HK=draw(H, K, dtype=torch.float32),
                norm_weight_V=draw(V, scale=0.1).add_(1),
                **delta_inputs(draw, dims, C, B),
                offsets=offsets,
            )

        yield Case(
            KDA_MIXER_PREFILL.name,
            f"{H} heads, {label}",
            (*candidates_of(setting, KDA_MIXER_PREFILL, dims, T), _by_fla(setting)),
            make,
            num_bytes=es * (T * (C + H + 2 * H * K + H * V) + C * (W + 1) + 2 * B * W * C) + 8 * B * H * K * V,
            flops=T * H * (6 * K * V + 6 * K * (W + 1)),  # of the recurrence; chunks do more, on faster units
            changed=states,
            timed="eager",
        )


def _by_fla(setting: Setting) -> Candidate:
    """flash-linear-attention's chunk_kda for the delta rule, and this project's kernels for what is around it."""
    if find_spec("fla") is None:
        return Candidate("fla", reference.kda_mixer_prefill, "flash-linear-attention (fla) is not installed")
    if setting.device.type != "cuda":
        return Candidate("fla", reference.kda_mixer_prefill, f"takes cuda, not {setting.device.type}")
    from fla.ops.kda import chunk_kda

    from thalweg.ops.delta.conv1d.triton import conv1d_prefill
    from thalweg.ops.delta.kda.triton.gate import kda_gate
    from thalweg.ops.norm.triton.gated import gated_rms_norm

    def rule(*inputs: Tensor, state_NHVK: Tensor, slots_B: Tensor, offsets: Sequence[int], boundaries: Any) -> Tensor:
        o, state_BHKV = chunk_kda(
            *(x.contiguous()[None] for x in inputs),
            initial_state=state_NHVK[slots_B].transpose(-1, -2).contiguous(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=torch.tensor(offsets, device=slots_B.device),
        )
        state_NHVK[slots_B] = state_BHKV.transpose(-1, -2)
        out: Tensor = o[0]
        return out

    return Candidate("fla", reference.prefill_by(conv1d_prefill, kda_gate, rule, gated_rms_norm))


def gdn_mixer(setting: Setting, dims: GdnDims) -> Iterator[Case]:
    G, H, K, V, W = dims.G, dims.H, dims.K, dims.V, dims.W
    C, es = 2 * G * K + H * V, setting.dtype.itemsize
    for B, T, offsets, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            proj_TX, mixer = gdn_inputs(Draw(setting, copy), dims, T, B)
            return Arguments(proj_TX, **mixer, offsets=offsets)

        yield Case(
            GDN_MIXER_PREFILL.name,
            f"{H} heads over {G}, {label}",
            candidates_of(setting, GDN_MIXER_PREFILL, dims, T),
            make,
            num_bytes=es * (T * (C + 2 * H * V + 2 * H) + C * (W + 1) + 2 * B * W * C) + 8 * B * H * K * V,
            flops=T * (6 * H * K * V + 2 * C * (W + 1)),
            changed=states,
            timed="eager",
        )


def _behind(setting: Setting) -> Iterator[tuple[int, int, int, list[int], str]]:
    """Calls of attention: (tokens cached before each prompt, and what _prompts gives), from an empty cache and behind
    as many tokens again."""
    for cached in (0, setting.context):
        for B, T, offsets, label in _prompts(setting):
            yield cached, B, T, offsets, f"{label} behind {cached}" if cached else label


def mla(setting: Setting, dims: MlaPrefillDims) -> Iterator[Case]:
    H, K, V, R, P = dims.H, dims.K, dims.V, dims.R, dims.P
    L, S, es = setting.context, setting.model.config.block_size, setting.dtype.itemsize
    for before, B, T, offsets, label in _behind(setting):

        def make(copy: int, before: int = before, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            tables = block_tables(draw, B, before + L, S).int()
            return Arguments(
                draw(T, H, K + P),
                draw(tables.numel() + 1, S, R + P),
                block_tables_BN=tables,
                context_lens=[before] * B,
                offsets=offsets,
                up_HXR=draw(H, K + V, R, scale=R**-0.5),
                value_dims=V,
                scale=(K + P) ** -0.5,
            )

        all_tokens = T + B * before
        yield Case(
            MLA_PREFILL.name,
            f"{H} heads, {label}",
            candidates_of(setting, MLA_PREFILL, dims, T),
            make,
            num_bytes=es * (T * H * (K + V + P) + all_tokens * (R + P) + H * (K + V) * R),
            flops=B * L * (2 * before + L + 1) * H * (K + V + P) + 2 * all_tokens * R * H * (K + V),
            timed="eager",
        )


def gqa_prepare(setting: Setting, dims: GqaDims) -> Iterator[Case]:
    H, G, K, S, es = dims.H, dims.G, dims.K, dims.S, setting.dtype.itemsize
    for B, T, _, label in _prompts(setting):

        def make(copy: int, B: int = B, T: int = T) -> Arguments:
            draw, device = Draw(setting, copy), setting.device
            tables = block_tables(draw, B, setting.context, S)
            rows = (tables[:, :, None] * S + torch.arange(S, device=device)).flatten(1)[:, : setting.context]
            return Arguments(
                draw(T, 2 * (H + G) * K),
                **head_norms(draw, dims),
                positions_T=torch.arange(setting.context, device=device).repeat(B),
                keys_MSGK=draw(tables.numel() + 1, S, G, K),
                values_MSGK=draw(tables.numel() + 1, S, G, K),
                block_rows_T=rows.flatten(),
            )

        yield Case(
            GQA_PREPARE.name,
            f"{H} heads over {G}, {label}",
            candidates_of(setting, GQA_PREPARE, dims, T),
            make,
            num_bytes=2 * es * T * (H + 2 * G) * K,
            changed=written_rows,
            timed=setting.timed,
        )


def gqa(setting: Setting, dims: GqaDims) -> Iterator[Case]:
    H, G, K, S, L = dims.H, dims.G, dims.K, dims.S, setting.context
    for before, B, T, offsets, label in _behind(setting):

        def make(copy: int, before: int = before, B: int = B, T: int = T, offsets: list[int] = offsets) -> Arguments:
            draw = Draw(setting, copy)
            tables = block_tables(draw, B, before + L, S)
            keys, values = (draw(tables.numel() + 1, S, G, K) for _ in range(2))
            return Arguments(
                draw(T, H, K),
                draw(T, 2 * (H + G) * K),
                keys_MSGK=keys,
                values_MSGK=values,
                block_tables_BN=tables.int(),
                starts=[before] * B,
                offsets=offsets,
            )

        yield Case(
            GQA_PREFILL.name,
            f"{H} heads over {G}, {label}",
            candidates_of(setting, GQA_PREFILL, dims, T),
            make,
            num_bytes=setting.dtype.itemsize * (3 * T * H + 2 * (T + B * before) * G) * K,
            flops=2 * B * L * (2 * before + L + 1) * H * K,
            timed="eager",
        )
