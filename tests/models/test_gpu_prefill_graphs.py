"""Steps with prompts as CUDA graphs, on a CUDA device, held to eager steps: logits, states, what is sampled.

A padded step has other products than an eager one of the same prompts, whose sums may be rounded otherwise. So in
bfloat16 a graph is held to an eager step that is as long, where nothing is left to rounding, and to what two eager
batchings of one prompt differ by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import random_checkpoint
from tests.models.served import BF16_KL, FAMILIES, KIMI
from thalweg.assembly.rank import build_rank
from thalweg.cache.specs import StateSpec
from thalweg.config.engine import EngineConfig
from thalweg.core import Admission, Prefill, SamplingParams, StepPlan, pack_ids
from thalweg.parallel.data_ranks import DataRanks
from thalweg.runner import prefill_graphs

pytestmark = pytest.mark.gpu

LONGEST, BLOCKS = 600, 10  # tokens of a sequence, and blocks of 64 that each slot has
LENGTHS = [70, 300, 33, 5]  # 104 fewer than a shape has


class Rank:
    """A runner, its steps' logits, and plans for it."""

    def __init__(self, folder: Path | None, dtype: str, **options: Any) -> None:
        limits = dict(max_num_seqs=8, max_model_len=LONGEST, cache_memory=1 << 30, prefill_graph_tokens=1024)
        cached = dict(enable_prefix_caching=True, snapshot_interval=64)
        model = None if folder is None else str(folder)
        config = EngineConfig(model, device="cuda", dtype=dtype, **{**limits, **cached, **options})
        self.runner, self.info = build_rank(config, 0, "")
        self._model: Any = self.runner.model
        self._step = 0
        self._seen: list[Tensor] = []

    def close(self) -> None:
        self.runner.close()

    def plan(
        self,
        prompts: dict[int, Sequence[int]],
        decodes: dict[int, int] | None = None,
        chunks: dict[int, tuple[int, int]] | None = None,
        silent: Sequence[int] = (),
        boundaries: Sequence[tuple[int, int, int]] = (),
    ) -> StepPlan:
        """Prompts by slot, whole or the `chunks` of them; those of `silent` slots do not sample."""
        self._step += 1
        decodes, chunks = decodes or {}, {s: (0, len(ids)) for s, ids in prompts.items()} | (chunks or {})
        params = SamplingParams(temperature=0, max_tokens=None)
        new = [slot for slot in prompts if chunks[slot][0] == 0]
        return StepPlan(
            step=self._step,
            admissions=[Admission(s, f"r{s}", pack_ids(prompts[s]), len(prompts[s]), params, 0, False) for s in new],
            new_blocks=[(s, i, 1 + (s - 1) * BLOCKS + i) for s in new for i in range(BLOCKS)],
            decode_slots=list(decodes),
            decode_starts=list(decodes.values()),
            prefills=[Prefill(s, start, end - start, s not in silent) for s, (start, end) in chunks.items()],
            boundaries=list(boundaries),
        )

    def eager(self, plan: StepPlan) -> tuple[list[int], Tensor]:
        """Ids and logits of a step that runs eagerly."""
        runner: Any = self.runner

        def watched(*args: Any) -> Tensor:
            self._seen.append(self._model(*args))
            return self._seen[-1]

        runner.model = watched
        ids = self.runner.launch(plan, eagerly=True)().token_ids
        runner.model = self._model
        return ids, self._seen.pop().float()

    def graph(self, plan: StepPlan) -> tuple[list[int], Tensor]:
        """Of a step in graphs, which must serve it."""
        graphs = self.runner.prefill_graphs
        assert graphs is not None
        before = graphs.steps.total()
        found: list[Tensor] = []
        original = graphs.run

        def watched(plan: StepPlan, shape: Any, news: Any) -> tuple[Tensor, Tensor]:
            logits, ids = original(plan, shape, news)
            found.append(logits.float().clone())
            return logits, ids

        graphs.run = watched  # type: ignore[method-assign]
        ids = self.runner.launch(plan)().token_ids
        graphs.run = original  # type: ignore[method-assign]
        assert graphs.steps.total() == before + 1
        return ids, found[0]

    def listed(self, plan: StepPlan) -> tuple[list[int], Tensor]:
        """Of the step that a graph would run, padding included, but from lists, as eager steps are run."""
        graphs, slots = self.runner.prefill_graphs, self.runner.slots
        assert graphs is not None
        shape = graphs.shape_of(plan)
        assert shape is not None
        with torch.inference_mode():
            slots.tell(slots.note(plan.admissions, plan.new_blocks))
            static = prefill_graphs.Static(shape, self.runner._batches, DataRanks())
            image = np.zeros(static.size, dtype=np.int64)
            static.write(plan, image)
            static.memory.copy_(torch.from_numpy(image))
            tables: Any = static.tables
            tables.offsets, tables.starts, tables.boundaries = tables.step
            logits, ids = static.run(self._model, self.runner._sampler, self.runner._share)
            d, n = len(plan.decode_slots), sum(p.sample for p in plan.prefills)
            rows = [*range(d), *range(shape.rows, shape.rows + n)]
            return ids[rows].tolist(), logits[rows].float()

    def kept(self, slots: Sequence[int]) -> list[Tensor]:
        """What a step has left of these slots: their states, and the blocks of their tokens."""
        kept = []
        for layer, specs in zip(self.runner.slots.cache.layers, self._model.cache_specs, strict=True):
            for name, spec in specs.items():
                rows = list(slots) if isinstance(spec, StateSpec) else [1 + (s - 1) * BLOCKS for s in slots]
                kept.append(layer[name][rows].float().nan_to_num())
        return kept

    def states(self, slots: Sequence[int]) -> list[Tensor]:
        """States alone, of any slots."""
        layers = zip(self.runner.slots.cache.layers, self._model.cache_specs, strict=True)
        names = [(layer[name], spec) for layer, specs in layers for name, spec in specs.items()]
        return [tensor[list(slots)].float() for tensor, spec in names if isinstance(spec, StateSpec)]


def ids_of(length: int, seed: int = 0) -> list[int]:
    rng = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, 1000, (length,), generator=rng).tolist()


def kl(a: Tensor, b: Tensor) -> float:
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module", params=FAMILIES)
def rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = FAMILIES[request.param]().write(tmp_path_factory.mktemp(request.param))
    rank = Rank(folder, "bfloat16")
    if rank.runner.prefill_graphs is None:
        pytest.skip(rank.info.prefill_steps)
    yield rank
    rank.close()


def test_a_padded_graph_is_an_eager_step_of_its_length_to_the_bit(rank: Rank) -> None:
    prompts = {slot: ids_of(n) for slot, n in enumerate(LENGTHS, 1)}
    filler = {5: ids_of(512 - sum(LENGTHS))}
    _, expected = rank.eager(rank.plan(prompts | filler, silent=[5]))
    left = rank.kept([1, 2, 3, 4])
    for how in ("static", "captured", "replayed"):
        ids, logits = rank.graph(rank.plan(prompts))
        difference = float((logits - expected).abs().max())
        print(f"{how}: logits off by {difference}, of {float(expected.abs().max())}")
        assert ids == logits.argmax(-1).tolist()
        assert kl(expected, logits) < 1e-6
        for got, want in zip(rank.kept([1, 2, 3, 4]), left, strict=True):
            assert torch.equal(got, want)


def test_a_graph_is_as_close_to_a_prompt_alone_as_eager_batches_are(rank: Rank) -> None:
    ids = ids_of(300)
    _, alone = rank.eager(rank.plan({1: ids}))
    batched = [rank.eager(rank.plan({1: ids, 2: ids_of(n)}))[1][:1] for n in (20, 212, 400)]
    graphs = [rank.graph(rank.plan({1: ids} | more))[1][:1] for more in ({}, {}, {2: ids_of(20)}, {2: ids_of(400)})]
    found = [[kl(alone, other) for other in others] for others in (batched, graphs)]
    print(f"KL from alone: eager batches {found[0]}, graphs {found[1]}")
    assert max(found[1]) < max(2 * max(found[0]), BF16_KL)


def test_cached_tokens_boundaries_and_rows_that_decode_are_eager_to_the_bit(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, snapshots on the way, and decode rows beside, against the same padded steps from lists. Contexts are as
    long as their shape's, since the products that expand latents are, too."""
    monkeypatch.setattr(prefill_graphs, "CONTEXTS", (384,))
    prompts = {1: ids_of(200), 2: ids_of(56), 3: ids_of(330)}
    snapshots = range(rank.runner.slots.cache.num_slots + 1, rank.runner.slots.cache.num_slots + 3)

    def run(step: Any) -> tuple[list[Tensor], list[Tensor]]:
        plans = [
            rank.plan({s: prompts[s] for s in (1, 2)}, boundaries=[(1, 64, 1), (1, 192, 2)]),
            rank.plan({3: prompts[3]}, {1: 200, 2: 56}, chunks={3: (0, 256)}, silent=[3]),
            rank.plan({3: prompts[3], 4: ids_of(5)}, {1: 201, 2: 57}, chunks={3: (256, 330)}),
        ]
        return [step(plan)[1] for plan in plans], [*rank.kept([1, 2, 3, 4]), *rank.states(snapshots)]

    expected, left = run(rank.listed)
    for how in ("static", "captured", "replayed"):
        found, kept = run(rank.graph)
        off = [float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)]
        same = sum(torch.equal(a, b) for a, b in zip(kept, left, strict=True))
        print(f"{how}: logits off by {off}; {same} of {len(left)} states and blocks equal to the bit")
        assert max(off) == 0
        assert same == len(left)


def test_in_float32_a_graph_gives_the_logits_of_eager_steps(tmp_path: Path) -> None:
    """Without latent attention, whose kernels take no float32."""
    c = random_checkpoint.config(**{**KIMI, "full": ()})
    rank = Rank(random_checkpoint.write(tmp_path / "model", c, random_checkpoint.weights(c)), "float32")
    if rank.runner.prefill_graphs is None:
        pytest.skip(rank.info.prefill_steps)
    for lengths in ([1], [100], [64, 65], LENGTHS, [LONGEST - 1], [20] * 8):
        prompts = {slot: ids_of(n, seed=slot) for slot, n in enumerate(lengths, 1)}
        _, expected = rank.eager(rank.plan(prompts))
        for _ in range(3):
            _, logits = rank.graph(rank.plan(prompts))
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    rank.close()
