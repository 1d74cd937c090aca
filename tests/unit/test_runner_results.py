"""When a step's result is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from tests.models import random_checkpoint as random
from thalweg import LLM, SamplingParams
from thalweg.runner import step as step_module
from thalweg.runner.readback import Readback


def test_a_chunk_without_a_token_is_waited_for_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    class Counting(Readback):
        def __call__(self, ids_R: Tensor) -> Callable[[], list[int]]:
            read = super().__call__(ids_R)

            def counted() -> list[int]:
                reads.append(len(ids_R))
                return read()

            return counted

    monkeypatch.setattr(step_module, "Readback", Counting)
    c = random.config(vocab=128, context=300)
    folder = random.write(tmp_path / "model", c, random.weights(c))
    with LLM(str(folder), max_num_seqs=2, max_num_batched_tokens=8, block_size=8) as llm:
        llm.generate([list(range(20))], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    assert reads == [0, 0, 1, 1, 1]  # 8, 8 and 4 tokens of the prompt, then two steps of decode
