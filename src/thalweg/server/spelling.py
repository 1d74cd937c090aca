"""Errors about the fields of a chat, in the words of the request that the chat was made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from thalweg.errors import InvalidRequest
from thalweg.server.errors import ApiError, as_api_error, respelled

# Values of the request in a message: JSON's or Python's strings, which may be cut off at their end.
_VALUE = re.compile(r'"(?:[^"\\]|\\.)*"?|(?<!\w)\'(?:[^\'\\]|\\.)*\'?')
_TOOL = re.compile(r"\btools\[(\d+)\]")
_EXPECTED = "; expected "


@dataclass(frozen=True, slots=True)
class Spelling:
    """How an API's requests say what a ChatBody says: `fields` {chat's: theirs}, `words` (chat's, theirs) in messages,
    and where each of the chat's `tools` stands, if not at its own index."""

    fields: Mapping[str, str]
    words: tuple[tuple[str, str], ...] = ()
    tools: Sequence[str] = ()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Errors that name a field of a chat, raised again with the request's own name for it."""
        try:
            yield
        except (ApiError, InvalidRequest) as error:
            said = as_api_error(error)
            message = reworded(str(said), self.words, self.tools)
            said = ApiError(said.status, message, param=said.param, code=said.code, headers=said.headers)
            raise respelled(said, self.fields) from None


CHATS = Spelling({})


def reworded(message: str, words: Sequence[tuple[str, str]], tools: Sequence[str] = ()) -> str:
    """`message` in other words; the request's own values in it, which are quoted, stay as they are."""

    def replaced(text: str) -> str:
        for ours, theirs in words:
            text = text.replace(ours, theirs)
        return _TOOL.sub(lambda m: tools[int(m[1])] if int(m[1]) < len(tools) else m[0], text)

    before, expected, after = message.rpartition(_EXPECTED)
    if not expected:
        before, after = message, ""
    pieces, end = [], 0
    for value in _VALUE.finditer(before):
        pieces += [replaced(before[end : value.start()]), value[0]]
        end = value.end()
    return "".join([*pieces, replaced(before[end:]), expected, replaced(after)])
