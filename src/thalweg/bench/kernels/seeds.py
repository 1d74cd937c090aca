"""Cases of the seeds suite: the published results that this project grew from, again, on the machine at hand."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from thalweg.bench.kernels import rotated
from thalweg.bench.kernels.case import Arguments, Builder, Candidate, Case, Draw, Setting, candidates_of
from thalweg.bench.kernels.model import ModelOps
from thalweg.bench.kernels.projections import EPS
from thalweg.bench.kernels.rearrange import rearranges
from thalweg.errors import ConfigError
from thalweg.ops.attention.mla_down_norms import SplitNormsDims
from thalweg.ops.delta.kda_mixer import KDA_MIXER_DECODE
from thalweg.ops.linear import NORM_LINEAR, NormLinearDims
from thalweg.ops.projection import BATCHED_PROJECTION, BatchedProjectionDims
from thalweg.ops.residual import SCALED_RESIDUAL_ADD, ScaledResidualAddDims

TP_SIZES = (1, 4)
PROMPTS = (1, 2, 4)  # of --context tokens
# Kimi-K2: hidden size, ranks of queries and latent, shared key part, scale of the routed experts.
K2_WIDTH, K2_Q_RANK, K2_LATENT, K2_ROPE, K2_SCALE = 7168, 1536, 512, 64, 2.827


def projections(setting: Setting) -> Iterator[Case]:
    """The projections of a KDA layer as eight products, and as one and one batched; one rank's share of the heads. The
    norm ahead of them is in both. Tokens of a decode step, and of prompts: --context, and 2 and 4 times as many."""
    es = setting.dtype.itemsize
    for tp_size in TP_SIZES:
        H, R, HK, dims = _kda(setting.model.shared_by(tp_size))
        D = dims.D
        for T in (*setting.batch_sizes, *(n * setting.context for n in PROMPTS)):

            def make(
                copy: int, D: int = D, R: int = R, HK: int = HK, T: int = T, O: int = sum(dims.parts)
            ) -> Arguments:
                draw = Draw(setting, copy)
                norm, w_in = draw(D, scale=0.1).add_(1), draw(O, D, scale=D**-0.5)
                return Arguments(draw(T, D), norm, w_in, draw(2, HK, R, scale=R**-0.5))

            weights = sum(dims.parts) * D + 2 * HK * R
            yield Case(
                "projections",
                f"KDA, TP{tp_size}: {H} heads, {T} tokens",
                _projection_candidates(setting, dims, BatchedProjectionDims(R=R, O=HK), T),
                make,
                num_bytes=es * (weights + T * (D + 5 * HK + H)),
                flops=2 * T * weights,
                published="TP4, decode 38.8 -> 11.7 us, prefill 1001 -> 969 us, products alone",
            )


def _kda(model: ModelOps) -> tuple[int, int, int, NormLinearDims]:
    """Heads, rank of the low-rank parts and width of all heads of a rank's KDA layer, and its fused projection."""
    for kda in model.dims(KDA_MIXER_DECODE):
        width = kda.H * kda.K
        parts = (width, width, kda.H * kda.V, kda.H, kda.R, kda.R)
        for dims in model.dims(NORM_LINEAR):
            if dims.parts == parts:
                return kda.H, kda.R, width, dims
    raise ConfigError("the model has no KDA layer, whose projections this is about; change --config or --op")


def _projection_candidates(
    setting: Setting, dims: NormLinearDims, up_dims: BatchedProjectionDims, tokens: int
) -> tuple[Candidate, ...]:
    """The separate form first, then each fused one."""
    up = {c.name: c for c in candidates_of(setting, BATCHED_PROJECTION, up_dims, tokens)}
    first = {c.name: c for c in candidates_of(setting, NORM_LINEAR, dims, tokens)}
    separate = first.pop("separate")

    def both(norm_linear: Candidate, batched: Candidate, name: str) -> Candidate:
        def call(x_TD: Tensor, norm_D: Tensor, w_OD: Tensor, w_2OR: Tensor) -> tuple[Tensor, ...]:
            y_TO = norm_linear.fn(x_TD, norm_D, EPS, w_OD)
            low_T2R = y_TO[:, -2 * up_dims.R :].unflatten(-1, (2, up_dims.R))
            return y_TO, *batched.fn(low_T2R, w_2OR).unbind(1)

        return Candidate(name, call, norm_linear.refusal)

    fused = (both(c, up["reference"], f"1 + 1 batched, {name}") for name, c in first.items())
    return both(separate, up["separate"], "8 products"), *fused


def split_norms(setting: Setting) -> Iterator[Case]:
    """Kimi-K2's queries and latent from one projection, each with its norm; with the rotation of the shared key part
    and the write to the cache, which the published figures are without."""
    return rotated.split_norms(setting, SplitNormsDims(Q=K2_Q_RANK, R=K2_LATENT, P=K2_ROPE), published="9.5 -> 3.5 us")


def scaled_residual_add(setting: Setting) -> Iterator[Case]:
    """Kimi-K2's routed experts scaled and added to the shared one, then to the residual."""
    D, es = K2_WIDTH, setting.dtype.itemsize
    for B in setting.batch_sizes:

        def make(copy: int, B: int = B) -> Arguments:
            draw = Draw(setting, copy)
            return Arguments(draw(B, D), draw(B, D), draw(B, D), K2_SCALE)

        candidates = candidates_of(setting, SCALED_RESIDUAL_ADD, ScaledResidualAddDims(D=D), B)
        yield Case(
            "scaled_residual_add",
            f"Kimi-K2, {D} wide, batch {B}",
            candidates,
            make,
            num_bytes=4 * es * B * D,
            same_bits_as="separate",
            published="6.3 -> 2.8 us",
        )


SEEDS: dict[str, Builder] = {
    "rearrange": rearranges,
    "projections": projections,
    "split_norms": split_norms,
    "scaled_residual_add": scaled_residual_add,
}
