"""Plain data that crosses rooms and processes: requests, step plans, step results. No torch, no behaviour.

Everything here is a frozen msgspec struct, so the same object is a value in a test, a line in a plan log and a
message to another process.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec.structs import force_setattr

from thalweg.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 64
MAX_CACHE_SALT = 256
MAX_GRAMMAR_CHARS = 128 << 10
# White space between JSON's parts: what a model that indents wants. With more, a weak one may write nothing else.
JSON_WHITESPACE = r"( |\n {0,16})?"


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A language that an output must be in, from its first token to its end. Raises InvalidRequest on a wrong type or
    size.

    kind: "json_schema"; "regex", in the syntax of Rust's regex crate, without look-around; or "lark", which is a
        grammar in llguidance's variant of Lark with a rule `start`, or in llama.cpp's GBNF with a rule `root`.
    text: the schema, the expression or the grammar.
    before: a Lark expression of what may come before it.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    before: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "lark"):
            raise InvalidRequest(f"the grammar is of kind {self.kind!r:.80}; expected json_schema, regex or lark")
        if not _is_text(self.text) or not _is_text(self.before):
            raise InvalidRequest("the grammar is not a text; expected a string that has a UTF-8 form")
        if len(self.text) + len(self.before) > MAX_GRAMMAR_CHARS:
            size = len(self.text) + len(self.before)
            raise InvalidRequest(f"the grammar has {size} characters; expected at most {MAX_GRAMMAR_CHARS}")


class ThinkingLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bound on the tokens of reasoning in an output. Raises InvalidRequest on a wrong type or value.

    begin, end: the token ids that mark reasoning.
    max_tokens: tokens that may stand between them. When they are spent, `end` is the next token, or under a grammar as
        soon as that allows it, and `begin` is not chosen again.
    begun: whether the output starts within reasoning.
    """

    begin: int
    end: int
    max_tokens: int
    begun: bool = False

    def __post_init__(self) -> None:
        for name in ("begin", "end", "max_tokens"):
            value = getattr(self, name)
            if not (_is_integer(value) and 0 <= value <= 2**31):
                raise InvalidRequest(f"thinking.{name} is {value!r:.80}; expected an integer from 0 to {2**31}")
        if self.begin == self.end:
            raise InvalidRequest(f"thinking.begin and thinking.end are both {self.begin}; expected two tokens")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of one request are chosen. Raises InvalidRequest on a value out of range.

    Filters apply in this order: logit_bias, penalties, temperature, top_k, top_p, min_p.
    """

    max_tokens: int | None = 16  # most tokens to generate; None: up to the end of the context. 0 only prefills
    min_tokens: int = 0  # until there are so many, end-of-sequence tokens and stop_token_ids are not chosen
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 (or -1): off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # None: drawn from the engine's seed and the request's arrival number
    stop: tuple[str, ...] = ()  # one string, None and a list are accepted too
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # log-probabilities of the chosen token and of so many most likely ones
    prompt_logprobs: int | None = None  # the same for every prompt token except the first
    skip_special_tokens: bool = True
    grammar: Grammar | None = None  # a language that the output must be in
    thinking: ThinkingLimit | None = None  # how long reasoning may be
    cache_salt: str = ""  # cached prefixes are shared only with requests that have the same salt

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r:.80}; expected {expected}")

        for name, low, high, optional in _INTEGERS:
            value = getattr(self, name)
            expected = f"{'None or ' if optional else ''}an integer from {low} to {high}"
            need((optional and value is None) or (_is_integer(value) and low <= value <= high), name, expected)
        for name, least, most, open_below in _NUMBERS:
            value = getattr(self, name)
            expected = f"a number in {'(' if open_below else '['}{least:g}, {most:g}]"
            need(_is_number(value) and least <= value <= most and not (open_below and value == least), name, expected)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            need(isinstance(getattr(self, name), bool), name, "true or false")

        need(isinstance(self.grammar, Grammar | None), "grammar", "None or a Grammar")
        need(isinstance(self.thinking, ThinkingLimit | None), "thinking", "None or a ThinkingLimit")
        salt_ok = _is_text(self.cache_salt) and len(self.cache_salt) <= MAX_CACHE_SALT
        need(salt_ok, "cache_salt", f"a string of at most {MAX_CACHE_SALT} characters")
        stop = _sequence((self.stop,) if isinstance(self.stop, str) else self.stop)
        fits = stop is not None and len(stop) <= MAX_STOP_STRINGS
        fits = fits and all(_is_text(s) and 0 < len(s) <= MAX_STOP_LENGTH for s in stop or ())
        need(fits, "stop", f"at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters")
        ids = _sequence(self.stop_token_ids)
        need(ids is not None and all(_is_integer(i) for i in ids), "stop_token_ids", "token ids")
        bias = self.logit_bias
        fits = isinstance(bias, dict) and all(
            _is_integer(i) and i >= 0 and _is_number(b) and -100 <= b <= 100 for i, b in bias.items()
        )
        need(fits, "logit_bias", "token ids >= 0 with biases in [-100, 100]")
        force_setattr(self, "stop", stop)
        force_setattr(self, "stop_token_ids", ids)


_INTEGERS = (  # name, least, greatest, whether None is allowed
    ("max_tokens", 0, 2**31, True),
    ("min_tokens", 0, 2**31, False),
    ("top_k", -1, 2**31, False),
    ("logprobs", 0, MAX_LOGPROBS, True),
    ("prompt_logprobs", 0, MAX_LOGPROBS, True),
    ("seed", -(2**63), 2**64 - 1, True),
)
_NUMBERS = (  # name, least, greatest, whether the least itself is out
    ("temperature", 0.0, 100.0, False),
    ("top_p", 0.0, 1.0, True),
    ("min_p", 0.0, 1.0, False),
    ("repetition_penalty", 0.0, 100.0, True),
    ("presence_penalty", -2.0, 2.0, False),
    ("frequency_penalty", -2.0, 2.0, False),
)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    """A string without lone surrogates, which have no UTF-8 form."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value


def _sequence(value: Any) -> tuple[Any, ...] | None:
    """A list or tuple as a tuple, None and nothing as an empty one; None for what is neither."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to continue, as it enters the engine."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt_logits: bool = False  # also return float32 logits of every prompt position (in-process only)


ID_BYTES = array("I").itemsize


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as uint32, one after another: other ranks take in a long prompt without a look at each token."""
    return array("I", token_ids).tobytes()


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A request takes a slot in this step, for the first time or again after preemption.

    `packed` holds the ids of the prompt and, when resumed, of what was generated so far, as pack_ids gives them; the
    slot's state starts from zero, unless the plan restores it from a snapshot.
    """

    slot: int
    request_id: str
    packed: bytes
    num_prompt: int
    params: SamplingParams
    seed: int
    prompt_logits: bool

    @property
    def token_ids(self) -> list[int]:
        """Those that are packed."""
        return array("I", self.packed).tolist()


class Prefill(msgspec.Struct, frozen=True, array_like=True):
    """`length` tokens of the slot's admitted ones from `start` on; `sample` where they reach the end."""

    slot: int
    start: int
    length: int
    sample: bool


class HostCopies(msgspec.Struct, frozen=True, array_like=True):
    """Copies between the device and numbered places of host memory: first those to it, then those from it."""

    block_saves: list[tuple[int, int]]  # (block, place)
    snapshot_saves: list[tuple[int, int]]
    block_fetches: list[tuple[int, int]]  # (place, block)
    snapshot_fetches: list[tuple[int, int]]


class SaveCache(msgspec.Struct, frozen=True, array_like=True, tag="save"):
    """Write blocks and snapshots, named as image.Sources names them, into the file of the rank in `folder`, with
    `index`, which says what they are."""

    folder: str
    image: int
    blocks: list[int]
    snapshots: list[int]
    index: bytes


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """One forward pass, as plain data. A log of plans replays a run.

    Before any row runs, blocks and snapshots as the steps before left them are copied to host memory, and others from
    it; states as those steps left them are copied into snapshots; then admissions begin; then states are restored from
    snapshots. Rows run in this order: decodes, then prefills. A decode row's input token is
    the last one sampled for its slot, which lives on the device and which the scheduler may not know yet. Steps run in
    the order they were planned.
    """

    step: int
    admissions: list[Admission]
    new_blocks: list[tuple[int, int, int]]  # (slot, index in its block table, block), applied before the rows run
    decode_slots: list[int]
    decode_starts: list[int]  # tokens already in the cache, which is the position of the row's input token
    prefills: list[Prefill]
    # (slot, n, snapshot): its prefill writes its states after n tokens, a multiple of 64, into the snapshot too
    boundaries: list[tuple[int, int, int]] = []
    snapshots: list[tuple[int, int]] = []  # (slot, snapshot to copy its states into)
    restores: list[tuple[int, int]] = []  # (slot, snapshot that its states come from)
    host: HostCopies | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.decode_slots) + sum(p.length for p in self.prefills)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: the chosen token's, its rank (1 = most likely), and the top ones."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What one step gave. token_ids has one entry per sampling row: every decode, then prefills with sample=True.

    The dicts are sparse and keyed by slot. An entry in `errors` ends that request alone; its token id means nothing.
    `prompt_logits` (float32 tensors [length, V]) never leaves the process. `fetching`: whether copies from host memory
    that this or an earlier plan asked for were still under way on rank 0.
    """

    step: int
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    errors: dict[int, str] = {}
    prompt_logits: dict[int, Any] = {}
    fetching: bool = False


class RequestUpdate(msgspec.Struct, frozen=True, array_like=True):
    """News of one request after a step, from the engine to whoever asked: zero or one new token, perhaps its end."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended it, when finish_reason is "stop"
    error: str | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # of the chunk just prefilled
    prompt_logits: Any = None  # of the chunk just prefilled; in-process only
    num_cached_tokens: int = 0  # told with the first token: prompt tokens that came from the prefix cache


class SchedulerStats(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot for metrics and logs."""

    num_running: int
    num_waiting: int
    blocks_used: int
    blocks_total: int
    slots_used: int
    slots_total: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    blocks_kept: int = 0  # of ended sequences, free for whoever needs them; not in blocks_used
    snapshots_used: int = 0
    snapshots_total: int = 0
    prefix_queries: int = 0  # tokens of prompts that were looked up in the prefix cache
    prefix_hits: int = 0  # tokens of them that were found
    prefix_host_hits: int = 0  # tokens that came back from host memory for a request
    host_blocks_used: int = 0
    host_blocks_total: int = 0
    host_snapshots_used: int = 0
    host_snapshots_total: int = 0
    host_copies: dict[str, int] = {}  # blocks_saved, blocks_fetched, snapshots_saved, snapshots_fetched
    prefix_misses: dict[str, int] = {}  # requests that found nothing, by reason
