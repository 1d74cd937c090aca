"""An engine over several hosts, played by launches on this one: meeting, tokens, and what happens when one is gone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import httpx
import pytest
import zmq

from tests.dist.processes import Server, children, command, left_in, lives, needs_proc, serving, stop, until
from tests.dist.test_faults import ENGINE_DIED, KILLED, PROMPT, WITHIN, exhaustive, slow
from thalweg import LLM, SamplingParams, __version__
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes import host_link as link
from thalweg.engine.processes.hosts import OtherHosts
from thalweg.errors import ConfigError, EngineDeadError

KEY = "0123456789abcdef" * 4
GREEDY = {"prompt": "ab", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody has."""
    for first in range(29_600 + os.getpid() % 2000, 32_000, count):
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


@dataclass
class Host:
    """A host other than node 0."""

    process: subprocess.Popen[str]
    log: Path

    def ranks(self) -> list[int]:
        return [pid for pid in children(self.process.pid) if "rank_main" in command(pid)]

    def ended(self, within: float = WITHIN) -> tuple[int, str]:
        """Its exit code and last line."""
        code = self.process.wait(within)
        text = self.log.read_text()
        assert "Traceback" not in text, text
        return code, text.splitlines()[-1]


@contextmanager
def host(log: Path, tmp: Path, *arguments: str, key: str | None = KEY, within: tuple[str, ...] = ()) -> Iterator[Host]:
    """`within` are the words of a command that runs it elsewhere."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp)}
    environment |= {} if key is None else {"THALWEG_CLUSTER_KEY": key}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*within, sys.executable, "-m", "thalweg", "serve", *arguments], stderr=errors, env=environment, text=True
        )
    found = Host(process, log)
    try:
        yield found
    finally:
        left = found.ranks()
        process.kill()
        process.wait()
        until(lambda: not any(map(lives, left)), "a rank outlives its host", WITHIN)


def options(folder: Path, port: int, *, ranks: int = 2) -> list[str]:
    return [str(folder), "-tp", str(ranks), "--nnodes", "2", "--master-port", str(port)]


@contextmanager
def two_hosts(folder: Path, tmp: Path, tmp_path: Path, ranks: int = 2) -> Iterator[tuple[Server, Host]]:
    """Node 0, and node 1 with half of the ranks."""
    asked = options(folder, free_ports(2), ranks=ranks)
    (tmp / "0").mkdir()
    (tmp / "1").mkdir()
    with (
        serving(tmp_path / "log-0", tmp / "0", *asked, "--sse-ping-interval", "0.1", THALWEG_CLUSTER_KEY=KEY) as server,
        host(tmp_path / "log-1", tmp / "1", *asked, "--node-rank", "1") as other,
    ):
        yield server, other


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
@needs_proc
def test_tokens_are_those_of_one_host_and_all_end_with_node_0(
    folder: Path, tmp: Path, tmp_path: Path, ranks: int
) -> None:
    with two_hosts(folder, tmp, tmp_path, ranks) as (server, other):
        url = server.url()
        answer = httpx.post(f"{url}/v1/completions", json=GREEDY, timeout=60).json()["choices"][0]
        assert len(other.ranks()) == ranks // 2
        server.process.terminate()
        assert server.process.wait(WITHIN) == 0
        assert other.ended()[0] == 0
        assert not left_in(tmp / "0")
        assert not left_in(tmp / "1")
    with LLM(str(folder)) as llm:
        greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        assert answer["token_ids"] == llm.generate("ab", greedy)[0].outputs[0].token_ids


def rank(server: Server, other: Host) -> int:
    return other.ranks()[0]


def launcher(server: Server, other: Host) -> int:
    return other.process.pid


def engine(server: Server, other: Host) -> int:
    return server.pid("engine") or 0


@pytest.mark.parametrize(
    ("victim", "how", "here", "there"),
    [
        exhaustive(rank, signal.SIGKILL, "node 1: tensor-parallel rank 1 ended with exit code -9", "rank 1 ended"),
        exhaustive(launcher, signal.SIGKILL, "node 1 has said nothing for 5 s", None),
        # As a host without power: its end of the connection does not close.
        exhaustive(launcher, signal.SIGSTOP, "node 1 has said nothing for 5 s", None),
        slow(engine, signal.SIGKILL, "the engine process ended with exit code -9", "node 0 is gone"),
    ],
)
@needs_proc
def test_a_death_on_either_host_ends_both(
    folder: Path,
    tmp: Path,
    tmp_path: Path,
    victim: Callable[[Server, Host], int],
    how: signal.Signals,
    here: str,
    there: str | None,
) -> None:
    with two_hosts(folder, tmp, tmp_path) as (server, other), ThreadPoolExecutor(1) as pool:
        url, lines = server.url(), [""]
        server.pid("engine")

        def stream() -> str:
            with httpx.stream("POST", f"{url}/v1/completions", json=PROMPT, timeout=60) as response:
                lines.extend(line for line in response.iter_lines() if line.startswith("data: "))
            return lines[-1]

        answer = pool.submit(stream)
        until(lambda: len(lines) > 10, "nothing runs")
        pid, ranks, stopped = victim(server, other), other.ranks(), how == signal.SIGSTOP
        if stopped:
            for each in (pid, *ranks):
                stop(each)
        else:
            os.kill(pid, how)
        assert '"engine_dead"' in answer.result(WITHIN)
        assert httpx.get(f"{url}/health").status_code == 503
        (tmp / "1" / "x").touch()
        assert server.process.wait(WITHIN) == ENGINE_DIED
        assert not left_in(tmp / "0")
        last = server.log.read_text().splitlines()[-1]
        assert last.startswith("error: ")
        assert here in last
        if there is not None:
            code, last = other.ended()
            assert code == ENGINE_DIED
            assert there in last
        elif stopped:
            other.process.kill()
        if victim is launcher and not stopped:
            assert other.process.wait(WITHIN) == KILLED
        until(lambda: not any(map(lives, ranks)) or stopped, "a rank lives on", WITHIN)
        for each in ranks if stopped else ():
            os.kill(each, signal.SIGKILL)
        assert stopped or left_in(tmp / "1") == ["x"]


@pytest.mark.slow
@needs_proc
def test_all_that_are_told_to_stop_at_once_finish_what_is_under_way(folder: Path, tmp: Path, tmp_path: Path) -> None:
    """As a service manager stops every process of both hosts."""
    with two_hosts(folder, tmp, tmp_path) as (server, other), ThreadPoolExecutor(1) as pool:
        url, lines = server.url(), [""]

        def stream() -> str:
            with httpx.stream("POST", f"{url}/v1/completions", json=PROMPT, timeout=60) as response:
                lines.extend(line for line in response.iter_lines() if line.startswith("data: "))
            return lines[-1]

        answer = pool.submit(stream)
        until(lambda: len(lines) > 10, "nothing runs")
        for pid in (*other.ranks(), other.process.pid, server.pid("engine") or 0, server.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert not answer.done()
        assert answer.result(60) == "data: [DONE]"
        assert not any("error" in line for line in lines)
        assert server.process.wait(WITHIN) == 0
        assert other.ended()[0] == 0
        assert not left_in(tmp / "0")
        assert not left_in(tmp / "1")


@pytest.mark.slow
@needs_proc
def test_a_second_host_of_a_rank_is_refused_and_one_that_is_told_to_stop_leaves_in_the_end(
    folder: Path, tmp: Path, tmp_path: Path
) -> None:
    asked = options(folder, free_ports(2))
    (tmp / "0").mkdir()
    (tmp / "1").mkdir()
    joins = [*asked, "--node-rank", "1"]
    with (
        serving(tmp_path / "log-0", tmp / "0", *asked, THALWEG_CLUSTER_KEY=KEY) as server,
        host(tmp_path / "log-1", tmp / "1", *joins, "--shutdown-timeout", "0.5") as other,
    ):
        url = server.url()
        with host(tmp_path / "log-2", tmp, *joins) as second:
            code, last = second.ended(30)
            assert code == 2
            assert last == "error: another host is node 1 already; expected each --node-rank on one host alone"
        assert httpx.post(f"{url}/v1/completions", json=GREEDY, timeout=60).status_code == 200
        assert "a second host with --node-rank 1 asked to join and was refused" in server.log.read_text()
        other.process.terminate()
        assert other.ended(WITHIN)[0] == 0
        assert server.process.wait(WITHIN) == ENGINE_DIED
        assert "node 1: its host was told to stop" in server.log.read_text().splitlines()[-1]


@pytest.fixture
def network() -> Iterator[tuple[str, str, str]]:
    """Another network stack of this machine, behind a cable: its name, the cable's, and our address."""
    name, ours, theirs, net = f"thalweg-{os.getpid()}", f"tw{os.getpid()}a", f"tw{os.getpid()}b", "10.213.77"
    up = [
        f"netns add {name}", f"link add {ours} type veth peer name {theirs}", f"link set {theirs} netns {name}",
        f"addr add {net}.1/24 dev {ours}", f"link set {ours} up", f"-n {name} addr add {net}.2/24 dev {theirs}",
        f"-n {name} link set {theirs} up", f"-n {name} link set lo up",
    ]  # fmt: skip
    try:
        for each in up:
            done = ip(each)
            if done.returncode:
                pytest.skip(f"makes no network of its own here (ip {each}: {done.stderr.strip()})")
        yield name, ours, f"{net}.1"
    finally:
        ip(f"link del {ours}")
        ip(f"netns del {name}")


def ip(arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (iproute2) for a network of its own")
    return subprocess.run(["ip", *arguments.split()], capture_output=True, text=True)


@needs_proc
@pytest.mark.exhaustive
def test_a_cable_that_is_pulled_ends_both(
    folder: Path, tmp: Path, tmp_path: Path, network: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, cable, address = network
    monkeypatch.setenv("THALWEG_CLUSTER_KEY", KEY)
    port = free_ports(2)
    asked = [*options(folder, port), "--master-addr", address, "--node-rank", "1"]
    with host(tmp_path / "log", tmp, *asked, within=("ip", "netns", "exec", name)) as other:
        with LLM(str(folder), tensor_parallel_size=2, nnodes=2, master_addr=address, master_port=port) as llm:
            stream = llm.stream("ab", SamplingParams(max_tokens=400, ignore_eos=True))
            next(stream)
            ip(f"link set {cable} down")
            began = time.monotonic()
            with pytest.raises(EngineDeadError, match="node 1 has said nothing for 5 s"):
                list(stream)
            assert time.monotonic() - began < WITHIN
        code, last = other.ended()
        assert (code, last) == (ENGINE_DIED, "error: node 0 is gone; its own lines say why")


@needs_proc
@pytest.mark.exhaustive
def test_a_death_while_a_host_is_awaited_or_loads(folder: Path, tmp: Path, tmp_path: Path) -> None:
    with two_hosts(folder, tmp, tmp_path) as (server, other):
        until(other.ranks, "node 1 starts no rank")
        server.pid("engine")
        os.kill(other.ranks()[0], signal.SIGKILL)
        assert server.check_gone(WITHIN) == ENGINE_DIED
        assert "node 1: tensor-parallel rank 1 ended with exit code -9" in server.log.read_text()
        assert other.ended()[0] == ENGINE_DIED
        assert not left_in(tmp / "1")


@needs_proc
@pytest.mark.slow
def test_a_host_that_was_started_otherwise_or_knows_another_key_is_refused(
    folder: Path, tmp: Path, tmp_path: Path
) -> None:
    asked = options(folder, free_ports(2))
    (tmp / "0").mkdir()
    with serving(tmp_path / "log-0", tmp / "0", *asked, THALWEG_CLUSTER_KEY=KEY) as server:
        until(lambda: "waits" in server.log.read_text(), "it does not listen")
        with host(tmp_path / "log-1", tmp, *asked, "--node-rank", "1", key="f" * 32) as other:
            code, last = other.ended()
            assert code == 2
            assert "has another THALWEG_CLUSTER_KEY" in last
        assert server.process.poll() is None
        nowhere = [str(tmp / "nowhere"), *asked[1:], "--node-rank", "1"]
        with host(tmp_path / "log-1", tmp, *nowhere) as other:
            code, last = other.ended()
            assert code == 2
            assert "nowhere" in last
        assert server.process.poll() is None
        with host(tmp_path / "log-1", tmp, *asked, "--node-rank", "1", "--block-size", "32") as other:
            code, last = other.ended()
            assert code == 2
            assert "--block-size is 32 on node 1 and 64 on node 0; expected the same" in last
        assert server.check_gone(WITHIN) == ENGINE_DIED
        assert "--block-size is 32 on node 1" in server.log.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    "ranks", [slow(("-tp", "2")), exhaustive(("-dp", "2", "--enable-expert-parallel"))], ids=["tensor", "data"]
)
def test_torchrun_starts_every_node(folder: Path, tmp_path: Path, ranks: tuple[str, ...]) -> None:
    """With one process for each rank: the first serves."""
    pytest.importorskip("torch.distributed.run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(free_ports(3))]
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*torchrun, "-m", "thalweg", "serve", str(folder), *ranks, "--port", "0"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "THALWEG_CLUSTER_KEY": KEY},
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", line)
        assert found, log.read_text()
        answer = httpx.post(f"{found[0]}/v1/completions", json=GREEDY, timeout=60).json()
        assert len(answer["choices"][0]["token_ids"]) == 12
        process.terminate()
        process.wait(40)
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_nobody_gets_in_or_reads_along_without_the_key() -> None:
    config = EngineConfig(tensor_parallel_size=2, nnodes=2, master_port=free_ports(2))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    words, plans = (link.listening(context, config, node, KEY) for node in (0, 1))
    others = {}
    for name, key in (("stranger", "f" * 32), ("friend", KEY)):
        speaks, hears = (link.connected(context, node, key) for node in (0, 1))
        link.connect(speaks, config, 0)
        link.connect(hears, config, 1)
        others[name] = speaks, hears
    plain = context.socket(zmq.DEALER)
    plain.connect(f"tcp://127.0.0.1:{config.master_port + 1}")
    with context:
        for name, (speaks, _) in others.items():
            speaks.send(name.encode())
        assert words.recv() == b"friend"
        assert not words.poll(300)
        hears = others["friend"][1]
        plans.send_multipart([hears.routing_id, b"a plan"])
        assert hears.recv() == b"a plan"
        with pytest.raises(zmq.ZMQError, match="Host unreachable"):
            plans.send_multipart([others["stranger"][1].routing_id, b"a plan"])
        assert not others["stranger"][1].poll(100)
        assert not plain.poll(0)
        context.destroy(0)


def test_node_0_hears_only_hosts_that_joined_it_and_says_so_if_it_understands_none() -> None:
    config = EngineConfig(tensor_parallel_size=2, nnodes=2, master_port=free_ports(2))
    hosts, errors = OtherHosts(config, KEY), SimpleQueue[EngineDeadError]()
    with zmq.Context() as context:
        words, plans = (link.connected(context, node, KEY) for node in (0, 1))
        hosts.watch(errors.put)
        try:
            link.connect(words, config, 0)
            link.connect(plans, config, 1)
            # What a host of an engine that was here before has not yet said.
            words.send(link.encode(link.Lost(1, b"another", "its rank 1 ended")))
            words.send(link.encode(link.Alive(1, b"another")))
            words.send(link.encode(link.Join(1, plans.routing_id, __version__, config.to_dict())))
            assert plans.poll(30_000)
            assert plans.recv_multipart()[0] == link.MEET
            assert errors.empty()
            words.send(b"\xc1")
            assert "a host says what node 0 does not understand" in str(errors.get(timeout=30))
            words.send(link.encode(link.Lost(1, b"another", "of a host that was refused")))
            words.send(link.encode(link.Lost(1, plans.routing_id, "its rank 1 ended")))
            assert str(errors.get(timeout=30)) == "node 1: its rank 1 ended"
        finally:
            hosts.close("")
            context.destroy(0)


def test_a_host_that_is_gone_once_it_is_answered_is_missed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "LOST_SECONDS", 1.0)
    config = EngineConfig(tensor_parallel_size=2, nnodes=2, master_port=free_ports(2))
    hosts, errors = OtherHosts(config, KEY), SimpleQueue[EngineDeadError]()
    with zmq.Context() as context:
        words = link.connected(context, 0, KEY)
        hosts.watch(errors.put)
        try:
            link.connect(words, config, 0)
            began = time.monotonic()
            words.send(link.encode(link.Join(1, b"its socket for plans", __version__, config.to_dict())))
            assert str(errors.get(timeout=30)) == "node 1 asked to join and was gone; its own lines say why"
            assert time.monotonic() - began < 1.9
        finally:
            hosts.close("")
            context.destroy(0)


def test_a_host_that_is_refused_over_and_over_does_not_speak_for_the_one_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a service manager starts a host again whose first process died a moment ago."""
    monkeypatch.setattr(link, "LOST_SECONDS", 1.0)
    config = EngineConfig(tensor_parallel_size=2, nnodes=2, master_port=free_ports(2))
    hosts, errors = OtherHosts(config, KEY), SimpleQueue[EngineDeadError]()
    with zmq.Context() as context:
        words, first, again = (link.connected(context, node, KEY) for node in (0, 1, 1))
        hosts.watch(errors.put)
        try:
            for node, each in ((0, words), (1, first), (1, again)):
                link.connect(each, config, node)
            for each, answer in ((first, link.MEET), *[(again, link.LEAVE)] * 8):
                words.send(link.encode(link.Join(1, each.routing_id, __version__, config.to_dict())))
                assert each.recv_multipart()[0] == answer
                time.sleep(0.25)
            assert not errors.empty()
            assert "node 1 has said nothing for 1 s" in str(errors.get())
        finally:
            hosts.close("")
            context.destroy(0)


@pytest.mark.parametrize(("name", "expected"), [("127.0.0.1", ""), ("localhost", r" \(127\.0\.0\.1\)")])
def test_node_0_says_at_which_address_it_listens(
    name: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(link.sockets, "getaddrinfo", lambda *_, **__: found)
    port = free_ports(2)
    hosts = OtherHosts(EngineConfig(tensor_parallel_size=2, nnodes=2, master_addr=name, master_port=port), KEY)
    hosts.watch(lambda _: None)
    hosts.close("")
    assert re.search(f"node 0 waits at {name}:{port}{expected} for node 1\n", capsys.readouterr().err)


@pytest.mark.parametrize("key", [None, "short"])
def test_a_key_is_needed(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    monkeypatch.delenv("THALWEG_CLUSTER_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("THALWEG_CLUSTER_KEY", key)
    with pytest.raises(ConfigError, match="THALWEG_CLUSTER_KEY"):
        LLM(tensor_parallel_size=2, nnodes=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(nnodes=2), "--nnodes is 2; it must divide --tensor-parallel-size, which is 1"),
        (dict(nnodes=2, tensor_parallel_size=2, node_rank=2), "--node-rank is 2; expected an integer from 0 to 1"),
        (dict(nnodes=2, tensor_parallel_size=2, master_port=65535), "--master-port is 65535"),
        (dict(nnodes=2, tensor_parallel_size=2, cpu_cache_memory=1, cache_folder="x"), "--cache-folder needs all"),
        (dict(distributed_executor_backend="slurm"), "expected mp or ray"),
        (dict(distributed_executor_backend="ray"), "--tensor-parallel-size, which is 1; expected 2 or more"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(node_rank=1), "only `thalweg serve` joins another host's engine"),
        (dict(master_addr="192.0.2.1"), "expected"),
        (dict(master_addr="no-such-host.invalid"), "which has no address"),
    ],
)
def test_an_llm_that_cannot_be_node_0(options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THALWEG_CLUSTER_KEY", KEY)
    with pytest.raises(ConfigError, match=message):
        LLM(tensor_parallel_size=2, nnodes=2, **options)
