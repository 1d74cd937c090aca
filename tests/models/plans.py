"""Configs and weight plans as tests ask for them: ranks and schemes by plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg.models import family_of
from thalweg.models.family import DecoderConfig, Family, weight_plan
from thalweg.models.kimi_linear.family import KimiLinear
from thalweg.parallel.shards import Shards
from thalweg.quant import scheme_named
from thalweg.weights.plan import Target


def read(raw: Mapping[str, Any]) -> DecoderConfig:
    return family_of(raw).read(raw)


def plan(
    config: DecoderConfig,
    rank: int = 0,
    size: int = 1,
    quantization: str | None = None,
    family: Family = KimiLinear(),  # noqa: B008 -- has no state
) -> list[Target]:
    return weight_plan(family, config, Shards(rank, size), scheme_named(quantization))
