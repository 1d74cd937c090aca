"""Ranks on GPUs: how they end, and what a death leaves. Others may wait for the dead one in a kernel, also NCCL's.

With two GPUs, each rank has one; else both are on one, and NCCL, which takes them for those of two hosts, connects them
by sockets.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.dist.changes import ON_ONE_DEVICE, UNMAPPED, Changes
from tests.dist.processes import (
    children,
    command,
    left_in_shared_memory,
    lives,
    needs_proc,
    shared_memory,
    until,
)
from tests.dist.test_faults import exhaustive
from tests.dist.test_hosts import KEY, free_ports
from tests.e2e.tiny_model import CONTEXT, EOS, VOCAB, write_tiny_model
from tests.models import random_checkpoint as random
from tests.models.served import KIMI
from thalweg import SamplingParams
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes.client import EngineClient
from thalweg.errors import EngineDeadError
from thalweg.text.output import Delta

pytestmark = [pytest.mark.gpu, needs_proc]

WITHIN = 10.0  # seconds from a death to the end of all
OPTIONS: dict[str, Any] = dict(device="cuda", dtype="bfloat16", max_num_seqs=4, cache_memory=1 << 30)
SIZES: dict[str, dict[str, Any]] = {
    "rank 1": dict(tensor_parallel_size=2),
    "engine": dict(tensor_parallel_size=2),
    "data rank 0": dict(data_parallel_size=2, enable_expert_parallel=True),
    "data rank 1": dict(data_parallel_size=2, enable_expert_parallel=True),
}
"""How many ranks there are, by which one dies."""
ARGUMENT = {"rank 1": "/rank-1", "engine": "/engine", "data rank 0": "/engine", "data rank 1": "/engine-1"}
AT_START = {  # calls, of either kind of ranks, at which a process is held
    "loading": "thalweg.parallel.mesh:Mesh.await_loaded",
    "compiling": "thalweg.assembly.rank:make_kernels",
    "capture": "torch.cuda:CUDAGraph.capture_end",
}
LAUNCH, SERVE_OTHERS = (f"thalweg.runner.step:ModelRunner.{name}" for name in ("launch", "serve_others"))
ENDLESS = SamplingParams(max_tokens=CONTEXT - 10, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that every kernel serves."""
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    c = random.config(**{**KIMI, "vocab": VOCAB, "context": CONTEXT}, eos_token_id=EOS)
    return random.write(folder, c, random.weights(c))


Start = Callable[..., Changes]


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Changes of all processes that are started from then on."""
    import torch

    more = [ON_ONE_DEVICE] if torch.cuda.device_count() < 2 else []
    return lambda *changes, mapped=True: Changes(
        tmp_path, monkeypatch, [*changes, *more, *([] if mapped else [UNMAPPED])]
    )


def pids(client: EngineClient) -> dict[str, int]:
    """Of those that are there, by name."""
    engines = [engine.process.pid for engine in client.engines]
    if len(engines) > 1:
        return {f"data rank {i}": pid for i, pid in enumerate(engines)}
    ranks = [child for child in children(engines[0]) if "rank_main" in command(child)] if engines else []
    return dict(zip(("engine", "rank 1"), engines + ranks, strict=False))


async def killed(client: EngineClient, victim: str, lost: asyncio.Task[Any], *, ready: bool) -> None:
    """`victim` dies; `lost` says so, and every process ends in time."""
    found = pids(client)
    assert len(found) == 2, found
    os.kill(found[victim], signal.SIGKILL)
    began = time.monotonic()
    name = victim.replace("data rank", "engine process of data-parallel rank")
    how = "ended with exit code -9" if ready or victim == "rank 1" else "ended before it was ready"
    with pytest.raises(EngineDeadError, match=f"{name}.* {how}"):
        await asyncio.wait_for(lost, WITHIN)
    said = time.monotonic() - began
    until(lambda: not any(map(lives, found.values())), "a process lives on", WITHIN)
    print(f"{victim}: said after {said:.1f} s, all ended after {time.monotonic() - began:.1f} s")


async def _until(condition: Callable[[], object], seconds: float = 90) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    ("point", "victim"),
    [
        ("capture", "rank 1"),
        ("loading", "data rank 1"),
        exhaustive("loading", "rank 1"),
        exhaustive("compiling", "rank 1"),
        exhaustive("capture", "data rank 0"),
        exhaustive("capture", "data rank 1"),
        exhaustive("compiling", "data rank 1"),
        exhaustive("loading", "engine"),
        exhaustive("capture", "engine"),
    ],
)
@pytest.mark.parametrize("mapped", [True, exhaustive(False)], ids=["mapped", "nccl"])
def test_a_death_at_the_start_ends_all(folder: Path, changed: Start, point: str, victim: str, mapped: bool) -> None:
    """The victim stays where it comes to the point; the other one comes as far as it does without it."""
    changes = changed((AT_START[point], "hangs", ARGUMENT[victim]), mapped=mapped)
    changes.arm()

    async def check() -> None:
        client = EngineClient(EngineConfig(str(folder), **OPTIONS, **SIZES[victim]))
        start = asyncio.create_task(client.start())
        try:
            await _until(lambda: changes.hangs or start.done())
            await asyncio.sleep(1)  # for the other one
            await killed(client, victim, start, ready=False)
        finally:
            await client.close()

    before = shared_memory()
    asyncio.run(check())
    until(lambda: not left_in_shared_memory(before), f"{left_in_shared_memory(before)} stays", 1)


@pytest.mark.parametrize(
    ("point", "victim"),
    [
        ("decode", "rank 1"),
        ("prefill", "data rank 0"),
        exhaustive("decode", "data rank 1"),
        exhaustive("prefill", "rank 1"),
        exhaustive("decode", "engine"),
        exhaustive("decode", "data rank 0"),
        exhaustive("prefill", "engine"),
        exhaustive("prefill", "data rank 1"),
    ],
)
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "nccl"])
def test_a_death_while_a_request_runs_ends_all(
    folder: Path, changed: Start, point: str, victim: str, mapped: bool
) -> None:
    """In a prompt the victim launches nothing more, so that the other one waits for it in a kernel."""
    call = SERVE_OTHERS if victim == "data rank 1" else LAUNCH  # data rank 0 gets the request
    changes = changed((call, "hangs", ARGUMENT[victim]), mapped=mapped)

    async def check() -> None:
        client = EngineClient(EngineConfig(str(folder), **OPTIONS, **SIZES[victim]))
        await client.start()
        try:
            assert client.info.decode_steps.startswith("CUDA graphs"), client.info.decode_steps
            if point == "prefill":
                changes.arm()
            tokens: list[int] = []

            async def answer() -> None:
                async for delta in client.generate([5, 9, 2, 7] * 20, ENDLESS):
                    tokens.extend(delta.token_ids)

            lost = asyncio.create_task(answer())
            await _until(lambda: changes.hangs if point == "prefill" else len(tokens) > 5)
            await asyncio.sleep(0.5 if point == "prefill" else 0)
            await killed(client, victim, lost, ready=True)
        finally:
            await client.close()

    before = shared_memory()
    asyncio.run(check())
    until(lambda: not left_in_shared_memory(before), f"{left_in_shared_memory(before)} stays", 1)


SCRIPT = """
import glob, os, signal, sys, threading, time
from pathlib import Path
from thalweg import LLM, SamplingParams
from thalweg.errors import EngineDeadError

began = 0.0

def ranks():
    pids = [pid for file in glob.glob("/proc/self/task/*/children") for pid in Path(file).read_text().split()]
    return [int(pid) for pid in pids if "engine.processes" in Path("/proc", pid, "cmdline").read_text()]

def kill():
    global began
    [rank] = ranks()
    os.kill(rank, signal.SIGKILL)
    began = time.monotonic()

def hold():
    def wait():
        while not Path({there!r}).exists():
            time.sleep(0.01)
        time.sleep(0.5)
        kill()
    Path({armed!r}).touch()
    threading.Thread(target=wait, daemon=True).start()

try:
    {before}
    llm = LLM({folder!r}, **{options!r})
    assert llm.info.decode_steps.startswith("CUDA graphs"), llm.info.decode_steps
    stream = llm.stream([5, 9, 2, 7], SamplingParams(max_tokens=400, temperature=0, ignore_eos=True))
    print([next(stream) for _ in range(5)][-1].request_id)
    {end}
except EngineDeadError as e:
    print(e, began, time.monotonic(), sep="\\n", flush=True)
{after}
sys.exit(7)
"""


def ran(
    folder: Path,
    tmp_path: Path,
    *,
    before: str = "",
    end: str = "",
    after: str = "",
    size: str = "rank 1",
    code: int = 7,
) -> list[str]:
    """What a script with an LLM over two ranks says, if it ends as it is to. Of torch it says nothing, unless torch may
    log that it misses a rank."""
    files = {"there": str(tmp_path / "there"), "armed": str(tmp_path / "armed")}
    options = OPTIONS | SIZES[size]
    script = SCRIPT.format(folder=str(folder), options=options, before=before, end=end, after=after, **files)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert run.returncode == code, (run.returncode, run.stdout, run.stderr)
    words = ["frame #", "terminate", "Traceback"]
    words += ["destroy_process_group", "ProcessGroup", "NCCL"] if "hold()" not in before + end else []
    for word in words:
        assert word not in run.stderr.replace("go by NCCL alone", ""), run.stderr
    return run.stdout.splitlines()


def check_lost(lines: list[str]) -> None:
    """Of a script that lost its rank 1 and has just ended."""
    ended = time.monotonic()  # on one clock with that of the process
    *_, error, began, said = lines
    assert "rank 1 ended with exit code -9" in error
    print(f"said after {float(said) - float(began):.1f} s, ended {ended - float(said):.1f} s later")
    assert float(said) - float(began) < WITHIN
    assert ended - float(said) < WITHIN


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "nccl"])
@pytest.mark.parametrize("end", [exhaustive("del stream; llm.close()"), ""], ids=["closed", "ended"])
@pytest.mark.parametrize("size", ["rank 1", "data rank 1"])
def test_an_exit_says_nothing_of_process_groups(
    folder: Path, tmp_path: Path, changed: Start, size: str, end: str, mapped: bool
) -> None:
    changed(mapped=mapped)
    assert len(ran(folder, tmp_path, end=end, size=size)) == 1


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "nccl"])
@pytest.mark.parametrize("after", ["llm.close()", exhaustive("")], ids=["closed", "ended"])
@pytest.mark.parametrize("how", ["hold()", exhaustive("kill()")], ids=["held", "at once"])
def test_a_process_that_lost_a_rank_goes_on_to_its_own_end(
    folder: Path, tmp_path: Path, changed: Start, how: str, after: str, mapped: bool
) -> None:
    """The rank that lost the other one is a thread of this process, and waits in a kernel."""
    changed((LAUNCH, "hangs", ARGUMENT["rank 1"]), mapped=mapped)
    check_lost(ran(folder, tmp_path, end=f"{how}; list(stream)", after=after))


@pytest.mark.parametrize("point", ["loading", exhaustive("capture")])
def test_a_process_that_lost_a_rank_at_the_start_goes_on_to_its_own_end(
    folder: Path, tmp_path: Path, changed: Start, point: str
) -> None:
    changed((AT_START[point], "hangs", ARGUMENT["rank 1"]), mapped=False)
    check_lost(ran(folder, tmp_path, before="hold()"))


@pytest.mark.parametrize("mapped", [True, exhaustive(False)], ids=["mapped", "nccl"])
@pytest.mark.parametrize("size", ["rank 1", "data rank 1"])
def test_ranks_end_with_a_process_that_dies(
    folder: Path, tmp_path: Path, changed: Start, size: str, mapped: bool
) -> None:
    changed(mapped=mapped)
    before = shared_memory()
    die = "print(*ranks(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    *_, found = ran(folder, tmp_path, end=die, size=size, code=-signal.SIGKILL)
    assert found
    until(lambda: not any(lives(int(pid)) for pid in found.split()), "a rank lives on", WITHIN)
    until(lambda: not left_in_shared_memory(before), f"{left_in_shared_memory(before)} stays", 1)


HOST = """
import sys
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes.host_main import serve_ranks
from thalweg.errors import EngineDeadError
try:
    serve_ranks(EngineConfig({folder!r}, node_rank=1, **{options!r}), 30.0)
except EngineDeadError as e:
    print(e)
    sys.exit(7)
"""


def test_a_death_on_another_host_ends_both(folder: Path, changed: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts are played by launches on this one. In a step, node 0's rank waits in NCCL for the dead one."""
    import torch

    changed()
    monkeypatch.setenv("THALWEG_CLUSTER_KEY", KEY)
    options = OPTIONS | SIZES["rank 1"] | {"nnodes": 2, "master_port": free_ports(2), "device": "cuda:0"}
    there = options | {"device": f"cuda:{min(1, torch.cuda.device_count() - 1)}"}
    script = HOST.format(folder=str(folder), options=there)

    async def to_its_end(answer: AsyncGenerator[Delta, None]) -> None:
        async for _ in answer:
            pass

    async def check(other: subprocess.Popen[str]) -> None:
        client = EngineClient(EngineConfig(str(folder), **options))
        await client.start()
        try:
            assert client.info.decode_steps.startswith("CUDA graphs"), client.info.decode_steps
            [rank] = [pid for pid in children(other.pid) if "rank_main" in command(pid)]
            answer = client.generate([5, 9, 2, 7], ENDLESS)
            for _ in range(6):
                await anext(answer)
            os.kill(rank, signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(EngineDeadError, match="node 1: tensor-parallel rank 1 ended with exit code -9"):
                await asyncio.wait_for(to_its_end(answer), WITHIN)
            until(lambda: not any(map(lives, pids(client).values())), "the engine lives on", WITHIN)
            assert other.wait(WITHIN) == 7
            print(f"all ended after {time.monotonic() - began:.1f} s")
        finally:
            await client.close()

    before = shared_memory()
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        try:
            asyncio.run(check(other))
            assert other.stdout is not None
            assert "rank 1 ended with exit code -9" in other.stdout.read()
        finally:
            other.kill()
    until(lambda: not left_in_shared_memory(before), f"{left_in_shared_memory(before)} stays", 1)
