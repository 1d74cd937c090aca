"""Who watches the processes of other ranks, and ranks that cannot map each other's memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.models import random_checkpoint as random
from thalweg import SamplingParams
from thalweg.assembly.rank import build_rank
from thalweg.config.engine import EngineConfig
from thalweg.core import Admission, Prefill, StepPlan, pack_ids
from thalweg.errors import RankLostError
from thalweg.parallel.mesh import Mesh
from thalweg.parallel.peers import NoPeerMemory, PeerMemory, Watch, map_peers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches processes by files that Linux alone has")


@pytest.fixture
def child() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_the_end_of_a_process_is_told_a_while_later(child: subprocess.Popen[bytes]) -> None:
    told = threading.Event()
    watch = Watch([child.pid], told.set, after_s=0.3)
    assert not told.wait(0.1)
    began = time.monotonic()
    child.kill()
    child.wait()
    assert told.wait(5)
    assert time.monotonic() - began >= 0.3
    watch.close()


@pytest.mark.parametrize("ends", [False, True])
def test_nothing_is_told_once_it_is_closed(child: subprocess.Popen[bytes], ends: bool) -> None:
    told = threading.Event()
    before = len(os.listdir("/proc/self/fd"))
    watch = Watch([child.pid], told.set, after_s=0.3)
    if ends:
        child.kill()
        child.wait()
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before
    child.kill()
    child.wait()
    assert not told.wait(0.4)


def test_a_process_that_is_not_there_is_refused(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    with pytest.raises(ProcessLookupError):
        Watch([child.pid], lambda: None)


@pytest.mark.parametrize(
    ("refuses", "error", "reason"),
    [
        ("thalweg.parallel.peers._allocate", NoPeerMemory("no memory here"), "no memory here"),
        ("os.pidfd_open", OSError(38, "Function not implemented"), "[Errno 38] Function not implemented"),
    ],
)
def test_ranks_agree_on_the_reason_if_they_cannot_map_or_watch(
    refuses: str, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver of this machine, if it has one, is left alone."""

    def refuse(_: int) -> int:
        raise error

    peers = "thalweg.parallel.peers"
    for name, gives in ((f"{peers}._allocate", 1), (f"{peers}._export", b"x" * 64), (f"{peers}._open", 2)):
        monkeypatch.setattr(name, lambda *_, gives=gives: gives)
    monkeypatch.setattr(f"{peers}._call", lambda *_: None)
    monkeypatch.setattr(f"{peers}._spare", [])
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(refuses, refuse)
    meeting = threading.Barrier(2)
    told: dict[int, bytes] = {}

    def gather(rank: int, own: bytes) -> list[bytes]:
        told[rank] = own
        meeting.wait(10)
        both = [told[0], told[1]]
        meeting.wait(10)
        return both

    reasons = {}

    def run(rank: int) -> None:
        try:
            PeerMemory(rank, lambda own: gather(rank, own), 2, [(4, 64)])
        except NoPeerMemory as e:
            reasons[rank] = str(e)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert reasons == {0: reason, 1: reason}


def test_without_peer_memory_a_mesh_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise NoPeerMemory("ranks are on several hosts")

    monkeypatch.setattr("thalweg.parallel.peers.PeerMemory", refuse)
    mesh = Mesh(0, 2, group=object())
    with caplog.at_level(logging.WARNING):
        map_peers(mesh, torch.device("cuda"), [(4, 64)])
    assert not mesh.mapped
    assert "several hosts" in caplog.text


def test_ranks_on_a_cpu_map_nothing() -> None:
    mesh = Mesh(0, 2, group=object())
    map_peers(mesh, torch.device("cpu"), [(4, 64)])
    assert mesh.peers is None


def test_a_result_that_is_read_after_a_rank_has_ended_is_none(
    child: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been added up of what never came."""
    config = random.config(vocab=128, context=300)
    folder = random.write(tmp_path / "model", config, random.weights(config))
    runner, _ = build_rank(EngineConfig(str(folder), max_num_seqs=2, cache_memory=1 << 24), 0, "")
    peers = PeerMemory.__new__(PeerMemory)
    peers.stopped, peers._stop, peers._opened, peers._own = False, torch.zeros(1), [], (0, 0)
    peers._watch = Watch([child.pid], peers._say_stop, after_s=0)
    monkeypatch.setattr(runner.mesh, "peers", peers)
    params = SamplingParams(temperature=0, max_tokens=None)
    admission = Admission(1, "a", pack_ids([1, 2, 3]), 3, params, 0, False)
    first = StepPlan(0, [admission], [(1, 0, 1)], [], [], [Prefill(1, 0, 3, True)])
    assert len(runner.execute(first).token_ids) == 1
    finish = runner.launch(StepPlan(1, [], [], [1], [3], []))
    child.kill()
    child.wait()
    peers._watch._thread.join(5)
    with pytest.raises(RankLostError, match="its process ended"):
        finish()
    runner.close()
