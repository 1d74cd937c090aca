"""A running server's profiler: under load, on one rank and on two, and when its engine dies."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.tiny_model import ServerProcess, start_server, write_tiny_model
from tests.e2e.tiny_model import _ready as ready
from thalweg.cli import main
from thalweg.engine.processes.profiler import ProfilerOptions
from thalweg.profiler.chrome import read_trace
from thalweg.profiler.sql import query
from thalweg.profiler.summary import by_rank, summarize

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 16}


@contextmanager
def profiled_server(tmp_path: Path, **engine: Any) -> Iterator[tuple[ServerProcess, Path]]:
    folder, traces = write_tiny_model(tmp_path / "tiny"), tmp_path / "traces"
    traces.mkdir()
    options = ProfilerOptions(str(traces), 200, 64 << 20)
    code_options = {"profiler": options, "api_key": "key"}
    process = start_server(tmp_path / "log", {"model": str(folder), **LIMITS, **engine}, code_options)
    try:
        server = ready(process, tmp_path / "log")
        with server.stderr:
            yield server, traces
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


def post(server: ServerProcess, path: str, body: Any = None, key: str = "key") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {}),
        pytest.param(2, {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"data_parallel_size": 2, "enable_expert_parallel": True}, marks=pytest.mark.slow),
    ],
    ids=["one", "tensor-parallel", "data-parallel"],
)
def test_load_is_recorded_on_every_rank(
    ranks: int, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with profiled_server(tmp_path, **options) as (server, traces):
        assert post(server, "/start_profile", key="wrong").status_code == 401
        assert post(server, "/stop_profile").status_code == 409
        load = ["bench", "serve", "--base-url", server.url, "--api-key", "key", "--num-prompts", "6"]
        load += ["--tokenizer", str(tmp_path / "tiny"), "--random-input-len", "20", "--random-output-len", "10"]
        load.append("--ignore-eos")
        assert main([*load, "--profile"]) == 0
        out = capsys.readouterr().out
        found = re.search(rf"profile: (\d+) steps, {ranks} ranks?: (\S+) on the server's machine", out)
        assert found is not None, out
        slices = read_trace(found[2])
        assert sorted(by_rank(slices)) == [f"rank {rank}" for rank in range(ranks)]
        for mine in by_rank(slices).values():
            summary = summarize(mine)
            assert summary.steps == int(found[1])
            assert {"Decoder", "KimiDeltaAttention"} <= {row.name for row in summary.modules}
        requests = [s for s in slices if s.category == "request" and s.name.startswith("request ")]
        assert len(requests) == 6
        # A busy machine may hand over all tokens of a request at once, whose decode then takes no time.
        of_requests = {request.id for request in requests}
        assert {s.name for s in slices if s.parent_id in of_requests} == {"prompt", "decode"}
        in_kda = (
            "SELECT COUNT(*) FROM slice s WHERE s.name LIKE 'aten::%' AND EXISTS"
            " (SELECT 1 FROM ancestor_slice(s.id) a WHERE a.name LIKE '%KimiDeltaAttention%')"
        )
        assert query(slices, in_kda).rows[0][0] > 0

        # A window that is full ends by itself, and its trace waits for whoever stops it.
        assert post(server, "/start_profile", {"num_steps": 3}).status_code == 200
        assert post(server, "/start_profile").status_code == 409
        assert main(load) == 0
        trace = post(server, "/stop_profile").json()
        assert (trace["steps"], trace["ranks"], trace["full_of"]) == (3, ranks, "steps")
        assert post(server, "/stop_profile").status_code == 409
        assert post(server, "/start_profile", {"num_steps": 201}).status_code == 400
        assert sorted(str(file) for file in traces.iterdir()) == sorted([found[2], trace["file"]])


def test_an_engine_that_dies_answers_whoever_waits_for_its_profile(tmp_path: Path) -> None:
    with profiled_server(tmp_path) as (server, _):
        assert post(server, "/start_profile").status_code == 200
        pid = server.engine_pid()
        os.kill(pid, signal.SIGSTOP)  # so that the answer is surely still to come
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(post(server, "/stop_profile").status_code))
        asking.start()
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        asking.join(10)
        assert answers == [503]
        assert post(server, "/start_profile").status_code == 503
