"""From a StepPlan and the slot table to the Batch of a forward pass, for eager steps and for graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from thalweg.core import StepPlan
from thalweg.layers.batch import Batch
from thalweg.ops.host_tables import Boundaries, StepSequences, to_device
from thalweg.runner.slots import IntArray, SlotTable
from thalweg.runner.stages import Stages

# What the host stages of decode rows, int64 [DECODE_ROWS, n], so that one copy takes all of it to the device: slots,
# positions of the new tokens, rows of the flattened blocks that these fill, positions of the tokens to be chosen, and
# context lengths, which are int32 and take half of their row.
DECODE_ROWS = 5
SINK = np.array([[0], [0], [0], [1], [1]])
ONE_ON = [[0], [1], [1], [1], [1 + (1 << 32)]]  # what one more token within a block adds; to two lengths at once


class BatchBuilder:
    """Builds the Batch of a step. Kept apart from the model so that its cost can be measured. Plans come in order."""

    def __init__(self, slots: SlotTable) -> None:
        self.slots = slots
        self._block_size, self._device = slots.cache.block_size, slots.device
        self.stages = Stages(slots.device)
        self._in_block = np.arange(self._block_size)
        self._one_on = torch.tensor(ONE_ON, device=slots.device)
        self._last: tuple[StepPlan, Batch, Tensor] | None = None  # the last step built, if it had decode rows alone

    def build(self, plan: StepPlan, every_row: bool = False) -> Batch:
        """The step's Batch, valid until the next. Logits are wanted of rows that sample; of all with `every_row`."""
        if plan.prefills:
            self._last = None
            return self._with_prefills(plan, every_row)
        if self._last is not None and moved_on(plan, self._last[0], self._block_size):
            _, batch, rows = self._last
            rows.add_(self._one_on)
            torch.index_select(self.slots.last_tokens, 0, batch.slots_B, out=batch.token_ids_T)
        else:
            d = len(plan.decode_slots)
            host = np.empty((DECODE_ROWS, even(d)), dtype=np.int64)
            self.write_decodes(plan, host)
            rows = to_device(host, self._device)
            batch = self.of_decodes(rows[:, :d], self.blocks_for(max(plan.decode_starts) + 1))
        self._last = plan, batch, rows
        return batch

    def write_decodes(self, plan: StepPlan, out: IntArray) -> None:
        """The plan's decode rows into `out` int64 [DECODE_ROWS, n], of which those past the plan's go to the sinks."""
        d, n = len(plan.decode_slots), out.shape[1]
        out[:, d:] = SINK
        slots, positions, block_rows, ends, _ = out[:, :d]
        slots[:], positions[:] = plan.decode_slots, plan.decode_starts
        block, place = np.divmod(positions, self._block_size)
        np.multiply(self.slots.host_blocks[slots, block], self._block_size, out=block_rows, dtype=np.int64)
        block_rows += place
        np.add(positions, 1, out=ends)
        out[4].view(np.int32)[:n] = out[3]

    def of_decodes(self, rows: Tensor, num_blocks: int, token_ids: Tensor | None = None) -> Batch:
        """Batch of decode rows alone, whose tensors are or follow from `rows` int64 [DECODE_ROWS, n] on the device, as
        write_decodes gives them. Nothing here depends on the plan but n and the width of the block tables."""
        slots_B, positions_B, block_rows_B, _, lens = rows.unbind(0)
        n = len(slots_B)
        return Batch(
            token_ids_T=self.slots.last_tokens[slots_B] if token_ids is None else token_ids,
            positions_T=positions_B,
            num_decodes=n,
            prefill_offsets=[0],
            starts=[],
            slots_B=slots_B,
            block_tables_BN=self._tables(slots_B, num_blocks),
            block_rows_T=block_rows_B,
            context_lens_B=lens.view(torch.int32)[:n],
            logit_rows_R=None,
        )

    def sequences(self, plan: StepPlan) -> StepSequences:
        """What the host knows of the plan's prefills."""
        place_of = {p.slot: i for i, p in enumerate(plan.prefills)} if plan.boundaries else {}
        row_of = self.slots.cache.boundary_row
        boundaries = [
            (place_of[slot], tokens, row_of(i, snapshot)) for i, (slot, tokens, snapshot) in enumerate(plan.boundaries)
        ]
        return StepSequences(
            offsets=[*accumulate((p.length for p in plan.prefills), initial=0)],
            starts=[p.start for p in plan.prefills],
            boundaries=boundaries,
        )

    def write_prefills(self, plan: StepPlan, out: Sequence[IntArray]) -> None:
        """The plan's rows into parts of `out` int64 of the sizes that `prefill_sizes` gives. Prefills of slot 0, the
        sink, get tokens of those before them, so that the experts' work stays spread."""
        slots, positions, block_rows, tokens, lens, rows = out
        d, end = len(plan.decode_slots), 0
        slots[:] = plan.decode_slots + [p.slot for p in plan.prefills]
        if d:
            decodes = np.empty((DECODE_ROWS, d), dtype=np.int64)
            self.write_decodes(plan, decodes)
            positions[:d], block_rows[:d], lens[:] = decodes[1], decodes[2], decodes[4]
        ends = []
        for p in plan.prefills:
            begin, end, stop = end, end + p.length, p.start + p.length
            new = slice(d + begin, d + end)
            positions[new] = np.arange(p.start, stop)
            block_rows[new] = self._block_rows(p.slot, p.start, stop)
            ids = self.slots[p.slot].token_ids[p.start : stop] if p.slot else np.resize(tokens[:begin], p.length)
            tokens[begin:end] = ids
            if p.sample:
                ends.append(d + end - 1)
        if len(rows):
            rows[:] = 0
            rows[:d] = np.arange(d)
            rows[d : d + len(ends)] = ends

    def of_prefills(
        self,
        parts: Sequence[Tensor],
        d: int,
        offsets: Sequence[int],
        starts: Sequence[int],
        boundaries: Boundaries,
        num_blocks: int,
    ) -> Batch:
        """Batch of `d` decode rows and of prefills, whose tensors are or follow from `parts` on the device, as
        write_prefills gives them."""
        slots_B, positions_T, block_rows_T, tokens_P, lens_B, logit_rows_R = parts
        return Batch(
            token_ids_T=torch.cat([self.slots.last_tokens[slots_B[:d]], tokens_P]) if d else tokens_P,
            positions_T=positions_T,
            num_decodes=d,
            prefill_offsets=offsets,
            starts=starts,
            slots_B=slots_B,
            block_tables_BN=self._tables(slots_B, num_blocks),
            block_rows_T=block_rows_T,
            context_lens_B=lens_B.view(torch.int32)[:d],
            logit_rows_R=logit_rows_R if len(logit_rows_R) else None,
            boundaries=boundaries,
        )

    def _with_prefills(self, plan: StepPlan, every_row: bool) -> Batch:
        d, step = len(plan.decode_slots), self.sequences(plan)
        sampling = 0 if every_row else d + sum(p.sample for p in plan.prefills)
        places = places_of(prefill_sizes(d, len(plan.prefills), step.offsets[-1], sampling))
        stage = self.stages.next(places[-1].stop)
        host = stage.numpy()
        self.write_prefills(plan, [host[place] for place in places])
        on_device = stage.to(self._device, non_blocking=True)
        longest = max([start + 1 for start in plan.decode_starts] + [p.start + p.length for p in plan.prefills])
        batch = self.of_prefills([on_device[place] for place in places], d, *step, self.blocks_for(longest))
        return batch if every_row else replace(batch, logit_rows_R=on_device[places[-1]])

    def _block_rows(self, slot: int, start: int, stop: int) -> IntArray:
        """int64 [stop - start]: rows of the flattened blocks of tokens `start` to `stop` of a slot."""
        first = start // self._block_size
        blocks = self.slots.host_blocks[slot, first : self.blocks_for(stop)]
        rows: IntArray = np.add.outer(np.multiply(blocks, self._block_size, dtype=np.int64), self._in_block).reshape(-1)
        begin = first * self._block_size
        return rows[start - begin : stop - begin]

    def _tables(self, slots_B: Tensor, num_blocks: int) -> Tensor:
        return self.slots.blocks[:, :num_blocks].index_select(0, slots_B)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)


def moved_on(plan: StepPlan, last: StepPlan, block_size: int) -> bool:
    """Whether a step of decode rows is that of `last`, of decode rows too, moved on by a token, within the same blocks:
    most steps of most runs. A step's host time is mostly that of making its tensors, which are then the last one's
    moved on. It is not if another step was in between, in which a slot may have begun a new sequence."""
    if plan.step != last.step + 1 or plan.new_blocks or plan.decode_slots != last.decode_slots:
        return False
    starts = plan.decode_starts
    moved = all(start == before + 1 for start, before in zip(starts, last.decode_starts, strict=True))
    return moved and all(start % block_size for start in starts)


def even(n: int) -> int:
    """n int64 or one more: what comes after them begins at a multiple of 16 bytes, as kernels are compiled for."""
    return n + n % 2


def prefill_sizes(d: int, prefills: int, tokens: int, sampling: int) -> tuple[int, ...]:
    """int64 values of what write_prefills writes: slots, positions, rows of the flattened blocks, tokens of prefills,
    context lengths (as in a row of DECODE_ROWS), and rows that need logits."""
    return d + prefills, d + tokens, d + tokens, tokens, d, sampling


def places_of(sizes: Sequence[int]) -> list[slice]:
    """Where parts of these sizes lie in one array of int64, so that one copy takes them all to the device."""
    starts = accumulate((even(size) for size in sizes), initial=0)
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
