"""What lm-evaluation-harness (0.4.13) sends to local-completions and local-chat-completions, and how it reads answers.

It scores a text from an echoed prompt with one generated token, which it cuts off, and calls a continuation greedy
where every token's log-probability is exactly the greatest of the ones listed for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.tiny_model import EOS, ServerProcess, server_process
from thalweg import LLM, SamplingParams

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 16}


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(tmp_path_factory.mktemp("server") / "log", {"model": str(folder), **LIMITS}) as running:
        yield running


@pytest.fixture(scope="module")
def offline(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **LIMITS) as llm:
        yield llm


def post(server: ServerProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=30)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def scores(server: ServerProcess, prompts: Any, context_lens: list[int]) -> list[tuple[float, bool]]:
    """Sum of log-probabilities after each context, and whether greedy decoding gives the same."""
    answer = post(
        server,
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    )
    found = []
    for choice, n in zip(sorted(answer["choices"], key=lambda c: c["index"]), context_lens, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][n:-1]
        tops = choice["logprobs"]["top_logprobs"][n:-1]
        greedy = all(p == max(top.values()) for p, top in zip(logprobs, tops, strict=True))
        found.append((sum(logprobs), greedy))
    return found


def expected_score(offline: LLM, ids: list[int], context_len: int) -> tuple[float, bool]:
    logits = offline.prompt_logits(ids)[context_len - 1 : -1]
    rest = torch.tensor(ids[context_len:])
    total = float(logits.log_softmax(-1).gather(1, rest[:, None]).sum())
    return total, bool((logits.argmax(-1) == rest).all())


def test_loglikelihood_of_a_batch_of_token_ids(server: ServerProcess, offline: LLM) -> None:
    contexts = [[5, 300, 7], [70, 200], [9] * 40, [1]]
    greedy = offline.generate(contexts[1], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    rests = [[11, 12, 13], greedy[0].outputs[0].token_ids, [3] * 90, [EOS, 4]]
    prompts = [c + r for c, r in zip(contexts, rests, strict=True)]
    lens = [len(c) for c in contexts]
    got = scores(server, prompts, lens)
    expected = [expected_score(offline, ids, n) for ids, n in zip(prompts, lens, strict=True)]
    assert [g for _, g in got] == [g for _, g in expected]
    assert got[1][1]
    assert [p for p, _ in got] == pytest.approx([p for p, _ in expected], abs=2e-3)
    assert scores(server, prompts[0], lens[:1]) == [pytest.approx(got[0], abs=1e-4)]


def test_loglikelihood_of_texts(server: ServerProcess, offline: LLM) -> None:
    assert offline.tokenizer is not None
    texts = ["hello é wor", "a" * 50]
    ids = [offline.tokenizer.encode(text) for text in texts]
    got = scores(server, texts, [1, 1])
    assert [p for p, _ in got] == pytest.approx([expected_score(offline, i, 1)[0] for i in ids], abs=2e-3)


def test_a_score_does_not_lose_its_last_token_when_generation_ends_at_once(server: ServerProcess) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    for more in ({}, {"logit_bias": {str(EOS): 100}}):
        choice = post(server, "/v1/completions", {**body, **more})["choices"][0]
        assert {len(values) for values in choice["logprobs"].values()} == {4}


def test_generation_until_stop_strings(server: ServerProcess, offline: LLM) -> None:
    prompts = [[5, 300, 7], [70, 200, 9]]
    answer = post(
        server,
        "/v1/completions",
        {
            "prompt": prompts,
            "model": "tiny",
            "max_tokens": 24,
            "temperature": 0,
            "stop": ["\n\n", "Question:", "<|im_end|>"],
            "seed": 1234,
            "repetition_penalty": 1.0,
        },
    )
    params = SamplingParams(temperature=0, max_tokens=24, stop=("\n\n", "Question:", "<|im_end|>"))
    texts = {c["index"]: c["text"] for c in answer["choices"]}
    assert [texts[i] for i in range(2)] == [o.outputs[0].text for o in offline.generate(prompts, params)]


def test_chat_generation(server: ServerProcess) -> None:
    answer = post(
        server,
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hello", "type": "text"}],
            "model": "tiny",
            "max_tokens": 12,
            "temperature": 0,
            "stop": ["\n"],
            "seed": 1234,
        },
    )
    assert isinstance(answer["choices"][0]["message"]["content"], str)


def test_a_harness_can_tokenise_through_the_server(server: ServerProcess, offline: LLM) -> None:
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert "add_generation_prompt" in info["chat_template"]
    ids = post(server, "/tokenize", {"prompt": "hello wor", "add_special_tokens": False})["tokens"]
    assert offline.tokenizer is not None
    assert ids == offline.tokenizer.encode("hello wor")
    assert post(server, "/detokenize", {"tokens": ids})["prompt"] == "hello wor"
