"""The slot table, and the Batch that is built from it: prefills, decode rows, and rows that continue a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from tests.models import random_checkpoint as random
from thalweg.assembly.rank import build_rank
from thalweg.cache.specs import LayerSpecs, PagedSpec, StateSpec
from thalweg.cache.storage import CacheStorage
from thalweg.config.engine import EngineConfig
from thalweg.core import Admission, Prefill, SamplingParams, StepPlan, pack_ids
from thalweg.layers.batch import Batch
from thalweg.ops.host_tables import all_to_device
from thalweg.ops.sample.reference import sample
from thalweg.runner import batch as batch_module
from thalweg.runner.batch import DECODE_ROWS, BatchBuilder
from thalweg.runner.slots import SlotTable
from thalweg.sampling.sampler import Sampler
from thalweg.sampling.table import SamplingTable

CPU = torch.device("cpu")
LAYER: LayerSpecs = {"latent": PagedSpec((3,), "float32"), "state": StateSpec((2,), "float32")}


def slot_table(num_slots: int = 4, max_model_len: int = 40, block_size: int = 4) -> SlotTable:
    cache = CacheStorage([LAYER], 40, num_slots, block_size, CPU)
    return SlotTable(cache, SamplingTable(num_slots, 50, device=CPU), max_model_len)


def take_in(slots: SlotTable, admissions: list[Admission], blocks: list[tuple[int, int, int]]) -> None:
    slots.tell(slots.note(admissions, blocks))


def admission(slot: int, ids: list[int], *, prompt_logits: bool = False, **params: Any) -> Admission:
    return Admission(slot, f"r{slot}", pack_ids(ids), len(ids), SamplingParams(**params), 0, prompt_logits)


def decodes(
    slots: list[int], starts: list[int], new_blocks: list[tuple[int, int, int]] | None = None, step: int = 0
) -> StepPlan:
    return StepPlan(step, [], new_blocks or [], slots, starts, [])


def values(batch: Batch) -> dict[str, Any]:
    names = [f for f in Batch.__dataclass_fields__ if f != "block_tables_BN"]  # as wide as need be
    fields = {name: getattr(batch, name) for name in names}
    return {name: f.tolist() if isinstance(f, torch.Tensor) else f for name, f in fields.items()}


@pytest.mark.parametrize("every_row", [False, True])
def test_decode_rows_and_prefills_in_one_batch(every_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = slot_table()
    take_in(
        slots,
        [admission(2, [20, 21, 22, 23, 24, 25, 26]), admission(4, [40, 41, 42])],
        [(1, 0, 9), (1, 1, 8), (1, 2, 7), (3, 0, 11), (2, 0, 5), (2, 1, 3), (4, 0, 6)],
    )
    slots.last_tokens[:] = torch.tensor([0, 31, 0, 33, 0])
    copies: list[int] = []
    builder = BatchBuilder(slots)
    for owner, name in ((batch_module, "to_device"), (builder.stages, "next")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, original=original: copies.append(1) or original(*args))
    prefills = [Prefill(2, 2, 5, False), Prefill(4, 0, 3, True)]
    plan = StepPlan(0, [], [], [1, 3, 1], [10, 0, 3], prefills, boundaries=[(4, 2, 1), (2, 4, 3)])
    batch = builder.build(plan, every_row)
    assert values(batch) == {
        "token_ids_T": [31, 33, 31, 22, 23, 24, 25, 26, 40, 41, 42],
        "positions_T": [10, 0, 3, 2, 3, 4, 5, 6, 0, 1, 2],
        "num_decodes": 3,
        "starts": [2, 0],
        "slots_B": [1, 3, 1, 2, 4],
        "block_rows_T": [7 * 4 + 2, 11 * 4, 9 * 4 + 3, 22, 23, 12, 13, 14, 24, 25, 26],
        "context_lens_B": [11, 1, 4],
        "logit_rows_R": None if every_row else [0, 1, 2, 10],
        "boundaries": [(1, 2, 4 + 1), (0, 4, 4 + 3)],  # snapshots are slots after those of sequences
        "prefill_offsets": [0, 5, 8],
        "gathers": True,
    }
    assert batch.block_tables_BN.tolist() == [[9, 8, 7], [11, 0, 0], [9, 8, 7], [5, 3, 0], [6, 0, 0]]
    assert (batch.block_tables_BN.dtype, batch.context_lens_B.dtype) == (torch.int32, torch.int32)
    assert len(copies) == 1  # whatever a step needs of the host goes over at once
    parts = (batch.positions_T, batch.block_rows_T, batch.context_lens_B, batch.logit_rows_R)
    distances = [t.data_ptr() - batch.slots_B.data_ptr() for t in parts if t is not None]
    assert all(distance % 16 == 0 for distance in distances)  # as kernels are compiled for


def test_prefills_alone_that_sample_nothing() -> None:
    slots = slot_table()
    take_in(slots, [admission(1, [7, 8, 9])], [(1, 0, 2)])
    batch = BatchBuilder(slots).build(StepPlan(0, [], [], [], [], [Prefill(1, 0, 2, False)]))
    assert (batch.num_decodes, batch.prefill_offsets) == (0, [0, 2])
    assert (batch.token_ids_T.tolist(), batch.positions_T.tolist()) == ([7, 8], [0, 1])
    assert (batch.context_lens_B.tolist(), batch.logit_rows_R.tolist()) == ([], [])  # type: ignore[union-attr]


def test_steps_moved_on_by_a_token_equal_steps_built_anew() -> None:
    slots = slot_table()
    take_in(slots, [], [(s, i, 10 * s + i - 9) for s in (1, 2, 3) for i in range(4)])
    moving = BatchBuilder(slots)
    plans = [decodes([1, 3, 2], [5 + i, 1 + i, 2 + i]) for i in range(9)]
    plans += [decodes([1, 2], [14, 11]), decodes([1, 2], [15, 12], [(4, 0, 40)]), decodes([2, 1], [13, 15])]
    same = []
    for i, plan in enumerate(plans):
        slots.last_tokens[:] = torch.arange(5) + 100 * i
        before = moving._last
        batch = moving.build(replace(plan, step=i))
        same.append(before is not None and batch is before[1])
        anew = BatchBuilder(slots).build(plan)
        assert values(batch) == values(anew)
        assert torch.equal(batch.block_tables_BN[:, :3], anew.block_tables_BN[:, :3])
    assert 4 <= sum(same) < 9  # both ways are met


def test_a_step_after_one_that_was_built_elsewhere_is_built_anew() -> None:
    slots = slot_table()
    take_in(slots, [], [(1, 0, 9), (1, 1, 8)])
    batches = BatchBuilder(slots)
    batches.build(decodes([1], [4], step=7))
    take_in(slots, [admission(1, [5] * 5)], [(1, 0, 3), (1, 1, 2)])  # with a prompt in a graph, step 8
    assert batches.build(decodes([1], [5], step=9)).block_rows_T.tolist() == [2 * 4 + 1]


@pytest.mark.parametrize("size", [3, 4, 7])
def test_rows_staged_for_a_graph_are_those_of_an_eager_step_and_sinks(size: int) -> None:
    slots = slot_table()
    take_in(slots, [], [(1, 0, 9), (1, 1, 8), (3, 0, 11), (2, 0, 5)])
    slots.last_tokens[:] = torch.tensor([0, 31, 32, 33, 0])
    plan, builder = decodes([3, 1, 2], [0, 6, 3]), BatchBuilder(slots)
    stage = torch.full((DECODE_ROWS, 8), -1)
    builder.write_decodes(plan, stage.numpy()[:, :size])
    batch = builder.of_decodes(stage[:, :size], slots.max_blocks)
    sinks = size - 3
    assert values(batch) == values(builder.build(plan)) | {
        "token_ids_T": [33, 31, 32] + [0] * sinks,
        "positions_T": [0, 6, 3] + [0] * sinks,
        "num_decodes": size,
        "slots_B": [3, 1, 2] + [0] * sinks,
        "block_rows_T": [44, 34, 23] + [0] * sinks,
        "context_lens_B": [1, 7, 4] + [1] * sinks,
    }
    assert stage[3, :size].tolist() == batch.context_lens_B.tolist()  # positions of the tokens that are chosen
    assert bool((stage[:, size:] == -1).all())


def test_an_admission_leaves_nothing_of_the_slots_last_sequence() -> None:
    slots = slot_table()
    sampler = Sampler(slots.sampling, sample)
    reporting = admission(2, [1, 2], prompt_logits=True, prompt_logprobs=3, top_k=4, logprobs=1, presence_penalty=1.0)
    take_in(slots, [reporting, admission(3, [4], temperature=0)], [])
    slots.cache.layers[0]["state"].fill_(7)
    assert slots[2].inspected
    assert (sampler.simple([2]), sampler.simple([3])) == (False, True)
    take_in(slots, [admission(2, [5], temperature=0.5, min_p=0.0)], [])
    assert not slots[2].inspected
    assert slots[2].token_ids == [5]
    assert sampler.simple([2, 3])
    assert float(slots.sampling.temperature[2]) == 0.5
    assert int(slots.sampling.top_k[2]) == 0
    assert slots.cache.layers[0]["state"].tolist() == [[7, 7], [7, 7], [0, 0], [7, 7], [7, 7]]


@pytest.mark.parametrize("beside", [False, True])
def test_three_new_tokens_of_a_running_sequence_give_the_logits_of_three_decode_steps(
    tmp_path: Path, beside: bool
) -> None:
    c = random.config(vocab=128, context=300)
    folder = random.write(tmp_path / "model", c, random.weights(c))
    runner, _ = build_rank(EngineConfig(str(folder), max_num_seqs=3, block_size=8, cache_memory=1 << 24), 0, "")
    seen: list[torch.Tensor] = []
    model = runner.model

    def watched(batch: Batch, cache: CacheStorage) -> torch.Tensor:
        seen.append(model(batch, cache))
        return seen[-1]

    runner.model = watched
    prompt = [(5 * i + 3) % 128 for i in range(22)]  # so that the three cross from one block into the next
    params = SamplingParams(temperature=0, max_tokens=None)
    n, new_blocks = len(prompt), [(s, i, 10 * s + i) for s in (1, 2) for i in range(4)]
    first = StepPlan(
        0, [Admission(1, "steps", pack_ids(prompt), n, params, 0, False)], new_blocks, [], [], [Prefill(1, 0, n, True)]
    )
    tokens = list(runner.execute(first).token_ids)
    for i in range(3):
        tokens += runner.execute(decodes([1], [n + i])).token_ids
    expected = torch.cat(seen[1:])

    drafted = [*prompt, *tokens[:3]]
    whole = Admission(2, "at once", pack_ids(drafted), n, params, 0, True)
    runner.execute(StepPlan(0, [whole], [], [], [], [Prefill(2, 0, n, False)]))
    others = ([1], [n + 3]) if beside else ([], [])
    result = runner.execute(StepPlan(0, [], [], *others, [Prefill(2, n, 3, True)]))
    got = result.prompt_logits[2]
    assert got.shape == expected.shape == (3, 128)
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-5, rtol=0)
    assert result.token_ids[-1] == tokens[3]
    # And what they left in the cache is what three steps leave: the next step is the same.
    (after,) = runner.execute(decodes([2], [n + 3])).token_ids
    if not beside:
        assert [after] == runner.execute(decodes([1], [n + 3])).token_ids
    else:
        assert after == result.token_ids[0]


def test_arrays_of_several_dtypes_go_to_the_device_in_one_copy() -> None:
    arrays = [
        np.arange(3, dtype=np.int64),
        np.array([[1.5], [2.5], [-3.5]], dtype=np.float32),
        np.zeros(0, dtype=np.int32),
        np.array([7, -8, 9], dtype=np.int32),
    ]
    there = all_to_device(arrays, CPU)
    assert len({tensor.untyped_storage().data_ptr() for tensor in there}) == 1
    assert all(tensor.data_ptr() % 16 == there[0].data_ptr() % 16 for tensor in there if tensor.numel())
    for tensor, array in zip(there, arrays, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert tensor.dtype == torch.from_numpy(array).dtype
