"""Token ids to text as they come: never half a character, never text that a stop string may yet take back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence

from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.stops import StopStrings

# Characters that stand for tokens in marked text: private-use ones, which no model has a reason to write.
MARKS = range(0x10FE00, 0x10FE40)
_NOT_MARKS = dict.fromkeys(MARKS, "�")


class IncrementalDetokenizer:
    """Turns one sequence's ids into deltas that add up to tokenizer.decode of them all, cut at a stop.

    The work per token goes by its own text, whatever came before. An id beyond the tokenizer's vocabulary (a
    model's output may have rows to spare) gives no text; a negative one raises InvalidRequest.

    `marks` maps token ids to characters of MARKS that take the place of their text, special or not. A mark in the
    text is then always the token: where the model spells such a character, it becomes U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._marks = marks
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopStrings(stop, include_stop_str_in_output)
        self._at_start = True
        self._flushed = False

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.matched

    @property
    def finished(self) -> bool:
        """True after a stop string matched or flush was called; nothing more will be given."""
        return self._flushed or self.matched_stop is not None

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids make safe to show, perhaps none; always none after a stop string."""
        if self.finished:
            return ""
        if self._marks is None:
            return self._stops.feed(self._utf8.decode(b"".join(map(self._bytes_of, token_ids))))
        return self._stops.feed("".join([self._marked(i, self._marks) for i in token_ids]))

    def flush(self) -> str:
        """What was held back, once no more ids come; an unfinished character becomes U+FFFD. Idempotent."""
        if self.finished:
            return ""
        text = self._stops.feed(self._utf8.decode(b"", final=True))
        self._flushed = True
        return text + self._stops.end()

    def _marked(self, token_id: int, marks: Mapping[int, str]) -> str:
        mark = marks.get(token_id)
        if mark is None:
            return self._utf8.decode(self._bytes_of(token_id)).translate(_NOT_MARKS)
        self._at_start = False
        return self._utf8.decode(b"", final=True) + mark  # what was half a character ends here

    def _bytes_of(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        if token_id >= tokenizer.vocab_size or (self._skip_special and tokenizer.is_special(token_id)):
            return b""
        if self._at_start:
            self._at_start = False
            return tokenizer.first_token_bytes(token_id)
        return tokenizer.token_bytes(token_id)
