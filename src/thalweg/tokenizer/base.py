"""What every tokenizer offers: text to ids, ids to text. Decoding goes by bytes, so that it can stream."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from thalweg.errors import InvalidRequest

_PART = 32_768


class Tokenizer(ABC):
    """A vocabulary of byte strings and an encoder.

    Ids are 0 <= id < vocab_size. `special_tokens` maps the texts that `encode` turns into one id only when
    allow_special is true. Some of them are text to a reader (`<think>`); is_special tells the ones that
    decode leaves out when asked to. `added_tokens` are those and any other text that is one id by being named,
    not by its bytes.
    """

    special_tokens: dict[str, int]
    added_tokens: dict[str, int]
    surrounds: bool = False  # whether the format would put tokens around a text; `encode` never does
    bos_id: int | None = None
    eos_id: int | None = None
    # Filled by the subclass: the bytes of every id (b"" where there is no token), the ids decode may leave
    # out.
    _bytes_by_id: list[bytes]
    _special_ids: frozenset[int]

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; a model's output may have more rows than that."""
        return len(self._bytes_by_id)

    @property
    def marks(self) -> dict[str, int]:
        """The added tokens that no text of a user's may become: all but added words and runs of space."""
        return self.special_tokens

    @abstractmethod
    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text` and nothing else. Without allow_special, special tokens in it are plain text."""

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` in which no mark counts, special or not."""
        return self.encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for. Raises InvalidRequest outside the vocabulary."""
        if not 0 <= token_id < len(self._bytes_by_id):
            raise InvalidRequest(f"token id {token_id} is outside the vocabulary; expected 0 to {self.vocab_size - 1}")
        return self._bytes_by_id[token_id]

    def first_token_bytes(self, token_id: int) -> bytes:
        """The bytes of an id that begins a text: some vocabularies drop the space they put before a word."""
        return self.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        """True for control tokens, which carry no text of their own."""
        return token_id in self._special_ids

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The bytes of a whole sequence. Raises InvalidRequest on an id outside the vocabulary."""
        kept = [i for i in ids if i not in self._special_ids] if skip_special else list(ids)
        if not kept:
            return b""
        return self.first_token_bytes(kept[0]) + b"".join(
            self._bytes_of(kept[begin : begin + _PART]) for begin in range(1, len(kept), _PART)
        )

    def _bytes_of(self, ids: list[int]) -> bytes:
        """Of a few thousand ids, so that other threads have their turn between such parts of a long text."""
        if min(ids) < 0 or max(ids) >= len(self._bytes_by_id):
            return b"".join(map(self.token_bytes, ids))  # which says what is wrong
        return b"".join(map(self._bytes_by_id.__getitem__, ids))

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    @property
    def bos_token(self) -> str | None:
        return None if self.bos_id is None else self.decode([self.bos_id])

    @property
    def eos_token(self) -> str | None:
        return None if self.eos_id is None else self.decode([self.eos_id])


def valid_unicode(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so it has a UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def literal_pattern(literals: Iterable[str]) -> re.Pattern[str]:
    """A regular expression matching any of `literals`, the longest that fits; with no literals, nothing.

    They are folded into a prefix tree instead of being tried one after another, so a long text of their first
    characters ("<<<<") costs no more than any other.
    """
    tree: dict[str, Any] = {}
    for literal in literals:
        node = tree
        for char in literal:
            node = node.setdefault(char, {})
        node[""] = {}

    def expression(node: dict[str, Any]) -> str:
        branches = [re.escape(char) + expression(child) for char, child in node.items() if char]
        if not branches:
            return ""
        body = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
        return f"(?:{body})?" if "" in node else body

    return re.compile(expression(tree) or r"(?!)")


def split_literals(pattern: re.Pattern[str], text: str) -> Iterable[tuple[str, bool]]:
    """Cut `text` at the matches of `pattern`: (piece, whether it is a match), in order, no piece empty."""
    start = 0
    for match in pattern.finditer(text):
        if match.start() > start:
            yield text[start : match.start()], False
        yield match.group(), True
        start = match.end()
    if start < len(text):
        yield text[start:], False
