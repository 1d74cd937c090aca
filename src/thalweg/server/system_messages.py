"""System messages for chat templates that take one, at the beginning, as Qwen3.5's do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from thalweg.tokenizer.template import ChatTemplate


def one_system_message(messages: Sequence[dict[str, Any]], template: ChatTemplate) -> Sequence[dict[str, Any]]:
    """The conversation as it is, unless the template would refuse it for its system messages: those at the beginning
    are then one, a blank line between their texts, and later ones are the user's."""
    first = list(takewhile(_is_system, messages))
    later = messages[len(first) :]
    if (len(first) < 2 and not any(map(_is_system, later))) or not template.system_comes_first:
        return messages
    texts = [_text(message.get("content")) for message in first]
    if len(first) > 1 and None not in texts:
        first = [first[0] | {"content": "\n\n".join(text for text in texts if text)}]
    return [*first, *(m | {"role": "user"} if _is_system(m) else m for m in later)]


def _is_system(message: dict[str, Any]) -> bool:
    return message.get("role") == "system"


def _text(content: Any) -> str | None:
    """A content as one text, its parts a line each; None if it is not made of texts, for the template to refuse."""
    if isinstance(content, str | None):
        return content or ""
    if not isinstance(content, list):
        return None
    texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "\n".join(texts) if len(texts) == len(content) else None
