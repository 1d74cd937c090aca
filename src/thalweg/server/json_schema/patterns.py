"""Regular expressions of schemas, which are JavaScript's, as Rust's."""

from __future__ import annotations

FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))

# JavaScript's classes are of ASCII, Rust's of Unicode.
_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t\n\r\f\v"}
_ANCHORS = {"A": "^", "z": "$", "Z": "$"}
# What generators write with look-around, by what matches the same without.
_WITHOUT_LOOKAROUND = {
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$",  # Pydantic's Decimal
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        # Zod's email
        r"^([A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+\-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    ),
}
_NO_LINE_END = r"[^\n\r\u2028\u2029]"


def portable(pattern: str) -> str:
    """`pattern` for Rust's regex crate; it matches no more than it does in JavaScript."""
    pattern = _WITHOUT_LOOKAROUND.get(pattern, pattern)
    made, i = [], 0
    while i < len(pattern):
        char = pattern[i]
        if char == "\\" and i + 1 < len(pattern):
            letter = pattern[i + 1]
            one = f"[{_CLASSES[letter]}]" if letter in _CLASSES else _ANCHORS.get(letter, char + letter)
            made.append(one)
            i += 2
        elif char == "[":
            one, i = _class(pattern, i)
            made.append(one)
        else:
            made.append(_NO_LINE_END if char == "." else char)
            i += 1
    return "".join(made)


def _class(pattern: str, start: int) -> tuple[str, int]:
    """A class in brackets that begins at `start`, and where it ends. Rust knows nested classes and operators."""
    i = start + 1
    negated = pattern.startswith("^", i)
    made = ["[^"] if negated else ["["]
    i += negated
    while i < len(pattern) and pattern[i] != "]":
        char = pattern[i]
        if char == "\\" and i + 1 < len(pattern):
            letter = pattern[i + 1]
            if letter in _CLASSES and not negated:
                made.append(_CLASSES[letter])
            else:
                made.append(r"\x08" if letter == "b" else char + letter)
            i += 2
            continue
        twice = char in "&~-" and pattern.startswith(char * 2, i)
        made.append(f"{char}\\{char}" if twice else f"\\{char}" if char == "[" else char)
        i += 1 + twice
    return "".join([*made, pattern[i : i + 1]]), i + 1
