"""From a StepPlan to the tensors of a forward pass, with what the runner keeps per slot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from thalweg.core import Admission, StepPlan
from thalweg.layers.batch import Batch
from thalweg.ops.host_tables import to_device

IntArray = np.ndarray


class InputBuilder:
    """Holds block tables and admitted tokens by slot, on the host, and the last sampled token by slot on the device.

    Kept apart from the model so that its cost can be measured. Plans must come in order.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size, self.device = block_size, device
        self.max_blocks = max(1, -(-max_model_len // block_size))
        self.tables = np.zeros((num_slots + 1, self.max_blocks), dtype=np.int32)
        self._tokens: dict[int, IntArray] = {}
        self._decode: Batch | None = None  # the last step's, if it was one of decode rows alone
        self._decode_slots: list[int] = []
        self._decode_starts: list[int] = []
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    def admit(self, admission: Admission) -> None:
        self._tokens[admission.slot] = np.asarray(admission.token_ids, dtype=np.int64)

    def admitted(self, slot: int) -> IntArray:
        """int64 [n]: the tokens the slot was admitted with."""
        return self._tokens[slot]

    def apply_blocks(self, plan: StepPlan) -> None:
        """Take in the plan's new blocks; before anything else of the plan."""
        for slot, index, block in plan.new_blocks:
            self.tables[slot, index] = block

    def decode_rows(self, plan: StepPlan) -> IntArray:
        """int64 [3, d] of the decode rows: slot, cached tokens before the step, and the row of the pages each fills."""
        rows = np.array((plan.decode_slots, plan.decode_starts, plan.decode_starts), dtype=np.int64)
        slots, starts = rows[0], rows[1]
        block, place = np.divmod(starts, self.block_size)
        rows[2] = self.tables[slots, block]
        rows[2] *= self.block_size
        rows[2] += place
        return rows

    def build(self, plan: StepPlan, every_row: bool = False) -> Batch:
        """The step's Batch. Logits are wanted where a row samples, or for every token with `every_row`."""
        if not plan.prefills:
            return self._build_decode(plan)
        self._decode = None
        d = len(plan.decode_slots)
        rows = self.decode_rows(plan)
        width = self._blocks(max(plan.decode_starts, default=-1) + 1)
        slots, page_rows, tokens = [rows[0]], [rows[2]], []
        offsets = [0]
        for p in plan.prefills:
            block, place = np.divmod(np.arange(p.start, p.start + p.length), self.block_size)
            page_rows.append(self.tables[p.slot, block] * np.int64(self.block_size) + place)
            tokens.append(self._tokens[p.slot][p.start : p.start + p.length])
            offsets.append(offsets[-1] + p.length)
            width = max(width, self._blocks(p.start + p.length))
        slots.append(np.array([p.slot for p in plan.prefills], dtype=np.int64))
        every_slot = np.concatenate(slots)
        token_ids = self._tensor(np.concatenate(tokens))
        slots_B = self._tensor(every_slot)
        logit_rows = [*range(d), *(d + offsets[i + 1] - 1 for i, p in enumerate(plan.prefills) if p.sample)]
        return Batch(
            token_ids_T=torch.cat([self.last_tokens[slots_B[:d]], token_ids]) if d else token_ids,
            num_decodes=d,
            slots_B=slots_B,
            block_tables_BN=self._tensor(self.tables[every_slot, :width]),
            page_rows_T=self._tensor(np.concatenate(page_rows)),
            decode_lens_B=self._tensor((rows[1] + 1).astype(np.int32)),
            prefill_starts=[p.start for p in plan.prefills],
            prefill_offsets=offsets,
            logit_rows_R=None if every_row else self._tensor(np.array(logit_rows, dtype=np.int64)),
        )

    def _build_decode(self, plan: StepPlan) -> Batch:
        """A step of decode rows alone. Where it is the last one moved on by a token, within the same blocks, so are
        its tensors: most steps of most runs, and a step's host time is mostly this."""
        last, starts = self._decode, plan.decode_starts
        if last is not None and not plan.new_blocks and plan.decode_slots == self._decode_slots:
            moved = all(start == before + 1 for start, before in zip(starts, self._decode_starts, strict=True))
            if moved and all(start % self.block_size for start in starts):
                last.page_rows_T.add_(1)
                last.decode_lens_B.add_(1)
                self._decode_starts = starts
                self._decode = replace(last, token_ids_T=self.last_tokens[last.slots_B])
                return self._decode
        rows = self.decode_rows(plan)
        on_device = self._tensor(rows)
        self._decode_slots, self._decode_starts = plan.decode_slots, starts
        self._decode = Batch(
            token_ids_T=self.last_tokens[on_device[0]],
            num_decodes=len(starts),
            slots_B=on_device[0],
            block_tables_BN=self._tensor(self.tables[rows[0], : self._blocks(max(starts) + 1)]),
            page_rows_T=on_device[2],
            decode_lens_B=(on_device[1] + 1).int(),
            prefill_starts=[],
            prefill_offsets=[0],
            logit_rows_R=None,
        )
        return self._decode

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _tensor(self, array: IntArray) -> torch.Tensor:
        return to_device(array, self.device)
