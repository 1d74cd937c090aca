"""The requests of a serving benchmark: random ones, ones that share prefixes, conversations, or a file's."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.errors import ConfigError
from thalweg.tokenizer.base import Tokenizer

MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """`prompt` is a text, token ids or chat messages; `output_len` the tokens it may generate."""

    prompt: str | list[int] | list[dict[str, Any]]
    output_len: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, each of which is sent after what was said before it; `pauses` are the seconds before each."""

    turns: list[BenchRequest]
    pauses: list[float]


class RandomPrompts:
    """Prompts of tokens drawn from a tokenizer's vocabulary, special ones left out.

    As ids their lengths are exact, and small ids are valid for any model. As text (`as_text`, for chat) they are
    what the ids decode to, so that a server may count a few tokens more or less.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, *, as_text: bool) -> None:
        self._tokenizer, self._as_text = tokenizer, as_text
        self._random = random.Random(seed)
        special = set(tokenizer.special_tokens.values())
        self._ids = [
            i for i in range(tokenizer.vocab_size) if i not in special and (not as_text or _is_text(tokenizer, i))
        ]

    def random(self, count: int, input_len: int, output_len: int, range_ratio: float) -> list[BenchRequest]:
        """Lengths are uniform within `range_ratio` of the given ones, at least 1."""
        return [
            self._request(self._draw(self._length(input_len, range_ratio)), self._length(output_len, range_ratio))
            for _ in range(count)
        ]

    def prefix_repetition(
        self, count: int, prefix_len: int, suffix_len: int, num_prefixes: int, output_len: int
    ) -> list[BenchRequest]:
        """Prompts that begin with one of `num_prefixes` prefixes, each as often as the others, in random order."""
        prefixes = [self._draw(prefix_len) for _ in range(num_prefixes)]
        requests = [
            self._request(prefixes[i % num_prefixes] + self._draw(suffix_len), output_len) for i in range(count)
        ]
        self._random.shuffle(requests)
        return requests

    def multi_turn(
        self, count: int, num_turns: int, first_len: int, input_len: int, output_len: int, think_time_s: float
    ) -> list[Conversation]:
        """Conversations that share nothing. Pauses between turns are drawn from an exponential distribution with the
        mean `think_time_s`."""
        found = []
        for _ in range(count):
            lengths = [first_len, *[input_len] * (num_turns - 1)]
            turns = [self._request(self._draw(length), output_len) for length in lengths]
            thinks = [self._random.expovariate(1 / think_time_s) if think_time_s else 0.0 for _ in turns[1:]]
            found.append(Conversation(turns, [0.0, *thinks]))
        return found

    def _draw(self, length: int) -> list[int]:
        return self._random.choices(self._ids, k=length)

    def _length(self, length: int, ratio: float) -> int:
        return max(1, self._random.randint(math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))))

    def _request(self, ids: list[int], output_len: int) -> BenchRequest:
        return BenchRequest(self._tokenizer.decode(ids) if self._as_text else ids, output_len)


def read_requests(path: str, count: int, output_len: int) -> list[BenchRequest]:
    """`count` requests of a file of JSON lines, from the beginning again when it has fewer.

    A line has "prompt" (text or token ids) or "messages", and may have "output_len"; where not, it is `output_len`.
    Raises ConfigError that names --dataset-path.
    """
    found: list[BenchRequest] = []
    try:
        with Path(path).expanduser().open("rb") as file:
            number = 0
            while len(found) < count and (line := file.readline(MAX_LINE_BYTES + 1)):
                number += 1
                if line.strip():
                    found.append(_read_line(line, f"--dataset-path is {path!r}: line {number}", output_len))
    except OSError as e:
        raise ConfigError(f"--dataset-path is {path!r}, which cannot be read: {e.strerror}") from None
    if not found:
        raise ConfigError(f'--dataset-path is {path!r}, which has no lines; expected {{"prompt": ...}} in each')
    return [found[i % len(found)] for i in range(count)]


def _read_line(line: bytes, where: str, output_len: int) -> BenchRequest:
    if len(line) > MAX_LINE_BYTES:
        raise ConfigError(f"{where} is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError(f"{where} is not valid JSON") from None
    prompt = value.get("prompt", value.get("messages")) if isinstance(value, dict) else None
    if not (prompt and (isinstance(prompt, str) or _all(prompt, int) or _all(prompt, dict))):
        raise ConfigError(f'{where} has no "prompt" (a text or token ids) and no "messages"')
    length = value.get("output_len", output_len)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ConfigError(f'{where}: "output_len" is {length!r:.40}; expected tokens, 1 or more')
    return BenchRequest(prompt, length)


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, Sequence) and all(type(v) is kind for v in values)


def _is_text(tokenizer: Tokenizer, token_id: int) -> bool:
    try:
        return tokenizer.token_bytes(token_id).decode().isprintable()
    except UnicodeDecodeError:
        return False
