"""Bytes and operations of a step, against sums done by hand for the published shape."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from thalweg.models import family_of
from thalweg.models.family import DecoderConfig, step_costs
from thalweg.models.parts.part import Cost, Step
from thalweg.parallel.shards import Shards
from thalweg.quant import scheme_named

BANDWIDTH, RATE = 4.3e12, 781e12


@pytest.fixture(scope="module")
def config(shared_dir: Path) -> DecoderConfig:
    raw = json.loads((shared_dir / "configs" / "kimi_linear_48b_a3b.json").read_text())
    return family_of(raw).read(raw)


def total(costs: Iterable[Cost]) -> Cost:
    costs = list(costs)
    return Cost("", sum(c.bytes for c in costs), sum(c.flops for c in costs), sum(c.sent for c in costs))


# 3.27 GB of weights that every token takes, 14.2 MB per expert, 86.9 MB of states and 8,064 B per cached token.
@pytest.mark.parametrize(("batch", "ms"), [(1, 1.47), (8, 5.91), (32, 15.7), (128, 26.0)])
def test_decode(config: DecoderConfig, batch: int, ms: float) -> None:
    cost = total(step_costs(config, Step(batch, cached=4500)))
    assert cost.bytes / BANDWIDTH * 1e3 == pytest.approx(ms, rel=0.005)


# 98 GB of weights read once bind up to about 3,000 tokens, 5.5 GFLOP per token beyond.
@pytest.mark.parametrize(("length", "ms"), [(1024, 22.7), (4096, 30.4), (8192, 63.8)])
def test_prefill(config: DecoderConfig, length: int, ms: float) -> None:
    cost = total(step_costs(config, Step(1, new=length)))
    assert max(cost.bytes / BANDWIDTH, cost.flops / RATE) * 1e3 == pytest.approx(ms, rel=0.01)


@pytest.mark.parametrize(("length", "ms"), [(1024, 26), (8192, 67), (16000, 138)])
def test_the_floor_of_each_operation_is_counted_by_itself(config: DecoderConfig, length: int, ms: float) -> None:
    """At 1024 tokens the experts wait for memory and the projections for arithmetic: one maximum would hide that."""
    costs = step_costs(config, Step(1, new=length))
    floor = sum(max(c.bytes / BANDWIDTH, c.flops / RATE) for c in costs) * 1e3
    assert floor == pytest.approx(ms, rel=0.05)


def test_products_in_float8_may_be_twice_as_fast_in_prompts(config: DecoderConfig) -> None:
    """Whose activations are quantized too; not those of decode rows, nor in float32."""

    def rates(step: Step) -> set[float]:
        return {c.rate for c in step_costs(config, step) if c.what == "experts"}

    fp8 = scheme_named("fp8")
    assert rates(Step(1, new=8192, scheme=fp8)) == {2.0}
    assert rates(Step(8, cached=100, scheme=fp8)) == {1.0}
    assert rates(Step(1, new=8192, scheme=fp8, dtype_bytes=4)) == {1.0}
    assert rates(Step(1, new=8192)) == {1.0}


def test_prompts_of_one_token_cost_what_a_step_on_empty_caches_does(config: DecoderConfig) -> None:
    one, two = (total(step_costs(config, Step(4, new=n))) for n in (1, 2))
    assert two.flops == pytest.approx(2 * one.flops, rel=0.15)  # the head is for one row of each prompt
    continued = total(step_costs(config, Step(4, new=1, cached=1)))
    assert continued.bytes - one.bytes == pytest.approx(4 * 20 * (32 * 128 * 128 * 4 + 3 * 4096 * 3 * 2), rel=0.01)


def test_ranks_share_the_work_and_pay_for_the_sums(config: DecoderConfig) -> None:
    whole = total(step_costs(config, Step(32, cached=1000)))
    ranks = total(step_costs(config, Step(32, cached=1000, shards=Shards(0, 4))))
    assert whole.sent == 0
    assert whole.bytes / 4 < ranks.bytes < whole.bytes / 4 * 1.15  # the latent, the router, f_a and g_a are replicated
    rows = 32 * 2304 * 2 * 1.5  # what a rank sends of a ring's sum over 4
    assert ranks.sent == pytest.approx((2 * 27 + 1) * rows + 3 * 32 * 40960 * 2)


def test_data_parallel_ranks_run_their_experts_for_the_tokens_of_all(config: DecoderConfig) -> None:
    """Of 64 sequences on 8 ranks each has 8, and 32 of 256 experts: those that 64 tokens take of them."""

    def experts(step: Step) -> Cost:
        return total([cost for cost in step_costs(config, step) if cost.what == "experts"])

    def rest(step: Step) -> float:
        return total(step_costs(config, step)).bytes - experts(step).bytes

    whole, one = Step(64, cached=1000), Step(8, cached=1000)
    ranks = replace(one, others=56, shards=Shards(0, 1, 0, 8))
    shared = 26 * 3 * 2304 * 1024  # a shared expert is on every rank, for its own tokens
    assert experts(ranks).bytes == pytest.approx((experts(whole).bytes - 2 * shared) / 8 + 2 * shared)
    assert experts(ranks).flops == pytest.approx(experts(whole).flops / 8)
    assert rest(ranks) == pytest.approx(rest(one))
    # A token's 8 experts are on 4.6 of 7 other ranks: so many rows go there, and so many sums come back.
    assert total(step_costs(config, ranks)).sent == pytest.approx(26 * 2 * 8 * 7 * (1 - (7 / 8) ** 8) * 2304 * 2)
    alone = replace(one, sequences=1, others=0, shards=Shards(0, 1, 0, 8))
    assert experts(alone).bytes == pytest.approx(26 * 3 * 2304 * 1024 * 2 * (8 / 8 + 1))
