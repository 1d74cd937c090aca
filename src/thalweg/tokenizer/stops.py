"""Stop strings in a text that comes in pieces: nothing is shown that one may yet take back."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string.

    The stop string that is complete first wins; of several complete at the same character, the longest. `include`:
    the stop string itself is passed on too.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._include = include
        self._matcher = _StopMatcher(stop) if stop else None
        self._held = ""  # perhaps the beginning of a stop string
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """What is safe to show of the text so far; nothing after a stop string."""
        if self.matched is not None:
            return ""
        if self._matcher is None:
            return text
        match = self._matcher.feed(text)
        text = self._held + text
        if match is None:
            keep = len(text) - self._matcher.partial
        else:
            end, length = match
            end += len(self._held)
            self.matched = text[end - length : end]
            keep = end if self._include else end - length
        self._held = "" if match else text[keep:]
        return text[:keep]

    def end(self) -> str:
        """What was held back, when the text ends or something else comes between; a stop string does not span it."""
        held, self._held = self._held, ""
        if self._matcher is not None:
            self._matcher.restart()
        return held


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

    def restart(self) -> None:
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
