"""return_token_ids: the tokens of an answer beside its text, and an event for each of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.server_double import ANSWER, EOS
from tests.unit.test_server_api import CHAT, chunks, post

IDS = [*ANSWER.encode(), EOS]
PROMPTS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("/v1/chat/completions", CHAT, list(b"user:hi\nassistant:")),
    ("/v1/completions", {"prompt": "hi"}, list(b"hi")),
]


@pytest.mark.parametrize(("path", "body", "prompt"), PROMPTS)
def test_a_whole_answer_has_its_tokens_and_the_prompts(path: str, body: dict[str, Any], prompt: list[int]) -> None:
    answer = post(path, {**body, "return_token_ids": True, "n": 2})
    assert [choice["token_ids"] for choice in answer["choices"]] == [IDS] * 2
    has_prompt = [answer] if "chat" in path else answer["choices"]
    assert [each["prompt_token_ids"] for each in has_prompt] == [prompt] * len(has_prompt)


@pytest.mark.parametrize(("path", "body", "prompt"), PROMPTS)
def test_a_stream_has_an_event_for_each_token(path: str, body: dict[str, Any], prompt: list[int]) -> None:
    got = chunks(path, {**body, "return_token_ids": True, "stop": ["not in it"]})
    choices = [choice for chunk in got for choice in chunk["choices"]]
    assert [choice["token_ids"] for choice in choices if "token_ids" in choice] == [[i] for i in IDS]
    texts = [choice["delta"].get("content", "") if "chat" in path else choice["text"] for choice in choices]
    assert "".join(texts) == ANSWER
    assert texts.count("") >= 2  # half a character, and the token that ended it
    first = got[0] if "chat" in path else choices[0]
    assert first["prompt_token_ids"] == prompt
    assert sum("prompt_token_ids" in chunk for chunk in (got if "chat" in path else choices)) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "prompt"), PROMPTS)
def test_nobody_who_does_not_ask_gets_any(path: str, body: dict[str, Any], prompt: list[int], stream: bool) -> None:
    for more in ({}, {"return_token_ids": False}, {"return_token_ids": None}):
        got = chunks(path, {**body, **more}) if stream else [post(path, {**body, **more})]
        assert "token_ids" not in str(got)


def test_each_prompt_has_its_own() -> None:
    answer = post("/v1/completions", {"prompt": ["a", "bc"], "echo": True, "return_token_ids": True})
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[97], [98, 99]]
    assert [choice["token_ids"] for choice in answer["choices"]] == [IDS] * 2
