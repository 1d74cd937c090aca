"""The tools of a chat request: checked, and what the model may do with them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from thalweg.server.errors import ApiError, shown
from thalweg.server.parsers.formats import OutputFormat
from thalweg.server.schemas import ChatBody
from thalweg.server.settings import MAX_TOOLS

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """`tools` go to the template; of them the model may call those in `callable_`, or has to."""

    tools: list[dict[str, Any]]
    choice: Literal["none", "auto", "required"] = "none"
    callable_: tuple[dict[str, Any], ...] = ()
    parallel: bool = True
    functions: bool = False  # calls are told as function_call, the older form


def tool_use(body: ChatBody, output: OutputFormat) -> ToolUse:
    """What the request says of tools. Raises ApiError that names the field."""
    tools = body.tools or []
    choice: Any = body.tool_choice if body.tool_choice is not None else "auto"
    if choice == "none":
        return ToolUse([])
    if len(tools) > MAX_TOOLS:  # before anything is compared: what follows takes quadratic time
        raise ApiError(400, f"{len(tools)} tools came; expected at most {MAX_TOOLS}", param="tools")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools, choice.get("allowed_tools"))
    if choice == "auto" and not tools:
        return ToolUse([])
    wanted = choice["function"].get("name") if _is_function(choice) else None
    said = shown(choice) if wanted is None else f"the function {shown(wanted)}"
    if not tools:
        raise ApiError(
            400,
            f"tool_choice is {said} and there are no tools; expected tools, or tool_choice auto or none",
            param="tool_choice",
        )
    if output.calls is None:
        raise ApiError(
            400,
            "tools are given, but it is not known how this model writes tool calls; expected --tool-call-parser when"
            " the server starts, or tool_choice none",
            param="tools",
            code="unsupported",
        )
    names = [_checked_name(tool, i) for i, tool in enumerate(tools)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ApiError(400, f"tools has {twice!r} twice; expected different names", param="tools")
    parallel = body.parallel_tool_calls is not False
    if choice in ("auto", "required"):
        return ToolUse(tools, choice, tuple(tools), parallel)
    if wanted not in names:
        expected = "none, auto, required or " if wanted is None else ""
        reason = f"tool_choice is {said}; expected {expected}a function that tools has"
        raise ApiError(400, reason, param="tool_choice")
    return ToolUse(tools, "required", (tools[names.index(wanted)],), parallel=False)


def _allowed(tools: list[dict[str, Any]], allowed: Any) -> tuple[list[dict[str, Any]], str]:
    """Those of the tools that tool_choice allows, which are all that the model is told of, and what it may do."""
    mode, listed = (allowed.get("mode"), allowed.get("tools")) if isinstance(allowed, dict) else (None, None)
    if mode not in ("auto", "required") or not isinstance(listed, list) or not all(map(_is_function, listed)):
        reason = f"tool_choice.allowed_tools is {shown(allowed)}; expected mode auto or required, and tools that are"
        raise ApiError(400, f"{reason} functions", param="tool_choice")
    if len(listed) > MAX_TOOLS:
        reason = f"tool_choice.allowed_tools has {len(listed)} tools; expected at most {MAX_TOOLS}"
        raise ApiError(400, reason, param="tool_choice")
    names = [tool["function"].get("name") for tool in listed]
    known = [_checked_name(tool, i) for i, tool in enumerate(tools)]
    if unknown := [name for name in names if name not in known]:
        reason = f"tool_choice.allowed_tools has {shown(unknown[0])}; expected functions that tools has"
        raise ApiError(400, reason, param="tool_choice")
    return [tool for tool, name in zip(tools, known, strict=True) if name in names], mode


def _is_function(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict)


def _checked_name(tool: dict[str, Any], i: int) -> str:
    where = f"tools[{i}]"
    if not _is_function(tool):
        expected = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        raise ApiError(400, f"{where} is not a function; expected {expected}", param="tools")
    name, parameters = tool["function"].get("name"), tool["function"].get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        reason = f"{where}.function.name is {shown(name)}; expected 1 to 64 letters, digits, '_', '-' or '.'"
        raise ApiError(400, reason, param="tools")
    if not isinstance(parameters, dict | None):
        kind = type(parameters).__name__
        raise ApiError(400, f"{where}.function.parameters is a {kind}; expected a JSON schema", param="tools")
    return name
