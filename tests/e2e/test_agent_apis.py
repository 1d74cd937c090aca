"""The Responses and Messages APIs on the bundled model, through the clients that agents are built on.

The model's template is changed to begin each answer within reasoning, which the model knows nothing of: what closes it
is the budget.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.e2e.test_server_structured import QUESTION, SCHEMA, check
from tests.e2e.tiny_model import ServerProcess, server_process
from thalweg.config.model_source import model_folder

anthropic = pytest.importorskip("anthropic", reason="the dev extra is installed without the anthropic client")

ASK: Any = {"model": "thinker", "max_tokens": 300, "messages": [{"role": "user", "content": QUESTION}]}
GREEDY: Any = {"extra_body": {"temperature": 0}}  # not every version of the client has it as a parameter
TOOLS: Any = [{"name": "count", "description": "of fruit", "input_schema": SCHEMA}]
FUNCTIONS: Any = [{"type": "function", "name": "count", "parameters": SCHEMA, "strict": True}]
ONE = {"type": "any", "disable_parallel_tool_use": True}
BUDGET = 10
BEGIN = "<|im_assistant|>assistant<|im_middle|>"
THINKS = "{%- if enable_thinking is not defined or enable_thinking -%}<think>{%- endif -%}"


class Basket(pydantic.BaseModel):
    apples: int = pydantic.Field(ge=0, le=99)
    kind: Literal["red", "green"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    bundled = model_folder(None)
    if not (bundled / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    folder = tmp_path_factory.mktemp("model") / "thinker"
    shutil.copytree(bundled, folder)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    assert text.count(f"{BEGIN}\n{{%- endif") == 1
    template.write_text(text.replace(f"{BEGIN}\n{{%- endif", f"{BEGIN}{THINKS}{{%- endif"))
    with server_process(tmp_path_factory.mktemp("server") / "log", {"model": str(folder)}, {"api_key": "k"}) as running:
        yield running


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=60) as client:
        yield client


def plain(message: Any) -> Any:
    return [block.model_dump(exclude={"id"}) for block in message.content]


@pytest.fixture(scope="module")
def answer(client: openai.OpenAI) -> str:
    """What the model says without reasoning."""
    extra = {"enable_thinking": False}
    chat = client.chat.completions.create(**ASK, temperature=0, extra_body=extra).choices[0].message.content
    assert chat is not None
    assert "#### " in chat
    return chat


def test_messages_whole_and_streamed(claude: Any, answer: str) -> None:
    ask: Any = {**ASK, **GREEDY, "thinking": {"type": "disabled"}}
    whole = claude.messages.create(**ask)
    assert (whole.content[0].text, whole.stop_reason) == (answer, "end_turn")
    counted = claude.messages.count_tokens(**{k: ask[k] for k in ("model", "messages", "thinking")})
    usage = whole.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    with claude.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == answer
    assert plain(last) == plain(whole)
    assert (last.stop_reason, last.usage.output_tokens) == ("end_turn", usage.output_tokens)


def test_messages_stop_and_go_on(claude: Any, answer: str) -> None:
    ask: Any = {**ASK, **GREEDY, "thinking": {"type": "disabled"}}
    cut = claude.messages.create(**ask, stop_sequences=["####"])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", "####")
    assert cut.content[0].text == answer.partition("####")[0]
    begun = {"role": "assistant", "content": [{"type": "text", "text": cut.content[0].text.rstrip() + "\n####"}]}
    more = claude.messages.create(**ask | {"messages": [*ask["messages"], begun]})
    assert more.content[0].text.strip() == answer.partition("####")[2].strip()


@pytest.mark.parametrize("streamed", [False, True])
def test_messages_think_within_their_budget(claude: Any, streamed: bool) -> None:
    ask: Any = {**ASK, **GREEDY, "thinking": {"type": "enabled", "budget_tokens": BUDGET}}
    if streamed:
        with claude.messages.stream(**ask) as stream:
            message = stream.get_final_message()
    else:
        message = claude.messages.create(**ask)
    thinking, text = message.content
    assert (thinking.type, bool(thinking.thinking), text.type) == ("thinking", True, "text")
    again = [*ask["messages"], {"role": "assistant", "content": message.content}, {"role": "user", "content": "Sure?"}]
    assert claude.messages.create(**ask | {"messages": again}).content


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, {"type": "enabled", "budget_tokens": BUDGET}])
def test_messages_call_tools_and_take_results(claude: Any, thinking: Any) -> None:
    ask: Any = {**ASK, "tools": TOOLS, "tool_choice": ONE, "thinking": thinking}
    with claude.messages.stream(**ask, extra_body={"temperature": 1, "seed": 1}) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    [call] = [block for block in message.content if block.type == "tool_use"][:1]
    check(json.dumps(call.input))
    assert message.content[0].type == ("tool_use" if thinking["type"] == "disabled" else "thinking")
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "7"}
        for block in message.content
        if block.type == "tool_use"
    ]
    turns = [*ask["messages"], {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    assert claude.messages.create(**ask | {"messages": turns, "tool_choice": {"type": "none"}}).stop_reason


def test_messages_errors_are_the_clients_own(claude: Any, server: ServerProcess) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(**ASK, extra_body={"temperature": -1})
    with pytest.raises(anthropic.NotFoundError, match="not served here"):
        claude.messages.create(**ASK | {"model": "other"})
    with (
        anthropic.Anthropic(base_url=server.url, api_key="no", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError, match="API key"),
    ):
        stranger.messages.create(**ASK)


def test_responses_whole_streamed_kept_and_gone_on_from(client: openai.OpenAI, answer: str) -> None:
    ask: Any = {"model": "thinker", "temperature": 0, "max_output_tokens": 300}
    ask["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
    whole = client.responses.create(**ask, input=QUESTION)
    assert (whole.output_text, whole.status) == (answer, "completed")
    with client.responses.stream(**ask, input=QUESTION) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        last = stream.get_final_response()
    assert "".join(deltas) == last.output_text == answer
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert client.responses.retrieve(whole.id).output_text == answer

    question = "And if he gives 2 apples away?"
    more = client.responses.create(**ask, input=question, previous_response_id=whole.id, store=False)
    turns: Any = [*ASK["messages"], {"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    said = client.chat.completions.create(
        **ASK | {"messages": turns}, temperature=0, extra_body={"enable_thinking": False}
    )
    assert more.output_text == said.choices[0].message.content
    client.responses.delete(whole.id)
    for forgotten in (whole.id, more.id):
        with pytest.raises(openai.NotFoundError, match="is kept here"):
            client.responses.retrieve(forgotten)


def test_responses_keep_to_a_schema_after_reasoning(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model="thinker",
        input=QUESTION,
        text_format=Basket,
        max_output_tokens=300,
        reasoning={"effort": "low"},
        extra_body={"max_thinking_tokens": BUDGET},
    )
    assert isinstance(parsed.output_parsed, Basket)
    assert [item.type for item in parsed.output] == ["reasoning", "message"]
    assert parsed.usage is not None
    assert parsed.usage.output_tokens_details.reasoning_tokens >= BUDGET


def test_responses_call_functions_and_take_results(client: openai.OpenAI) -> None:
    ask: Any = {"model": "thinker", "tools": FUNCTIONS, "max_output_tokens": 300}
    ask["extra_body"] = {"max_thinking_tokens": BUDGET, "seed": 1}
    with client.responses.stream(**ask, input=QUESTION, tool_choice="required", parallel_tool_calls=False) as stream:
        first = stream.get_final_response()
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    call: Any = first.output[-1]
    check(call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    for given, before in (([result], first.id), ([{"role": "user", "content": QUESTION}, *first.output, result], None)):
        more = client.responses.create(**ask, input=given, previous_response_id=before, tool_choice="none")
        assert more.status in ("completed", "incomplete")


def test_responses_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.responses.create(model="thinker", input="x", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="web_search"):
        client.responses.create(model="thinker", input="x", tools=[{"type": "web_search"}])
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="thinker", input="x", previous_response_id="resp_none")


def test_budgets_hold_beside_others_and_under_a_schema(client: openai.OpenAI, answer: str) -> None:
    def ask(i: int) -> Any:
        extra: dict[str, Any] = {"enable_thinking": False} if i % 4 == 0 else {"max_thinking_tokens": 2 * (i % 4)}
        wanted: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
        held = {"response_format": wanted} if i % 4 == 2 else {}
        return client.chat.completions.create(
            **ASK, temperature=0, **held, extra_body={**extra, "return_token_ids": True}
        ).choices[0]

    with ThreadPoolExecutor(12) as pool:
        choices = list(pool.map(ask, range(12)))
    for i, choice in enumerate(choices):
        ids = choice.model_extra["token_ids"]
        if i % 4 == 0:
            assert choice.message.content == answer
            continue
        end = ids.index(1047)  # </think>
        assert end == 2 * (i % 4)
        if i % 4 == 2:
            check(choice.message.content)
        assert choice.message.reasoning_content


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", b'{"max_tokens": 9, "messages": ' + b"[" * 9000),
        (
            "/v1/messages",
            b'{"max_tokens": 9, "messages": [{"role": "user", "content": [' + b"[]," * 200_000 + b"[]]}]}",
        ),
        ("/v1/messages", b'{"max_tokens": 99999999999, "messages": [{"role": "user", "content": "x"}]}'),
        ("/v1/messages/count_tokens", b'{"messages": {}}'),
        ("/v1/responses", b'{"input": ' + b'{"a":' * 9000),
        ("/v1/responses", b'{"input": [' + b"{}," * 200_000 + b"{}]}"),
        ("/v1/responses", b'{"input": "x", "previous_response_id": {}}'),
        ("/v1/responses", b'{"input": "' + b"x" * 200_000 + b'"}'),
    ],
)
def test_one_bad_body_gets_an_error_of_its_api_and_harms_no_other(
    server: ServerProcess, client: openai.OpenAI, answer: str, path: str, body: bytes
) -> None:
    with ThreadPoolExecutor(2) as pool:
        extra = {"enable_thinking": False}
        good = pool.submit(client.chat.completions.create, **ASK, temperature=0, extra_body=extra)
        headers = {"x-api-key": "k", "content-type": "application/json"}
        bad = httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=60)
        assert bad.status_code == 400
        error = bad.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert ("param" in error) == (path == "/v1/responses")
        assert good.result().choices[0].message.content == answer
