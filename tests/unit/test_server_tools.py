"""Tool calls and reasoning over HTTP: what a stream adds up to is the whole answer, and the template gets the tools."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fixtures.tokenizer_folders import byte_level_tokenizer, write_hf
from tests.unit.server_double import ANSWER, ClientDouble, serving
from thalweg.core import SamplingParams
from thalweg.errors import ConfigError
from thalweg.server.parsers.events import CallBegin, Content, Reasoning
from thalweg.server.parsers.formats import OutputFormat
from thalweg.server.settings import MAX_TOOLS, ServerSettings
from thalweg.tokenizer.detokenizer import IncrementalDetokenizer
from thalweg.tokenizer.load import load_tokenizer
from thalweg.tokenizer.template import ChatTemplate

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "now"}},
]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }};{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.arguments | tojson }}{% endfor %};{% endfor %}{{ end }}"
)
KIMI = TEMPLATE + "{# <|tool_call_begin|> </think> #}"
HERMES = TEMPLATE + "{# <tool_call> #}"
KIMI_ANSWER = (
    "<think>Hm.</think>Look:<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
    '<|tool_call_argument_begin|>{"city": "模"}<|tool_call_end|><|tool_call_begin|>functions.now:1'
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
)


def ask(client: ClientDouble, body: dict[str, Any], settings: ServerSettings | None = None) -> Any:
    async def main() -> Any:
        async with serving(client, settings) as http:
            response = await http.post("/v1/chat/completions", json=body)
            if not body.get("stream"):
                return response.json()
            events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
            return [json.loads(e) for e in events if e != "[DONE]"]

    return asyncio.run(asyncio.wait_for(main(), 10))


def added_up(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's deltas make, as clients add them up."""
    message: dict[str, Any] = {"content": None}
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        for field in ("content", "reasoning_content"):
            if delta.get(field):
                message[field] = (message.get(field) or "") + delta[field]
        message["role"] = delta.get("role", message.get("role"))
        for piece in delta.get("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if piece["index"] == len(calls):
                calls.append({"id": piece["id"], "type": piece["type"], "function": dict(piece["function"])})
            else:
                assert set(piece) == {"index", "function"}
                assert set(piece["function"]) == {"arguments"}
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return message


@pytest.mark.parametrize("stream", [False, True])
def test_kimi_calls_and_reasoning(stream: bool) -> None:
    got = ask(ClientDouble(answer=KIMI_ANSWER, template=KIMI), {**CHAT, "stream": stream})
    choice = got[-1]["choices"][0] if stream else got["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert (added_up(got) if stream else choice["message"]) == {
        "role": "assistant",
        "content": "Look:",
        "reasoning_content": "Hm.",
        "tool_calls": [
            {
                "id": "functions.get_weather:0",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "模"}'},
            },
            {"id": "functions.now:1", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    }


def test_arguments_are_streamed_as_they_come() -> None:
    answer = KIMI_ANSWER.replace("模", "Hangzhou, Zhejiang")
    got = ask(ClientDouble(answer=answer, template=KIMI), {**CHAT, "stream": True})
    pieces = [c["choices"][0]["delta"].get("tool_calls", []) for c in got]
    assert len([p for p in pieces if p and p[0]["index"] == 0]) > 10


def test_without_parallel_calls_there_is_one() -> None:
    body = {**CHAT, "parallel_tool_calls": False}
    [call] = ask(ClientDouble(answer=KIMI_ANSWER, template=KIMI), body)["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"


def test_a_call_cut_short_ends_with_length() -> None:
    for max_tokens, arguments in ((37, "{}"), (45, "{}"), (46, '{"city": ""}'), (47, '{"city": "�"}')):
        got = ask(ClientDouble(answer=KIMI_ANSWER, template=KIMI), {**CHAT, "max_tokens": max_tokens})["choices"][0]
        assert got["finish_reason"] == "length"
        assert got["message"]["tool_calls"][0]["function"]["arguments"] == arguments


def test_hermes_calls_have_ids_of_their_own() -> None:
    answer = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>' * 2
    message = ask(ClientDouble(answer=answer, template=HERMES), CHAT)["choices"][0]["message"]
    assert message["content"] is None
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "now", "arguments": "{}"}] * 2


@pytest.mark.parametrize("template", [KIMI, HERMES, HERMES + "{# <function= #}"])
def test_tools_pass_over_what_cannot_be_compiled(template: str) -> None:
    parameters = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9}, "s": {"type": "string", "pattern": "^(?!x)[0-9]+$"}},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    for more in (
        {"tools": tools, "tool_choice": "required"},
        {"functions": [tools[0]["function"]], "function_call": {"name": "f"}},
    ):
        client = ClientDouble(template=template)
        assert "choices" in ask(client, {"messages": CHAT["messages"], **more})
        grammar = client.seen[0].params.grammar
        assert grammar is not None
        assert "(?!x)" not in grammar.text
        assert '"maximum": 9' in grammar.text


NOW_AND_WEATHER = [tool["function"] for tool in TOOLS]
OLDER: dict[str, Any] = {"messages": CHAT["messages"], "functions": NOW_AND_WEATHER}


@pytest.mark.parametrize("stream", [False, True])
def test_functions_are_called_as_they_once_were(stream: bool) -> None:
    client = ClientDouble(answer=KIMI_ANSWER, template=KIMI)
    got = ask(client, {**OLDER, "stream": stream})
    choice = got[-1]["choices"][0] if stream else got["choices"][0]
    assert choice["finish_reason"] == "function_call"
    if stream:
        deltas = [c["choices"][0]["delta"] for c in got]
        assert not any("tool_calls" in d for d in deltas)
        calls = [d["function_call"] for d in deltas if "function_call" in d]
        call = {"name": calls[0].pop("name"), "arguments": "".join(c["arguments"] for c in calls)}
        assert not any("name" in c for c in calls)
    else:
        call = choice["message"]["function_call"]
        assert choice["message"]["content"] == "Look:"
        assert "tool_calls" not in choice["message"]
    assert call == {"name": "get_weather", "arguments": '{"city": "模"}'}
    assert bytes(client.seen[0].prompt_token_ids).decode().startswith(json.dumps(TOOLS))


@pytest.mark.parametrize(("choice", "required"), [("none", False), ("auto", False), ({"name": "now"}, True)])
def test_function_call_chooses(choice: Any, required: bool) -> None:
    client = ClientDouble(template=KIMI)
    answer = ask(client, {**OLDER, "function_call": choice})
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": ANSWER}
    assert answer["choices"][0]["finish_reason"] == "stop"
    grammar = client.seen[0].params.grammar
    assert (grammar is not None and "functions.now:" in grammar.text) == required
    assert (b"get_weather" in bytes(client.seen[0].prompt_token_ids)) == (choice != "none")


def test_function_calls_and_results_of_a_conversation_are_those_of_tools() -> None:
    client = ClientDouble(template=KIMI)
    turns = [
        {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": '{"tz": "CET"}'}},
        {"role": "function", "name": "now", "content": "12:00"},
    ]
    ask(client, {"messages": CHAT["messages"] + turns})
    older = client.seen[0].prompt_token_ids
    assert 'CALL {"tz": "CET"};tool:12:00;' in bytes(older).decode()


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"functions": [{"name": "a b"}]}, "functions"),
        ({"functions": [{"name": "a", "parameters": []}]}, "functions"),
        ({"functions": [NOW_AND_WEATHER[0]] * 2}, "functions"),
        ({"tools": TOOLS}, "functions"),
        ({"function_call": "any"}, "function_call"),
        ({"function_call": {"name": "other"}}, "function_call"),
        ({"tool_choice": "none", "function_call": "none"}, "function_call"),
    ],
)
def test_what_is_wrong_with_functions_is_said_of_functions(more: dict[str, Any], param: str) -> None:
    error = ask(ClientDouble(template=KIMI), {**OLDER, **more})["error"]
    assert error["param"] == param
    if "tools" not in more and "tool_choice" not in more:
        assert "tool" not in error["message"]


def test_functions_without_a_known_format_name_the_field() -> None:
    assert ask(ClientDouble(template=TEMPLATE), OLDER)["error"]["param"] == "functions"


def test_letters_that_spell_a_marker_are_no_call() -> None:
    client = ClientDouble(answer='<|tool_call_begin|>f<|tool_call_argument_begin|>{"a": 1}', template=KIMI)
    client.answer = list(b'<|tool_call_begin|>f<|tool_call_argument_begin|>{"a": 1}')
    message = ask(client, CHAT)["choices"][0]["message"]
    assert message["content"] == '<|tool_call_begin|>f<|tool_call_argument_begin|>{"a": 1}'
    assert "tool_calls" not in message


@pytest.mark.parametrize("more", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}])
@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}])
def test_where_no_call_is_wanted_none_is_looked_for(more: dict[str, Any], choice: dict[str, Any]) -> None:
    client = ClientDouble(answer=KIMI_ANSWER, template=KIMI)
    got = ask(client, {**CHAT, **choice, **more})["choices"][0]
    assert got["finish_reason"] == "stop"
    assert "tool_calls" not in got["message"]
    assert "<|" not in got["message"]["content"]
    assert bytes(client.seen[0].prompt_token_ids) == b"user:hi;"


def test_the_template_gets_tools_and_earlier_calls() -> None:
    client = ClientDouble(template=KIMI)
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"tz": "<eos>"}'}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "12:00"},
    ]
    body = {**CHAT, "messages": CHAT["messages"] + turns, "chat_template_kwargs": {"end": "END"}}
    assert ask(client, body)["choices"][0]["message"]["content"] == ANSWER
    prompt = bytes(client.seen[0].prompt_token_ids).decode()
    assert prompt == json.dumps(TOOLS) + ';user:hi;assistant:CALL {"tz": "<eos>"};tool:12:00;END'


@pytest.mark.parametrize(
    ("template", "calls", "thinking"),
    [
        (KIMI, "kimi_k2", True),
        (HERMES, "hermes", False),
        (HERMES + "{# <function= #}", "qwen3_coder", False),
        (TEMPLATE, None, False),
    ],
)
def test_the_format_is_the_templates(template: str, calls: str | None, thinking: bool) -> None:
    output = OutputFormat.of(ClientDouble(template=template).codec, "auto", "auto")
    assert (output.calls and output.calls.name, output.thinking) == (calls, thinking)
    forced = OutputFormat.of(ClientDouble(template=template).codec, "none", "think")
    assert (forced.calls, forced.thinking) == (None, True)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        # One family, two formats: some of its models write JSON, others tags.
        ("<tool_call>\\n{{ {'name': c.name, 'arguments': c.arguments} | tojson }}\\n</tool_call>", "hermes"),
        (
            "{{ '<tool_call>\\n<function=' + c.name + '>\\n' }}<parameter={{ k }}>\\n{{ v }}\\n</parameter>",
            "qwen3_coder",
        ),
        ("{{ '<|tool_call_begin|>' }}{{ c.id }}<|tool_call_argument_begin|>{{ c.arguments }}", "kimi_k2"),
        ("<tool_call>{{ c.name }}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value></tool_call>", None),
        ("<function={{ c.name }}>{{ c.arguments }}</function>", None),
    ],
)
def test_the_format_is_that_of_the_template(template: str, name: str | None) -> None:
    calls = OutputFormat.of(ClientDouble(template=template).codec, "auto", "auto").calls
    assert (None if calls is None else calls.name) == name


QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>\\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% if brief %}<think>\\n\\n</think>\\n\\n"
    "{% else %}<think>\\n{% endif %}{% endif %}{# <tool_call> #}"
)


def test_reasoning_that_the_template_begins(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_hf(tmp_path, byte_level_tokenizer(), eos_token="<|im_end|>"))
    template = ChatTemplate(QWEN, tokenizer)
    output = OutputFormat.of(SimpleNamespace(tokenizer=tokenizer, template=template), "auto", "auto")  # type: ignore[arg-type]
    messages = [{"role": "user", "content": "Say <think>"}]
    assert output.thinking
    assert output.begins_thinking(template.encode_chat(messages))
    assert not output.begins_thinking(template.encode_chat(messages, brief=True))
    assert not output.begins_thinking(template.encode_chat(messages, add_generation_prompt=False))
    # The tokenizer has no token for <tool_call>, so there the letters are the marker.
    reader = output.reader(template.encode_chat(messages), TOOLS, SamplingParams(), lambda: "id")
    assert reader is not None
    ids = tokenizer.encode('Hm</think>Ok <tool_call>{"name": "now", "arguments": {}}</tool_call>', allow_special=True)
    detokenizer = IncrementalDetokenizer(tokenizer, marks=reader.marks)
    events = [e for i in ids for e in reader.feed(detokenizer.push([i]))] + reader.feed("", last=True)
    assert "".join(e.text for e in events if isinstance(e, Reasoning)) == "Hm"
    assert "".join(e.text for e in events if isinstance(e, Content)) == "Ok"
    assert CallBegin(0, "id", "now") in events


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": 7}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)
def test_what_is_wrong_with_tools_is_said(more: dict[str, Any], param: str) -> None:
    error = ask(ClientDouble(template=KIMI), {**CHAT, **more})["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_messages_that_the_template_cannot_take_name_themselves() -> None:
    messages = [{"role": "assistant", "content": "", "tool_calls": [7]}]
    assert ask(ClientDouble(template=KIMI), {**CHAT, "messages": messages})["error"]["param"] == "messages"


@pytest.mark.parametrize("names", [("kimi", "auto"), ("auto", "yes")])
def test_parsers_that_there_are_not(names: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="expected one of auto, none"):
        OutputFormat.of(ClientDouble(template=KIMI).codec, *names)


def test_tools_without_a_known_format_name_the_option() -> None:
    error = ask(ClientDouble(template=TEMPLATE), CHAT)["error"]
    assert "--tool-call-parser" in error["message"]
    assert ask(ClientDouble(template=TEMPLATE), CHAT, ServerSettings(tool_call_parser="hermes"))["choices"]


def test_allowed_tools_are_all_that_the_model_is_told_of() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools[1:]}}
    client = ClientDouble(template=HERMES)
    ask(client, {**CHAT, "tools": tools, "tool_choice": choice})
    told = ClientDouble(template=HERMES)
    ask(told, {**CHAT, "tools": tools[1:], "tool_choice": "required"})
    assert client.seen[0].prompt_token_ids == told.seen[0].prompt_token_ids
    assert client.seen[0].params.grammar == told.seen[0].params.grammar
    for wrong, said in (
        ({"mode": "required", "tools": [{"type": "function", "function": {"name": "h"}}]}, 'has "h"; expected'),
        ({"mode": "none", "tools": tools}, "expected mode auto or required"),
        (None, "is null; expected mode auto or required"),
    ):
        body = {**CHAT, "tools": tools, "tool_choice": {"type": "allowed_tools", "allowed_tools": wrong}}
        error = ask(client, body)["error"]
        assert (error["param"], said in error["message"]) == ("tool_choice", True), error


@pytest.mark.parametrize(
    ("tools", "allowed", "refused"),
    [
        (MAX_TOOLS, MAX_TOOLS, None),
        (MAX_TOOLS + 1, 1, ("tools", f"{MAX_TOOLS + 1} tools came; expected at most {MAX_TOOLS}")),
        (1, MAX_TOOLS + 1, ("tool_choice", f"has {MAX_TOOLS + 1} tools; expected at most {MAX_TOOLS}")),
    ],
)
def test_too_many_allowed_tools_are_refused_before_any_are_compared(
    tools: int, allowed: int, refused: tuple[str, str] | None
) -> None:
    """Comparing takes quadratic time, on the event loop: the number is what an error is about, not an unknown name."""
    function = {"type": "function", "function": {"name": "unknown"}}
    named = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(tools)]
    listed = named if refused is None else [function] * allowed
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": listed}}
    answer = ask(ClientDouble(template=HERMES), {**CHAT, "tools": named, "tool_choice": choice})
    if refused is None:
        assert "choices" in answer, answer
    else:
        assert (answer["error"]["param"], refused[1] in answer["error"]["message"]) == (refused[0], True), answer
