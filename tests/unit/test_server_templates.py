"""Chat templates over HTTP: the prompt that a conversation becomes, and the 400 of one that cannot become any."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.server_double import ClientDouble, run
from tests.unit.test_server_tools import ask

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLING = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "c", "content": "ok"},
]
LOOP = "{% for m in messages %}"
END = ";{% endfor %}"
ARGUMENTS = "{% set c = messages[1].tool_calls[0] %}"


def prompt(template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    client = ClientDouble(template=template)
    answer = ask(client, {"messages": messages, **more})
    assert "choices" in answer, answer
    return bytes(client.seen[0].prompt_token_ids).decode()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (LOOP + "{{ '</think>' in m.content }}" + END, "False;False;False;"),
        (LOOP + "{{ m.content + '.' }}" + END, "hi.;.;ok.;"),
        (LOOP + "{% if m.content is not string %}{% for p in m.content %}{% endfor %}{% endif %}" + END, ";;;"),
        (LOOP + "{% for p in m.content %}{{ p.text }}{% endfor %}" + END, "hi;;ok;"),
        (LOOP + "{{ m.content.replace('/think', '').strip() }}" + END, "hi;;ok;"),
        (ARGUMENTS + "{{ c['function']['name'] + '|' + c['function']['arguments'] }}", 'f|{"a": 1}'),
        (ARGUMENTS + "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        (ARGUMENTS + "{{ c.function.arguments | tojson }}", '{"a": 1}'),
        ("{{ '<' | e }}{{ 2.567 | round(1) }}{{ [1, 2] | sum }}", "&lt;2.63"),
        ("{{ '%s-%03d' % ('a', 7) }}{{ '{:>3}'.format(1) }}", "a-007  1"),
        ("{{ '%s' | format(1) }}", "1"),
    ],
)
def test_what_templates_do_with_a_call_and_its_result(template: str, text: str) -> None:
    assert prompt(template, CALLING) == text


def test_a_continued_answer_is_left_open() -> None:
    messages = [*CALLING, {"role": "assistant", "content": "It is "}]
    template = LOOP + "<{{ m.role }}>{{ m.content }}</>" + END + "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert prompt(template, messages, continue_final_message=True).endswith("ok</>;<assistant>It is ")


@pytest.mark.parametrize(
    ("last", "more", "end"),
    [
        ({"partial": True}, {}, "ok</>;<assistant>It is "),
        ({"prefix": True}, {}, "ok</>;<assistant>It is "),
        ({"partial": False}, {}, "<assistant>It is </>;<assistant>"),
        ({"partial": True}, {"continue_final_message": False}, "<assistant>It is </>;<assistant>"),
    ],
)
def test_an_answer_may_say_itself_that_it_is_begun(last: dict[str, Any], more: dict[str, Any], end: str) -> None:
    messages = [*CALLING, {"role": "assistant", "content": "It is ", **last}]
    template = LOOP + "<{{ m.role }}>{{ m.content }}</>" + END + "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert prompt(template, messages, **more).endswith(end)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "|"),
        ({"enable_thinking": False}, "False|False"),
        ({"thinking": {"type": "disabled"}}, "False|False"),
        ({"thinking": {"type": "enabled"}}, "True|True"),
        ({"reasoning_effort": "none"}, "False|False"),
        ({"chat_template_kwargs": {"thinking": False}}, "False|False"),
        ({"chat_template_kwargs": {"thinking": True}, "thinking": {"type": "disabled"}}, "True|True"),
        ({"chat_template_kwargs": {"thinking": "much"}, "enable_thinking": True}, "True|much"),
    ],
)
def test_reasoning_is_switched_under_the_names_that_templates_have_for_it(more: dict[str, Any], text: str) -> None:
    assert prompt("{{ enable_thinking }}|{{ thinking }}", CALLING, **more) == text


def test_tokenize_lays_a_conversation_out_as_a_chat_does() -> None:
    called = {"name": "f", "arguments": "{}"}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "function_call": called},
        {"role": "function", "name": "f", "content": "ok"},
    ]
    template = LOOP + "{{ m.role }}:{{ m.content }}{{ m.tool_calls[0].id if m.tool_calls }}" + END
    text = prompt(template, messages)
    assert text == "system:Be brief.;user:hi;assistant:functions.f:0;tool:ok;"

    async def work(http: Any, _: ClientDouble) -> Any:
        return (await http.post("/tokenize", json={"messages": messages})).json()

    assert bytes(run(work, ClientDouble(template=template))["tokens"]).decode() == text


SYSTEM = [
    {"role": "system", "content": "A"},
    {"role": "developer", "content": [{"type": "text", "text": "B"}, {"type": "text", "text": "C"}]},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "system", "content": "D"},
    {"role": "user", "content": "you"},
]
ONLY_FIRST = "{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"


@pytest.mark.parametrize(
    ("check", "text"),
    [
        ("", "system:A;system:B\nC;user:hi;assistant:ho;system:D;user:you;"),
        (ONLY_FIRST, "system:A\n\nB\nC;user:hi;assistant:ho;user:D;user:you;"),
    ],
)
def test_system_messages_are_changed_only_for_a_template_that_refuses_them(check: str, text: str) -> None:
    assert prompt(LOOP + check + "{{ m.role }}:{{ m.content }}" + END, SYSTEM) == text


def test_a_bad_part_of_a_second_system_message_is_still_named() -> None:
    messages = [SYSTEM[0], {"role": "system", "content": [{"type": "image_url"}]}, SYSTEM[2]]
    client = ClientDouble(template=LOOP + ONLY_FIRST + "{{ m.content }}" + END)
    assert "messages[1].content[0] is of type 'image_url'" in ask(client, {"messages": messages})["error"]["message"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
def test_parts_that_are_no_text_are_refused_by_name(kind: str) -> None:
    content = [{"type": "text", "text": "What is it?"}, {"type": kind, kind: {"url": "https://example.com/a"}}]
    client = ClientDouble(template=LOOP + "{{ m.content }}" + END)
    error = ask(client, {"messages": [{"role": "user", "content": content}]})["error"]
    assert f"messages[0].content[1] is of type '{kind}'; expected text" in error["message"]
    assert error["param"] == "messages"
    assert not client.seen


def test_a_template_that_refuses_or_fails_is_a_400() -> None:
    for template, reason in (
        ("{{ raise_exception('no system message') }}", "refused: no system message"),
        ("{{ 'x' * 10 ** 9 }}", "more than 8000000 characters"),
        ("{{ messages[9].content }}", "failed on these messages"),
        ("{{ '{' | items }}", "failed on these messages: items of '{'; expected an object, or the JSON of one"),
    ):
        error = ask(ClientDouble(template=template), {"messages": CALLING})["error"]
        assert reason in error["message"]
        assert error["type"] == "invalid_request_error"
