"""Data-parallel ranks over several hosts, played by launches on this one: tokens, and how all end."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.dist.processes import Server, children, command, left_in, lives, needs_proc, serving, until
from tests.dist.test_data_parallel_server import PROMPTS, ask, metrics
from tests.dist.test_faults import ENGINE_DIED, KILLED, PROMPT, WITHIN, exhaustive, slow
from tests.dist.test_hosts import KEY, Host, free_ports, host
from tests.dist.threads import on_ranks
from thalweg import LLM, SamplingParams
from thalweg.assembly.expert_placement import check_same
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError
from thalweg.parallel.data_ranks import DataRanks
from thalweg.parallel.placement import Placement


def engines(process: int) -> list[int]:
    return sorted(pid for pid in children(process) if "processes.main" in command(pid))


def options(folder: Path, port: int, ranks: int = 2) -> list[str]:
    parallel = ["--data-parallel-size", str(ranks), "--enable-expert-parallel", "--max-num-seqs", "4"]
    return [str(folder), *parallel, "--nnodes", "2", "--master-port", str(port)]


@contextmanager
def two_hosts(folder: Path, tmp: Path, tmp_path: Path, *more: str, ranks: int = 2) -> Iterator[tuple[Server, Host]]:
    """Node 0, and node 1 with half of the ranks."""
    asked = [*options(folder, free_ports(2), ranks), *more]
    (tmp / "0").mkdir()
    (tmp / "1").mkdir()
    with (
        serving(tmp_path / "log-0", tmp / "0", *asked, "--sse-ping-interval", "0.1", THALWEG_CLUSTER_KEY=KEY) as server,
        host(tmp_path / "log-1", tmp / "1", *asked, "--node-rank", "1") as other,
    ):
        yield server, other


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"), [(4, ()), pytest.param(2, ("-tp", "2"), marks=pytest.mark.exhaustive)], ids=["4", "2-of-2"]
)
def test_tokens_are_those_of_one_rank_and_all_end_with_node_0(
    folder: Path, tmp: Path, tmp_path: Path, ranks: int, more: tuple[str, ...]
) -> None:
    with LLM(str(folder), max_num_seqs=4) as llm:
        greedy = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, greedy)]
    with two_hosts(folder, tmp, tmp_path, "--expert-metrics", *more, ranks=ranks) as (server, other):
        url = server.url()
        assert len(engines(server.process.pid)) == len(engines(other.process.pid)) == ranks // 2
        greedy_body = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda prompt: ask(url, prompt=prompt, **greedy_body), PROMPTS))
        assert [answer["choices"][0]["token_ids"] for answer in answers] == expected
        until(lambda: metrics(url)["thalweg_num_requests_running"] == 0, "requests run on", 5, every=0.1)
        found = metrics(url)
        assert all(found[f'thalweg_rank_generation_tokens_total{{rank="{rank}"}}'] for rank in range(ranks))
        assert sum(n for name, n in found.items() if name.startswith("thalweg_expert_tokens_total"))
        created = httpx.post(f"{url}/v1/sessions", json={"name": "s", "prompt": list(range(3, 150))}, timeout=60)
        assert created.status_code == 200, created.text
        assert ask(url, session="s", prompt=[5, 6], max_tokens=3)["usage"]["prompt_tokens"] == 149
        server.process.terminate()
        assert server.process.wait(WITHIN) == 0
        assert other.ended()[0] == 0
        for log in (server.log, other.log):
            assert not re.search("lost|error|Warn", log.read_text()), log.read_text()
        assert not left_in(tmp / "0")
        assert not left_in(tmp / "1")


@needs_proc
@pytest.mark.exhaustive
def test_an_llm_has_ranks_of_several_hosts(
    folder: Path, tmp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THALWEG_CLUSTER_KEY", KEY)
    port, greedy = free_ports(2), SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    shape: dict[str, Any] = {"data_parallel_size": 2, "enable_expert_parallel": True, "nnodes": 2, "master_port": port}
    found = []
    with host(tmp_path / "log", tmp, *options(folder, port), "--node-rank", "1") as other:
        for options_of_llm in (shape, {}):
            with LLM(str(folder), max_num_seqs=4, **options_of_llm) as llm:
                found.append([output.outputs[0].token_ids for output in llm.generate(PROMPTS, greedy)])
        assert found[0] == found[1]
        assert other.ended()[0] == 0
    with pytest.raises(ConfigError, match="--node-rank is 1; only `thalweg serve` joins another host's engine"):
        LLM(str(folder), node_rank=1, **shape)


def rank_there(server: Server, other: Host) -> int:
    return engines(other.process.pid)[0]


def rank_here(server: Server, other: Host) -> int:
    return engines(server.process.pid)[0]


def launcher(server: Server, other: Host) -> int:
    return other.process.pid


def front_end(server: Server, other: Host) -> int:
    return server.process.pid


@needs_proc
@pytest.mark.parametrize(
    ("victim", "here", "there"),
    [
        slow(rank_there, "data-parallel rank 1", "the engine process of data-parallel rank 1 ended with exit code -9"),
        slow(launcher, "node 1", None),
        exhaustive(rank_here, "data-parallel rank 0 ended with exit code -9", "node 0 ended the engine: the engine"),
        exhaustive(front_end, None, "node 0 is gone"),
    ],
)
def test_a_death_on_either_host_ends_both(
    folder: Path,
    tmp: Path,
    tmp_path: Path,
    victim: Callable[[Server, Host], int],
    here: str | None,
    there: str | None,
) -> None:
    with two_hosts(folder, tmp, tmp_path) as (server, other), ThreadPoolExecutor(2) as pool:
        url = server.url()
        lines: list[list[str]] = [[], []]

        def stream(lines: list[str]) -> str:
            try:
                with httpx.stream("POST", f"{url}/v1/completions", json=PROMPT, timeout=60) as response:
                    lines.extend(line for line in response.iter_lines() if line.startswith("data: "))
            except httpx.TransportError:
                return ""
            return lines[-1]

        answers = [pool.submit(stream, each) for each in lines]  # one on each rank
        until(lambda: all(len(each) > 5 for each in lines), "nothing runs")
        pids = [*engines(server.process.pid), *engines(other.process.pid)]
        os.kill(victim(server, other), signal.SIGKILL)
        for answer in answers:
            assert victim is front_end or '"engine_dead"' in answer.result(WITHIN)
        code = server.process.wait(WITHIN)
        assert code == (KILLED if here is None else ENGINE_DIED)
        if here is not None:
            last = server.log.read_text().splitlines()[-1]
            assert last.startswith("error: ")
            assert here in last
        if there is None:
            assert other.process.wait(WITHIN) == KILLED
        else:
            code, last = other.ended()
            assert code == ENGINE_DIED
            assert there in last
        until(lambda: not any(map(lives, pids)), "an engine process lives on", WITHIN)
        until(lambda: not left_in(tmp / "0") and not left_in(tmp / "1"), "a folder stays", 2)


@needs_proc
@pytest.mark.slow
def test_a_host_that_was_started_otherwise_or_has_no_device_is_named(folder: Path, tmp: Path, tmp_path: Path) -> None:
    for more, here, there in (
        (("--block-size", "32"), "--block-size is 32 on node 1 and 64 on node 0", "--block-size is 32 on node 1"),
        (("--device", "cuda"), "node 1: --device is 'cuda'", "node 0 ended the engine: node 1: --device is 'cuda'"),
    ):
        asked = options(folder, free_ports(2))
        with (
            serving(tmp_path / "log-0", tmp, *asked, THALWEG_CLUSTER_KEY=KEY) as server,
            host(tmp_path / "log-1", tmp, *asked, "--node-rank", "1", *more) as other,
        ):
            _, last = other.ended(30)
            assert there in last
            assert server.process.wait(WITHIN) in (2, ENGINE_DIED)
            assert here in server.log.read_text().splitlines()[-1]
            until(lambda: not left_in(tmp), "a folder stays", 2)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [(3, "--nnodes is 3; it must divide --data-parallel-size, which is 4"), (8, "must divide --data-parallel-size")],
)
def test_each_data_parallel_rank_is_on_one_host(nodes: int, message: str) -> None:
    shape = {"data_parallel_size": 4, "enable_expert_parallel": True, "tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match=message):
        EngineConfig(nnodes=nodes, **shape)  # type: ignore[arg-type]
    config = EngineConfig(nnodes=2, node_rank=1, **shape)  # type: ignore[arg-type]
    assert (config.ranks_per_node, config.tensor_ranks_here, config.data_ranks_of(1)) == (4, range(2), range(2, 4))


def test_a_placement_that_differs_between_hosts_is_refused(tmp_path: Path) -> None:
    rows = [(0, 1, 2, 3), (0, 1, 2, 3), (0, 2, 1, 3)]

    def body(ranks: DataRanks) -> str:
        own = {n: Placement.of_row(rows[ranks.rank + n], 4, 2, "here") for n in range(last + 1)}
        check_same(ranks, own, "places.json")
        return "same"

    last = 0
    assert on_ranks(2, tmp_path, body) == ["same", "same"]
    last = 1
    (tmp_path / "again").mkdir()
    expected = "places experts otherwise on the host of data-parallel rank 1 than on that of rank 0; expected the same"
    with pytest.raises(ConfigError, match=f"--expert-placement is 'places.json', which {expected} file on every host"):
        on_ranks(2, tmp_path / "again", body)
