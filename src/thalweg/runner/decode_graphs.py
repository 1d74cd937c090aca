"""Steps of decode rows alone as CUDA graphs: one graph for each bucket of batch sizes, the whole step inside it.

Token ids in, model, sampling, token ids out, all on the device; the host sends three integers a row and launches once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thalweg.cache.storage import CacheStorage
from thalweg.core import StepPlan
from thalweg.layers.batch import Batch
from thalweg.parallel.mesh import Mesh
from thalweg.runner.inputs import InputBuilder, IntArray
from thalweg.sampling.sampler import Sampler

MAX_ROWS = 512  # beyond, a step is long enough that launching it costs little, and kernels for few rows give up
STAGES = 4  # host buffers in turn: a copy to the device may still be reading one when the next step is staged
Model = Callable[[Batch, CacheStorage], Tensor]


def buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: fine steps where a row more costs most, coarse ones above, up to max_num_seqs or
    MAX_ROWS, whichever is less. Larger steps run eagerly."""
    max_num_seqs = min(max_num_seqs, MAX_ROWS)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, max_num_seqs + 128, 128)]
    return [s for s in sizes if s < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """Captured steps, chosen by the number of rows. Rows that pad a bucket use slot 0 and page 0, the sinks.

    Until capture() the same static step runs eagerly; tests leave it there where there is no CUDA device.
    """

    def __init__(
        self,
        model: Model,
        cache: CacheStorage,
        inputs: InputBuilder,
        sampler: Sampler,
        mesh: Mesh,
        sizes: list[int],
    ) -> None:
        self.model, self._cache, self._inputs, self._sampler, self._mesh = model, cache, inputs, sampler, mesh
        self._sizes = sizes
        device, top = inputs.device, sizes[-1]
        self._rows = torch.zeros(4, top, dtype=torch.int64, device=device)  # slot, length, page row, length as int32
        self._stage = [torch.zeros(4, top, dtype=torch.int64, pin_memory=device.type == "cuda") for _ in range(STAGES)]
        self._turn = 0
        self._tables = torch.zeros(inputs.tables.shape, dtype=torch.int32, device=device)
        self._ids = torch.zeros(top, dtype=torch.int64, device=device)
        self._logits: dict[int, Tensor] = {}
        self._replay: dict[int, Callable[[], None]] = {size: partial(self._step, size) for size in sizes}
        self._pool: Any = None

    def rehearse(self) -> None:
        """A step of every size on the sinks."""
        self._rest()
        for size in self._sizes:
            self._step(size)

    def capture(self) -> None:
        self._rest()
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            self._replay[size] = self._captured(size)

    def update_tables(self, plan: StepPlan) -> None:
        """Bring the device's block tables up to every plan, whether or not it runs as a graph."""
        if not plan.new_blocks:
            return
        new = np.array(plan.new_blocks, dtype=np.int64)
        where = torch.from_numpy(new[:, 0] * self._inputs.max_blocks + new[:, 1])
        blocks = torch.from_numpy(new[:, 2].astype(np.int32))
        device = self._inputs.device
        self._tables.view(-1).index_copy_(0, where.to(device, non_blocking=True), blocks.to(device, non_blocking=True))

    def serves(self, plan: StepPlan) -> bool:
        return not plan.prefills and len(plan.decode_slots) <= self._sizes[-1]

    def run(self, rows: IntArray) -> tuple[Tensor, Tensor]:
        """Launch a step of rows int64 [3, d] as InputBuilder.decode_rows gives them.

        Returns logits [d, V] and ids [d] (-1 where a logit was not finite) of buffers that the next step overwrites.
        """
        d = rows.shape[1]
        size = next(s for s in self._sizes if s >= d)
        stage = self._stage[self._turn]
        self._turn = (self._turn + 1) % STAGES
        host = stage.numpy()
        host[:, :size] = ((0,), (1,), (0,), (1,))
        host[0, :d], host[2, :d] = rows[0], rows[2]
        np.add(rows[1], 1, out=host[1, :d])
        host[3].view(np.int32)[:size] = host[1, :size]
        self._rows.copy_(stage, non_blocking=True)
        self._replay[size]()
        return self._logits[size][:d], self._ids[:d]

    def _rest(self) -> None:
        """Every row on the sinks, with one token."""
        self._rows.zero_()
        self._rows[1] = 1
        self._rows[3] = 1 + (1 << 32)  # two int32 ones

    def _step(self, size: int) -> None:
        slots, positions, page_rows, _ = self._rows[:, :size].unbind(0)
        batch = Batch(
            token_ids_T=self._inputs.last_tokens[slots],
            num_decodes=size,
            slots_B=slots,
            block_tables_BN=self._tables[slots],
            page_rows_T=page_rows,
            decode_lens_B=self._rows[3].view(torch.int32)[:size],
            prefill_starts=[],
            prefill_offsets=[0],
            logit_rows_R=None,
        )
        logits = self.model(batch, self._cache)
        ids = self._mesh.broadcast(self._sampler.sample_rows(logits, slots, positions))
        self._logits[size] = logits
        self._ids[:size] = ids
        self._inputs.last_tokens[slots] = ids.clamp(min=0)

    def _captured(self, size: int) -> Callable[[], None]:
        """Warm up on the sinks, which sets up what the step needs of libraries, then capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(size)
        self._pool = self._pool or graph.pool()
        return graph.replay
