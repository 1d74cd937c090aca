"""`bench decode` and `bench latency`: steps and floors of one rank, and of two that share the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thalweg.bench.ceilings import Ceilings
from thalweg.cli import main
from thalweg.models.parts.part import Cost

DUMMY = ["--load-format", "dummy", "--device", "cpu", "--cache-memory", "64MiB"]
RANKS = [1, pytest.param(2, marks=pytest.mark.slow)]


def bench(file: Path, command: str, *arguments: str) -> dict[str, Any]:
    assert main(["bench", command, *DUMMY, *arguments, "--output-json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert isinstance(figures, dict)
    return figures


@pytest.mark.parametrize("ranks", RANKS)
def test_decode_steps_beside_the_floor_of_a_rank(
    ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--batch-size", "1,3", "--context", "40", "--steps", "3", "--num-iters", "2", "-tp", str(ranks))
    figures = bench(tmp_path / "a.json", "decode", *sizes)
    assert figures["engine"]["tensor_parallel_size"] == ranks
    assert ("link_GB_per_s" in figures["machine"]) == (ranks > 1)
    for row in figures["results"]:
        assert row["step_ms"]["min"] > 0
        assert row["launches"] is None
        assert row["floor_ms"] > 0
        assert (row["floor_sent"] > 0) == (ranks > 1)
    one, three = figures["results"]
    assert three["floor_sent"] == 3 * one["floor_sent"]  # a row of activations for each token
    assert "MB sent" in capsys.readouterr().out
    if ranks > 1:
        alone = bench(tmp_path / "b.json", "decode", *sizes[:-2])["results"][0]
        assert 0.5 * alone["floor_bytes"] <= one["floor_bytes"] < 0.7 * alone["floor_bytes"]  # some are replicated


def test_decode_has_all_of_the_caches_memory_for_its_sequences() -> None:
    sizes = ["--batch-size", "4", "--context", "2000", "--steps", "2", "--num-iters", "1"]
    assert main(["bench", "decode", "--load-format", "dummy", "--device", "cpu", "--cache-memory", "8MiB", *sizes]) == 0


@pytest.mark.parametrize("ranks", RANKS)
def test_latency_beside_the_floor_of_a_rank(ranks: int, tmp_path: Path) -> None:
    sizes = ("--batch-size", "2", "--input-len", "8", "--output-len", "4", "--num-iters", "1", "-tp", str(ranks))
    [row] = bench(tmp_path / "a.json", "latency", *sizes)["results"]
    floor = row["floor"]
    assert floor["step_ms"] > 0
    assert (floor["step_sent"] > 0) == (ranks > 1)
    if ranks > 1:  # 8 tokens of each sequence instead of 1, but logits of the last one alone
        assert 6 * floor["step_sent"] < floor["prefill_sent"] < 8 * floor["step_sent"]


def test_ops_that_ranks_run_together_beside_their_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    sizes = ["--suite", "ranks", "-tp", "2", "--op", "all_gather", "--device", "cpu", "--batch-size", "1,3"]
    assert main(["bench", "kernels", *sizes, "--output-json", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert [(r["implementation"], r["us"] is None) for r in results] == 2 * [("reference", False), ("cuda", True)]
    one, _, three, _ = results
    assert one["floor_us"] > 0
    assert three["num_bytes"] == 3 * one["num_bytes"]
    assert "cuda: needs ranks that map each other's memory" in capsys.readouterr().out


def test_the_exchange_of_data_parallel_ranks_beside_their_link(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for op, sent in (("expert_dispatch", 2 * 8), ("expert_combine", 0)):  # beside the rows: the experts of a token
        sizes = ["--suite", "ranks", "-tp", "2", "--op", op, "--device", "cpu", "--batch-size", "5"]
        assert main(["bench", "kernels", *sizes, "--output-json", str(file)]) == 0
        reference, *others = json.loads(file.read_text())["results"]
        assert reference["us"]["min"] > 0
        refusals = {each["implementation"]: each["refusal"] for each in others}
        assert {refusals["cuda"], refusals["cuda_many"]} == {"needs ranks that map each other's memory"}
        assert reference["num_bytes"] == 5 * (256 * 4 + sent)


def test_an_operation_takes_the_longest_of_traffic_arithmetic_and_what_it_sends() -> None:
    ceilings = Ceilings(bytes_per_s=10.0, flops_per_s=100.0, link_bytes_per_s=2.0)
    costs = [Cost("read", bytes=20.0, flops=10.0), Cost("product", bytes=1.0, flops=300.0), Cost("reduce", sent=8.0)]
    assert ceilings.floor_s(costs) == 2.0 + 3.0 + 4.0
    assert ceilings.floor_s([Cost("product in float8", bytes=1.0, flops=300.0, rate=2.0)]) == 1.5
    assert Ceilings(10.0, 100.0).floor_s(costs) == 5.0  # nothing to send to
