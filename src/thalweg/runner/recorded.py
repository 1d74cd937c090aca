"""Steps of a few decode rows on a CPU as recordings: a step's ops are called from one list, without Python in between.

The counterpart of runner/graphs.py. The first step of a size is recorded while it runs, and those after it are that one
again: the host writes what it knows of their rows to where the recorded calls read it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd import profiler

from thalweg.core import StepPlan
from thalweg.layers.batch import Batch
from thalweg.ops.toolchain.cpu_recording import Recording, Scratch, recording
from thalweg.runner.batch import DECODE_ROWS, ONE_ON, SINK, BatchBuilder, moved_on
from thalweg.runner.graphs import Model
from thalweg.runner.slots import IntArray
from thalweg.sampling.sampler import Sampler

MAX_ROWS = 64  # beyond, Python takes little of a step
ROW_WIDTHS = 64  # times the model's width of numbers: of a row's results without logits; 31 at most were measured
_ONE_ON = np.array(ONE_ON)
_log = logging.getLogger(__name__)


def most_bytes(rows: int, vocab_size: int, width: int) -> int:
    """That recordings of steps of up to `rows` rows may write: results of the largest, in float32."""
    return 4 * rows * (vocab_size + ROW_WIDTHS * width)


@dataclass(frozen=True, slots=True)
class _Step:
    recording: Recording
    logits_RV: Tensor
    ids_R: Tensor
    ids: IntArray  # the same memory


class RecordedSteps:
    """Recordings by the number of rows, up to `most`, whose results take up to `limit` bytes.

    A size whose step does more than call ops in C++, or takes more, is not recorded: `serves` says no from then on.
    """

    def __init__(self, model: Model, batches: BatchBuilder, sampler: Sampler, most: int, limit: int) -> None:
        self._model, self._batches, self._sampler, self._most = model, batches, sampler, most
        self._slots = slots = batches.slots
        self._steps: dict[int, _Step] = {}
        self.scratch = Scratch(limit)
        self.refused: dict[int, str] = {}  # why steps are not recorded
        # Memory that recorded calls read, and the same for the host: a call of torch costs more than most of numpy's
        # here, and one that lets go of the GIL may have to wait for the thread that plans.
        self._rows = torch.zeros(DECODE_ROWS, most, dtype=torch.int64)
        self._token_ids = torch.zeros(most, dtype=torch.int64)
        self._tables = torch.zeros(most, slots.max_blocks, dtype=torch.int32)
        self._host_rows: IntArray = self._rows.numpy()
        self._host_token_ids: IntArray = self._token_ids.numpy()
        self._host_tables: IntArray = self._tables.numpy()
        self._last_tokens: IntArray = slots.last_tokens.numpy()
        self._last: StepPlan | None = None

    @torch.inference_mode()
    def start(self) -> str | None:
        """Record the step of one row on the sinks. Returns why it cannot be recorded, if it cannot."""
        self._host_rows[:] = SINK
        self._run(1)
        return self.refused.get(1)

    def serves(self, plan: StepPlan) -> bool:
        """Whether the plan's step is one of decode rows alone, and not too many, whose size can be recorded."""
        d = len(plan.decode_slots)
        if plan.prefills or d > self._most or d in self.refused:
            return False
        return not profiler._is_profiler_enabled  # which shows ops by name

    def stage(self, plan: StepPlan) -> None:
        """Write the rows of a step that `serves` said yes to."""
        d, rows = len(plan.decode_slots), self._host_rows
        if self._last is not None and moved_on(plan, self._last, self._slots.cache.block_size):
            rows += _ONE_ON
        else:
            self._batches.write_decodes(plan, rows[:, :d])
            blocks = self._batches.blocks_for(max(plan.decode_starts) + 1)
            self._host_tables[:d, :blocks] = self._slots.host_blocks[plan.decode_slots, :blocks]
        self._last = plan

    def run(self, d: int) -> tuple[Tensor, Tensor]:
        """The step of d rows that was staged: logits [d, V] and ids [d] (-1 if a logit was not finite), which the next
        step overwrites."""
        slots = self._host_rows[0, :d]
        self._host_token_ids[:d] = self._last_tokens[slots]
        logits_RV, ids_R, ids = self._run(d)
        self._last_tokens[slots] = np.maximum(ids, 0)
        return logits_RV, ids_R

    def _run(self, d: int) -> tuple[Tensor, Tensor, IntArray]:
        step = self._steps.get(d)
        if step is not None:
            step.recording.replay()
            return step.logits_RV, step.ids_R, step.ids
        batch = self._batch(d)
        with recording(self.scratch) as recorded:
            logits_RV = self._model(batch, self._slots.cache)
            ids_R = self._sampler.sample_rows(logits_RV, batch.slots_B, self._rows[3, :d])
        ids = ids_R.numpy()
        if recorded.why_not is None:
            self._steps[d] = _Step(recorded, logits_RV, ids_R, ids)
        else:
            self.refused[d] = recorded.why_not
            _log.info("steps of %d rows run op by op: %s", d, recorded.why_not)
        return logits_RV, ids_R, ids

    def _batch(self, d: int) -> Batch:
        """Of the rows as they are staged."""
        slots_B, positions_B, block_rows_B, _, lens = self._rows
        return Batch(
            token_ids_T=self._token_ids[:d],
            positions_T=positions_B[:d],
            num_decodes=d,
            prefill_offsets=[0],
            starts=[],
            slots_B=slots_B[:d],
            block_tables_BN=self._tables[:d],
            block_rows_T=block_rows_B[:d],
            context_lens_B=lens.view(torch.int32)[:d],
            logit_rows_R=None,
        )
