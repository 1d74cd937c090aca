"""What a rank keeps for the sequence in each slot, from its admission until the next one: the one table of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thalweg.cache.storage import CacheStorage
from thalweg.core import Admission
from thalweg.ops.host_tables import all_to_device
from thalweg.sampling.table import SamplingTable

IntArray = np.ndarray


@dataclass(frozen=True, slots=True)
class Admitted:
    """What a sequence was admitted with, as far as prefills ask for it."""

    token_ids: IntArray  # uint32
    prompt_logits: bool  # to be reported: the prompt's logits,
    prompt_logprobs: int | None  # and log-probabilities of its tokens, with this many most likely ones

    @property
    def inspected(self) -> bool:
        """Whether something is reported of every row of its prompt."""
        return self.prompt_logits or self.prompt_logprobs is not None


class News(NamedTuple):
    """What is new in a plan, for the device: slots of admitted sequences (int64 [n]), how their tokens are chosen
    (float32 [3, n] and int64 [2, n], see SamplingTable), and places in the flattened block tables (int64 [m]) with the
    blocks that go there (int32 [m])."""

    slots: IntArray
    reals: np.ndarray
    integers: IntArray
    places: IntArray
    blocks: IntArray


class SlotTable:
    """Tables by slot; row 0 is the sink's. Written by admissions and new blocks in the order of the plans; everything
    else of a step reads from here.

    `blocks` int32 [num_slots + 1, N] on the device, and `host_blocks`, the same on the host: block tables.
    `last_tokens` int64 [num_slots + 1] on the device: the token last sampled, a decode row's input.
    `sampling`: how tokens are chosen. `cache`: the states, which an admission zeroes.
    """

    def __init__(self, cache: CacheStorage, sampling: SamplingTable, max_model_len: int) -> None:
        self.cache, self.sampling, self.device = cache, sampling, cache.device
        rows = cache.num_slots + 1
        self.max_model_len = max_model_len
        self.max_blocks = max(1, -(-max_model_len // cache.block_size))
        self.blocks = torch.zeros(rows, self.max_blocks, dtype=torch.int32, device=self.device)
        self.host_blocks: IntArray = self.blocks.cpu().numpy()  # on a CPU the same memory
        self.last_tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._admitted: dict[int, Admitted] = {}

    def __getitem__(self, slot: int) -> Admitted:
        """What the slot's sequence was admitted with. Raises KeyError if there was none."""
        return self._admitted[slot]

    def note(self, admissions: Sequence[Admission], new_blocks: Sequence[tuple[int, int, int]]) -> News:
        """Take in on the host what is new in a plan, before its rows are built: sequences begin in their slots, and
        (slot, index in its block table, block) are added. The device is to be told."""
        slot, index, block = np.array(new_blocks, dtype=np.int64).reshape(-1, 3).T
        self.host_blocks[slot, index] = block
        for a in admissions:
            token_ids = np.frombuffer(a.packed, dtype=np.uintc)
            self._admitted[a.slot] = Admitted(token_ids, a.prompt_logits, a.params.prompt_logprobs)
        slots = np.array([a.slot for a in admissions], dtype=np.int64)
        return News(slots, *self.sampling.admit(admissions), slot * self.max_blocks + index, block.astype(np.int32))

    def tell(self, news: News) -> None:
        """The device what `note` gave, in one copy."""
        self.write(*all_to_device(news, self.device))

    def write(self, slots: Tensor, reals: Tensor, integers: Tensor, places: Tensor, blocks: Tensor) -> None:
        """As `tell`, what is on the device; nothing of an earlier sequence in the slots shows from now on."""
        if len(places):
            self.blocks.view(-1).index_copy_(0, places, blocks)
        if len(slots):
            self.cache.reset_slots(slots)
            self.sampling.write(slots, reals, integers)
