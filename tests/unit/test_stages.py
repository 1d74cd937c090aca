"""Host memory that steps are staged in is written anew only once its copy is over."""

from __future__ import annotations

import pytest
import torch

from thalweg.runner import stages
from thalweg.runner.stages import STAGES, Stages


class Stream:
    """Copies that never end by themselves: an event is over once somebody waits for it."""

    def __init__(self) -> None:
        self.launched = 0
        self.over = 0  # of the copies launched

    def record_event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.behind = stream, stream.launched

    def synchronize(self) -> None:
        self.stream.over = max(self.stream.over, self.behind)


@pytest.mark.parametrize("sizes", [[8] * 20, [3, 9, 4, 40, 40, 2, 300, 7, 7, 7]])
def test_a_stage_is_given_once_its_last_copy_is_over(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    empty = torch.empty
    monkeypatch.setattr(stages.torch, "empty", lambda *shape, pin_memory=False, **rest: empty(*shape, **rest))
    given, read_by = Stages(torch.device("cuda")), dict[int, int]()
    for number, size in enumerate(sizes, start=1):
        stage = given.next(size)
        assert stage.shape == (size,)
        assert read_by.get(stage.data_ptr(), 0) <= stream.over, "a copy may still read it"
        stream.launched = read_by[stage.data_ptr()] = number
    assert stream.over < stream.launched
    assert len(read_by) >= STAGES


def test_each_stage_of_a_cpu_is_memory_of_its_own() -> None:
    given = Stages(torch.device("cpu"))
    kept = [given.next(5) for _ in range(2 * STAGES)]
    assert len({stage.data_ptr() for stage in kept}) == len(kept)
