"""The prefix cache over HTTP: what answers say of it, metrics, the log, salts."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tiny_model import server_process
from thalweg.cli import main
from thalweg.config.model_source import model_folder

STORY = "Tom has 4 apples and 3 pears. " * 20


def ask(url: str, **body: Any) -> dict[str, Any]:
    data, headers = (
        json.dumps({"temperature": 0, "max_tokens": 6, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    text = urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60).read().decode()
    if not body.get("stream"):
        return json.loads(text)
    return json.loads(text.split("data: ")[-2])  # the last piece, before [DONE]


def cached(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_second_turn_is_cached_and_said_to_be(tmp_path: Path) -> None:
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    with server_process(tmp_path / "log", {}, {"log_level": "debug"}) as server:
        chat, completions = f"{server.url}/v1/chat/completions", f"{server.url}/v1/completions"
        messages = [{"role": "user", "content": STORY}]
        first = ask(chat, messages=messages, max_tokens=100)
        turn = [*messages, first["choices"][0]["message"], {"role": "user", "content": "And now?"}]
        second = ask(chat, messages=turn)
        streamed = ask(chat, messages=turn, stream=True, stream_options={"include_usage": True})
        total = first["usage"]["prompt_tokens"]
        assert cached(first) == 0
        assert total - 65 <= cached(second) < second["usage"]["prompt_tokens"]
        assert cached(streamed) >= cached(second)

        assert cached(ask(completions, prompt=STORY, n=2)) == 0
        plain = ask(completions, prompt=STORY, n=2)
        assert cached(plain) == (plain["usage"]["prompt_tokens"] - 1) // 64 * 64
        assert cached(ask(completions, prompt=STORY, cache_salt="mine")) == 0
        assert cached(ask(completions, prompt=STORY, cache_salt="mine")) > 0
        assert cached(ask(completions, prompt=STORY, echo=True, logprobs=0)) == 0

        text = urllib.request.urlopen(f"{server.url}/metrics", timeout=60).read().decode()
    samples = dict(
        re.findall(r"^thalweg_(prefix_cache_\S+|state_snapshots_\w+|kv_blocks_kept) (\S+)$", text, re.MULTILINE)
    )
    assert 0 < float(samples["prefix_cache_hits_total"]) < float(samples["prefix_cache_queries_total"])
    assert float(samples['prefix_cache_misses_total{reason="other_salt"}']) == 1
    assert float(samples['prefix_cache_misses_total{reason="prompt_wanted"}']) == 1
    assert 0 < float(samples["state_snapshots_used"]) <= float(samples["state_snapshots_total"])
    assert float(samples["kv_blocks_kept"]) > 0
    assert re.search(
        r"0 of \d+ prompt tokens are cached, 0 were seen; the rest is other_salt", (tmp_path / "log").read_text()
    )


def test_a_benchmark_of_conversations_finds_what_it_should(tmp_path: Path) -> None:
    """Each turn but the first finds all blocks that the one before it computed."""
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    conversations, turns, first, new, output = 6, 4, 150, 40, 70
    with server_process(tmp_path / "log", {"max_num_seqs": 4}) as server:
        arguments = ["bench", "serve", "--base-url", server.url, "--dataset-name", "multi_turn", "--ignore-eos"]
        arguments += ["--num-prompts", str(conversations), "--num-warmups", "0", "--multi-turn-think-time", "0.05"]
        arguments += ["--multi-turn-num-turns", str(turns), "--multi-turn-first-len", str(first)]
        arguments += ["--multi-turn-input-len", str(new), "--multi-turn-output-len", str(output)]
        assert (
            main([*arguments, "--save-result", "--result-dir", str(tmp_path), "--result-filename", "found.json"]) == 0
        )
    found = json.loads((tmp_path / "found.json").read_text())
    prompts = [first + turn * (new + output) for turn in range(turns)]
    assert found["completed"] == conversations * turns
    assert found["total_input_tokens"] == conversations * sum(prompts)
    assert found["total_cached_tokens"] == conversations * sum((p + output - 1) // 64 * 64 for p in prompts[:-1])


def test_forks_of_a_session_compute_its_prompt_once(tmp_path: Path) -> None:
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    with server_process(tmp_path / "log", {}, {}) as server:
        sessions, completions = f"{server.url}/v1/sessions", f"{server.url}/v1/completions"
        root = ask(sessions, name="root", prompt=STORY)
        names = ["root/1", "root/2", "root/3"]
        assert [each["id"] for each in ask(f"{sessions}/root/fork", names=names)["data"]] == names
        kept = root["points"][0]["cached"]
        assert root["tokens"] - 65 <= kept < root["tokens"]
        said = [ask(completions, session=name, prompt=" And", session_save=True) for name in names]
        assert [cached(each) for each in said] == [kept] * 3
        assert len({each["choices"][0]["text"] for each in said}) == 1
        plain = ask(completions, session="root", prompt=" And")
        assert plain["choices"][0]["text"] == said[0]["choices"][0]["text"]
        assert ask(f"{sessions}/root/1/rollback", point=0)["tokens"] == root["tokens"]
        again = ask(completions, session="root/2", prompt="")
        assert cached(again) >= kept


@pytest.mark.slow
def test_a_server_begins_with_what_the_last_one_had_cached(tmp_path: Path) -> None:
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    engine = {"cpu_cache_memory": 64 << 20, "cache_folder": str(tmp_path / "cache"), "max_model_len": 2048}
    found = []
    for i in range(2):
        with server_process(tmp_path / f"log-{i}", engine, {}) as server:
            found.append(cached(ask(f"{server.url}/v1/completions", prompt=STORY)))
            text = urllib.request.urlopen(f"{server.url}/metrics", timeout=60).read().decode()
    assert found[0] == 0
    assert found[1] > 128
    assert re.search(rf"^thalweg_prefix_cache_host_hits_total {found[1]}\.0$", text, re.MULTILINE)
    assert 'thalweg_host_copies_total{kind="blocks_fetched"}' in text
