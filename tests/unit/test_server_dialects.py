"""Fields of other servers' requests: the table in docs/api.md, each row tried, and what it does not say."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.server_double import ANSWER, ClientDouble, run
from thalweg.server import dialects
from thalweg.server.schemas import ChatBody, CompletionBody

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "hi, 1 2 3"}]}),
    "completions": ("/v1/completions", {"prompt": "hi, 1 2 3"}),
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{{ tools }}{{ style }}{{ reasoning_effort }}"
    "{{ enable_thinking }}{{ documents }}{% if add_generation_prompt %}assistant:{% endif %}{# <tool_call> <think> #}"
)


def rows() -> list[tuple[tuple[str, ...], tuple[str, ...], str, str, str]]:
    """(fields, kinds of request, what happens, members that are taken, members that are not)"""
    found = []
    table = re.search(r"^\| field \| in \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE)
    assert table is not None
    for line in table[1].splitlines():
        names, where, here, taken, refused = (cell.strip() for cell in line.strip("| ").split(" | "))
        kinds = tuple(BODIES) if where == "both" else (where,)
        found.append((tuple(re.findall("`(.*?)`", names)), kinds, here, taken.strip("`"), refused.strip("`")))
    return found


ROWS = rows()
CASES = [
    (names[0], kind, here, taken, no) for names, kinds, here, taken, no in ROWS for kind in kinds if here != "ignored"
]


def ask(kind: str, more: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
    """(status, answer, everything that the request came to, without ids and times)"""
    path, body = BODIES[kind]
    client = ClientDouble(template=TEMPLATE)

    async def work(http: Any, _: ClientDouble) -> Any:
        return await http.post(path, json=body | more)

    response = run(work, client)
    text = re.sub(r'"(?:id|created)":[^,]*,', "", response.text)
    seen = [(request.prompt_token_ids, request.params) for request in client.seen]
    streamed = response.headers["content-type"].startswith("text/event-stream")
    return response.status_code, {} if streamed else response.json(), f"{seen} {text}"


@pytest.fixture(scope="module")
def plain() -> dict[str, str]:
    return {kind: ask(kind, {})[2] for kind in BODIES}


@pytest.mark.parametrize(("name", "kind", "here", "taken", "no"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_rows_of_the_table(plain: dict[str, str], name: str, kind: str, here: str, taken: str, no: str) -> None:
    status, answer, everything = ask(kind, json.loads(f"{{{taken}}}"))
    assert status == 200, answer
    if here.startswith("honoured"):
        assert everything != plain[kind]
    elif '"n"' not in taken:
        assert everything == plain[kind]
    status, answer, _ = ask(kind, json.loads(f"{{{no}}}"))
    assert (status, answer["error"]["param"]) == (400, name), answer
    if here == "refused":
        assert answer["error"]["code"] == "unsupported"
        assert ask(kind, {name: None})[2] == plain[kind]


@pytest.mark.parametrize("kind", BODIES)
def test_ignored_fields_do_nothing_whatever_they_hold(plain: dict[str, str], kind: str) -> None:
    [ignored] = [names for names, _, here, _, _ in ROWS if here == "ignored"]
    assert set(ignored) == dialects.IGNORED
    for value in ("x", 7, {"a": [1]}, [True], None):
        assert ask(kind, dict.fromkeys(ignored, value))[2] == plain[kind]


def test_the_table_has_every_field() -> None:
    listed = {kind: {name for names, kinds, *_ in ROWS for name in names if kind in kinds} for kind in BODIES}
    known = dialects.IGNORED | dialects.REFUSED.keys()
    assert listed["chat"] == known | (ChatBody.model_fields.keys() - {"model", "messages"})
    with_a_session = {"session", "session_save"}  # which the page has by themselves (test_server_sessions.py)
    assert listed["completions"] == known | (CompletionBody.model_fields.keys() - {"model", "prompt"} - with_a_session)
    assert not known & (ChatBody.model_fields.keys() | CompletionBody.model_fields.keys())
    assert not dialects.IGNORED & dialects.REFUSED.keys()


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("chat", {"echo": True}),
        ("chat", {"suffix": "x"}),
        ("chat", {"prompt": "x"}),
        ("completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("completions", {"tools": [{}], "tool_choice": "auto"}),
        ("completions", {"continue_final_message": True}),
    ],
)
def test_fields_of_the_other_kind_of_request_say_so(kind: str, more: dict[str, Any]) -> None:
    status, answer, _ = ask(kind, more)
    assert (status, answer["error"]["param"]) == (400, next(iter(more)))
    assert "is a field of /v1/" in answer["error"]["message"]
    assert ask(kind, dict.fromkeys(more))[0] == 200


def test_a_field_that_nobody_knows_is_ignored_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dialects._logged.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert ask("chat", {"temprature\n": 1})[0] == 200
    assert [r.getMessage() for r in caplog.records if "temprature" in r.getMessage()] == [
        "a request has the field 'temprature\\n', which is not known and is ignored"
    ]


def params_of(kind: str, more: dict[str, Any]) -> Any:
    path, body = BODIES[kind]
    client = ClientDouble()

    async def work(http: Any, _: ClientDouble) -> Any:
        return await http.post(path, json=body | more)

    response = run(work, client)
    assert response.status_code == 200, response.text
    return client.seen[0].params


def test_other_names_are_the_same_fields() -> None:
    for theirs, ours in (
        ({"n_predict": 5}, {"max_tokens": 5}),
        ({"max_new_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
        ({"repeat_penalty": 1.5, "repeat_last_n": -1, "penalize_nl": True}, {"repetition_penalty": 1.5}),
        ({"stop_sequences": ["z"], "no_stop_trim": True}, {"stop": ["z"], "include_stop_str_in_output": True}),
        ({"min_new_tokens": 2, "sampling_seed": 3}, {"min_tokens": 2, "seed": 3}),
    ):
        for kind in BODIES:
            assert params_of(kind, theirs) == params_of(kind, ours)


def test_as_many_tokens_as_fit() -> None:
    for value in (-1, -2):
        assert params_of("completions", {"n_predict": value}).max_tokens is None
        assert params_of("chat", {"n_predict": value}).max_tokens is None
    for kind in BODIES:
        assert params_of(kind, {"max_tokens": -1}).max_tokens is None


def test_errors_name_the_field_as_the_request_spells_it() -> None:
    for field, value, message in (
        ("repeat_penalty", -1, "repeat_penalty is -1.0; expected"),
        ("stop_sequences", ["x" * 2000], "stop_sequences is ("),
        ("n_predict", 4, "n_predict and max_tokens are both given; expected one of them"),
    ):
        _, answer, _ = ask("chat", {field: value, "max_tokens": 3})
        assert answer["error"]["param"] == field
        assert answer["error"]["message"].startswith(message)


FUNCTIONS = [{"name": "now"}]
TOOLS = [{"type": "function", "function": FUNCTIONS[0]}]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"functions": FUNCTIONS, "tools": TOOLS}, "functions and tools are both given; expected one of them"),
        ({"functions": [{}]}, "functions[0].name is null; expected 1 to 64 letters, digits, '_', '-' or '.'"),
        (
            {"function_call": {"name": "now"}},
            (
                'function_call is the function "now" and there are no functions;'
                " expected functions, or function_call auto or none"
            ),
        ),
        (
            {"function_call": {"name": "x"}, "functions": FUNCTIONS},
            'function_call is the function "x"; expected a function that functions has',
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": TOOLS},
            'tool_choice is the function "x"; expected a function that tools has',
        ),
        (
            {"tool_choice": {"type": "any"}, "tools": TOOLS},
            'tool_choice is {"type": "any"}; expected none, auto, required or a function that tools has',
        ),
        ({"do_sample": False}, "do_sample is false, which is not supported; expected it left out or true"),
    ],
)
def test_errors_show_what_came(more: dict[str, Any], message: str) -> None:
    status, answer, _ = ask("chat", more)
    assert (status, answer["error"]["message"], answer["error"]["param"]) == (400, message, next(iter(more)))


def test_fields_of_other_fields_that_say_nothing_are_taken(plain: dict[str, str]) -> None:
    for more in ({"top_logprobs": 0}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}):
        assert ask("chat", more)[2] == plain["chat"]


@pytest.mark.parametrize(
    ("more", "kind", "text"),
    [
        ({"guided_json": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"guided_json": '{"type": "object"}'}, "json_schema", '{"type": "object"}'),
        ({"json_schema": {"type": "array"}}, "json_schema", '{"type": "array"}'),
        ({"structured_outputs": {"json": '{"type": "array"}'}}, "json_schema", '{"type": "array"}'),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        ({"response_format": {"type": "json_object", "schema": {"type": "array"}}}, "json_schema", '{"type": "array"}'),
        ({"response_format": {"type": "json_schema", "schema": {"type": "array"}}}, "json_schema", '{"type": "array"}'),
        ({"response_format": {"type": "json", "value": {"type": "array"}}}, "json_schema", '{"type": "array"}'),
        (
            {"response_format": {"type": "json_schema", "value": {"name": "x", "schema": {"type": "array"}}}},
            "json_schema",
            '{"type": "array"}',
        ),
        ({"response_format": {"type": "regex", "value": "a+"}}, "regex", "a+"),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"regex": "a+", "grammar": ""}, "regex", "a+"),
        ({"guided_grammar": "start: /a/"}, "lark", "start: /a/"),
        ({"grammar": 'root ::= "a"'}, "lark", 'root ::= "a"'),
        ({"ebnf": 'root ::= "a"'}, "lark", 'root ::= "a"'),
        ({"guided_choice": ["a", "b"]}, "lark", 'start: CHOICE\nCHOICE: "a" | "b"'),
    ],
)
def test_every_way_to_ask_for_a_grammar(more: dict[str, Any], kind: str, text: str) -> None:
    for request in BODIES:
        grammar = params_of(request, more).grammar
        assert (grammar.kind, grammar.text) == (kind, text)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, "grammar"),
        ({"response_format": {"type": "json_object", "schema": 7}}, "response_format"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"response_format": {"type": "regex"}}, "response_format"),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format"),
        ({"json_schema": "[" * 100_000}, "json_schema"),
        ({"json_schema": '{"a": ' + '"x"' * 100_000}, "json_schema"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": "x"}}, "structured_outputs"),
    ],
)
def test_grammars_that_cannot_be_asked_for_name_their_field(more: dict[str, Any], param: str) -> None:
    for kind in BODIES:
        status, answer, _ = ask(kind, more)
        assert (status, answer["error"]["param"]) == (400, param), answer


def test_a_schema_that_cannot_be_kept_is_refused_with_keyword_and_path() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!x)[0-9]+$"}}}
    for more, where in (
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}, ".json_schema.schema"),
        ({"response_format": {"type": "json_object", "schema": schema}}, ".schema"),
        ({"structured_outputs": {"json": schema}}, ".json"),
        ({"guided_json": json.dumps(schema)}, ""),
    ):
        for kind in BODIES:
            status, answer, _ = ask(kind, more)
            field = next(iter(more))
            assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, field, "invalid_grammar")
            assert answer["error"]["message"].startswith(
                f"{field}{where}.properties.a.pattern: '^(?!x)[0-9]+$' cannot be"
            )


def test_truncated_prompts_keep_their_end() -> None:
    for more, expected in (
        ({"truncate_prompt_tokens": 3}, "2 3"),
        ({"truncate": 100}, "hi, 1 2 3"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 995}, " 2 3"[-5:]),
    ):
        client = ClientDouble()

        async def work(http: Any, _: ClientDouble, more: dict[str, Any] = more) -> Any:
            return (await http.post("/v1/completions", json={"prompt": "hi, 1 2 3", "echo": True, **more})).json()

        answer = run(work, client)
        assert bytes(client.seen[0].prompt_token_ids).decode().endswith(expected)
        assert len(client.seen[0].prompt_token_ids) <= max(len(expected), 5)
        assert answer["choices"][0]["text"] == bytes(client.seen[0].prompt_token_ids).decode() + ANSWER


def test_special_tokens_are_refused_only_if_the_tokenizer_has_them() -> None:
    for surrounds, status in ((False, 200), (True, 400)):
        client = ClientDouble()
        client.codec.tokenizer.surrounds = surrounds

        async def work(http: Any, _: ClientDouble) -> list[Any]:
            body = {"prompt": "x", "add_special_tokens": True}
            return [await http.post(path, json=body) for path in ("/v1/completions", "/tokenize")]

        for response in run(work, client):
            assert response.status_code == status
            assert status == 200 or response.json()["error"]["param"] == "add_special_tokens"


def test_tokenize_gives_the_text_of_tokens() -> None:
    async def work(http: Any, _: ClientDouble) -> Any:
        return (await http.post("/tokenize", json={"prompt": "hi", "return_token_strs": True})).json()

    assert run(work)["token_strs"] == ["h", "i"]


def test_an_answer_goes_on_where_the_last_message_ends() -> None:
    client = ClientDouble(template=TEMPLATE)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Good "}]

    async def work(http: Any, _: ClientDouble) -> Any:
        body = {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        refused = await http.post("/v1/chat/completions", json=body | {"messages": turns[:1]})
        return answer, (await http.post("/tokenize", json=body)).json(), refused

    answer, tokenized, refused = run(work, client)
    assert bytes(client.seen[0].prompt_token_ids) == b"user:hi\nassistant:Good "
    assert tokenized["tokens"] == client.seen[0].prompt_token_ids
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert refused.status_code == 400
    assert "continue_final_message" in refused.json()["error"]["message"]
