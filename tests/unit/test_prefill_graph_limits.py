"""Which steps with prompts are graphs, as --prefill-graph-tokens says, and what `thalweg serve` prints about it.

Ranks on a CPU build graphs here as one on a GPU does; they are not captured.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tests.models import random_checkpoint as random
from thalweg import LLM, SamplingParams
from thalweg.assembly import rank, steps
from thalweg.config.engine import EngineConfig
from thalweg.core import StepPlan
from thalweg.runner import step as step_module
from thalweg.runner.prefill_graphs import PrefillGraphs, Shape, token_sizes
from thalweg.runner.slots import News

CONTEXT = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config(vocab=128, context=CONTEXT)
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "why_eager", lambda *args: None)


def tokens_of_graphs(monkeypatch: pytest.MonkeyPatch, llm: LLM, lengths: list[int]) -> list[int]:
    """How many prompt tokens the steps had that ran as graphs."""
    met: list[int] = []
    run = PrefillGraphs.run

    def watched(graphs: PrefillGraphs, plan: StepPlan, shape: Shape, news: News | None) -> tuple[Tensor, Tensor]:
        met.append(sum(p.length for p in plan.prefills))
        return run(graphs, plan, shape, news)

    monkeypatch.setattr(step_module.PrefillGraphs, "run", watched)
    for n in lengths:
        llm.generate([[j % 128 for j in range(n)]], SamplingParams(temperature=0, max_tokens=2))
    return met


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("prefill_graph_tokens", [60, 100]),
        ("max_num_batched_tokens", [60, 100, 100, 1, 100, 28]),  # the longer prompts take two steps
    ],
)
def test_steps_of_exactly_so_many_tokens_are_graphs_and_longer_ones_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, option: str, expected: list[int]
) -> None:
    with LLM(str(folder), max_num_seqs=2, block_size=8, enable_prefix_caching=False, **{option: 100}) as llm:
        assert tokens_of_graphs(monkeypatch, llm, [60, 100, 101, 128]) == expected


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "CUDA graphs of up to 2048 tokens, eager beyond"),
        ({"prefill_graph_tokens": 100}, "CUDA graphs of up to 100 tokens, eager beyond"),
        ({"max_num_batched_tokens": 1000}, "CUDA graphs of up to 1000 tokens, eager beyond"),
        ({"max_model_len": 40}, "eager: --max-model-len is too small for graphs"),
        ({"prefill_graph_tokens": 0}, "eager: --prefill-graph-tokens is 0"),
    ],
)
def test_what_is_printed_of_steps_with_prompts(folder: Path, options: dict[str, int], expected: str) -> None:
    config = EngineConfig(str(folder), max_num_seqs=2, cache_memory=1 << 24, **options)
    runner, info = rank.build_rank(config, 0, "")
    runner.close()
    assert info.prefill_steps == expected


@pytest.mark.parametrize(("ranks", "tokens"), [(1, 2048), (2, 4096), (4, 0)])
def test_two_ranks_that_share_prompts_have_graphs_of_more_tokens(ranks: int, tokens: int) -> None:
    config = EngineConfig(tensor_parallel_size=ranks)
    config = config.resolve(device="cuda", checkpoint_dtype="bfloat16", context_len=100_000, layers=2)
    assert config.prefill_graph_tokens == tokens
    assert token_sizes(tokens, 100_000)[-1:] == ([tokens] if tokens else [])
