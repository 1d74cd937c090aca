"""JSON objects as models write them, to JSON, piece by piece.

What is JSON comes out as it is. What is nearly JSON is mended where the intent is plain: raw control characters, wrong
escapes and bare quotes in strings, single quotes, trailing and missing commas, Python's constants, bare words, missing
brackets.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 64  # deeper brackets are text
MAX_NUMBER_CHARS = 300  # longer numbers are text, as are those beyond float64: readers of JSON refuse them

_SPACE = " \t\n\r"
_PLAIN = re.compile(r"""[^"'\\\x00-\x1f]+""")
_BARE_VALUE, _BARE_KEY = re.compile(r"[^,}\]\n]*"), re.compile(r"[^,}:\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_CONSTANTS = {word: word for word in ("true", "false", "null")}
_CONSTANTS |= {"True": "true", "False": "false", "None": "null"}
_CONSTANTS |= dict.fromkeys(("NaN", "Infinity", "-Infinity", "undefined"), "null")
_HIGH = re.compile(r"\\u[dD][89abAB]..")
_LOW = re.compile(r"\\u[dD][c-fC-F]..")
_UNKNOWN = "\\ufffd"


class ObjectWriter:
    """Takes the text of one object, which begins with "{", and gives JSON.

    What `feed` gave so far, together with `end`, is always an object of JSON. So that nothing has to be taken back, a
    key comes with the first character of its value, and a number or constant once it is whole.
    """

    def __init__(self) -> None:
        self._out: list[str] = []
        self._stack: list[str] = []  # open brackets
        self._state = self._value
        self._held: list[str] = []  # commas, space and a key, to come with the value that follows
        self._in_key = False  # whether the string or bare word is a key
        self._quote = ""  # that began the string
        self._part = ""  # of an escape
        self._parts: list[str] = []  # of a bare word, or the space after what may be a string's end
        self._high = ""  # the escape of a surrogate that waits for the one which completes it
        self.done = False  # the object's end came

    def feed(self, text: str, at: int = 0) -> tuple[str, int]:
        """JSON, and where in `text`, which is read from `at`, the object or the text ends."""
        while at < len(text) and not self.done:
            at = self._state(text, at)
        return self._taken(), at

    def end(self) -> str:
        """What is missing of the object, if it ends here. What a constant or key cannot be told from is left out."""
        if self.done:
            return ""
        if self._state in (self._string, self._string_end) and not self._in_key:
            self._surrogate("")
            self._out.append('"')
        elif self._state == self._bare and not self._in_key and not _may_go_on("".join(self._parts).strip(_SPACE)):
            self._bare_ends()
        self._out += ["}" if bracket == "{" else "]" for bracket in reversed(self._stack)]
        self.done = True
        return self._taken()

    def _taken(self) -> str:
        taken, self._out = "".join(self._out), []
        return taken

    def _emit(self, text: str) -> None:
        self._out += (*self._held, text)
        self._held = []

    # The states: each takes text at a position, and gives the position behind what it used.

    def _value(self, text: str, at: int) -> int:
        char = text[at]
        in_array = bool(self._stack) and self._stack[-1] == "["
        if char in _SPACE:
            self._held.append(char)
        elif char in "{[" and len(self._stack) < MAX_DEPTH:
            self._emit(char)
            self._stack.append(char)
            self._state = self._key if char == "{" else self._value
        elif char in "\"'":
            self._emit('"')
            self._begin_string(char, in_key=False)
        elif char in ",]}" and in_array:
            return at + 1 if char == "," else self._bracket(char, at)
        elif char in ",]}":
            self._emit("null")
            self._state = self._after
            return at
        elif char != ":":
            self._in_key, self._state = False, self._bare
            return at
        return at + 1

    def _key(self, text: str, at: int) -> int:
        char = text[at]
        if char in _SPACE:
            self._held.append(char)
        elif char in "\"'":
            self._held.append('"')
            self._begin_string(char, in_key=True)
        elif char in "}]":
            return self._bracket(char, at)
        elif char not in ",:{[":
            self._in_key, self._state = True, self._bare
            return at
        return at + 1

    def _colon(self, text: str, at: int) -> int:
        if text[at] in _SPACE:
            self._held.append(text[at])
            return at + 1
        self._held.append(":")
        self._state = self._value
        return at + (text[at] == ":")

    def _after(self, text: str, at: int) -> int:
        """Behind a value."""
        char = text[at]
        if char in "}]":
            return self._bracket(char, at)
        if char in _SPACE:
            self._held.append(char)
            return at + 1
        self._held.append("," if char == "," else ", ")
        self._state = self._key if self._stack[-1] == "{" else self._value
        return at + (char == ",")

    def _begin_string(self, quote: str, in_key: bool) -> None:
        self._quote, self._in_key, self._state = quote, in_key, self._string

    def _string(self, text: str, at: int) -> int:
        if self._part:
            return self._escape(text[at], at)
        plain = _PLAIN.match(text, at)
        if plain is not None:
            self._put(plain.group())
            return plain.end()
        char = text[at]
        if char == self._quote:
            self._state = self._string_end
        elif char == "\\":
            self._part = char
        else:
            self._put(_escaped(char))
        return at + 1

    def _escape(self, char: str, at: int) -> int:
        part = self._part + char
        if part == "\\u" or (part.startswith("\\u") and len(part) <= 6 and char in "0123456789abcdefABCDEF"):
            self._part = part
            if len(part) == 6:
                self._part = ""
                self._surrogate(part)
            return at + 1
        if len(part) == 2 and char in "\"'\\/bfnrt":
            self._put("'" if char == "'" else part)
            self._part = ""
            return at + 1
        self._put("\\" + self._part)  # no escape: a backslash, and text
        self._part = ""
        return at

    def _string_end(self, text: str, at: int) -> int:
        """Behind a quote, which ends the string if what follows can follow a string."""
        char = text[at]
        if char in _SPACE:
            self._parts.append(char)
            return at + 1
        space, self._parts = "".join(self._parts), []
        if char in (":,}" if self._in_key else ",}]") or (not self._in_key and "\n" in space and char in "\"'"):
            self._surrogate("")
            if self._in_key:
                self._held.append('"')
            else:
                self._out.append('"')
            self._held.append(space)
            self._state = self._colon if self._in_key else self._after
        else:
            self._put("".join(map(_escaped, self._quote + space)))
            self._state = self._string
        return at

    def _put(self, text: str) -> None:
        """More of a string."""
        if self._high:
            text, self._high = _UNKNOWN + text, ""
        if self._in_key:
            self._held.append(text)
        else:
            self._out.append(text)

    def _surrogate(self, escape: str) -> None:
        """An escape of four digits, or "" for the end of the string: halves of a character stand alone nowhere."""
        high, self._high = self._high, ""
        if high and not _LOW.fullmatch(escape):
            self._put(_UNKNOWN)
            high = ""
        if _HIGH.fullmatch(escape):
            self._high = escape
        elif _LOW.fullmatch(escape) and not high:
            self._put(_UNKNOWN)
        else:
            self._put(high + escape)

    def _bare(self, text: str, at: int) -> int:
        more = (_BARE_KEY if self._in_key else _BARE_VALUE).match(text, at)
        assert more is not None
        self._parts.append(more.group())
        if more.end() < len(text):
            self._bare_ends()
        return more.end()

    def _bare_ends(self) -> None:
        text, self._parts = "".join(self._parts), []
        word = text.rstrip(_SPACE)
        space = text[len(word) :]
        if self._in_key:
            self._held.append(json.dumps(word) + space)
            self._state = self._colon
            return
        number = _NUMBER.fullmatch(word) and len(word) <= MAX_NUMBER_CHARS and math.isfinite(float(word))
        self._emit(word if number else _CONSTANTS.get(word) or json.dumps(word, ensure_ascii=False))
        self._held.append(space)
        self._state = self._after

    def _bracket(self, char: str, at: int) -> int:
        """Close up to the bracket that `char` closes; without one, pass over it."""
        opening = "{" if char == "}" else "["
        if opening not in self._stack:
            return at + 1
        self._held = ["".join(self._held).replace(",", "")]
        while True:
            top = self._stack.pop()
            self._emit("}" if top == "{" else "]")
            if top == opening:
                break
        self._state, self.done = self._after, not self._stack
        return at + 1


def read_object(text: str, start: int = 0) -> tuple[dict[str, Any], int, bool]:
    """The object that begins in `text` at `start`, mended, its end, and whether its last bracket came."""
    writer = ObjectWriter()
    out, end = writer.feed(text, start)
    complete = writer.done
    value: dict[str, Any] = json.loads(out + writer.end())
    return value, end, complete


def object_in(text: str) -> str | None:
    """An object as JSON: of its text, or of JSON's text for its text; nothing and null are {}. Else None."""
    text = text.strip()
    if text in ("", "null", "None"):
        return "{}"
    if text.startswith('"'):
        try:
            inner = json.loads(text)
        except ValueError:
            return None
        text = inner.strip() if isinstance(inner, str) else ""
        if not text:
            return "{}"
    return to_json(read_object(text)[0]) if text.startswith("{") else None


def to_json(value: Any) -> str:
    """JSON that can be sent: halves of surrogate pairs stay escaped. Raises ValueError for numbers beyond JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if is_text(text) else json.dumps(value, allow_nan=False)


def is_text(text: str) -> bool:
    """Whether it can be sent at all: half a surrogate pair cannot."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _escaped(char: str) -> str:
    return char if char == "'" else json.dumps(char)[1:-1]


def _may_go_on(word: str) -> bool:
    """Whether the end of a number or constant may be missing."""
    return any(c.startswith(word) and c != word for c in _CONSTANTS) or (
        not _NUMBER.fullmatch(word) and bool(re.fullmatch(r"-?[0-9]*\.?[0-9]*(?:[eE][+-]?)?", word))
    )
