"""From a StepPlan to the tensors of a forward pass, with what the runner keeps per slot on the host."""

from __future__ import annotations

import numpy as np
import torch

from thalweg.core import Admission, StepPlan
from thalweg.layers.batch import Batch


class InputBuilder:
    """Holds block tables and admitted tokens by slot; builds one Batch a step with a fixed number of array calls.

    Kept apart from the model so that its cost can be measured, and because it is what a replayed plan needs.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size, self.device = block_size, device
        max_blocks = max(1, -(-max_model_len // block_size))
        self._tables = np.zeros((num_slots + 1, max_blocks), dtype=np.int32)
        self._tokens: dict[int, np.ndarray] = {}
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    def admit(self, admission: Admission) -> None:
        self._tokens[admission.slot] = np.asarray(admission.token_ids, dtype=np.int64)

    def admitted(self, slot: int) -> np.ndarray:
        """int64 [n]: the tokens the slot was admitted with."""
        return self._tokens[slot]

    def build(self, plan: StepPlan, every_row: bool = False) -> Batch:
        """The step's Batch. Logits are wanted where a row samples, or for every token with `every_row`."""
        size = self.block_size
        for slot, index, block in plan.new_blocks:
            self._tables[slot, index] = block
        d, prefills = len(plan.decode_slots), plan.prefills
        slots = np.array(plan.decode_slots, dtype=np.int64)
        starts = np.array(plan.decode_starts, dtype=np.int64)
        rows = [self._tables[slots, starts // size] * np.int64(size) + starts % size]
        tokens: list[np.ndarray] = []
        offsets = [0]
        longest = max(plan.decode_starts, default=-1) + 1
        for p in prefills:
            positions = np.arange(p.start, p.start + p.length)
            rows.append(self._tables[p.slot, positions // size] * np.int64(size) + positions % size)
            tokens.append(self._tokens[p.slot][p.start : p.start + p.length])
            offsets.append(offsets[-1] + p.length)
            longest = max(longest, p.start + p.length)
        if prefills:
            slots = np.concatenate([slots, np.array([p.slot for p in prefills], dtype=np.int64)])
        width = max(1, -(-longest // size))
        slots_B = self._tensor(slots)
        token_parts = [self.last_tokens[slots_B[:d]]] if d else []
        if prefills:
            token_parts.append(self._tensor(np.concatenate(tokens)))
        if every_row:
            logit_rows = np.arange(d + offsets[-1])
        else:
            ends = [d + offsets[i + 1] - 1 for i, p in enumerate(prefills) if p.sample]
            logit_rows = np.concatenate([np.arange(d), np.array(ends, dtype=np.int64)])
        return Batch(
            token_ids_T=token_parts[0] if len(token_parts) == 1 else torch.cat(token_parts),
            num_decodes=d,
            slots_B=slots_B,
            block_tables_BN=self._tensor(self._tables[slots, :width]),
            page_rows_T=self._tensor(rows[0] if len(rows) == 1 else np.concatenate(rows)),
            decode_lens_B=self._tensor((starts + 1).astype(np.int32)),
            prefill_starts=[p.start for p in prefills],
            prefill_offsets=offsets,
            logit_rows_R=self._tensor(logit_rows),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)
