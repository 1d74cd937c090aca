"""From a body of Anthropic's to one of a chat: its blocks as messages, parts, calls and results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from thalweg.server.anthropic.schemas import CountBody, MessagesBody
from thalweg.server.dialects import unsupported
from thalweg.server.errors import ApiError, shown
from thalweg.server.parsers.objects import to_json
from thalweg.server.spelling import Spelling
from thalweg.tokenizer.messages import plain_data

_BUDGET = ("it left out or -1", "it left out")  # of thinking; max_thinking_tokens may be -1
_SPELLING = Spelling(
    {
        "stop": "stop_sequences",
        "response_format": "output_config",
        "max_thinking_tokens": "thinking",
        "reasoning_effort": "output_config",
        "parallel_tool_calls": "tool_choice",
    },
    (
        ("].function.parameters", "].input_schema"),
        ("].function.", "]."),
        ("none, auto, required or a function", "none, auto, any or a tool"),
        ("a function that tools has", "a tool that tools has"),
        ("is the function", "is the tool"),
        _BUDGET,
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("response_format.schema", "output_config.format.schema"),
    ),
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_MAX_NAME = 40


def spelling_of(body: CountBody) -> Spelling:
    """How the request says what the chat made of it says."""
    if getattr(body, "max_thinking_tokens", None) is None:
        return _SPELLING
    fields = {name: theirs for name, theirs in _SPELLING.fields.items() if name != "max_thinking_tokens"}
    return replace(_SPELLING, fields=fields, words=tuple(pair for pair in _SPELLING.words if pair != _BUDGET))


def chat_fields(body: CountBody, thinks: bool) -> dict[str, Any]:
    """The fields of a ChatBody, for a model whose reasoning is looked for, or is not. Raises ApiError in the request's
    own words."""
    if body.mcp_servers:
        raise unsupported("mcp_servers", body.mcp_servers)
    messages = [*_system(body.system), *(m for i, each in enumerate(body.messages) for m in _message(each, i))]
    last = messages[-1]
    goes_on = last.get("role") == "assistant" and not last.get("tool_calls")
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": None if body.tools is None else [_tool(tool, i) for i, tool in enumerate(body.tools)],
        "chat_template_kwargs": body.chat_template_kwargs,
        "continue_final_message": True if goes_on else None,
        **_tool_choice(body),
        **_thinking(body, thinks),
        **_output(body),
    }
    if isinstance(body, MessagesBody):
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "cache_salt")
        fields |= {name: getattr(body, name) for name in same} | {"stop": body.stop_sequences}
        if body.max_thinking_tokens is not None:
            fields["max_thinking_tokens"] = body.max_thinking_tokens
    return fields


def _system(system: str | list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    if system:
        content = system if isinstance(system, str) else [_text(b, f"system[{i}]") for i, b in enumerate(system)]
        yield {"role": "system", "content": content}


def _message(message: Mapping[str, Any], i: int) -> Iterator[dict[str, Any]]:
    """The messages that one of Anthropic's stands for: results of tools are messages of their own in a chat."""
    where, role, content = f"messages[{i}]", message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise _wrong(f"{where}.role is {shown(role)}; expected user, assistant or system")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        raise _wrong(f"{where}.content is a {type(content).__name__}; expected a string or a list of blocks")
    blocks = [(_block(block, f"{where}.content[{j}]"), f"{where}.content[{j}]") for j, block in enumerate(content)]
    if role == "assistant":
        yield _assistant(blocks)
        return
    texts = []
    for block, place in blocks:
        if block.get("type") == "tool_result" and role == "user":
            yield _result(block, place)
        else:
            texts.append(_text(block, place))
    if texts or not blocks:
        yield {"role": role, "content": texts}


def _assistant(blocks: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for block, where in blocks:
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(_call(block, where))
        elif kind == "thinking":
            reasoning.append(_string(block, "thinking", where))
        elif kind != "redacted_thinking":  # which nobody but its maker can read
            texts.append(_text(block, where)["text"])
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if reasoning:
        message["reasoning_content"] = "\n".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict):
        raise _wrong(f"{where}.input is a {type(given).__name__}; expected an object")
    plain = plain_data(given, f"{where}.input")  # bounds its depth
    try:
        arguments = to_json(plain)
    except ValueError:
        raise _wrong(f"{where}.input holds a number that is none of JSON's") from None
    function = {"name": _string(block, "name", where), "arguments": arguments}
    return {"id": _string(block, "id", where), "type": "function", "function": function}


def _result(block: dict[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    if isinstance(content, list):
        content = [_text(_block(b, f"{where}.content[{j}]"), f"{where}.content[{j}]") for j, b in enumerate(content)]
    elif not isinstance(content, str | None):
        raise _wrong(f"{where}.content is a {type(content).__name__}; expected a string or a list of text blocks")
    return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", where), "content": content or ""}


def _block(block: Any, where: str) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise _wrong(f"{where} is a {type(block).__name__}; expected a block, an object with type")
    return block


def _text(block: dict[str, Any], where: str) -> dict[str, Any]:
    if block.get("type") == "document":
        return {"type": "text", "text": _document(block, where)}
    if block.get("type") != "text":
        kind = shown(block.get("type"))
        raise _wrong(f"{where} is of type {kind}; expected text, the only kind this model reads there", "unsupported")
    return {"type": "text", "text": _string(block, "text", where)}


def _document(block: dict[str, Any], where: str) -> str:
    """A document's title, context and text, a line or more each."""
    source, citations = block.get("source"), block.get("citations")
    if isinstance(citations, dict) and citations.get("enabled"):
        raise _wrong(f"{where}.citations is {shown(citations)}; expected it left out: nothing is cited", "unsupported")
    if not isinstance(source, dict) or source.get("type") != "text":
        kind = shown(source.get("type") if isinstance(source, dict) else source)
        raise _wrong(f"{where}.source is of type {kind}; expected text, the only kind this model reads", "unsupported")
    heads = [_string(block, name, where) for name in ("title", "context") if block.get(name) is not None]
    return "\n".join([*heads, _string(source, "data", f"{where}.source")])


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(value := block.get(name), str):
        raise _wrong(f"{where}.{name} is {shown(value)}; expected a string")
    return value


def _tool(tool: dict[str, Any], i: int) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        reason = f"tools[{i}] is of type {shown(kind)[:_MAX_NAME]}, which is not done here; expected tools of your own:"
        raise ApiError(400, f'{reason} {{"name": ..., "input_schema": ...}}', param="tools", code="unsupported")
    names = (("name", "name"), ("description", "description"), ("parameters", "input_schema"), ("strict", "strict"))
    function = {chats: tool[theirs] for chats, theirs in names if tool.get(theirs) is not None}
    return {"type": "function", "function": function}


def _tool_choice(body: CountBody) -> dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return {}
    if choice.type == "tool":
        wanted: Any = {"type": "function", "function": {"name": choice.name}}
    else:
        wanted = _CHOICES[choice.type]
    return {"tool_choice": wanted, "parallel_tool_calls": False if choice.disable_parallel_tool_use else None}


def _thinking(body: CountBody, thinks: bool) -> dict[str, Any]:
    thinking = body.thinking
    if thinking is None:
        return {}
    if thinking.type == "disabled":
        return {"enable_thinking": False}
    begun = {} if thinking.type == "between_tools" else {"enable_thinking": True}
    # Clients send a budget to every model; one that does not reason stays within it.
    return {**begun, "max_thinking_tokens": thinking.budget_tokens if thinks else None}


def _output(body: CountBody) -> dict[str, Any]:
    config = body.output_config
    wanted = body.output_format if config is None or config.format is None else config.format
    fields: dict[str, Any] = {} if config is None or config.effort is None else {"reasoning_effort": config.effort}
    if wanted is None:
        return fields
    if wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), dict):
        reason = f'output_config.format is {shown(wanted)}; expected {{"type": "json_schema", "schema": {{...}}}}'
        raise ApiError(400, reason, param="output_config")
    return {**fields, "response_format": {"type": "json_schema", "json_schema": {"schema": wanted["schema"]}}}


def _wrong(message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=message.partition("[")[0], code=code)
