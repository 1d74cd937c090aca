"""The assistant's last message, left open for the model to go on with."""

from __future__ import annotations

from typing import Any

from thalweg.errors import InvalidRequest


class FinalMessage:
    """The assistant's message that is to be continued: `end` marks where its content ends, also once rendered.

    A space follows the mark, by whose absence it shows that the template trims the content. The content then
    loses the space at its own end, as it would without a mark.
    """

    def __init__(self, turns: list[dict[str, Any]], end: str) -> None:
        last = turns[-1] if turns else {}
        if last.get("role") != "assistant":
            raise InvalidRequest(
                f"continue_final_message is true and the last message's role is {str(last.get('role'))!r};"
                " expected 'assistant'"
            )
        if last.get("tool_calls"):
            raise InvalidRequest(
                "continue_final_message is true and the last message has tool_calls; expected content alone"
            )
        content = last["content"]
        if isinstance(content, list):
            parts = content or [{"type": "text", "text": ""}]
            last["content"] = [*parts[:-1], parts[-1] | {"text": self._marked(parts[-1]["text"], end)}]
        else:
            last["content"] = self._marked(content, end)

    def _marked(self, text: str, end: str) -> str:
        # Of a text that is nothing but space, a template that trims leaves nothing in front of the mark.
        self._end, self._space = end, text[len(text.rstrip()) :] if text.strip() else ""
        return f"{text}{end} "

    def cut(self, text: str) -> str:
        """The rendered text up to the end of the content. Raises InvalidRequest when the content is not in it."""
        head, end, rest = text.rpartition(self._end)
        if not end:
            raise InvalidRequest(
                "continue_final_message is true, and the chat template leaves the last message's content out"
            )
        if not rest.startswith(" "):
            head = head.removesuffix(self._space)
        return head.replace(self._end, "")
