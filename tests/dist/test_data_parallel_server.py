"""`thalweg serve --data-parallel-size 2 --enable-expert-parallel` over HTTP, to its end by a rank's death."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.dist.processes import children, command, needs_proc, serving, until
from thalweg import LLM, SamplingParams

pytestmark = [needs_proc, pytest.mark.slow]
ARGUMENTS = ("--data-parallel-size", "2", "--enable-expert-parallel", "--expert-metrics", "--max-num-seqs", "4")
PROMPTS = [[5, 9, 2, 7] * (n + 1) for n in range(6)]


def ask(url: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_answers_sessions_metrics_and_the_death_of_a_rank(folder: Path, tmp_path: Path) -> None:
    with LLM(str(folder), max_num_seqs=4) as llm:
        greedy = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, greedy)]
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    with serving(tmp_path / "log", tmp, str(folder), *ARGUMENTS) as server:
        url = server.url()
        said = (tmp_path / "log").read_text()
        assert "experts         4 of 8 on each of 2 data-parallel ranks" in said
        engines = sorted(c for c in children(server.process.pid) if "processes.main" in command(c))
        assert len(engines) == 2
        server._seen.update(engines)

        options = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda prompt: ask(url, prompt=prompt, **options), PROMPTS))
        assert [answer["choices"][0]["token_ids"] for answer in answers] == expected

        until(lambda: metrics(url)["thalweg_num_requests_running"] == 0, "requests run on", 5, every=0.1)
        found = metrics(url)
        for name, total in (("generation_tokens", "generation_tokens"), ("prompt_tokens", "prompt_tokens")):
            by_rank = [found[f'thalweg_rank_{name}_total{{rank="{rank}"}}'] for rank in range(2)]
            assert all(by_rank)
            assert sum(by_rank) == found[f"thalweg_{total}_total"]

        # Each token that went through the model took two experts of each of three layers. The last token of an answer
        # does not go through it, but may be under way when that is seen.
        experts = {name: n for name, n in found.items() if name.startswith("thalweg_expert_tokens_total")}
        assert len(experts) == 3 * 8
        least = sum(map(len, PROMPTS)) + len(PROMPTS) * (20 - 1)
        for layer in (1, 2, 3):
            counts = [experts[f'thalweg_expert_tokens_total{{expert="{e}",layer="{layer}"}}'] for e in range(8)]
            assert 2 * least <= sum(counts) <= 2 * (least + len(PROMPTS))

        long = list(range(3, 150))
        created = httpx.post(f"{url}/v1/sessions", json={"name": "s", "prompt": long}, timeout=60)
        assert created.status_code == 200, created.text
        turn = ask(url, session="s", prompt=[5, 6], max_tokens=3)
        assert turn["usage"]["prompt_tokens"] == len(long) + 2
        assert httpx.delete(f"{url}/v1/sessions/s").status_code == 200

        with httpx.stream(
            "POST", f"{url}/v1/completions", timeout=30,
            json={"prompt": PROMPTS[0], "max_tokens": 450, "ignore_eos": True, "stream": True},
        ) as response:  # fmt: skip
            lines = response.iter_lines()
            next(lines)
            os.kill(engines[1], signal.SIGKILL)
            began = time.monotonic()
            assert any("data-parallel rank" in line or "engine died" in line for line in lines)
        assert server.check_gone(10) == 3
        assert time.monotonic() - began < 10
        last = (tmp_path / "log").read_text().splitlines()[-1]
        assert last.startswith("error: the engine")
        assert "rank" in last


@pytest.mark.exhaustive
def test_a_signal_lets_requests_of_every_rank_finish(folder: Path, tmp_path: Path) -> None:
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    with serving(tmp_path / "log", tmp, str(folder), *ARGUMENTS) as server, ThreadPoolExecutor(4) as pool:
        url = server.url()
        server._seen.update(c for c in children(server.process.pid) if "processes.main" in command(c))
        answers = [pool.submit(ask, url, prompt=p, max_tokens=100, ignore_eos=True) for p in PROMPTS[:4]]
        until(lambda: metrics(url)["thalweg_num_requests_running"] == 4, "they do not run", 20)
        server.process.terminate()
        assert [answer.result()["usage"]["completion_tokens"] for answer in answers] == [100] * 4
        assert server.check_gone(10) == 0
