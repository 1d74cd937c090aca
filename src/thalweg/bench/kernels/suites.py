"""The suites, and how one is run: ops of a model in the order of this list, at the sizes that its layers ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from thalweg.bench.ceilings import Ceilings
from thalweg.bench.kernels import decode, feed_forward, prefill, projections, rotated
from thalweg.bench.kernels.case import Builder, Case, Maker, Setting
from thalweg.bench.kernels.measure import Measurement, measure_case
from thalweg.bench.kernels.model import ModelOps
from thalweg.bench.kernels.seeds import SEEDS
from thalweg.errors import ConfigError
from thalweg.ops.activation import SILU_AND_MUL
from thalweg.ops.attention.gqa import GQA_MIXER_DECODE, GQA_PREFILL, GQA_PREPARE
from thalweg.ops.attention.mla import MLA_PREFILL
from thalweg.ops.attention.mla_down_norms import SPLIT_NORMS
from thalweg.ops.attention.mla_mixer import MLA_DECODE, MLA_MIXER_DECODE
from thalweg.ops.attention.mla_rope import MLA_ROPE
from thalweg.ops.delta.gdn import GDN_MIXER_DECODE, GDN_MIXER_PREFILL
from thalweg.ops.delta.gdn_decode_add import GDN_DECODE_ADD
from thalweg.ops.delta.kda_mixer import KDA_MIXER_DECODE, KDA_MIXER_PREFILL
from thalweg.ops.embedding import VOCAB_ROWS
from thalweg.ops.linear import LINEAR, LINEAR_ADD, LINEAR_GGML, NORM_LINEAR
from thalweg.ops.linear.fp8 import LINEAR_ADD_FP8, LINEAR_FP8, NORM_LINEAR_FP8
from thalweg.ops.moe.experts import EXPERTS
from thalweg.ops.moe.routed import ROUTED_EXPERTS
from thalweg.ops.moe.router import NORM_ROUTER
from thalweg.ops.norm import RMS_NORM
from thalweg.ops.projection import BATCHED_PROJECTION
from thalweg.ops.registry import Op
from thalweg.ops.residual import GATED_ADD
from thalweg.ops.sample import SAMPLE
from thalweg.ops.swiglu import NORM_SWIGLU

Makers = list[tuple[Op, Maker]]  # type: ignore[type-arg]
_OF_TOKENS: Makers = [  # what is the same for a token of a prompt
    (VOCAB_ROWS, projections.vocab_rows),
    (LINEAR, projections.linear),
    (NORM_LINEAR, projections.norm_linear),
    (LINEAR_ADD, projections.linear_add),
    (NORM_SWIGLU, projections.norm_swiglu),
    (LINEAR_FP8, projections.linear_fp8),
    (LINEAR_GGML, projections.linear_ggml),
    (NORM_LINEAR_FP8, projections.norm_linear_fp8),
    (LINEAR_ADD_FP8, projections.linear_add_fp8),
    (NORM_ROUTER, feed_forward.norm_router),
    (EXPERTS, feed_forward.experts),
    (ROUTED_EXPERTS, feed_forward.routed_experts),
    (SILU_AND_MUL, feed_forward.silu_and_mul),
    (GATED_ADD, feed_forward.gated_add),
    (RMS_NORM, feed_forward.rms_norm),
]
DECODE: Makers = [
    *_OF_TOKENS,
    (KDA_MIXER_DECODE, decode.kda_mixer),
    (GDN_MIXER_DECODE, decode.gdn_mixer),
    (GDN_DECODE_ADD, decode.gdn_decode_add),
    (MLA_MIXER_DECODE, decode.mla_mixer),
    (SPLIT_NORMS, rotated.split_norms),
    (MLA_DECODE, rotated.mla_decode),
    (GQA_MIXER_DECODE, decode.gqa_mixer),
    (SAMPLE, feed_forward.sample),
]
PREFILL: Makers = [
    *_OF_TOKENS,
    (BATCHED_PROJECTION, projections.batched_projection),
    (KDA_MIXER_PREFILL, prefill.kda_mixer),
    (GDN_MIXER_PREFILL, prefill.gdn_mixer),
    (SPLIT_NORMS, rotated.split_norms),
    (MLA_ROPE, rotated.mla_rope),
    (MLA_PREFILL, prefill.mla),
    (GQA_PREPARE, prefill.gqa_prepare),
    (GQA_PREFILL, prefill.gqa),
]
RANKS = "ranks"  # what several ranks run together, in processes: bench/kernels/ranks.py
SUITES = ("seeds", "decode", "prefill", RANKS)


def choose_ops(suite: str, op: str | None, model: ModelOps) -> list[Builder]:
    """The builders of a suite's cases, or of one op's. Raises ConfigError on a name that does not exist."""
    if suite not in SUITES:
        raise ConfigError(f"--suite is {suite!r}; expected {', '.join(SUITES)}")
    builders = dict(SEEDS) if suite == "seeds" else _of_model(suite, model)
    if op is not None and op not in builders:
        raise ConfigError(f"--op is {op!r}; suite {suite!r} has {', '.join(builders)}")
    return [builders[op]] if op is not None else list(builders.values())


def _of_model(suite: str, model: ModelOps) -> dict[str, Builder]:
    makers, asked = PREFILL if suite == "prefill" else DECODE, model.names()
    prompts = suite == "prefill"
    return {op.name: partial(_cases, op, maker, prompts) for op, maker in makers if op.name in asked}


def _cases(op: Op, maker: Maker, prompts: bool, setting: Setting) -> Iterator[Case]:  # type: ignore[type-arg]
    for dims in setting.model.dims(op):
        yield from maker(replace(setting, prompts=prompts), dims)


def run_suite(builders: list[Builder], setting: Setting, ceilings: Ceilings) -> Iterator[Measurement]:
    for builder in builders:
        for case in builder(setting):
            yield from measure_case(case, setting, ceilings)
