"""Decides what every step runs: who is admitted, who decodes, who prefills how much, who has to give way.

Plans are made ahead of results. Steps run in the order they were planned, so blocks and slots are handed to
the next sequence at once, while steps that still touch them for the last one may be in flight.
"""

from __future__ import annotations

from collections import deque

from thalweg.cache.manager import CacheManager
from thalweg.core import (
    Admission,
    Prefill,
    Request,
    RequestUpdate,
    SamplingParams,
    SchedulerStats,
    StepPlan,
    StepResult,
)
from thalweg.errors import InvalidRequest
from thalweg.scheduler.prefixes import Prefixes
from thalweg.scheduler.queue import Queue
from thalweg.scheduler.roster import Roster
from thalweg.scheduler.sequence import MASK64, Sequence, derive_seed

NewBlocks = list[tuple[int, int, int]]


class Scheduler:
    """Continuous batching with chunked prefill and preemption by recomputation.

    A step runs at most max_num_batched_tokens tokens: decodes first, then the prefill that is under way, then
    admissions. Beside decodes, which wait for it, a prefill has at most long_prefill_token_threshold tokens of a step
    (0: as many as fit), and all prefills twice as many. Otherwise it is cut short only when the step is full.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        cache: CacheManager,
        eos_token_ids: frozenset[int],
        seed: int,
        snapshot_grid: int = 1,
        snapshot_interval: int = 1,
        state_chunk: int | None = None,
        long_prefill_token_threshold: int = 0,
        most_boundaries: int = 0,
    ) -> None:
        """`snapshot_grid`, `snapshot_interval`, `state_chunk`, `most_boundaries`: see Prefixes."""
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.long_prefill_token_threshold = long_prefill_token_threshold
        self.max_model_len = max_model_len
        self.cache = cache
        self.eos_token_ids = eos_token_ids
        self.seed = seed
        self._prefixes = Prefixes(
            cache, snapshot_grid, snapshot_interval, state_chunk or snapshot_grid, most_boundaries
        )
        self._roster = Roster(cache, max_num_seqs, self._prefixes)
        self._queue = Queue(cache, self._roster, self._prefixes)
        self._in_flight: deque[tuple[int, list[Sequence], list[Sequence]]] = deque()  # step, decodes, prefills
        self._next_step = 0
        self._planning = False  # whether a plan is being made, or its making was interrupted
        self._steps_done = 0  # every step below this number has its result
        self._last_served = -1  # order of the decode served last when there were too many for a step
        self._arrivals = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    # Requests come and go

    def add(self, request: Request) -> None:
        """Puts a request in the queue. Raises InvalidRequest when it could never run, or its id is in use."""
        num_prompt, params, most = len(request.prompt_token_ids), request.params, self.max_model_len
        if request.id in self._roster.sequences:
            raise InvalidRequest(f"request id {request.id!r} is in use; expected a new one")
        if num_prompt == 0:
            raise InvalidRequest("the prompt has no tokens; expected at least one")
        check_prompt_length(num_prompt, params, most)
        if num_prompt > self.cache.max_tokens:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens; expected at most {self.cache.max_tokens},"
                " which is all that the cache holds (--cache-memory, --gpu-memory-utilization)"
            )
        # The last token of all is sampled but never cached, hence one more than the cache holds.
        limit = min(most, self.cache.max_tokens + 1) - num_prompt
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens)
        stop_ids = frozenset() if params.ignore_eos else self.eos_token_ids
        if params.stop_token_ids:
            stop_ids = stop_ids.union(params.stop_token_ids)
        seed = derive_seed(self.seed, self._arrivals) if params.seed is None else params.seed & MASK64
        self._roster.enqueue(Sequence(request, self._arrivals, seed, limit, stop_ids))
        self._arrivals += 1

    def abort(self, request_id: str) -> bool:
        """Forgets a request and frees what it holds, whatever it was doing; False when it is not here.

        Results of its steps still in flight are dropped, and no update tells of its end.
        """
        seq = self._roster.sequences.get(request_id)
        if seq is None:
            return False
        # Of a plan that was never made, because making it was interrupted, nothing has been or will be computed.
        self._roster.end(seq, self._next_step, failed=self._planning)
        return True

    def keep(self, name: str, salt: str, token_ids: list[int]) -> int:
        """See Prefixes.keep."""
        return self._prefixes.keep(name, salt, token_ids)

    def release(self, name: str) -> None:
        """See Prefixes.release."""
        self._prefixes.release(name)

    def is_queued(self, request_id: str) -> bool:
        """Whether a request waits and has never run; one that had to give way has begun."""
        seq = self._roster.waiting.get(request_id)
        return seq is not None and not seq.ready_after

    @property
    def interrupted(self) -> bool:
        """Whether the making of a plan was interrupted, so that what it was to compute is in the books alone."""
        return self._planning

    def has_work(self) -> bool:
        """Whether any request is unfinished. Steps of ended requests may be in flight all the same."""
        return bool(self._roster.sequences)

    def check_idle(self) -> None:
        """Raises RuntimeError that names unfinished requests or leaked blocks and slots, if there are any."""
        if self._roster.sequences:
            raise RuntimeError(f"not idle: requests {sorted(self._roster.sequences)} are unfinished")
        self.cache.check_idle()

    def stats(self) -> SchedulerStats:
        """Lengths and use now, and counts since start. A prompt counts once, when first admitted."""
        blocks, slots, snapshots, host = self.cache.blocks, self.cache.slots, self.cache.snapshots, self.cache.host
        return SchedulerStats(
            num_running=self._roster.num_running,
            num_waiting=len(self._roster.waiting),
            blocks_used=blocks.num_blocks - self.cache.num_available,
            blocks_total=blocks.num_blocks,
            slots_used=slots.num_slots - slots.num_free,
            slots_total=slots.num_slots,
            num_preemptions=self._roster.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            blocks_kept=self.cache.num_kept,
            snapshots_used=snapshots.num_snapshots - snapshots.num_free,
            snapshots_total=snapshots.num_snapshots,
            prefix_queries=self._prefixes.queries,
            prefix_hits=self._prefixes.hits,
            prefix_host_hits=self._prefixes.host_hits,
            host_blocks_used=host.blocks.num_blocks - host.blocks.num_free,
            host_blocks_total=host.blocks.num_blocks,
            host_snapshots_used=host.snapshots.num_snapshots - host.snapshots.num_free,
            host_snapshots_total=host.snapshots.num_snapshots,
            host_copies=host.counts(),
            prefix_misses=dict(self._prefixes.misses),
        )

    # Planning

    def schedule(self) -> StepPlan | None:
        """The next step. None when there is nothing to run before a result arrives or a request is added."""
        step = self._next_step
        self._planning = True
        self._prefixes.begin(step)
        new_blocks = self._prefixes.new_blocks
        decodes, slots, starts = self._plan_decodes(new_blocks)
        budget = self.max_num_batched_tokens - len(decodes)
        most = (decodes and self.long_prefill_token_threshold) or budget
        if decodes and self.long_prefill_token_threshold:
            budget = min(budget, 2 * self.long_prefill_token_threshold)
        admissions: list[Admission] = []
        prefills: list[Prefill] = []
        prefill_seqs: list[Sequence] = []
        while budget > 0:
            room, idle = min(budget, most), not decodes and not prefills
            seq = self._roster.prefilling or self._admit(admissions, new_blocks, room, bool(prefills), idle)
            if seq is None:
                break
            prefill = self._plan_prefill(seq, room)
            prefills.append(prefill)
            prefill_seqs.append(seq)
            budget -= prefill.length
            if self._roster.prefilling is not None:
                break  # it is cut where the budget or the prefix cache wants it, and has one row in a step
        if not decodes and not prefills:
            self._planning = False
            return None
        self._next_step = step + 1
        self._in_flight.append((step, decodes, prefill_seqs))
        copies = *self._prefixes.copies(), self._prefixes.host_copies()
        plan = StepPlan(step, admissions, new_blocks, slots, starts, prefills, *copies)
        self._planning = False
        return plan

    def _plan_decodes(self, new_blocks: NewBlocks) -> tuple[list[Sequence], list[int], list[int]]:
        # Rows are planned in order of arrival, so whoever gives way to one of them has no row in this plan.
        ready = [seq for seq in self._roster.decoding if seq.computed < seq.max_computed]
        if len(ready) > self.max_num_batched_tokens:
            ready = self._rotate(ready)
        decodes: list[Sequence] = []
        slots: list[int] = []
        starts: list[int] = []
        grid = self._prefixes.grid_without_blocks
        for seq in ready:
            start = seq.computed
            if start >= seq.capacity:  # also when it has given way: its capacity is then 0
                self._prefixes.growing(seq)
                index = seq.capacity // self.cache.block_size
                blocks = self._roster.grow(seq, self._next_step)
                if not blocks:
                    continue
                new_blocks.extend((seq.slot, index + i, block) for i, block in enumerate(blocks))
                self._prefixes.grown(seq)
            elif grid and start % grid == 0:
                self._prefixes.growing(seq)
                self._prefixes.grown(seq)
            seq.computed = start + 1
            decodes.append(seq)
            slots.append(seq.slot)
            starts.append(start)
        return decodes, slots, starts

    def _rotate(self, ready: list[Sequence]) -> list[Sequence]:
        """As many as fit in a step, going round from where the last such step ended; in order of arrival."""
        budget = self.max_num_batched_tokens
        first = next((i for i, seq in enumerate(ready) if seq.order > self._last_served), 0)
        late = ready[first : first + budget]
        early = ready[: budget - len(late)]
        self._last_served = (early or late)[-1].order
        return early + late

    def _admit(
        self, admissions: list[Admission], new_blocks: NewBlocks, budget: int, whole: bool, idle: bool
    ) -> Sequence | None:
        begun = self._queue.begin(self._next_step, self._steps_done, budget, whole, idle)
        if begun is None:
            return None
        seq, blocks = begun
        if not seq.ready_after:  # it was never preempted
            self._prompt_tokens += seq.num_prompt
        new_blocks.extend((seq.slot, index, block) for index, block in enumerate(blocks))
        admissions.append(seq.admission())
        return seq

    def _plan_prefill(self, seq: Sequence, budget: int) -> Prefill:
        start = seq.computed
        seq.computed = self._prefixes.chunk_end(seq, budget)
        self._prefixes.planned(seq, start)
        last = seq.computed == seq.target
        if last:
            self._roster.prefilled()
        return Prefill(seq.slot, start, seq.computed - start, last and seq.limit > 0)

    # Results

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestUpdate]:
        """Takes in what a step gave. Results come in the order of their plans.

        Row i of a prefill's prompt_logits is position start + i; entry i of its prompt_logprobs is what that
        position says of the token after it. What goes past the prompt, or was handed out before a preemption,
        is cut off.
        """
        expected = self._in_flight[0][0] if self._in_flight else None
        if plan.step != expected or result.step != expected:
            raise RuntimeError(f"result of step {result.step} for plan {plan.step}; expected step {expected}")
        num_rows = len(plan.decode_slots) + sum(p.sample for p in plan.prefills)
        if len(result.token_ids) != num_rows:
            raise RuntimeError(f"step {plan.step} gave {len(result.token_ids)} tokens; expected {num_rows}")
        _, decodes, prefill_seqs = self._in_flight.popleft()
        self._steps_done = plan.step + 1
        if not result.fetching:
            self._queue.landed = plan.step
        updates: list[RequestUpdate] = []
        tokens = iter(result.token_ids)
        for seq, slot, token in zip(decodes, plan.decode_slots, tokens, strict=False):
            if not seq.finished:
                news = seq.take_token(token, slot, result)
                updates.append(news)
                if news.finish_reason is not None:
                    self._roster.end(seq, self._next_step, news.finish_reason == "error")
        for seq, prefill in zip(prefill_seqs, plan.prefills, strict=True):
            sampled = next(tokens) if prefill.sample else None
            if not seq.finished:
                told = seq.take_prefill(prefill, sampled, result)
                if told is not None:
                    updates.append(told)
                    if told.finish_reason is not None:
                        self._roster.end(seq, self._next_step, told.finish_reason == "error")
        for update in updates:
            self._generation_tokens += len(update.token_ids)
        return updates


def check_prompt_length(num_prompt: int, params: SamplingParams, max_model_len: int) -> None:
    """Raises InvalidRequest if a prompt leaves no room in `max_model_len` tokens."""
    if num_prompt > max_model_len - (params.max_tokens != 0):
        room = ", one of them to generate" if params.max_tokens != 0 else ""
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens; expected at most {max_model_len} in all{room} (--max-model-len)"
        )
