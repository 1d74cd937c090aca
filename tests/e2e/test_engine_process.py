"""The engine in a process of its own: streams, refusals, aborts, and what happens when either side dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.models import random_checkpoint as random
from thalweg import LLM, SamplingParams
from thalweg.config.engine import EngineConfig
from thalweg.core import RequestUpdate
from thalweg.engine.processes.client import EngineClient, RequestLimits
from thalweg.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    InvalidRequest,
    QueueTimeout,
    RequestTimeout,
    ThalwegError,
)
from thalweg.text.output import Delta

PROMPTS = [[3 + i, 7, 11 * i % 100, 5] * (2 + 3 * i) for i in range(6)]
PARAMS = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config(context=4000)
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with LLM(str(folder), max_num_seqs=1) as llm:
        return [llm.generate(p, PARAMS)[0].outputs[0].token_ids for p in PROMPTS]


def run(
    folder: Path,
    body: Callable[[EngineClient], Awaitable[None]],
    limits: RequestLimits | None = None,
    **options: object,
) -> None:
    async def main() -> None:
        client = EngineClient(EngineConfig(str(folder), **{"max_num_seqs": 4, **options}), limits)
        await client.start()
        try:
            await asyncio.wait_for(body(client), 60)
        finally:
            await client.close()

    asyncio.run(main())


async def tokens(client: EngineClient, prompt: list[int], params: SamplingParams = PARAMS) -> list[int]:
    return [t async for delta in client.generate(prompt, params) for t in delta.token_ids]


async def idle(client: EngineClient) -> None:
    """Ask for one more token, so that fresh stats come, and see that nothing is held."""
    await tokens(client, [1, 2], SamplingParams(max_tokens=2, ignore_eos=True))
    stats = client.stats
    assert stats is not None
    assert (stats.num_running, stats.num_waiting, stats.blocks_used, stats.slots_used) == (0, 0, 0, 0)


def test_streams_side_by_side_refusals_and_aborts(folder: Path, expected: list[list[int]]) -> None:
    async def body(client: EngineClient) -> None:
        assert await asyncio.gather(*(tokens(client, p) for p in PROMPTS)) == expected

        with pytest.raises(InvalidRequest, match="--max-model-len"):
            await tokens(client, [5] * 5000)
        with pytest.raises(InvalidRequest, match="vocabulary"):
            await tokens(client, [10**6])

        async def leave_early(prompt: list[int]) -> None:
            async for delta in client.generate(prompt, SamplingParams(max_tokens=3000, ignore_eos=True)):
                if delta.token_ids:
                    return

        started = time.monotonic()
        await asyncio.gather(*(leave_early(p) for p in PROMPTS), tokens(client, PROMPTS[0]))
        assert await tokens(client, PROMPTS[1]) == expected[1]
        await idle(client)
        assert time.monotonic() - started < 30

        task = asyncio.create_task(tokens(client, PROMPTS[2], SamplingParams(max_tokens=3000, ignore_eos=True)))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(client)

    run(folder, body)


def test_a_watched_engine_takes_no_thread_of_the_loop(folder: Path) -> None:
    """Of which there are a few more than processors: as many data-parallel ranks would leave none to the server."""

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        client = EngineClient(EngineConfig(str(folder), max_num_seqs=4))
        await client.start()
        try:
            assert await asyncio.wait_for(asyncio.to_thread(lambda: 5), 20) == 5
        finally:
            await client.close()

    asyncio.run(main())


def test_a_killed_engine_ends_every_stream_with_an_error(folder: Path) -> None:
    async def body(client: EngineClient) -> None:
        async def endless() -> None:
            async for _ in client.generate(PROMPTS[0], SamplingParams(max_tokens=3900, ignore_eos=True)):
                pass

        tasks = [asyncio.create_task(endless()) for _ in range(3)]
        await asyncio.sleep(0.3)
        os.kill(client.engines[0].process.pid, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert all(isinstance(r, EngineDeadError) for r in results), results
        with pytest.raises(EngineDeadError):
            await tokens(client, PROMPTS[0])

    run(folder, body)


def test_a_rank_that_dies_while_nothing_runs_is_noticed(folder: Path) -> None:
    async def body(client: EngineClient) -> None:
        assert await tokens(client, PROMPTS[0])
        pid = client.engines[0].process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        (rank,) = [int(pid) for pid in children if "rank_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(rank, signal.SIGKILL)
        for _ in range(80):
            if client.dead is not None:
                break
            await asyncio.sleep(0.1)
        assert "rank 1 ended" in str(client.dead)

    run(folder, body, tensor_parallel_size=2)


def test_an_engine_killed_before_it_listens_is_reported(folder: Path) -> None:
    async def main() -> None:
        client = EngineClient(EngineConfig(str(folder)))
        start = asyncio.create_task(client.start())
        while not client.engines:
            await asyncio.sleep(0.001)
        os.kill(client.engines[0].process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="before it was ready"):
            await asyncio.wait_for(start, 20)

    asyncio.run(main())


def test_nothing_is_counted_before_the_start(folder: Path) -> None:
    assert asyncio.run(EngineClient(EngineConfig(str(folder))).expert_counts()) == {}


def test_an_engine_that_cannot_start_raises_what_it_was(folder: Path, tmp_path: Path) -> None:
    async def start(client: EngineClient) -> None:
        await client.start()

    with pytest.raises(ConfigError, match="--cache-memory"):
        asyncio.run(start(EngineClient(EngineConfig(str(folder), cache_memory=10))))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError):
        asyncio.run(start(EngineClient(EngineConfig(str(broken)))))


def test_an_engine_does_not_outlive_its_parent(folder: Path) -> None:
    script = f"""
import asyncio, sys, time
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes.client import EngineClient
async def main():
    client = EngineClient(EngineConfig({str(folder)!r}, tensor_parallel_size=2, max_num_seqs=2))
    await client.start()
    print(client.engines[0].process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and Path(f"/proc/{engine}").exists():
        time.sleep(0.1)
        # An orphan that has ended but was not reaped yet shows as a zombie.
        if Path(f"/proc/{engine}/stat").exists() and ") Z" in Path(f"/proc/{engine}/stat").read_text():
            return
    assert not Path(f"/proc/{engine}").exists()


LONG = SamplingParams(max_tokens=3000, temperature=0, ignore_eos=True)


def test_a_request_that_waits_too_long_is_dropped_and_the_others_are_not(
    folder: Path, expected: list[list[int]]
) -> None:
    async def body(client: EngineClient) -> None:
        running = asyncio.create_task(tokens(client, PROMPTS[0], LONG))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        waiting = [tokens(client, p) for p in PROMPTS[1:4]]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(r, QueueTimeout) for r in results), results
        assert "--queue-timeout" in str(results[0])
        assert 0.2 < time.monotonic() - began < 5
        await asyncio.sleep(0.1)
        assert client.stats is not None
        assert (client.stats.num_running, client.stats.num_waiting) == (1, 0)
        running.cancel()
        # One that has its slot may take longer than it may wait.
        assert (await tokens(client, PROMPTS[0], LONG))[:20] == expected[0]
        await idle(client)

    run(folder, body, RequestLimits(queue_timeout=0.25), max_num_seqs=1)


def test_a_request_that_takes_too_long_ends_in_every_phase(folder: Path, expected: list[list[int]]) -> None:
    async def body(client: EngineClient) -> None:
        # One decodes, one prefills in many steps, two wait.
        work = [tokens(client, p, LONG) for p in (PROMPTS[0], [7] * 900, PROMPTS[1], PROMPTS[2])]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert all(isinstance(r, RequestTimeout) for r in results), results
        assert "--request-timeout" in str(results[0])
        assert await tokens(client, PROMPTS[3]) == expected[3]
        await idle(client)

    run(folder, body, RequestLimits(request_timeout=0.6), max_num_seqs=2, max_num_batched_tokens=4)


def test_what_nobody_reads_is_given_up(folder: Path, expected: list[list[int]], monkeypatch: Any) -> None:
    monkeypatch.setattr("thalweg.engine.processes.client.MAX_UNREAD", 30)

    async def body(client: EngineClient) -> None:
        deltas = client.generate(PROMPTS[0], LONG)
        first = await anext(deltas)
        assert await tokens(client, PROMPTS[1]) == expected[1]  # meanwhile nobody reads the other
        while client.stats is None or client.stats.num_running:
            await asyncio.sleep(0.01)
        read = [*first.token_ids]

        async def rest() -> None:
            async for delta in deltas:
                read.extend(delta.token_ids)

        with pytest.raises(RequestTimeout, match="read"):
            await rest()
        assert read[:20] == expected[0]
        assert len(read) < 100
        await idle(client)

    run(folder, body)


def test_an_engine_that_hangs_is_ended(folder: Path) -> None:
    async def body(client: EngineClient) -> None:
        assert await tokens(client, PROMPTS[0])
        os.kill(client.engines[0].process.pid, signal.SIGSTOP)
        await asyncio.sleep(1.2)
        assert client.dead is None  # it has nothing to do, so there is nothing to hear
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match="said nothing"):
            await tokens(client, PROMPTS[0])
        assert 0.5 < time.monotonic() - began < 5
        with pytest.raises(EngineDeadError):
            await tokens(client, PROMPTS[0])

    run(folder, body, step_timeout=0.6)


def test_an_answer_that_is_read_slowly_is_no_hang(folder: Path, expected: list[list[int]]) -> None:
    async def body(client: EngineClient) -> None:
        slow = client.generate(PROMPTS[0], PARAMS)
        got = (await anext(slow)).token_ids
        await asyncio.sleep(2)  # the engine was done long ago and has had nothing to say since
        assert client.dead is None
        async for delta in slow:
            got += delta.token_ids
        assert got == expected[0]
        assert await tokens(client, PROMPTS[1]) == expected[1]

    run(folder, body, step_timeout=0.6)


def test_aborts_in_every_phase_leave_nothing_and_touch_nobody_else(folder: Path, expected: list[list[int]]) -> None:
    """Ids that begin with one another are different requests."""

    async def body(client: EngineClient) -> None:
        async def ask(name: str, prompt: list[int], params: SamplingParams) -> list[int]:
            return [t async for delta in client.generate(prompt, params, name) for t in delta.token_ids]

        stays = asyncio.create_task(ask("1", PROMPTS[4], PARAMS))
        decodes = asyncio.create_task(ask("12", PROMPTS[0], LONG))
        await asyncio.sleep(0.1)
        prefills = asyncio.create_task(ask("123", [7] * 900, LONG))
        queued = asyncio.create_task(ask("1234", PROMPTS[1], LONG))
        await asyncio.sleep(0.05)
        for task in (queued, prefills, decodes):
            task.cancel()
        await asyncio.gather(queued, prefills, decodes, return_exceptions=True)
        assert await stays == expected[4]
        await idle(client)

    run(folder, body, max_num_seqs=3, max_num_batched_tokens=4)


def test_a_request_whose_text_breaks_ends_alone(folder: Path, expected: list[list[int]], monkeypatch: Any) -> None:
    async def body(client: EngineClient) -> None:
        process = client._outputs.process

        def breaks(update: RequestUpdate) -> Delta | None:
            if update.request_id == "bad":
                raise ValueError("no such byte")
            return process(update)

        monkeypatch.setattr(client._outputs, "process", breaks)

        async def bad() -> None:
            async for _ in client.generate(PROMPTS[1], LONG, "bad"):
                pass

        results = await asyncio.gather(tokens(client, PROMPTS[0]), bad(), return_exceptions=True)
        assert results[0] == expected[0]
        assert isinstance(results[1], ThalwegError)
        assert "no such byte" in str(results[1])
        await idle(client)

    run(folder, body)


def test_the_sockets_folder_is_for_this_user_alone_and_goes_with_the_engine(folder: Path) -> None:
    folders: list[Path] = []

    async def body(client: EngineClient) -> None:
        folders.append(client._folder.path)
        assert folders[0].stat().st_mode & 0o077 == 0

    run(folder, body)
    assert not folders[0].exists()
