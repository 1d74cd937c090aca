"""`thalweg bench soak`: half a minute of it, and that it notices what it looks for."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tiny_model import server_process, write_tiny_model
from thalweg.bench.server_process import engine_options
from thalweg.bench.soak_clients import Case, Clients, draw_cases, solo
from thalweg.cli import main
from thalweg.config.engine import EngineConfig
from thalweg.config.model_source import model_folder
from thalweg.http_client import HttpClient
from thalweg.tokenizer.load import load_tokenizer

KINDS = (
    *("streamed", "whole", "together", "other api", "left a stream", "left before the answer", "bad", "broke off"),
    "refused",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_at_once(tmp_path: Path) -> None:
    """Few slots and little memory, so that requests are refused, wait and are preempted."""
    file = tmp_path / "soak.json"
    limits = ["--max-num-seqs", "24", "--cache-memory", "10MiB", "--max-queued-requests", "16"]
    assert main(["bench", "soak", "--minutes", "0.5", *limits, "--output-json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["faults"] == []
    assert all(result["counts"].get(kind) for kind in KINDS), result["counts"]
    assert result["counts"]["streamed through SIGTERM"] == 8
    assert result["preemptions"] > 0


def test_what_differs_from_the_solo_run_is_a_fault(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")

    async def work(url: str) -> None:
        http = HttpClient(url)
        [case] = draw_cases(load_tokenizer(folder), 1, 256, 3)
        right = await solo(http, "tiny", case)
        other = Case(right.endpoint, right.request, right.options, right.text + "x", right.tokens)
        fewer = Case(right.endpoint, right.request, right.options, right.text, right.tokens - 1)
        checks: dict[str, Callable[[Clients], Any]] = {"stream": Clients._stream, "whole": Clients._whole}
        for check in checks.values():
            for known, faults in ((right, 0), (other, 1), (fewer, 1)):
                clients = Clients(http, "tiny", [known], 2**31 - 1, 0)
                await check(clients)
                assert len(clients.faults) == faults, clients.faults
        http.close()

    with server_process(tmp_path / "log", {"model": str(folder)}) as server:
        asyncio.run(work(server.url))


def test_cases_are_of_every_kind_and_the_same_again() -> None:
    cases = draw_cases(load_tokenizer(model_folder(None)), 40, 4096, 0)
    assert cases == draw_cases(load_tokenizer(model_folder(None)), 40, 4096, 0)
    lengths = [len(c.request.prompt) for c in cases if c.endpoint == "/v1/completions"]
    assert min(lengths) < 16
    assert max(lengths) > 1000
    assert len({c.endpoint for c in cases}) == 2
    assert {"seed" in c.options for c in cases} == {True, False}


def test_the_command_line_makes_the_same_config() -> None:
    from thalweg.cli.options import engine_config

    options = {"max_num_seqs": 3, "cache_memory": 10 << 20, "enforce_eager": True, "seed": random.randrange(100)}
    config = EngineConfig(model="bundled", op_preference={"*": "reference"}, ignore_config_key=["a", "b"], **options)
    arguments = engine_options(config)
    assert arguments[0] == "bundled"
    assert "--enforce-eager" in arguments
    assert arguments[arguments.index("--op") + 1] == "*=reference"
    assert " ".join(arguments).count("--ignore-config-key a --ignore-config-key b") == 1
    made = engine_config("bundled", max_num_seqs=3, cache_memory=arguments[arguments.index("--cache-memory") + 1])
    assert (made.max_num_seqs, made.cache_memory) == (3, 10 << 20)
