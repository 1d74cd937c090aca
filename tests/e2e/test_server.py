"""The HTTP server with a real engine process, seen through the openai client and plain HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.tiny_model import CONTEXT, VOCAB, ServerProcess, server_process, start_server
from thalweg import LLM, SamplingParams

MESSAGES: Any = [{"role": "user", "content": "Hello <|im_end|> world"}]
LIMITS = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "block_size": 16}


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with server_process(log, {"model": str(folder), **LIMITS}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def offline(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **LIMITS) as llm:
        yield llm


def metric(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    [value] = [line.split()[1] for line in text.splitlines() if line.startswith(f"thalweg_{name} ")]
    return float(value)


def wait_until_idle(server: ServerProcess) -> None:
    """Every slot and block is free again, which the engine is to say by itself."""
    deadline = time.monotonic() + 5
    names = ("num_requests_running", "num_requests_waiting", "state_slots_used", "kv_cache_usage_perc")
    while any(metric(server, name) for name in names):
        assert time.monotonic() < deadline, {name: metric(server, name) for name in names}
        time.sleep(0.05)


def test_models(client: openai.OpenAI, server: ServerProcess) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_streamed_chat_is_the_offline_answer(client: openai.OpenAI, offline: LLM) -> None:
    [expected] = offline.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=40))
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=40)
    assert whole.choices[0].message.content == expected.outputs[0].text
    assert whole.choices[0].finish_reason == expected.outputs[0].finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert whole.usage.completion_tokens == len(expected.outputs[0].token_ids)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.outputs[0].text
    assert chunks[-1].usage == whole.usage


def test_chat_without_max_tokens_runs_to_the_end_of_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


def test_seeded_choices_are_the_seeds_one_by_one(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int) -> list[str]:
        answer = client.completions.create(model="tiny", prompt="Once", seed=seed, n=n, max_tokens=12)
        return [c.text for c in answer.choices]

    together = texts(11, 3)
    assert together == [texts(11 + i, 1)[0] for i in range(3)]
    assert len(set(together)) == 3


def test_echoed_logprobs_are_those_of_generation(client: openai.OpenAI, offline: LLM) -> None:
    """How evaluation harnesses score a text: the same figures, whether its tokens were given or generated."""
    ids = [5, 300, 7, 70, 200]
    made = client.completions.create(
        model="tiny", prompt=ids, max_tokens=6, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    generated = made.choices[0].logprobs
    assert generated is not None
    [expected] = offline.generate(ids, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    full = ids + expected.outputs[0].token_ids
    for max_tokens in (0, 1):
        scored = client.completions.create(model="tiny", prompt=full, max_tokens=max_tokens, echo=True, logprobs=2)
        logprobs = scored.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert len(logprobs.token_logprobs) == len(full) + max_tokens
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[5:11] == pytest.approx(generated.token_logprobs, abs=1e-4)
        assert logprobs.tokens is not None
        assert logprobs.tokens[5:11] == generated.tokens


def test_chat_logprobs_sum_to_at_most_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=5, max_tokens=3, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 5
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert sum(2.718281828**top.logprob for top in entry.top_logprobs) <= 1.0001


def test_stop_string(client: openai.OpenAI) -> None:
    def text(**more: Any) -> str:
        answer = client.completions.create(
            model="tiny", prompt="abc", temperature=0, max_tokens=60, extra_body={"ignore_eos": True}, **more
        )
        assert answer.choices[0].finish_reason == ("stop" if more else "length")
        return answer.choices[0].text

    whole = text()
    stop = whole[len(whole) // 2 :][:2]
    assert text(stop=[stop]) == whole[: whole.index(stop)]


def test_sixteen_streams_at_once_equal_solo_runs(server: ServerProcess, client: openai.OpenAI) -> None:
    prompts = [[(7 * i + 3 * j) % 262 for j in range(3 + 11 * i)] for i in range(16)]
    options: Any = {"model": "tiny", "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    solo = [client.completions.create(prompt=p, **options).choices[0].text for p in prompts]

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: list[int]) -> str:
                stream = await client.completions.create(prompt=prompt, stream=True, **options)
                return "".join([c.choices[0].text async for c in stream])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(main()) == solo
    assert client.completions.create(prompt=prompts, **options).choices[9].text == solo[9]
    wait_until_idle(server)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_everything(server: ServerProcess, stream: bool) -> None:
    before = metric(server, "generation_tokens_total")
    body = {"prompt": ["a"] * 16, "n": 2, "max_tokens": CONTEXT, "ignore_eos": True, "stream": stream}
    with httpx.Client(base_url=server.url) as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.3)
    wait_until_idle(server)
    assert metric(server, "generation_tokens_total") - before < 32 * (CONTEXT - 1)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": [1] * CONTEXT}, f"the prompt has {CONTEXT} tokens"),
        ({"prompt": [VOCAB]}, f"prompt token 0 is {VOCAB}"),
        ({"prompt": "x", "stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"prompt": "x", "logit_bias": {str(VOCAB): 1}}, "logit_bias"),
        ({"prompt": ["x", [1, 2]]}, "prompt"),
    ],
)
def test_requests_that_cannot_run_are_400(
    server: ServerProcess, body: dict[str, Any], message: str, stream: bool
) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": stream})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="role"):
        client.chat.completions.create(model="tiny", messages=[{"role": "judge", "content": "x"}])  # type: ignore[list-item]


def test_metrics_count_tokens(server: ServerProcess, client: openai.OpenAI) -> None:
    first = ("time_to_first_token_seconds_count", "first_token_lag_seconds_count")
    names = ("prompt_tokens_total", "generation_tokens_total", *first)
    before = [metric(server, name) for name in names]
    client.completions.create(model="tiny", prompt=[1, 2, 3], max_tokens=5, extra_body={"ignore_eos": True})
    assert [metric(server, n) - b for n, b in zip(names, before, strict=True)] == [3, 5, 1, 1]


def test_the_log_has_no_traceback(server: ServerProcess) -> None:
    assert "Traceback" not in server.errors()


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the engine process by /proc")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish(folder: Path, tmp_path: Path, number: int) -> None:
    with server_process(tmp_path / "log", {"model": str(folder), **LIMITS}) as server:
        body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            os.killpg(server.process.pid, number)  # as Ctrl-C does
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.process.wait(20) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_engine_starts_ends_it(folder: Path, tmp_path: Path, number: int) -> None:
    process = start_server(tmp_path / "log", {"model": str(folder)})
    try:
        deadline = time.monotonic() + 20
        while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, number)  # as Ctrl-C does
        assert process.wait(15) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()


def test_what_cannot_start_is_one_line_and_exit_code_2(folder: Path, tmp_path: Path, server: ServerProcess) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"model": str(tmp_path / "nowhere")}, {}, "no such folder"),
        ({"model": str(broken)}, {}, "safetensors"),
        ({"model": str(folder)}, {"port": port}, f"--port {port}"),
        ({"model": str(folder)}, {"api_key": ""}, "--api-key"),
    ]
    runs = [start_server(tmp_path / f"log{i}", e, s) for i, (e, s, _) in enumerate(cases)]
    for i, (process, (_, _, words)) in enumerate(zip(runs, cases, strict=True)):
        assert process.wait(30) == 2
        lines = (tmp_path / f"log{i}").read_text().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert words in lines[0]
