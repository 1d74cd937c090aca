"""Executes step plans: the model, its cache and the sampler, on one rank. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from thalweg import tracing
from thalweg.cache.host_storage import HostStorage
from thalweg.core import Prefill, SaveCache, StepPlan, StepResult
from thalweg.models.decoder import Decoder
from thalweg.ops.host_tables import to_device
from thalweg.parallel.mesh import Mesh
from thalweg.runner import cache_file
from thalweg.runner.batch import BatchBuilder
from thalweg.runner.graphs import DecodeGraphs, Gather, Model, Share
from thalweg.runner.lock_step import Agreed, Rows
from thalweg.runner.prefill_graphs import EXCHANGED, PrefillGraphs, Shape, carries, exchanged_rows
from thalweg.runner.readback import Readback
from thalweg.runner.recorded import RecordedSteps
from thalweg.runner.slots import News, SlotTable
from thalweg.sampling.logprobs import token_logprobs
from thalweg.sampling.sampler import NON_FINITE, Sampler

Finish = Callable[[], StepResult]


class ModelRunner:
    """launch(plan) puts a step on the device and returns what waits for its result; plans come in order.

    Every rank runs the same plans; rank 0's tokens count. Steps of decode rows alone, and those with few tokens of
    prompts, run as graphs if there are any; all others run eagerly.
    """

    def __init__(
        self,
        model: Model,
        slots: SlotTable,
        sampler: Sampler,
        mesh: Mesh,
        graph_sizes: list[int] | None = None,
        prefill_tokens: int = 0,
        host: HostStorage | None = None,
        keeps_prefixes: bool = False,
        share: Share | None = None,
        recorded_rows: int = 0,
        gather: Gather | None = None,
        recorded_bytes: int = 0,
    ) -> None:
        """`sampler` reads `slots.sampling`. `graph_sizes` are rows of steps that decode. Steps of up to
        `prefill_tokens` prompt tokens can be graphs; 0: none. `host`: the cache's second tier. `keeps_prefixes`:
        whether prompts may begin after cached tokens. `share`: instead of the mesh's broadcast. `recorded_rows`: steps
        that decode so many rows at most are recorded, on a CPU without other ranks, and their results take up to
        `recorded_bytes`. `gather`: see DecodeGraphs."""
        self.model, self.slots, self._sampler, self.mesh = model, slots, sampler, mesh
        self.host = host
        self.identity = ""  # of the model and all that cached bytes depend on
        self.cache_index: cache_file.CacheIndex | None = None  # of what host memory was filled with
        self._share = share or mesh.broadcast
        self._batches = BatchBuilder(slots)
        self.waits = slots.device.type == "cuda"
        self._readback = Readback(slots.device)
        self._graphs = None
        if graph_sizes:
            with torch.inference_mode():
                self._graphs = DecodeGraphs(model, self._batches, sampler, self._share, graph_sizes, mesh.data, gather)
        self._recorded = None
        if recorded_rows:
            self._recorded = RecordedSteps(model, self._batches, sampler, recorded_rows, recorded_bytes)
        self.prefill_graphs = None
        if prefill_tokens:
            most = slots.cache.num_slots
            with torch.inference_mode():
                self.prefill_graphs = PrefillGraphs(
                    model, self._batches, sampler, self._share, most, prefill_tokens, keeps_prefixes, mesh.data
                )

    @torch.inference_mode()
    def rehearse(self, model: Model, plans: Iterable[StepPlan]) -> None:
        """The graphs' steps and `plans` through `model`, without reading a result. What they leave in slots and
        blocks is gone once a request is admitted to them."""
        whole = self.model
        try:
            self._use(model)
            if self._graphs is not None:
                self._graphs.rehearse()
            for plan in plans:
                self.launch(plan, eagerly=True)
            if self.prefill_graphs is not None:
                self.prefill_graphs.rehearse()
        finally:
            self._use(whole)

    @torch.inference_mode()
    def capture(self) -> None:
        """Turn the graphs' steps into CUDA graphs, once their kernels are ready."""
        if self._graphs is not None:
            self._graphs.capture()
        if self.prefill_graphs is not None:
            self.prefill_graphs.start()

    def record(self) -> str | None:
        """Begin to record steps. Returns why none can be recorded, if so."""
        assert self._recorded is not None
        why_not = self._recorded.start()
        if why_not is not None:
            self._recorded = None
        return why_not

    def execute(self, plan: StepPlan) -> StepResult:
        return self.launch(plan)()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, *, eagerly: bool = False) -> Finish:
        """Run the step as far as the device allows without waiting; the returned call waits and gives the result.
        `eagerly`: even if graphs could run its prompts, and without an agreement with data-parallel ranks, all of which
        run this plan."""
        cache, host = self.slots.cache, self.host
        if eagerly:
            self.mesh.data.rows, self.mesh.data.decodes = self.rows_of(plan).padded, False
        if host is not None:
            host.copy(plan)
        if plan.snapshots:
            cache.save(plan.snapshots)
        news = self.slots.note(plan.admissions, plan.new_blocks) if plan.admissions or plan.new_blocks else None
        prompts = bool(plan.prefills) or (self.mesh.data.size > 1 and not self.mesh.data.decodes)  # of any rank
        shape = self._shape_of(plan) if prompts and not eagerly else None
        if news is not None and (shape is None or plan.restores or not carries(shape, news)):
            self.slots.tell(news)
            news = None
        if plan.restores:
            cache.restore(plan.restores)
        if self._graphs is not None and self._graphs.serves(plan):
            finish = self._launch_graph(self._graphs, plan)
        elif self._recorded is not None and self._recorded.serves(plan):
            finish = self._launch_recorded(self._recorded, plan)
        elif shape is not None and self.prefill_graphs is not None:
            finish = self._launch_prefill_graph(self.prefill_graphs, plan, shape, news)
        else:
            finish = self._launch_eager(plan)
        if plan.boundaries:
            cache.settle([snapshot for *_, snapshot in plan.boundaries])

        def told() -> StepResult:
            result = finish()
            self.mesh.check()
            return replace(result, fetching=True) if host is not None and host.fetching() else result

        return told

    def rows_of(self, plan: StepPlan) -> Rows:
        """What this data-parallel rank brings to the experts of the plan's step."""
        d = len(plan.decode_slots)
        most = self._graphs.most_rows if self._graphs is not None else 0
        rows = None if self.prefill_graphs is None else self.prefill_graphs.rows_of(plan)
        rows = d + sum(p.length for p in plan.prefills) if rows is None else rows
        padded = exchanged_rows(rows) if self.mesh.data.pads else 0
        return Rows(decodes=d, padded=padded, only_decodes=not plan.prefills and d <= most)

    def agree(self, agreed: Agreed) -> None:
        """What the rank that plans for this one agreed on with other data-parallel ranks."""
        self.mesh.data.rows, self.mesh.data.decodes = agreed.rows, agreed.decodes
        if agreed.idle:
            self.serve_others()

    @torch.inference_mode()
    def serve_others(self) -> None:
        """A step in which other data-parallel ranks have tokens and this one has none."""
        if self._graphs is not None and self.mesh.data.decodes:
            self._graphs.idle()
            return
        if self.prefill_graphs is not None and self.mesh.data.rows in EXCHANGED:
            self.prefill_graphs.idle()
            return
        assert isinstance(self.model, Decoder)
        with self._padded(0):
            self.model.serve_others()

    def _padded(self, tokens: int) -> AbstractContextManager[None]:
        """Around an eager step with so many tokens, if data-parallel ranks pad theirs."""
        data = self.mesh.data
        if not data.rows:
            return nullcontext()
        return data.padded((torch.arange(data.rows, device=self.slots.device) < tokens).long())

    @torch.inference_mode()
    def expert_counts(self) -> dict[int, list[int]]:
        """As Decoder.expert_counts, from any thread."""
        assert isinstance(self.model, Decoder)
        return self.model.expert_counts()

    @torch.inference_mode()
    def save_cache(self, order: SaveCache) -> None:
        """Write this rank's part of the prefix cache down. Raises OSError."""
        assert self.host is not None
        self.host.settle()
        cache_file.write(self.host, self.slots.cache, order, self.identity, self.mesh.tp_rank)

    def close(self) -> None:
        if self.host is not None:
            self.host.close()
        for graphs in (self._graphs, self.prefill_graphs):
            if graphs is not None:
                graphs.close()
        self.mesh.close()

    def _use(self, model: Model) -> None:
        self.model = model
        for graphs in (self._graphs, self.prefill_graphs):
            if graphs is not None:
                graphs.model = model

    def _launch_graph(self, graphs: DecodeGraphs, plan: StepPlan) -> Finish:
        with tracing.span("build"):
            graphs.stage(plan)
        with tracing.span("model"):
            logits, read = graphs.run(len(plan.decode_slots))
            if not self._sampler.simple(plan.decode_slots):
                logits = graphs.all_logits(logits)
        return self._of_decodes(plan, logits, read)

    def _launch_recorded(self, recorded: RecordedSteps, plan: StepPlan) -> Finish:
        with tracing.span("build"):
            recorded.stage(plan)
        with tracing.span("model"):
            logits, ids = recorded.run(len(plan.decode_slots))
        return self._of_decodes(plan, logits, self._readback(ids))

    def _of_decodes(self, plan: StepPlan, logits: Tensor, read: Callable[[], list[int]]) -> Finish:
        """The result of a static step, whose ids, which `read` gives, count unless a row asks for more."""
        slots, result = plan.decode_slots, StepResult(plan.step, [])
        if self._sampler.simple(slots):
            return self._finish_read(result, slots, read)
        return self._sample(result, logits.float(), slots, [s + 1 for s in plan.decode_starts])

    def _shape_of(self, plan: StepPlan) -> Shape | None:
        """The shape of graphs that the step runs in, if any."""
        graphs = self.prefill_graphs
        if graphs is None:
            return None
        inspected = any(self.slots[p.slot].inspected for p in plan.prefills)
        shape = None if inspected else graphs.shape_of(plan)
        if shape is None and plan.prefills:
            graphs.steps["eager"] += 1
        return shape

    def _launch_prefill_graph(self, graphs: PrefillGraphs, plan: StepPlan, shape: Shape, news: News | None) -> Finish:
        with tracing.span("model"):
            logits, ids = graphs.run(plan, shape, news)
        result, slots, positions = self._sampling(plan)
        if not slots:
            return self._finish_unsampled(result)
        if self._sampler.simple(slots):
            return self._finish_simple(result, slots, ids)
        return self._sample(result, logits.float(), slots, positions)

    def _sampling(self, plan: StepPlan) -> tuple[StepResult, list[int], list[int]]:
        """The step's result, so far empty, and slots and positions of the rows that sample."""
        sampling = [p for p in plan.prefills if p.sample]
        slots = plan.decode_slots + [p.slot for p in sampling]
        positions = [s + 1 for s in plan.decode_starts] + [p.start + p.length for p in sampling]
        return StepResult(plan.step, []), slots, positions

    def _finish_unsampled(self, result: StepResult) -> Finish:
        # Nothing to read, but the step is over when the device is done with it: else a long prompt's chunks would
        # all be launched at once, and the last would have to answer within --step-timeout for all of them.
        read = self._readback(self.slots.last_tokens[:0])
        return lambda: replace(result, token_ids=read())

    def _launch_eager(self, plan: StepPlan) -> Finish:
        prefills = plan.prefills
        inspected = any(self.slots[p.slot].inspected for p in prefills)
        with tracing.span("build"):
            batch = self._batches.build(plan, every_row=inspected)
        with tracing.span("model"), self._padded(len(batch.token_ids_T)):
            logits = self.model(batch, self.slots.cache)
        (result, slots, positions), d = self._sampling(plan), batch.num_decodes
        if inspected:
            ends = []
            for p, (start, end) in zip(prefills, pairwise(batch.prefill_offsets), strict=True):
                self._inspect(p, logits[d + start : d + end], result)
                if p.sample:
                    ends.append(d + end - 1)
            logits = logits[[*range(d), *ends]]
        if not slots:
            return self._finish_unsampled(result)
        return self._sample(result, logits.float(), slots, positions)

    def _finish_simple(self, result: StepResult, slots: list[int], ids: Tensor) -> Finish:
        """`result` with ids that `Sampler.sample_rows` gave."""
        return self._finish_read(result, slots, self._readback(ids))

    def _finish_read(self, result: StepResult, slots: list[int], read: Callable[[], list[int]]) -> Finish:
        def finish() -> StepResult:
            tokens = read()
            errors = {s: NON_FINITE for s, t in zip(slots, tokens, strict=True) if t < 0} if min(tokens) < 0 else {}
            return replace(result, token_ids=tokens, errors=errors)

        return finish

    def _sample(self, result: StepResult, logits: Tensor, slots: list[int], positions: list[int]) -> Finish:
        """`result` with tokens chosen from logits [R, V] for `slots`, at their positions."""
        device = logits.device
        if self._sampler.simple(slots):  # nothing here waits for the device
            with tracing.span("sample"):
                slots_R, positions_R = to_device(slots, device), to_device(positions, device)
                ids = self._share(self._sampler.sample_rows(logits, slots_R, positions_R))
            self.slots.last_tokens[slots_R] = ids.clamp(min=0)
            return self._finish_simple(result, slots, ids)
        with tracing.span("sample"):
            ids, logprobs, errors = self._sampler(logits, slots, positions)
        ids = self._share(ids)
        self.slots.last_tokens[to_device(slots, device)] = ids
        read = self._readback(ids)
        self._sampler.sampled(slots, read)
        return lambda: replace(result, token_ids=read(), logprobs=logprobs, errors=errors)

    def _inspect(self, p: Prefill, rows_LV: Tensor, result: StepResult) -> None:
        """Put into `result` what is reported of the prompt's rows."""
        admitted = self.slots[p.slot]
        if admitted.prompt_logits:
            result.prompt_logits[p.slot] = rows_LV.to(torch.float32, copy=True)
        if admitted.prompt_logprobs is not None:
            # Of the tokens that follow each row, as far as they are known.
            following = admitted.token_ids[p.start + 1 : p.start + 1 + len(rows_LV)]
            ids = to_device(following.astype(np.int64), rows_LV.device)
            result.prompt_logprobs[p.slot] = token_logprobs(rows_LV[: len(ids)], ids, admitted.prompt_logprobs)
