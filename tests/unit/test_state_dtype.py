"""--state-dtype bfloat16: half the memory of recurrent states, and what that does to logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models import random_checkpoint as random
from thalweg import LLM
from thalweg.assembly.inspect import describe
from thalweg.assembly.source import open_source
from thalweg.bench.ceilings import Ceilings
from thalweg.bench.floor import batch_floor, step_floor
from thalweg.config.engine import EngineConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config()  # 3 KDA layers of 4 heads x 8
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


def logits(folder: Path, state_dtype: str) -> tuple[Tensor, int]:
    """Of 200 tokens, taken in chunks between which states are stored, and a sequence's bytes of state."""
    with LLM(str(folder), max_num_batched_tokens=8, state_dtype=state_dtype) as llm:
        return llm.prompt_logits([(7 * i + i * i) % 128 for i in range(200)]), llm.info.bytes_per_sequence


def test_states_are_stored_in_it_and_logits_stay_close(folder: Path) -> None:
    (expected, whole), (got, half) = logits(folder, "float32"), logits(folder, "bfloat16")
    assert whole - half == 3 * 2 * 4 * 8 * 8  # layers, bytes saved, heads, V, K
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < 0.02


def test_inspect_counts_it(folder: Path) -> None:
    config = EngineConfig(str(folder))
    whole, half = (describe(replace(config, state_dtype=d)).cost.bytes_per_sequence for d in ("float32", "bfloat16"))
    assert whole - half == 3 * 2 * 4 * 8 * 8


def test_floors_of_latency_and_decode_count_it_alike(folder: Path) -> None:
    source = open_source(EngineConfig(str(folder)))
    ceilings = Ceilings(bytes_per_s=1e6, flops_per_s=1e30)  # a byte takes a microsecond, arithmetic nothing
    floors, steps = [], []
    for state_dtype in ("float32", "bfloat16"):
        with LLM(str(folder), state_dtype=state_dtype) as llm:
            floors.append(batch_floor(source, llm.info, ceilings, 5, 90, 20))
            steps.append(step_floor(source, llm.info, ceilings, 5, 100))
    saved = 5 * 3 * 2 * 4 * 8 * 8  # sequences, layers, bytes saved, heads, V, K
    assert floors[0].step.bytes - floors[1].step.bytes == 2 * saved  # read and written
    assert floors[0].prefill.bytes - floors[1].prefill.bytes == saved
    assert steps == [floor.step for floor in floors]
    assert steps[0].ms - steps[1].ms == pytest.approx(1e3 * 2 * saved / 1e6)


def test_other_ops_take_such_states_too() -> None:
    from thalweg.ops.delta.kda.reference import kda_decode, kda_prefill

    T, H, K = 20, 2, 16
    q, k, v, g, beta = (torch.randn(T, H, *s) for s in ((K,), (K,), (K,), (K,), ()))
    state, slots = torch.randn(3, H, K, K).bfloat16(), torch.tensor([1])
    stepped, exact = state.clone(), state.float()
    beta = beta.sigmoid()
    steps = [kda_decode(*(x[t : t + 1] for x in (q, k, v, -g.abs(), beta)), stepped, slots) for t in range(T)]
    o = kda_prefill(q, k, v, -g.abs(), beta, state_NHVK=state, slots_B=slots, offsets=[0, T])
    kda_prefill(q, k, v, -g.abs(), beta, state_NHVK=exact, slots_B=slots, offsets=[0, T])
    assert state.dtype == torch.bfloat16
    assert torch.equal(state, exact.bfloat16())  # rounded once, at the end
    assert (torch.cat(steps) - o).norm() < 0.05 * o.norm()  # decode rounds at every token
