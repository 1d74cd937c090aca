"""Cases of the seeds suite: the published results that this project grew from, again, on the machine at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.bench.kernels.case import Builder, Candidate, Case, Draw, Setting, candidates_of
from thalweg.bench.kernels.rearrange import rearranges
from thalweg.layers.context import BuildContext
from thalweg.layers.delta import KimiDeltaAttention
from thalweg.ops.registry import Resolver
from thalweg.parallel.mesh import Mesh

TP_SIZES = (1, 4)
# Kimi-K2: hidden size, ranks of queries and latent, shared key part, scale of the routed experts.
K2_WIDTH, K2_Q_RANK, K2_LATENT, K2_ROPE, K2_SCALE = 7168, 1536, 512, 64, 2.827


def projections(setting: Setting) -> Iterator[Case]:
    """The projections of a KDA layer as eight products, and as one and one batched; one rank's share of the heads."""
    s, es = setting.shape, setting.dtype.itemsize
    D, R = s.width, s.head_dim
    for tp_size in TP_SIZES:
        H = max(1, s.heads // tp_size)
        HK = H * s.head_dim
        for T in (*setting.batch_sizes, setting.context):

            def make(copy: int, H: int = H, HK: int = HK, T: int = T) -> tuple[Any, ...]:
                draw = Draw(setting, copy)
                layer = _kda_layer(setting, H)
                w_in = nn.Parameter(draw(3 * HK + H + 2 * R, D, scale=D**-0.5), requires_grad=False)
                w_up = nn.Parameter(draw(2, HK, R, scale=R**-0.5), requires_grad=False)
                layer.in_proj.weight, layer.up_proj.weight = w_in, w_up
                return layer, draw(T, D)

            weights = (3 * HK + H + 2 * R) * D + 2 * HK * R
            yield Case(
                "projections",
                f"KDA, TP{tp_size}: {H} heads, {T} tokens",
                (
                    Candidate("8 products", lambda layer, x: layer.unfused_projections(x)),
                    Candidate("1 + 1 batched", lambda layer, x: layer.fused_projections(x)),
                ),
                make,
                num_bytes=es * (weights + T * (D + 5 * HK + H)),
                flops=2 * T * weights,
            )


def _kda_layer(setting: Setting, heads: int) -> KimiDeltaAttention:
    s = setting.shape
    ctx = BuildContext(setting.device, setting.dtype, Mesh(), Resolver(), "float32")
    return KimiDeltaAttention(
        ctx, width=s.width, heads=heads, head_dim=s.head_dim, rank=s.head_dim, taps=s.taps, eps=1e-5
    )


def split_norms(setting: Setting) -> Iterator[Case]:
    """Kimi-K2's queries and latent from one projection, each with its norm."""
    Q, R, P, es = K2_Q_RANK, K2_LATENT, K2_ROPE, setting.dtype.itemsize
    _, kernel = candidates_of(setting, "split_norms", {"Q": Q, "R": R, "P": P})
    for B in setting.batch_sizes:

        def make(copy: int, B: int = B) -> tuple[Any, ...]:
            draw = Draw(setting, copy)
            return draw(B, Q + R + P), draw(Q, scale=0.1).add_(1), draw(R, scale=0.1).add_(1), 1e-6

        candidates = (
            Candidate("split, 2 norms in torch", _two_torch_norms),
            Candidate("split, 2 norm kernels", _two_norm_kernels, kernel.refusal),
            Candidate("one kernel", kernel.fn, kernel.refusal),
        )
        yield Case(
            "split_norms",
            f"Kimi-K2, {Q} + {R} + {P}, batch {B}",
            candidates,
            make,
            num_bytes=es * (2 * B + 1) * (Q + R),
            same_bits_as="split, 2 norm kernels",
        )


def _two_torch_norms(x: Tensor, q_weight: Tensor, kv_weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    q, latent, shared = x.split([K2_Q_RANK, K2_LATENT, K2_ROPE], dim=-1)
    return F.rms_norm(q, q_weight.shape, q_weight, eps), F.rms_norm(latent, kv_weight.shape, kv_weight, eps), shared


def _two_norm_kernels(*args: Any) -> Any:
    from thalweg.ops.attention.mla_down_norms.triton import split_norms_in_two_launches

    return split_norms_in_two_launches(*args)


def scaled_residual_add(setting: Setting) -> Iterator[Case]:
    """Kimi-K2's routed experts scaled and added to the shared one, then to the residual."""
    D, es = K2_WIDTH, setting.dtype.itemsize
    _, kernel = candidates_of(setting, "scaled_residual_add", {"D": D})
    for B in setting.batch_sizes:

        def make(copy: int, B: int = B) -> tuple[Any, ...]:
            draw = Draw(setting, copy)
            return draw(B, D), draw(B, D), draw(B, D), K2_SCALE

        candidates = (
            Candidate("scaled add, residual add", _two_additions),
            Candidate("one kernel", kernel.fn, kernel.refusal),
        )
        yield Case("scaled_residual_add", f"Kimi-K2, {D} wide, batch {B}", candidates, make, num_bytes=4 * es * B * D)


def _two_additions(residual: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return residual + torch.add(a, b, alpha=scale)


SEEDS: dict[str, Builder] = {
    "rearrange": rearranges,
    "projections": projections,
    "split_norms": split_norms,
    "scaled_residual_add": scaled_residual_add,
}
