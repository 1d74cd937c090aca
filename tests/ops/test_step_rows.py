"""What captured steps take from host memory and tell it: plain torch, and the kernels under the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.ops.interpreted import run_interpreted
from thalweg.ops.step_rows import StepRows, reference


def steps_take_their_places_in_turn(by: StepRows) -> None:
    torch.manual_seed(0)
    places, ids_of = torch.randint(1, 20, (3, 5, 6)), torch.zeros(3, 6, dtype=torch.int64)
    last = torch.arange(100, 120)
    wanted_last = last.clone()
    rows, turn = torch.zeros(5, 6, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    for step, n in enumerate((4, 6, 1, 5, 6)):
        place = step % 3
        places[place, 0] = torch.randperm(20)[:6]
        ids_of[place], token_ids = -7, torch.zeros(n, dtype=torch.int64)
        by.take(places, turn, last, rows, token_ids)
        assert torch.equal(rows[:, :n], places[place, :, :n])
        assert torch.equal(token_ids, wanted_last[places[place, 0, :n]])
        assert turn.item() == (step + 1) % 3
        ids = torch.randint(-1, 50, (n,))
        by.tell(ids, rows[0, :n], turn, last, ids_of)
        assert ids_of[place].tolist() == ids.tolist() + [-7] * (6 - n)
        wanted_last[places[place, 0, :n]] = ids.clamp(min=0)
        assert torch.equal(last, wanted_last)


def test_in_plain_torch() -> None:
    steps_take_their_places_in_turn(StepRows(reference.take, reference.tell))


def check_kernels() -> None:
    from thalweg.ops.step_rows import triton

    steps_take_their_places_in_turn(StepRows(triton.take, triton.tell))


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_kernels)
