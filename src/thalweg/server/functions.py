"""`functions` and `function_call`, which OpenAI had before `tools`: the same thing in another form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thalweg.server.errors import ApiError, shown
from thalweg.server.schemas import ChatBody
from thalweg.server.spelling import reworded

# What is said of the newer fields, in terms of the older ones.
_WORDS = (("tool_choice", "function_call"), (".function.", "."), ("tools", "functions"))


def as_tools(body: ChatBody) -> ChatBody:
    """`body` with its functions as tools, of which the model may call one. Raises ApiError."""
    choice = body.function_call
    for name, newer in (("functions", "tools"), ("function_call", "tool_choice")):
        if getattr(body, name) is not None and getattr(body, newer) is not None:
            raise ApiError(400, f"{name} and {newer} are both given; expected one of them", param=name)
    if choice is not None and choice not in ("none", "auto"):
        if not isinstance(choice, dict) or not isinstance(choice.get("name"), str):
            reason = f'function_call is {shown(choice)}; expected none, auto or {{"name": ...}}'
            raise ApiError(400, reason, param="function_call")
        choice = {"type": "function", "function": {"name": choice["name"]}}
    tools = body.tools if body.functions is None else [{"type": "function", "function": f} for f in body.functions]
    return body.model_copy(update={"tools": tools, "tool_choice": choice, "parallel_tool_calls": False})


def in_older_words(error: ApiError) -> ApiError:
    """What is wrong with tools, said of functions."""
    param = dict(_WORDS).get(error.param or "", error.param)
    return ApiError(error.status, reworded(str(error), _WORDS), param=param, code=error.code, headers=error.headers)


def newer_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation in the words that templates know: function calls and their results as those of tools, and the
    role developer, which is OpenAI's newer word for it, as system."""
    made: list[dict[str, Any]] = []
    last, count = "", 0
    for message in messages:
        call = message.get("function_call")
        if message.get("role") == "assistant" and isinstance(call, dict) and not message.get("tool_calls"):
            last, count = f"functions.{call.get('name')}:{count}", count + 1
            rest = {key: value for key, value in message.items() if key != "function_call"}
            made.append(rest | {"tool_calls": [{"id": last, "type": "function", "function": call}]})
        elif message.get("role") == "function":
            made.append(message | {"role": "tool", "tool_call_id": last})
        elif message.get("role") == "developer":
            made.append(message | {"role": "system"})
        else:
            made.append(message)
    return made
