"""Ranks that Ray places, on a cluster of several nodes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.dist.processes import children, command, left_in, needs_proc, serving, until
from tests.dist.test_faults import ENGINE_DIED, PROMPT, WITHIN
from tests.dist.test_hosts import GREEDY, free_ports
from thalweg import LLM, SamplingParams
from thalweg.errors import ConfigError, UnsupportedError

BACKEND = ("--distributed-executor-backend", "ray", "--device", "cpu")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes with room for one rank each."""
    pytest.importorskip("ray", reason="needs Ray, which is not installed (the extra `ray`)")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def ranks() -> list[int]:
    """Rank processes that Ray's workers have started."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if "rank_main" in command(pid) and "ray::" in command(parent(pid))]


@pytest.mark.slow
@needs_proc
def test_tokens_over_two_nodes_and_a_node_that_dies(cluster: Any, folder: Path, tmp: Path, tmp_path: Path) -> None:
    with LLM(str(folder)) as llm:
        greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        expected = llm.generate("ab", greedy)[0].outputs[0].token_ids
    asked = (str(folder), "-tp", "2", *BACKEND, "--master-port", str(free_ports(2)), "--sse-ping-interval", "0.1")
    (tmp / "server").mkdir()
    where = {"RAY_ADDRESS": cluster.address}
    for end in ("SIGTERM", "death"):
        with (
            serving(tmp_path / "log", tmp / "server", *asked, **where) as server,
            ThreadPoolExecutor(1) as pool,
        ):
            url, lines = server.url(), [""]
            answer = httpx.post(f"{url}/v1/completions", json=GREEDY, timeout=60).json()["choices"][0]
            assert answer["token_ids"] == expected
            assert len(ranks()) == 1
            if end == "SIGTERM":
                server.process.terminate()
                assert server.process.wait(2 * WITHIN) == 0
                until(lambda: not ranks(), "a rank lives on", WITHIN)
                continue

            def stream(url: str = url, lines: list[str] = lines) -> str:
                with httpx.stream("POST", f"{url}/v1/completions", json=PROMPT, timeout=60) as response:
                    lines.extend(line for line in response.iter_lines() if line.startswith("data: "))
                return lines[-1]

            stopped = pool.submit(stream)
            until(lambda lines=lines: len(lines) > 10, "nothing runs")
            [rank] = ranks()
            raylet = parent(parent(rank))
            assert "raylet" in command(raylet)
            for pid in (raylet, *children(raylet), rank):  # as a host without power
                os.kill(pid, signal.SIGKILL)
            assert '"engine_dead"' in stopped.result(WITHIN)
            assert httpx.get(f"{url}/health").status_code == 503
            assert server.process.wait(2 * WITHIN) == ENGINE_DIED
            until(lambda: not ranks(), "a rank lives on", WITHIN)
            last = server.log.read_text().splitlines()[-1]
            assert last == "error: the engine died: node 1: its Ray actor ended: its host or process is gone"
        assert not left_in(tmp / "server")


@pytest.mark.exhaustive
@needs_proc
def test_a_cluster_without_room_is_refused(cluster: Any, folder: Path, tmp: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", tmp, str(folder), "-tp", "4", *BACKEND, RAY_ADDRESS=cluster.address) as server:
        assert server.check_gone(60) == 2
        last = server.log.read_text().splitlines()[-1]
        assert last == ("error: --tensor-parallel-size is 4, and Ray's cluster has 2 CPUs; expected one for each rank")


@pytest.mark.exhaustive
def test_without_a_cluster_it_says_so(folder: Path, tmp: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray, which is not installed (the extra `ray`)")
    run = subprocess.run(
        [sys.executable, "-m", "thalweg", "generate", str(folder), "--prompt", "a", "-tp", "2", *BACKEND],
        env={**os.environ, "RAY_TMPDIR": str(tmp)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 2
    assert "finds no Ray cluster" in run.stderr.splitlines()[-1]


def test_without_ray_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match="thalweg\\[ray\\]"):
        LLM(str(folder), tensor_parallel_size=2, distributed_executor_backend="ray")


def test_a_key_that_can_be_guessed_is_refused_with_ray_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.util", "ray.util.scheduling_strategies"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setenv("THALWEG_CLUSTER_KEY", "short")
    with pytest.raises(ConfigError, match="THALWEG_CLUSTER_KEY, which has 5 characters"):
        LLM(str(folder), tensor_parallel_size=2, distributed_executor_backend="ray")
