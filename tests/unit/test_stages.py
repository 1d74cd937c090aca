"""The host memory that steps with prompts are staged in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from thalweg.runner import stages
from thalweg.runner.stages import STAGES, Stages


def test_on_a_gpu_memory_is_written_anew_in_turn_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, pinned = torch.empty, list[tuple[int, ...]]()

    def without_a_gpu(*shape: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            pinned.append(shape)
        return empty(*shape, **options)

    monkeypatch.setattr(stages.torch, "empty", without_a_gpu)
    staged = Stages(torch.device("cuda"))
    first = [staged.next(5) for _ in range(STAGES)]
    assert len({stage.data_ptr() for stage in first}) == STAGES
    assert [stage.shape for stage in first] == [(5,)] * STAGES
    assert staged.next(8).data_ptr() == first[0].data_ptr()
    assert staged.next(9).shape == (9,)
    assert staged.next(4).shape == (4,)
    assert pinned == [(STAGES, 8), (STAGES, 16)]


def test_on_a_cpu_each_is_memory_of_its_own() -> None:
    staged = Stages(torch.device("cpu"))
    kept = [staged.next(3) for _ in range(STAGES + 1)]
    assert len({stage.data_ptr() for stage in kept}) == len(kept)
