"""The static steps with prompts (what CUDA graphs capture), run without capture: same tokens as the eager runner."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import random_checkpoint as random
from tests.models import random_qwen
from thalweg import LLM, SamplingParams
from thalweg.assembly import rank, steps
from thalweg.config.engine import EngineConfig
from thalweg.core import Prefill, StepPlan
from thalweg.ops.delta.kda_mixer import KDA_MIXER_DECODE, KDA_MIXER_PREFILL, KdaMixerDims
from thalweg.ops.host_tables import Limits, StepSequences, Tables, UnknownWhileCapturing, contexts, pieces, table
from thalweg.ops.registry import Resolver, Where
from thalweg.parallel.data_ranks import DataRanks
from thalweg.runner import prefill_graphs
from thalweg.runner import step as step_module
from thalweg.runner.prefill_graphs import (
    AT_ONCE,
    CONTEXTS,
    PREFILLS,
    TOKENS,
    PrefillGraphs,
    Shape,
    carries,
    token_sizes,
)
from thalweg.runner.slots import News

CPU = torch.device("cpu")


def test_token_sizes_end_with_the_budget_and_are_no_further_apart_than_a_sequence_is_long() -> None:
    assert token_sizes(8192, 100_000) == list(TOKENS)
    assert token_sizes(2048, 100_000) == [n for n in TOKENS if n <= 2048]
    assert token_sizes(100, 100_000) == [64, 128]
    assert token_sizes(8192, 130) == [64, 128, 192, 256, 384, 512]  # 768 could want 256 tokens more than 512
    assert token_sizes(8192, 40) == []
    for most in (64, 300, 512):
        assert all(b - a <= most for a, b in pairwise([0, *token_sizes(8192, most)]))


def shapes(**options: Any) -> PrefillGraphs:
    graphs = PrefillGraphs.__new__(PrefillGraphs)
    graphs._sizes, graphs._most_tokens, graphs._rows = [64, 128, 256], 256, [0, 8, 20]
    graphs._replays, graphs._refused, graphs._started, graphs._data = {}, set(), False, DataRanks()
    for name, value in options.items():
        setattr(graphs, name, value)
    return graphs


@pytest.mark.parametrize(
    ("decodes", "prefills", "expected"),
    [
        (0, [(0, 1)], Shape(0, 1, 64, 64)),
        (0, [(0, 64)], Shape(0, 1, 64, 64)),
        (0, [(0, 65)], Shape(0, 1, 128, 128)),
        (0, [(0, 30), (0, 40)], Shape(0, 15, 128, 128)),
        (3, [(7, 65)], Shape(8, 1, 128, CONTEXTS[0])),
        (20, [(CONTEXTS[0], 9), (0, 9)], Shape(20, 15, 64, CONTEXTS[1])),
        (20, [(CONTEXTS[-1], 9)], None),
        (21, [(0, 9)], None),
        (0, [(0, 257)], None),
        (0, [(0, 1)] * (PREFILLS[-1] + 1), None),
        (5, [], Shape(8, 1, 64, 64)),  # beside prompts of another data-parallel rank
    ],
)
def test_the_smallest_shape_that_holds_a_step(
    decodes: int, prefills: list[tuple[int, int]], expected: Shape | None
) -> None:
    rows = [Prefill(1 + i, start, length, True) for i, (start, length) in enumerate(prefills)]
    plan = StepPlan(0, [], [], [9] * decodes, [9] * decodes, rows)
    assert shapes().shape_of(plan) == expected


def test_shapes_beyond_the_most_that_are_kept_run_eagerly() -> None:
    plan = StepPlan(0, [], [], [], [], [Prefill(1, 0, 100, True)])
    full: dict[Any, Any] = dict.fromkeys(range(1000))
    assert shapes(_replays=full, _started=True).shape_of(plan) is None
    assert shapes(_replays=full | {Shape(0, 1, 128, 128): None}, _started=True).shape_of(plan) == Shape(0, 1, 128, 128)


def test_ranks_run_the_same_shapes_whichever_of_them_had_no_memory_for_a_graph() -> None:
    def plan(tokens: int) -> StepPlan:
        return StepPlan(0, [], [], [], [], [Prefill(1, 0, tokens, True)])

    shape, others = Shape(0, 1, 128, 128), dict.fromkeys(range(prefill_graphs.MAX_SHAPES - 1))
    ranks = (
        shapes(_replays=others | {shape: None}, _started=True),
        shapes(_replays=others, _refused={shape}, _started=True),
    )
    assert [graphs.shape_of(plan(100)) for graphs in ranks] == [shape, shape]
    assert [graphs.shape_of(plan(200)) for graphs in ranks] == [None, None]


def test_shapes_of_many_tokens_are_rehearsed_and_not_captured_at_the_start() -> None:
    graphs, slots, captured = shapes(), SimpleNamespace(max_model_len=9999), []
    graphs._sizes, graphs._keeps_prefixes, graphs._statics = [64, AT_ONCE, AT_ONCE + 256], False, {}
    graphs._batches = SimpleNamespace(slots=slots)
    graphs._at_rest = lambda shape: SimpleNamespace(tables=None)
    graphs._capture = lambda shape, step, tables: captured.append(shape)
    graphs.start()
    assert captured == [Shape(0, 1, AT_ONCE, AT_ONCE), Shape(0, 1, 64, 64)]
    assert {shape.tokens for shape in graphs._usual()} == set(graphs._sizes)


STEPS = [
    StepSequences([0, 70, 70, 100, 128], [5, 0, 64, 0], [(0, 64, 9)]),
    StepSequences([0, 1, 2, 3, 128], [0, 200, 3, 0], []),
    StepSequences([0, 128, 128, 128, 128], [0, 0, 0, 0], [(0, 64, 4), (0, 128, 5)]),
]


def tables_of(limits: Limits) -> tuple[Tables, torch.Tensor]:
    memory = torch.full((Tables.words(limits),), -7, dtype=torch.int32)
    return Tables(limits, memory), memory


@pytest.mark.parametrize("size", [16, 64])
def test_tables_at_fixed_addresses_begin_with_those_of_an_eager_step(size: int) -> None:
    tables, memory = tables_of(Limits(4, 128, 512))

    def ask() -> tuple[Any, ...]:
        cut = pieces(tables.offsets, size, CPU, tables.boundaries)
        context = contexts(tables.starts, tables.offsets, size, CPU)
        return cut, context, table(tables.starts, CPU)

    first = ask()
    for step in STEPS:
        tables.fill(step, memory.numpy())
        cut, context, starts = ask()
        assert cut.pieces_N2.data_ptr() == first[0].pieces_N2.data_ptr()  # nothing moves
        expected = pieces(step.offsets, size, CPU, step.boundaries)
        n = expected.num
        assert n <= cut.num == first[0].num
        for name in ("offsets_B1", "firsts_B1"):
            assert torch.equal(getattr(cut, name), getattr(expected, name))
        for name in ("pieces_N2", "saves_N"):
            assert torch.equal(getattr(cut, name)[:n], getattr(expected, name))
        assert cut.saves_N[n:].tolist() == [0] * (cut.num - n)
        # Pieces that no sequence needs begin where the last one ends.
        assert cut.pieces_N2[n:].tolist() == [[3, 128]] * (cut.num - n)

        of_step = contexts(step.starts, step.offsets, size, CPU)
        assert of_step.total <= context.total == 512
        assert torch.equal(context.totals_B3, of_step.totals_B3)
        assert torch.equal(context.cut.offsets_B1, of_step.cut.offsets_B1)
        assert torch.equal(context.cut.pieces_N2[: of_step.cut.num], of_step.cut.pieces_N2)
        assert starts.tolist() == step.starts


def test_tables_are_made_once_per_kind_and_lie_where_kernels_want_them() -> None:
    tables, memory = tables_of(Limits(3, 100, 100))
    asked = [pieces(tables.offsets, size, CPU) for size in (16, 64, 16)]
    assert [t.data_ptr() for t in asked[0][1:]] == [t.data_ptr() for t in asked[2][1:]]  # type: ignore[union-attr]
    for cut in asked[:2]:
        assert all((t.data_ptr() - memory.data_ptr()) % 16 == 0 for t in cut[1:])  # type: ignore[union-attr]


def test_memory_is_enough_for_the_tables_of_all_ops() -> None:
    for limits in (Limits(2, 64, 64), Limits(17, 64, 16384), Limits(17, 2048, 16384), Limits(2, 2048, 2048)):
        tables, _ = tables_of(limits)
        for size in (16, 32, 64, 128):
            pieces(tables.offsets, size, CPU, tables.boundaries)
        for size in (16, 128):
            contexts(tables.starts, tables.offsets, size, CPU)
        table(tables.starts, CPU)
        table(tables.offsets, CPU)


def test_values_that_change_are_not_known_while_a_graph_is_captured() -> None:
    tables, memory = tables_of(Limits(2, 64, 64))
    pieces(tables.offsets, 16, CPU, tables.boundaries)
    tables.fill(StepSequences([0, 40, 64], [3, 0], [(0, 16, 1)]), memory.numpy())
    assert (list(tables.offsets), list(tables.starts), list(tables.boundaries)) == ([0, 40, 64], [3, 0], [(0, 16, 1)])
    tables.frozen = True
    assert (len(tables.offsets), tables.offsets[0], tables.offsets[-1], tables.offsets[2]) == (3, 0, 64, 64)
    pieces(tables.offsets, 16, CPU, tables.boundaries)  # which were asked for before
    for look in (
        lambda: tables.offsets[1],
        lambda: list(tables.starts),
        lambda: tables.starts[-1],
        lambda: len(tables.boundaries),
        lambda: bool(tables.boundaries),
        lambda: pieces(tables.offsets, 64, CPU),
    ):
        with pytest.raises(UnknownWhileCapturing):
            look()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config(vocab=128, context=600)
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random_qwen.config()
    tensors = random_qwen.published(c, random_qwen.weights(c))
    return random_qwen.write(tmp_path_factory.mktemp("qwen"), random_qwen.nested(c), tensors)


def generate(folder: Path, **options: Any) -> list[list[int]]:
    """Requests of every kind, joining and leaving, so that prompts come alone, together, beside rows that decode, in
    chunks and after cached tokens."""
    params = [
        SamplingParams(max_tokens=n, ignore_eos=True, **more)
        for n, more in [
            (9, {"temperature": 0}),
            (5, {"seed": 1}),
            (8, {"seed": 2, "top_p": 0.8}),
            (7, {"temperature": 0, "presence_penalty": 1.0}),
            (11, {"seed": 3}),
            (6, {"temperature": 0, "logprobs": 1}),
            (3, {"temperature": 0, "prompt_logprobs": 1}),
        ]
    ]
    lengths = [130, 3, 64, 65, 200, 1, 33]
    prompts = [[(3 * i + j * j) % 128 for j in range(n)] for i, n in enumerate(lengths)]
    tokens = []
    with LLM(str(folder), max_num_seqs=5, max_num_batched_tokens=150, block_size=8, **options) as llm:
        for _ in range(2):  # the second time after cached prefixes, if they are kept
            tokens += [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    return tokens


def with_static_steps(monkeypatch: pytest.MonkeyPatch) -> list[step_module.ModelRunner]:
    """Lets runners on a CPU have static steps too, and gives them."""
    original, made = step_module.ModelRunner.__init__, []

    def init(self: Any, *args: Any) -> None:
        original(self, *args[:4], prefill_tokens=256, keeps_prefixes=args[7], recorded_rows=args[9])
        made.append(self)

    monkeypatch.setattr(steps, "why_not_recorded", lambda *_: "its steps are static")
    monkeypatch.setattr(step_module.ModelRunner, "__init__", init)
    return made


@pytest.mark.parametrize(("model", "keeps"), [("folder", False), ("folder", True), ("qwen", True)])
def test_static_steps_give_the_tokens_of_eager_ones(
    model: str, keeps: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(model)
    options = {"enable_prefix_caching": keeps, "snapshot_interval": 64}
    expected = generate(folder, **options)
    met: list[tuple[Shape, StepPlan]] = []
    carried: list[News | None] = []

    class Uncaptured(PrefillGraphs):
        def run(self, plan: StepPlan, shape: Shape, news: News | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            met.append((shape, plan))
            carried.append(news)
            return super().run(plan, shape, news)

    monkeypatch.setattr(step_module, "PrefillGraphs", Uncaptured)
    with_static_steps(monkeypatch)
    assert generate(folder, **options) == expected
    assert len(met) >= 7
    assert {shape.rows for shape, _ in met} == {0, 5}
    assert len({shape.tokens for shape, _ in met}) > 1
    assert any(p.start for _, plan in met for p in plan.prefills)
    assert all(
        news is None for news, (shape, plan) in zip(carried, met, strict=True) if shape.prefills > 1 or plan.restores
    )
    assert any(news is not None and len(news.slots) for news in carried)
    assert any(len(plan.prefills) > 1 for _, plan in met)
    assert any(plan.boundaries for _, plan in met) == keeps
    assert any(plan.restores for _, plan in met) == keeps


def test_a_step_of_one_prompt_carries_what_is_new_up_to_the_blocks_of_its_context() -> None:
    def news(admissions: int, blocks: int) -> News:
        return News(*(np.zeros(n) for n in (admissions, 3, 2, blocks, blocks)))

    one, many = Shape(0, 1, 1024, 1024), Shape(8, 15, 1024, 1024)
    assert carries(one, news(1, 17))
    assert carries(one, news(0, 1))
    assert not carries(one, news(2, 0))
    assert not carries(one, news(1, 60))
    assert carries(Shape(0, 1, 1024, 4096), news(1, 60))
    assert not carries(many, news(1, 0))


def start_before_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ranks capture at their start, as on a GPU."""
    build = rank.build_rank

    def build_and_start(*args: Any, **options: Any) -> Any:
        runner, info = build(*args, **options)
        runner.rehearse(runner.model, [])
        runner.capture()
        return runner, info

    monkeypatch.setattr(rank, "build_rank", build_and_start)


def test_a_conversations_second_turn_waits_for_no_capture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_graphs, "captured", lambda step, pool, cuts: (step, pool))
    runners = with_static_steps(monkeypatch)
    start_before_ready(monkeypatch)
    first = [j % 128 for j in range(200)]
    greedy = SamplingParams(max_tokens=3, temperature=0)
    with LLM(str(folder), max_num_seqs=2, max_num_batched_tokens=512) as llm:
        said = llm.generate([first], greedy)[0].outputs[0].token_ids
        turn = llm.generate([first + said + first[:40]], greedy)[0]
    assert turn.num_cached_tokens == 192
    graphs = runners[0].prefill_graphs
    assert graphs is not None
    assert graphs.steps == {"captured": 2}


def test_a_second_start_leaves_no_graph_of_the_first_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a graph would read the inputs that it was captured with, whose memory is gone."""
    monkeypatch.setattr(prefill_graphs, "captured", lambda step, pool, cuts: (step, pool))
    prompts = [[(i * j + 7) % 128 for j in range(200)] for i in (3, 5)]
    greedy = SamplingParams(max_tokens=4, temperature=0)
    with LLM(str(folder), max_num_seqs=2, enable_prefix_caching=False) as llm:
        expected = [llm.generate([p], greedy)[0].outputs[0].token_ids for p in prompts]
    runners = with_static_steps(monkeypatch)
    start_before_ready(monkeypatch)
    with LLM(str(folder), max_num_seqs=2, enable_prefix_caching=False) as llm:
        graphs = runners[0].prefill_graphs
        assert graphs is not None
        found = [llm.generate([prompts[0]], greedy)[0].outputs[0].token_ids]
        monkeypatch.setattr(graphs, "_usual", lambda: [Shape(0, 1, 64, 64)])
        runners[0].capture()
        found.append(llm.generate([prompts[1]], greedy)[0].outputs[0].token_ids)
        assert found == expected
        assert set(graphs._replays) <= set(graphs._statics)


def test_shapes_of_one_prompt_and_of_a_next_turn_are_captured_at_the_start_and_others_when_they_are_met_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(folder)
    captured: list[Shape] = []
    monkeypatch.setattr(PrefillGraphs, "close", lambda self: None)  # they are looked at afterwards
    monkeypatch.setattr(prefill_graphs, "TURN", 128)

    def capture(step: Any, pool: Any, cuts: Any) -> tuple[Any, str]:
        """A graph that only looks like one."""
        static = step.args[0]
        assert static.tables.frozen
        assert pool == ("pool" if captured else None)
        captured.append(static.shape)
        return step, "pool"

    monkeypatch.setattr(prefill_graphs, "captured", capture)
    runners = with_static_steps(monkeypatch)
    start_before_ready(monkeypatch)
    assert generate(folder) == expected
    graphs = runners[0].prefill_graphs
    assert graphs is not None
    turns = [Shape(d, 1, n, CONTEXTS[0]) for d in (5, 0) for n in (128, 64)]
    usual = [Shape(0, 15, 256, 256), *turns, *(Shape(0, 1, n, n) for n in (256, 192, 128, 64))]
    assert captured[: len(usual)] == usual
    assert len(set(captured)) == len(captured) > len(usual)
    assert set(captured) == set(graphs._replays)
    once = [shape for shape in graphs._statics if shape not in graphs._replays]
    assert graphs.steps["uncaptured"] == len(once) + len(captured) - len(usual)
    assert graphs.steps["captured"] > 0
    assert graphs.steps["eager"] == 2  # prompts whose log-probabilities are asked for, in both rounds


def test_a_shape_too_large_to_capture_runs_eagerly_and_harms_no_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = generate(folder)
    tried: list[Shape] = []

    def capture(step: Any, pool: Any, cuts: Any) -> Any:
        tried.append(step.args[0].shape)
        raise torch.OutOfMemoryError("no memory: a test")

    monkeypatch.setattr(prefill_graphs, "captured", capture)
    runners = with_static_steps(monkeypatch)
    build = rank.build_rank

    def build_and_start(*args: Any, **options: Any) -> Any:
        runner, info = build(*args, **options)
        runner.prefill_graphs._started = True
        return runner, info

    monkeypatch.setattr(rank, "build_rank", build_and_start)
    assert generate(folder) == expected
    graphs = runners[0].prefill_graphs
    assert graphs is not None
    assert len(tried) == len(set(tried)) > 0
    assert set(tried) == graphs._refused
    assert not any(static.tables.frozen for static in graphs._statics.values())
    assert caplog.text.count("no memory: a test") == len(tried)


def test_a_capture_of_ops_that_look_at_what_changes_fails_and_leaves_steps_as_they_were(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(step: Any, pool: Any, cuts: Any) -> tuple[Any, Any]:
        step()
        return step, pool

    monkeypatch.setattr(prefill_graphs, "captured", capture)
    with_static_steps(monkeypatch)
    runner, _ = rank.build_rank(EngineConfig(str(folder), max_num_seqs=3, cache_memory=1 << 24), 0, "")
    with pytest.raises(UnknownWhileCapturing, match="not known while a graph is captured"):
        runner.capture()
    assert runner.prefill_graphs is not None
    assert not runner.prefill_graphs._replays
    assert not any(static.tables.frozen for static in runner.prefill_graphs._statics.values())


@pytest.mark.parametrize(("rows", "most"), [("decodes", 8), ("prefills", 100)])
def test_ops_say_whether_steps_of_their_rows_can_be_captured(rows: Any, most: int) -> None:
    resolver = Resolver({"kda_mixer_prefill": "reference", "kda_mixer_decode": "reference"})
    for op in (KDA_MIXER_PREFILL, KDA_MIXER_DECODE):
        resolver.resolve(op, Where("cpu", "float32"), KdaMixerDims(H=2, K=8, V=8, R=4, W=3))
    reasons = [choice.why_not_captured(rows, most) for choice in resolver.explain()]
    of_prefills = "op kda_mixer_prefill is served by 'reference', which cannot be captured"
    assert reasons == [of_prefills if rows == "prefills" else None, None]
