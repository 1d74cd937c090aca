"""One request while it is in the scheduler, and the seed it samples with."""

from __future__ import annotations

from msgspec.structs import replace

from thalweg.core import ID_BYTES, Admission, FinishReason, Prefill, Request, RequestUpdate, StepResult, pack_ids

MASK64 = 2**64 - 1


class Sequence:
    """The scheduler's record of a request, from add() to its end.

    It counts what is planned, not what is known: the token a decode row feeds on may still be on the device.
    """

    __slots__ = (
        "capacity",
        "computed",
        "fetched_in",
        "finished",
        "keys",
        "lacks",
        "limit",
        "marks",
        "max_computed",
        "min_tokens",
        "num_cached",
        "num_prompt",
        "order",
        "output",
        "packed",
        "params",
        "prompt_rows_sent",
        "ready_after",
        "request_id",
        "save_at",
        "seed",
        "slot",
        "stop_ids",
        "target",
        "waits_in",
        "wants_prompt_logits",
    )

    def __init__(self, request: Request, order: int, seed: int, limit: int, stop_ids: frozenset[int]) -> None:
        params = request.params
        self.request_id = request.id
        self.packed = pack_ids(request.prompt_token_ids)
        self.num_prompt = len(request.prompt_token_ids)
        self.params = params
        self.wants_prompt_logits = request.prompt_logits
        self.order = order  # of all sequences: that of arrival, but for those that overtook others in the queue
        self.seed = seed
        self.limit = limit  # generated tokens at most
        self.min_tokens = params.min_tokens
        self.stop_ids = stop_ids
        self.max_computed = self.num_prompt + max(limit, 1) - 1  # the last sampled token is never an input
        self.output: list[int] = []  # tokens that have arrived from the device
        self.slot = 0  # 0 while waiting
        self.target = 0  # tokens the running admission prefills
        self.computed = 0  # tokens planned into the cache
        self.capacity = 0  # tokens its blocks hold
        self.ready_after = 0  # steps that must be done before it may run again
        self.prompt_rows_sent = 0  # prompt positions whose logits or logprobs were handed out
        self.finished = False
        self.num_cached = 0  # prompt tokens that came from the prefix cache when it was first admitted
        self.keys: list[bytes] = []  # its first full blocks of tokens, as the prefix tree knows them
        self.marks: list[int] = []  # positions to keep its states of, the next one last
        self.fetched_in = -1  # the plan that brings its prefix back from host memory
        self.waits_in = -1  # the plan that computes what it would otherwise compute too
        self.lacks = 0  # blocks that it will need besides those
        self.save_at = 0  # where its prefill was cut, so that the next step copies its states first

    @property
    def num_known(self) -> int:
        """Tokens that the host knows."""
        return self.num_prompt + len(self.output)

    def key(self, block: int, block_size: int) -> bytes:
        """The tokens of full block `block`, all of which are known."""
        keys = self.keys
        if not keys:  # the prompt's, all at once
            keys += keys_of(self.packed, block_size)
        while len(keys) <= block:
            start = len(keys) * block_size
            end, size = start + block_size, block_size * ID_BYTES
            of_output = self.output[max(start - self.num_prompt, 0) : end - self.num_prompt]
            keys.append(self.packed[start * ID_BYTES :][:size] + pack_ids(of_output))
        return keys[block]

    def admission(self) -> Admission:
        """What the runner is told when this sequence takes its slot: every token that is known by now."""
        return Admission(
            self.slot,
            self.request_id,
            self.packed + pack_ids(self.output),
            self.num_prompt,
            self.params,
            self.seed,
            self.wants_prompt_logits,
        )

    def reset(self, ready_after: int) -> None:
        """Back to waiting after a preemption; its cache is gone."""
        self.slot = self.target = self.computed = self.capacity = self.save_at = 0
        self.ready_after = ready_after
        self.fetched_in = -1

    def take_token(self, token: int, slot: int, result: StepResult) -> RequestUpdate:
        """A sampled token has arrived from the row that ran in `slot`."""
        if result.errors and slot in result.errors:
            return self._failed(result.errors[slot])
        output = self.output
        output.append(token)
        logprobs = result.logprobs.get(slot) if result.logprobs else None
        if token in self.stop_ids and len(output) > self.min_tokens:
            return RequestUpdate(self.request_id, [token], "stop", token, None, logprobs)
        reason: FinishReason | None = "length" if len(output) >= self.limit else None
        return RequestUpdate(self.request_id, [token], reason, None, None, logprobs)

    def take_prefill(self, prefill: Prefill, token: int | None, result: StepResult) -> RequestUpdate | None:
        """A prefill has run, with a sampled token if it was the last. None when there is nothing to tell."""
        slot = prefill.slot
        if result.errors and slot in result.errors:
            return self._failed(result.errors[slot])
        logprobs, logits = result.prompt_logprobs.get(slot), result.prompt_logits.get(slot)
        if logprobs is not None or logits is not None:
            rows = max(min(prefill.length, self.num_prompt - prefill.start), 0)  # of the prompt
            first = max(self.prompt_rows_sent - prefill.start, 0)
            logprobs = (logprobs[first:rows] or None) if logprobs is not None else None
            logits = logits[first:rows] if logits is not None and first < rows else None
            self.prompt_rows_sent = max(self.prompt_rows_sent, prefill.start + rows)
        if token is not None:
            news = self.take_token(token, slot, result)
        elif self.limit == 0 and prefill.start + prefill.length == self.num_prompt:
            news = RequestUpdate(self.request_id, [], "length")
        elif logprobs is None and logits is None:
            return None
        else:
            news = RequestUpdate(self.request_id, [])
        if self.num_cached and prefill.start + prefill.length >= self.num_prompt:
            news = replace(news, num_cached_tokens=self.num_cached)
            self.num_cached = 0  # told once, also if it is preempted and comes by here again
        if logprobs is None and logits is None:
            return news
        return replace(news, prompt_logprobs=logprobs, prompt_logits=logits)

    def _failed(self, error: str) -> RequestUpdate:
        return RequestUpdate(self.request_id, [], "error", None, error)


def keys_of(packed: bytes, block_size: int) -> list[bytes]:
    """Full blocks of tokens, as the prefix tree knows them."""
    size = block_size * ID_BYTES
    return [packed[end - size : end] for end in range(size, len(packed) + 1, size)]


def derive_seed(engine_seed: int, arrival: int) -> int:
    """A 64-bit seed for the arrival-th request of an engine (splitmix64, Steele et al. 2014)."""
    return _mix(_mix(engine_seed & MASK64) + (arrival + 1) * 0x9E3779B97F4A7C15)


def _mix(x: int) -> int:
    x &= MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)
