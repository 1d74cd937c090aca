"""What a captured step takes from the host and what it tells it, by kernels within the graph.

A copy engine begins some 8 us after the kernel ahead has ended, and the kernel behind as long after it. These kernels
read and write pinned host memory as they are, a place of it in each step, and count the steps on the device. So the
host writes a place, launches the graph, and reads another once the step is over.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from thalweg.errors import KernelError
from thalweg.ops.step_rows import reference


class Take(Protocol):
    def __call__(
        self, places_SRN: Tensor, turn: Tensor, last_tokens: Tensor, rows_RN: Tensor, token_ids: Tensor, /
    ) -> None:
        """len(token_ids) columns of the place of this turn into rows, and into token_ids the last tokens of the slots
        in the first row; int64 all. The turn, int32 [1] on the device, is the next one's from then on."""


class Tell(Protocol):
    def __call__(self, ids: Tensor, slots: Tensor, turn: Tensor, last_tokens: Tensor, places_SN: Tensor, /) -> None:
        """The ids of the step that took its turn last into its place, and as the last tokens of their slots, with 0 for
        those below; int64 all. A slot that is there twice gets either."""


class StepRows(NamedTuple):
    take: Take
    tell: Tell


def step_rows(device: torch.device) -> StepRows:
    """On a GPU they can be captured, and places lie in pinned host memory."""
    if device.type != "cuda":
        return StepRows(reference.take, reference.tell)
    if find_spec("triton") is None:
        raise KernelError("steps as CUDA graphs need Triton, which is not installed; use --enforce-eager")
    from thalweg.ops.step_rows import triton

    return StepRows(triton.take, triton.tell)
