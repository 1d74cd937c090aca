"""From a body of the Responses API to one of a chat: its items as messages, its options by their names there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from thalweg.server import dialects
from thalweg.server.errors import ApiError, shown
from thalweg.server.responses_api.schemas import ResponsesBody
from thalweg.server.spelling import Spelling
from thalweg.tokenizer.messages import plain_data

_SPELLING = Spelling(
    {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "response_format": "text",
        "reasoning_effort": "reasoning",
    },
    (
        ("].function.", "]."),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("response_format.schema", "text.format.schema"),
        ("response_format", "text.format"),
        ("tool_choice.allowed_tools", "tool_choice"),
    ),
)
LOGPROBS = "message.output_text.logprobs"
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_SAME = (
    *("model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "cache_salt"),
    *("chat_template_kwargs", "parallel_tool_calls", "max_thinking_tokens"),
)


def spelling_of(body: ResponsesBody) -> Spelling:
    """How the request says what the chat made of it says."""
    return replace(_SPELLING, tools=[place for i, tool in enumerate(body.tools or ()) for place in _places(tool, i)])


def _places(tool: dict[str, Any], i: int) -> Iterator[str]:
    """Where each of the functions stands that _tools makes of a tool."""
    if tool.get("type") == "namespace" and isinstance(inner := tool.get("tools"), list):
        yield from (f"tools[{i}].tools[{j}]" for j in range(len(inner)))
    else:
        yield f"tools[{i}]"


def chat_fields(body: ResponsesBody, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a ChatBody, whose messages are the instructions, if any, `earlier` ones, and the input's.

    Raises ApiError.
    """
    _refuse_unsupported(body)
    with_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs and not with_logprobs:
        reason = f'top_logprobs is given and include has no "{LOGPROBS}"; expected both'
        raise ApiError(400, reason, param="top_logprobs")
    told = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    return {name: getattr(body, name) for name in _SAME} | {
        "messages": told + earlier + messages_of(body.input),
        "max_tokens": body.max_output_tokens,
        "tools": None if body.tools is None else [t for i, tool in enumerate(body.tools) for t in _tools(tool, i)],
        "tool_choice": _tool_choice(body.tool_choice),
        "response_format": _response_format(body),
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "logprobs": True if with_logprobs else None,
        "top_logprobs": body.top_logprobs if with_logprobs else None,
    }


def messages_of(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages that an input stands for. Calls and reasoning are the assistant's message with what follows them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    open_turn: dict[str, Any] | None = None  # the assistant's message that items may still be added to
    for i, item in enumerate(given):
        where, kind = f"input[{i}]", item.get("type", "message")
        if kind in ("message", "reasoning", "function_call") and (kind != "message" or item.get("role") == "assistant"):
            if open_turn is None or not _add(open_turn, item, kind, where):
                open_turn = {"role": "assistant", "content": ""}
                messages.append(open_turn)
                _add(open_turn, item, kind, where)
            continue
        open_turn = None
        messages.append(_other(item, kind, where))
    return messages


def _add(turn: dict[str, Any], item: dict[str, Any], kind: str, where: str) -> bool:
    """Add an item to an assistant's message; False if it belongs to the next one."""
    if kind == "function_call":
        name = full_name(_string(item, "name", where), item.get("namespace"))
        function = {"name": name, "arguments": _string(item, "arguments", where)}
        call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
        return True
    if turn["content"] or "tool_calls" in turn or (kind == "reasoning" and "reasoning_content" in turn):
        return False
    if kind == "message":
        turn["content"] = "".join(part["text"] for part in _parts(item.get("content"), f"{where}.content"))
        return True
    parts = [*_parts(item.get("content") or [], f"{where}.content")] or [
        *_parts(item.get("summary") or [], f"{where}.summary")
    ]
    turn["reasoning_content"] = "".join(part["text"] for part in parts)
    return True


def _other(item: dict[str, Any], kind: Any, where: str) -> dict[str, Any]:
    if kind == "message":
        if (role := item.get("role")) not in ("user", "system", "developer"):
            raise _wrong(f"{where}.role is {shown(role)}; expected user, assistant, system or developer")
        content = item.get("content")
        texts = content if isinstance(content, str) else [*_parts(content, f"{where}.content")]
        return {"role": role, "content": texts}
    if kind == "function_call_output":
        output = item.get("output")
        text = output if isinstance(output, str) else [*_parts(output, f"{where}.output")]
        return {"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": text}
    expected = "expected message, reasoning, function_call or function_call_output"
    raise _wrong(f"{where} is of type {shown(kind)}; {expected}", "unsupported")


def _parts(content: Any, where: str) -> Iterator[dict[str, Any]]:
    if isinstance(content, str):
        yield {"type": "text", "text": content}
        return
    if not isinstance(content, list):
        raise _wrong(f"{where} is a {type(content).__name__}; expected a string or a list of parts")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "refusal":
            yield {"type": "text", "text": _string(part, "refusal", f"{where}[{i}]")}
            continue
        if kind not in _TEXTS:
            reason = f"{where}[{i}] is of type {shown(kind)}; expected text, the only kind this model reads"
            raise _wrong(reason, "unsupported")
        yield {"type": "text", "text": _string(part, "text", f"{where}[{i}]")}


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(value := item.get(name), str):
        raise ApiError(400, f"{where}.{name} is {shown(value)}; expected a string", param=where.partition("[")[0])
    return value


def _tools(tool: dict[str, Any], i: int) -> Iterator[dict[str, Any]]:
    """A function, or those of a namespace, under names that tell them apart."""
    where, kind = f"tools[{i}]", tool.get("type")
    if kind == "namespace":
        inner = tool.get("tools")
        if not isinstance(inner, list):
            raise _wrong_tool(f"{where}.tools is a {type(inner).__name__}; expected a list of functions")
        for j, each in enumerate(inner):
            yield _function(each, f"{where}.tools[{j}]", _string(tool, "name", where))
    else:
        yield _function(tool, where, None)


def _function(tool: Any, where: str, namespace: str | None) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = shown(tool.get("type")) if isinstance(tool, dict) else type(tool).__name__
        raise _wrong_tool(
            f"{where} is of type {kind}, which is not run here; expected function, or it left out", "unsupported"
        )
    tool = plain_data(tool, where)  # bounds its depth: it goes back with the answer
    function = {
        name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None
    }
    if namespace is not None:
        function["name"] = full_name(_string(tool, "name", where), namespace)
    return {"type": "function", "function": function}


def full_name(name: str, namespace: Any) -> str:
    """What a function of a namespace is called in the prompt."""
    return f"{namespace}.{name}" if isinstance(namespace, str) else name


def namespaces(tools: list[dict[str, Any]] | None) -> dict[str, tuple[str, str]]:
    """{full name: (namespace, name)} of the functions in namespaces."""
    inner = [(t["name"], f["name"]) for t in tools or () if t.get("type") == "namespace" for f in t["tools"]]
    return {full_name(name, namespace): (namespace, name) for namespace, name in inner}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("tools")
        listed = [_tool_choice(each) for each in allowed] if isinstance(allowed, list) else allowed
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": listed}}
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": full_name(choice["name"], choice.get("namespace"))}}
    return choice


def _response_format(body: ResponsesBody) -> dict[str, Any] | None:
    wanted = None if body.text is None else body.text.format
    if wanted is None or wanted.get("type", "text") in ("text", "json_object"):
        return wanted
    if wanted["type"] != "json_schema" or not isinstance(wanted.get("schema"), dict):
        expected = '{"type": "json_schema", "name": ..., "schema": {...}}, json_object or text'
        raise ApiError(400, f"text.format is {shown(wanted)}; expected {expected}", param="text")
    schema = plain_data(wanted, "text.format")["schema"]
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _refuse_unsupported(body: ResponsesBody) -> None:
    for name, taken in (("background", ()), ("truncation", ("disabled",)), ("conversation", ()), ("prompt", ())):
        if not dialects.neutral(value := getattr(body, name), taken):
            raise dialects.unsupported(name, value, taken)
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        said = dialects.unsupported("text.verbosity", body.text.verbosity, ("medium",))
        raise ApiError(400, str(said), param="text", code="unsupported")


def _wrong(message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param="input", code=code)


def _wrong_tool(message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param="tools", code=code)
