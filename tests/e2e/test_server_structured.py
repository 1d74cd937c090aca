"""Structured output and tools on the bundled model, seen through the openai client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.e2e.tiny_model import ServerProcess, server_process
from thalweg.config.model_source import model_folder

QUESTION = "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have now?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "apples": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["red", "green"]},
    },
    "required": ["name", "apples", "kind"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "apples", "schema": SCHEMA, "strict": True}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "count", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    with server_process(tmp_path_factory.mktemp("server") / "log", {}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def check(text: str | None) -> None:
    value = json.loads(text or "")
    assert list(value) == ["name", "apples", "kind"]
    assert len(value["name"]) <= 12
    assert 0 <= value["apples"] <= 99
    assert value["kind"] in ("red", "green")


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_json_schema_whole_and_streamed(client: openai.OpenAI, temperature: float) -> None:
    ask: Any = {"model": "thalweg-tiny", "messages": MESSAGES, "response_format": FORMAT, "temperature": temperature}
    whole = client.chat.completions.create(**ask, seed=1, max_tokens=300)
    assert whole.choices[0].finish_reason == "stop"
    check(whole.choices[0].message.content)
    chunks = list(client.chat.completions.create(**ask, seed=1, max_tokens=300, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "count"}}])
def test_required_tool_calls_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    ask: Any = {"model": "thalweg-tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": 2}
    ask |= {"temperature": 1.2, "max_tokens": 300, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**ask).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    assert whole.message.tool_calls is not None
    [call] = whole.message.tool_calls
    assert call.type == "function"
    if call.function.name == "count":
        check(call.function.arguments)
    else:
        assert choice == "required"
        assert json.loads(call.function.arguments) == {}

    pieces = [c.choices[0] for c in client.chat.completions.create(**ask, stream=True)]
    calls = [d for p in pieces for d in p.delta.tool_calls or []]
    assert (calls[0].id, calls[0].function and calls[0].function.name) == (call.id, call.function.name)
    assert "".join(d.function.arguments or "" for d in calls if d.function) == call.function.arguments
    assert pieces[-1].finish_reason == "tool_calls"
    assert not any(p.delta.content for p in pieces)


def test_a_call_and_its_result_go_back_in(client: openai.OpenAI) -> None:
    ask: Any = {"model": "thalweg-tiny", "tools": TOOLS, "temperature": 0, "max_tokens": 300}
    call = client.chat.completions.create(**ask, messages=MESSAGES, tool_choice="required").choices[0].message
    assert call.tool_calls is not None
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "7"}
    answer = client.chat.completions.create(**ask, messages=[*MESSAGES, call, result]).choices[0]
    assert "<|" not in (answer.message.content or "")


class Basket(pydantic.BaseModel):
    class Fruit(pydantic.BaseModel):
        kind: Literal["apple", "pear"]
        ripe: bool | None

    fruits: list[Fruit] = pydantic.Field(max_length=2)
    weight_kg: float


def test_the_clients_own_parsing(client: openai.OpenAI) -> None:
    ask: Any = {"model": "thalweg-tiny", "messages": MESSAGES, "temperature": 1, "seed": 3, "max_tokens": 400}
    basket = client.chat.completions.parse(**ask, response_format=Basket).choices[0].message.parsed
    assert isinstance(basket, Basket)
    tools: Any = [openai.pydantic_function_tool(Basket, name="weigh")]
    [call] = client.chat.completions.parse(**ask, tools=tools, tool_choice="required").choices[0].message.tool_calls[:1]
    assert isinstance(call.function.parsed_arguments, Basket)


def test_tool_choice_none_gives_the_plain_answer(client: openai.OpenAI) -> None:
    ask: Any = {"model": "thalweg-tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 60}
    assert "####" in (
        client.chat.completions.create(**ask, tools=TOOLS, tool_choice="none").choices[0].message.content or ""
    )


def test_completions_under_other_grammars(client: openai.OpenAI) -> None:
    def text(**grammar: Any) -> str:
        answer = client.completions.create(
            model="thalweg-tiny",
            prompt=QUESTION,
            temperature=0,
            max_tokens=100,
            extra_body={"structured_outputs": grammar},
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].text

    assert text(choice=["yes, he has", "no"]) in ("yes, he has", "no")
    assert len(text(regex="[a-c]{3,5}")) in (3, 4, 5)
    assert text(grammar='start: "a" b\nb: /[0-9]/ "c"')[2] == "c"
    assert (
        len(json.loads(text(json={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}))) == 2
    )


def test_neighbours_of_structured_requests_are_as_alone(client: openai.OpenAI) -> None:
    def plain(_: int) -> str:
        answer = client.completions.create(model="thalweg-tiny", prompt=QUESTION, temperature=0, max_tokens=40)
        return answer.choices[0].text

    def structured(i: int) -> str | None:
        ask: Any = {"model": "thalweg-tiny", "messages": MESSAGES, "response_format": FORMAT, "temperature": 1.2}
        return client.chat.completions.create(**ask, seed=i, max_tokens=300).choices[0].message.content

    alone = plain(0)
    with ThreadPoolExecutor(12) as pool:
        plains = [pool.submit(plain, i) for i in range(6)]
        others = [pool.submit(structured, i) for i in range(6)]
        assert {f.result() for f in plains} == {alone}
        for f in others:
            check(f.result())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wat"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: " + "(" * 20_000}}, "structured_outputs"),
        ({"tools": TOOLS, "tool_choice": "required", "max_tokens": 0, "n": 40}, "n"),
        ({"guided_json": {"properties": {"a": {"pattern": "^(?!x)"}}}}, "guided_json"),
        ({"grammar": "root ::= nothing"}, "grammar"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_grammars_that_cannot_be_used_are_400(
    server: ServerProcess, body: dict[str, Any], param: str, stream: bool
) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, "stream": stream, **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_thousands_of_choices(server: ServerProcess, stream: bool) -> None:
    labels = [f"label number {i}" for i in range(3000)]
    for more in (
        {"structured_outputs": {"choice": labels}},
        {"guided_choice": labels},
        {"guided_json": {"enum": labels}},
    ):
        body = {"messages": MESSAGES, "max_tokens": 30, "temperature": 1, "seed": 3, "stream": stream, **more}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        if stream:
            chunks = [json.loads(e[6:]) for e in response.text.split("\n\n") if e and e != "data: [DONE]"]
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        else:
            text = response.json()["choices"][0]["message"]["content"]
        assert (json.loads(text) if "guided_json" in more else text) in labels


def test_hundreds_of_optional_properties(server: ServerProcess) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(600)}}
    body = {"messages": MESSAGES, "max_tokens": 40, "guided_json": schema | {"additionalProperties": False}}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text


ODD_PARAMETERS: Any = [
    {
        "type": "object",
        "properties": {"n": {"type": "string", "pattern": "^(?!x)[0-9]+$", "maxLength": 8}},
        "required": ["n"],
    },
    {"$ref": "#"},
    {"type": "object", "properties": {"n": {"type": "any"}}, "maxProperties": 1},
]


@pytest.mark.parametrize("parameters", ODD_PARAMETERS)
def test_tools_pass_over_what_cannot_be_compiled(client: openai.OpenAI, parameters: Any) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    ask: Any = {"model": "thalweg-tiny", "messages": MESSAGES, "tools": tools, "tool_choice": "required", "seed": 1}
    choice = client.chat.completions.create(**ask, max_tokens=200).choices[0]
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.name == "f"
    if parameters is ODD_PARAMETERS[0]:
        assert list(json.loads(choice.message.tool_calls[0].function.arguments)) == ["n"]


class Palette(pydantic.BaseModel):
    colours: set[Literal["red", "green", "blue"]]
    secret: pydantic.SecretStr = pydantic.Field(max_length=4)
    first: Literal["x"] | None = None


def test_a_generated_schema_with_a_set_and_a_secret(client: openai.OpenAI) -> None:
    schema = Palette.model_json_schema() | {"additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "palette", "schema": schema}}
    for seed in range(3):
        ask: Any = {"model": "thalweg-tiny", "messages": MESSAGES, "temperature": 1.5, "seed": seed, "max_tokens": 300}
        text = client.chat.completions.create(**ask, response_format=form).choices[0].message.content or ""
        Palette.model_validate_json(text)
        colours = json.loads(text)["colours"]
        assert len(set(colours)) == len(colours)


def test_a_functions_older_form(client: openai.OpenAI) -> None:
    functions: Any = [{"name": "count", "parameters": SCHEMA}]
    ask: Any = {"model": "thalweg-tiny", "messages": MESSAGES, "functions": functions, "max_tokens": 300, "seed": 5}
    choice = client.chat.completions.create(**ask, function_call={"name": "count"}).choices[0]
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call is not None
    check(choice.message.function_call.arguments)


def test_the_log_has_no_traceback(server: ServerProcess) -> None:
    assert "Traceback" not in server.errors()
