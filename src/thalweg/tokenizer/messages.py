"""Chat messages as a request brings them, checked and copied into plain data that a template may see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from thalweg.errors import InvalidRequest
from thalweg.tokenizer.template_forms import Form


class NoContent(str):
    """The content of a message that has none: the empty string, which compares equal to None as well.

    Most templates treat content as text without asking (`'</think>' in content`, `content + eos`), and fail on
    None or print the word. Some have a branch of their own for a tool call without content
    (`content is none`, `content == none`): the sandbox's test `none` and comparisons hold for this value too.
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other is None or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other


NO_CONTENT = NoContent()
MAX_DEPTH = 64
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def plain_messages(messages: Any, form: Form = "text") -> list[dict[str, Any]]:
    """Copies of the messages, each with a role of ROLES and a content in the form that the template takes.

    Content comes as a string, as null, as [{"type": "text", "text": ...}, ...], or not at all. As `text` it
    becomes one string, its parts a line each. As `parts` it becomes a list of parts. With `either` a list stays
    one. Null and missing content become NO_CONTENT, or no parts. Any other key that is null is left out, and so
    is an empty list of tool_calls: clients send back what a server or library put there for "none", and
    templates ask no more than whether a key is there. `reasoning`, by which some servers name it, is
    reasoning_content too. Other keys are copied as they are. Raises InvalidRequest on anything else.
    """
    plain = plain_list(messages, "messages")
    for i, message in enumerate(plain):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{where} is a {type(message).__name__}; expected an object with role and content")
        if message.get("role") not in ROLES:
            raise InvalidRequest(f"{where}.role is {message.get('role')!r:.40}; expected one of {', '.join(ROLES)}")
        content = _content(message.get("content"), f"{where}.content", form)
        kept = {
            key: value for key, value in message.items() if value is not None and (key, value) != ("tool_calls", [])
        }
        if isinstance(kept.get("reasoning"), str):
            kept.setdefault("reasoning_content", kept["reasoning"])
        plain[i] = kept | {"content": content}
    return plain


def _content(given: Any, where: str, form: Form) -> str | list[dict[str, Any]]:
    if isinstance(given, list):
        texts = [_part_text(part, f"{where}[{i}]") for i, part in enumerate(given)]
        return "\n".join(texts) if form == "text" else given
    if given is not None and not isinstance(given, str):
        raise InvalidRequest(
            f"{where} is of type {type(given).__name__}; expected a string, null or a list of text parts"
        )
    if form == "parts":
        return [{"type": "text", "text": given}] if given else []
    return NO_CONTENT if given is None else given


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise InvalidRequest(f"{where} is of type {str(kind)[:40]!r}; expected text, the only kind this model reads")
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{where} has no text; expected {{'type': 'text', 'text': '...'}}")
    text: str = part["text"]
    return text


def plain_list(value: Any, where: str) -> list[Any]:
    """plain_data of a list. Raises InvalidRequest when it is not one."""
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(f"{where} is a {type(value).__name__}; expected a list")
    plain: list[Any] = plain_data(value, where)
    return plain


def plain_data(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of JSON-like data in nothing but dicts, lists, strings, numbers, booleans and None."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{where} nests more than {MAX_DEPTH} deep; expected less")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_data(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, where, depth + 1) for item in value]
    raise InvalidRequest(f"{where} holds a {type(value).__name__}; expected JSON values")


def strings_in(value: Any) -> Iterator[str]:
    """Every string of plain data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)
