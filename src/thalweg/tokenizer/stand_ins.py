"""Stand-ins: private-use characters that keep the text of a request from spelling a special token.

In every string that comes with a request, the first character of whatever could begin a special token's text
is exchanged for a stand-in, a private-use character that occurs nowhere else. Lengths, trims, slices and joins
in a template work as ever, and what is rendered tells the template's own marks from a request's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from thalweg.tokenizer.messages import NoContent, strings_in
from thalweg.tokenizer.tool_arguments import Arguments

_PRIVATE_CHARS = range(0x100000, 0x10FFFE)
_PRIVATE = re.compile("[\U00100000-\U0010fffd]")


def private_chars(text: str) -> set[str]:
    """The private-use characters in `text`, of those that can be stand-ins."""
    return set(_PRIVATE.findall(text))


def free_chars(used: set[str], data: Any) -> Iterator[str]:
    """Private-use characters that are neither in `used` nor anywhere in plain data."""
    used = used.union(char for text in strings_in(data) for char in _PRIVATE.findall(text))
    return (chr(code) for code in _PRIVATE_CHARS if chr(code) not in used)


def risky_pattern(specials: Iterable[str]) -> re.Pattern[str]:
    """Matches the first character of a special token where its second follows, or but space to the end.

    Two characters, because a template may cut the rest out of a longer string; one at the end, because
    another string may be put there.
    """
    seconds: dict[str, set[str]] = {}
    for text in specials:
        seconds.setdefault(text[0], set()).add(text[1:2])
    branches = []
    for first, after in seconds.items():
        following = "|".join([*map(re.escape, sorted(after)), r"\s*\Z"])
        branches.append(f"{re.escape(first)}(?={following})")
    return re.compile("|".join(branches) or r"(?!)")


def mark(value: Any, risky: re.Pattern[str], stand_ins: dict[str, str]) -> Any:
    """A copy of plain data with what `risky` matches in its strings exchanged for stand-ins, in keys too."""
    if isinstance(value, NoContent):
        return value
    if isinstance(value, str):
        return risky.sub(lambda match: stand_ins[match.group()], value)
    if isinstance(value, Arguments):
        return Arguments(mark({**value}, risky, stand_ins), mark(str(value), risky, stand_ins))
    if isinstance(value, dict):
        return {mark(k, risky, stand_ins): mark(v, risky, stand_ins) for k, v in value.items()}
    if isinstance(value, list):
        return [mark(item, risky, stand_ins) for item in value]
    return value


def restore(text: str, stand_ins: dict[str, str]) -> str:
    for char, stand_in in stand_ins.items():  # a few scans; str.translate looks every character up
        text = text.replace(stand_in, char)
    return text
