"""Bytes and operations of a step, against sums done by hand for the published shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thalweg.models.kimi_linear import Config, decode_cost, prefill_cost

BANDWIDTH, RATE = 4.3e12, 781e12


@pytest.fixture(scope="module")
def config(shared_dir: Path) -> Config:
    raw = json.loads((shared_dir / "configs" / "kimi_linear_48b_a3b.json").read_text())
    return Config.from_dict(raw, "config.json")


# 3.27 GB of weights that every token takes, 14.2 MB an expert, 86.9 MB of states and 8,064 B a cached token.
@pytest.mark.parametrize(("batch", "ms"), [(1, 1.47), (8, 5.91), (32, 15.7), (128, 26.0)])
def test_decode(config: Config, batch: int, ms: float) -> None:
    assert decode_cost(config, batch, 4500).bytes / BANDWIDTH * 1e3 == pytest.approx(ms, rel=0.005)


# 98 GB of weights read once bind up to about 3,000 tokens, 5.5 GFLOP a token beyond.
@pytest.mark.parametrize(("length", "ms"), [(1024, 22.7), (4096, 30.4), (8192, 63.8)])
def test_prefill(config: Config, length: int, ms: float) -> None:
    cost = prefill_cost(config, 1, length)
    assert max(cost.bytes / BANDWIDTH, cost.flops / RATE) * 1e3 == pytest.approx(ms, rel=0.01)


def test_prompts_of_one_token_cost_what_a_step_on_empty_caches_does(config: Config) -> None:
    one, step = prefill_cost(config, 4, 1), decode_cost(config, 4, 0)
    assert one.bytes == pytest.approx(step.bytes, rel=0.02)
    assert one.flops == pytest.approx(step.flops, rel=0.01)
