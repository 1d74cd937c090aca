"""Two ranks give what one gives, and a rank that dies ends the run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.dist.changes import Changes
from tests.e2e.tiny_model import write_tiny_model
from tests.models import random_checkpoint as random
from thalweg import LLM, Grammar, SamplingParams
from thalweg.errors import ConfigError, EngineDeadError, InvalidRequest, RankLostError
from thalweg.parallel.data_ranks import DataRanks, join_data_ranks
from thalweg.parallel.groups import file_store, together
from thalweg.parallel.mesh import Mesh, join_mesh

PROMPTS = [[5, 9, 2, 7] * n for n in (1, 7, 20)]
PARAMS = [
    SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=12, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=12, seed=4, top_p=0.9, repetition_penalty=1.2, ignore_eos=True),
]

NCCL = "NCCL error in: a/b.cpp:93, {0} (run with NCCL_DEBUG=INFO for details)\nmore\nLast error:\n{1}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config(vocab=131, context=300)  # an odd vocabulary: the last rank's rows are padded
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


def test_same_tokens_and_logits_as_one_rank(folder: Path) -> None:
    import torch

    results = []
    for size in (1, 2):
        with LLM(
            str(folder), tensor_parallel_size=size, max_num_batched_tokens=32, max_num_seqs=4, block_size=8
        ) as llm:
            outputs = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)]
            results.append((outputs, llm.prompt_logits(PROMPTS[2])))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-4, rtol=0)


def test_a_rank_that_fails_says_why_and_ends(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """At once: it does not wait, as Python ends, for a rank that waits for it."""
    changes = Changes(tmp_path, monkeypatch, [("thalweg.runner.step:ModelRunner.launch", "fails", "/rank-1")])
    with LLM(str(folder), tensor_parallel_size=2, max_num_seqs=2) as llm:
        changes.arm()
        with pytest.raises(EngineDeadError, match="tensor-parallel rank 1 ended with exit code 2"):
            llm.generate(PROMPTS[0], PARAMS[0])
    assert "ZeroDivisionError: a test wants it" in capfd.readouterr().err


@pytest.mark.parametrize("data", [False, True])
def test_a_rank_whose_disk_is_slower_than_the_collectives_timeout_is_awaited(tmp_path: Path, data: bool) -> None:
    import torch

    cpu, order = torch.device("cpu"), list[str]()

    def run(rank: int) -> None:
        meet = (rank, 2, str(tmp_path / "meet"), cpu, 0.5)
        mesh = Mesh(data=join_data_ranks(*meet)) if data else join_mesh(*meet)
        for wait in (lambda: mesh.await_loaded(cpu), lambda: mesh.minimum(0, cpu)):
            time.sleep(1.5 * rank)
            outcome = "met"
            try:
                wait()
            except RankLostError as e:
                outcome = str(e) if ".cc:" in str(e) else "missed"  # gloo's source is of no use to anybody
            if rank == 0:
                order.append(outcome)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert order == ["met", "missed"]


@pytest.mark.parametrize("data", [False, True])
def test_a_rank_that_does_not_come_is_missed(tmp_path: Path, data: bool) -> None:
    """Which one that is, and why, is for whoever watches it to say: its end has the same error."""
    import torch

    with pytest.raises(RankLostError, match="rank 0 lost another rank of 2: ") as caught:
        (join_data_ranks if data else join_mesh)(0, 2, str(tmp_path / "meet"), torch.device("cpu"), timeout_s=0.1)
    assert str(caught.value).count("lost") == 1


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[a/b.cc:12] Connection closed by peer. This is typically so.\nmore", "Connection closed by peer"),
        (NCCL.format("remote process exited or there was a network error", "socket closed"), "socket closed"),
        ("", ""),
    ],
)
def test_what_torch_misses_a_rank_for_is_told_in_a_line(said: str, told: str) -> None:
    with pytest.raises(RankLostError) as caught, together("rank 0", 2):
        raise RuntimeError(said)
    assert str(caught.value) == f"rank 0 lost another rank of 2: {told}"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            NCCL.format("unhandled cuda error", "Cuda failure 2 'out of memory'"),
            "Cuda failure 2 'out of memory'; lower --gpu-memory-utilization",
        ),
        (
            "[enforce fail at a.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.\nmore",
            "DefaultCPUAllocator: can't allocate memory: you tried 9 bytes",
        ),
    ],
)
def test_a_rank_whose_own_memory_does_not_suffice_has_lost_no_other(said: str, told: str) -> None:
    with pytest.raises(EngineDeadError) as caught, together("rank 0", 2):
        raise RuntimeError(said)
    assert type(caught.value) is EngineDeadError
    assert str(caught.value) == f"rank 0 of 2 cannot exchange with the others: {told}"


@pytest.mark.parametrize("name", ["OutOfMemoryError", "AcceleratorError"])
def test_what_torch_says_of_this_rank_s_device_is_no_lost_rank(name: str) -> None:
    import torch

    error = getattr(torch, name)
    with pytest.raises(error, match="CUDA"), together("rank 0", 2):
        raise error("CUDA out of memory")


@pytest.mark.parametrize(("hosts", "calls"), [(1, []), (2, ["minimum"])])
def test_ranks_of_several_hosts_connect_before_they_load_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: int, calls: list[str]
) -> None:
    """As NCCL does at its first collective, for which the store's time holds."""
    import torch
    import torch.distributed as dist

    class Nccl:
        def __init__(self, *_: object) -> None: ...

        class Options: ...

    found: list[str] = []
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(Mesh, "minimum", lambda *_: found.append("minimum"))
    join_mesh(1, 2, str(tmp_path / "meet"), torch.device("cuda"), hosts=hosts)
    assert found == calls


@pytest.mark.parametrize(("set_to", "found"), [(None, "0"), ("1", "1")])
@pytest.mark.parametrize("name", ["TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_FR_BUFFER_SIZE"])
def test_torch_leaves_a_rank_that_nccl_misses_to_whoever_watches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, set_to: str | None, found: str
) -> None:
    import torch
    import torch.distributed as dist

    seen = list[str | None]()

    class Nccl:
        def __init__(self, *_: object) -> None:
            seen.append(os.environ.get(name))

        class Options: ...

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.delenv(name, raising=False)
    if set_to is not None:
        monkeypatch.setenv(name, set_to)
    join_mesh(1, 2, str(tmp_path / "meet"), torch.device("cuda"))
    assert seen == [found]
    assert os.environ.get(name) == set_to


def test_what_a_collective_gives_that_was_abandoned_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torch.distributed as dist

    ended = threading.Event()

    class Nccl:
        abort = staticmethod(ended.set)

        def allreduce(self, *_: object) -> Nccl:
            return self

        def wait(self) -> None:
            assert ended.wait(10)

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    mesh = Mesh(0, 2, Nccl())
    threading.Timer(0.1, mesh.abandon, [1.0]).start()
    with pytest.raises(RankLostError, match="rank 0 lost another rank of 2"):
        mesh.minimum(3, torch.device("cpu"))


def test_grammars_over_two_ranks(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    grammar = Grammar("regex", "[a-z]{4,30}!")
    params = [SamplingParams(max_tokens=40, seed=i, grammar=grammar if i % 2 else None) for i in range(4)]
    prompts = [[5, 9, 2, 7] * (n + 1) for n in range(4)]
    results = []
    for size in (1, 2):
        with LLM(str(folder), tensor_parallel_size=size, max_num_seqs=3) as llm:
            results.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
            with pytest.raises(InvalidRequest, match="grammar"):
                llm.generate(prompts[0], SamplingParams(grammar=Grammar("regex", "(")))
    assert results[0] == results[1]


def test_a_rank_that_dies_ends_the_run_with_an_error(folder: Path) -> None:
    with LLM(str(folder), tensor_parallel_size=2, max_num_seqs=4) as llm:
        stream = llm.stream(PROMPTS[1], SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
        assert llm._engine is not None
        assert llm._engine.ranks is not None
        os.kill(llm._engine.ranks.pids[0], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match="rank"):
            for _ in stream:
                pass
        with pytest.raises(EngineDeadError, match="rank"):
            llm.generate(PROMPTS, PARAMS)
        assert time.monotonic() - began < 20


def test_ranks_that_do_not_divide_are_refused_before_any_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(ConfigError, match="--tensor-parallel-size"):
        LLM(str(folder), tensor_parallel_size=3)


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.6])
def test_a_rank_that_dies_while_the_engine_starts_is_reported(folder: Path, delay: float) -> None:
    pids: list[int] = []
    original = subprocess.Popen

    def popen(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = original(*args, **options)
        pids.append(process.pid)
        threading.Timer(delay, os.kill, (process.pid, signal.SIGKILL)).start()
        return process

    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        with pytest.raises(EngineDeadError, match="rank 1 ended"):
            LLM(str(folder), tensor_parallel_size=2)
    assert time.monotonic() - began < 8
    assert len(pids) == 1


def test_ranks_can_meet_and_leave_although_their_folder_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    stores = [file_store(str(folder / "rendezvous"), 2) for _ in range(2)]
    shutil.rmtree(folder)
    with pytest.raises(OSError, match="No such file"):  # at once: torch would try for minutes
        file_store(str(folder / "rendezvous"), 2)
    if not Path("/proc/self/fd").exists():
        pytest.skip("opens files by their descriptor in /proc")
    for rank, (store, _) in enumerate(stores):
        store.set(f"rank {rank}", "is here")
    assert stores[0][0].get("rank 1") == b"is here"
    files = [file for _, file in stores]
    del store, stores
    for file in files:
        file.close()


@pytest.mark.parametrize(
    "join",
    [
        lambda group, file: Mesh(0, 2, group, file=file),
        lambda group, file: DataRanks(0, 2, group, None, file),
        lambda group, file: DataRanks(0, 2, None, group, file),
    ],
)
def test_ranks_that_are_not_closed_have_their_file_until_the_group_is_gone(join: Any, tmp_path: Path) -> None:
    seen: list[bool] = []

    class Group:
        def __del__(self) -> None:
            seen.append(Path(f"/proc/self/fd/{fd}").exists())

    if not Path("/proc/self/fd").exists():
        pytest.skip("opens files by their descriptor in /proc")
    file = (tmp_path / "meet").open("ab")
    fd = file.fileno()
    ranks = join(Group(), file)
    del file, ranks
    assert seen == [True]


def test_a_step_that_hangs_ends_the_engine(folder: Path) -> None:
    with LLM(str(folder), tensor_parallel_size=2, step_timeout=1.5) as llm:
        llm.generate(PROMPTS, PARAMS)
        assert llm._engine is not None
        assert llm._engine.ranks is not None
        os.kill(llm._engine.ranks.pids[0], signal.SIGSTOP)
        try:
            with pytest.raises(EngineDeadError, match="--step-timeout"):
                llm.generate(PROMPTS, PARAMS)
        finally:
            os.kill(llm._engine.ranks.pids[0], signal.SIGKILL)
