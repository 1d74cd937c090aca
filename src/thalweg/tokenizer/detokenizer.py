"""Token ids to text as they come: never half a character, never text that a stop string may yet take back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence

from thalweg.tokenizer.base import Tokenizer

# Characters that stand for tokens in marked text: private-use ones, which no model has a reason to write.
MARKS = range(0x10FE00, 0x10FE40)
_NOT_MARKS = dict.fromkeys(MARKS, "�")


class IncrementalDetokenizer:
    """Turns one sequence's ids into deltas that add up to tokenizer.decode of them all, cut at a stop.

    The stop string that is complete first wins; of several complete at the same character, the longest. The
    work per token goes by its own text, whatever came before. An id beyond the tokenizer's vocabulary (a
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
        self._include_stop = include_stop_str_in_output
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matcher = _StopMatcher(stop) if stop else None
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._at_start = True
        self._flushed = False
        self.matched_stop: str | None = None

    @property
    def finished(self) -> bool:
        """True after a stop string matched or flush was called; nothing more will be given."""
        return self._flushed or self.matched_stop is not None

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids make safe to show, perhaps none; always none after a stop string."""
        if self.finished:
            return ""
        if self._marks is None:
            return self._release(self._utf8.decode(b"".join(map(self._bytes_of, token_ids))))
        return self._release("".join([self._marked(i, self._marks) for i in token_ids]))

    def flush(self) -> str:
        """What was held back, once no more ids come; an unfinished character becomes U+FFFD. Idempotent."""
        if self.finished:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        self._flushed = True
        if self.matched_stop is None:
            text += self._held
            self._held = ""
        return text

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

    def _release(self, text: str) -> str:
        if self._matcher is None:
            return text
        match = self._matcher.feed(text)
        text = self._held + text
        if match is None:
            keep = len(text) - self._matcher.partial
        else:
            end, length = match
            end += len(self._held)
            self.matched_stop = text[end - length : end]
            keep = end if self._include_stop else end - length
        self._held = "" if match else text[keep:]
        return text[:keep]


class _StopMatcher:
    """An Aho-Corasick automaton: constant amortised work per character for any number of stop strings."""

    def __init__(self, stop: Sequence[str]) -> None:
        # Node 0 is the root; a node is a prefix of some stop string.
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found = [0]  # length of the longest stop string that ends at the node
        for string in stop:
            node = 0
            for char in string:
                if char not in self._next[node]:
                    self._next[node][char] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[node] + 1)
                    self._found.append(0)
                node = self._next[node][char]
            self._found[node] = self._depth[node]
        # _fail: the longest proper suffix of the node that is a node too, filled breadth first.
        self._fail = [0] * len(self._next)
        order = list(self._next[0].values())
        for node in order:
            for char, child in self._next[node].items():
                self._fail[child] = self._step(self._fail[node], char)
                self._found[child] = self._found[child] or self._found[self._fail[child]]
                order.append(child)
        self._node = 0

    @property
    def partial(self) -> int:
        """Length of the longest end of the text so far that begins a stop string."""
        return self._depth[self._node]

    def feed(self, text: str) -> tuple[int, int] | None:
        """Advance over `text`; (end in text, length) of the first stop string to be complete, or None."""
        for end, char in enumerate(text, start=1):
            self._node = self._step(self._node, char)
            if self._found[self._node]:
                return end, self._found[self._node]
        return None

    def _step(self, node: int, char: str) -> int:
        while node and char not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(char, 0)
