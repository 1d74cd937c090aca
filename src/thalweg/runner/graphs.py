"""Steps of decode rows alone as CUDA graphs: one graph for each bucket of batch sizes, the whole step inside it.

Token ids in, model, sampling, token ids out, all on the device; the host sends a few integers per row and launches
once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thalweg.cache.storage import CacheStorage
from thalweg.core import StepPlan
from thalweg.layers.batch import Batch
from thalweg.ops.step_rows import step_rows
from thalweg.parallel.data_ranks import DataRanks
from thalweg.runner.batch import DECODE_ROWS, SINK, BatchBuilder, even
from thalweg.runner.capture import captured
from thalweg.runner.mailbox import Mailbox
from thalweg.sampling.sampler import Sampler

MAX_ROWS = 512  # beyond, a step is long enough that launching it costs little, and kernels for few rows give up
Model = Callable[[Batch, CacheStorage], Tensor]
Share = Callable[[Tensor], Tensor]  # ids [R] of this rank to those of rank 0
Gather = Callable[[Tensor], Tensor]  # this rank's part of logits to all of them


def buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: fine steps while one more row costs most, coarse ones above, up to max_num_seqs or
    MAX_ROWS, whichever is less. Larger steps run eagerly."""
    max_num_seqs = min(max_num_seqs, MAX_ROWS)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, max_num_seqs + 128, 128)]
    return [s for s in sizes if s < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """Captured steps, chosen by the number of rows. Rows that pad a bucket use slot 0 and block 0, the sinks.

    With `gather` each rank samples from its part of the logits, and all agree on the best: what is gathered is an id
    and a value of each row. All logits are gathered of those steps alone in which a row asks for more.

    Until capture() the same static step runs eagerly; tests leave it there if there is no CUDA device.
    """

    def __init__(
        self,
        model: Model,
        batches: BatchBuilder,
        sampler: Sampler,
        share: Share,
        sizes: list[int],
        data: DataRanks | None = None,
        gather: Gather | None = None,
    ) -> None:
        self._data, self._gather = data or DataRanks(), gather
        self.model, self._batches, self._sampler, self._share = model, batches, sampler, share
        self._slots = batches.slots
        self._sizes = sizes
        device, shape = self._slots.device, (DECODE_ROWS, even(sizes[-1]))
        self._rows = torch.zeros(shape, dtype=torch.int64, device=device)
        self._token_ids = torch.zeros(shape[1], dtype=torch.int64, device=device)
        self._sinks = np.repeat(SINK, shape[1], axis=1)  # with one token each
        self._sinks[-1] = 1 + (1 << 32)  # two int32 ones
        self._mailbox = Mailbox(*shape, device)
        self._take, self._tell = step_rows(device)
        self._logits: dict[int, Tensor] = {}
        self._replay: dict[int, Callable[[], None]] = {size: partial(self._step, size) for size in sizes}
        self._pool: Any = None

    def rehearse(self) -> None:
        """A step of every size, every row on the sinks."""
        self._rest()
        for size in self._sizes:
            self._step(size)
        self._mailbox.begin()

    def capture(self) -> None:
        self._rest()
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            self._replay[size] = self._captured(size)
        self._mailbox.begin()

    def close(self) -> None:
        self._replay.clear()

    @property
    def most_rows(self) -> int:
        return self._sizes[-1]

    def serves(self, plan: StepPlan) -> bool:
        if self._data.size > 1 and not self._data.decodes:
            return False
        return not plan.prefills and len(plan.decode_slots) <= self._sizes[-1]

    def idle(self) -> None:
        """The step of a data-parallel rank that has no rows and takes part with as many as the others: the sinks."""
        self._mailbox.place()[:] = self._sinks
        self._replay[self._size(0)]()
        self._mailbox.sent(0)

    def stage(self, plan: StepPlan) -> None:
        """Write the rows of a step that `serves` said yes to into host memory."""
        self._batches.write_decodes(plan, self._mailbox.place()[:, : self._size(len(plan.decode_slots))])

    def run(self, d: int) -> tuple[Tensor, Callable[[], list[int]]]:
        """Launch the step of d rows that was staged.

        Returns logits [d, V] for `all_logits`, of a buffer that the next step overwrites, and what waits for its d ids
        (-1 if a logit was not finite).
        """
        size = self._size(d)
        self._replay[size]()
        return self._logits[size][:d], self._mailbox.sent(d)

    def all_logits(self, logits: Tensor) -> Tensor:
        """[d, V] of what `run` gave. Every rank calls this or none."""
        return logits if self._gather is None else self._gather(logits)

    def _size(self, d: int) -> int:
        """Rows of the graph for d rows, or for those of the data-parallel rank that has most."""
        return next(size for size in self._sizes if size >= max(d, self._data.rows))

    def _rest(self) -> None:
        for rows in (self._rows, *self._mailbox.rows):
            rows.copy_(torch.from_numpy(self._sinks))

    def _step(self, size: int) -> None:
        rows, token_ids = self._rows[:, :size], self._token_ids[:size]
        mailbox, last_tokens = self._mailbox, self._slots.last_tokens
        self._take(mailbox.rows, mailbox.turn, last_tokens, self._rows, token_ids)
        batch = self._batches.of_decodes(rows, self._slots.max_blocks, token_ids)
        with self._data.padded(batch.slots_B):  # those of sinks are 0
            logits = self.model(replace(batch, gathers=self._gather is None), self._slots.cache)
        if self._gather is None:
            ids = self._share(self._sampler.sample_rows(logits, batch.slots_B, rows[3]))
        else:
            ids = self._sampler.sample_over_ranks(logits, batch.slots_B, rows[3])
        self._logits[size] = logits
        self._tell(ids, batch.slots_B, mailbox.turn, last_tokens, mailbox.ids)

    def _captured(self, size: int) -> Callable[[], None]:
        replay, self._pool = captured(partial(self._step, size), self._pool, warm_up=1)
        return replay
