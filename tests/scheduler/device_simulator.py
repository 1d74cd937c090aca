"""A device without tensors: it replays step plans and checks that each touches only what its slot owns.

A slot's pages hold token ids, each with a hash of all up to it, and its state is the same hash. The next token is a
function of both, read the way a kernel would, through the block table. A block overwritten, a position skipped or run
twice, a state that was not reset or came from another prefix: each changes the tokens, so comparing with `solo` finds
it. Snapshots begin as garbage.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate

from thalweg.cache.manager import CacheManager
from thalweg.core import (
    Admission,
    HostCopies,
    Request,
    RequestUpdate,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from thalweg.scheduler.scheduler import Scheduler

VOCAB = 40
EOS = frozenset({0, 1})


def chain(state: int, token: int) -> int:
    return zlib.crc32(token.to_bytes(4, "little"), state)


def chain_all(tokens: list[int], state: int = 0) -> int:
    return reduce(chain, tokens, state)


def next_token(cached: list[int], state: int, seed: int, num_generated: int, params: SamplingParams) -> int:
    """Deterministic in everything a model's next token depends on; ends are masked before min_tokens."""
    token = zlib.crc32(bytes(cached), state ^ (seed & 0xFFFFFFFF)) % VOCAB
    ends = EOS.union(params.stop_token_ids) if num_generated < params.min_tokens else ()
    while token in ends:
        token = (token + 1) % VOCAB
    return token


def solo(
    request: Request, seed: int, max_model_len: int, max_cached: int | None, stateful: bool = True
) -> tuple[list[int], str]:
    """The tokens of a request that has the device to itself, and why it ended.

    max_cached None: the model has no paged layers. Not `stateful`: it keeps no state.
    """
    params = request.params
    tokens, output = list(request.prompt_token_ids), []
    state = 0
    for token in tokens:
        state = chain(state, token)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else EOS)
    while True:
        if params.max_tokens is not None and len(output) >= params.max_tokens:
            return output, "length"
        if len(tokens) >= max_model_len or (max_cached is not None and len(tokens) > max_cached):
            return output, "length"
        cached = [] if max_cached is None else tokens
        token = next_token(cached, state if stateful else 0, seed, len(output), params)
        tokens.append(token)
        output.append(token)
        state = chain(state, token)
        if token in ends and len(output) > params.min_tokens:
            return output, "stop"


@dataclass
class Slot:
    admission: Admission
    table: list[int] = field(default_factory=list)
    num_cached: int = 0
    shared: set[int] = field(default_factory=set)  # indices of blocks that it only reads
    state: int = 0
    last: int | None = None


class Device:
    """Runs plans in order. With num_blocks 0 its model has no paged layers; not `stateful`, it keeps no state."""

    def __init__(
        self, num_blocks: int, num_slots: int, block_size: int, stateful: bool = True, chunk: int = 1, slow: int = 0
    ) -> None:
        """`slow`: results that come before what a plan fetched from host memory is said to be there."""
        self.num_blocks, self.num_slots, self.block_size, self.chunk = num_blocks, num_slots, block_size, chunk
        self.stateful = stateful
        self.snapshots: dict[int, int] = {}
        self.slow, self.last_fetch = slow, -slow
        self.host_pages: dict[int, list[tuple[int, int]]] = {}  # place -> a block's
        self.host_states: dict[int, int] = {}
        self.pages: dict[tuple[int, int], tuple[int, int]] = {}  # (block, place in it) -> token, hash up to it
        self.owner: dict[int, int] = {}
        self.written: dict[int, int] = {}  # block -> step that wrote into it last
        self.slots: dict[int, Slot] = {}
        self.next_step = 0
        self.errors: dict[tuple[str, int], str] = {}  # (request id, position): what goes wrong there
        self.seeds: dict[str, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.step == self.next_step, "plans run in order, none left out"
        self.next_step += 1
        restored, starts = dict(plan.restores), {p.slot: p.start for p in plan.prefills}
        assert self.stateful or not (plan.snapshots or plan.restores or plan.boundaries)
        for copies in (plan.snapshots, plan.boundaries):
            assert len({copy[-1] for copy in copies}) == len(copies), "a snapshot is written once"
        assert {slot for slot, *_ in plan.boundaries} <= {p.slot for p in plan.prefills}
        if plan.host is not None:
            self._copy(plan.host, plan.step, {snapshot for _, snapshot in plan.restores})
        for slot, snapshot in plan.snapshots:
            assert snapshot >= 1
            self.snapshots[snapshot] = self.slots[slot].state
        for a in plan.admissions:
            assert 1 <= a.slot <= self.num_slots
            self.owner = {block: slot for block, slot in self.owner.items() if slot != a.slot}
            start = starts[a.slot]
            self.slots[a.slot] = slot = Slot(a, num_cached=start, shared=set(range(start // self.block_size)))
            if start:
                assert start in range(0, len(a.token_ids), self.block_size)
                slot.state = chain_all(a.token_ids[:start])
                if self.stateful:
                    assert a.slot in restored, "a prompt goes on from a snapshot alone"
                    slot.state = self.snapshots[restored.pop(a.slot)]
            assert self.seeds.setdefault(a.request_id, a.seed) == a.seed, "a resumed request keeps its seed"
        assert not restored, "states are restored for sequences that begin"
        for slot, index, block in plan.new_blocks:
            assert 1 <= block <= self.num_blocks
            into = self.slots[slot]
            if index < len(into.table) or index in into.shared:
                assert self.written[block] < plan.step, "a block is read in a later step than it is written in"
            if index < len(into.table):  # it goes on with another's block of the same tokens
                assert (index + 1) * self.block_size <= into.num_cached
                into.table[index] = block
                into.shared.add(index)
                continue
            assert index == len(into.table), "block tables grow at their end"
            into.table.append(block)
            if index in into.shared:
                continue
            self.owner[block] = slot
        rows = plan.decode_slots + [p.slot for p in plan.prefills]
        assert len(set(rows)) == len(rows), "one row a slot"
        assert {a.slot for a in plan.admissions} <= {p.slot for p in plan.prefills}
        result = StepResult(plan.step, [], {}, {}, {}, {}, plan.step - self.last_fetch < self.slow)
        for number, start in zip(plan.decode_slots, plan.decode_starts, strict=True):
            slot = self.slots[number]
            assert slot.last is not None, "a decode needs a sampled token to feed on"
            self._feed(number, start, [slot.last])
            self._sample(number, result)
        for p in plan.prefills:
            tokens = self.slots[p.slot].admission.token_ids
            assert p.length >= 1
            for slot, n, snapshot in plan.boundaries:
                if slot == p.slot:
                    assert snapshot >= 1
                    assert 0 < n <= p.length
                    assert n % self.chunk == 0, "kernels write states at ends of their chunks"
                    self.snapshots[snapshot] = chain_all(tokens[p.start : p.start + n], self.slots[slot].state)
            self._feed(p.slot, p.start, tokens[p.start : p.start + p.length])
            assert not p.sample or p.start + p.length == len(tokens)
            self._inspect(p.slot, p.start, tokens[p.start + 1 : p.start + p.length + 1], p.length, result)
            if p.sample:
                self._sample(p.slot, result)
        return result

    def _copy(self, copies: HostCopies, step: int, restored: set[int]) -> None:
        for kind in (copies.block_saves, copies.snapshot_saves, copies.block_fetches, copies.snapshot_fetches):
            assert len({target for _, target in kind}) == len(kind), "a place is written once"
        for block, place in copies.block_saves:
            assert self.written[block] < step
            self.host_pages[place] = [self.pages.pop((block, i)) for i in range(self.block_size)]
        for snapshot, place in copies.snapshot_saves:
            self.host_states[place] = self.snapshots[snapshot]
            if snapshot not in restored:
                del self.snapshots[snapshot]  # for it goes to another
        for place, block in copies.block_fetches:
            self.owner.pop(block, None)
            self.written[block] = step - 1
            self.pages.update({(block, i): page for i, page in enumerate(self.host_pages[place])})
        for place, snapshot in copies.snapshot_fetches:
            self.snapshots[snapshot] = self.host_states[place]
        if copies.block_fetches or copies.snapshot_fetches:
            self.last_fetch = step

    def _feed(self, number: int, start: int, tokens: list[int]) -> None:
        slot = self.slots[number]
        assert start == slot.num_cached, "positions are filled once, in order"
        for token in tokens:
            if self.num_blocks:
                block = slot.table[slot.num_cached // self.block_size]
                assert slot.num_cached // self.block_size not in slot.shared
                assert self.owner[block] == number, f"slot {number} writes into a block of {self.owner[block]}"
                self.written[block] = self.next_step - 1
                self.pages[block, slot.num_cached % self.block_size] = token, chain(slot.state, token)
            slot.num_cached += 1
            slot.state = chain(slot.state, token)

    def _read(self, number: int) -> list[int]:
        slot = self.slots[number]
        if not self.num_blocks:
            return []
        blocks = [slot.table[i // self.block_size] for i in range(slot.num_cached)]
        own = [block for i, block in enumerate(slot.table) if i not in slot.shared]
        assert all(self.owner[block] == number for block in own), "a block was handed on while still in use"
        pages = [self.pages[block, i % self.block_size] for i, block in enumerate(blocks)]
        tokens, hashes = [page[0] for page in pages], [page[1] for page in pages]
        assert hashes == list(accumulate(tokens, chain, initial=0))[1:], "a block is of another prefix"
        return tokens

    def _sample(self, number: int, result: StepResult) -> None:
        slot = self.slots[number]
        a = slot.admission
        cached = self._read(number)
        if error := self.errors.get((a.request_id, slot.num_cached)):
            result.errors[number] = error
        num_generated = slot.num_cached - a.num_prompt
        slot.last = next_token(cached, slot.state if self.stateful else 0, a.seed, num_generated, a.params)
        if a.params.logprobs is not None:
            result.logprobs[number] = TokenLogprobs(slot.last, -1.0, 1, [], [])
        result.token_ids.append(slot.last)

    def _inspect(self, number: int, start: int, following: list[int], length: int, result: StepResult) -> None:
        a = self.slots[number].admission
        if a.prompt_logits:
            result.prompt_logits[number] = list(range(start, start + length))  # row i names its position
        if a.params.prompt_logprobs is not None:
            result.prompt_logprobs[number] = [TokenLogprobs(token, 0.0, 1, [], []) for token in following]


class Harness:
    """A scheduler with a device, `depth` plans ahead of the results, as the engine's loop runs them."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_model_len: int = 64,
        seed: int = 0,
        depth: int = 0,
        keep_prefixes: bool = False,
        num_snapshots: int | None = None,
        grid: int | None = None,
        interval: int = 1024,
        chunk: int | None = None,
        threshold: int = 0,
        host: tuple[int, int] = (0, 0),
        slow: int = 0,
    ) -> None:
        """num_snapshots None with `keep_prefixes`: the model keeps no state. `chunk` None: as `grid`. `host`:
        places for blocks and snapshots in host memory, which is `slow` (see Device)."""
        cache = CacheManager(
            num_blocks,
            max_num_seqs,
            block_size,
            keep_prefixes=keep_prefixes,
            num_snapshots=num_snapshots,
            num_host_blocks=host[0] if num_blocks else 0,
            num_host_snapshots=host[1] if num_snapshots is not None else 0,
        )
        limits = max_num_seqs, max_num_batched_tokens, max_model_len
        grid = grid or block_size
        self.scheduler = Scheduler(*limits, cache, EOS, seed, grid, interval, chunk or grid, threshold)
        stateful = not keep_prefixes or num_snapshots is not None
        self.device = Device(num_blocks, max_num_seqs, block_size, stateful, chunk or grid, slow)
        self.depth = depth
        self.pending: deque[StepPlan] = deque()
        self.plans: list[StepPlan] = []
        self.requests: dict[str, Request] = {}
        self.updates: dict[str, list[RequestUpdate]] = {}
        self.aborted: set[str] = set()

    def add(self, id: str, prompt: list[int], prompt_logits: bool = False, **params: object) -> None:
        request = Request(
            id=id,
            prompt_token_ids=prompt,
            params=SamplingParams(**{"max_tokens": None, **params}),
            prompt_logits=prompt_logits,
        )
        self.scheduler.add(request)
        self.requests[id] = request
        self.updates[id] = []

    def abort(self, id: str) -> bool:
        if done := self.scheduler.abort(id):
            self.aborted.add(id)
        return done

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            assert 1 <= plan.num_tokens <= self.scheduler.max_num_batched_tokens
            most = self.scheduler.long_prefill_token_threshold
            if plan.decode_slots and most:
                assert all(p.length <= most for p in plan.prefills)
                assert sum(p.length for p in plan.prefills) <= 2 * most
            self.pending.append(plan)
            self.plans.append(plan)
        return plan

    def collect(self) -> list[RequestUpdate]:
        plan = self.pending.popleft()
        updates = self.scheduler.update(plan, self.device.execute(plan))
        for update in updates:
            assert update.request_id not in self.aborted, "no news of an aborted request"
            assert not self.ended(update.request_id), "no news after the end"
            self.updates[update.request_id].append(update)
        return updates

    def step(self) -> list[RequestUpdate]:
        """Plans a step, then takes in results until at most `depth` are outstanding."""
        planned = self.plan() is not None
        if self.pending and (not planned or len(self.pending) > self.depth):
            return self.collect()
        assert planned or not self.scheduler.has_work(), "requests are left, and nothing runs"
        return []

    def drain(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work() and not self.pending:
                self.scheduler.check_idle()
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps: somebody starves")

    def ended(self, id: str) -> bool:
        return bool(self.updates[id]) and self.updates[id][-1].finish_reason is not None

    def tokens(self, id: str) -> list[int]:
        return [token for update in self.updates[id] for token in update.token_ids]

    def solo(self, id: str) -> tuple[list[int], str]:
        max_cached = self.device.num_blocks * self.device.block_size or None
        limits = self.scheduler.max_model_len, max_cached, self.device.stateful
        return solo(self.requests[id], self.device.seeds[id], *limits)

    def cached(self, id: str) -> int:
        """Prompt tokens that the updates of a request said were cached, as those who report them add up."""
        return sum(update.num_cached_tokens for update in self.updates[id])

    def check_against_solo(self) -> None:
        for id in self.requests:
            if id in self.aborted:
                if id in self.device.seeds:
                    tokens = self.tokens(id)
                    assert tokens == self.solo(id)[0][: len(tokens)]
            else:
                assert (self.tokens(id), self.updates[id][-1].finish_reason) == self.solo(id)
