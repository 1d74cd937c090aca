"""The routes' answers: shapes, parameters, streaming, logprobs. The engine is a double."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.server_double import ANSWER, EOS, ClientDouble, run
from thalweg.config.hf import GenerationConfig
from thalweg.core import SamplingParams

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
N_TOKENS = len(ANSWER.encode()) + 1  # <eos> counts


def post(path: str, body: dict[str, Any], client: ClientDouble | None = None) -> dict[str, Any]:
    async def work(http: Any, _: ClientDouble) -> dict[str, Any]:
        response = await http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return run(work, client)


def chunks(path: str, body: dict[str, Any], client: ClientDouble | None = None) -> list[dict[str, Any]]:
    async def work(http: Any, _: ClientDouble) -> str:
        response = await http.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return response.text

    *events, end = run(work, client).removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(e.removeprefix("data: ")) for e in events]


def test_chat_answer_has_openais_shape_and_counts_right() -> None:
    answer = post("/v1/chat/completions", CHAT)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "double"
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "logprobs": None, "finish_reason": "stop"}
    ]
    prompt = len(b"user:hi\nassistant:")
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": N_TOKENS,
        "total_tokens": prompt + N_TOKENS,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_streamed_chat_is_the_whole_one_in_pieces() -> None:
    got = chunks("/v1/chat/completions", CHAT)
    assert {c["object"] for c in got} == {"chat.completion.chunk"}
    assert len({c["id"] for c in got}) == 1
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in got) == ANSWER
    assert [c["choices"][0]["finish_reason"] for c in got] == [None] * (len(got) - 1) + ["stop"]
    assert all("usage" not in c for c in got)


def test_stream_options_include_usage() -> None:
    got = chunks("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
    assert [c["usage"] for c in got[:-1]] == [None] * (len(got) - 1)
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == N_TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_before_it(stream: bool) -> None:
    body = {**CHAT, "stop": ["zzz", ", w"]}
    if stream:
        got = chunks("/v1/chat/completions", body)
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in got)
        reason = got[-1]["choices"][0]["finish_reason"]
    else:
        choice = post("/v1/chat/completions", body)["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("Hello", "stop")


def test_max_tokens_ends_with_length_and_max_completion_tokens_wins() -> None:
    answer = post("/v1/chat/completions", {**CHAT, "max_tokens": 9, "max_completion_tokens": 4})
    assert answer["choices"][0]["message"]["content"] == "Hell"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4


def test_parameters_reach_the_engine() -> None:
    client = ClientDouble()
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "seed": 5,
        "ignore_eos": True,
        "min_tokens": 3,
    }
    more = {"n": 3, "stop": "x", "stop_token_ids": [9], "logit_bias": {"12": -100}, "user": "u", "unknown": {}}
    post("/v1/chat/completions", {**CHAT, **fields, **more}, client)
    assert [r.params.seed for r in client.seen] == [5, 6, 7]
    params = client.seen[0].params
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("x",), (9,), {12: -100})
    assert params.max_tokens is None
    assert params.logprobs is None


def test_the_checkpoints_sampling_defaults_stand_where_the_request_is_silent() -> None:
    sampling = {
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.5, "max_tokens": 9,
    }  # fmt: skip
    for given in ({}, sampling):
        client = ClientDouble(GenerationConfig(sampling=given))
        post("/v1/completions", {"prompt": "x", "temperature": None}, client)
        post("/v1/chat/completions", CHAT, client)
        completion, chat = (request.params for request in client.seen)
        assert completion == SamplingParams(**given | {"max_tokens": 16})  # OpenAI's default, as elsewhere
        assert chat == SamplingParams(**{"max_tokens": None} | given)

        own = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "max_tokens": 3}
        post("/v1/chat/completions", {**CHAT, **own}, client)
        assert client.seen[2].params == SamplingParams(**own)

        async def card(http: Any, _: ClientDouble) -> dict[str, Any]:
            return (await http.get("/v1/models/double")).json()

        assert run(card, ClientDouble(GenerationConfig(sampling=given)))["default_sampling_params"] == given


def test_last_seed_goes_round() -> None:
    client = ClientDouble()
    post("/v1/completions", {"prompt": "x", "seed": 2**64 - 1, "n": 2}, client)
    assert [r.params.seed for r in client.seen] == [2**64 - 1, 0]


def test_chat_logprobs() -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 4, "max_tokens": 9}
    content = post("/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
    assert len(content) == 9
    assert content[0] == {
        "token": "H",
        "logprob": -1.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "I", "logprob": -0.5, "bytes": [73]},
            {"token": "H", "logprob": -1.5, "bytes": [72]},
            {"token": "J", "logprob": -2.5, "bytes": [74]},
            {"token": "K", "logprob": -9999.0, "bytes": [75]},
        ],
    }
    assert content[8]["token"] == "bytes:\\xc3"  # half of an o with dots
    streamed = [c["choices"][0]["logprobs"] for c in chunks("/v1/chat/completions", body)]
    assert [entry for logprobs in streamed if logprobs for entry in logprobs["content"]] == content


def test_streamed_logprobs_do_not_wait_for_text_that_a_stop_string_holds_back() -> None:
    body = {**CHAT, "logprobs": True, "stop": ["Hello, you"]}
    entries = [c["choices"][0]["logprobs"] for c in chunks("/v1/chat/completions", body)]
    assert sum(len(e["content"]) for e in entries if e) == N_TOKENS


def test_chosen_token_alone_has_logprobs_without_top_ones() -> None:
    content = post("/v1/chat/completions", {**CHAT, "logprobs": True})["choices"][0]["logprobs"]["content"]
    assert len(content) == N_TOKENS
    assert all(entry["top_logprobs"] == [] and entry["logprob"] == -1.5 for entry in content)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([1, 2, 256], [[1, 2, 256]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_every_form_of_prompt(prompt: Any, expected: list[list[int]]) -> None:
    client = ClientDouble()
    answer = post("/v1/completions", {"prompt": prompt, "n": 2}, client)
    assert [r.prompt_token_ids for r in client.seen] == [ids for ids in expected for _ in range(2)]
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(expected)))
    assert {c["text"] for c in answer["choices"]} == {ANSWER}
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["completion_tokens"] == 2 * len(expected) * N_TOKENS


def test_streamed_completion_of_many_choices() -> None:
    got = chunks("/v1/completions", {"prompt": ["a", "b"], "n": 2, "stream_options": {"include_usage": True}})
    texts = [""] * 4
    for chunk in got[:-1]:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [ANSWER] * 4
    assert got[-1]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 4 * N_TOKENS,
        "total_tokens": 2 + 4 * N_TOKENS,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "cached"), [
    ("/v1/chat/completions", {**CHAT, "n": 3}, 64),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, 2 * 64),
])  # fmt: skip
def test_cached_tokens_are_counted_once_per_prompt(path: str, body: dict[str, Any], cached: int, stream: bool) -> None:
    client = ClientDouble(cached=64)
    if stream:
        usage = chunks(path, {**body, "stream_options": {"include_usage": True}}, client)[-1]["usage"]
    else:
        usage = post(path, body, client)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": cached}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_cache_salt_reaches_the_engine(path: str) -> None:
    client = ClientDouble()
    body = CHAT if "chat" in path else {"prompt": "a"}
    for salt in ({"cache_salt": "mine"}, {"cache_salt": None}, {}):
        post(path, {**body, **salt}, client)
    assert [r.params.cache_salt for r in client.seen] == ["mine", "", ""]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("prompt", ["größe", list("größe".encode()), "x"])
def test_echo_with_logprobs_covers_prompt_and_output(prompt: Any, max_tokens: int, stream: bool) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    if stream:
        pieces = [c["choices"][0] for c in chunks("/v1/completions", body)]
        text = "".join(p["text"] for p in pieces)
        merged = {k: [x for p in pieces for x in p["logprobs"][k]] for k in pieces[0]["logprobs"]}
    else:
        choice = post("/v1/completions", body)["choices"][0]
        text, merged = choice["text"], choice["logprobs"]
        assert choice["finish_reason"] == "length"
    prompt_text = "x" if prompt == "x" else "größe"
    assert text == prompt_text + ANSWER[:max_tokens]
    n = len(text.encode())
    assert {len(v) for v in merged.values()} == {n}
    assert merged["token_logprobs"] == [None] + [-1.5] * (n - 1)
    assert merged["top_logprobs"][0] is None
    # The most likely token and, where it is another, the chosen one.
    assert all(sorted(top.values()) == [-1.5, -0.5] for top in merged["top_logprobs"][1:])
    if prompt == "x":
        assert merged["text_offset"] == list(range(n))
    else:
        assert merged["text_offset"][:8] == [0, 1, 2, 2, 3, 3, 4, 5][:n]
        assert merged["tokens"][:3] == ["g", "r", "bytes:\\xc3"]


def test_logprobs_without_echo_begin_at_offset_zero_and_count_the_last_token() -> None:
    logprobs = post("/v1/completions", {"prompt": "abc", "logprobs": 0})["choices"][0]["logprobs"]
    assert logprobs["tokens"][-1] == "<eos>"
    assert len(logprobs["tokens"]) == N_TOKENS
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"][-1] == len(ANSWER)
    assert logprobs["top_logprobs"][0] == {"H": -1.5}


def test_special_tokens_of_an_echoed_prompt_are_text() -> None:
    body = {"prompt": [97, EOS, 98], "echo": True, "logprobs": 0, "max_tokens": 1}
    choice = post("/v1/completions", body)["choices"][0]
    assert choice["text"] == "a<eos>bH"
    assert choice["logprobs"]["text_offset"] == [0, 1, 6, 7]


def test_echo_without_logprobs() -> None:
    choice = post("/v1/completions", {"prompt": "abc", "echo": True, "max_tokens": 2})["choices"][0]
    assert choice == {"index": 0, "text": "abcHe", "logprobs": None, "finish_reason": "length"}


def test_tokenize_and_back() -> None:
    assert post("/tokenize", {"prompt": "hé"}) == {"tokens": [104, 195, 169], "count": 3, "max_model_len": 1000}
    assert post("/tokenize", {"prompt": ""})["tokens"] == []
    chat = post("/tokenize", {**CHAT, "add_generation_prompt": False})
    assert bytes(chat["tokens"]) == b"user:hi\n"
    assert post("/detokenize", {"tokens": [104, 195, 169, EOS]}) == {"prompt": "hé<eos>"}


def test_long_texts_are_encoded_like_short_ones() -> None:
    assert post("/tokenize", {"prompt": "ab" * 50_000})["tokens"] == [97, 98] * 50_000


def test_developer_messages_are_system_messages() -> None:
    client = ClientDouble()
    post("/v1/chat/completions", {"messages": [{"role": "developer", "content": "be"}]}, client)
    assert bytes(client.seen[0].prompt_token_ids) == b"system:be\nassistant:"


def test_template_options_reach_the_template() -> None:
    body = {**CHAT, "add_generation_prompt": False, "chat_template_kwargs": {"style": "brief "}}
    client = ClientDouble()
    post("/v1/chat/completions", body, client)
    assert bytes(client.seen[0].prompt_token_ids) == b"brief user:hi\n"
    assert bytes(post("/tokenize", body)["tokens"]) == b"brief user:hi\n"


def test_tokenizer_info() -> None:
    async def work(http: Any, _: ClientDouble) -> Any:
        return (await http.get("/tokenizer_info")).json()

    assert run(work) == {"bos_token": None, "eos_token": "<eos>", "chat_template": None}


def test_models_version_and_health() -> None:
    async def work(http: Any, _: ClientDouble) -> list[Any]:
        paths = ("/v1/models", "/v1/models/double", "/version", "/health")
        return [(await http.get(p)).json() for p in paths]

    listed, one, version, health = run(work)
    assert [m["id"] for m in listed["data"]] == ["double"]
    assert one == listed["data"][0]
    assert one["max_model_len"] == 1000
    assert set(version) == {"version"}
    assert health == {"status": "ok"}


def test_the_documentation_page_has_every_field_and_loads_nothing() -> None:
    async def work(http: Any, _: ClientDouble) -> Any:
        return (await http.get("/docs")), (await http.get("/openapi.json")).json()

    response, openapi = run(work)
    assert response.headers["content-type"].startswith("text/html")
    for schema in openapi["components"]["schemas"].values():
        if schema.get("title", "").endswith("Body"):
            assert all(f"<code>{name}</code>" in response.text for name in schema["properties"])
    assert all(path in response.text for path in openapi["paths"])
    assert "<script" not in response.text
    assert "http" not in response.text.replace("https?", "")
